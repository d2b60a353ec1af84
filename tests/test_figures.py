"""Pictures: where each image lies, and what the words on them say."""

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from mnist_vae.model.latent import Manifold, tile
from mnist_vae.model.vae import Posterior
from mnist_vae.pictures.figures import (
    latents_figure,
    losses_figure,
    manifold_figure,
    nll_figure,
    reconstructions_figure,
    samples_figure,
    save_png,
    traversal_figure,
)

TITLE = "scikit-learn digits (not MNIST)"
HISTORY = {"epoch": [1, 2, 3], "loss": [200.0, 180.0, 170.0], "bce": [197.0, 176.0, 165.0], "kld": [3.0, 4.0, 5.0]}


def noise(count, seed=0):
    return np.random.default_rng(seed).random((count, 28, 28))


def noisy_manifold(across=5, down=5, dimensions=(0, 1)):
    return Manifold(noise(across * down), np.linspace(-1.6, 1.6, across), np.linspace(-1.6, 1.6, down), dimensions)


def codes(count=50, latent_dim=2):
    random = torch.Generator().manual_seed(0)
    return Posterior(*(torch.randn(count, latent_dim, generator=random) for _ in range(2)))


MAKE = {
    "losses": lambda: losses_figure(HISTORY, TITLE),
    "reconstructions": lambda: reconstructions_figure(noise(6), noise(6, seed=1), np.linspace(50.4, 250.4, 6), TITLE),
    "latents": lambda: latents_figure(codes(), np.arange(50) % 10, (0, 1), np.array([3, 4]), TITLE),
    "latents without labels": lambda: latents_figure(codes(), None, (0, 1), np.array([3, 4]), TITLE),
    "nll": lambda: nll_figure(np.linspace(80, 200, 50), np.arange(50) % 10, TITLE),
    "nll without labels": lambda: nll_figure(np.linspace(80, 200, 50), None, TITLE),
    "samples": lambda: samples_figure(noise(8), 4, TITLE),
    "manifold": lambda: manifold_figure(noisy_manifold(), TITLE),
    "traversal": lambda: traversal_figure(noise(10), np.linspace(-3, 3, 5), [4, 1], TITLE),
}


@pytest.fixture(scope="module")
def figures():
    return {name: make() for name, make in MAKE.items()}


def words(figure):
    """Every text that can be seen, as one string."""
    return "\n".join(text.get_text() for text in figure.findobj(Text) if text.get_visible())


def shown(axes):
    (image,) = axes.get_images()
    return image.get_array()


# every picture


@pytest.mark.parametrize("name", MAKE)
def test_every_figure_names_the_data_set(figures, name):
    assert TITLE in words(figures[name])


@pytest.mark.parametrize("name", MAKE)
def test_save_png_writes_equal_bytes_for_equal_pictures(figures, name, tmp_path):
    save_png(tmp_path / "a" / "picture.png", figures[name])
    save_png(tmp_path / "b" / "picture.png", MAKE[name]())

    png = (tmp_path / "a" / "picture.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert png == (tmp_path / "b" / "picture.png").read_bytes()
    assert b"matplotlib" not in png.lower()


# losses


def test_losses_figure_has_three_series_with_three_markers(figures):
    lines = [line for axes in figures["losses"].axes for line in axes.get_lines()]

    assert [line.get_label() for line in lines] == ["Loss", "BCE loss", "KLD loss"]
    assert len({line.get_marker() for line in lines}) == 3
    assert len({line.get_color() for line in lines}) == 3
    for line, name in zip(lines, ("loss", "bce", "kld"), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.column_stack([HISTORY["epoch"], HISTORY[name]]))


def test_losses_figure_has_units_and_whole_epochs(figures):
    upper, lower = figures["losses"].axes

    assert upper.get_ylabel() == lower.get_ylabel() == "nats per image"
    assert lower.get_xlabel() == "epoch"
    assert all(float(tick).is_integer() for tick in lower.get_xticks())


def test_losses_figure_draws_a_single_epoch(tmp_path):
    save_png(tmp_path / "losses.png", losses_figure({name: values[:1] for name, values in HISTORY.items()}, TITLE))


def test_losses_figure_draws_validation_losses_dashed_in_the_same_colour(figures):
    history = HISTORY | {f"val_{name}": np.array(HISTORY[name]) + 1 for name in ("loss", "bce", "kld")}

    lines = [line for axes in losses_figure(history, TITLE).axes for line in axes.get_lines()]

    assert len(lines) == 6
    for trained, validation in zip(lines[::2], lines[1::2], strict=True):
        assert validation.get_label() == f"{trained.get_label()}, validation"
        assert validation.get_color() == trained.get_color()
        assert (trained.get_linestyle(), validation.get_linestyle()) == ("-", "--")
        np.testing.assert_array_equal(validation.get_ydata(), np.array(trained.get_ydata()) + 1)


# reconstructions


def test_reconstructions_figure_puts_each_image_over_its_reconstruction_with_its_loss(figures):
    axes = figures["reconstructions"].axes

    for column in range(6):
        image, reconstruction = axes[2 * column : 2 * column + 2]
        np.testing.assert_array_equal(shown(image), noise(6)[column])
        np.testing.assert_array_equal(shown(reconstruction), noise(6, seed=1)[column])
        assert reconstruction.get_title() == f"{50 + 40 * column}"
        above, below = image.get_subplotspec(), reconstruction.get_subplotspec()
        assert above.colspan.start == below.colspan.start == column
        assert (above.rowspan.start, below.rowspan.start) == (0, 1)
    assert "−log p(x|z) in nats" in words(figures["reconstructions"])


# latent space


def test_latents_figure_draws_each_code_in_the_colour_of_its_digit():
    posterior = codes(20, latent_dim=4)

    (axes,) = latents_figure(posterior, np.arange(20) % 10, (1, 3), np.array([], int), TITLE).axes

    (points,) = axes.collections
    np.testing.assert_array_equal(points.get_offsets(), posterior.mean[:, [1, 3]])
    assert points.get_array().tolist() == (np.arange(20) % 10).tolist()
    assert points.get_clim() == (0, 9)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("posterior mean of z[1]", "posterior mean of z[3]")


def test_latents_figure_draws_ellipses_of_one_standard_deviation():
    posterior = codes(20, latent_dim=4)

    (axes,) = latents_figure(posterior, np.arange(20) % 10, (1, 3), np.array([5, 9]), TITLE).axes

    assert len(axes.patches) == 2
    for ellipse, image in zip(axes.patches, (5, 9), strict=True):
        np.testing.assert_allclose(ellipse.center, posterior.mean[image, [1, 3]])
        std = posterior.log_var[image, [1, 3]].exp().sqrt()
        np.testing.assert_allclose([ellipse.width / 2, ellipse.height / 2], std, rtol=1e-5)


def test_latents_figure_of_one_dimension_has_a_row_per_digit():
    posterior, digits = codes(20, latent_dim=1), np.arange(20) % 10

    (axes,) = latents_figure(posterior, digits, (0, 0), np.array([5]), TITLE).axes

    (points,) = axes.collections
    np.testing.assert_array_equal(points.get_offsets(), np.column_stack([posterior.mean[:, 0], digits]))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("posterior mean of z[0]", "digit")


def test_latents_figure_of_one_dimension_without_labels_has_one_axis():
    posterior = codes(20, latent_dim=1)

    (axes,) = latents_figure(posterior, None, (0, 0), np.array([5]), TITLE).axes

    (points,) = axes.collections
    np.testing.assert_array_equal(points.get_offsets(), np.column_stack([posterior.mean[:, 0], np.zeros(20)]))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("posterior mean of z[0]", "")
    assert len(axes.get_yticks()) == 0


def test_latents_figure_has_z1_running_down_as_the_manifold_has(figures):
    (axes,) = figures["latents"].axes
    bottom, top = axes.get_ylim()
    left, right = axes.get_xlim()

    assert bottom > top
    assert left < right


@pytest.mark.parametrize("digits", [range(10), range(5, 9)])
def test_latents_figure_lists_the_digits_that_occur(digits):
    (axes,) = latents_figure(codes(), np.resize(digits, 50), (0, 1), np.array([], int), TITLE).axes

    legend = axes.get_legend()
    assert legend.get_title().get_text() == "digit"
    shown_digits = ["".join(filter(str.isdigit, text.get_text())) for text in legend.get_texts()]
    assert shown_digits == [str(digit) for digit in digits]


def test_latents_figure_without_labels_lists_no_digits(figures):
    (axes,) = figures["latents without labels"].axes

    assert axes.get_legend() is None
    assert len(axes.collections[0].get_offsets()) == 50


# likelihood


def test_nll_figure_counts_each_digit_in_a_panel_of_its_own():
    nll, labels = np.linspace(80, 200, 90), np.arange(90) % 9  # no 9

    figure = nll_figure(nll, labels, TITLE)

    for digit, axes in enumerate(figure.axes):
        assert sum(bar.get_height() for bar in axes.patches) == (labels == digit).sum()
        if digit < 9:
            assert axes.get_title() == f"{digit}: mean {nll[labels == digit].mean():.1f}"
    assert "−log p(x), nats" in words(figure)


def test_nll_figure_marks_the_mean_of_each_digit(figures):
    for digit, axes in enumerate(figures["nll"].axes):
        (line,) = axes.get_lines()
        assert set(line.get_xdata()) == {np.linspace(80, 200, 50)[digit::10].mean()}


def test_nll_figure_has_the_same_bins_in_all_panels(figures):
    first, *others = ([bar.get_x() for bar in axes.patches] for axes in figures["nll"].axes)

    assert others == [first] * 9


def test_nll_figure_without_labels_counts_all_images_in_one_panel(figures):
    (axes,) = figures["nll without labels"].axes

    assert sum(bar.get_height() for bar in axes.patches) == 50
    assert axes.get_title() == "mean 140.0"
    assert "digit" not in words(figures["nll without labels"]).replace(TITLE, "")


# samples and manifold


def test_samples_figure_is_in_reading_order(figures):
    (axes,) = figures["samples"].axes

    np.testing.assert_array_equal(shown(axes), tile(noise(8), 4))
    assert axes.get_title().startswith("2 × 4 draws from the prior")


@pytest.mark.parametrize("cols", [1, 8])
def test_samples_figure_draws_a_single_row_or_column(cols, tmp_path):
    save_png(tmp_path / "samples.png", samples_figure(noise(8), cols, TITLE))


def test_manifold_figure_is_in_reading_order_with_z_at_its_edges(figures):
    (axes,) = figures["manifold"].axes

    np.testing.assert_array_equal(shown(axes), tile(noise(25), 5))
    assert axes.axison
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("z[0]", "z[1]")
    assert axes.get_xticks().tolist() == axes.get_yticks().tolist() == [13.5, 41.5, 69.5, 97.5, 125.5]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["-1.60", "-0.80", "0.00", "0.80", "1.60"]


def test_manifold_figure_names_the_dimensions_that_it_walks():
    (axes,) = manifold_figure(noisy_manifold(dimensions=(1, 3)), TITLE).axes

    assert (axes.get_xlabel(), axes.get_ylabel()) == ("z[1]", "z[3]")


def test_manifold_figure_of_one_dimension_has_one_axis():
    (axes,) = manifold_figure(noisy_manifold(down=1, dimensions=(0, 0)), TITLE).axes

    assert axes.get_xlabel() == "z[0]"
    assert axes.get_ylabel() == ""
    assert len(axes.get_yticks()) == 0


def test_manifold_figure_keeps_the_ticks_of_a_large_grid_readable():
    (axes,) = manifold_figure(noisy_manifold(across=40, down=40), TITLE).axes

    ticks = axes.get_xticks()
    assert len(ticks) == len(axes.get_xticklabels()) <= 15
    assert (ticks[0], ticks[-1]) == (13.5, 28 * 39 + 13.5)


# traversal


def test_traversal_figure_has_a_named_row_per_dimension(figures):
    (axes,) = figures["traversal"].axes

    np.testing.assert_array_equal(shown(axes), tile(noise(10), 5))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["z[4]", "z[1]"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["-3.00", "-1.50", "0.00", "1.50", "3.00"]
    assert axes.get_yticks().tolist() == [13.5, 41.5]
