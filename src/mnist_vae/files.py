"""Files that are written whole or not at all, and that a power cut leaves whole.

A write goes to a scratch folder beside its target, is flushed to the disk, and takes the target's place by a rename,
which is flushed too. After a power cut there is the old file or the new one, never a part of one.
"""

import csv
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mnist_vae.errors import DamagedFileError, UserError

SCRATCH = ".writing-"  # then the process id: what a killed process left behind can be told from what is in use

REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EIO: "the disk fails; save what is on it",
    errno.EROFS: "the file system is read-only; mount it for writing, or work in another folder",
    errno.ENOTDIR: "a file is where a folder should be; move it away",
    errno.EEXIST: "a file is where a folder should be; move it away",
    errno.EISDIR: "a folder is where the file should be; move it away",
    errno.EACCES: "this user may not write there; change its permissions",
    errno.EPERM: "this user may not write there; change its permissions",
}

Read = TypeVar("Read")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a scratch path of the same name; what was written there takes ``path``'s place at a clean exit.

    Raises:
        UserError: the disk is full or read-only, or the folder is not ours to write to.
    """
    with writable(path):
        make_folder(path.parent)
        sweep_scratch(path.parent)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{SCRATCH}{os.getpid()}-") as folder:
            scratch = Path(folder, path.name)
            yield scratch
            flush_to_disk(scratch)
            scratch.replace(path)
        flush_to_disk(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it is in, so that a power cut does not take it away again."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush_to_disk(folder.parent)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn what a disk or its permissions refuse while ``path`` is written into one line with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        raise UserError(f"{path} cannot be written: {REMEDIES[error.errno]}, then run it again") from error


def flush_to_disk(path: Path) -> None:
    """Have the disk hold what was written to a file, or which names a folder has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems flush no folders
            raise
    finally:
        os.close(descriptor)


def sweep_scratch(folder: Path) -> None:
    """Remove the scratch folders of processes that are gone."""
    for scratch in folder.glob(f"{SCRATCH}*"):
        owner = scratch.name.removeprefix(SCRATCH).partition("-")[0]
        if not (owner.isdecimal() and is_alive(int(owner))):
            shutil.rmtree(scratch, ignore_errors=True)


def is_alive(pid: int) -> bool:
    """Whether a process of this number exists on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write bytes."""
    with atomic_write(path) as scratch:
        scratch.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of equal keys under a line with those keys."""
    with atomic_write(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_or_refuse(path: Path, read: Callable[[Path], Read], remedy: str, damages: tuple[type[Exception], ...]) -> Read:
    """``read(path)``, with what a missing or damaged file raises as one line that ends in ``remedy``.

    Raises:
        UserError: the file is missing or unreadable.
        DamagedFileError: ``read`` raised one of ``damages``.
    """
    try:
        return read(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {remedy}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {remedy}") from error
    except damages as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DamagedFileError(f"{path} is damaged or not what this project writes ({reason}); {remedy}") from error
