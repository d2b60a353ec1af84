"""Data sets on disk: what was saved comes back, anything else is refused with a remedy."""

import zipfile
from dataclasses import replace

import numpy as np
import pytest

from mnist_vae.data.dataset import Dataset, load_dataset, save_dataset
from mnist_vae.errors import UserError


@pytest.fixture
def dataset(digits_dataset):
    part = digits_dataset
    return Dataset("digits", part.x_train[:50], part.y_train[:50], part.x_test[:20], part.y_test[:20])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "dataset.npz"


def refusal(path):
    with pytest.raises(UserError) as error:
        load_dataset(path, "digits")
    assert "`dvc repro download` makes it again" in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_what_was_saved_comes_back(path, dataset):
    save_dataset(path, dataset)
    loaded = load_dataset(path, "digits")

    assert loaded.name == "digits"
    for array in ("x_train", "y_train", "x_test", "y_test"):
        np.testing.assert_array_equal(getattr(loaded, array), getattr(dataset, array), strict=True)


def test_equal_data_give_equal_bytes(tmp_path, dataset):
    first, second = tmp_path / "first.npz", tmp_path / "second.npz"
    save_dataset(first, dataset)
    save_dataset(second, replace(dataset, x_train=dataset.x_train.copy()))

    assert first.read_bytes() == second.read_bytes()


def test_the_bytes_do_not_depend_on_a_compressor(path, dataset):
    save_dataset(path, dataset)

    with zipfile.ZipFile(path) as archive:
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}


def test_a_picture_says_when_its_data_are_not_mnist(dataset):
    assert dataset.title == "scikit-learn digits (not MNIST)"
    assert replace(dataset, name="mnist").title == "MNIST"


def test_about_counts_the_images(dataset):
    about = dataset.about()

    assert (about["name"], about["train_images"], about["test_images"]) == ("digits", 50, 20)
    assert about == dataset.about()


@pytest.mark.parametrize("array", ["x_train", "y_train", "x_test", "y_test"])
def test_the_digest_changes_with_any_pixel_or_label(dataset, array):
    changed = getattr(dataset, array).copy()
    changed.flat[-1] ^= 1
    before, after = dataset.about(), replace(dataset, **{array: changed}).about()

    assert before["digest"] != after["digest"]
    assert {name for name in before["sha256"] if before["sha256"][name] != after["sha256"][name]} == {array}


def test_a_missing_file_is_refused(path):
    assert "is missing" in refusal(path)


@pytest.mark.parametrize("left", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(path, dataset, left):
    save_dataset(path, dataset)
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])

    assert "damaged" in refusal(path)


def test_a_flipped_bit_in_an_image_is_noticed(path, dataset):
    save_dataset(path, dataset)
    content = bytearray(path.read_bytes())
    content[5_000] ^= 1
    path.write_bytes(content)

    assert "CRC" in refusal(path)


@pytest.mark.parametrize("content", [b"<html>404</html>\n", b"\x00" * 1000, b"PK\x03\x04 and so on"])
def test_a_foreign_file_is_refused(path, content):
    path.parent.mkdir()
    path.write_bytes(content)

    assert "damaged or no data set" in refusal(path)


def test_an_archive_of_other_arrays_is_refused(path, dataset):
    path.parent.mkdir()
    np.savez(path, x_train=dataset.x_train, y_train=dataset.y_train)

    assert "x_test" in refusal(path)


def test_an_archive_that_needs_pickle_is_refused(path, dataset):
    path.parent.mkdir()
    np.savez(path, x_train=dataset.x_train, y_train=dataset.y_train, x_test=np.array([print]), y_test=dataset.y_test)

    assert "damaged or no data set" in refusal(path)


@pytest.mark.parametrize(
    "change",
    [
        {"x_train": np.zeros((50, 32, 32), np.uint8)},
        {"x_train": np.zeros((50, 28, 28), np.float32)},
        {"x_test": np.zeros((20, 784), np.uint8)},
        {"y_train": np.zeros(49, np.uint8)},
        {"y_test": np.zeros((20, 10), np.uint8)},
        {"x_test": np.zeros((0, 28, 28), np.uint8), "y_test": np.zeros(0, np.uint8)},
    ],
    ids=["size", "type", "flat", "labels too few", "labels one-hot", "empty"],
)
def test_arrays_of_other_shapes_or_types_are_refused(path, dataset, change):
    save_dataset(path, replace(dataset, **change))

    assert "holds" in refusal(path)
