"""The embedded digits: MNIST's shape, and a test set that training has not seen in any form."""

import numpy as np
import pytest
from scipy.ndimage import zoom
from sklearn.datasets import load_digits

from mnist_vae.sources.digits import BOX, VARIANTS, digits, enlarge


@pytest.fixture(scope="module")
def small():
    """The 8 × 8 originals, (1797, 8, 8) in [0, 1], and their labels."""
    bunch = load_digits()
    return bunch.images / 16, bunch.target


def rows(images):
    return {image.tobytes() for image in images}


def test_digits_have_mnists_shape_and_type(digits_dataset):
    assert digits_dataset.name == "digits"
    assert digits_dataset.x_train.shape == (1438 * VARIANTS, 28, 28)
    assert digits_dataset.x_test.shape == (359, 28, 28)
    for x, y in (
        (digits_dataset.x_train, digits_dataset.y_train),
        (digits_dataset.x_test, digits_dataset.y_test),
    ):
        assert x.dtype == y.dtype == np.uint8
        assert y.shape == x.shape[:1]


def test_digits_are_white_on_black_and_use_the_whole_range(digits_dataset):
    assert digits_dataset.x_test.max() == 255
    assert (digits_dataset.x_test[:, 0, 0] == 0).all()


def test_digits_hold_each_digit_in_both_splits(digits_dataset):
    assert np.bincount(digits_dataset.y_train, minlength=10).min() > 100 * VARIANTS
    assert np.bincount(digits_dataset.y_test, minlength=10).min() > 15


def test_digits_test_on_enlarged_originals_each_once(digits_dataset, small):
    originals = {enlarge(image, np.eye(2)).tobytes(): label for image, label in zip(*small, strict=True)}

    assert [originals.pop(image.tobytes()) for image in digits_dataset.x_test] == digits_dataset.y_test.tolist()


def test_digits_train_on_no_test_image(digits_dataset):
    assert not rows(digits_dataset.x_test) & rows(digits_dataset.x_train)


def test_digits_keep_all_forms_of_an_original_in_one_split(digits_dataset, small):
    unbent = digits_dataset.x_train[::VARIANTS]

    assert len(rows(unbent) | rows(digits_dataset.x_test)) == len(small[0])
    assert rows(unbent) | rows(digits_dataset.x_test) == rows(enlarge(image, np.eye(2)) for image in small[0])


def test_bend_makes_forms_that_differ_and_still_show_their_original(digits_dataset):
    forms = digits_dataset.x_train[: 40 * VARIANTS].reshape(40, VARIANTS, 784).astype(float)
    forms /= np.linalg.norm(forms, axis=-1, keepdims=True)
    likest = (forms[:, 1:] @ forms[:, 0].T).argmax(axis=-1)  # (40, VARIANTS − 1)

    assert len(np.unique(forms.reshape(-1, 784), axis=0)) == 40 * VARIANTS
    assert (likest == np.arange(40)[:, None]).mean() > 0.85


def test_digits_keep_labels_with_their_images(digits_dataset, small):
    labels = {enlarge(image, np.eye(2)).tobytes(): label for image, label in zip(*small, strict=True)}
    of_training = digits_dataset.y_train.reshape(-1, VARIANTS)

    assert [labels[image.tobytes()] for image in digits_dataset.x_train[::VARIANTS]] == of_training[:, 0].tolist()
    assert (of_training == of_training[:, :1]).all()


def test_enlarge_keeps_the_digit_upright_and_in_the_middle(small):
    for image in small[0][:20]:
        enlarged = enlarge(image, np.eye(2))[4:24, 4:24]
        resized = zoom(image, BOX / 8, order=1, grid_mode=True, mode="nearest")

        assert np.corrcoef(enlarged.ravel(), resized.ravel())[0, 1] > 0.9


def test_enlarge_keeps_ink_in_the_middle_20_by_20_box_but_for_a_soft_edge(digits_dataset):
    outside = digits_dataset.x_test.copy()
    outside[:, 3:25, 3:25] = 0  # cubic splines bleed a pixel, and ring faintly

    assert outside.max() < 0.05 * 255
    assert outside.sum() < 2e-3 * digits_dataset.x_test.sum()
    rows_used = digits_dataset.x_test.max(axis=(0, 2))
    assert rows_used[[4, 23]].min() > 128


def test_digits_are_the_same_every_time(digits_dataset, monkeypatch):
    monkeypatch.setattr("mnist_vae.sources.digits.VARIANTS", 2)  # which takes less time; the first bend is the same
    again = digits()

    np.testing.assert_array_equal(again.x_test, digits_dataset.x_test)
    np.testing.assert_array_equal(again.x_train[::2], digits_dataset.x_train[::VARIANTS])
    np.testing.assert_array_equal(again.x_train[1], digits_dataset.x_train[1])
