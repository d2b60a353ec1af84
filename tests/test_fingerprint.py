"""The fingerprint of a training: another one whenever its result may be another, and the same one otherwise."""

import platform
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mnist_vae import fingerprint as module
from mnist_vae.data.dataset import Dataset
from mnist_vae.fingerprint import digest_of_code, environment, fingerprint
from mnist_vae.params import load_params
from stages.train import identity

REPOSITORY = Path(__file__).parent.parent
PARAMS = load_params(REPOSITORY / "params.yaml")
SECTIONS = ("data", "model", "train", "evaluate", "samples", "grid")
# Not where the images are from, but they themselves; and not how many processes share the work.
NO_MATTER = {"data.dataset", "data.fallback", "train.devices", "train.nodes"}
PARTS = {"data": "a", "code": "b", "params": {"x": 1, "y": 2}, "environment": {"torch": "2.6"}}


def test_fingerprint_is_a_name_of_16_hexadecimal_digits():
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(**PARTS))


def test_fingerprint_does_not_depend_on_the_order_of_its_parts():
    parts = dict(reversed(PARTS.items())) | {"params": {"y": 2, "x": 1}}

    assert fingerprint(**parts) == fingerprint(**PARTS)


@pytest.mark.parametrize(
    "change",
    [
        {"data": "b"},
        {"code": "c"},
        {"params": {"x": 1, "y": 3}},
        {"params": {"x": 1}},
        {"environment": {"torch": "2.7"}},
    ],
    ids=str,
)
def test_fingerprint_changes_with_each_part(change):
    assert fingerprint(**PARTS | change) != fingerprint(**PARTS)


# code


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A folder with a file at its top and two in a room, and another file beside the room."""
    monkeypatch.chdir(tmp_path)
    for name in ("src/room/a.py", "src/room/b.py", "src/room/inner/c.html", "src/beside.py"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    return [Path("src/room"), Path("src/beside.py")]


@pytest.mark.parametrize("name", ["src/room/a.py", "src/room/inner/c.html", "src/beside.py"])
def test_digest_of_code_changes_with_the_content_of_each_file(code, name):
    before = digest_of_code(code)
    Path(name).write_text("other")

    assert digest_of_code(code) != before


def test_digest_of_code_changes_when_a_file_is_added_renamed_or_removed(code):
    digests = [digest_of_code(code)]
    Path("src/room/new.py").touch()
    digests.append(digest_of_code(code))
    Path("src/room/new.py").rename("src/room/newer.py")
    digests.append(digest_of_code(code))
    Path("src/room/a.py").unlink()
    digests.append(digest_of_code(code))

    assert len(set(digests)) == 4


def test_digest_of_code_changes_when_text_moves_from_one_file_to_the_next(code):
    Path("src/room/a.py").write_text("one\ntwo\n")
    Path("src/room/b.py").write_text("three\n")
    before = digest_of_code(code)
    Path("src/room/a.py").write_text("one\n")
    Path("src/room/b.py").write_text("two\nthree\n")

    assert digest_of_code(code) != before


def test_digest_of_code_depends_neither_on_other_files_nor_on_compiled_ones(code):
    before = digest_of_code(code)
    Path("src/unrelated.py").write_text("x")
    Path("src/roommate").mkdir()
    Path("src/roommate/a.py").write_text("x")
    for folder in ("src/room/__pycache__", "src/room/inner/__pycache__"):
        Path(folder).mkdir()
        Path(folder, "a.cpython-311.pyc").write_bytes(b"x")

    assert digest_of_code(code) == before


def test_digest_of_code_depends_neither_on_the_order_of_paths_nor_on_where_the_project_is(code, tmp_path, monkeypatch):
    before = digest_of_code(code)
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    monkeypatch.chdir(moved)

    assert digest_of_code(reversed(code)) == before


# the environment


def test_environment_names_the_same_things_each_time():
    assert environment() == environment()
    assert all(isinstance(value, str) and value for value in environment().values())


@pytest.mark.parametrize("package", ["torch", "numpy", "lightning"])
def test_environment_changes_with_the_version_of_each_library(monkeypatch, package):
    before, version = environment(), module.version
    monkeypatch.setattr(module, "version", lambda name: "0.1" if name == package else version(name))

    assert environment() == before | {package: "0.1"}


def test_environment_takes_builds_of_one_version_of_torch_for_the_same(monkeypatch):
    monkeypatch.setattr(module, "version", lambda name: "2.6.0+cpu")
    before = environment()
    monkeypatch.setattr(module, "version", lambda name: "2.6.0")

    assert environment() == before


@pytest.mark.parametrize(
    ("owner", "function", "name"),
    [
        (platform, "machine", "platform"),
        (torch.backends.cpu, "get_cpu_capability", "instructions"),
        (torch.cuda, "get_device_name", "device"),
    ],
)
def test_environment_changes_with_the_machine(monkeypatch, owner, function, name):
    before = environment()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name == "device")
    monkeypatch.setattr(owner, function, lambda: "another")

    assert environment()[name] != before[name]


# the training


@pytest.fixture
def dataset(monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # whose dvc.yaml says what the code is
    x, y = np.zeros((10, 28, 28), np.uint8), np.zeros(10, np.uint8)
    return Dataset("digits", x, y, x, y)


def with_another(name):
    """The committed parameters with another value in place of one, named as ``train.epochs`` is."""
    section, _, entry = name.partition(".")
    return PARAMS.model_copy(update={section: getattr(PARAMS, section).model_copy(update={entry: "another"})})


def test_identity_changes_with_each_parameter_of_the_training_and_no_other(dataset):
    before = identity(PARAMS, dataset)

    changing = {name for name in PARAMS.flat(*SECTIONS) if identity(with_another(name), dataset) != before}

    assert changing == set(PARAMS.flat("data", "model", "train")) - NO_MATTER
    assert identity(PARAMS, dataset) == before


def test_identity_changes_with_a_single_pixel_or_label(dataset):
    pixel, label = dataset.x_train.copy(), dataset.y_train.copy()
    pixel[0, 14, 14] ^= 1
    label[0] ^= 1
    variants = (dataset, replace(dataset, x_train=pixel), replace(dataset, y_train=label))

    assert len({identity(PARAMS, variant) for variant in variants}) == 3


def test_identity_changes_with_the_code_and_with_the_environment(dataset, monkeypatch):
    names = [identity(PARAMS, dataset)]
    with monkeypatch.context() as patch:
        patch.setattr("stages.train.digest_of_code", lambda paths: "another")
        names.append(identity(PARAMS, dataset))
    with monkeypatch.context() as patch:
        patch.setattr("stages.train.environment", lambda **how: environment(**how) | {"torch": "0.1"})
        names.append(identity(PARAMS, dataset))

    assert len(set(names)) == 3


@pytest.mark.parametrize(
    ("changes", "depends"),
    [({}, False), ({"threads": 2}, True), ({"compile": "default"}, True), ({"precision": "bf16-mixed"}, True)],
)
def test_identity_depends_on_the_processor_where_its_bytes_do(dataset, monkeypatch, changes, depends):
    params = PARAMS.model_copy(update={"train": PARAMS.train.model_copy(update=changes)})
    monkeypatch.setattr("stages.train.is_portable", lambda: True)
    names = set()
    for maker in ("AuthenticAMD", "GenuineIntel"):
        monkeypatch.setattr(module, "re", SimpleNamespace(findall=lambda *_, found=maker: [found]))
        names.add(identity(params, dataset))

    assert len(names) == (2 if depends else 1)


def test_the_code_of_a_training_is_that_which_fits_and_not_that_which_draws(dataset, monkeypatch):
    asked = []
    monkeypatch.setattr("stages.train.digest_of_code", lambda paths: asked.extend(paths) or "")
    identity(PARAMS, dataset)

    assert {"src/mnist_vae/training", "src/mnist_vae/data", "stages/train.py"} <= {path.as_posix() for path in asked}
    assert not any(room in path.parts for path in asked for room in ("pictures", "evaluation", "tracking"))
