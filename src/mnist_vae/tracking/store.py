"""A tracking store of MLflow: a database in the workspace, or the server that MLFLOW_TRACKING_URI names.

This file, registry.py and sender.py are the only ones that know MLflow.
"""

import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    Param,
    RunTag,
    ViewType,
)
from mlflow.entities import Run as StoredRun
from mlflow.exceptions import MlflowException

from mnist_vae.errors import UserError

EXPERIMENT = "mnist-vae"
DATABASE = "mlflow.db"
LOCK_TIMEOUT_S = 60
BATCH = 1_000  # metrics; MLflow's limit


class Store:
    """The experiment in a store. Everything here may be done twice without another result."""

    def __init__(self, workspace: Path) -> None:
        """Open the store, made where there is none.

        Raises:
            UserError: it does not open; no password is in the message.
        """
        self.workspace, self.uri = workspace, tracking_uri(workspace)
        try:
            if self.uri.startswith("sqlite:") and not os.environ.get("MLFLOW_TRACKING_URI"):
                _make_database(workspace)
            self.client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            experiment = _experiment(self.client, workspace, self.uri)
        except Exception as error:
            raise UserError(
                f"MLflow's store {redact(self.uri)} does not open: {first_line(error)}; see that MLFLOW_TRACKING_URI "
                f"is right and its server runs, or unset it for {DATABASE} in this folder"
            ) from error
        if experiment.lifecycle_stage != "active":
            raise UserError(
                f"the MLflow experiment {EXPERIMENT} was deleted; "
                f"`mlflow experiments restore --experiment-id {experiment.experiment_id}` brings it back"
            )
        self.experiment: str = experiment.experiment_id

    def find_run(self, fingerprint: str, place: str) -> StoredRun | None:
        """The run of a training's place, None where the store has none."""
        tags = f"tags.fingerprint = '{fingerprint}' and tags.place = '{place}'"
        found = self.client.search_runs(
            [self.experiment], tags, ViewType.ACTIVE_ONLY, max_results=1, order_by=["attributes.start_time ASC"]
        )
        return found[0] if found else None

    def active_run(self, run_id: str) -> StoredRun | None:
        """A run by its id, None where the store does not know it or has deleted it."""
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def create_run(self, fingerprint: str, place: str, name: str, parent: str | None, at: int) -> StoredRun:
        """A new run for a place; the main run of the training is ``parent`` to all others."""
        tags = {"fingerprint": fingerprint, "place": place, **({"mlflow.parentRunId": parent} if parent else {})}
        return self.client.create_run(self.experiment, start_time=at, run_name=name, tags=tags)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags, the only entries of a run that may change."""
        self.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Record the parameters that the run does not have yet; MLflow never changes one."""
        known = self.client.get_run(run_id).data.params
        fresh = [Param(name, value) for name, value in params.items() if name not in known]
        for first in range(0, len(fresh), 100):
            self.client.log_batch(run_id, params=fresh[first : first + 100])

    def log_metrics(self, run_id: str, metrics: list[tuple[str, float, int, int]]) -> None:
        """Record name, value, step and time (ms) of each; MLflow keeps one that comes again, all four equal, once."""
        for first in range(0, len(metrics), BATCH):
            batch = metrics[first : first + BATCH]
            self.client.log_batch(run_id, metrics=[Metric(name, value, at, step) for name, value, step, at in batch])

    def logged_metrics(self, run: StoredRun) -> set[tuple[str, int]]:
        """Name and step of all that a run has."""
        history = (self.client.get_metric_history(run.info.run_id, name) for name in run.data.metrics)
        return {(point.key, point.step) for points in history for point in points}

    def logged_images(self, run_id: str) -> set[tuple[str, int]]:
        """Key and step of all frames that a run has, as MLflow names their files."""
        names = (Path(artifact.path).name for artifact in self.client.list_artifacts(run_id, "images"))
        return {(match[1], int(match[2])) for name in names if (match := re.match(r"(.+?)[+%]step[+%](\d+)[+%]", name))}

    def log_dataset(self, run_id: str, about: Mapping[str, Any]) -> None:
        """Record what was trained on, searchable by name and digest."""
        dataset = Dataset(about["name"], about["digest"][:8], source_type="code", source="{}")
        self.client.log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def end_run(self, run_id: str, status: str, at: int) -> None:
        """Say how a run ended; one that has this status already keeps its time."""
        if self.client.get_run(run_id).info.status != status:
            self.client.set_terminated(run_id, status, end_time=at)

    def running(self) -> list[StoredRun]:
        """The runs of the experiment that are said to run."""
        found = self.client.search_runs([self.experiment], "attributes.status = 'RUNNING'", ViewType.ACTIVE_ONLY)
        return list(found)


def tracking_uri(workspace: Path) -> str:
    """The address of the store; relative to the current folder where that is the workspace.

    A path with a percent or a question mark in it is no part of a database's address that SQLAlchemy and Alembic read
    rightly, and a relative address does not need it.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return given or f"sqlite:///{DATABASE if Path.cwd() == workspace else workspace / DATABASE}"


def redact(text: str) -> str:
    """``text`` without the password in MLFLOW_TRACKING_URI, as it stands there or decoded."""
    for uri in (os.environ.get("MLFLOW_TRACKING_URI", ""), os.environ.get("MLFLOW_REGISTRY_URI", "")):
        match = re.match(r"[^/]*//[^/@]*?:(.*)@", uri)
        password = match[1] if match else ""
        with contextlib.suppress(ValueError):
            password = urlsplit(uri).password or password
        for secret in (os.environ.get("MLFLOW_TRACKING_PASSWORD"), os.environ.get("MLFLOW_TRACKING_TOKEN"), password):
            if secret:
                text = text.replace(secret, "***").replace(unquote(secret), "***")
    return text


def first_line(error: BaseException) -> str:
    """An error's first line, without secrets."""
    lines = str(error).strip().splitlines()
    return redact(lines[0]) if lines else type(error).__name__


def database_lock(workspace: Path) -> FileLock:
    """Held while the database is made, and while the champion changes; a wait is bounded."""
    return FileLock(workspace / f"{DATABASE}.lock", timeout=LOCK_TIMEOUT_S)


def _make_database(workspace: Path) -> None:
    """Make the database under another name, and give it its own once it is whole.

    A process that is killed on the way leaves no half-made database, which would never open again.
    """
    database = workspace / DATABASE
    if not database.exists():
        with database_lock(workspace):
            if not database.exists():
                scratch = workspace / f".{DATABASE}-{os.getpid()}"
                name = scratch.name if Path.cwd() == workspace else str(scratch)
                try:
                    client = MlflowClient(tracking_uri=f"sqlite:///{name}", registry_uri=f"sqlite:///{name}")
                    _experiment(client, workspace, "sqlite:")
                    try:
                        os.link(scratch, database)  # unlike a rename, it replaces nothing that came in between
                    except FileExistsError:
                        pass
                finally:
                    for left in workspace.glob(f"{scratch.name}*"):
                        left.unlink(missing_ok=True)
    _wait_until_made(database)


def _wait_until_made(database: Path) -> None:
    """Wait for another program, as `mlflow ui`, that is making the database at this moment."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while time.monotonic() < deadline:
        connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=1)
        try:
            if connection.execute("select count(*) from experiments").fetchone()[0]:
                return
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error) and "locked" not in str(error):
                raise
        finally:
            connection.close()
        time.sleep(0.5)
    raise TimeoutError(
        f"it was never finished; if no other program is making it, remove {database} and its runs are sent again"
    )


def _experiment(client: MlflowClient, workspace: Path, uri: str) -> Any:
    """The experiment, made where there is none."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return found
    # An artifact location is fixed when the experiment is made, and relative ones follow the current folder.
    location = (workspace / "mlruns" / EXPERIMENT).as_uri() if uri.startswith("sqlite:") else None
    kind = {"mlflow.experimentKind": "custom_model_development"}  # the page for training, not for chat
    try:
        return client.get_experiment(client.create_experiment(EXPERIMENT, artifact_location=location, tags=kind))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was quicker
            raise
        return client.get_experiment_by_name(EXPERIMENT)
