"""Files appear whole or not at all, also after a power cut; a disk's refusal is one line with a remedy."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_vae.errors import UserError
from mnist_vae.files import (
    atomic_write,
    flush_to_disk,
    is_alive,
    read_or_refuse,
    writable,
    write_bytes,
    write_csv,
    write_json,
    write_text,
)

SRC = Path(__file__).parent.parent / "src"

# A process that holds a scratch folder open: it says so and waits to be killed.
WRITER = """
import sys, time
from pathlib import Path
from mnist_vae.files import atomic_write
with atomic_write(Path(sys.argv[1])) as scratch:
    scratch.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of writing ``tmp_path / "other.txt"``."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "other.txt")]
    with subprocess.Popen(command, env={"PYTHONPATH": str(SRC)}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        yield process
        process.kill()


def scratch_folders(folder):
    return list(folder.glob(".writing-*"))


# whole or not at all


def test_atomic_write_puts_what_was_written_in_the_files_place(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"

    for content in ("first", "second"):
        with atomic_write(path) as scratch:
            scratch.write_text(content)
        assert path.read_text() == content

    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_atomic_write_gives_a_scratch_file_of_the_same_name_on_the_same_disk(tmp_path):
    with atomic_write(tmp_path / "vae.safetensors") as scratch:
        assert scratch.name == "vae.safetensors"
        assert tmp_path in scratch.parents
        scratch.touch()


def test_atomic_write_keeps_the_old_file_while_the_new_one_is_written(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    with atomic_write(path) as scratch:
        scratch.write_text("half")
        assert path.read_text() == "old"


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_atomic_write_leaves_the_old_file_and_nothing_else_after_a_failure(tmp_path, problem):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with atomic_write(path) as scratch:
            scratch.write_text("half")
            raise problem

    with pytest.raises(problem):
        fail()

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# after a power cut


def test_atomic_write_flushes_the_file_then_renames_it_then_flushes_the_folder(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    events = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        status = os.fstat(descriptor)
        what = ("folder", None) if stat.S_ISDIR(status.st_mode) else ("file", status.st_size)
        events.append(("flush", *what, status.st_ino))
        fsync(descriptor)

    def recorded_replace(source, target):
        events.append(("rename", Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)

    write_text(path, "content")

    assert events == [
        ("flush", "file", len("content"), path.stat().st_ino),
        ("rename", path),
        ("flush", "folder", None, tmp_path.stat().st_ino),
    ]


@pytest.mark.parametrize("what", ["file", "folder"])
def test_flush_to_disk_does_without_the_flush_of_a_folder_but_not_of_a_file(tmp_path, monkeypatch, what):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", refuse)

    if what == "folder":
        flush_to_disk(tmp_path)
    else:
        with pytest.raises(OSError, match="Invalid argument"):
            flush_to_disk(tmp_path / "file")


# disks that refuse


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "the disk quota is used up; free some space"),
        (errno.EROFS, "the file system is read-only; mount it for writing, or work in another folder"),
        (errno.EACCES, "this user may not write there; change its permissions"),
        (errno.EPERM, "this user may not write there; change its permissions"),
    ],
    ids=["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM"],
)
@pytest.mark.parametrize("operation", ["mkdir", "write", "fsync", "replace"])
def test_atomic_write_names_the_file_and_the_remedy_where_the_disk_refuses(
    tmp_path, monkeypatch, operation, number, remedy
):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    if operation == "write":
        monkeypatch.setattr(Path, "write_bytes", refuse)
    else:
        monkeypatch.setattr(os, operation, refuse)

    with pytest.raises(UserError) as error:
        write_bytes(path, b"new")

    assert str(error.value) == f"{path} cannot be written: {remedy}, then run it again"
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_writable_names_the_remedy_of_a_disk_that_is_full():
    def write():
        with writable(Path("models")), Path("/dev/full").open("w") as file:
            file.write("content")

    with pytest.raises(UserError, match="models cannot be written: the disk is full; free some space"):
        write()


def test_writable_lets_other_errors_pass():
    with pytest.raises(OSError, match="Too many levels"), writable(Path("file.txt")):
        raise OSError(errno.ELOOP, "Too many levels of symbolic links")


# scratch folders


def test_atomic_write_keeps_the_scratch_folder_of_a_living_process(tmp_path, writer):
    write_text(tmp_path / "file.txt", "content")

    assert len(scratch_folders(tmp_path)) == 1


def test_atomic_write_sweeps_the_scratch_folder_of_a_killed_process(tmp_path, writer):
    writer.kill()
    writer.wait()
    assert len(scratch_folders(tmp_path)) == 1

    write_text(tmp_path / "file.txt", "content")

    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("name", [".writing-", ".writing-x", ".writing-99999999999999999999-x"])
def test_atomic_write_sweeps_a_scratch_folder_that_names_no_process(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "file.txt").touch()

    write_text(tmp_path / "file.txt", "content")

    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_atomic_write_keeps_its_own_scratch_folder_while_it_writes_a_second_file(tmp_path):
    with atomic_write(tmp_path / "first.txt") as scratch:
        scratch.write_text("first")
        write_text(tmp_path / "second.txt", "second")

    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["first.txt", "second.txt"]


def test_is_alive_tells_a_running_process_from_a_finished_one():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()

    assert is_alive(os.getpid())
    assert not is_alive(process.pid)
    assert not is_alive(10**30)


def test_is_alive_counts_the_process_of_another_user(monkeypatch):
    def refuse(pid, number):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)

    assert is_alive(1)


# what is written


def test_write_text_writes_utf_8_whatever_the_locale_and_no_other_line_ends(tmp_path):
    write_text(tmp_path / "file.txt", "Ziffern, größer\n")

    assert (tmp_path / "file.txt").read_bytes() == "Ziffern, größer\n".encode()


def test_write_json_is_readable_by_people_and_programs(tmp_path):
    path = tmp_path / "metrics" / "train.json"
    write_json(path, {"loss": 154.06, "dataset": "Ziffern, größer"})

    assert path.read_text(encoding="utf-8") == '{\n  "loss": 154.06,\n  "dataset": "Ziffern, größer"\n}\n'
    assert json.loads(path.read_text(encoding="utf-8"))["loss"] == 154.06


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_write_json_refuses_what_is_no_json_number(tmp_path, value):
    path = tmp_path / "train.json"
    write_json(path, {"loss": 1.0})

    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": value})

    assert json.loads(path.read_text()) == {"loss": 1.0}
    assert list(tmp_path.iterdir()) == [path]


def test_write_csv_writes_a_line_of_names_and_a_line_for_each_row(tmp_path):
    write_csv(tmp_path / "losses.csv", [{"epoch": 1, "loss": 0.1}, {"epoch": 2, "loss": 154.0625}])

    assert (tmp_path / "losses.csv").read_bytes() == b"epoch,loss\n1,0.1\n2,154.0625\n"


# what is read


def refusal(path, read):
    with pytest.raises(UserError) as error:
        read_or_refuse(path, read, "`dvc repro` makes it again", (KeyError, ValueError))
    return str(error.value)


def raising(error):
    def read(path):
        raise error

    return read


def test_read_or_refuse_gives_what_was_read(tmp_path):
    (tmp_path / "file.txt").write_text("content")

    assert read_or_refuse(tmp_path / "file.txt", Path.read_text, "", ()) == "content"


def test_read_or_refuse_names_a_missing_file(tmp_path):
    path = tmp_path / "file.txt"

    assert refusal(path, Path.read_text) == f"{path} is missing; `dvc repro` makes it again"


def test_read_or_refuse_names_a_file_that_cannot_be_read(tmp_path):
    assert refusal(tmp_path, Path.read_text) == (
        f"{tmp_path} cannot be read (Is a directory); `dvc repro` makes it again"
    )


def test_read_or_refuse_names_a_damaged_file_in_one_line(tmp_path):
    assert refusal(tmp_path, raising(ValueError("first line\n  second line"))) == (
        f"{tmp_path} is damaged or not what this project writes (first line second line); `dvc repro` makes it again"
    )
    assert "(ValueError)" in refusal(tmp_path, raising(ValueError()))
    assert len(refusal(tmp_path, raising(ValueError("x" * 10_000)))) < 600


def test_read_or_refuse_lets_a_mistake_in_the_code_pass(tmp_path):
    with pytest.raises(ZeroDivisionError):
        read_or_refuse(tmp_path, raising(ZeroDivisionError()), "", (KeyError, ValueError))
