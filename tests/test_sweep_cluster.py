"""A sweep over three Dask workers in three folders, as on three machines: git, DVC and MLflow are all they share.

SWEEP_EXPERIMENTS=24 runs that many experiments of the whole pipeline, recorded by deploy/ on PostgreSQL, instead of a
few of its first three stages, recorded in SQLite.
"""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from ruamel.yaml import YAML

from mnist_vae.tracking.store import EXPERIMENT
from tests.pipeline import TINY, clone_working_tree, commit, environment, run, set_params
from tools.clone import git
from tools.deployment import postgres_program, postgresql, tracking_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="needs the extra: sweep"),
]

ASKED_FOR = int(os.environ.get("SWEEP_EXPERIMENTS", "0"))
EXPERIMENTS = ASKED_FOR or 6
WORKERS = 3
LIMIT_S = 120 + 60 * EXPERIMENTS  # for all, on a busy machine
EPOCHS = 2


def seeds() -> str:
    return ",".join(str(seed) for seed in range(1, EXPERIMENTS + 1))


@pytest.fixture
def author(tmp_path: Path) -> Path:
    """A clone with everything that a sweep over machines needs: a git remote, a DVC remote with the data in it."""
    author = clone_working_tree(tmp_path / "author")
    set_params(author, TINY | {"train.epochs": EPOCHS})
    if not ASKED_FOR:
        keep_stages(author, "download", "train", "evaluate")
    run(author, "dvc", "remote", "add", "--default", "storage", tmp_path / "storage")
    run(author, "dvc", "repro", "download")
    commit(author, "A sweep's first commit")
    run(author, "dvc", "push", "--run-cache", "data/dataset", "data/dataset.json")
    git("init", "--quiet", "--bare", str(tmp_path / "origin"))
    git("remote", "add", "origin", str(tmp_path / "origin"), folder=author)
    git("push", "--quiet", "origin", "main", folder=author)
    return author


def keep_stages(folder: Path, *names: str) -> None:
    """Leave only some stages in dvc.yaml."""
    yaml, path = YAML(), folder / "dvc.yaml"
    pipeline = yaml.load(path)
    for name in set(pipeline["stages"]) - set(names):
        del pipeline["stages"][name]
    yaml.dump(pipeline, path)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The variables that lead to an MLflow store which all see, with a place for artifacts that all can write."""
    if not ASKED_FOR:
        uri = f"sqlite:///{tmp_path / 'store.db'}"
        MlflowClient(uri).create_experiment(EXPERIMENT, (tmp_path / "artifacts").as_uri())
        yield {"MLFLOW_TRACKING_URI": uri}
        return
    if not postgres_program("initdb"):
        pytest.skip("PostgreSQL is not installed")
    (tmp_path / "server").mkdir()
    with postgresql() as database, tracking_server(tmp_path / "server", database) as server:
        variables = server.add_user("sweeper")
        for name, value in variables.items():  # for this process's own client
            monkeypatch.setenv(name, value)
        yield variables


@contextmanager
def started(folder: Path, *arguments: str, **settings: str) -> Iterator[subprocess.Popen]:
    """A Python module as a process with its own folder, which does not outlive the block; it prints into a file."""
    folder.mkdir(exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=folder,
            env=environment(folder, **settings),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def scheduler(folder: Path):
    options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", "../scheduler.json"]
    return started(folder, "distributed.cli.dask_scheduler", *options)


def worker(folder: Path, store: dict[str, str]):
    options = ["--host", "127.0.0.1", "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    return started(folder, "distributed.cli.dask_worker", *options, "--scheduler-file", "../scheduler.json", **store)


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline, f"{what}: not after {LIMIT_S} s"
        time.sleep(0.2)


def experiments(origin: Path) -> list[str]:
    return git("for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps", folder=origin).split()


def test_a_sweep_survives_the_death_of_a_worker_and_of_its_driver(author, store, tmp_path):
    folders = [tmp_path / f"machine-{number}" for number in range(WORKERS)]
    with scheduler(tmp_path / "scheduler"):
        address = tmp_path / "scheduler.json"
        wait_until(lambda: address.is_file() and address.read_text().endswith("}"), "the scheduler has an address")
        settings = {
            "DASK_SCHEDULER_ADDRESS": json.loads(address.read_text())["address"],
            "PYTHONPATH": "src",
            **store,
        }
        sweep = ["sweep", "-S", f"train.seed={seeds()}"]
        with worker(folders[0], store) as doomed, worker(folders[1], store), worker(folders[2], store):
            with started(author, *sweep, **settings) as driver:

                def done(number: int) -> bool:
                    assert driver.poll() is None, (tmp_path / "author.log").read_text()
                    return len(experiments(tmp_path / "origin")) >= number

                wait_until(lambda: done(1), "a first experiment is done")
                doomed.kill()
                wait_until(lambda: done(2), "another one is done")
                driver.kill()
            with worker(folders[0], store):
                again = run(author, sys.executable, "-m", *sweep, env=settings, timeout=LIMIT_S)
                table = run(author, "dvc", "exp", "show", "--csv").stdout.splitlines()
                third = run(author, sys.executable, "-m", *sweep, env=settings, timeout=LIMIT_S)

    expected = sorted(f"train.seed={seed}" for seed in seeds().split(","))
    assert sorted(experiments(tmp_path / "origin")) == expected
    shown = [row["Experiment"] for row in csv.DictReader(table)]
    assert sorted(filter(None, shown)) == expected
    assert f"{EXPERIMENTS}/{EXPERIMENTS}" in again.stderr
    for name in expected:
        assert f"| {name}" in again.stdout
    assert third.stdout == again.stdout
    assert_complete_runs(MlflowClient(store["MLFLOW_TRACKING_URI"]), expected)
    assert_models_are_in_the_remote(author, tmp_path / "storage", expected)


def assert_complete_runs(client: MlflowClient, names: list[str]) -> None:
    """One finished run for each experiment, with every loss once."""
    found = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert sorted(one.data.tags["dvc_experiment"] for one in found) == names
    assert len({one.data.tags["fingerprint"] for one in found}) == len(names)
    for one in found:
        assert one.info.status == "FINISHED"
        assert one.data.tags["dvc_experiment"] == f"train.seed={one.data.params['train.seed']}"
        assert "test/elbo" in one.data.metrics
        steps = Counter(point.step for point in client.get_metric_history(one.info.run_id, "train/loss"))
        assert steps == dict.fromkeys(range(1, EPOCHS + 1), 1)
        files = {artifact.path for artifact in client.list_artifacts(one.info.run_id, "metrics")}
        assert "metrics/evaluate.json" in files


def assert_models_are_in_the_remote(author: Path, storage: Path, names: list[str]) -> None:
    """The data of each experiment is where its parameters and metrics say."""
    for name in names:
        lock = YAML(typ="safe").load(git("show", f"{reference_of(author, name)}:dvc.lock", folder=author))
        [md5] = [out["md5"] for out in lock["stages"]["train"]["outs"] if out["path"] == "models/vae.safetensors"]
        assert (storage / "files/md5" / md5[:2] / md5[2:]).is_file()


def reference_of(folder: Path, name: str) -> str:
    head = git("rev-parse", "HEAD", folder=folder).strip()
    return f"refs/exps/{head[:2]}/{head[2:]}/{name}"
