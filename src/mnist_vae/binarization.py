"""Gray pixels to black and white ones, after which the Bernoulli likelihood is a normalised one.

    none      gray pixels in [0, 1], as in the notebook
    static    each pixel drawn once from Bernoulli(gray value), for training and test images alike
    dynamic   training pixels drawn anew at each epoch (Burda et al. 2016), test pixels once

Numbers of one kind mean nothing beside those of another, so ``column`` gives each kind names of its own.
"""

from dataclasses import replace
from typing import Literal

import numpy as np

from mnist_vae.data import Dataset

Kind = Literal["none", "dynamic", "static"]


def binarize(images: np.ndarray, seed: int) -> np.ndarray:
    """One draw of Bernoulli(pixel / 255) for each pixel of uint8 images, as 0 or 255; the same for equal seeds."""
    uniform = np.random.default_rng(seed).random(images.shape, dtype=np.float32)
    return np.where(255 * uniform < images, np.uint8(255), np.uint8(0))


def binarized(dataset: Dataset, kind: Kind, seed: int) -> Dataset:
    """The data set with the pixels that a model of this kind is measured on, drawn once from ``seed``."""
    if kind == "none":
        return dataset
    x_train, x_test = binarize(dataset.x_train, seed), binarize(dataset.x_test, seed + 1)
    return replace(dataset, x_train=x_train, x_test=x_test, pixels=kind)


def column(name: str, kind: Kind) -> str:
    """The name under which a number of this kind is stored: ``nll``, ``nll_dynamic``, ``nll_static``."""
    return name if kind == "none" else f"{name}_{kind}"
