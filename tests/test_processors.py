"""The same bytes on another processor: what the stages make natively, and under processors that QEMU emulates.

An emulated processor has the maker's name, the instructions and the caches of its model, by which libraries choose
their kernels.
"""

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from mnist_vae.data.dataset import Dataset, save_dataset
from mnist_vae.portable import is_able
from stages.outputs import md5
from tests.pipeline import TINY, clone_working_tree, run, set_params

QEMU = shutil.which("qemu-x86_64")
STAGES = ["train", "evaluate", "render_samples", "render_grid"]
EMULATED = {"Haswell": STAGES, "Skylake-Client": STAGES[:1], "EPYC": STAGES[:1]}  # two of Intel's, one of AMD's
PROGRAM = """
import sys
from importlib import import_module
from unittest.mock import MagicMock
from mnist_vae.portable import set_up_libraries

set_up_libraries()
for name in sys.argv[1:]:
    import_module(f"stages.{name}").main(MagicMock())  # which tells nobody
"""

pytestmark = [
    pytest.mark.processors,
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
def made(clone):
    """What the stages make on each processor, side by side: path and hash of every file that is new."""
    work = {"native": STAGES, **EMULATED}
    with ThreadPoolExecutor(len(work)) as pool:
        return dict(zip(work, pool.map(partial(made_by, clone), work, work.values()), strict=True))


def made_by(clone, processor, stages):
    folder = clone.with_name(processor)
    shutil.copytree(clone, folder)
    before = hashes(folder)
    emulator = [] if processor == "native" else [QEMU, "-cpu", processor]
    run(folder, *emulator, sys.executable, "-c", PROGRAM, *stages, env={"PYTHONPATH": "src"})
    return {path: found for path, found in hashes(folder).items() if found != before.get(path)}


def hashes(folder):
    files = (path for room in ("models", "metrics", "plots") for path in (folder / room).rglob("*"))
    return {path.relative_to(folder).as_posix(): md5(path.read_bytes()) for path in files if path.is_file()}


@pytest.mark.parametrize("processor", EMULATED)
def test_every_file_has_the_same_bytes_on_another_processor(made, processor):
    native = made["native"]

    assert {"models/vae.safetensors", "metrics/train.json", "plots/losses.csv"} <= made[processor].keys()
    assert made[processor] == {path: native.get(path) for path in made[processor]}
    if EMULATED[processor] == STAGES:
        assert made[processor].keys() == native.keys()
