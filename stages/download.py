"""download: which images?   data.* → data/dataset.npz, data/dataset.json"""

import logging
import os
import tempfile
from pathlib import Path

from mnist_vae.data.dataset import Dataset, load_dataset, save_dataset
from mnist_vae.params import Data, load_params
from stages import WORKSPACE, outputs
from stages.artifacts import ABOUT_DATASET, DATASET, PARAMS

log = logging.getLogger(__name__)


def main() -> None:
    asked_for = load_params(PARAMS).data

    dataset = obtain(asked_for)

    save_dataset(DATASET, dataset, asked_for.dataset)
    print(f"{dataset.title}: {len(dataset.x_train):,} training and {len(dataset.x_test):,} test images")


def obtain(asked_for: Data) -> Dataset:
    """The data set asked for; where MNIST is out of reach, what DVC's cache has of it, or else the fallback."""
    if asked_for.dataset == "mnist":
        from mnist_vae.sources.mnist import NoMirrorAnswersError, download_mnist

        try:
            return download_mnist(mirror())
        except NoMirrorAnswersError as error:
            log.warning("%s", error)
            if (cached := cached_mnist()) is not None:
                log.warning("going on with MNIST from DVC's cache")
                return cached
            if asked_for.fallback is None:
                raise
            log.warning(
                "GOING ON WITHOUT MNIST, with scikit-learn's embedded digits. To get MNIST later: `dvc repro download "
                "--force && dvc repro`, with a network or with MNIST_MIRROR set"
            )
    from mnist_vae.sources.digits import digits

    return digits()


def cached_mnist() -> Dataset | None:
    """MNIST as dvc.lock names it, from DVC's cache; None where it is not there, or dvc.lock is of another data set."""
    contents = {output.path: output.recorded() for output in outputs.locked("download")}
    about, images = contents.get(ABOUT_DATASET), contents.get(DATASET)
    if not about or not images or b'"name": "mnist"' not in about:
        return None
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, DATASET.name)
        copy.write_bytes(images)
        copy.with_suffix(".json").write_bytes(about)
        return load_dataset(copy)


def mirror() -> str | None:
    """MNIST_MIRROR: a URL, or a folder, which counts from the main workspace."""
    given = os.environ.get("MNIST_MIRROR") or None
    return given if given is None or "://" in given else str(WORKSPACE / given)
