"""Gray pixels to black and white ones, after which the Bernoulli likelihood is a normalised one.

    none      gray pixels in [0, 1], as in the notebook
    static    each pixel drawn once from Bernoulli(gray value), for training and test images alike
    dynamic   training pixels drawn anew at each epoch (Burda et al. 2016), test pixels once

Numbers of one setting mean nothing beside those of another, so ``metric_name`` gives each setting names of its own.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnist_vae.data.dataset import Binarize, Dataset, Images, ImageSource, Index

DRAWN = 256  # images at a time


class Binarized:
    """Images of which each pixel is drawn once from Bernoulli(pixel / 255), as 0 or 255; equal for equal seeds.

    They are drawn where they are asked for, and are the same whichever images are asked for, in whatever order:
    PCG64 can be advanced to any of its numbers.
    """

    def __init__(self, images: ImageSource, seed: int) -> None:
        self.images, self.seed = images, seed

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, 28, 28)."""
        return self.images.shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: slice | Index) -> Images:
        """The images of a slice without a step, or at some positions."""
        gray = self.images[key]
        positions = range(*key.indices(len(self))) if isinstance(key, slice) else key.tolist()
        numbers = math.prod(self.images.shape[1:]) // 2  # of the generator's, of 64 bits, for an image: two pixels each
        bits = np.random.PCG64(self.seed)
        generator = np.random.Generator(bits)
        uniform = np.empty((DRAWN, *gray.shape[1:]), np.float32)
        drawn, at = np.empty_like(gray), 0
        for first in range(0, len(gray), DRAWN):
            some = slice(first, first + DRAWN)
            for row, position in zip(uniform, positions[some], strict=False):
                bits.advance(numbers * (position - at))
                generator.random(dtype=np.float32, out=row)
                at = position + 1
            drawn[some] = np.where(255 * uniform[: len(gray[some])] < gray[some], np.uint8(255), np.uint8(0))
        return drawn

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)


def binarize_dataset(dataset: Dataset, setting: Binarize, seed: int) -> Dataset:
    """The data set with the pixels that a model is measured on under this setting, drawn once from ``seed``."""
    if setting == "none":
        return dataset
    x_train, x_test = Binarized(dataset.x_train, seed), Binarized(dataset.x_test, seed + 1)
    return replace(dataset, x_train=x_train, x_test=x_test, binarize=setting)


def metric_name(name: str, setting: Binarize) -> str:
    """The name under which a number is stored: ``nll``, ``nll_dynamic``, ``nll_static``."""
    return name if setting == "none" else f"{name}_{setting}"
