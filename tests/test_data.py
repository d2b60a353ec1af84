"""Data sets on disk: what was saved comes back, anything else is refused with a remedy."""

import hashlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest

from mnist_vae.data import dataset as data
from mnist_vae.data.dataset import ARRAYS, Dataset, hold_out, load_dataset, save_dataset
from mnist_vae.errors import UserError


@pytest.fixture
def dataset(digits_dataset):
    part = digits_dataset
    return Dataset("digits", part.x_train[:50], part.y_train[:50], part.x_test[:20], part.y_test[:20])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "dataset"


def refusal(path):
    with pytest.raises(UserError) as error:
        load_dataset(path)
    assert "`dvc repro --force --single-item download` makes it again" in str(error.value)
    assert str(path.parent) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit_about(path, **changes):
    """Change entries of the .json beside ``path``; None removes one."""
    about = path.with_suffix(".json")
    content = json.loads(about.read_text()) | changes
    about.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


# what was saved


def test_load_dataset_gives_back_what_save_dataset_wrote(path, dataset):
    save_dataset(path, dataset)
    loaded = load_dataset(path)

    assert (loaded.name, loaded.binarize) == ("digits", "none")
    for array in ARRAYS:
        np.testing.assert_array_equal(getattr(loaded, array), getattr(dataset, array), strict=True)


def test_load_dataset_maps_the_files_and_reads_no_array_into_memory(path, dataset):
    save_dataset(path, dataset)
    loaded = load_dataset(path)

    for array in ARRAYS:
        base = getattr(loaded, array)
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap), array
        assert not getattr(loaded, array).flags.writeable


def test_a_loaded_data_set_outlives_its_files(path, dataset):
    save_dataset(path, dataset)
    loaded = load_dataset(path)
    save_dataset(path, replace(dataset, x_test=255 - dataset.x_test))

    np.testing.assert_array_equal(loaded.x_test, dataset.x_test)


def test_a_data_set_without_labels_comes_back_without_labels(path, dataset):
    save_dataset(path, dataset)
    save_dataset(path, replace(dataset, name="faces/", y_train=None, y_test=None))
    loaded = load_dataset(path)

    assert sorted(file.name for file in path.iterdir()) == ["x_test.npy", "x_train.npy"]
    assert (loaded.y_train, loaded.y_test, loaded.title) == (None, None, "faces")
    np.testing.assert_array_equal(loaded.x_train, dataset.x_train)


@pytest.mark.parametrize("order", ["C", "F"])
def test_save_dataset_writes_equal_bytes_for_equal_images(tmp_path, dataset, order):
    first, second = tmp_path / "first", tmp_path / "second"
    save_dataset(first, dataset)
    save_dataset(second, replace(dataset, x_train=dataset.x_train.copy(order)))

    for array in ARRAYS:
        assert (first / f"{array}.npy").read_bytes() == (second / f"{array}.npy").read_bytes()
    assert first.with_suffix(".json").read_bytes() == second.with_suffix(".json").read_bytes()


def test_save_dataset_writes_what_numpy_would(path, dataset):
    save_dataset(path, dataset)

    for array in ARRAYS:
        expected = io.BytesIO()
        np.save(expected, getattr(dataset, array))
        assert (path / f"{array}.npy").read_bytes() == expected.getvalue()


def test_the_digest_is_that_of_name_and_arrays(dataset):
    hashes = [hashlib.sha256(getattr(dataset, array).tobytes()).hexdigest() for array in ARRAYS]

    assert list(dataset.about["sha256"].values()) == hashes
    assert dataset.about["digest"] == hashlib.sha256("".join(["digits", *hashes]).encode()).hexdigest()


def test_hashes_do_not_depend_on_the_size_of_a_block(dataset, monkeypatch):
    before = dataset.about
    monkeypatch.setattr(data, "BLOCK", 7)

    assert replace(dataset).about == before


@pytest.mark.parametrize(("asked_for", "recorded"), [(None, "digits"), ("mnist", "mnist")])
def test_save_dataset_records_what_was_asked_for_beside_what_it_is(path, dataset, asked_for, recorded):
    save_dataset(path, dataset, asked_for)

    about = json.loads(path.with_suffix(".json").read_text())
    assert (about["asked_for"], about["name"]) == (recorded, "digits")
    assert load_dataset(path).name == "digits"


# what a data set says of itself


def test_title_says_when_the_images_are_not_mnist(dataset):
    assert dataset.title == "scikit-learn digits (not MNIST)"
    assert replace(dataset, name="mnist").title == "MNIST"


def test_title_says_how_the_images_were_binarised(dataset):
    assert replace(dataset, name="mnist", binarize="dynamic").title == "MNIST, dynamically binarised"
    assert replace(dataset, name="mnist", binarize="static").title == "MNIST, statically binarised"


def test_about_counts_the_images(dataset):
    about = dataset.about

    assert (about["name"], about["train_images"], about["test_images"]) == ("digits", 50, 20)
    assert about == replace(dataset, x_test=dataset.x_test.copy()).about


@pytest.mark.parametrize("array", ARRAYS)
def test_about_has_another_digest_for_any_other_pixel_or_label(dataset, array):
    changed = getattr(dataset, array).copy()
    changed.flat[-1] ^= 1
    before, after = dataset.about, replace(dataset, **{array: changed}).about

    assert before["digest"] != after["digest"]
    assert {name for name in before["sha256"] if before["sha256"][name] != after["sha256"][name]} == {array}


# what is refused


def files_of(path):
    """Every file of a data set."""
    return {"dataset.json": path.with_suffix(".json"), **{f"{array}.npy": path / f"{array}.npy" for array in ARRAYS}}


FILES = ["dataset.json", *(f"{array}.npy" for array in ARRAYS)]


@pytest.mark.parametrize("name", FILES)
def test_load_dataset_refuses_a_missing_file(path, dataset, name):
    save_dataset(path, dataset)
    files_of(path)[name].unlink()

    assert f"{name} is missing" in refusal(path)


def test_load_dataset_names_a_file_that_cannot_be_read(path):
    path.with_suffix(".json").mkdir(parents=True)

    assert "dataset.json cannot be read (Is a directory)" in refusal(path)


@pytest.mark.parametrize("left", [0, 1, 100, 128, 0.5, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_load_dataset_refuses_a_truncated_file(path, dataset, left, name):
    save_dataset(path, dataset)
    file = files_of(path)[name]
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])

    refusal(path)


def test_load_dataset_notices_a_flipped_bit_in_an_image(path, dataset):
    save_dataset(path, dataset)
    content = bytearray((path / "x_train.npy").read_bytes())
    content[5_000] ^= 1
    (path / "x_train.npy").write_bytes(content)

    assert "does not hold the images that" in refusal(path)


@pytest.mark.parametrize("content", [b"<html>404</html>\n", b"\x00" * 1000, b"\x93NUMPY and so on"])
def test_load_dataset_refuses_a_foreign_file(path, dataset, content):
    save_dataset(path, dataset)
    (path / "x_train.npy").write_bytes(content)

    assert "x_train.npy is damaged or not what this project writes" in refusal(path)


def test_load_dataset_refuses_an_array_that_needs_pickle(path, dataset):
    save_dataset(path, dataset)
    np.save(path / "x_test.npy", np.array([print]))

    assert "it does not hold uint8 of shape (N, 28, 28)" in refusal(path)


def test_load_dataset_refuses_an_array_that_claims_more_than_its_file_holds(path, dataset):
    save_dataset(path, dataset)
    with (path / "x_train.npy").open("r+b") as file:  # 78 GB
        about = {"descr": "|u1", "fortran_order": False, "shape": (100_000_000, 28, 28)}
        np.lib.format.write_array_header_1_0(file, about)

    assert "it does not hold uint8 of shape (N, 28, 28)" in refusal(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": np.zeros((50, 32, 32), np.uint8)}, "it does not hold uint8 of shape (N, 28, 28)"),
        ({"x_train": np.zeros((50, 28, 28), np.float32)}, "it does not hold uint8 of shape (N, 28, 28)"),
        ({"x_test": np.zeros((20, 784), np.uint8)}, "it does not hold uint8 of shape (N, 28, 28)"),
        ({"y_train": np.zeros(49, np.uint8)}, "50 train images with 49 labels"),
        ({"y_test": np.zeros((20, 10), np.uint8)}, "it does not hold uint8 of shape (N,)"),
        ({"y_test": np.full(20, 10, np.uint8)}, "a label is 10, and a digit is at most 9"),
        ({"x_test": np.zeros((0, 28, 28), np.uint8), "y_test": np.zeros(0, np.uint8)}, "it holds nothing"),
    ],
    ids=["size", "type", "flat", "labels too few", "labels one-hot", "label of 10", "empty"],
)
def test_load_dataset_refuses_arrays_that_are_no_images_with_digits(path, dataset, change, message):
    save_dataset(path, replace(dataset, **change))

    assert message in refusal(path)


@pytest.mark.parametrize(
    "changes",
    [{"digest": "0" * 64}, {"train_images": 51}, {"name": "mnist"}, {"sha256": None}, {"sha256": []}],
    ids=["digest", "count", "name", "no hashes", "hashes of another type"],
)
def test_load_dataset_refuses_images_that_its_json_does_not_describe(path, dataset, changes):
    save_dataset(path, dataset)
    edit_about(path, **changes)

    assert "does not hold the images that" in refusal(path)


def test_load_dataset_refuses_images_of_another_run(path, tmp_path, dataset):
    save_dataset(path, dataset)
    save_dataset(tmp_path / "other", replace(dataset, x_test=255 - dataset.x_test))
    (tmp_path / "other/x_test.npy").replace(path / "x_test.npy")

    assert "does not hold the images that" in refusal(path)


@pytest.mark.parametrize(
    "content",
    ['{"name": "cifar"}', '{"name": ["mnist"]}', "{}", "[]", "3", "", '{"name": "mnist"', "[" * 100_000, "\ud800"],
    ids=["unknown", "list", "empty", "no object", "number", "nothing", "cut", "deep", "not UTF-8"],
)
def test_load_dataset_refuses_a_json_that_names_no_data_set(path, dataset, content):
    save_dataset(path, dataset)
    path.with_suffix(".json").write_bytes(content.encode("utf-8", "surrogatepass"))

    assert "dataset.json is damaged or not what this project writes" in refusal(path)


# images held out for validation


def test_hold_out_splits_the_images_without_a_rest():
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1)

    train, held_out = hold_out(images, 30, seed=1)

    assert (len(train), len(held_out)) == (70, 30)
    assert sorted([*train[:].flat, *held_out[:].flat]) == list(range(100))
    assert held_out[:].ravel().tolist() != sorted(held_out[:].flat)  # at random, not the first ones


def test_hold_out_takes_the_same_images_for_the_same_seed():
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1)

    np.testing.assert_array_equal(hold_out(images, 30, seed=1)[1][:], hold_out(images, 30, seed=1)[1][:])
    assert not np.array_equal(hold_out(images, 30, seed=1)[1][:], hold_out(images, 30, seed=2)[1][:])


def test_hold_out_of_nothing_leaves_the_images_as_they_are(dataset):
    train, held_out = hold_out(dataset.x_train, 0, seed=1)

    assert train is dataset.x_train
    assert held_out.shape == (0, 28, 28)


@pytest.mark.parametrize("size", [50, 60_000])
def test_hold_out_refuses_to_leave_nothing_to_train_on(dataset, size):
    message = f"params.yaml: train.validation_size is {size}; it must be less than the 50 training images"
    with pytest.raises(UserError, match=message):
        hold_out(dataset.x_train, size, seed=1)
