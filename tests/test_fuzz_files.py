"""Files that lie: whatever a file holds, its reader gives back what was written or refuses it, in one line.

Every example changes a valid file: bytes flipped, overwritten, cut out or inserted, headers and metadata that claim
what is not there. The readers work with 2 GB of memory at most. FUZZ_EXAMPLES sets how many examples each test tries.
"""

import dataclasses
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mnist_vae.data.dataset import ARRAYS, Dataset, load_dataset, save_dataset
from mnist_vae.errors import UserError
from mnist_vae.model import model_file
from mnist_vae.model.model_file import SavedModel, load_model, save_model
from mnist_vae.model.vae import VAE, VAEConfig
from mnist_vae.params import load_params
from mnist_vae.training import checkpoints
from mnist_vae.training.checkpoints import last_checkpoint, load_checkpoint
from mnist_vae.training.fit import fit

MOST_MEMORY = 2 * 2**30  # bytes
PARAMS = Path(__file__).parent.parent / "params.yaml"

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "200")), derandomize=True, deadline=None, database=None
)


@pytest.fixture(scope="module", autouse=True)
def _two_gigabytes() -> Iterator[None]:
    """Refuse this process more memory than it has now and MOST_MEMORY, where the system can: a claim then fails."""
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# how files are changed


@st.composite
def damaged(draw: st.DrawFn, content: bytes, changes: int = 3) -> bytes:
    """``content`` with a few bytes flipped, overwritten, cut out, inserted or repeated, at its ends as often as not."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, changes))):
        last = max(0, len(changed) - 1)
        at = draw(st.integers(0, last) | st.integers(0, min(last, 400)) | st.integers(max(0, last - 1500), last))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 64, 10_000]))
        match draw(st.sampled_from(["flip", "overwrite", "cut", "insert", "repeat", "truncate"])):
            case "flip" if changed:
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case "overwrite":
                changed[at : at + length] = draw(st.sampled_from([b"\0", b"\xff", b"\x7f"])) * min(length, 64)
            case "cut":
                del changed[at : at + length]
            case "insert":
                changed[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "repeat":
                changed[at:at] = changed[at : at + length]
            case "truncate":
                del changed[at:]
    return bytes(changed)


numbers = st.none() | st.booleans() | st.integers() | st.floats() | st.integers(2**30, 2**70)
texts = st.text(max_size=8) | st.sampled_from(["mnist", "digits", "F32", "mnist-vae/3", "\ud800", "\n"])
json_values = st.recursive(
    numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def other_entries(draw: st.DrawFn, content: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with one or two entries, of it or of the objects in it, replaced, removed or added."""
    changed = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 2))):
        place = changed
        inner = [name for name, value in changed.items() if isinstance(value, dict)]
        if inner and draw(st.booleans()):
            place = changed[draw(st.sampled_from(inner))]
        name = draw(st.sampled_from([*place]) | texts) if place else draw(texts)
        if draw(st.booleans()):
            place[name] = draw(json_values)
        else:
            place.pop(name, None)
    return changed


def assert_one_line(error: UserError, folder: Path) -> None:
    assert "\n" not in str(error)
    assert str(folder) in str(error)
    assert "again" in str(error)


# data sets


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    images = np.random.default_rng(0).integers(0, 256, size=(5, 28, 28), dtype=np.uint8)
    return Dataset("digits", images[:3], np.array([1, 0, 9], np.uint8), images[3:], np.array([4, 4], np.uint8))


@pytest.fixture(scope="module")
def dataset_file(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> Path:
    """A data set on disk; tests change its files at will and put them back."""
    path = tmp_path_factory.mktemp("data") / "dataset"
    save_dataset(path, dataset)
    return path


def file_of(folder: Path, name: str) -> Path:
    """The file of an array, or the .json."""
    return folder / f"{name}.npy" if name in ARRAYS else folder.with_suffix(".json")


def check_dataset(folder: Path, dataset: Dataset, name: str, content: bytes) -> None:
    """Read the data set with another content of one of its files, which is then put back."""
    file = file_of(folder, name)
    original = file.read_bytes()
    file.unlink()  # it may be mapped still, and what is mapped must not shrink
    try:
        file.write_bytes(content)
        loaded = load_dataset(folder)
        assert loaded.name == dataset.name
        for array in ARRAYS:
            np.testing.assert_array_equal(getattr(loaded, array), getattr(dataset, array), strict=True)
    except UserError as error:
        assert_one_line(error, folder.parent)
    finally:
        file.unlink()
        file.write_bytes(original)


@fuzz
@given(data=st.data(), array=st.sampled_from(ARRAYS))
def test_load_dataset_survives_damage_to_the_arrays(
    dataset_file: Path, dataset: Dataset, data: st.DataObject, array: str
) -> None:
    content = data.draw(damaged(file_of(dataset_file, array).read_bytes()))

    check_dataset(dataset_file, dataset, array, content)


@fuzz
@given(data=st.data())
def test_load_dataset_survives_damage_to_the_json(dataset_file: Path, dataset: Dataset, data: st.DataObject) -> None:
    about = data.draw(damaged(dataset_file.with_suffix(".json").read_bytes()))

    check_dataset(dataset_file, dataset, "json", about)


@fuzz
@given(data=st.data())
def test_load_dataset_survives_any_entry_in_the_json(dataset_file: Path, dataset: Dataset, data: st.DataObject) -> None:
    about = data.draw(other_entries(json.loads(dataset_file.with_suffix(".json").read_text())))

    check_dataset(dataset_file, dataset, "json", json.dumps(about).encode())


def npy(header: bytes, content: bytes) -> bytes:
    """An array's file with any header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


headers = st.builds(
    lambda descr, fortran, shape, pad: f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}".ljust(
        pad
    ).encode(),
    st.sampled_from(["|u1", "<f8", "|O", "|V1000000000", "|u1,", [("a", "<i4")]]),
    st.booleans(),
    st.lists(st.integers(-1, 2**70) | st.sampled_from([2, 3, 28]), max_size=4).map(tuple),
    st.sampled_from([0, 117]),
)


@fuzz
@given(header=headers | st.binary(max_size=200), array=st.sampled_from(ARRAYS))
def test_load_dataset_survives_headers_that_claim_anything(
    dataset_file: Path, dataset: Dataset, header: bytes, array: str
) -> None:
    check_dataset(dataset_file, dataset, array, npy(header, getattr(dataset, array).tobytes()))


# models


@pytest.fixture(scope="module")
def model() -> SavedModel:
    torch.manual_seed(0)
    return SavedModel(VAE(VAEConfig(hidden_dims=(2,), latent_dim=1, input_dim=4)), "digits", [1.5], "0123456789abcdef")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory, model: SavedModel) -> Path:
    """A model on disk; tests put changed files beside it."""
    path = tmp_path_factory.mktemp("models") / "vae.safetensors"
    save_model(path, model)
    return path


def check_model(path: Path, model: SavedModel) -> None:
    try:
        loaded = load_model(path)
    except UserError as error:
        assert_one_line(error, path)
        return
    assert loaded[1:] == model[1:]
    assert loaded.vae.config == model.vae.config
    weights = model.vae.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.vae.state_dict().items())


@fuzz
@given(data=st.data())
def test_load_model_survives_damage(model_path: Path, model: SavedModel, data: st.DataObject) -> None:
    path = model_path.with_name("damaged.safetensors")
    path.write_bytes(data.draw(damaged(model_path.read_bytes())))

    check_model(path, model)


@fuzz
@given(data=st.data())
def test_load_model_survives_headers_that_claim_anything(
    model_path: Path, model: SavedModel, data: st.DataObject
) -> None:
    content = model_path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    sizes = st.integers(0, 2**64) | st.sampled_from([0, 1, 2, 4, 8, 2**17, 2**34])
    name = data.draw(st.sampled_from([name for name in header if name != "__metadata__"]))
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F64", "I8", "BOOL"]),
            "shape": st.lists(sizes, max_size=3),
            "data_offsets": st.lists(sizes, min_size=2, max_size=2),
        }
    )
    header = data.draw(other_entries(header)) | {name: data.draw(entry | json_values | st.just(header[name]))}
    claimed = json.dumps(header).encode()
    length = data.draw(st.just(len(claimed)) | sizes.filter(lambda length: length < 2**64))
    path = model_path.with_name("claims.safetensors")
    path.write_bytes(struct.pack("<Q", length) + claimed + content[8 + size :])

    check_model(path, model)


@fuzz
@given(data=st.data())
def test_load_model_refuses_metadata_that_make_no_model_even_with_a_digest_that_fits(
    model_path: Path, model: SavedModel, data: st.DataObject
) -> None:
    weights = load_file(model_path)
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from([*weights]))
        weights[name].view(-1)[0] = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    else:
        weights["posterior.bias"] = data.draw(st.sampled_from([torch.zeros(3), torch.zeros(2, dtype=torch.complex64)]))
    about = {
        "format": model_file.FORMAT,
        "config": dataclasses.asdict(model.vae.config),
        "dataset": model.dataset,
        "kld_per_dim": model.kld_per_dim,
        "fingerprint": model.fingerprint,
    }
    size = st.integers(1, model_file.LARGEST)
    shapes = st.fixed_dictionaries({"hidden_dims": st.lists(size, max_size=9), "input_dim": size})
    about |= data.draw(st.just({}) | shapes.map(lambda shape: {"config": about["config"] | shape}))
    about = data.draw(st.just(about) | other_entries(about))
    about["sha256"] = model_file._digest(about, weights)
    path = model_path.with_name("forged.safetensors")
    save_file(weights, path, metadata={model_file.ENTRY: json.dumps(about)})

    with pytest.raises(UserError) as error:
        load_model(path)
    assert_one_line(error.value, path)


# checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a training of two epochs leaves to resume from."""
    folder = tmp_path_factory.mktemp("checkpoints")
    train = load_params(PARAMS).train.model_copy(update={"epochs": 2, "accelerator": "cpu"})
    images = np.random.default_rng(0).integers(0, 256, size=(20, 28, 28), dtype=np.uint8)
    fit(images, VAEConfig(hidden_dims=(2,), latent_dim=1), train, checkpoints=folder)
    return (folder / "last.ckpt").read_bytes()


def plain(content: Any) -> Any:
    """Nested containers of tensors as something that can be compared."""
    match content:
        case torch.Tensor():
            return (str(content.dtype), content.shape, content.numpy().tobytes())
        case dict():
            return {name: plain(value) for name, value in content.items()}
        case list() | tuple():
            return [plain(value) for value in content]
    return content


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@fuzz
@given(data=st.data())
def test_last_checkpoint_gives_a_whole_checkpoint_or_none(
    checkpoint: bytes, checkpoint_folder: Path, data: st.DataObject
) -> None:
    path = checkpoint_folder / "last.ckpt"
    path.write_bytes(checkpoint)
    whole = plain(load_checkpoint(path))
    path.write_bytes(data.draw(damaged(checkpoint)))

    found, epochs = last_checkpoint(checkpoint_folder, validation=False)

    if found is None:
        assert epochs == 0
        assert not path.exists()
    else:
        assert (found, epochs) == (path, 2)
        assert plain(load_checkpoint(found)) == whole


def members(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {entry.filename: opened.read(entry) for entry in opened.infolist()}


@fuzz
@given(data=st.data())
def test_last_checkpoint_does_not_take_damaged_members_with_checksums_that_fit(
    checkpoint: bytes, checkpoint_folder: Path, data: st.DataObject
) -> None:
    contents = members(checkpoint)
    name = data.draw(st.sampled_from([*contents]))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as forged:
        for member, content in contents.items():
            forged.writestr(member, data.draw(damaged(content)) if member == name else content)
    (checkpoint_folder / "last.ckpt").write_bytes(archive.getvalue())

    assert last_checkpoint(checkpoint_folder, validation=False) == (None, 0)


@pytest.mark.parametrize("content", [{}, [], {"history": 3}, 3, "history"])
def test_last_checkpoint_does_not_take_another_programs_checkpoint(checkpoint_folder: Path, content: Any) -> None:
    archive = io.BytesIO()
    torch.save(content, archive)
    (checkpoint_folder / "last.ckpt").write_bytes(checkpoints.seal(archive))

    assert last_checkpoint(checkpoint_folder, validation=False) == (None, 0)


class RunsCode:
    """Unpickled without care, this makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_last_checkpoint_runs_no_code(checkpoint_folder: Path, tmp_path: Path, save: str) -> None:
    archive = io.BytesIO()
    content = {"history": [], "state_dict": RunsCode(tmp_path / "trace")}
    torch.save(content, archive) if save == "torch" else pickle.dump(content, archive)
    (checkpoint_folder / "last.ckpt").write_bytes(checkpoints.seal(archive))

    assert last_checkpoint(checkpoint_folder, validation=False) == (None, 0)

    assert not (tmp_path / "trace").exists()
    pickle.loads(pickle.dumps(content))  # it would have
    assert (tmp_path / "trace").exists()
