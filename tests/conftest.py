"""What tests share: one thread, the embedded digits, the folder with MNIST, a browser."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mnist_vae.compat import cure_torchvision

cure_torchvision()  # before a test, or pytest-xdist for a warning, imports lightning

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = [  # a browser under test has no errands of its own
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.sync_api.Browser"]:  # noqa: F821
    """Headless Chromium, the system's own, driven by Playwright; the test is skipped where either is missing.

    One per module, not per session: while Playwright runs, its event loop counts as running in this thread, and
    ``asyncio.run`` in any later test would fail. A start takes a second.
    """
    if CHROMIUM is None:
        pytest.skip("needs Chromium or Chrome on the PATH")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("needs the Python package playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium refuses to run as root, as in most containers, with its sandbox
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET, chromium_sandbox=os.geteuid() != 0)
        yield browser
        browser.close()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests share their machine, and a second thread changes the last bits of a result."""
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1, user_api="blas")


@pytest.fixture(scope="session")
def digits_dataset() -> "mnist_vae.data.dataset.Dataset":  # noqa: F821
    """The embedded digits, which take seconds to build; take slices, change nothing."""
    from mnist_vae.sources.digits import digits

    return digits()


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    """The folder with MNIST's four .gz files; the test is skipped where MNIST_MIRROR does not name one."""
    given = os.environ.get("MNIST_MIRROR")
    if not given or "://" in given:
        pytest.skip("needs MNIST_MIRROR to be a folder with MNIST's four .gz files")
    return Path(__file__).parent.parent / given


@pytest.fixture(scope="session")
def finished_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the working tree in which ``dvc repro`` has run with tiny parameters; look, change nothing."""
    from tests.pipeline import TINY, clone_working_tree, commit, run, set_params

    clone = clone_working_tree(tmp_path_factory.mktemp("finished") / "mnist-vae")
    set_params(clone, TINY | {"train.epochs": 2})
    run(clone, "dvc", "repro")
    return commit(clone, "A run")


@pytest.fixture
def pipeline(finished_pipeline: Path, tmp_path: Path) -> Path:
    """A copy of the finished pipeline, to be changed at will."""
    from tests.tracking import copy_workspace  # which loads MLflow

    return copy_workspace(finished_pipeline, tmp_path / "mnist-vae")
