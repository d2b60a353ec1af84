"""The latent explorer: what the page carries, and what it does under a mouse, a finger and a keyboard."""

import base64
import io
import json
import math
import re
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sklearn.datasets import load_digits
from torch import Tensor

from mnist_vae.model.vae import VAE, Activation, VAEConfig, negative_elbo, to_pixels
from mnist_vae.pictures.explorer import explorer_html

TAB10 = ["1f77b4", "ff7f0e", "2ca02c", "d62728", "9467bd", "8c564b", "e377c2", "7f7f7f", "bcbd22", "17becf"]
GRAY_LEVEL = 1 / 255  # the smallest difference that a screen can show


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, np.ndarray]:
    """scikit-learn's 8 × 8 handwritten digits, blown up to 28 × 28: pixels (N, 784) and labels (N,)."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).repeat(3, axis=1).repeat(3, axis=2) / 16
    return torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2)))).float().flatten(1), labels.astype(np.uint8)


@pytest.fixture(scope="module")
def vae(digits: tuple[Tensor, np.ndarray]) -> VAE:
    """A model that knows its digits after a few seconds."""
    torch.manual_seed(1)
    vae = VAE(VAEConfig(hidden_dims=(64,)))
    optimizer = torch.optim.Adam(vae.parameters(), lr=5e-3)
    for _ in range(40):
        for x in digits[0][torch.randperm(len(digits[0]))].split(128):
            logits, posterior = vae(x)
            optimizer.zero_grad()
            (negative_elbo(logits, x, posterior).loss / len(x)).backward()
            optimizer.step()
    return vae


@pytest.fixture(scope="module")
def codes(vae: VAE, digits: tuple[Tensor, np.ndarray]) -> np.ndarray:
    return vae.encode(digits[0]).mean.detach().numpy()


@pytest.fixture(scope="module")
def html(vae: VAE, codes: np.ndarray, digits: tuple[Tensor, np.ndarray]) -> str:
    return explorer_html(vae, codes, digits[1], dataset="digits (scikit-learn)")


def untrained(latent_dim: int, *hidden_dims: int, activation: Activation = "relu") -> VAE:
    torch.manual_seed(latent_dim)
    vae = VAE(VAEConfig(hidden_dims or (32,), latent_dim, activation=activation))
    for layer in vae.decoder[:-1:2]:
        torch.nn.init.kaiming_normal_(layer.weight)  # so that pixels depend on z, and on what each layer does to it
    return vae


def random_page(vae: VAE, images: int = 200, **options) -> str:
    rng = np.random.default_rng(1)
    codes, labels = rng.normal(size=(images, vae.config.latent_dim)), np.arange(images, dtype=np.uint8) % 10
    return explorer_html(vae, codes, labels, **{"dataset": "noise", **options})


def carried(html: str) -> dict:
    """The data in a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def unpack(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


def decode(vae: VAE, *z: float | list[float]) -> np.ndarray:
    """One code, number by number, to its pixels (784,); several codes to (N, 784)."""
    with torch.no_grad():
        return to_pixels(vae.decode(torch.tensor(z, dtype=torch.float32))).numpy()


# ---- the page as a file ----


def test_explorer_html_is_equal_for_equal_arguments():
    assert random_page(untrained(2)) == random_page(untrained(2))


def test_explorer_html_stays_below_three_megabytes():
    assert len(random_page(untrained(20, 400), images=10_000).encode()) < 3_000_000


def test_explorer_html_refers_to_nothing_outside_itself(html: str):
    assert re.findall(r"https?://", html) == []
    assert re.findall(r'(?:src|href)=(?!"data:)|url\(|@import', html) == []


def decoded_from(html: str, z: np.ndarray) -> np.ndarray:
    """What the weights in a page make of codes (N, Z): pixels (N, 784)."""
    data = carried(html)
    layers = list(pairwise(data["layers"]))
    sizes = [size for inputs, outputs in layers for size in (outputs * inputs, outputs)]
    parts = np.split(unpack(data["weights"], "<f2").astype(np.float32), np.cumsum(sizes))
    activate = {"relu": lambda y: np.maximum(y, 0), "tanh": np.tanh}[data["activation"]]
    y = z
    for depth, (_, outputs) in enumerate(layers):
        weight, bias = parts[2 * depth : 2 * depth + 2]
        y = (activate(y) if depth else y) @ weight.reshape(outputs, -1).T + bias
    return 1 / (1 + np.exp(-y))


def test_explorer_html_carries_weights_that_decode_as_torch_does(vae: VAE, html: str):
    axis = np.linspace(-carried(html)["extent"], carried(html)["extent"], 41)
    z = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    assert np.abs(decoded_from(html, z) - decode(vae, *z.tolist())).max() < GRAY_LEVEL


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_explorer_html_carries_a_decoder_of_several_layers(activation: Activation):
    vae = untrained(3, 20, 30, 40, activation=activation)
    page = random_page(vae)
    assert carried(page)["layers"] == [3, 40, 30, 20, 784]
    z = np.random.default_rng(2).normal(size=(100, 3))
    assert np.abs(decoded_from(page, z) - decode(vae, *z.tolist())).max() < GRAY_LEVEL


def test_explorer_html_carries_each_image_as_a_dot_inside_the_plane(
    html: str, codes: np.ndarray, digits: tuple[Tensor, np.ndarray]
):
    data = carried(html)
    dots = unpack(data["codes"], "<i2").reshape(-1, 2) / 32767 * data["extent"]
    np.testing.assert_allclose(dots, codes, atol=1e-3)
    np.testing.assert_array_equal(unpack(data["labels"], "u1"), digits[1])
    assert data["extent"] >= np.abs(codes).max()


def test_explorer_html_has_room_for_the_contours_of_the_prior():
    page = explorer_html(untrained(2), np.zeros((1, 2)), np.zeros(1, np.uint8), dataset="one image")
    assert carried(page)["extent"] > 3


def test_explorer_html_puts_the_most_active_dimensions_first():
    nats = [0.1, 2.0, 0.3, 0.4, 3.0, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2]
    data = carried(random_page(untrained(12), kld_per_dimension=nats))
    assert data["plane"] == [1, 4]
    assert data["sliders"] == [11, 10, 9, 8, 7, 6, 5, 3]  # at most eight: 2 and 0 rest


def test_explorer_html_ranks_dimensions_by_the_variance_of_the_codes_without_kld():
    codes = np.random.default_rng(1).normal(size=(500, 3)) * [2.0, 0.1, 1.0]
    data = carried(explorer_html(untrained(3), codes, np.zeros(500, np.uint8), dataset="noise"))
    assert (data["plane"], data["sliders"]) == ([0, 2], [1])


def test_explorer_html_shows_names_as_text_and_never_as_markup():
    page = random_page(untrained(2), title="<b>{{data}}", dataset="</script>")
    assert "<title>&lt;b&gt;{{data}} · &lt;/script&gt;</title>" in page
    assert carried(page)["plane"] == [0, 1]


@pytest.mark.parametrize(
    ("codes", "labels", "kld", "message"),
    [
        (np.zeros((4, 3)), np.zeros(4, np.uint8), None, "do not fit latent_dim 2"),
        (np.zeros((4, 2)), np.zeros(5, np.uint8), None, "do not fit latent_dim 2"),
        (np.zeros((4, 2)), np.zeros(4, np.uint8), [1.0, 1.0, 1.0], "do not fit latent_dim 2"),
        (np.full((4, 2), np.nan), np.zeros(4, np.uint8), None, "codes are not all finite"),
    ],
)
def test_explorer_html_refuses_arguments_that_make_no_page(codes, labels, kld, message):
    with pytest.raises(ValueError, match=message):
        explorer_html(untrained(2), codes, labels, dataset="noise", kld_per_dimension=kld)


def test_explorer_html_refuses_a_diverged_decoder():
    vae = untrained(2)
    torch.nn.init.constant_(vae.decoder[0].bias, math.nan)
    with pytest.raises(ValueError, match="weights are not all finite"):
        explorer_html(vae, np.zeros((1, 2)), np.zeros(1, np.uint8), dataset="noise")


# ---- the page in a browser ----


@pytest.fixture
def visit(browser, tmp_path):
    """Opens a page from a file. At the end of the test, whatever it did, it must have asked nobody for anything."""
    contexts, complaints, requests = [], [], []

    def visit(html: str, width: int = 1200, height: int = 800, **options):
        path = tmp_path / "explorer.html"
        path.write_text(html, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.on("request", lambda request: requests.append(request.url))
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def position(page, *z: float) -> list[float]:
    return page.evaluate("z => explorer.position(z)", list(z))


def hover(page, *z: float) -> None:
    page.mouse.move(*position(page, *z))


def current_z(page) -> list[float]:
    return page.evaluate("explorer.z")


def displayed(page) -> np.ndarray:
    """The pixels (784,) of the digit's canvas, in [0, 1]."""
    js = """() => {
        const pen = new OffscreenCanvas(28, 28).getContext("2d", {willReadFrequently: true});
        pen.drawImage(document.getElementById("digit"), 0, 0);
        return Array.from(pen.getImageData(0, 0, 28, 28).data);
    }"""
    return np.array(page.evaluate(js)).reshape(784, 4)[:, 0] / 255


def seen(page) -> np.ndarray:
    """The plane as it is on the screen, RGB in [0, 255] as (height, width, 3)."""
    return 255 * imread(io.BytesIO(page.locator("#plane").screenshot()))[:, :, :3]


def colourful(page) -> int:
    """How many pixels of the plane are neither black, white nor gray."""
    return int((np.ptp(seen(page), axis=2) > 60).sum())


@pytest.mark.slow
@pytest.mark.parametrize("z", [(0.0, 0.0), (1.5, -0.8), (-2.0, 1.0), (3.0, 3.0)])
def test_explorer_page_draws_what_torch_decodes_under_the_pointer(
    visit: Callable, vae: VAE, html: str, z: tuple[float, float]
):
    page = visit(html)
    hover(page, *z)
    assert current_z(page) == pytest.approx(z, abs=0.02)  # half a screen pixel
    expected = decode(vae, *current_z(page))
    assert np.abs(page.evaluate("explorer.pixels") - expected).max() < GRAY_LEVEL
    assert np.abs(displayed(page) - expected).max() < 1.5 * GRAY_LEVEL  # and the canvas rounds


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_explorer_page_decodes_through_several_layers_as_torch_does(visit: Callable, activation: Activation):
    vae = untrained(2, 20, 30, activation=activation)
    page = visit(random_page(vae))
    for z in [(0.0, 0.0), (1.5, -0.8), (-3.0, 2.0)]:
        hover(page, *z)
        expected = decode(vae, *current_z(page))
        assert np.abs(page.evaluate("explorer.pixels") - expected).max() < GRAY_LEVEL
    assert page.locator("#about").inner_text() == "200 test images, decoder 2-30-20-784"


@pytest.mark.slow
def test_explorer_page_has_the_first_dimension_to_the_right_and_the_second_downwards(visit: Callable, html: str):
    page = visit(html)
    box = page.locator("#plane").bounding_box()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.25 * box["height"])
    right, down = current_z(page)
    assert right > 1
    assert down < -1
    assert page.locator("#plane").get_attribute("aria-label") == (
        "Latent plane: z[0] grows to the right, z[1] grows downwards."
    )


@pytest.mark.slow
def test_explorer_page_shows_the_digit_of_the_cluster_under_the_pointer(
    visit: Callable, html: str, codes: np.ndarray, digits
):
    images, labels = digits[0].numpy(), digits[1]
    class_means = np.stack([images[labels == digit].mean(axis=0) for digit in range(10)])
    distances = np.linalg.norm(codes[:, None] - codes[None], axis=-1)
    neighbours = labels[np.argsort(distances, axis=1)[:, :30]]
    purity = (neighbours == labels[:, None]).mean(axis=1)  # of each image's neighbourhood in the plane

    page = visit(html)
    clusters = [np.flatnonzero(labels == digit)[purity[labels == digit].argmax()] for digit in range(10)]
    clear = [image for image in clusters if purity[image] > 0.9]
    assert len(clear) >= 6  # the rest overlap, as two dimensions are few for ten digits
    for image in clear:
        hover(page, *map(float, codes[image]))
        assert np.linalg.norm(class_means - displayed(page), axis=1).argmin() == labels[image]


@pytest.mark.slow
def test_explorer_page_reads_out_the_point_and_its_prior_density(visit: Callable, html: str):
    page = visit(html)
    assert page.title() == "Latent explorer · digits (scikit-learn)"
    assert page.locator("h1").inner_text() == "Latent explorer · digits (scikit-learn)"
    assert page.locator("dd").all_inner_texts() == ["0.00", "0.00", "0.1592"]  # 1 / 2π
    hover(page, 3.0, -2.0)
    right, down = current_z(page)
    density = math.exp(-(right**2 + down**2) / 2) / (2 * math.pi)
    shown = page.locator("dd").all_inner_texts()
    assert shown[:2] == [f"{right:.2f}", f"{down:.2f}"]
    assert float(shown[2]) == pytest.approx(density, rel=0.01)
    live = page.locator("[aria-live=polite]")
    live.filter(has_text=f"z[0] {right:.2f}, z[1] {down:.2f}, prior density").wait_for(state="attached", timeout=3000)


@pytest.mark.slow
def test_explorer_page_moves_the_point_by_arrow_keys_when_the_plane_has_the_focus(visit: Callable, vae: VAE, html: str):
    page = visit(html)
    page.keyboard.press("ArrowRight")
    assert current_z(page) == [0, 0]  # the focus is not there yet
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "plane"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for keys, z in [
        ("ArrowRight", (0.1, 0)),
        ("ArrowDown", (0.1, 0.1)),
        ("Shift+ArrowLeft", (-0.4, 0.1)),
        ("Shift+ArrowUp", (-0.4, -0.4)),
    ]:
        page.keyboard.press(keys)
        assert current_z(page) == pytest.approx(z, abs=1e-6)
    assert np.abs(displayed(page) - decode(vae, -0.4, -0.4)).max() < 1.5 * GRAY_LEVEL
    page.keyboard.press("Home")
    assert current_z(page) == [0, 0]


@pytest.mark.slow
def test_explorer_page_moves_the_point_and_not_itself_under_a_dragging_finger(visit: Callable, vae: VAE, html: str):
    page = visit(html, width=390, height=500, has_touch=True, is_mobile=True)
    finger = page.context.new_cdp_session(page)

    def touch(kind: str, *z: float) -> None:
        points = [dict(zip("xy", position(page, *z), strict=True))] if z else []
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", 0.0, -2.0)
    assert current_z(page) == pytest.approx([0, -2], abs=0.05)
    for step in range(1, 5):
        touch("touchMove", 0.5 * step, -2.0 + 0.5 * step)
    touch("touchEnd")
    assert current_z(page) == pytest.approx([2, 0], abs=0.05)
    assert np.abs(displayed(page) - decode(vae, *current_z(page))).max() < 1.5 * GRAY_LEVEL
    assert page.evaluate("scrollY") == 0


@pytest.mark.slow
def test_explorer_page_keeps_a_clicked_point_to_which_the_digit_comes_back(visit: Callable, html: str):
    page = visit(html)
    hover(page, 2.0, 1.0)
    page.mouse.move(2, 2)
    assert current_z(page) == pytest.approx([2, 1], abs=0.02)  # nothing kept: the point stays where the pointer left
    page.mouse.click(*position(page, -1.0, 1.5))
    hover(page, 2.0, 2.0)
    assert current_z(page) == pytest.approx([2, 2], abs=0.02)
    page.mouse.move(2, 2)
    assert current_z(page) == pytest.approx([-1, 1.5], abs=0.02)


@pytest.mark.slow
def test_explorer_page_draws_a_dot_in_its_digits_colour_at_its_code(visit: Callable):
    rng = np.random.default_rng(1)
    codes = np.stack([np.linspace(-3, 3, 10), rng.uniform(-3, -1, 10)], axis=1)
    page = visit(explorer_html(untrained(2), codes, np.arange(10, dtype=np.uint8), dataset="ten images"))
    page.uncheck("#digits")
    pixels = seen(page)
    background = pixels[3, 3]
    translucent = 0.6 * np.array([list(bytes.fromhex(colour)) for colour in TAB10]) + 0.4 * background
    box = page.locator("#plane").bounding_box()
    for digit, code in enumerate(codes):
        x, y = position(page, *map(float, code))
        shown = pixels[int(y) - int(box["y"]), int(x) - int(box["x"])]
        assert np.linalg.norm(translucent - shown, axis=1).argmin() == digit
        np.testing.assert_allclose(shown, translucent[digit], atol=30)  # a dot hardly covers a whole pixel


@pytest.mark.slow
def test_explorer_page_switches_dots_and_decoded_digits_off_and_on(visit: Callable, html: str):
    page = visit(html)
    with_dots = colourful(page)
    page.uncheck("#dots")
    assert colourful(page) == 0
    ink = (seen(page) < 128).sum()
    page.uncheck("#digits")
    assert (seen(page) < 128).sum() < 0.2 * ink  # what stays is contours and axes
    page.get_by_label("test images", exact=True).check()
    page.get_by_label("decoded digits", exact=True).check()
    assert colourful(page) == with_dots > 1000


@pytest.mark.slow
def test_explorer_page_isolates_the_dots_of_a_digit_chosen_in_the_legend(visit: Callable, html: str, digits):
    page = visit(html)
    page.uncheck("#digits")
    everything = colourful(page)
    three = page.get_by_role("button", name="3", exact=True)
    three.click()
    assert three.get_attribute("aria-pressed") == "true"
    assert 0 < colourful(page) < 0.3 * everything
    pixels = seen(page)
    red, green, blue = pixels[np.ptp(pixels, axis=2) > 60].T
    assert (red > np.maximum(green, blue) + 50).all()  # tab10's colour of 3
    three.click()
    assert colourful(page) == everything


@pytest.mark.slow
def test_explorer_page_has_sliders_for_the_dimensions_beyond_the_plane(visit: Callable):
    page = visit(random_page(untrained(5), kld_per_dimension=[0.5, 3.0, 0.1, 2.0, 1.0]))
    sliders = page.get_by_role("slider")
    assert [label.split("0.00")[0].strip() for label in page.locator("#sliders label").all_inner_texts()] == [
        "z[4] 1.00 nats",
        "z[0] 0.50 nats",
        "z[2] 0.10 nats",
    ]
    hover(page, 1.0, -1.0)
    _, x, _, y, _ = current_z(page)
    sliders.nth(0).fill("1.5")
    sliders.nth(2).fill("-0.5")
    z = [0, x, -0.5, y, 1.5]
    assert current_z(page) == pytest.approx(z, abs=1e-6)
    assert np.abs(displayed(page) - decode(untrained(5), *map(float, z))).max() < 1.5 * GRAY_LEVEL
    density = math.exp(-sum(value**2 for value in z) / 2) / (2 * math.pi) ** 2.5
    assert float(page.locator("dd").last.inner_text()) == pytest.approx(density, rel=0.05)
    page.get_by_role("button", name="All sliders to 0").click()
    assert current_z(page) == pytest.approx([0, x, 0, y, 0], abs=1e-6)


@pytest.mark.slow
def test_explorer_page_of_a_single_latent_dimension_is_a_line(visit: Callable):
    page = visit(random_page(untrained(1)))
    assert colourful(page) > 100
    page.mouse.move(*position(page, 1.2))
    assert current_z(page) == pytest.approx([1.2], abs=0.02)
    assert np.abs(displayed(page) - decode(untrained(1), *current_z(page))).max() < 1.5 * GRAY_LEVEL
    page.focus("#plane")
    page.keyboard.press("ArrowUp")  # there is no second dimension to move along
    page.keyboard.press("Home")
    assert current_z(page) == [0]
    assert page.locator("dd").all_inner_texts() == ["0.00", "0.3989"]  # 1 / √2π


@pytest.mark.slow
def test_explorer_page_spreads_dots_without_labels_over_the_whole_line_in_one_colour(visit: Callable):
    page = visit(explorer_html(untrained(1), np.linspace(-3, 3, 200)[:, None], None, dataset="noise"))
    page.uncheck("#digits")
    assert colourful(page) > 100
    pixels = seen(page)
    coloured = np.ptp(pixels, axis=2) > 60
    assert np.ptp(np.flatnonzero(coloured.any(axis=1))) > 0.4 * len(pixels)
    red, green, blue = pixels[coloured].T
    assert (blue > np.maximum(red, green)).all()  # tab10's first colour, as in latents.png


@pytest.mark.slow
@pytest.mark.parametrize("latent_dim", [1, 2, 20])
def test_explorer_page_shows_digit_and_plane_on_a_phone_without_scrolling_sideways(visit: Callable, latent_dim: int):
    page = visit(random_page(untrained(latent_dim)), width=360, height=740, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    digit, plane = (page.locator(canvas).bounding_box() for canvas in ("#digit", "#plane"))
    assert digit["y"] + digit["height"] <= plane["y"]
    assert plane["y"] + plane["height"] <= 740
    assert plane["width"] > 300


@pytest.mark.slow
def test_explorer_page_follows_the_colour_scheme(visit: Callable, html: str):
    page = visit(html, color_scheme="light")
    page.uncheck("#dots")
    light = seen(page)
    page.emulate_media(color_scheme="dark")
    dark = seen(page)
    assert np.median(light) > 230
    assert (light < 100).mean() > 0.03  # black ink on white
    assert np.median(dark) < 50
    assert (dark > 155).mean() > 0.03  # white ink on black
