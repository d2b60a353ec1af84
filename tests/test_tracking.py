"""MLflow runs as the stages use them, in stores of their own.

A fresh store takes seconds to make, so most tests share one; a test that needs another takes a copy of its database.
"""

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from mnist_vae.data.dataset import Dataset
from mnist_vae.errors import UserError
from mnist_vae.tracking.store import EXPERIMENT, resume_run, start_run

UNKNOWN = "0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def _no_store_from_outside(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a store that was made while the current folder was another one."""
    workspace, elsewhere = tmp_path_factory.mktemp("workspace"), tmp_path_factory.mktemp("elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with start_run(workspace, "first", {}):
            pass
    assert list(elsewhere.iterdir()) == []
    return workspace


@pytest.fixture
def fresh(workspace, tmp_path):
    """A workspace of one test, with a copy of the shared database."""
    folder = tmp_path / "fresh"
    folder.mkdir()
    copy_database(workspace, folder)
    return folder


@pytest.fixture
def client(workspace):
    return client_of(workspace)


@pytest.fixture
def run(workspace):
    with start_run(workspace, "a run", {}) as run:
        yield run


def client_of(folder):
    return MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")


def copy_database(source, target):
    with sqlite3.connect(source / "mlflow.db") as before, sqlite3.connect(target / "mlflow.db") as after:
        before.backup(after)


def run_count(folder):
    client = client_of(folder)
    return len(client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id]))


# a run from its start to its end


def test_a_run_is_open_while_it_lasts_and_finished_after(workspace, client):
    with start_run(workspace, "mnist · 2-D", {"dataset": "mnist", "latent_dim": 2}) as run:
        assert client.get_run(run.id).info.status == "RUNNING"

    stored = client.get_run(run.id)
    assert stored.info.status == "FINISHED"
    assert stored.info.end_time is not None
    assert stored.info.run_name == "mnist · 2-D"
    assert (stored.data.tags["dataset"], stored.data.tags["latent_dim"]) == ("mnist", "2")
    assert client.get_experiment(stored.info.experiment_id).name == EXPERIMENT


@pytest.mark.parametrize(
    ("problem", "status"), [(ValueError, "FAILED"), (SystemExit, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_a_run_that_does_not_end_well_is_marked_so(workspace, client, problem, status):
    with pytest.raises(problem), start_run(workspace, "unlucky", {}) as run:
        raise problem

    assert client.get_run(run.id).info.status == status


# what a run records


def test_metrics_have_their_step(run, client):
    for step, loss in [(1, 170.5), (2, 160.25)]:
        run.log_metrics({"train_loss": loss}, step=step)

    history = client.get_metric_history(run.id, "train_loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 170.5), (2, 160.25)]


def test_only_numbers_become_metrics(run, client):
    run.log_metrics({"dataset": "digits", "epochs": 3, "loss": 1.5, "converged": True, "kld_per_dim": [1.0]})

    assert client.get_run(run.id).data.metrics == {"epochs": 3, "loss": 1.5}


def test_params_are_recorded_as_they_are_written(run, client):
    run.log_params({"train.epochs": 10, "train.betas": [0.9, 0.99], "data.fallback": None})

    assert client.get_run(run.id).data.params == {
        "train.epochs": "10",
        "train.betas": "[0.9, 0.99]",
        "data.fallback": "None",
    }


def test_a_param_that_changes_becomes_a_tag_and_one_that_does_not_stays_as_it_is(run, client):
    run.log_params({"samples.seed": 1, "samples.rows": 4})
    run.log_params({"samples.seed": 2, "samples.rows": 4, "samples.cols": 18})

    data = client.get_run(run.id).data
    assert data.params == {"samples.seed": "1", "samples.rows": "4", "samples.cols": "18"}
    assert {name: value for name, value in data.tags.items() if name.startswith("samples.")} == {"samples.seed": "2"}


def test_tags_can_change(run, client):
    run.set_tags({"dataset": "digits"})
    run.set_tags({"dataset": "mnist"})

    assert client.get_run(run.id).data.tags["dataset"] == "mnist"


def test_image_frames_lie_in_one_folder_with_their_step(run, client):
    for step in (1, 2):
        run.log_image(np.full((56, 84), step, np.uint8), "samples", step=step)

    paths = [artifact.path for artifact in client.list_artifacts(run.id, "images")]
    frames = [path for path in paths if path.endswith(".png")]
    assert len(frames) == 2
    for step in (1, 2):
        assert sum(re.search(rf"samples\Wstep\W{step}\W", path) is not None for path in frames) == 1


def test_a_file_lies_under_its_own_folders_name(run, client, tmp_path):
    path = tmp_path / "plots" / "grid.png"
    path.parent.mkdir()
    path.write_bytes(b"a picture")

    run.log_file(path)

    assert [artifact.path for artifact in client.list_artifacts(run.id, "plots")] == ["plots/grid.png"]
    assert Path(client.download_artifacts(run.id, "plots/grid.png")).read_bytes() == b"a picture"


def test_the_description_shows_a_picture_over_its_text(run, client):
    run.describe("**157.3** nats per image", np.zeros((56, 84), np.uint8))

    picture, _, text = client.get_run(run.id).data.tags["mlflow.note.content"].partition("\n\n")
    assert text == "**157.3** nats per image"
    assert f"path=description.png&run_uuid={run.id}" in picture
    assert "description.png" in [artifact.path for artifact in client.list_artifacts(run.id)]


def test_the_data_set_is_an_input_with_its_digest(run, client):
    about = Dataset("digits", *(np.zeros((count, 28, 28), np.uint8) for count in (9, 9, 3, 3))).about()

    run.log_dataset(about)

    (given,) = client.get_run(run.id).inputs.dataset_inputs
    assert given.dataset.name == "digits"
    assert len(given.dataset.digest) >= 8
    assert about["digest"].startswith(given.dataset.digest)
    assert json.loads(given.dataset.profile) == {"train_images": 9, "test_images": 3}
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]


def test_artifacts_stay_in_the_workspace_wherever_the_process_works(workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = workspace / "metrics" / "train.json"
    path.parent.mkdir()
    path.write_text("{}")

    with start_run(workspace, "from elsewhere", {}) as run:
        run.log_file(path)

    assert (workspace / "mlruns" / EXPERIMENT / run.id / "artifacts" / "metrics" / "train.json").is_file()
    assert list(tmp_path.iterdir()) == []


# finding a run again


def test_a_later_stage_finds_the_run(workspace, client, run):
    resumed = resume_run(workspace, run.id)
    resumed.log_metrics({"test_loss": 154.06})

    assert resumed.id == run.id
    assert client.get_run(run.id).data.metrics == {"test_loss": 154.06}


def test_a_finished_run_stays_finished_when_more_is_logged(workspace, client):
    with start_run(workspace, "trained", {}) as run:
        pass

    resume_run(workspace, run.id).log_metrics({"test_loss": 154.06})

    assert client.get_run(run.id).info.status == "FINISHED"


def test_an_unknown_run_gets_one_in_its_place_which_every_later_stage_finds(fresh):
    before = run_count(fresh)

    first, second = resume_run(fresh, UNKNOWN), resume_run(fresh, UNKNOWN)

    assert first.id == second.id != UNKNOWN
    assert run_count(fresh) == before + 1
    stored = client_of(fresh).get_run(first.id)
    assert stored.data.tags["replaces_run"] == UNKNOWN
    assert stored.info.status == "FINISHED"


def test_two_unknown_runs_get_one_each(fresh):
    assert resume_run(fresh, UNKNOWN).id != resume_run(fresh, UNKNOWN[::-1]).id


def test_a_deleted_run_gets_one_in_its_place_which_every_later_stage_finds(fresh):
    with start_run(fresh, "deleted", {}) as deleted:
        pass
    client_of(fresh).delete_run(deleted.id)
    before = run_count(fresh)

    first, second = resume_run(fresh, deleted.id), resume_run(fresh, deleted.id)

    assert first.id == second.id != deleted.id
    assert run_count(fresh) == before + 1
    assert client_of(fresh).get_run(first.id).data.tags["replaces_run"] == deleted.id


@pytest.mark.parametrize("run_id", ["", "not an id", "it's"])
def test_what_is_no_id_is_a_users_problem(workspace, run_id):
    with pytest.raises(UserError, match=re.escape(f'Invalid value "{run_id}"')) as error:
        resume_run(workspace, run_id)

    assert "\n" not in str(error.value)


# which store


def test_another_store_can_be_named(workspace, fresh, monkeypatch, tmp_path):
    before = run_count(workspace)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{fresh / 'mlflow.db'}")

    with start_run(workspace, "to the other store", {}) as run:
        pass

    assert client_of(fresh).get_run(run.id).info.run_name == "to the other store"
    assert run_count(workspace) == before


def test_a_server_that_does_not_answer_is_a_users_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, but nobody listens
        uri = f"http://127.0.0.1:{held.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

        with pytest.raises(UserError, match=rf"store {uri} does not open: .*MLFLOW_TRACKING_URI"):
            resume_run(tmp_path, UNKNOWN)
        with pytest.raises(UserError, match=uri), start_run(tmp_path, "never", {}):
            pass


def test_an_address_of_no_known_kind_is_a_users_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://example.org")

    with pytest.raises(UserError, match=r"store gopher://example\.org does not open"):
        resume_run(tmp_path, UNKNOWN)


def test_a_damaged_database_is_a_users_problem(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is no database " * 100)

    with pytest.raises(UserError, match=r"mlflow\.db does not open"):
        resume_run(tmp_path, UNKNOWN)


def test_a_deleted_experiment_is_answered_with_the_way_to_get_it_back(fresh):
    client = client_of(fresh)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    client.delete_experiment(experiment)

    with pytest.raises(UserError, match=rf"`mlflow experiments restore --experiment-id {experiment}`"):
        resume_run(fresh, UNKNOWN)


def test_mlflow_sends_nothing_home():
    program = f"import sys; sys.path[:0] = {sys.path!r}\nimport mnist_vae.tracking.store, mlflow.telemetry\n"
    program += "print(mlflow.telemetry.get_telemetry_client())"
    plain = {
        name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ
    }  # pytest and CI are silent anyway
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=plain)

    assert answer.stdout.strip() == "None"


# two processes at once


def both(program, *arguments):
    """Start a program twice at the same time; what each printed."""
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{program}", *map(str, arguments)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors for _, errors in answers)
    return [printed.strip() for printed, _ in answers]


@pytest.mark.slow
def test_two_processes_may_make_a_fresh_store_at_once(tmp_path):
    program = """
from pathlib import Path
from mnist_vae.tracking.store import start_run
with start_run(Path(sys.argv[1]), "one of two", {}) as run:
    run.log_metrics({"loss": 1.0})
print(run.id)
"""
    first, second = both(program, tmp_path)

    assert first != second
    for run_id in (first, second):
        stored = client_of(tmp_path).get_run(run_id)
        assert (stored.info.status, stored.data.metrics) == ("FINISHED", {"loss": 1.0})


@pytest.mark.slow
def test_two_stages_at_once_agree_on_the_run_in_place_of_an_unknown_one(fresh):
    program = """
import os, time
from pathlib import Path
from mnist_vae.tracking.store import MlflowClient, resume_run
workspace = Path(sys.argv[1])

def search_runs(*args, search=MlflowClient.search_runs, **kwargs):
    found = search(*args, **kwargs)
    time.sleep(2)  # time for the other one to look too, and to find as little
    return found

MlflowClient.search_runs = search_runs
(workspace / f"ready-{os.getpid()}").touch()
while len(list(workspace.glob("ready-*"))) < 2:
    time.sleep(0.01)
print(resume_run(workspace, sys.argv[2]).id)
"""
    first, second = both(program, fresh, UNKNOWN)

    assert first == second
