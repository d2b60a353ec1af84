"""download: which images?   data.* → data/dataset.npz, data/dataset.json"""

import logging
import os

from mnist_vae.data import Dataset, save_dataset
from mnist_vae.files import write_json
from mnist_vae.params import Data, load_params
from stages import WORKSPACE
from stages.artifacts import ABOUT_DATASET, DATASET, PARAMS

log = logging.getLogger(__name__)


def main() -> None:
    asked_for = load_params(PARAMS).data

    dataset = obtain(asked_for)

    save_dataset(DATASET, dataset)
    write_json(ABOUT_DATASET, {"asked_for": asked_for.dataset, **dataset.about()})
    print(f"{dataset.title}: {len(dataset.x_train):,} training and {len(dataset.x_test):,} test images")


def obtain(asked_for: Data) -> Dataset:
    """The data set asked for, or the fallback where MNIST is out of reach."""
    if asked_for.dataset == "mnist":
        from mnist_vae.mnist import NoMirrorAnswersError, download_mnist

        try:
            return download_mnist(mirror())
        except NoMirrorAnswersError as error:
            if asked_for.fallback is None:
                raise
            log.warning("%s", error)
            log.warning(
                "GOING ON WITHOUT MNIST, with scikit-learn's embedded digits. To get MNIST later: `dvc repro download "
                "--force && dvc repro`, with a network or with MNIST_MIRROR set"
            )
    from mnist_vae.digits import digits

    return digits()


def mirror() -> str | None:
    """MNIST_MIRROR: a URL, or a folder, which counts from the main workspace."""
    given = os.environ.get("MNIST_MIRROR") or None
    return given if given is None or "://" in given else str(WORKSPACE / given)
