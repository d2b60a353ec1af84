"""The pipeline from end to end, as a user runs it: DVC in a clone of the repository, on a small data set."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from ruamel.yaml import YAML

from mnist_vae.params import load_params
from mnist_vae.evaluation.model_card import meaning_of
from tests.pipeline import run, set_params, stages_run

pytestmark = pytest.mark.slow

STAGES = ["download", "train", "evaluate", "render_samples", "render_grid"]
PICTURES = ["grid", "latents", "losses", "nll", "reconstructions", "samples", "traversal"]
NOBODY = "http://127.0.0.1:9"  # the discard port: connections are refused


def outputs(clone: Path) -> dict[str, Path]:
    """Every output of every stage."""
    stages = YAML(typ="safe").load(clone / "dvc.lock")["stages"]
    return {out["path"]: clone / out["path"] for stage in stages.values() for out in stage["outs"]}


def contents(clone: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in outputs(clone).items()}


def only_run(clone: Path):
    client = MlflowClient(f"sqlite:///{clone / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mnist-vae")
    [found] = client.search_runs([experiment.experiment_id])
    return client, found


def test_all_artifacts_are_made(finished_pipeline):
    assert all(path.is_file() for path in outputs(finished_pipeline).values())
    assert {f"plots/{name}.png" for name in PICTURES} <= outputs(finished_pipeline).keys()
    assert torch.load(finished_pipeline / "models/vae.pt", weights_only=True)["weights"]


def test_losses_have_one_row_per_epoch(finished_pipeline):
    losses = pd.read_csv(finished_pipeline / "plots/losses.csv")
    assert losses["epoch"].tolist() == [1, 2]
    assert np.allclose(losses["loss"], losses["bce"] + losses["kld"])


def test_metrics_are_flat_and_explained(finished_pipeline):
    metrics = json.loads((finished_pipeline / "metrics/evaluate.json").read_text())
    assert metrics["dataset"] == "digits"
    assert metrics["images"] == 359
    about = {"dataset", "binarize", "images", "test_sha256"}
    assert all(meaning_of(name).text for name in metrics.keys() - about)
    assert metrics["loss"] == pytest.approx(metrics["bce"] + metrics["kld"])
    assert metrics["nll"] < metrics["loss"]


def test_latent_map_has_one_row_per_test_image(finished_pipeline):
    codes = pd.read_csv(finished_pipeline / "plots/latents.csv")
    assert list(codes.columns) == ["digit", "z0", "z1"]
    assert len(codes) == 359


def test_one_mlflow_run_has_everything(finished_pipeline):
    client, found = only_run(finished_pipeline)
    assert found.info.run_id == (finished_pipeline / "models/run_id").read_text().strip()
    assert found.info.status == "FINISHED"

    params = load_params(finished_pipeline / "params.yaml")
    expected = params.flat("data", "model", "train", "evaluate", "samples", "grid")
    assert found.data.params == {name: str(value) for name, value in expected.items()}

    digest = json.loads((finished_pipeline / "data/dataset.json").read_text())["digest"]
    assert found.data.tags["dataset"] == "digits"
    assert found.data.tags["dataset_digest"] == digest
    head = run(finished_pipeline, "git", "rev-parse", "HEAD~1").stdout.strip()  # the commit that it ran on
    assert found.data.tags["git_commit"] == head
    assert found.data.tags["git_dirty"] == "true"  # params.yaml was changed

    history = client.get_metric_history(found.info.run_id, "train_loss")
    assert [point.step for point in history] == [1, 2]
    evaluated = json.loads((finished_pipeline / "metrics/evaluate.json").read_text())
    assert found.data.metrics["test_nll"] == evaluated["nll"]

    artifacts = finished_pipeline / "mlruns/mnist-vae" / found.info.run_id / "artifacts"
    logged = {path.relative_to(artifacts).as_posix() for path in artifacts.rglob("*") if path.is_file()}
    assert {name for name in outputs(finished_pipeline) if name.startswith(("plots/", "metrics/"))} <= logged
    assert sorted(name[:21] for name in logged if name.startswith("images/") and name.endswith(".png")) == [
        "images/samples+step+1",
        "images/samples+step+2",
    ]


def test_nothing_runs_twice(pipeline):
    again = run(pipeline, "dvc", "repro").stdout
    assert stages_run(again) == []
    assert "up to date" in again


def test_a_parameter_reruns_what_depends_on_it_and_back_comes_from_the_cache(pipeline):
    before = contents(pipeline)
    set_params(pipeline, {"grid.size": 4})
    assert stages_run(run(pipeline, "dvc", "repro").stdout) == ["render_grid"]
    assert contents(pipeline)["plots/grid.png"] != before["plots/grid.png"]

    set_params(pipeline, {"grid.size": 3})
    assert stages_run(run(pipeline, "dvc", "repro").stdout) == []
    assert contents(pipeline) == before
    assert "up to date" in run(pipeline, "dvc", "status").stdout


def test_two_forced_runs_give_equal_bytes(pipeline):
    before = contents(pipeline)
    assert stages_run(run(pipeline, "dvc", "repro", "--force").stdout) == STAGES
    after = contents(pipeline)
    assert after.pop("models/run_id") != before.pop("models/run_id")
    # The card names git's commit, and the fixture has made one since.
    after.pop("metrics/report.md"), before.pop("metrics/report.md")
    assert {name for name in after if after[name] != before[name]} == set()


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("train.batch_size", 0, "train: params.yaml: train.batch_size is 0; it must be at least 1"),
        ("grid.size", "many", "render_grid: params.yaml: grid.size is 'many'; it must be a whole number"),
        ("train.validation_size", 10**6, "train.validation_size is 1000000; it must be less than the 46016"),
    ],
)
def test_a_bad_parameter_is_one_line_and_loses_nothing(pipeline, parameter, value, message):
    before = contents(pipeline)
    set_params(pipeline, {parameter: value})
    failed = run(pipeline, "dvc", "repro", check=False)
    assert failed.returncode != 0
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
    assert contents(pipeline) == before


def test_a_foreign_model_is_one_line_and_loses_nothing(pipeline):
    model = pipeline / "models/vae.pt"
    model.unlink()
    torch.save({"weights": {}}, model)
    before = contents(pipeline)
    failed = run(pipeline, sys.executable, "-m", "stages", "evaluate", check=False)
    assert failed.returncode == 1
    assert "models/vae.pt is a torch file, but no model of this project" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert contents(pipeline) == before


def test_a_lost_output_of_a_failed_stage_comes_back_from_git_where_the_cache_is_empty(pipeline):
    shutil.rmtree(pipeline / ".dvc/cache")
    set_params(pipeline, {"samples.rows": 0})
    before = (pipeline / "plots/samples.png").read_bytes()
    assert run(pipeline, "dvc", "repro", "--single-item", "render_samples", check=False).returncode != 0
    assert (pipeline / "plots/samples.png").read_bytes() == before


def test_without_any_mirror_the_embedded_digits_are_announced(pipeline):
    set_params(pipeline, {"data.dataset": "mnist"})
    offline = {"MNIST_MIRROR": "", "http_proxy": NOBODY, "https_proxy": NOBODY}
    said = run(pipeline, "dvc", "repro", "download", env=offline)
    assert "GOING ON WITHOUT MNIST" in said.stderr
    assert "dvc repro download --force" in said.stderr
    about = json.loads((pipeline / "data/dataset.json").read_text())
    assert (about["asked_for"], about["name"]) == ("mnist", "digits")

    set_params(pipeline, {"data.fallback": None})
    failed = run(pipeline, "dvc", "repro", "download", env=offline, check=False)
    assert failed.returncode != 0
    assert "no mirror of MNIST answers" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_wrong_mirror_is_one_line_and_loses_nothing(pipeline):
    set_params(pipeline, {"data.dataset": "mnist"})
    before = contents(pipeline)
    failed = run(pipeline, "dvc", "repro", env={"MNIST_MIRROR": "no/such/folder"}, check=False)
    assert failed.returncode != 0
    assert "no/such/folder/train-images-idx3-ubyte.gz does not exist" in failed.stderr
    assert contents(pipeline) == before


def test_dvc_finds_the_environment_without_its_activation(pipeline):
    (pipeline / ".venv").symlink_to(sys.prefix)
    set_params(pipeline, {"samples.rows": 1})
    bare = os.pathsep.join(["/usr/bin", "/bin"])
    done = run(pipeline, pipeline / ".venv/bin/dvc", "repro", "render_samples", env={"PATH": bare})
    assert stages_run(done.stdout) == ["render_samples"]


def test_dvc_commands_read_well(pipeline):
    set_params(pipeline, {"samples.rows": 1})
    assert "samples.rows" in run(pipeline, "dvc", "params", "diff").stdout
    shown = run(pipeline, "dvc", "metrics", "show").stdout
    assert "nll" in shown
    assert "report.md" not in shown
    graph = run(pipeline, "dvc", "dag").stdout
    assert all(stage in graph for stage in STAGES)
    described = run(pipeline, "dvc", "stage", "list").stdout.splitlines()
    assert len(described) == len(STAGES)
    assert all(len(line.split(maxsplit=1)) == 2 and "Outputs" not in line for line in described)


def test_black_and_white_results_have_names_of_their_own(pipeline):
    set_params(pipeline, {"data.binarize": "dynamic", "train.epochs": 1})
    run(pipeline, "dvc", "repro")
    metrics = json.loads((pipeline / "metrics/evaluate.json").read_text())
    assert metrics["binarize"] == "dynamic"
    assert "nll_dynamic" in metrics
    assert "nll" not in metrics
    assert "train_loss_dynamic" in json.loads((pipeline / "metrics/train.json").read_text())


def test_one_latent_dimension_runs_through(pipeline):
    set_params(pipeline, {"model.latent_dim": 1, "train.epochs": 1})
    run(pipeline, "dvc", "repro")
    assert json.loads((pipeline / "metrics/evaluate.json").read_text())["nll_method"] == "quadrature"
    assert "index.html" in run(pipeline, "dvc", "plots", "show").stdout


def test_five_latent_dimensions_run_through(pipeline):
    set_params(pipeline, {"model.latent_dim": 5, "train.epochs": 1})
    run(pipeline, "dvc", "repro")
    metrics = json.loads((pipeline / "metrics/evaluate.json").read_text())
    assert metrics["nll_method"] == "importance sampling, K = 4"
    assert {f"kld_z{dim}" for dim in range(5)} <= metrics.keys()
