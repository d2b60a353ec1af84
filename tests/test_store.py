"""MLflow's store: made whole or not at all, opened or refused in one line, and the same however often it is told."""

import json
import logging
import re
import shutil
import signal
import socket
import sqlite3
import time
from pathlib import PurePath

import numpy as np
import pytest

from mnist_vae.data.dataset import Dataset
from mnist_vae.errors import UserError
from mnist_vae.tracking import store as module
from mnist_vae.tracking.journal import Journal
from mnist_vae.tracking.session import Session, to_png
from mnist_vae.tracking.store import DATABASE, EXPERIMENT, Store, first_line, redact
from tests.tracking import FINGERPRINT, artifacts, copy_store, run, runs, start

VARIABLES = ("TRACKING_URI", "REGISTRY_URI", "TRACKING_PASSWORD", "TRACKING_TOKEN", "EXPERIMENT_NAME", "RUN_ID")


@pytest.fixture(autouse=True)
def _no_store_from_outside(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a store that was made while the current folder was another one."""
    workspace, elsewhere = tmp_path_factory.mktemp("workspace"), tmp_path_factory.mktemp("elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere)
        for name in VARIABLES:
            patch.delenv(f"MLFLOW_{name}", raising=False)
        Store(workspace)
    assert list(elsewhere.iterdir()) == []
    return workspace


@pytest.fixture
def fresh(workspace, tmp_path):
    """A workspace of one test, with a copy of the shared database."""
    return copy_store(workspace, tmp_path / "fresh")


@pytest.fixture(scope="module")
def store(workspace):
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(f"MLFLOW_{name}", raising=False)
        return Store(workspace)


@pytest.fixture
def run_id(store, request):
    """A run of one test."""
    return store.create_run(FINGERPRINT, request.node.name, "a run", 1).info.run_id


def stored(store, run_id):
    return store.client.get_run(run_id)


# runs


def test_a_run_is_found_by_its_training_and_its_place(store, run_id, request):
    assert store.find_run(FINGERPRINT, request.node.name).info.run_id == run_id
    assert store.find_run(FINGERPRINT, "elsewhere") is None
    assert store.find_run("another", request.node.name) is None


def test_a_deleted_run_is_not_found_and_not_active(store, run_id, request):
    assert store.active_run(run_id).info.run_id == run_id
    store.client.delete_run(run_id)

    assert store.find_run(FINGERPRINT, request.node.name) is None
    assert store.active_run(run_id) is None
    assert store.active_run("0" * 32) is None
    assert store.active_run("no id") is None


def test_a_run_belongs_to_the_experiment_and_runs_until_it_is_ended(store, run_id):
    assert store.client.get_experiment(stored(store, run_id).info.experiment_id).name == EXPERIMENT
    assert run_id in {run.info.run_id for run in store.running()}

    store.end_run(run_id, "FINISHED", "", 5)

    assert (stored(store, run_id).info.status, stored(store, run_id).info.end_time) == ("FINISHED", 5)
    assert run_id not in {run.info.run_id for run in store.running()}


def test_a_run_that_has_ended_keeps_its_time_and_has_a_reason_only_while_it_is_no_success(store, run_id):
    store.end_run(run_id, "FAILED", "the disk is full", 5)
    store.end_run(run_id, "FAILED", "the disk is full", 6)
    info, tags = stored(store, run_id).info, stored(store, run_id).data.tags
    assert (info.status, info.end_time, tags["reason"]) == ("FAILED", 5, "the disk is full")

    store.end_run(run_id, "FINISHED", "", 7)

    info, tags = stored(store, run_id).info, stored(store, run_id).data.tags
    assert (info.status, info.end_time, "reason" in tags) == ("FINISHED", 7, False)


def test_metrics_have_their_step_and_are_kept_once(store, run_id):
    for _ in range(2):
        store.log_metrics(run_id, [("train/loss", 170.5, 1, 1000), ("train/loss", 160.25, 2, 2000)])

    history = store.client.get_metric_history(run_id, "train/loss")
    assert [(metric.step, metric.value, metric.timestamp) for metric in history] == [
        (1, 170.5, 1000),
        (2, 160.25, 2000),
    ]
    assert store.logged_metrics(run_id) == {("train/loss", 1), ("train/loss", 2)}


def test_more_metrics_than_mlflow_takes_at_once_are_recorded(store, run_id):
    store.log_metrics(run_id, [("loss", float(step), step, 1) for step in range(2 * module.BATCH + 1)])

    assert len(store.client.get_metric_history(run_id, "loss")) == 2 * module.BATCH + 1


def test_a_sender_may_tell_numbers_only(tmp_path):
    session = Session.__new__(Session)
    session.journal, session.place = Journal(tmp_path, FINGERPRINT), "main"

    session.log_metrics({"name": "digits", "epochs": 3, "loss": 1.5, "good": True, "list": [1.0], "nan": float("nan")})

    ((record, _),) = session.journal.read()
    assert record.values == {"epochs": 3.0, "loss": 1.5}


def test_a_param_keeps_its_first_value(store, run_id):
    store.log_params(run_id, {"samples.seed": "1", "train.betas": "[0.9, 0.99]"})
    store.log_params(run_id, {"samples.seed": "2", "samples.cols": "18"})

    data = stored(store, run_id).data
    assert data.params == {"samples.seed": "1", "train.betas": "[0.9, 0.99]", "samples.cols": "18"}


def test_more_params_than_mlflow_takes_at_once_are_recorded(store, run_id):
    store.log_params(run_id, {f"p{number}": "x" for number in range(205)})

    assert len(stored(store, run_id).data.params) == 205


def test_tags_can_change(store, run_id):
    store.set_tags(run_id, {"dataset": "digits"})
    store.set_tags(run_id, {"dataset": "mnist"})

    assert stored(store, run_id).data.tags["dataset"] == "mnist"


def test_a_claim_is_the_first_ones(store, run_id):
    assert store.claim(run_id, "render_grid.key", "a")
    assert not store.claim(run_id, "render_grid.key", "b")
    assert store.claim(run_id, "render_grid.key", "a")
    assert stored(store, run_id).data.tags["render_grid.key"] == "a"


@pytest.mark.parametrize("folder", ["plots", ""])
def test_a_logged_file_and_all_folders_above_it_are_on_the_disk(
    store, workspace, run_id, tmp_path, monkeypatch, folder
):
    flushed = []
    monkeypatch.setattr(module, "flush_to_disk", flushed.append)
    for name in ("samples.png", "100 % of it.png"):
        file = tmp_path / name
        file.write_bytes(b"picture")
        flushed.clear()
        store.log_file(run_id, file, folder)

    artifacts = workspace / "mlruns" / EXPERIMENT / run_id / "artifacts"
    kept = artifacts / folder / name
    assert kept.read_bytes() == b"picture"
    assert set(flushed) == {kept, *(path for path in kept.parents if path.is_relative_to(workspace))}  # and no other


def test_flush_artifacts_leaves_a_servers_artifacts_to_it(store, monkeypatch):
    monkeypatch.setattr(module, "flush_to_disk", pytest.fail)

    store.flush_artifacts("mlflow-artifacts:/1/2")


def test_images_lie_in_one_folder_with_their_step_once_however_often_they_are_told(store, workspace, run_id, tmp_path):
    another = module.Store(workspace)  # of another clone's sender at the same training
    for step in (1, 2, 12):
        png = tmp_path / f"digest-{step}" / "samples.png"
        png.parent.mkdir()
        png.write_bytes(to_png(np.full((56, 84), step, np.uint8)))
        for sender in (store, store, another):
            sender.log_image(run_id, png, "samples", step)

    names = [name for name in artifacts(workspace, run_id) if name.startswith("images/")]
    assert len(names) == 6
    for step in (1, 2, 12):
        of_step = [PurePath(name).suffix for name in names if name.startswith(f"images/samples+step+{step}+timestamp+")]
        assert sorted(of_step) == [".png", ".webp"]
    assert stored(store, run_id).data.tags["mlflow.loggedImages"] == "True"


def test_an_image_of_which_a_killed_process_wrote_one_file_is_completed(store, workspace, run_id, tmp_path):
    png = tmp_path / "0123" / "samples.png"
    png.parent.mkdir()
    png.write_bytes(to_png(np.zeros((56, 84), np.uint8)))
    store.log_image(run_id, png, "samples", 1)
    folder = workspace / "mlruns" / EXPERIMENT / run_id / "artifacts" / "images"
    (small,) = folder.glob("*.webp")
    small.unlink()
    (full,) = folder.glob("*.png")
    full.write_bytes(b"half")

    store.log_image(run_id, png, "samples", 1)

    assert {file.suffix for file in folder.iterdir()} == {".png", ".webp"}
    assert full.stat().st_size > 4


def test_frames_are_named_as_mlflows_own_are(store, workspace, run_id, tmp_path):
    image = np.zeros((56, 84), np.uint8)
    store.client.log_image(run_id, image, key="theirs", step=1, timestamp=1000, synchronous=True)
    png = tmp_path / "0123" / "ours.png"
    png.parent.mkdir()
    png.write_bytes(to_png(image))
    store.log_image(run_id, png, "ours", 1)

    names = sorted(name for name in artifacts(workspace, run_id) if name.startswith("images/"))
    ours, theirs = names[:2], names[2:]
    pattern = r"images/{}\+step\+1\+timestamp\+\d+\+[0-9a-f-]{{36}}(\+compressed\.webp|\.png)"
    assert all(re.fullmatch(pattern.format("ours"), name) for name in ours)
    assert all(re.fullmatch(pattern.format("theirs"), name) for name in theirs)


def test_the_description_shows_a_picture_over_its_text(store, workspace, run_id, tmp_path):
    picture = tmp_path / "description.png"
    picture.write_bytes(to_png(np.zeros((56, 84), np.uint8)))

    store.describe(run_id, "**157.3** nats per image", picture)

    shown, _, text = stored(store, run_id).data.tags["mlflow.note.content"].partition("\n\n")
    assert text == "**157.3** nats per image"
    assert f"path=description.png&run_uuid={run_id}" in shown
    assert "description.png" in artifacts(workspace, run_id)


def test_the_data_set_is_an_input_with_its_digest_and_its_sizes_once(store, run_id):
    about = Dataset("digits", *(np.zeros(n, np.uint8) for n in ((9, 28, 28), 9, (3, 28, 28), 3))).about

    for _ in range(2):
        store.log_dataset(run_id, about)

    (given,) = stored(store, run_id).inputs.dataset_inputs
    assert given.dataset.name == "digits"
    assert len(given.dataset.digest) >= 8
    assert about["digest"].startswith(given.dataset.digest)
    assert json.loads(given.dataset.profile) == {"train_images": 9, "test_images": 3}
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]


def test_artifacts_stay_in_the_workspace_wherever_the_process_works(store, workspace, run_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "train.json"
    file.write_text("{}")

    store.client.log_artifact(run_id, str(file), "metrics")

    assert (workspace / "mlruns" / EXPERIMENT / run_id / "artifacts" / "metrics" / "train.json").is_file()
    assert list(tmp_path.iterdir()) == [file]


# which store


def test_the_store_of_a_copied_workspace_is_refused_before_it_writes_into_the_first_one(workspace, tmp_path):
    Store(workspace)
    copied = tmp_path / "copied"
    shutil.copytree(workspace, copied)
    (tmp_path / "link").symlink_to(workspace)

    with pytest.raises(UserError, match=f"made in another folder.*{workspace}/mlruns.*move mlflow.db and mlruns away"):
        Store(copied)

    Store(tmp_path / "link")


def test_another_store_can_be_named(workspace, fresh, monkeypatch):
    before = runs(workspace)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{fresh / DATABASE}")

    Store(workspace).create_run(FINGERPRINT, "main", "to the other store", 1)

    assert "to the other store" in [one["name"] for one in runs(fresh)]
    assert runs(workspace) == before


def test_a_store_that_is_made_anew_has_another_identity(store, fresh):
    assert Store(fresh).identity == store.identity
    with sqlite3.connect(fresh / DATABASE) as database:
        database.execute("update experiments set creation_time = creation_time + 1")
    assert Store(fresh).identity != store.identity


def test_the_address_is_relative_in_the_workspace_and_absolute_elsewhere(tmp_path, monkeypatch):
    assert module.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert module.tracking_uri(tmp_path) == "sqlite:///mlflow.db"


def test_a_server_that_does_not_answer_is_a_users_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, but nobody listens
        uri = f"http://127.0.0.1:{held.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

        with pytest.raises(UserError, match=rf"store {uri} does not open: .*MLFLOW_TRACKING_URI") as error:
            Store(tmp_path)

    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_address_of_no_known_kind_is_a_users_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://example.org")

    with pytest.raises(UserError, match=r"store gopher://example\.org does not open"):
        Store(tmp_path)


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:s3cr%2Ft@127.0.0.1:1",
        "https://me:s3cr/t@127.0.0.1:1/path",
        "gopher://me:s3cr%2Ft@example.org",
        "postgresql://me:s3cr%2Ft@127.0.0.1:1/db",
        "mysql+nothing://me:s3cr/t@127.0.0.1/db",
        "http://me:s3cr%2Ft@127.0.0.1:no-port",
    ],
)
def test_no_password_is_in_the_message(tmp_path, monkeypatch, caplog, capfd, uri):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between its tries of a database MLflow waits 100 s in all
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    with caplog.at_level(logging.DEBUG, "mnist_vae"), pytest.raises(UserError, match="does not open") as error:
        Store(tmp_path)

    printed = "".join(capfd.readouterr())
    assert "***" in str(error.value)
    for secret in ("s3cr%2Ft", "s3cr/t"):
        assert secret not in str(error.value) + printed


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"])
def test_redact_hides_what_the_environment_keeps_secret(monkeypatch, name):
    monkeypatch.setenv(name, "s3cret")

    assert redact("refused: s3cret") == "refused: ***"
    assert first_line(ValueError("s3cret is wrong\nand more")) == "*** is wrong"
    assert first_line(ValueError()) == "ValueError"


def test_a_damaged_database_is_a_users_problem_with_a_remedy(tmp_path):
    (tmp_path / DATABASE).write_text("this is no database " * 100)

    with pytest.raises(UserError, match=r"mlflow\.db does not open: .*; if it stays so, move mlflow\.db away") as error:
        Store(tmp_path)

    assert "MLFLOW_TRACKING_URI" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_database_of_a_newer_mlflow_is_a_users_problem(fresh):
    with sqlite3.connect(fresh / DATABASE) as database:
        database.execute("update alembic_version set version_num = 'feedfeedfeed'")

    with pytest.raises(UserError, match=r"does not open: .*feedfeedfeed"):
        Store(fresh)


def test_a_deleted_experiment_is_answered_with_the_way_to_get_it_back(fresh):
    store = Store(fresh)
    store.client.delete_experiment(store.experiment)

    with pytest.raises(UserError, match=rf"`mlflow experiments restore --experiment-id {store.experiment}`"):
        Store(fresh)


def test_mlflow_sends_nothing_home_and_prints_nothing_of_its_own(tmp_path):
    program = "from mnist_vae.tracking.store import Store; Store(workspace); import mlflow.telemetry\n"
    program += "print(mlflow.telemetry.get_telemetry_client())"

    process = start(program, tmp_path, CI="", GITHUB_ACTIONS="")
    printed, errors = process.communicate(timeout=120)

    assert (printed.strip(), errors) == ("None", "")


# a fresh store


@pytest.mark.slow
def test_two_processes_and_mlflows_own_may_make_a_fresh_store_at_once(tmp_path):
    wait = """
(workspace / f"ready-{os.getpid()}").touch()
while len(list(workspace.glob("ready-*"))) < 3:
    time.sleep(0.01)
"""
    ours = f"""
from mnist_vae.tracking.store import Store
{wait}
store = Store(workspace)
run = store.create_run("0123456789abcdef", f"{{os.getpid()}}", "one of two", 1).info.run_id
store.log_metrics(run, [("loss", 1.0, 1, 1)])
"""
    theirs = f"""
from mlflow.server.handlers import initialize_backend_stores
{wait}
initialize_backend_stores(f"sqlite:///{{workspace / 'mlflow.db'}}", default_artifact_root=str(workspace))
"""
    processes = [start(program, tmp_path) for program in (ours, ours, theirs)]
    answers = [process.communicate(timeout=300) for process in processes]

    assert [process.returncode for process in processes[:2]] == [0, 0], "\n".join(errors for _, errors in answers)
    assert [(one["name"], one["metrics"]) for one in runs(tmp_path)] == [("one of two", [("loss", 1, 1.0)])] * 2
    assert list(tmp_path.glob(".mlflow.db-*")) == []
    integrity = sqlite3.connect(tmp_path / DATABASE)
    assert integrity.execute("pragma integrity_check").fetchone() == ("ok",)
    integrity.close()


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_makes_a_store_leaves_none_or_a_whole_one(tmp_path):
    program = """
import gc
import sqlalchemy
from mnist_vae.tracking import store

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def count(*_):
    global left
    left -= 1
    left or kill()

gc.freeze()
for moment in sys.argv[2:]:  # each in a process of its own, and MLflow is loaded once
    child = os.fork()
    if child == 0:
        if moment == "link":
            os.link = kill
        elif moment == "flush":
            store.flush_to_disk = kill
        else:
            left = int(moment)
            sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", count)
        store.Store(workspace)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(-os.waitstatus_to_exitcode(status), (workspace / "mlflow.db").exists())
"""
    statements = ("1", "60", "900")
    answers = run(program, tmp_path, *statements, "link", "flush", "1000000").splitlines()

    assert answers == [*["9 False"] * 4, "9 True", "0 True"]
    assert list(tmp_path.glob(".mlflow.db-*")) == []
    assert Store(tmp_path).experiment


def test_a_half_made_database_that_nobody_goes_on_with_is_a_users_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "QUIET_S", 0.5)
    with sqlite3.connect(tmp_path / DATABASE) as database:
        database.execute("create table experiments (experiment_id integer)")

    with pytest.raises(UserError, match=r"it was never finished; if it stays so, move mlflow\.db away"):
        Store(tmp_path)


def test_a_database_that_another_program_is_making_is_waited_for(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "QUIET_S", 3)
    program = """
import sqlite3
target = sqlite3.connect(workspace / "mlflow.db")
target.execute("create table half (x)")
target.commit()
print("half", flush=True)
for _ in range(10):  # slower than QUIET_S, but at it
    time.sleep(0.5)
    target.execute("insert into half values (randomblob(5000))")
    target.commit()
with sqlite3.connect(sys.argv[2]) as source:
    source.backup(target)
"""
    source = copy_store(workspace, tmp_path / "source") / DATABASE
    with sqlite3.connect(source) as made:
        made.execute("update experiments set artifact_location = replace(artifact_location, '/source/', '/')")
    process = start(program, tmp_path, source)
    assert process.stdout.readline() == "half\n"

    store = Store(tmp_path)

    assert process.communicate(timeout=60)[1] == ""
    assert store.client.get_experiment(store.experiment).name == EXPERIMENT


def test_what_a_killed_process_did_not_finish_is_taken_back(fresh):
    program = """
import sqlite3
database = sqlite3.connect(workspace / "mlflow.db", isolation_level=None)
database.execute("pragma cache_size = 1")  # pages go to the file before the transaction ends
database.execute("begin immediate")
database.execute("delete from experiments")
database.execute("create table rubbish as select randomblob(500000) as x")
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = start(program, fresh)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (fresh / f"{DATABASE}-journal").stat().st_size

    store = Store(fresh)

    assert store.client.get_experiment(store.experiment).name == EXPERIMENT
    database = sqlite3.connect(fresh / DATABASE)
    assert database.execute("select count(*) from sqlite_master where name = 'rubbish'").fetchone() == (0,)
    database.close()


def test_a_locked_database_is_called_locked(fresh, monkeypatch):
    monkeypatch.setattr(module, "BUSY_S", 0.1)
    store = Store(fresh)
    store.check()
    other = sqlite3.connect(fresh / DATABASE, isolation_level=None)
    other.execute("begin exclusive")
    try:
        with pytest.raises(UserError, match="does not open: database is locked"):
            Store(fresh)
        with pytest.raises(sqlite3.OperationalError, match="database is locked"):
            store.check()
    finally:
        other.rollback()
        other.close()
    assert Store(fresh).experiment


def test_a_store_may_lie_in_any_folder(tmp_path):
    folder = tmp_path / "a b%20c?d#e:f&g[h]é"
    folder.mkdir()
    program = """
os.chdir(workspace)  # as the sender does
workspace = Path.cwd()
from mnist_vae.tracking.store import Store
store = Store(workspace)
run = store.create_run("0123456789abcdef", "main", "a run", 1).info.run_id
(workspace / "file.txt").write_text("x")
store.client.log_artifact(run, str(workspace / "file.txt"), "plots")
print(store.client.list_artifacts(run, "plots")[0].path)
"""
    assert run(program, folder) == "plots/file.txt\n"

    (one,) = runs(folder)
    assert one["name"] == "a run"
    assert artifacts(folder, one["id"]).keys() == {"plots/file.txt"}
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
