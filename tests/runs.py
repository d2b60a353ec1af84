"""What the MLflow store of a clone holds."""

from pathlib import Path

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run

from mnist_vae.model.model_file import load_model


def client_of(clone: Path) -> MlflowClient:
    """A client of the clone's own store."""
    return MlflowClient(f"sqlite:///{clone / 'mlflow.db'}")


def stored_runs(clone: Path) -> list[Run]:
    """Every run of every experiment, the oldest first."""
    client = client_of(clone)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, order_by=["attributes.start_time ASC"]))


def main_run(clone: Path) -> Run:
    """The one run of the training whose model is in the clone."""
    fingerprint = load_model(clone / "models/vae.safetensors").fingerprint
    [found] = [
        one
        for one in stored_runs(clone)
        if one.data.tags["fingerprint"] == fingerprint and "mlflow.parentRunId" not in one.data.tags
    ]
    return found


def children(clone: Path, parent: Run) -> list[Run]:
    """The child runs of a run, the oldest first."""
    return [one for one in stored_runs(clone) if one.data.tags.get("mlflow.parentRunId") == parent.info.run_id]


def artifacts(run: Run) -> dict[str, bytes]:
    """Every file that a run of a clone's own store has, by its path there."""
    folder = Path(download_artifacts(run.info.artifact_uri))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
