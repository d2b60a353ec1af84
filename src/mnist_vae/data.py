"""Data sets as arrays: 28 × 28 gray images with their digits, split into training and test."""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnist_vae.errors import UserError
from mnist_vae.files import replacing

TITLES = {"mnist": "MNIST", "digits": "scikit-learn digits (not MNIST)"}
PIXELS = {"none": "", "dynamic": ", dynamically binarised", "static": ", statically binarised"}
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Dataset:
    """Images (N, 28, 28) and labels (N,), all uint8; a pixel is 0 (paper) to 255 (ink), a label 0 to 9."""

    name: str  # a key of TITLES
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    pixels: str = "none"  # how they were binarised, a key of PIXELS

    @property
    def title(self) -> str:
        """The name to put on a picture."""
        return TITLES[self.name] + PIXELS[self.pixels]

    def about(self) -> dict:
        """What is in it: name, sizes, the SHA-256 of each array's bytes, and ``digest``, the SHA-256 of those."""
        sha256 = {array: hashlib.sha256(getattr(self, array).tobytes()).hexdigest() for array in ARRAYS}
        return {
            "name": self.name,
            "train_images": len(self.x_train),
            "test_images": len(self.x_test),
            "digest": hashlib.sha256("".join(sha256.values()).encode()).hexdigest(),
            "sha256": sha256,
        }


def save_dataset(path: Path, dataset: Dataset) -> None:
    """Write an uncompressed .npz: its bytes depend on the images alone, not on a zlib version."""
    with replacing(path) as scratch:
        np.savez(scratch, **{array: getattr(dataset, array) for array in ARRAYS})


def load_dataset(path: Path, name: str) -> Dataset:
    """Read what ``save_dataset`` wrote.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    remedy = "`dvc repro download` makes it again"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            dataset = Dataset(name, **{array: arrays[array] for array in ARRAYS})
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {remedy}") from error
    except (KeyError, TypeError, ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or no data set of this project ({error}); {remedy}") from error
    for x, y in ((dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)):
        if {x.dtype, y.dtype} != {np.dtype("uint8")} or x.shape[1:] != (28, 28) or y.shape != x.shape[:1] or not x.size:
            raise UserError(f"{path} holds {x.dtype} images of shape {x.shape}, labels of shape {y.shape}; {remedy}")
    return dataset
