"""The handwritten digits inside scikit-learn, made MNIST-shaped: images for a machine with no network.

1,797 images of 8 × 8 pixels (Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998). One in
five is for testing. Each of the others is trained on as it is and in VARIANTS − 1 slightly bent forms, since
1,438 images alone are too few for the epochs that MNIST is trained for.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import affine_transform
from sklearn.datasets import load_digits

from mnist_vae.data.dataset import Dataset, Images

Floats = NDArray[np.float64]

VARIANTS = 32
SEED = 0
SIDE, BOX = 28, 20  # the image, and the part of it that the digit fills, as in MNIST


def digits() -> Dataset:
    """About 46,000 training images and 359 test images; no test image, nor a form of one, is trained on."""
    bunch = load_digits()
    images, labels = bunch.images / 16.0, bunch.target.astype(np.uint8)  # (1797, 8, 8) in [0, 1]
    generator = np.random.default_rng(SEED)
    order = generator.permutation(len(images))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]

    x_test = np.stack([enlarge(image, np.eye(2)) for image in images[test]])
    variants = [
        enlarge(images[index], np.eye(2) if variant == 0 else bend(generator))
        for index in train
        for variant in range(VARIANTS)
    ]
    return Dataset("digits", np.stack(variants), labels[train].repeat(VARIANTS), x_test, labels[test])


def bend(generator: np.random.Generator) -> Floats:
    """A random small rotation, shear and change of scale: a linear map (2, 2) of (row, column) offsets."""
    angle = np.deg2rad(generator.normal(0, 6))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[1, 0], [generator.normal(0, 0.1), 1]])  # slants the strokes, leaves rows level
    linear: Floats = rotation @ shear @ np.diag(generator.uniform(0.95, 1.2, size=2))
    return linear


def enlarge(image: Floats, linear: Floats) -> Images:
    """An image (8, 8) in [0, 1] on a 28 × 28 canvas, (28, 28) uint8, by cubic splines.

    ``linear`` maps offsets from the canvas's centre before they are scaled to the small image; the identity puts
    the digit into the middle 20 × 20 box.
    """
    to_small = linear * (image.shape[0] / BOX)
    centre, small_centre = np.full(2, (SIDE - 1) / 2), np.full(2, (image.shape[0] - 1) / 2)
    canvas = affine_transform(
        np.pad(image, 2), to_small, small_centre + 2 - to_small @ centre, output_shape=(SIDE, SIDE), order=3
    )
    image_on_canvas: Images = np.rint(255 * canvas.clip(0, 1)).astype(np.uint8)
    return image_on_canvas
