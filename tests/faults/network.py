"""MNIST's mirrors: away, slow, endless, lying."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.faults.lab import OFFLINE, Lab
from tests.pipeline import set_params
from tests.servers import Answer, files, serve


def mirror(*answers: Answer, message: str) -> Callable[[Lab], None]:
    """A mirror that gives other than files: one line says what it gave, and all is as it was."""
    return partial(_mirror, answers=answers, message=message)


def _mirror(lab: Lab, answers: tuple[Answer, ...], message: str) -> None:
    lab.begin("finished")
    set_params(lab.clone, {"data.dataset": "mnist"})
    with serve(*answers) as server:
        lab.fail("download", env=OFFLINE | {"MNIST_MIRROR": server.url}).says("download: ", message)
    set_params(lab.clone, {"data.dataset": "digits"})


def answers_at_last(*before: Answer) -> Callable[[Lab], None]:
    """A mirror that fails at first and then gives the files."""
    return partial(_answers_at_last, before=before)


def _answers_at_last(lab: Lab, before: tuple[Answer, ...]) -> None:
    folder = mnist()
    lab.begin("finished")
    set_params(lab.clone, {"data.dataset": "mnist"})
    with serve(*before, files(folder)) as server:
        lab.repro("download", env=OFFLINE | {"MNIST_MIRROR": server.url}).says("MNIST: 60,000 training")
    set_params(lab.clone, {"data.dataset": "digits"})


def nobody(lab: Lab) -> None:
    """No network, and no MNIST: an error where digits are not wanted."""
    lab.begin("finished")
    set_params(lab.clone, {"data.dataset": "mnist", "data.fallback": None})
    lab.fail("download", env=OFFLINE).says("download: no mirror of MNIST answers")
    set_params(lab.clone, {"data.dataset": "digits", "data.fallback": "digits"})


def nobody_with_cache(lab: Lab) -> None:
    """No network, but MNIST in DVC's cache: a forced run takes it from there."""
    folder = mnist()
    lab.begin("finished")
    set_params(lab.clone, {"data.dataset": "mnist"})
    lab.repro("download", env={"MNIST_MIRROR": str(folder)})
    before = (lab.clone / "data/dataset.json").read_bytes()
    lab.repro("--force", "download", env=OFFLINE).says("going on with MNIST from DVC's cache")
    assert (lab.clone / "data/dataset.json").read_bytes() == before
    set_params(lab.clone, {"data.dataset": "digits"})


def full_tmp(lab: Lab) -> None:
    """A mirror and a full TMPDIR, which the download does not need."""
    folder = mnist()
    lab.begin("finished")
    set_params(lab.clone, {"data.dataset": "mnist"})
    small = lab.folder / "tmp"
    small.mkdir()
    command = (
        f"mount -t tmpfs -o size=4k none '{small}'; head -c 4096 /dev/zero >'{small}/full'; exec dvc repro download"
    )
    env = {"MNIST_MIRROR": str(folder), "TMPDIR": str(small)}
    lab.run("unshare", "-m", "sh", "-c", command, env=env).succeeded().says("MNIST: 60,000 training")
    set_params(lab.clone, {"data.dataset": "digits"})


def mnist() -> Path:
    """The folder with MNIST's files."""
    given = os.environ.get("MNIST_MIRROR")
    if not given or "://" in given:
        pytest.skip("needs MNIST_MIRROR to be a folder with MNIST's four .gz files")
    return Path(__file__).parents[2] / given
