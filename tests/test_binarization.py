"""Black and white pixels: drawn with the right odds, once, and never mixed with gray ones."""

import numpy as np
import pytest

from mnist_vae.data.binarization import binarize, binarized, column
from mnist_vae.data.dataset import Dataset


@pytest.fixture
def gray():
    pixels = np.random.default_rng(0).integers(0, 256, size=(40, 28, 28), dtype=np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10
    return Dataset("digits", pixels[:30], labels[:30], pixels[30:], labels[30:])


def test_a_pixel_is_on_as_often_as_it_is_bright():
    images = np.full((2000, 28, 28), 64, np.uint8)
    images[:, 0], images[:, 1] = 0, 255
    drawn = binarize(images, seed=1)
    assert set(np.unique(drawn)) == {0, 255}
    assert not drawn[:, 0].any()
    assert drawn[:, 1].all()
    assert drawn[:, 2:].mean() / 255 == pytest.approx(64 / 255, abs=0.002)


def test_a_draw_belongs_to_its_seed(gray):
    assert np.array_equal(binarize(gray.x_test, 1), binarize(gray.x_test, 1))
    assert not np.array_equal(binarize(gray.x_test, 1), binarize(gray.x_test, 2))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_model_of_black_and_white_is_measured_on_black_and_white(gray, kind):
    measured = binarized(gray, kind, seed=1)
    for images in (measured.x_train, measured.x_test):
        assert set(np.unique(images)) == {0, 255}
    assert f"{kind}ally binarised" in measured.title
    assert measured.about()["digest"] != gray.about()["digest"]


def test_training_and_test_images_get_noise_of_their_own(gray):
    same = Dataset("digits", gray.x_test, gray.y_test, gray.x_test, gray.y_test)
    measured = binarized(same, "static", seed=1)
    assert not np.array_equal(measured.x_train, measured.x_test)


def test_gray_stays_gray(gray):
    assert binarized(gray, "none", seed=1) is gray


def test_each_kind_has_columns_of_its_own():
    assert [column("nll", kind) for kind in ("none", "dynamic", "static")] == ["nll", "nll_dynamic", "nll_static"]
