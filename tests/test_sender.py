"""What a stage tells reaches MLflow, all of it, once, whatever happens to the stage, its sender and the store."""

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress

import filelock
import numpy as np
import psutil
import pytest

from mnist_vae.tracking import sender
from mnist_vae.tracking.delivery import Delivery
from mnist_vae.tracking.journal import Journal, Metrics, Models, Tags
from mnist_vae.tracking.process import process_name
from mnist_vae.tracking.sender import Sender, send_left_behind, sync
from mnist_vae.tracking.session import Session
from mnist_vae.tracking.store import DATABASE, EXPERIMENT, Store
from tests.tracking import (
    EPOCHS,
    FINGERPRINT,
    PROCESSES,
    artifacts,
    assert_complete,
    begin,
    clean_environment,
    copy_store,
    end,
    run,
    runs,
    start,
    tell,
    tell_grid,
    tell_training,
    whole_content,
)
from tools.deployment import free_port

PATIENCE_S = 120  # for what takes seconds on an idle machine


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in os.environ:
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)
    for name, value in clean_environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder with an empty store, to be copied."""
    workspace = tmp_path_factory.mktemp("template")
    run("from mnist_vae.tracking.store import Store; Store(workspace)", workspace)
    return workspace


@pytest.fixture
def workspace(template, tmp_path):
    return copy_store(template, tmp_path / "workspace")


@pytest.fixture
def journal(workspace):
    """A training and a grid of it, not sent yet."""
    return tell(workspace)


def deliver(workspace, journal):
    Delivery(Store(workspace), journal).send()


def until(happens):
    """Wait until something is so; fail if it does not come."""
    deadline = time.monotonic() + PATIENCE_S
    while not happens():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def client_of(workspace):
    return Store(workspace).client


# a journal is sent


def test_all_that_was_told_is_sent_to_one_run(workspace, journal):
    deliver(workspace, journal)

    run_id = assert_complete(workspace)
    found = client_of(workspace).get_run(run_id)
    assert found.data.params == {"train.epochs": "3", "render_grid.size": "a"}
    assert found.data.tags["mlflow.source.name"] == "stages/train.py"
    assert [given.dataset.name for given in found.inputs.dataset_inputs] == ["digits"]
    assert Delivery(Store(workspace), journal).pending() == 0


def test_the_metrics_of_several_epochs_are_sent_in_one_batch(workspace, journal, monkeypatch):
    store, sizes = Store(workspace), []
    log_metrics = store.log_metrics

    def counted(run_id, metrics):
        sizes.append(len(metrics))
        log_metrics(run_id, metrics)

    monkeypatch.setattr(store, "log_metrics", counted)

    Delivery(store, journal).send()

    assert sizes == [2 * len(EPOCHS)]
    assert_complete(workspace)


def test_sending_twice_changes_nothing(workspace, journal):
    deliver(workspace, journal)
    before = whole_content(workspace)

    deliver(workspace, journal)
    assert whole_content(workspace) == before
    for sent in journal.folder.glob("sent-*.json"):
        sent.unlink()
    deliver(workspace, journal)

    assert whole_content(workspace) == before


@pytest.mark.parametrize(
    "notes",
    [
        "\0garbage",
        "[1, 2]",
        "",
        '{"store": "STORE", "offset": 99999999, "runs": {}}',
        '{"store": "STORE", "offset": 100, "runs": {}}',
        '{"store": "STORE", "offset": -1, "runs": {}}',
        '{"store": "STORE", "offset": 0, "runs": []}',
        '{"store": "STORE", "offset": 0, "runs": {"main": "no id"}}',
        '{"store": "another", "offset": 0, "runs": {}}',
    ],
)
def test_what_was_sent_is_found_out_again_where_its_notes_are_damaged(workspace, journal, notes):
    store = Store(workspace)
    delivery = Delivery(store, journal)
    delivery.path.write_text(notes.replace("STORE", store.identity))

    delivery.send()

    assert_complete(workspace)
    assert delivery.pending() == 0


def test_a_clone_without_a_journal_finds_the_run_of_its_training_and_sends_nothing_twice(workspace, journal):
    deliver(workspace, journal)
    before = whole_content(workspace)
    shutil.rmtree(workspace / "journal")

    deliver(workspace, tell(workspace))

    assert whole_content(workspace) == before


def test_a_clone_that_pulled_its_model_gets_one_run(workspace):
    journal = Journal(workspace, FINGERPRINT)
    tell_grid(journal)
    deliver(workspace, journal)
    assert_complete(workspace, stages=("render_grid",))
    (one,) = runs(workspace)
    assert one["name"] == f"training {FINGERPRINT}"

    tell_training(journal)
    deliver(workspace, journal)

    (one,) = runs(workspace)
    assert one["metrics"][0] == ("train/kld", 1, 0.1)


@pytest.mark.parametrize("first", ["this one", "the other"])
def test_two_clones_that_send_one_training_at_once_leave_one_run(workspace, tmp_path, monkeypatch, first):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace / DATABASE}")
    clones = [tmp_path / "a", tmp_path / "b"]
    told = [tell(clone) for clone in clones]
    here, there = told if first == "this one" else reversed(told)
    store = Store(here.folder.parent.parent)
    create_run = store.client.create_run

    def late(*arguments, **named):
        if named["tags"]["place"] == "main":  # this one has looked, and found no run
            Delivery(Store(there.folder.parent.parent), there).send()
        return create_run(*arguments, **named)

    monkeypatch.setattr(store.client, "create_run", late)
    Delivery(store, here).send()
    assert len(runs(workspace)) == (2 if first == "this one" else 1)
    for journal in (there, here):
        journal.append(Metrics(values={"train/loss": 7.0}, step=7))
        deliver(journal.folder.parent.parent, journal)

    (one,) = runs(workspace)
    assert (one["status"], one["params"]) == ("FINISHED", {"train.epochs": "3", "render_grid.size": "a"})
    assert [point[1] for point in one["metrics"] if point[0] == "train/loss"] == [*EPOCHS, 7]


def test_the_main_run_takes_the_first_key_of_a_stage_and_a_child_run_each_other(workspace, journal):
    tell_grid(journal, "b")
    deliver(workspace, journal)
    main, child = runs(workspace)
    assert assert_complete_main(workspace) == main["id"]
    assert (child["name"], child["status"]) == ("render_grid b", "FINISHED")
    assert child["params"] == {"render_grid.size": "b"}
    assert (child["tags"]["mlflow.parentRunId"], child["tags"]["told_by"]) == (main["id"], "render_grid")
    assert artifacts(workspace, child["id"])["plots/grid.png"] != artifacts(workspace, main["id"])["plots/grid.png"]

    before = whole_content(workspace)
    tell_grid(journal, "a")
    tell_grid(journal, "b")
    deliver(workspace, journal)

    assert whole_content(workspace) == before


def assert_complete_main(workspace):
    """The main run shows the first grid and no other; its id."""
    main = next(one for one in runs(workspace) if one["tags"]["place"] == "main")
    assert main["tags"]["mlflow.note.content"].endswith("A grid of a")
    assert main["params"] == {"train.epochs": "3", "render_grid.size": "a"}
    assert main["status"] == "FINISHED"
    return main["id"]


def test_another_clones_first_key_overwrites_nothing(workspace, journal):
    deliver(workspace, journal)
    shutil.rmtree(workspace / "journal")
    other = Journal(workspace, FINGERPRINT)
    tell_grid(other, "b")

    deliver(workspace, other)

    main, child = runs(workspace)
    assert assert_complete_main(workspace) == main["id"]
    assert child["params"] == {"render_grid.size": "b"}


def test_a_missing_or_damaged_payload_is_told_and_stops_nothing(workspace, journal, capsys):
    payload = journal.folder / "payload"
    for path in [*payload.rglob("losses.csv"), *payload.rglob("grid.png")]:
        path.unlink()
    for path in payload.rglob("samples.png"):
        path.write_bytes(b"damaged")

    deliver(workspace, journal)

    (one,) = runs(workspace)
    assert one["status"] == "FINISHED"
    assert len(one["metrics"]) == 2 * len(EPOCHS)
    assert artifacts(workspace, one["id"]).keys() == {"description.png"}
    assert "grid.png, which is missing or damaged" in capsys.readouterr().err


# ends


def test_a_stage_that_failed_leaves_a_failed_run_with_the_reason(workspace):
    journal = Journal(workspace, FINGERPRINT)
    journal.append(begin("train"))
    journal.append(end("train", status="FAILED", reason="epoch 3, step 17: the loss is nan"))

    deliver(workspace, journal)

    (one,) = runs(workspace)
    assert (one["status"], one["tags"]["reason"]) == ("FAILED", "train: epoch 3, step 17: the loss is nan")


def test_a_run_is_finished_again_when_the_stage_succeeds_later(workspace):
    journal = Journal(workspace, FINGERPRINT)
    tell_training(journal)
    journal.append(begin("evaluate", "a"))
    journal.append(end("evaluate", "a", status="FAILED", reason="the disk is full"))
    deliver(workspace, journal)
    (one,) = runs(workspace)
    assert (one["status"], one["tags"]["reason"]) == ("FAILED", "evaluate: the disk is full")

    tell_grid(journal)
    deliver(workspace, journal)
    assert runs(workspace)[0]["status"] == "FAILED"  # another stage's success does not hide it

    journal.append(begin("evaluate", "a", process="again"))
    journal.append(end("evaluate", "a", process="again"))
    deliver(workspace, journal)

    assert_complete(workspace)


def test_a_stage_that_failed_with_one_key_and_succeeded_with_another_is_no_failure(workspace, journal):
    journal.append(begin("evaluate", "a"))
    journal.append(end("evaluate", "a", status="FAILED", reason="a bug"))
    deliver(workspace, journal)
    assert runs(workspace)[0]["status"] == "FAILED"

    journal.append(begin("evaluate", "b", process="again"))
    journal.append(end("evaluate", "b", process="again"))
    deliver(workspace, journal)

    main, child = runs(workspace)
    assert (main["status"], child["status"]) == ("FINISHED", "FINISHED")
    assert "reason" not in main["tags"]


def test_a_child_run_that_failed_leaves_its_parent_alone(workspace, journal):
    journal.append(begin("render_grid", "b", process="again"))
    journal.append(end("render_grid", "b", process="again", status="FAILED", reason="a bug"))
    deliver(workspace, journal)

    main, child = runs(workspace)
    assert (main["status"], child["status"], child["tags"]["reason"]) == ("FINISHED", "FAILED", "render_grid: a bug")

    tell_grid(journal, "a", process="a third time")
    deliver(workspace, journal)

    main, child = runs(workspace)
    assert (main["status"], child["status"]) == ("FINISHED", "FAILED")


def test_what_is_said_late_of_a_killed_process_does_not_touch_the_one_that_took_its_place(workspace):
    journal = Journal(workspace, FINGERPRINT)
    journal.append(begin("train", process="the first"))
    journal.append(begin("train", process="the second"))
    journal.append(end("train", process="the first", status="KILLED"))
    deliver(workspace, journal)
    assert runs(workspace)[0]["status"] == "RUNNING"

    journal.append(end("train", process="the second"))
    journal.append(end("train", process="the first", status="KILLED"))
    deliver(workspace, journal)

    assert runs(workspace)[0]["status"] == "FINISHED"


def gone(number):
    """The name of a process that this host had."""
    host, boot, *_ = process_name().split(" ")
    return f"{host} {boot} {2**22 + number} 1"


@pytest.mark.parametrize("how", ["send_left_behind", "sync"])
def test_a_stage_that_was_killed_together_with_its_sender_is_marked_by_the_next(workspace, how):
    journal = Journal(workspace, FINGERPRINT)
    journal.append(begin("train", process=gone(1)))
    deliver(workspace, journal)
    assert runs(workspace)[0]["status"] == "RUNNING"

    if how == "sync":
        assert sync(workspace) == 0
    else:
        assert not any(send_left_behind(Store(workspace)))

    (one,) = runs(workspace)
    assert (one["status"], one["tags"]["reason"]) == ("KILLED", "train: its process ended without a word")


def test_a_run_whose_journal_is_gone_is_marked_when_its_process_is_gone(workspace):
    for fingerprint, process in [("a" * 16, gone(1)), ("b" * 16, process_name()), ("c" * 16, PROCESSES["train"])]:
        journal = Journal(workspace, fingerprint)
        journal.append(begin("train", process=process))
        deliver(workspace, journal)
    shutil.rmtree(workspace / "journal")

    assert list(send_left_behind(Store(workspace))) == []

    status = {one["tags"]["fingerprint"][0]: one["status"] for one in runs(workspace)}
    assert status == {"a": "KILLED", "b": "RUNNING", "c": "RUNNING"}


def test_a_stage_that_ends_in_order_while_it_is_looked_at_is_not_called_killed(workspace, monkeypatch):
    journal = Journal(workspace, FINGERPRINT)
    journal.append(begin("train", process="a process"))

    def ends_now(process):
        journal.append(end("train", process=process))
        return True

    monkeypatch.setattr("mnist_vae.tracking.sender.is_gone", ends_now)
    list(send_left_behind(Store(workspace)))

    assert runs(workspace)[0]["status"] == "FINISHED"


def test_one_journal_that_is_refused_does_not_hold_up_the_others(workspace, monkeypatch):
    for fingerprint in ("a" * 16, "b" * 16, "c" * 16):
        Journal(workspace, fingerprint).append(begin("train"))
        Journal(workspace, fingerprint).append(end("train"))

    def refuse(self, run_id, params, log_params=Store.log_params):
        if self.client.get_run(run_id).data.tags["fingerprint"][0] == "b":
            raise ValueError("no")
        log_params(self, run_id, params)

    monkeypatch.setattr(Store, "log_params", refuse)

    assert list(send_left_behind(Store(workspace))) == ["", f"{'b' * 16}: no", ""]
    assert sorted(one["status"] for one in runs(workspace)) == ["FINISHED", "FINISHED", "RUNNING"]


@pytest.mark.parametrize("reason", ["Invalid value", "is damaged or not what this project writes"])
def test_a_record_that_is_refused_for_good_does_not_hold_up_what_follows(workspace, capsys, reason):
    journal = Journal(workspace, FINGERPRINT)
    journal.append(begin("train"))
    if reason == "Invalid value":
        journal.append(Tags(tags={"no name?": "x"}))
    else:
        payload = journal.keep_bytes("vae.safetensors", b"of another time")
        journal.append(Models(payload=payload, measured_on={}, nll=1.0))
    journal.append(Tags(tags={"told": "afterwards"}))
    journal.append(end("train"))

    assert list(send_left_behind(Store(workspace))) == [""]

    (one,) = runs(workspace)
    assert (one["status"], one["tags"]["told"]) == ("FINISHED", "afterwards")
    said = capsys.readouterr().err
    assert said.startswith("left out: a record (")
    assert reason in said
    assert list(send_left_behind(Store(workspace))) == []


def test_a_record_that_is_refused_for_lack_of_its_run_is_not_left_out(workspace, journal, monkeypatch):
    def delete_first(self, run_id, tags, set_tags=Store.set_tags):
        monkeypatch.setattr(Store, "set_tags", set_tags)
        self.client.delete_run(run_id)
        set_tags(self, run_id, tags)

    monkeypatch.setattr(Store, "set_tags", delete_first)
    assert "deleted" in next(send_left_behind(Store(workspace)))

    assert list(send_left_behind(Store(workspace))) == [""]
    assert_complete(workspace)


# killed at any call


KILLED_AT_EACH_CALL = """
import gc
import shutil
import sqlalchemy
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mnist_vae.tracking import delivery, registry
from mnist_vae.tracking.journal import Journal
from mnist_vae.tracking.store import Store
from tests.tracking import whole_content

def small_model(store, run_id, path, part, model):  # the real one takes a second
    folder = workspace / "scratch" / part
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "MLmodel").write_text("x")
    store.client.log_model_artifacts(model.model_id, str(folder))

registry._log_model = small_model
os.fsync = lambda _: None  # a kill is no power cut
left = 0

def count(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def counted(owner, name, original):
    def call(*arguments, **named):
        count()
        return original(*arguments, **named)
    setattr(owner, name, call)

@sqlalchemy.event.listens_for(sqlalchemy.Engine, "connect")
def in_a_hurry(connection, _):
    connection.execute("pragma synchronous = off")

@sqlalchemy.event.listens_for(sqlalchemy.Engine, "before_cursor_execute")
def statement(connection, cursor, statement, *_):
    if statement.split()[0] in ("INSERT", "UPDATE", "DELETE"):
        count()

counted(LocalArtifactRepository, "log_artifact", LocalArtifactRepository.log_artifact)
counted(LocalArtifactRepository, "log_artifacts", LocalArtifactRepository.log_artifacts)
counted(delivery, "write_json", delivery.write_json)

def fresh():
    for folder in ("mlruns", "scratch"):
        shutil.rmtree(workspace / folder, ignore_errors=True)
    for path in [*workspace.glob("journal/*/sent-*"), *workspace.glob("mlflow.db-*")]:
        path.unlink()
    shutil.copy(workspace / "fresh.db", workspace / "mlflow.db")

def send(moment):
    global left
    child = os.fork()
    if child == 0:
        left = moment
        delivery.Delivery(store, Journal(workspace, sys.argv[2])).send()
        os._exit(0)
    return -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

shutil.copy(workspace / "mlflow.db", workspace / "fresh.db")
store = Store(workspace)
delivery.Delivery(store, Journal(workspace, sys.argv[2])).send()
expected = whole_content(workspace)
for kept in (SqlAlchemyStore, Registry):
    for engine in kept._engine_map.values():
        engine.dispose()  # no connection may be shared by two processes
gc.freeze()
moment = 0
while True:
    moment += 1
    fresh()
    killed = send(moment)
    if killed == 0:
        break
    assert killed == signal.SIGKILL
    assert send(0) == 0
    found = whole_content(workspace)
    assert found == expected, (moment, [(a, b) for a, b in zip(found, expected) if a != b])
print(moment)
"""


@pytest.mark.slow
def test_a_sender_that_is_killed_at_any_call_is_made_up_for_by_the_next(workspace):
    journal = Journal(workspace, FINGERPRINT)
    tell_training(journal, epochs=EPOCHS[:1])
    tell_grid(journal)
    tell_grid(journal, "b")
    journal.append(begin("evaluate", "a"))
    model = journal.keep_bytes("vae.safetensors", b"a model")
    journal.append(
        Models(place="evaluate-a", payload=model, measured_on={"dataset": "digits", "images": "3"}, nll=150.0)
    )
    journal.append(end("evaluate", "a"))

    calls = int(run(KILLED_AT_EACH_CALL, workspace, FINGERPRINT))

    assert calls > 60
    main = assert_complete_main(workspace)
    with sqlite3.connect(workspace / DATABASE) as database:
        champions = database.execute(
            "select run_id from model_versions join registered_model_aliases using (name, version)"
        )
        assert champions.fetchall() == [(main,), (main,)]
    database.close()


# the store goes


def test_a_deleted_run_is_sent_again_as_a_new_one(workspace):
    journal = Journal(workspace, FINGERPRINT)
    tell_training(journal)
    tell_grid(journal, "a")
    tell_grid(journal, "b")
    deliver(workspace, journal)
    deleted = runs(workspace)[0]["id"]
    client_of(workspace).delete_run(deleted)

    journal.append(Metrics(values={"test/nll": 150.0}))
    deliver(workspace, journal)

    main, child = runs(workspace)
    assert assert_complete_main(workspace) == main["id"] != deleted
    assert len(main["metrics"]) == 2 * len(EPOCHS) + 1
    assert child["tags"]["mlflow.parentRunId"] == main["id"]


def test_a_run_that_was_deleted_when_all_was_sent_stays_deleted(workspace, journal):
    deliver(workspace, journal)
    client_of(workspace).delete_run(runs(workspace)[0]["id"])

    assert sync(workspace) == 0

    assert runs(workspace) == []


def test_a_store_that_was_made_anew_receives_everything(workspace, journal):
    deliver(workspace, journal)
    with sqlite3.connect(workspace / DATABASE) as database:  # what a new one differs by
        for table in ("tags", "params", "metrics", "latest_metrics", "inputs", "runs"):
            database.execute(f"delete from {table}")
        database.execute("update experiments set creation_time = creation_time + 1")

    assert sync(workspace) == 0

    assert_complete(workspace)


# beside a stage


def session_of(workspace, stage="train"):
    """A session that has begun."""
    session = Session(workspace, stage)
    session.begin(FINGERPRINT, "" if stage == "train" else "a", stage, {f"{stage}.epochs": 3}, {"told_by": stage})
    return session


def epoch(session, number):
    session.log_metrics({"train/loss": 200.0 - number, "train/kld": 0.1 * number}, number)
    session.log_image(np.full((28, 56), number, np.uint8), "samples", number)


def finish(session, workspace, wait=PATIENCE_S):
    """The end of a training of which ``epoch`` was told three times."""
    path = workspace / "plots" / "losses.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_text("epoch,loss\n")
    session.log_file(path)
    session.end("FINISHED", wait=wait)


def is_received(workspace, step):
    """Whether the store has the metrics of a step."""
    return any(point[1] == step for one in runs(workspace) for point in one["metrics"])


def test_a_stage_is_tracked_without_mlflow_or_torch_in_its_own_process(workspace):
    program = """
from mnist_vae.tracking.session import Session
session = Session(workspace, "train")
session.begin("0123456789abcdef", "", "name", {"train.epochs": 1}, {"tag": "value"})
session.log_metrics({"loss": 10.0}, 1)
session.end("FINISHED", wait=120)
print(session.outcome["reason"], "mlflow" in sys.modules, "torch" in sys.modules)
"""
    assert run(program, workspace).split() == ["False", "False"]

    (one,) = runs(workspace)
    assert (one["name"], one["status"], one["tags"]["tag"]) == ("name", "FINISHED", "value")
    assert one["metrics"] == [("loss", 1, 10.0)]


def test_a_training_is_seen_while_it_lasts_and_the_machine_with_it(workspace):
    session = session_of(workspace)
    epoch(session, 1)
    until(lambda: is_received(workspace, 1))
    assert runs(workspace)[0]["status"] == "RUNNING"
    until(lambda: runs(workspace)[0]["machine"])
    for number in (2, 3):
        epoch(session, number)

    finish(session, workspace)

    assert session.outcome["reason"] == ""
    assert_complete(workspace, stages=("train",))
    assert len({*runs(workspace)[0]["machine"]}) == len(runs(workspace)[0]["machine"])


def test_a_sender_that_waits_is_woken_by_a_training_and_at_the_end_waits_for_another_sender(workspace, monkeypatch):
    reading, writing = os.pipe()
    monkeypatch.setattr(sender, "POLL_S", 10 * PATIENCE_S)
    monkeypatch.setattr(sender, "_leave_in", lambda seconds: None)  # it would end the tests
    monkeypatch.setattr(sys, "stdin", os.fdopen(reading))
    waiting = Sender(workspace, "render_grid", process_name())
    following = threading.Thread(target=waiting.run, daemon=True)

    with os.fdopen(writing, "w") as told:
        following.start()
        until(lambda: waiting.store is not None)
        time.sleep(1)  # it has sent what there is, nothing, and waits
        journal = tell(workspace)
        print(journal.fingerprint, file=told, flush=True)
        until(lambda: is_received(workspace, max(EPOCHS)))
        until(lambda: Delivery(waiting.store, journal).pending() == 0)
        assert_complete(workspace)
        with filelock.FileLock(journal.folder / "sender.lock"):
            journal.append(Metrics(values={"train/loss": 7.0}, step=7))
            told.close()
            until(lambda: waiting.reason)
    following.join(PATIENCE_S)

    assert not following.is_alive()
    assert is_received(workspace, 7)


def test_a_stage_that_ends_before_it_begins_waits_for_nothing(workspace, capsys):
    session = Session(workspace, "train")

    session.end("FAILED", "params.yaml is missing")

    assert session.outcome == {}
    assert runs(workspace) == []
    assert capsys.readouterr() == ("", "")


def test_a_stage_says_what_its_store_will_never_have(workspace, capsys):
    session = session_of(workspace)
    session.log_tags({"no name?": "x"})
    for number in EPOCHS:
        epoch(session, number)

    finish(session, workspace)

    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("train: WARNING: MLflow goes without a record (tags), which MLflow does not take: ")
    assert_complete(workspace, stages=("train",))


def test_a_store_that_is_deleted_while_the_stage_works_is_made_anew_and_told_everything(workspace):
    session = session_of(workspace)
    epoch(session, 1)
    until(lambda: is_received(workspace, 1))
    (workspace / DATABASE).unlink()
    for number in (2, 3):
        epoch(session, number)

    finish(session, workspace)

    assert session.outcome["reason"] == ""
    assert_complete(workspace, stages=("train",))


def lock(workspace):
    connection = sqlite3.connect(workspace / DATABASE, isolation_level=None, check_same_thread=False)
    connection.execute("begin exclusive")
    return connection


def replace_by_garbage(workspace):
    (workspace / DATABASE).write_text("this is no database " * 100)


def make_newer(workspace):
    with sqlite3.connect(workspace / DATABASE) as database:
        (before,) = database.execute("select version_num from alembic_version").fetchone()
        database.execute("update alembic_version set version_num = 'feedfeedfeed'")
    return before


def make_older(workspace, version):
    with sqlite3.connect(workspace / DATABASE) as database:
        database.execute("update alembic_version set version_num = ?", (version,))


def delete_experiment(workspace):
    store = Store(workspace)
    store.client.delete_experiment(store.experiment)
    return store


def restore_experiment(store):
    store.client.restore_experiment(store.experiment)


@pytest.mark.parametrize(
    ("injure", "mend", "reason"),
    [
        (lock, lambda _, connection: connection.close(), "database is locked"),
        (make_newer, make_older, "feedfeedfeed"),
        (delete_experiment, lambda _, store: restore_experiment(store), "experiments restore"),
        (replace_by_garbage, lambda workspace, _: (workspace / DATABASE).unlink(), "move mlflow.db away"),
    ],
    ids=["locked", "of a newer mlflow", "experiment deleted", "damaged"],
)
def test_a_store_that_takes_nothing_fails_no_stage_and_is_sent_everything_later(
    workspace, capsys, injure, mend, reason
):
    before = injure(workspace)
    session = session_of(workspace)
    for number in EPOCHS:
        epoch(session, number)
    finish(session, workspace)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("train: WARNING: MLflow has not received everything (")
    assert warning.endswith("; nothing is lost, and the next stage or `make sync` sends the rest")
    assert re.search(reason, warning)

    mend(workspace, before)
    assert sync(workspace) == 0

    assert_complete(workspace, stages=("train",))


def test_what_a_power_cut_may_take_does_not_count_as_sent(workspace, monkeypatch):
    journal, store = Journal(workspace, FINGERPRINT), Store(workspace)
    session = session_of(workspace)
    epoch(session, 1)
    session._sender.kill()
    session._sender.communicate()

    def fails(location):
        raise OSError("the disk fails")

    monkeypatch.setattr(store, "flush_artifacts", fails)
    delivery = Delivery(store, journal)
    with pytest.raises(OSError, match="the disk fails"):
        delivery.send()
    assert delivery.pending()

    monkeypatch.undo()
    Delivery(store, journal).send()
    assert not Delivery(store, journal).pending()


def test_a_database_that_is_locked_for_a_while_is_waited_for(workspace):
    connection = lock(workspace)
    session = session_of(workspace)
    epoch(session, 1)
    timer = threading.Timer(8, connection.close)  # longer than two attempts take
    timer.start()
    for number in (2, 3):
        epoch(session, number)

    finish(session, workspace)

    timer.join()
    assert session.outcome["reason"] == ""
    assert_complete(workspace, stages=("train",))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only files")
def test_a_read_only_database_fails_no_stage(workspace, capsys):
    (workspace / DATABASE).chmod(0o400)
    session = session_of(workspace)
    for number in EPOCHS:
        epoch(session, number)
    finish(session, workspace)
    assert "readonly" in capsys.readouterr().err

    (workspace / DATABASE).chmod(0o600)
    assert sync(workspace) == 0

    assert_complete(workspace, stages=("train",))


def test_a_sender_that_was_killed_is_reported_and_made_up_for(workspace, capsys):
    session = session_of(workspace)
    epoch(session, 1)
    until(lambda: is_received(workspace, 1))
    session._sender.kill()
    for number in (2, 3):
        epoch(session, number)
    finish(session, workspace)
    assert "(its sender died)" in capsys.readouterr().err

    session = session_of(workspace, "evaluate")
    session.end("FINISHED", wait=PATIENCE_S)

    assert session.outcome["reason"] == ""
    assert_complete(workspace, stages=("train",))


def test_a_stage_waits_a_bounded_time_for_a_sender_that_hangs(workspace, capsys):
    session = session_of(workspace)
    session._sender.send_signal(signal.SIGSTOP)
    for number in EPOCHS:
        epoch(session, number)

    finish(session, workspace, wait=0.5)

    assert "the tracking store has not answered for 0 s" in capsys.readouterr().err
    assert session._sender.poll() == -signal.SIGKILL
    assert sync(workspace) == 0
    assert_complete(workspace, stages=("train",))


def test_what_another_sender_is_sending_is_waited_for(workspace):
    other = filelock.FileLock(workspace / "journal" / FINGERPRINT / "sender.lock", thread_local=False)
    Journal(workspace, FINGERPRINT).append(Metrics(values={"early": 1.0}))
    other.acquire()
    session = session_of(workspace)
    for number in EPOCHS:
        epoch(session, number)
    opened = str(workspace / DATABASE)
    until(lambda: opened in {file.path for file in psutil.Process(session._sender.pid).open_files()})
    time.sleep(1)
    assert runs(workspace) == []
    timer = threading.Timer(1, other.release)
    timer.start()

    finish(session, workspace)

    timer.join()
    assert session.outcome["reason"] == ""
    assert len(runs(workspace)[0]["metrics"]) == 2 * len(EPOCHS) + 1


STAGE = """
from mnist_vae.tracking.session import Session
session = Session(workspace, "train")
session.begin("0123456789abcdef", "", "train", {}, {})
print(session._sender.pid, flush=True)
"""


def killed_run(workspace, stage, sender):
    """The run, once its stage was killed and the sender has left."""
    stage.wait(PATIENCE_S)
    until(lambda: not psutil.pid_exists(sender) or psutil.Process(sender).status() == psutil.STATUS_ZOMBIE)
    (one,) = runs(workspace)
    return one["status"], one["tags"]["reason"]


@pytest.mark.parametrize("moment", ["at once", "while it is sent"])
def test_a_stage_whose_process_group_is_killed_is_marked_by_its_sender_which_leaves(workspace, moment):
    stage = start(f"{STAGE}input()", workspace)
    sender = int(stage.stdout.readline())
    if moment == "while it is sent":
        until(lambda: runs(workspace))

    os.killpg(stage.pid, signal.SIGKILL)

    assert killed_run(workspace, stage, sender) == ("KILLED", "train: its process ended without a word")
    stage.communicate()


def test_a_child_that_a_killed_stage_leaves_does_not_keep_its_sender(workspace):
    stage = start(f"{STAGE}\nif os.fork() == 0:\n    time.sleep(600)\nos.kill(os.getpid(), signal.SIGKILL)", workspace)
    try:
        assert killed_run(workspace, stage, int(stage.stdout.readline()))[0] == "KILLED"
    finally:
        os.killpg(stage.pid, signal.SIGKILL)
        stage.communicate()


def test_ctrl_c_ends_the_stage_and_its_sender_still_tells_of_it(workspace):
    program = """
from mnist_vae.tracking.session import Session
session = Session(workspace, "train")
try:
    session.begin("0123456789abcdef", "", "train", {}, {})
    print(session._sender.pid, flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    session.end("KILLED", "Ctrl-C", wait=120)
print(session.outcome["reason"])
"""
    stage = start(program, workspace)
    sender = int(stage.stdout.readline())
    os.killpg(stage.pid, signal.SIGINT)

    assert killed_run(workspace, stage, sender) == ("KILLED", "train: Ctrl-C")
    assert stage.communicate() == ("\n", "")


def test_a_later_stage_sends_what_earlier_ones_left(workspace, journal):
    for number in range(1, 7):
        Journal(workspace, f"{number}" * 16).append(begin("train", process=gone(number)))

    session = Session(workspace, "render_samples")
    session.begin("e" * 16, "a", "samples", {})
    session.end("FINISHED", wait=PATIENCE_S)

    assert session.outcome["reason"] == ""
    assert_complete(workspace)
    status = {one["tags"]["fingerprint"][0]: one["status"] for one in runs(workspace)}
    assert status == {"0": "FINISHED", "e": "FINISHED"} | dict.fromkeys("123456", "KILLED")


def test_a_workspace_may_lie_in_any_folder_without_a_locale(tmp_path):
    folder = tmp_path / "a b%20c?d#e:f&g[h]é"
    folder.mkdir()
    program = """
os.chdir(workspace)
from mnist_vae.tracking.session import Session
session = Session(workspace, "train")
session.begin("0123456789abcdef", "", "name · é", {}, {})
session.log_file(workspace / "file.txt")
session.end("FINISHED", wait=120)
print(session.outcome["reason"])
"""
    (folder / "file.txt").write_text("x")
    assert run(program, folder, LC_ALL="C") == "\n"

    (one,) = runs(folder)
    assert (one["name"], one["status"]) == ("name · é", "FINISHED")
    assert len(artifacts(folder, one["id"])) == 1
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


# make sync


def test_sync_sends_what_is_left_and_says_so(workspace, journal):
    arguments = [sys.executable, "-m", "mnist_vae.tracking.sender", "."]
    for _ in range(2):
        done = subprocess.run(arguments, cwd=workspace, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "MLflow has received everything.\n", "")

    assert_complete(workspace)


def test_sync_without_a_journal_makes_no_store(tmp_path, capsys):
    assert sync(tmp_path) == 0
    assert "nothing to send" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_sync_to_a_store_that_does_not_open_is_one_line_and_a_failure(workspace, journal, capsys):
    replace_by_garbage(workspace)

    assert sync(workspace) == 1

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sync: MLflow's store sqlite:///")


# a server


class Proxy:
    """Between a client and a server: lets through, refuses, hangs, or resets, as ``mode`` says at the time."""

    def __init__(self, port):
        self.server, self.mode = port, "pass"
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.open = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=[client], daemon=True).start()

    def serve(self, client):
        self.open.append(client)
        if self.mode == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if self.mode in ("refuse", "reset"):
            client.close()
        elif self.mode == "pass":
            server = socket.create_connection(("127.0.0.1", self.server))
            self.open.append(server)
            threading.Thread(target=self.pump, args=[server, client], daemon=True).start()
            self.pump(client, server)

    def pump(self, source, target):
        with suppress(OSError):
            while content := source.recv(65536):
                if self.mode != "pass":  # an answer on its way is lost too
                    break
                target.sendall(content)
        for side in (source, target):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def set(self, mode):
        self.mode = mode
        if mode != "pass":
            for side in self.open:
                with suppress(OSError):
                    side.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def server(template, tmp_path_factory):
    """The port of a real server on a database of its own."""
    folder = copy_store(template, tmp_path_factory.mktemp("server"))
    with sqlite3.connect(folder / DATABASE) as database:
        database.execute(
            "update experiments set artifact_location = 'mlflow-artifacts:/1' where name = ?", [EXPERIMENT]
        )
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder / DATABASE}",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=clean_environment(), stdout=log, stderr=log, start_new_session=True
        )

    def answers():
        assert process.poll() is None, (folder / "log").read_text()
        with suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200

    until(answers)
    yield port, folder
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def proxy(server, monkeypatch):
    port, folder = server
    with sqlite3.connect(folder / DATABASE, timeout=30) as database:
        for table in ("tags", "params", "metrics", "latest_metrics", "inputs", "runs"):
            database.execute(f"delete from {table}")
    proxy = Proxy(port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:s3cret@127.0.0.1:{proxy.port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    yield proxy
    proxy.listener.close()


def on_server(server):
    """The one run that the server has, and the frames that it shows."""
    _, folder = server
    (one,) = runs(folder)
    files = [path.name for path in (folder / "files").rglob("*") if one["id"] in path.parts]
    return one, sorted(name.partition("+timestamp")[0] for name in files if "+step+" in name)


def assert_complete_on(server):
    one, frames = on_server(server)
    assert one["status"] == "FINISHED"
    assert [point[:2] for point in one["metrics"]] == [(n, e) for n in ("train/kld", "train/loss") for e in EPOCHS]
    assert frames == [f"samples+step+{e}" for e in EPOCHS for _ in range(2)]


@pytest.mark.parametrize("mode", ["refuse", "hang", "reset"])
def test_a_server_that_goes_and_comes_back_gets_everything_once(server, proxy, tmp_path, mode):
    session = session_of(tmp_path)
    epoch(session, 1)
    until(lambda: is_received(server[1], 1))
    proxy.set(mode)
    epoch(session, 2)
    time.sleep(3)
    assert not is_received(server[1], 2)
    proxy.set("pass")
    epoch(session, 3)

    finish(session, tmp_path)

    assert session.outcome["reason"] == ""
    assert_complete_on(server)


@pytest.mark.parametrize("mode", ["refuse", "hang"])
def test_a_server_that_stays_away_is_waited_for_a_bounded_time_and_gets_everything_later(
    server, proxy, tmp_path, capsys, mode
):
    proxy.set(mode)
    session = session_of(tmp_path)
    for number in EPOCHS:
        epoch(session, number)
    finish(session, tmp_path, wait=10)
    (warning,) = capsys.readouterr().err.splitlines()
    assert "MLflow has not received everything" in warning
    assert "s3cret" not in warning
    assert not (tmp_path / DATABASE).exists()

    proxy.set("pass")
    arguments = [sys.executable, "-m", "mnist_vae.tracking.sender", str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, "MLflow has received everything.\n", "")
    assert_complete_on(server)
    assert "s3cret" not in json.dumps(on_server(server)[0])
    assert not any(b"s3cret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
