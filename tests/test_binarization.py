"""Black and white pixels: drawn with the right odds, once, and never mixed with gray ones."""

import numpy as np
import pytest

from mnist_vae.data.binarization import Binarized, binarize_dataset, metric_name
from mnist_vae.data.dataset import Dataset


@pytest.fixture
def gray():
    pixels = np.random.default_rng(0).integers(0, 256, size=(40, 28, 28), dtype=np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10
    return Dataset("digits", pixels[:30], labels[:30], pixels[30:], labels[30:])


def test_binarized_turns_a_pixel_on_as_often_as_it_is_bright():
    images = np.full((2000, 28, 28), 64, np.uint8)
    images[:, 0], images[:, 1] = 0, 255
    drawn = Binarized(images, seed=1)[:]
    assert set(np.unique(drawn)) == {0, 255}
    assert not drawn[:, 0].any()
    assert drawn[:, 1].all()
    assert drawn[:, 2:].mean() / 255 == pytest.approx(64 / 255, abs=0.002)


def test_binarized_draws_the_same_pixels_for_the_same_seed(gray):
    assert np.array_equal(Binarized(gray.x_test, 1)[:], Binarized(gray.x_test, 1)[:])
    assert not np.array_equal(Binarized(gray.x_test, 1)[:], Binarized(gray.x_test, 2)[:])


def test_binarized_pixels_are_one_draw_of_numpys_generator_over_all_images(gray):
    uniform = np.random.default_rng(7).random(gray.x_train.shape, dtype=np.float32)
    assert np.array_equal(Binarized(gray.x_train, 7)[:], np.where(255 * uniform < gray.x_train, 255, 0))


@pytest.mark.parametrize("key", [slice(3, 11), np.array([5]), np.array([29, 0, 7, 7, 12]), np.array([], np.int64)])
def test_binarized_images_are_the_same_whichever_are_asked_for(gray, key):
    drawn = Binarized(gray.x_train, 1)
    assert np.array_equal(drawn[key], drawn[:][key])


@pytest.mark.parametrize("setting", ["dynamic", "static"])
def test_binarize_dataset_makes_all_images_black_and_white(gray, setting):
    measured = binarize_dataset(gray, setting, seed=1)
    for images in (measured.x_train, measured.x_test):
        assert set(np.unique(images[:])) == {0, 255}
    assert measured.binarize == setting
    assert f"{setting}ally binarised" in measured.title
    assert measured.about["digest"] != gray.about["digest"]
    assert measured.y_train is gray.y_train
    assert measured.y_test is gray.y_test


def test_binarize_dataset_draws_training_and_test_images_independently(gray):
    same = Dataset("digits", gray.x_test, gray.y_test, gray.x_test, gray.y_test)
    measured = binarize_dataset(same, "static", seed=1)
    assert not np.array_equal(measured.x_train[:], measured.x_test[:])


def test_binarize_dataset_leaves_gray_images_gray(gray):
    assert binarize_dataset(gray, "none", seed=1) is gray


def test_metric_name_keeps_numbers_of_different_pixels_apart():
    names = [metric_name("nll", setting) for setting in ("none", "dynamic", "static")]
    assert names == ["nll", "nll_dynamic", "nll_static"]
