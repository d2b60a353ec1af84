"""The pipeline from end to end, as a user runs it: DVC in a clone of the repository, on a small data set."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file

from mnist_vae.evaluation.model_card import meaning_of
from mnist_vae.model.model_file import load_model
from mnist_vae.params import load_params
from tests.pipeline import run, set_params, stages_run
from tests.runs import artifacts, children, client_of, main_run, stored_runs
from tests.tracking import copy_workspace

pytestmark = pytest.mark.slow

STAGES = ["download", "train", "evaluate", "render_samples", "render_grid"]
PICTURES = ["grid", "latents", "losses", "nll", "reconstructions", "samples", "traversal"]
NOBODY = "http://127.0.0.1:9"  # the discard port: connections are refused
OFFLINE = {"MNIST_MIRROR": "", "http_proxy": NOBODY, "https_proxy": NOBODY}


def outputs(clone: Path) -> dict[str, Path]:
    """Every output of every stage; of a folder, the files in it."""
    stages = YAML(typ="safe").load(clone / "dvc.lock")["stages"]
    paths = [clone / out["path"] for stage in stages.values() for out in stage["outs"]]
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    return {file.relative_to(clone).as_posix(): file for file in files}


def contents(clone: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in outputs(clone).items()}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


# what a run makes


def test_all_artifacts_are_made(finished_pipeline):
    assert all(path.is_file() for path in outputs(finished_pipeline).values())
    assert {f"plots/{name}.png" for name in PICTURES} <= outputs(finished_pipeline).keys()
    assert load_model(finished_pipeline / "models/vae.safetensors").dataset == "scikit-learn digits (not MNIST)"


def test_losses_have_one_row_per_epoch(finished_pipeline):
    losses = pd.read_csv(finished_pipeline / "plots/losses.csv")
    assert losses["epoch"].tolist() == [1, 2]
    assert np.allclose(losses["loss"], losses["bce"] + losses["kld"])


def test_metrics_are_flat_and_explained(finished_pipeline):
    metrics = read_json(finished_pipeline / "metrics/evaluate.json")
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


def test_likelihoods_are_a_table_of_test_images_with_the_mean_and_error_of_the_metrics(finished_pipeline):
    table = pd.read_csv(finished_pipeline / "plots/nll.csv")
    metrics = read_json(finished_pipeline / "metrics/evaluate.json")
    assert list(table.columns) == ["digit", "nll"]
    assert len(table) == 359
    assert table["nll"].mean() == pytest.approx(metrics["nll"], abs=1e-5)
    assert table["nll"].sem() == pytest.approx(metrics["nll_se"], abs=1e-5)


def test_the_card_names_the_training_by_its_fingerprint(finished_pipeline):
    card = (finished_pipeline / "metrics/report.md").read_text()
    assert load_model(finished_pipeline / "models/vae.safetensors").fingerprint in card
    assert run(finished_pipeline, "git", "rev-parse", "HEAD~1").stdout[:7] not in card


# what MLflow has of it


def test_one_mlflow_run_has_all_parameters_and_tags(finished_pipeline):
    [found] = stored_runs(finished_pipeline)
    assert found.info.status == "FINISHED"

    params = load_params(finished_pipeline / "params.yaml")
    expected = params.flat("data", "model", "train", "evaluate", "samples", "grid")
    assert found.data.params == {name: str(value) for name, value in expected.items()}

    fingerprint = load_model(finished_pipeline / "models/vae.safetensors").fingerprint
    commit = run(finished_pipeline, "git", "rev-parse", "HEAD~1").stdout.strip()  # the one that it ran on
    expected = {
        "fingerprint": fingerprint,
        "dataset": "digits",
        "dataset_digest": read_json(finished_pipeline / "data/dataset.json")["digest"],
        "git_commit": commit,
        "git_dirty": "true",  # params.yaml was changed
    }
    assert expected.items() <= found.data.tags.items()


def test_one_mlflow_run_has_all_metrics_in_groups(finished_pipeline):
    client, found = client_of(finished_pipeline), main_run(finished_pipeline)
    losses = pd.read_csv(finished_pipeline / "plots/losses.csv")
    for name in ("loss", "bce", "kld"):
        history = client.get_metric_history(found.info.run_id, f"train/{name}")
        assert [(point.step, point.value) for point in history] == list(zip([1, 2], losses[name], strict=True))

    evaluated, metrics = read_json(finished_pipeline / "metrics/evaluate.json"), found.data.metrics
    assert metrics["test/nll"] == evaluated["nll"]
    assert metrics["quality/samples_coverage"] == evaluated["samples_coverage"]
    assert {name.partition("/")[0] for name in metrics} <= {"train", "test", "quality", "codes", "system"}


def test_one_mlflow_run_has_all_files_and_a_frame_per_epoch(finished_pipeline):
    logged = artifacts(main_run(finished_pipeline))
    made = {name: content for name, content in contents(finished_pipeline).items() if not name.startswith("data/")}
    assert {name: logged.get(name) for name in made} == made
    frames = sorted(name for name in logged if name.startswith("images/") and name.endswith(".png"))
    assert [name[:21] for name in frames] == ["images/samples+step+1", "images/samples+step+2"]


# running again


def test_nothing_runs_twice(pipeline):
    again = run(pipeline, "dvc", "repro").stdout
    assert stages_run(again) == []
    assert "up to date" in again


def test_two_forced_runs_give_equal_bytes_and_one_mlflow_run(pipeline):
    before, [found] = contents(pipeline), stored_runs(pipeline)
    assert stages_run(run(pipeline, "dvc", "repro", "--force").stdout) == STAGES
    after, [again] = contents(pipeline), stored_runs(pipeline)
    assert {name for name in before | after if after.get(name) != before.get(name)} == set()
    assert again.info.run_id == found.info.run_id
    assert again.info.status == "FINISHED"
    history = client_of(pipeline).get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in history] == [1, 2]


def test_another_parameter_of_a_later_stage_makes_a_child_run_and_back_comes_from_the_cache(pipeline):
    before, parent = contents(pipeline), main_run(pipeline)
    logged = artifacts(parent)
    set_params(pipeline, {"grid.size": 4})
    assert stages_run(run(pipeline, "dvc", "repro").stdout) == ["render_grid"]
    after = contents(pipeline)
    assert after["plots/grid.png"] != before["plots/grid.png"]

    [child] = children(pipeline, parent)
    assert child.info.status == "FINISHED"
    assert child.data.params == {"grid.size": "4", "grid.quantiles": "[0.05, 0.95]"}
    assert artifacts(child)["plots/grid.png"] == after["plots/grid.png"]
    assert main_run(pipeline).data.params == parent.data.params
    assert artifacts(parent) == logged

    set_params(pipeline, {"grid.size": 3})
    assert stages_run(run(pipeline, "dvc", "repro").stdout) == []
    assert contents(pipeline) == before
    assert "up to date" in run(pipeline, "dvc", "status").stdout
    assert len(stored_runs(pipeline)) == 2


def test_a_parameter_that_only_the_card_shows_makes_a_child_run(pipeline):
    parent = main_run(pipeline)
    logged = artifacts(parent)
    set_params(pipeline, {"data.fallback": None})
    assert "train" not in stages_run(run(pipeline, "dvc", "repro").stdout)

    [child] = children(pipeline, parent)
    assert b"data.fallback | `None`" in artifacts(child)["metrics/report.md"]
    assert artifacts(parent) == logged


# what goes wrong


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
    model = pipeline / "models/vae.safetensors"
    model.unlink()
    save_file({"weights": torch.zeros(3)}, model)
    before = contents(pipeline)
    failed = run(pipeline, sys.executable, "-m", "stages", "evaluate", env={"PYTHONPATH": "src"}, check=False)
    assert failed.returncode == 1
    [line] = failed.stderr.splitlines()
    assert line.startswith("evaluate: models/vae.safetensors is damaged or not what this project writes")
    assert "`dvc repro train` makes it again" in line
    assert contents(pipeline) == before


# where MNIST comes from


def test_without_any_mirror_the_embedded_digits_are_announced(pipeline):
    set_params(pipeline, {"data.dataset": "mnist"})
    said = run(pipeline, "dvc", "repro", "download", env=OFFLINE)
    assert "GOING ON WITHOUT MNIST" in said.stderr
    assert "dvc repro download --force" in said.stderr
    about = read_json(pipeline / "data/dataset.json")
    assert (about["asked_for"], about["name"]) == ("mnist", "digits")

    set_params(pipeline, {"data.fallback": None})
    failed = run(pipeline, "dvc", "repro", "download", env=OFFLINE, check=False)
    assert failed.returncode != 0
    assert "no mirror of MNIST answers" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_without_any_mirror_mnist_comes_from_the_cache_where_it_is_there(pipeline, mnist_folder):
    set_params(pipeline, {"data.dataset": "mnist"})
    run(pipeline, "dvc", "repro", "download", env={"MNIST_MIRROR": str(mnist_folder)})
    before = contents(pipeline)
    said = run(pipeline, "dvc", "repro", "--force", "download", env=OFFLINE)
    assert "going on with MNIST from DVC's cache" in said.stderr
    assert "GOING ON WITHOUT MNIST" not in said.stderr
    assert read_json(pipeline / "data/dataset.json")["name"] == "mnist"
    assert contents(pipeline) == before


def test_a_wrong_mirror_is_one_line_and_loses_nothing(pipeline):
    set_params(pipeline, {"data.dataset": "mnist"})
    before = contents(pipeline)
    failed = run(pipeline, "dvc", "repro", env={"MNIST_MIRROR": "no/such/folder"}, check=False)
    assert failed.returncode != 0
    assert "no/such/folder/train-images-idx3-ubyte.gz does not exist" in failed.stderr
    assert contents(pipeline) == before


# what a person at the terminal does


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


# other models


def run_with(finished_pipeline: Path, folder: Path, params: Mapping[str, Any]) -> Path:
    """A copy of the finished pipeline that has run with other parameters."""
    clone = copy_workspace(finished_pipeline, folder / "mnist-vae")
    set_params(clone, params)
    run(clone, "dvc", "repro")
    return clone


@pytest.fixture(scope="module")
def five_black_and_white(finished_pipeline, tmp_path_factory) -> Path:
    params = {"data.binarize": "dynamic", "model.latent_dim": 5, "train.epochs": 1}
    return run_with(finished_pipeline, tmp_path_factory.mktemp("five"), params)


@pytest.fixture(scope="module")
def one_validated(finished_pipeline, tmp_path_factory) -> Path:
    params = {"model.latent_dim": 1, "train.validation_size": 1000}
    return run_with(finished_pipeline, tmp_path_factory.mktemp("one"), params)


def test_black_and_white_results_have_names_of_their_own(five_black_and_white):
    metrics = read_json(five_black_and_white / "metrics/evaluate.json")
    assert metrics["binarize"] == "dynamic"
    assert "nll_dynamic" in metrics
    assert "nll" not in metrics
    assert "train_loss_dynamic" in read_json(five_black_and_white / "metrics/train.json")
    logged = main_run(five_black_and_white).data.metrics
    assert {"train/loss_dynamic", "test/nll_dynamic"} <= logged.keys()
    assert logged.keys().isdisjoint({"train/loss", "test/nll"})


def test_five_latent_dimensions_are_measured_by_importance_sampling(five_black_and_white):
    metrics = read_json(five_black_and_white / "metrics/evaluate.json")
    assert metrics["nll_method_dynamic"] == "importance sampling, K = 4"
    assert {f"kld_z{dim}_dynamic" for dim in range(5)} <= metrics.keys()


def test_one_latent_dimension_is_measured_by_quadrature_and_has_plots(one_validated):
    assert read_json(one_validated / "metrics/evaluate.json")["nll_method"] == "quadrature"
    assert "index.html" in run(one_validated, "dvc", "plots", "show").stdout


def test_held_out_images_give_validation_losses_and_choose_the_champion(one_validated):
    trained = read_json(one_validated / "metrics/train.json")
    losses = pd.read_csv(one_validated / "plots/losses.csv")
    best = int(losses["val_loss"].argmin())
    assert trained["best_epoch"] == losses["epoch"][best]
    assert trained["val_loss"] == pytest.approx(losses["val_loss"][best])

    client, found = client_of(one_validated), main_run(one_validated)
    history = client.get_metric_history(found.info.run_id, "val/loss")
    assert [point.value for point in history] == losses["val_loss"].tolist()
    [version] = client.search_model_versions(f"name = 'mnist-vae-decoder' and run_id = '{found.info.run_id}'")
    assert version.tags["selected_by"] == "validation nll"
    assert float(version.tags["nll"]) == read_json(one_validated / "metrics/evaluate.json")["val_nll"]


def test_another_training_is_another_run(one_validated, finished_pipeline):
    first, second = stored_runs(one_validated)
    assert first.info.run_id == main_run(finished_pipeline).info.run_id
    assert second.info.run_id == main_run(one_validated).info.run_id


def test_the_pipeline_runs_on_somebodys_own_images_without_labels(pipeline, tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    for name, count in (("x_train", 300), ("x_test", 120)):
        np.save(folder / f"{name}.npy", np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8))
    set_params(pipeline, {"data.dataset": str(folder)})
    said = run(pipeline, "dvc", "repro").stdout

    assert "faces: 300 training and 120 test images, without labels" in said
    assert "The images have no labels: knn_accuracy and linear_probe_accuracy are left out" in said
    card = (pipeline / "metrics/report.md").read_text()
    assert "# mnist-vae on faces" in card
    assert "The images have no labels" in card
    assert "by digit" not in card
    metrics = json.loads((pipeline / "metrics/evaluate.json").read_text())
    assert metrics["dataset"] == "faces/"
    assert not {"knn_accuracy", "linear_probe_accuracy"} & metrics.keys()
    assert (pipeline / "plots/latents.csv").read_text().startswith("z0,z1\n")
    assert (pipeline / "plots/nll.csv").read_text().startswith("nll\n")

    assert stages_run(run(pipeline, "dvc", "repro").stdout) == []
    np.save(folder / "x_test.npy", np.zeros((120, 28, 28), np.uint8))
    run(pipeline, "dvc", "repro", "--force", "--single-item", "download")
    assert set(json.loads(run(pipeline, "dvc", "status", "--json").stdout)) == {"train", "evaluate"}
