"""Somebody's own images: a folder with IDX or .npy files, with labels or without."""

import gzip
import struct

import numpy as np
import pytest

from mnist_vae.errors import UserError
from mnist_vae.evaluation.sample_quality import NEIGHBOURS
from mnist_vae.sources import folder as sources
from mnist_vae.sources.folder import FEWEST, IDX_FILES, read_folder

GENERATOR = np.random.default_rng(0)
ARRAYS = {
    "x_train": GENERATOR.integers(0, 256, size=(30, 28, 28), dtype=np.uint8),
    "y_train": GENERATOR.integers(0, 10, size=30, dtype=np.uint8),
    "x_test": GENERATOR.integers(0, 256, size=(12, 28, 28), dtype=np.uint8),
    "y_test": GENERATOR.integers(0, 10, size=12, dtype=np.uint8),
}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "faces"
    path.mkdir()
    return path


def idx(array):
    """An array in the IDX format."""
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def write_npy(folder, **changes):
    for name, array in (ARRAYS | changes).items():
        if array is not None:
            np.save(folder / f"{name}.npy", array)


def write_idx(folder):
    for name, array in ARRAYS.items():
        (folder / IDX_FILES[name]).write_bytes(idx(array))


def write_gzipped(folder):
    for name, array in ARRAYS.items():
        (folder / f"{IDX_FILES[name]}.gz").write_bytes(gzip.compress(idx(array)))


def refusal(folder):
    with pytest.raises(UserError) as error:
        read_folder(folder, folder.parent)
    assert str(error.value).startswith("data.dataset: ")
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("write", [write_npy, write_idx, write_gzipped])
def test_a_folder_gives_its_images_and_labels(folder, write):
    write(folder)
    before = sorted(folder.parent.rglob("*"))
    dataset = read_folder(folder, folder.parent)

    assert (dataset.name, dataset.title) == ("faces/", "faces")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(getattr(dataset, name), array, strict=True)
    assert sorted(folder.parent.rglob("*")) == before


def test_a_folder_called_mnist_is_not_taken_for_mnist(tmp_path):
    (tmp_path / "mnist").mkdir()
    write_npy(tmp_path / "mnist")

    assert read_folder(tmp_path / "mnist", tmp_path).name == "mnist/"


def test_a_folders_name_loses_what_a_picture_or_a_table_would_interpret(tmp_path):
    folder = tmp_path / "my $faces$ | 2"
    folder.mkdir()
    write_npy(folder)

    assert read_folder(folder, tmp_path).title == "my _faces_ _ 2"


def test_labels_may_be_missing(folder):
    write_npy(folder, y_train=None, y_test=None)
    dataset = read_folder(folder, folder.parent)

    assert (dataset.y_train, dataset.y_test) == (None, None)
    assert dataset.about["sha256"].keys() == {"x_train", "x_test"}


def test_labels_may_be_whole_numbers_of_any_type(folder):
    write_npy(folder, y_train=ARRAYS["y_train"].astype(np.int64))

    np.testing.assert_array_equal(read_folder(folder, folder.parent).y_train, ARRAYS["y_train"], strict=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": None}, "has no x_train.npy or train-images-idx3-ubyte(.gz)"),
        ({"x_test": None}, "has no x_test.npy or t10k-images-idx3-ubyte(.gz)"),
        ({"y_test": None}, "has labels for one of training and test images only: add y_test"),
        ({"x_train": ARRAYS["x_train"][:, :, :14]}, "it holds uint8 of shape (30, 28, 14)"),
        ({"x_train": ARRAYS["x_train"].reshape(30, 784)}, "it holds uint8 of shape (30, 784)"),
        ({"x_train": ARRAYS["x_train"] / 255}, "it holds float64 of shape (30, 28, 28)"),
        ({"x_train": ARRAYS["x_train"].astype(np.uint16)}, "it holds uint16; pixels are 0 to 255, as uint8"),
        ({"x_test": ARRAYS["x_test"][:0]}, "cannot be read as uint8 images (N, 28, 28): it holds 0 images, and"),
        ({"x_train": ARRAYS["x_train"][:5]}, "it holds 5 images, and evaluation needs at least 6"),
        ({"y_train": ARRAYS["y_train"][:0]}, "30 train images with 0 labels"),
        (
            {"y_train": np.full(30, 3)},
            "all training labels are 3, which tells nothing apart; leave out both label files",
        ),
        ({"x_test": np.array([print])}, "cannot be read as uint8 images (N, 28, 28)"),
        ({"y_train": ARRAYS["y_train"][:29]}, "30 train images with 29 labels"),
        ({"y_train": ARRAYS["y_train"] + 1.0}, "cannot be read as whole numbers (N,): it holds float64"),
        ({"y_train": np.full(30, 26)}, "a label is 26, and a digit is 0 to 9"),
        ({"y_train": np.full(30, -1)}, "a label is -1, and a digit is 0 to 9"),
    ],
)
def test_a_folder_of_something_else_is_refused_in_one_line(folder, changes, message):
    write_npy(folder, **changes)

    assert message in refusal(folder)


def test_labels_that_evaluation_sees_tell_digits_apart(folder, monkeypatch):
    monkeypatch.setattr(sources, "COMPARED", 20)
    write_npy(folder, y_train=np.repeat([3, 4], [20, 10]))

    assert "the first 20 training labels are 3, which tells nothing apart; leave out both label files, or mix the" in (
        refusal(folder)
    )


def test_an_archive_of_arrays_is_refused(folder):
    write_npy(folder, x_train=None)
    with (folder / "x_train.npy").open("wb") as file:
        np.savez(file, ARRAYS["x_train"])

    assert "it is an archive of arrays, as of np.savez, not one array" in refusal(folder)


@pytest.mark.parametrize("content", [b"PK\x03\x04 no archive", b"\x93NUMPY\x01\x00\x10\x00{'descr': ('\\n     "])
def test_a_damaged_array_is_refused(folder, content):
    write_npy(folder)
    (folder / "x_train.npy").write_bytes(content)

    assert "cannot be read as uint8 images (N, 28, 28)" in refusal(folder)


def test_the_fewest_images_are_those_that_evaluation_can_compare():
    assert FEWEST == NEIGHBOURS + 1


def test_a_missing_folder_is_named(folder):
    assert "is no folder; correct the path in params.yaml" in refusal(folder / "missing")


def test_a_path_that_no_system_takes_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^data.dataset: .*: File name too long; correct the path"):
        read_folder(tmp_path / ("x" * 300), tmp_path)


@pytest.mark.parametrize("left", [0, 7, 16, 1_000, -1])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_idx_file_that_is_cut_short_is_refused(folder, left, suffix):
    (write_gzipped if suffix else write_idx)(folder)
    file = folder / f"{IDX_FILES['x_train']}{suffix}"
    file.write_bytes(file.read_bytes()[:left])

    assert "cannot be read as uint8 images (N, 28, 28)" in refusal(folder)


@pytest.mark.parametrize("content", [b"<html>", bytes(5_000), b"\x1f\x8b" + bytes(100), idx(ARRAYS["y_train"])])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_idx_file_of_something_else_is_refused(folder, content, suffix):
    (write_gzipped if suffix else write_idx)(folder)
    (folder / f"{IDX_FILES['x_train']}{suffix}").write_bytes(content)

    assert "cannot be read as uint8 images (N, 28, 28)" in refusal(folder)
