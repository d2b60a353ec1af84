"""Sweeps: experiments queued by DVC's grid syntax, run by two workers at once, each in a copy of the workspace."""

import io
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from mlflow.entities import Run

from mnist_vae.model.model_file import load_model
from tests.pipeline import environment, run, stages_run
from tests.runs import artifacts, main_run, stored_runs
from tests.tracking import copy_workspace

pytestmark = pytest.mark.slow

EXPERIMENTS = {"sweep-1": 2, "sweep-2": 3, "changed": 2}  # name: latent_dim
LIMIT = 300  # seconds for all of them; a minute and a half on an idle machine
IN_THE_CODE, IN_THE_CHANGED_CODE = '"torch": torch.__version__', '"torch": "changed code"'


@pytest.fixture(scope="module")
def swept(finished_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone without any store or journal, in which three queued experiments have run, one of them with other code."""
    clone = copy_workspace(finished_pipeline, tmp_path_factory.mktemp("sweep") / "mnist-vae")
    for folder in ("journal", "mlruns"):
        shutil.rmtree(clone / folder)
    for file in clone.glob("mlflow.db*"):
        file.unlink()
    queue = ["dvc", "exp", "run", "--queue", "--set-param", "train.epochs=1"]
    run(clone, *queue, "--name", "sweep", "--set-param", "model.latent_dim=2,3")

    train = clone / "stages" / "train.py"
    code = train.read_text()
    assert IN_THE_CODE in code
    train.write_text(code.replace(IN_THE_CODE, IN_THE_CHANGED_CODE))
    run(clone, *queue, "--name", "changed")
    train.write_text(code)

    assert states(clone) == dict.fromkeys(EXPERIMENTS, "Queued")
    with two_workers(clone):
        deadline = time.monotonic() + LIMIT
        while set(states(clone).values()) & {"Queued", "Running"}:
            assert time.monotonic() < deadline, f"not done after {LIMIT} s: {states(clone)}"
            time.sleep(3)
    return clone


@contextmanager
def two_workers(clone: Path) -> Iterator[None]:
    """Two workers for the queue, which are daemons; none outlives the block."""
    try:
        # Without pipes: the workers would inherit them, and whoever reads them would wait for the workers' end.
        nothing = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        start = ["dvc", "queue", "start", "--jobs", "2"]
        subprocess.run(start, cwd=clone, env=environment(clone), **nothing, check=True)
        yield
    finally:
        run(clone, "dvc", "queue", "stop", "--kill")
        for _ in range(30):
            if "Worker status: 0 active, 0 idle" in run(clone, "dvc", "queue", "status").stdout:
                break
            time.sleep(1)
        else:
            pytest.fail("a queue worker does not stop")


def states(clone: Path) -> dict[str, str]:
    """The state of each experiment of the queue: Queued, Running, Success or Failed."""
    status = run(clone, "dvc", "queue", "status").stdout
    return dict(re.findall(r"^[0-9a-f]{7}\s+(\S+)\s.*\s(\S+)\s*$", status, re.MULTILINE))


def mlflow_runs(clone: Path) -> dict[str, Run]:
    """The runs of the clone's own store by the name of their DVC experiment: one for each, and no other."""
    found = stored_runs(clone)
    assert sorted(one.data.tags["dvc_experiment"] for one in found) == sorted(EXPERIMENTS)
    return {one.data.tags["dvc_experiment"]: one for one in found}


def test_every_experiment_succeeds(swept):
    for name, state in states(swept).items():
        log = run(swept, "dvc", "queue", "logs", name, check=False).stdout
        assert state == "Success", log
        assert "Traceback" not in log


def test_all_are_in_the_store_of_the_main_workspace(swept):
    for name, one in mlflow_runs(swept).items():
        assert one.info.status == "FINISHED"
        assert one.data.params["train.epochs"] == "1"
        assert one.data.params["model.latent_dim"] == str(EXPERIMENTS[name])
        assert one.data.params["grid.size"] == "3"  # the last stage logged into it too
        assert "test/elbo" in one.data.metrics


def test_all_have_their_artifacts_in_the_main_workspace(swept):
    for one in mlflow_runs(swept).values():
        folder = swept / "mlruns" / "mnist-vae" / one.info.run_id / "artifacts"
        assert one.info.artifact_uri == folder.as_uri()
        expected = {"models/vae.safetensors", "metrics/evaluate.json", "plots/losses.csv", "plots/grid.png"}
        assert expected <= artifacts(one).keys()


def test_each_runs_the_code_that_it_was_queued_with(swept):
    tags = {name: one.data.tags for name, one in mlflow_runs(swept).items()}
    assert {name for name in tags if tags[name]["torch"] == "changed code"} == {"changed"}
    assert len({one["fingerprint"] for one in tags.values()}) == 3
    assert IN_THE_CODE in (swept / "stages" / "train.py").read_text()


def test_the_workspace_is_as_before(swept):
    assert run(swept, "git", "status", "--porcelain").stdout == ""


def test_exp_show_has_a_row_for_each(swept):
    shown = pd.read_csv(io.StringIO(run(swept, "dvc", "exp", "show", "--csv").stdout))
    rows = shown[shown["Experiment"].isin(EXPERIMENTS)].set_index("Experiment")
    assert rows["model.latent_dim"].to_dict() == EXPERIMENTS
    assert rows.loc["sweep-1", "elbo"] != rows.loc["sweep-2", "elbo"]
    # The changed line changes no result.
    assert rows.loc["sweep-1", "elbo"] == rows.loc["changed", "elbo"]
    stored = {name: one.data.metrics["test/elbo"] for name, one in mlflow_runs(swept).items()}
    assert rows["elbo"].to_dict() == pytest.approx(stored)


def test_the_narrow_table_tells_them_apart(swept):
    table = run(swept, "make", "--assume-old=.venv/ready", "table", env={"COLUMNS": "80"}).stdout
    assert all(re.search(rf"\[{name}\].* {latent_dim} *\|$", table, re.M) for name, latent_dim in EXPERIMENTS.items())


def test_exp_diff_tells_two_apart(swept):
    difference = run(swept, "dvc", "exp", "diff", "sweep-1", "sweep-2").stdout
    assert re.search(r"metrics/evaluate\.json\s+elbo\s", difference)
    assert re.search(r"params\.yaml\s+model\.latent_dim\s+2\s+3\s+1", difference)


def test_exp_branch_makes_a_branch_of_one(swept):
    run(swept, "dvc", "exp", "branch", "sweep-2", "three")
    assert "latent_dim: 3" in run(swept, "git", "show", "three:params.yaml").stdout


def test_exp_apply_brings_one_with_its_model_and_run(swept, tmp_path):
    clone = copy_workspace(swept, tmp_path / "mnist-vae")
    run(clone, "dvc", "exp", "apply", "sweep-2")
    assert load_model(clone / "models/vae.safetensors").vae.config.latent_dim == 3
    assert main_run(clone).info.run_id == mlflow_runs(swept)["sweep-2"].info.run_id
    assert stages_run(run(clone, "dvc", "repro").stdout) == []
