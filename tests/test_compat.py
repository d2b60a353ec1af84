"""The cure for a torchvision that was built for another torch: it works, more than once, and does nothing unasked."""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mnist_vae import compat

SRC = Path(__file__).parent.parent / "src"
EXTENSION = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def run(program):
    """Run a program in a process of its own, since what torch and torchvision declare is global."""
    done = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": str(SRC)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def torchvision(tmp_path, monkeypatch):
    """A folder that passes for the installed torchvision's."""
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    return tmp_path


def test_import_of_compat_does_nothing():
    program = """
import sys
before = set(sys.modules)
import mnist_vae.compat
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} & {"torch", "torchvision", "lightning"}))
import torch
print(hasattr(torch.ops.torchvision, "nms"))
"""
    assert run(program) == ["False"]


def test_cure_torchvision_makes_torchvision_importable_however_often_it_is_called():
    program = """
from mnist_vae.compat import cure_torchvision
first = cure_torchvision()
print(cure_torchvision() is first)
import torchvision.datasets, lightning
print(cure_torchvision() is first)
"""
    assert run(program) == ["True", "True"]


def test_cure_torchvision_declares_what_torchvision_needs_where_its_operators_do_not_load():
    program = """
from mnist_vae import compat
import torch
if compat.compiled_operators_load():
    print("nms", "qnms")  # the builds match: they are torchvision's own
else:
    compat.cure_torchvision()
    print(*(name for name in ("nms", "qnms") if hasattr(torch.ops.torchvision, name)))
"""
    assert run(program) == ["nms", "qnms"]


def test_cure_torchvision_declares_nothing_where_the_operators_load(monkeypatch):
    monkeypatch.setattr(compat, "compiled_operators_load", lambda: True)
    monkeypatch.delattr(torch.library, "Library")

    assert compat.cure_torchvision.__wrapped__() is None


def test_compiled_operators_load_without_torchvision(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    assert compat.compiled_operators_load()


def test_compiled_operators_load_from_a_library_that_loads(torchvision, monkeypatch):
    loaded = []
    (torchvision / EXTENSION).touch()
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)

    assert compat.compiled_operators_load()
    assert loaded == [str(torchvision / EXTENSION)]


def test_compiled_operators_do_not_load_from_a_library_of_another_build(torchvision):
    (torchvision / EXTENSION).write_bytes(b"\x7fELF of another machine")

    assert not compat.compiled_operators_load()


def test_compiled_operators_do_not_load_where_there_is_no_library(torchvision):
    assert not compat.compiled_operators_load()
