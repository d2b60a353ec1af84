"""The journal: what was appended is there after a kill or a power cut, once, in order, whoever else writes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest

from mnist_vae.errors import UserError
from mnist_vae.tracking import journal as module
from mnist_vae.tracking.journal import Begin, End, Image, Journal, Metrics, Tags, journals, place_of
from mnist_vae.tracking.process import boot_id, is_gone, process_name
from tests.tracking import begin, end, start


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path, "0123456789abcdef")


def records(journal):
    """What a journal holds, as another process reads it."""
    return [record for record, _ in Journal(journal.folder.parent.parent, journal.fingerprint).read()]


def loss(step, value=1.0, place="main"):
    return Metrics(place=place, values={"loss": value}, step=step)


def file_of(descriptor):
    """The path of an open file."""
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


# what is appended


def test_records_are_read_as_they_were_appended_and_in_order(journal):
    told = [begin("train", process="p", epochs="3"), loss(1), Tags(tags={"warning": "ü"}), end("train", process="p")]

    for record in told:
        journal.append(record)

    assert records(journal) == told


def test_append_flushes_the_line_and_the_names_of_new_folders_to_the_disk(journal, tmp_path, monkeypatch):
    flushed = []

    def fsync(descriptor, fsync=os.fsync):
        flushed.append((file_of(descriptor), os.fstat(descriptor).st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    journal.append(loss(1))
    assert {str(tmp_path), str(tmp_path / "journal"), str(journal.folder)} <= {path for path, _ in flushed}
    assert (str(journal.path), journal.path.stat().st_size) in flushed

    flushed.clear()
    journal.append(loss(2))
    assert (str(journal.path), journal.path.stat().st_size) in flushed


def test_a_payload_is_flushed_before_its_record_is(journal, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(file_of(descriptor)))

    journal.append(Image(key="samples", step=1, payload=journal.keep_bytes("samples.png", b"a picture")))

    names = [path.rpartition("/")[2] for path in flushed]
    assert names.index("samples.png") < names.index("records.jsonl")


def test_half_a_last_line_is_ignored_and_the_next_record_gets_a_line_of_its_own(journal):
    journal.append(loss(1))
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + whole[:20])
    assert records(journal) == records(journal)[:1]

    journal.append(loss(2))

    assert [record.step for record in records(journal)] == [1, 2]


def test_a_whole_last_record_without_its_line_feed_is_kept_and_not_told_twice(journal):
    journal.append(loss(1))
    journal.path.write_bytes(journal.path.read_bytes().rstrip(b"\n"))

    Journal(journal.folder.parent.parent, journal.fingerprint).append(loss(1))

    assert [record.step for record in records(journal)] == [1]


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\x00" * 512, b"\xff\xfe", b"{", b"[]", b'{"type": "metrics"}', b'{"type": "unheard of"}', b'"' * 5000],
    ids=["empty", "zeros", "no text", "half", "list", "no values", "other type", "quotes"],
)
def test_a_line_that_is_no_record_is_skipped(journal, garbage):
    journal.append(loss(1))
    with journal.path.open("ab") as file:
        file.write(garbage + b"\n")
    journal.append(loss(2))

    assert [record.step for record in records(journal)] == [1, 2]


def test_read_goes_on_from_an_offset(journal):
    for step in (1, 2, 3):
        journal.append(loss(step))
    offsets = [offset for _, offset in journal.read()]

    assert [record.step for record, _ in journal.read(offsets[0])] == [2, 3]
    assert list(journal.read(offsets[-1])) == []


def test_a_training_without_a_journal_has_no_records(journal):
    assert list(journal.read()) == []
    assert journal.open_stages() == {}


def test_a_disk_that_refuses_is_named_with_a_remedy(journal, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"records\.jsonl cannot be written: the disk is full"):
        journal.append(loss(1))


# each once


def test_an_equal_metric_and_an_equal_image_are_kept_once(journal):
    for _ in range(2):
        journal.append(Metrics(values={"loss": 1.0, "kld": 2.0}, step=1))
        journal.append(Image(key="samples", step=1, payload="0/samples.png"))

    assert [record.type for record in records(journal)] == ["metrics", "image"]


def test_only_what_is_new_of_several_metrics_is_kept(journal):
    journal.append(Metrics(values={"loss": 1.0}, step=1))
    journal.append(Metrics(values={"loss": 1.0, "kld": 2.0}, step=1))

    assert [record.values for record in records(journal)] == [{"loss": 1.0}, {"kld": 2.0}]


@pytest.mark.parametrize("other", [{"step": 2}, {"place": "evaluate-a"}])
def test_another_step_or_place_is_another_metric(journal, other):
    journal.append(loss(1))
    journal.append(loss(**{"step": 1} | other))

    assert len(records(journal)) == 2


def test_a_process_that_goes_on_does_not_tell_again_what_another_one_told(journal, tmp_path):
    journal.append(loss(1))
    again = Journal(tmp_path, journal.fingerprint)

    again.append(loss(1))
    again.append(loss(2))

    assert [record.step for record in records(journal)] == [1, 2]


def test_two_processes_that_append_at_once_lose_nothing_and_keep_equal_records_once(journal, tmp_path):
    program = """
from mnist_vae.tracking.journal import Journal, Metrics, Tags
journal = Journal(workspace, "0123456789abcdef")
(workspace / sys.argv[2]).touch()
while len(list(workspace.glob("ready-*"))) < 2:
    time.sleep(0.001)
for step in range(100):
    journal.append(Metrics(values={"loss": 1.0, sys.argv[2]: 2.0}, step=step))
    journal.append(Tags(tags={sys.argv[2]: "x" * 5000}))
"""
    processes = [start(program, tmp_path, f"ready-{number}") for number in (1, 2)]
    assert [(process.communicate(timeout=120)[1], process.returncode) for process in processes] == [("", 0)] * 2

    told = [(name, r.step) for r in records(journal) if isinstance(r, Metrics) for name in r.values]
    assert sorted(told) == sorted((name, step) for name in ("loss", "ready-1", "ready-2") for step in range(100))
    assert sum(isinstance(record, Tags) for record in records(journal)) == 200
    assert len(journal.path.read_bytes().splitlines()) == len(records(journal))


def test_a_process_that_was_stopped_while_it_held_the_lock_stops_no_other(journal, monkeypatch):
    monkeypatch.setattr(module, "LOCK_TIMEOUT_S", 0.1)
    journal.append(loss(1))
    with filelock.FileLock(journal.folder / "lock"):
        journal.append(loss(2))

    assert [record.step for record in records(journal)] == [1, 2]


# payload


def test_equal_content_is_kept_once_and_found_by_its_name(journal, tmp_path):
    path = tmp_path / "grid.png"
    path.write_bytes(b"a picture")

    assert journal.keep(path) == journal.keep_bytes("grid.png", b"a picture")
    assert journal.keep(path) != journal.keep_bytes("grid.png", b"another")
    assert journal.find_payload(journal.keep(path)).read_bytes() == b"a picture"
    assert len([file for file in journal.folder.rglob("*") if file.is_file()]) == 2


@pytest.mark.parametrize("damage", ["unlink", "truncate", "flip"])
def test_a_missing_or_damaged_payload_is_not_found_until_it_is_kept_again(journal, damage):
    payload = journal.keep_bytes("grid.png", b"a picture")
    path = journal.find_payload(payload)
    {
        "unlink": path.unlink,
        "truncate": lambda: os.truncate(path, 3),
        "flip": lambda: path.write_bytes(b"b picture"),
    }[damage]()
    assert journal.find_payload(payload) is None

    assert journal.find_payload(journal.keep_bytes("grid.png", b"a picture")) is not None


# stages


def test_a_training_has_a_place_and_each_key_of_a_later_stage_its_own():
    assert place_of("train", "") == "main"
    assert (
        len({place_of("train", ""), place_of("evaluate", "a"), place_of("evaluate", "b"), place_of("grid", "a")}) == 4
    )
    assert place_of("evaluate", "a") == place_of("evaluate", "a")


def test_open_stages_are_those_that_began_and_did_not_end(journal):
    for record in (begin("train", process="1"), end("train", process="1"), begin("train", process="2")):
        journal.append(record)
    journal.append(begin("evaluate", "a", process="3"))
    journal.append(end("train", process="never began"))

    assert {process: record.stage for process, record in journal.open_stages().items()} == {
        "2": "train",
        "3": "evaluate",
    }


def test_journals_are_the_trainings_of_a_workspace(tmp_path):
    assert journals(tmp_path) == []
    for fingerprint in ("b", "a"):
        Journal(tmp_path, fingerprint).append(loss(1))

    assert [journal.fingerprint for journal in journals(tmp_path)] == ["a", "b"]


def test_records_are_frozen_and_take_no_unknown_fields():
    with pytest.raises(ValueError, match="frozen"):
        loss(1).step = 2
    with pytest.raises(ValueError, match="Extra inputs"):
        Begin(**begin("train").model_dump() | {"password": "x"})
    with pytest.raises(ValueError, match="status"):
        End(stage="train", process="p", status="FINE")


# processes


@pytest.fixture
def child():
    """A process that waits."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_a_process_that_lives_is_not_gone(child):
    assert not is_gone(process_name())
    assert not is_gone(process_name(child.pid))


def test_a_process_that_ended_is_gone(child):
    name = process_name(child.pid)
    child.kill()
    child.wait()

    assert is_gone(name)


def test_a_process_that_was_killed_is_gone_before_its_parent_asks_for_its_status(child):
    name = process_name(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not is_gone(name) and time.monotonic() < deadline:
        time.sleep(0.01)

    assert is_gone(name)
    assert child.returncode is None


def test_another_process_of_the_same_number_is_another_one():
    host, boot, pid, started = process_name().split(" ")

    assert is_gone(f"{host} {boot} {pid} {int(started) - 1}")
    assert is_gone(f"{host} 00000000-0000-0000-0000-000000000000 {pid} {started}")
    assert boot == boot_id()


def test_of_another_hosts_process_nothing_is_known():
    _, *rest = process_name().split(" ")

    assert not is_gone(" ".join(["another-host", *rest]))
    assert not is_gone("another-host")


@pytest.mark.parametrize("rest", ["", "boot", "boot x 1", "boot 1 2 3"])
def test_a_name_that_no_process_of_this_host_has_is_gone(rest):
    assert is_gone(f"{process_name().split(' ')[0]} {rest}".strip())


def test_the_start_of_a_process_does_not_move_with_the_clock(monkeypatch):
    before = process_name()
    monkeypatch.setattr(time, "time", lambda: 0.0)

    assert process_name() == before
    assert process_name().split(" ")[3].isdecimal()
