"""Gray pixels to black and white ones, after which the Bernoulli likelihood is a normalised one.

    none      gray pixels in [0, 1], as in the notebook
    static    each pixel drawn once from Bernoulli(gray value), for training and test images alike
    dynamic   training pixels drawn anew at each epoch (Burda et al. 2016), test pixels once

Numbers of one setting mean nothing beside those of another, so ``metric_name`` gives each setting names of its own.
"""

from dataclasses import replace

import numpy as np

from mnist_vae.data.dataset import Binarize, Dataset, Images


def binarize(images: Images, seed: int) -> Images:
    """One draw of Bernoulli(pixel / 255) for each pixel of uint8 images, as 0 or 255; the same for equal seeds."""
    uniform = np.random.default_rng(seed).random(images.shape, dtype=np.float32)
    return np.where(255 * uniform < images, np.uint8(255), np.uint8(0))


def binarize_dataset(dataset: Dataset, setting: Binarize, seed: int) -> Dataset:
    """The data set with the pixels that a model is measured on under this setting, drawn once from ``seed``."""
    if setting == "none":
        return dataset
    x_train, x_test = binarize(dataset.x_train, seed), binarize(dataset.x_test, seed + 1)
    return replace(dataset, x_train=x_train, x_test=x_test, binarize=setting)


def metric_name(name: str, setting: Binarize) -> str:
    """The name under which a number is stored: ``nll``, ``nll_dynamic``, ``nll_static``."""
    return name if setting == "none" else f"{name}_{setting}"
