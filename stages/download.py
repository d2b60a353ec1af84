"""download: which images?   data.* → data/dataset/*.npy, data/dataset.json"""

import logging
import os
import tempfile
from pathlib import Path

from mnist_vae.data.dataset import Dataset, load_dataset, save_dataset
from mnist_vae.files import make_folder
from mnist_vae.params import NAMES, Data, load_params
from stages import WORKSPACE, outputs
from stages.artifacts import ABOUT_DATASET, DATASET, PARAMS

log = logging.getLogger(__name__)


def main() -> None:
    asked_for = load_params(PARAMS).data

    dataset = obtain(asked_for)

    save_dataset(DATASET, dataset, asked_for.dataset)
    labels = "" if dataset.y_train is not None else ", without labels"
    print(f"{dataset.title}: {len(dataset.x_train):,} training and {len(dataset.x_test):,} test images{labels}")


def obtain(asked_for: Data) -> Dataset:
    """The data set asked for; where MNIST is out of reach, what DVC's cache has of it, or else the fallback."""
    if asked_for.dataset not in NAMES:
        from mnist_vae.sources.folder import read_folder

        make_folder(DATASET.parent)
        return read_folder(WORKSPACE / asked_for.dataset, scratch=DATASET.parent)
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
    locked = {output.path: output for output in outputs.locked("download")}
    if not {DATASET, ABOUT_DATASET} <= locked.keys():
        return None
    with tempfile.TemporaryDirectory() as folder:
        for path in (ABOUT_DATASET, DATASET):
            try:
                locked[path].put(Path(folder, path.name))
            except FileNotFoundError:
                return None
        cached = load_dataset(Path(folder, DATASET.name))  # mapped: it outlives the files' names
    return cached if cached.name == "mnist" else None


def mirror() -> str | None:
    """MNIST_MIRROR: a URL, or a folder, which counts from the main workspace."""
    given = os.environ.get("MNIST_MIRROR") or None
    return given if given is None or "://" in given else str(WORKSPACE / given)
