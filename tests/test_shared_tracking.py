"""deploy/: one tracking server for several people, on PostgreSQL, in front of which nobody gets without a password.

What needs the server is marked ``shared`` (make test-shared).
"""

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient
from ruamel.yaml import YAML

from benchmarks.tracking import shared_database, storm
from mnist_vae.model.model_file import SavedModel, save_model
from mnist_vae.model.vae import VAE, VAEConfig
from mnist_vae.tracking.registry import REGISTERED
from tests.pipeline import TINY, clone_working_tree, run, set_params
from tests.tracking import EPOCHS, FINGERPRINT, REPOSITORY, clean_environment
from tests.tracking import run as program
from tools.deployment import SERVER, postgres_program, postgresql, psql, tracking_server

NEEDED = ("flask_wtf", "psycopg")  # pip install '.[server]'
ALLOWED_HOSTS = "MLFLOW_SERVER_ALLOWED_HOSTS"
SECRETS = {"MLFLOW_AUTH_ADMIN_PASSWORD": "correct horse battery", "MLFLOW_FLASK_SERVER_SECRET_KEY": "a key"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server of deploy/, with an empty database."""
    if postgres_program("initdb") is None:
        pytest.skip("needs PostgreSQL (Debian: postgresql)")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs the Python packages {', '.join(missing)} (the extra server)")
    folder, hosts = tmp_path_factory.mktemp("server"), {ALLOWED_HOSTS: documented(ALLOWED_HOSTS)}
    with postgresql(safe=False) as database, tracking_server(folder, database, **hosts) as server:
        yield server


def documented(variable: str) -> str:
    """The value that docs/sharing.md gives a variable."""
    return re.search(rf"`{variable}=(\S+)`", (REPOSITORY / "docs/sharing.md").read_text())[1]


@pytest.fixture(scope="module")
def ada(server):
    """The variables of a user."""
    return server.add_user("ada")


# its settings


@pytest.mark.parametrize("missing", SECRETS)
@pytest.mark.parametrize("value", [None, ""])
def test_the_server_does_not_start_without_its_secrets(tmp_path, missing, value):
    given = SECRETS | ({missing: value} if value is not None else {})
    env = clean_environment(**{name: given[name] for name in given if name != missing or value is not None})

    done = subprocess.run([SERVER], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"mlflow-server.sh: {missing} is not set; ")
    assert "correct horse" not in line
    assert list(tmp_path.iterdir()) == []


def test_the_server_wants_a_password_that_is_not_short(tmp_path):
    env = clean_environment(**SECRETS | {"MLFLOW_AUTH_ADMIN_PASSWORD": "admin"})

    done = subprocess.run([SERVER], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "at least 12 characters" in done.stderr


def started_with(folder: Path, **settings: str) -> dict[str, str]:
    """The arguments and the environment with which the script starts ``mlflow``."""
    program = folder / "bin/mlflow"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "arguments=$*"\nenv\n')
    program.chmod(0o755)
    env = clean_environment(**SECRETS, **settings)
    env["PATH"] = f"{program.parent}:{os.defpath}"
    printed = subprocess.run([SERVER], cwd=folder, env=env, capture_output=True, text=True, check=True).stdout
    return dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)


def test_the_server_listens_to_this_machine_only_unless_it_is_told_otherwise(tmp_path):
    assert started_with(tmp_path)["MLFLOW_HOST"] == "127.0.0.1"


def test_the_server_keeps_secrets_out_of_the_command_line(tmp_path):
    started = started_with(tmp_path, PGPASSWORD="s3cret", MLFLOW_HOST="0.0.0.0")

    assert started["arguments"] == "server --app-name basic-auth"
    assert (started["MLFLOW_HOST"], started["PGDATABASE"], started["PGPASSWORD"]) == ("0.0.0.0", "mlflow", "s3cret")


def test_the_compose_file_starts_the_same_server_with_secrets_from_outside():
    compose = YAML(typ="safe").load(REPOSITORY / "deploy/compose.yaml")
    server, database = compose["services"]["server"], compose["services"]["database"]

    assert server["command"] == ["deploy/mlflow-server.sh"]
    assert all(port.startswith("${MLFLOW_PUBLISH:-127.0.0.1}:") for port in server["ports"])
    assert "ports" not in database
    for name, value in {**server["environment"], **database["environment"]}.items():
        if "PASSWORD" in name or "SECRET" in name:
            assert re.fullmatch(r"\$\{\w+:\?.+\}", value), name


@pytest.mark.shared
@pytest.mark.parametrize(
    ("host", "status"), [("mlflow.example.org", 200), ("mlflow.example.org:8443", 200), ("other.example.org", 403)]
)
def test_the_server_answers_to_the_names_that_it_was_given_only(server, ada, host, status):
    who = (ada["MLFLOW_TRACKING_USERNAME"], ada["MLFLOW_TRACKING_PASSWORD"])

    answer = requests.get(f"{server.uri}/api/2.0/mlflow/users/current", auth=who, headers={"Host": host}, timeout=30)

    assert answer.status_code == status


# runs


@pytest.mark.shared
def test_a_pipeline_is_complete_on_the_server_and_a_wrong_password_costs_a_warning_only(server, ada, tmp_path):
    clone = clone_working_tree(tmp_path / "mnist-vae")
    set_params(clone, TINY | {"train.epochs": 2})
    wrong = ada | {"MLFLOW_TRACKING_PASSWORD": "not ada's password"}

    trained = run(clone, "dvc", "repro", "train", env=wrong)

    (warning,) = [line for line in trained.stderr.splitlines() if "WARNING" in line]
    assert "MLflow has not received everything" in warning
    assert "MLFLOW_TRACKING_PASSWORD" in warning
    assert (clone / "models/vae.safetensors").is_file()

    whole = run(clone, "dvc", "repro", env=ada)

    assert "MLflow has not received everything" not in whole.stderr
    assert not (clone / "mlflow.db").exists()
    client = MlflowClient(server.uri.replace("//", f"//ada:{server.users['ada']}@"))
    (experiment,) = [one for one in client.search_experiments() if one.name == "mnist-vae"]
    (found,) = client.search_runs([experiment.experiment_id])
    run_id = found.info.run_id
    assert found.info.status == "FINISHED"
    assert found.info.artifact_uri.startswith("mlflow-artifacts:/")
    for metric in ("train/loss", "train/kld"):
        assert [point.step for point in client.get_metric_history(run_id, metric)] == [1, 2]
    stored = {artifact.path for artifact in client.list_artifacts(run_id, "plots")}
    assert {"plots/grid.png", "plots/samples.png", "plots/latents.csv"} <= stored
    assert (Path(client.download_artifacts(run_id, "plots/grid.png", str(tmp_path))).read_bytes()) == (
        clone / "plots/grid.png"
    ).read_bytes()
    for name in REGISTERED.values():
        (version,) = client.search_model_versions(f"name = '{name}'")
        assert version.run_id == run_id
        assert client.get_registered_model(name).aliases == {"champion": version.version}

    told = [*trained.stdout, *trained.stderr, *whole.stdout, *whole.stderr]
    kept = [path.read_bytes() for folder in ("journal", ".dvc/tmp") for path in (clone / folder).rglob("*.json*")]
    tables = [json.dumps(psql(server.database, f"select * from {name}")) for name in ("tags", "params", "runs")]
    for secret in (server.users["ada"], wrong["MLFLOW_TRACKING_PASSWORD"], server.password):
        assert secret not in "".join(told)
        assert not any(secret.encode() in content for content in kept)
        assert secret not in "".join(tables)
        assert secret not in (server.folder / "log").read_text()


AT_ONCE = """
import torch
from mnist_vae.tracking import delivery, registry
from mnist_vae.tracking.journal import Journal
from mnist_vae.tracking.store import Store
from tests.tracking import FINGERPRINT, tell
torch.set_num_threads(1)

def at_once(number, work):
    children = []
    for place in range(number):
        child = os.fork()
        if child == 0:
            try:
                folder = workspace / f"workspace-{place}"
                folder.mkdir()
                work(place, folder)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * number

def together(number):  # wait until all are here
    (workspace / f"ready-{os.getpid()}").touch()
    while len(list(workspace.glob("ready-*"))) < number:
        time.sleep(0.01)
"""

REGISTER = """
numbers = [float(text) for text in sys.argv[3:]]

def register(place, folder):
    store = Store(folder)
    run_id = store.create_run(f"of {numbers[place]}", "main", f"of {numbers[place]}", 1).info.run_id
    together(len(numbers))
    registry.register_models(store, run_id, Path(sys.argv[2]), {"dataset": "ten at once"}, numbers[place])

at_once(len(numbers), register)
"""

CHAMPIONS = """
select model_versions.name, runs.name from registered_model_aliases join model_versions using (name, version)
join runs on runs.run_uuid = model_versions.run_id order by 1
"""


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "vae.safetensors"
    save_model(path, SavedModel(VAE(VAEConfig((8,), 2)), "MNIST", [1.0, 0.5], FINGERPRINT))
    return path


@pytest.mark.shared
def test_of_ten_that_register_at_once_decoder_and_encoder_of_the_best_are_champions(server, tmp_path, model_file):
    psql(server.database, "delete from registered_model_aliases")
    numbers = [150.0, 149.0, 155.0, 148.5, 160.0, 148.0, 151.0, 149.5, 152.0, 148.25]

    program(AT_ONCE + REGISTER, tmp_path, model_file, *numbers, **server.add_user("grace"))

    best = [["mnist-vae-decoder", "of 148.0"], ["mnist-vae-encoder", "of 148.0"]]
    assert psql(server.database, CHAMPIONS) == best
    tagged = "select count(*) from model_version_tags where key = 'dataset' and value = 'ten at once'"
    assert psql(server.database, tagged) == [["20"]]


SEND = """
def send(place, folder):
    journal = tell(folder)
    found = delivery.Delivery(Store(folder), journal)
    together(4)
    found.send()
    delivery.Delivery(Store(folder), journal).send()

at_once(4, send)
"""


@pytest.mark.shared
def test_of_four_clones_that_send_one_training_at_once_one_run_is_left(server, tmp_path):
    program(AT_ONCE + SEND, tmp_path, **server.add_user("mary"))

    tagged = f"join tags using (run_uuid) where key = 'fingerprint' and value = '{FINGERPRINT}'"
    kept = "run_uuid in (select run_uuid from tags where key = 'place' and value = 'main')"
    runs = psql(
        server.database, f"select run_uuid, status from runs {tagged} and lifecycle_stage = 'active' and {kept}"
    )
    ((run_id, status),) = runs
    assert status == "FINISHED"
    metrics = f"select step, value from metrics where run_uuid = '{run_id}' and key = 'train/loss' order by 1"
    told = {(int(step), float(value)) for step, value in psql(server.database, metrics)}  # the same by each
    assert told == {(epoch, 200.0 - epoch) for epoch in EPOCHS}


# many at once


@pytest.mark.shared
def test_many_runs_at_once_are_all_complete_on_the_server(server, tmp_path):
    storm(tmp_path, server.add_user("storm"), workspaces=4, runs=3, epochs=3)


@pytest.mark.shared
def test_many_runs_at_once_are_all_complete_in_one_sqlite_database(tmp_path):
    storm(tmp_path, shared_database(tmp_path), workspaces=4, runs=3, epochs=3)
