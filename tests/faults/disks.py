"""Disks: full, read-only, not ours, failing at the N-th write, and gone with the power."""

import fcntl
import os
import re
import struct
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.faults.kills import BEFORE
from tests.faults.lab import Lab, Said, needs
from tests.faults.oracle import md5, outputs
from tests.pipeline import set_params

FULL = "the disk is full"
READ_ONLY = "the file system is read-only"
SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
WITHOUT_LOG = struct.pack("I", 2)  # EXT4_GOING_FLAGS_NOLOGFLUSH: as a power cut


# the N-th system call


def nth(calls: str, action: str, most: int) -> Callable[[Lab], None]:
    """The N-th system call of training fails or kills it, for N = 1, 2, …, or ``most`` N of them in between.

    SQLite's way: afterwards there is what was there before, or what is there after.
    """
    return partial(_nth, calls=calls, action=action, most=most)


def _nth(lab: Lab, calls: str, action: str, most: int) -> None:
    needs("strace")
    another_training(lab)
    before = outputs(lab.clone, "train")
    traced(lab, calls, "").succeeded()
    after = {path: md5(lab.clone / path) for path in before}
    assert after != before
    traces = (lab.folder / "strace.txt").read_text()
    total = len(re.findall(rf"^(?:{calls.replace(',', '|')})\(", traces, re.MULTILINE))
    assert total > 0, traces
    for number in sorted(lab.random.sample(range(1, total + 1), min(most, total))):
        another_training(lab)
        said = traced(lab, calls, f"{action}:when={number}")
        lab.wait_for_quiet()
        found = {path: md5(lab.clone / path) if (lab.clone / path).exists() else "" for path in before}
        if "KILL" in action:
            if said.status != 0:
                lab.stage("train").succeeded()
            assert {path: md5(lab.clone / path) for path in before} == after, f"{calls} {number}"
        else:
            expected = (after,) if said.status == 0 else (before, dict.fromkeys(before, ""))
            assert found in expected, f"{calls} {number}: {found}\n{said.text}"
    set_params(lab.clone, {"train.seed": 1})
    lab.other_trainings = 1


def another_training(lab: Lab) -> None:
    """A clone that has trained with one seed and is to train with another: its outputs before and after differ."""
    lab.begin("trained")
    set_params(lab.clone, {"train.seed": 2})


def traced(lab: Lab, calls: str, action: str) -> Said:
    """The stage train with strace at its main thread."""
    inject = ["-e", f"inject={calls}:{action}"] if action else []
    strace = ["strace", "-o", str(lab.folder / "strace.txt"), "-e", f"trace={calls}", "-e", "signal=none", *inject]
    return lab.run(*strace, *lab.stage_command("train"))


# small and read-only disks, in a mount namespace that the test's end takes away


def within(lab: Lab, mounts: str, *argv: str, env: dict[str, str] | None = None) -> Said:
    """A command in a mount namespace of its own, after ``mounts``."""
    needs("unshare", "mount")
    return lab.run("unshare", "-m", "sh", "-c", f'set -e; {mounts}; exec "$@"', "sh", *argv, env=env)


def small(folder: str, size: str, stage: str = "train", message: str = FULL) -> Callable[[Lab], None]:
    """A folder of the workspace on a disk of its own that is too small."""
    return partial(_small, folder=folder, size=size, stage=stage, message=message)


def _small(lab: Lab, folder: str, size: str, stage: str, message: str) -> None:
    lab.begin(BEFORE.get(stage, "trained"))
    (lab.clone / folder).mkdir(exist_ok=True)
    mount = f"mount -t tmpfs -o size={size} none {folder}"
    said = within(lab, mount, "dvc", "repro", stage).failed()
    said.says(folder, message)


def small_tmp(lab: Lab) -> None:
    """TMPDIR is full: training needs none; MLflow's part is sent later."""
    lab.begin("downloaded")
    folder = lab.folder / "tmp"
    folder.mkdir()
    mount = f"mount -t tmpfs -o size=4k none '{folder}'; head -c 4096 /dev/zero > '{folder}/full'"
    within(lab, mount, "dvc", "repro", "train", env={"TMPDIR": str(folder)}).succeeded()


def missing_tmp(lab: Lab) -> None:
    lab.begin("downloaded")
    lab.repro("train", env={"TMPDIR": str(lab.folder / "no/such/folder")})


def read_only_workspace(lab: Lab) -> None:
    lab.begin("downloaded")
    here = lab.clone
    mount = f"mount --bind '{here}' '{here}'; mount -o remount,ro,bind '{here}'; cd '{here}'"
    within(lab, mount, *lab.stage_command("train")).failed().says(READ_ONLY)
    within(lab, mount, "dvc", "repro", "train").failed()


def read_only_shm(lab: Lab) -> None:
    lab.begin("downloaded")
    within(lab, "mount -t tmpfs -o ro none /dev/shm", "dvc", "repro", "train").succeeded()


def not_ours(lab: Lab) -> None:
    """Another user owns a folder; this one may only read."""
    needs("setpriv")
    lab.begin("downloaded")
    home = borrowed_home(lab)
    lab.run("chown", "-R", "65534:65534", lab.clone).succeeded()
    (lab.clone / "models").mkdir(exist_ok=True)
    os.chown(lab.clone / "models", 0, 0)
    lab.prefix = as_nobody()
    lab.env |= {"HOME": str(home)}
    lab.fail("train").says("models", "this user may not write there")
    os.chown(lab.clone / "models", 65534, 65534)


def no_home(lab: Lab) -> None:
    """A user who is not root, and whose home cannot be written to."""
    needs("setpriv")
    lab.begin("downloaded")
    borrowed_home(lab)
    lab.run("chown", "-R", "65534:65534", lab.clone).succeeded()
    lab.prefix = as_nobody()
    lab.env |= {"HOME": "/nonexistent"}


def as_nobody() -> tuple[str, ...]:
    """The words before a command that run it as a user who may write nowhere but in what is theirs.

    The interpreter may lie in root's home, so reading is allowed everywhere.
    """
    capability = "+dac_read_search"
    user = ("--reuid=65534", "--regid=65534", "--clear-groups")
    return ("setpriv", *user, f"--inh-caps={capability}", f"--ambient-caps={capability}")


def borrowed_home(lab: Lab) -> Path:
    """A home of the user nobody; the folders above the clone are opened for them."""
    home = lab.folder / "home"
    home.mkdir()
    os.chown(home, 65534, 65534)
    os.chown(lab.folder, 65534, 65534)
    return home


# the power


def power_cut(moment: str) -> Callable[[Lab], None]:
    """The disk loses what was not flushed."""
    return partial(_power_cut, moment=moment)


def _power_cut(lab: Lab, moment: str) -> None:
    needs("mkfs.ext4", "mount", "losetup")
    image, disk = lab.folder / "disk.img", lab.folder / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(512 * 2**20)
    tool("mkfs.ext4", "-q", image)
    if not tool("mount", "-o", "loop", image, disk, check=False):
        pytest.skip("needs loop devices")
    lab.stack.callback(tool, "umount", "--lazy", disk, check=False)
    lab.begin("trained" if moment == "evaluate" else "downloaded", disk / "mnist-vae")
    os.sync()
    running = lab.start("dvc", "repro", *([] if moment in {"end", "evaluate"} else ["train"]))
    match moment:
        case "epoch":
            lab.wait_for_epoch(2)
        case "evaluate":
            lab.process_of("render_samples")
        case _:
            running.wait().succeeded()
    descriptor = os.open(disk, os.O_RDONLY)
    fcntl.ioctl(descriptor, SHUTDOWN, WITHOUT_LOG)
    os.close(descriptor)
    running.end()
    lab.kill_all()
    lab.wait_for_quiet()
    lab.wait_for(lambda: tool("umount", disk, check=False), "the disk to be released")
    # Another fault, beside this one, may have taken the mount along into a namespace of its own.
    attached = ("losetup", "--noheadings", "--associated", str(image))
    lab.wait_for(lambda: not subprocess.check_output(attached), "the disk to be released everywhere", 300)
    tool("mount", "-o", "loop", image, disk)
    # DVC and git do not flush what they write themselves.
    if lab.run("git", "status", "--porcelain").status:
        (lab.clone / ".git/index").unlink()
        lab.run("git", "reset", "--quiet").succeeded()
    if "dvc.lock is damaged" in lab.remedies():
        lab.run("git", "checkout", "--", "dvc.lock").succeeded()


def tool(*argv: str | Path, check: bool = True) -> bool:
    """Whether a command of the system succeeds."""
    return subprocess.run([str(part) for part in argv], check=check).returncode == 0
