"""The pages a person looks at, in a real browser: that of ``dvc plots show`` and that of ``mlflow ui``."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline import environment, run
from tests.runs import main_run
from tools.deployment import free_port

pytestmark = pytest.mark.slow

PICTURES = ["grid", "latents", "losses", "nll", "reconstructions", "samples", "traversal"]


class Visit:
    """A page, what it complained about, and where it tried to go."""

    def __init__(self, browser, address: str) -> None:
        self.complaints, self.requests = [], []
        self.page = browser.new_page(viewport={"width": 1300, "height": 1000})
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)

    def left_the_machine(self) -> list[str]:
        local = ("file:", "data:", "blob:", "http://127.0.0.1:")
        return [address for address in self.requests if not address.startswith(local)]


def drawn(page) -> list[int]:
    """How many shapes there are in each Vega chart."""
    page.wait_for_selector(".vega-embed svg.marks path", state="attached")
    return [len(chart.query_selector_all("path")) for chart in page.query_selector_all(".vega-embed svg.marks")]


def test_plots_page_draws_its_charts_and_each_picture_once_without_a_network(pipeline, browser):
    run(pipeline, sys.executable, "-m", "tools.plots_page")
    run(pipeline, "dvc", "plots", "show")
    visit = Visit(browser, (pipeline / "dvc_plots/index.html").as_uri())

    losses, latents, nll = drawn(visit.page)
    assert losses > 3 * 2  # three panels with a point for each epoch
    assert latents > 359  # a point for each test image
    assert 10 < nll < 359  # bars
    images = visit.page.query_selector_all("img")
    assert sorted(Path(image.get_attribute("src")).stem.split("_")[-1] for image in images) == PICTURES
    assert all(image.evaluate("image => image.naturalWidth") > 300 for image in images)
    source = visit.page.content()
    assert all(f"{name} (nats per image)" in source for name in ("loss", "bce", "kld"))
    assert "−log p(x), nats" in source
    assert visit.complaints == []
    assert visit.left_the_machine() == []


def test_plots_diff_puts_two_versions_side_by_side(pipeline, browser):
    run(pipeline, sys.executable, "-m", "tools.plots_page")
    run(pipeline, "dvc", "plots", "diff", "HEAD~1", "HEAD", "-o", "diff")  # the committed results and the tiny ones
    visit = Visit(browser, (pipeline / "diff/index.html").as_uri())

    losses, latents, nll = drawn(visit.page)
    assert losses > 3 * (10 + 2)
    assert latents > 10_000 + 359
    assert nll > 2 * 10
    assert len(visit.page.query_selector_all("img")) == 2 * len(PICTURES)
    assert visit.complaints == []
    assert visit.left_the_machine() == []


@pytest.fixture(scope="module")
def mlflow_page(finished_pipeline: Path) -> Iterator[str]:
    """The address of ``mlflow ui``, started in the finished pipeline as a user would."""
    port = free_port()
    server = subprocess.Popen(
        ["mlflow", "ui", "--port", str(port), "--workers", "1"],
        cwd=finished_pipeline,
        env=environment(finished_pipeline, MLFLOW_DISABLE_TELEMETRY="true"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        else:
            pytest.fail("mlflow ui did not answer within two minutes")
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_mlflow_lists_the_run_under_a_readable_name(mlflow_page, browser):
    page = Visit(browser, f"{mlflow_page}/#/experiments/1/runs").page
    page.wait_for_selector("text=digits · z 2, h 16, batch 64, 2 epochs", timeout=30_000)


def test_mlflow_shows_the_manifold_the_metrics_and_the_tags(mlflow_page, browser, finished_pipeline):
    run_id = main_run(finished_pipeline).info.run_id
    page = Visit(browser, f"{mlflow_page}/#/experiments/1/runs/{run_id}").page
    picture = page.wait_for_selector("img[src*='description.png']", state="attached", timeout=30_000)
    page.wait_for_function("image => image.naturalWidth > 0", arg=picture)
    for text in ("train/loss", "test/nll", "test/elbo", "data.dataset", "train.learning_rate"):
        page.wait_for_selector(f"text={text}", state="attached")
    content = page.inner_text("body")
    assert all(tag in content for tag in ("dataset", "latent_dim", "git_commit"))


def test_mlflow_has_groups_of_metrics_and_a_slider_over_the_epochs_samples(mlflow_page, browser, finished_pipeline):
    run_id = main_run(finished_pipeline).info.run_id
    page = Visit(browser, f"{mlflow_page}/#/experiments/1/runs/{run_id}/model-metrics").page
    for group in ("quality", "test", "train"):
        page.get_by_text(group, exact=True).wait_for(state="attached", timeout=30_000)
    page.mouse.move(600, 600)
    for _ in range(40):  # charts are made when they come into view
        if page.query_selector("[role=slider]"):
            break
        page.mouse.wheel(0, 600)
        page.wait_for_timeout(250)
    slider = page.wait_for_selector("[role=slider]")
    assert (slider.get_attribute("aria-valuemin"), slider.get_attribute("aria-valuemax")) == ("1", "2")
