"""The same bytes on another processor: what the stages make natively, and under processors that QEMU emulates.

An emulated processor has the maker's name, the instructions and the caches of its model, by which libraries choose
their kernels.
"""

import shutil
import sys

import pytest

from mnist_vae.data.dataset import Dataset, save_dataset
from mnist_vae.portable import is_able
from stages.outputs import md5
from tests.pipeline import TINY, clone_working_tree, run, set_params

QEMU = shutil.which("qemu-x86_64")
PROCESSORS = ["EPYC", "Haswell", "Skylake-Client"]  # one of AMD's, two of Intel's
STAGES = """
from importlib import import_module
from unittest.mock import MagicMock
from mnist_vae.portable import set_up_libraries

set_up_libraries()
for name in ("train", "evaluate", "render_samples", "render_grid"):
    import_module(f"stages.{name}").main(MagicMock())  # which tells nobody
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(QEMU is None, reason="needs qemu-x86_64, from qemu-user"),
    pytest.mark.skipif(not is_able(), reason="needs an x86-64 processor with AVX2"),
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory, digits_dataset):
    """A clone with a few images, the default model, and little else to compute."""
    folder = clone_working_tree(tmp_path_factory.mktemp("processors") / "clone")
    set_params(folder, TINY | {"model.hidden_dims": [256]})
    train, test = ((getattr(digits_dataset, f"{array}_{split}")[:200] for array in "xy") for split in ("train", "test"))
    save_dataset(folder / "data/dataset", Dataset("digits", *train, *test))
    return folder


@pytest.fixture(scope="module")
def native(clone):
    """What the stages make on this processor."""
    return made_by(clone, "native")


def made_by(clone, processor):
    """The hash of every artifact that the stages make in a copy of the clone."""
    folder = clone.with_name(processor)
    shutil.copytree(clone, folder)
    before = hashes(folder)
    emulator = [] if processor == "native" else [QEMU, "-cpu", processor]
    run(folder, *emulator, sys.executable, "-c", STAGES, env={"PYTHONPATH": "src"})
    return {path: found for path, found in hashes(folder).items() if found != before.get(path)}


def hashes(folder):
    files = (path for room in ("models", "metrics", "plots") for path in (folder / room).rglob("*"))
    return {path.relative_to(folder).as_posix(): md5(path.read_bytes()) for path in files if path.is_file()}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_every_artifact_has_the_same_bytes_on_another_processor(clone, native, processor):
    assert len(native) == 14
    assert made_by(clone, processor) == native
