"""A tracking store of MLflow: a database in the workspace, or the server that MLFLOW_TRACKING_URI names.

This file, delivery.py, registry.py and sender.py are the only ones that know MLflow.
"""

import contextlib
import json
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote, unquote, urlsplit
from uuid import NAMESPACE_OID, uuid5

from filelock import FileLock

# Read while mlflow is imported. Its own retries would hide for minutes that a server is away, and make a second run
# where only the answer to the first request was lost.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # what fails is reported once, by us
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it may hold a password
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, RunTag, ViewType
from mlflow.entities import Run as StoredRun
from mlflow.exceptions import MlflowException

from mnist_vae.errors import UserError
from mnist_vae.files import flush_to_disk

EXPERIMENT = "mnist-vae"
DATABASE = "mlflow.db"
SCRATCH = f".{DATABASE}-*"  # one that is being made
LOCK_TIMEOUT_S = 60
QUIET_S = 5  # without a change of a half-made database: nobody is making it
BUSY_S = 2  # for a database that another program has locked; MLflow would wait for 20 s at each call
BATCH = 1_000  # metrics; MLflow's limit


class Store:
    """The experiment in a store. Everything here may be done twice without another result."""

    def __init__(self, workspace: Path) -> None:
        """Open the store, made where there is none.

        Raises:
            UserError: it does not open; no password is in the message.
        """
        self.workspace, self.uri = workspace, tracking_uri(workspace)
        self._started: dict[str, int] = {}  # when runs that have frames began, in ms
        given = os.environ.get("MLFLOW_TRACKING_URI")
        self.database = database_of(workspace)
        try:
            if not given:
                _make_database(workspace)
            self.client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            experiment = _experiment(self.client, workspace, self.uri)
        except Exception as error:
            if not given:
                remedy = f"if it stays so, move {DATABASE} away, and `make sync` makes another from the journal"
            elif "error code 401" in str(error):
                remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to those of a user of this server"
            else:
                remedy = (
                    "see that MLFLOW_TRACKING_URI is right and its server runs, "
                    f"or unset it for {DATABASE} in this folder"
                )
            raise UserError(
                f"MLflow's store {redact(self.uri)} does not open: {first_line(error)}; {remedy}"
            ) from error
        if experiment.lifecycle_stage != "active":
            raise UserError(
                f"the MLflow experiment {EXPERIMENT} was deleted; "
                f"`mlflow experiments restore --experiment-id {experiment.experiment_id}` brings it back"
            )
        if not given and (folder := _other_folder(experiment, workspace)):
            raise UserError(
                f"{DATABASE} was made in another folder and keeps its files there, in {folder}; "
                f"move {DATABASE} and mlruns away, and `make sync` makes them anew from the journal"
            )
        self.experiment: str = experiment.experiment_id
        self.artifacts: str = experiment.artifact_location
        self.identity = (
            f"{experiment.experiment_id} {experiment.creation_time}"  # a store that is made anew has another
        )

    def check(self) -> None:
        """See that the database can be written at this moment.

        Raises:
            sqlite3.Error: it is locked, read-only, or damaged.
        """
        if self.database is not None and self.database.is_file():
            with contextlib.closing(_connect(self.database)) as connection:
                connection.execute("begin immediate")

    def find_run(self, fingerprint: str, place: str) -> StoredRun | None:
        """The run of a training's place, the first of several; None where the store has none."""
        tags = f"tags.fingerprint = '{fingerprint}' and tags.place = '{place}'"
        found = self.client.search_runs(
            [self.experiment],
            tags,
            ViewType.ACTIVE_ONLY,
            max_results=1,
            order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
        )
        return found[0] if found else None

    def active_run(self, run_id: str) -> StoredRun | None:
        """A run by its id, None where the store does not know it or has deleted it."""
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # or no id at all
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def create_run(self, fingerprint: str, place: str, name: str, at: int) -> StoredRun:
        """The run for a place that has none: a new one, or the one that another machine has made at the same time."""
        tags = {"fingerprint": fingerprint, "place": place}
        made = self.client.create_run(self.experiment, start_time=at, run_name=name, tags=tags)
        first = self.find_run(fingerprint, place)
        if first is None or first.info.run_id == made.info.run_id:
            return made
        self.discard_run(made.info.run_id, first.info.run_id)
        return first

    def discard_run(self, run_id: str, kept: str) -> None:
        """Take a run out of the way of another one of the same place."""
        self.set_tags(run_id, {"place": "", "reason": f"the same training as run {kept}"})
        self.client.set_terminated(run_id, "KILLED")
        with contextlib.suppress(MlflowException):  # a server may keep that for admins and for who made it
            self.client.delete_run(run_id)

    def claim(self, run_id: str, tag: str, value: str) -> bool:
        """Whether a run's tag has this value, which it gets where it has none."""
        found = self.client.get_run(run_id).data.tags.get(tag)
        if found is None:
            self.set_tags(run_id, {tag: value})
        return found in (None, value)

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

    def logged_metrics(self, run_id: str) -> set[tuple[str, int]]:
        """Name and step of all that a run has, without what MLflow itself records of the machine."""
        names = [name for name in self.client.get_run(run_id).data.metrics if not name.startswith("system/")]
        history = (self.client.get_metric_history(run_id, name) for name in names)
        return {(point.key, point.step) for points in history for point in points}

    def log_image(self, run_id: str, png: Path, key: str, step: int) -> None:
        """Record one frame of a slider, once.

        MLflow's own ``log_image`` gives its two files a new name each time: done again after a kill, or by another
        clone, it leaves two frames. Here names follow from the run, the key and the step.
        """
        from PIL import Image

        if run_id not in self._started:
            self.set_tags(run_id, {"mlflow.loggedImages": "True"})
            self._started[run_id] = self.client.get_run(run_id).info.start_time
        frame = f"{key}+step+{step}"
        stem = f"{frame}+timestamp+{self._started[run_id] + step}+{uuid5(NAMESPACE_OID, frame)}"
        with TemporaryDirectory() as scratch, Image.open(png) as image:
            whole, small = Path(scratch, f"{stem}.png"), Path(scratch, f"{stem}+compressed.webp")
            shutil.copyfile(png, whole)
            image.save(small, method=0)  # the fastest, beside a training
            for file in (whole, small):
                self.log_file(run_id, file, "images")

    def log_dataset(self, run_id: str, about: Mapping[str, Any]) -> None:
        """Record what was trained on, searchable by name and digest."""
        sizes = json.dumps({name: about[name] for name in ("train_images", "test_images")})
        dataset = Dataset(about["name"], about["digest"][:8], source_type="code", source="{}", profile=sizes)
        self.client.log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def describe(self, run_id: str, text: str, picture: Path) -> None:
        """What the run's page shows first: a picture over a line of Markdown."""
        self.log_file(run_id, picture)
        shown = f"![picture](get-artifact?path={picture.name}&run_uuid={run_id})"  # relative to MLflow's own page
        self.set_tags(run_id, {"mlflow.note.content": f"{shown}\n\n{text}"})

    def log_file(self, run_id: str, file: Path, folder: str = "") -> None:
        """Record a copy of a file as an artifact of a run, in a folder or beside them all."""
        self.client.log_artifact(run_id, str(file), folder or None)
        self.flush_artifacts(f"{self.artifacts}/{run_id}/artifacts/{folder}/{quote(file.name)}")

    def flush_artifacts(self, location: str) -> None:
        """Have the disk hold an artifact, or a folder of them, for which MLflow does not wait.

        A server looks after its own.
        """
        artifact = Path(unquote(urlsplit(location).path))
        if location.startswith("file:") and artifact.exists():
            above = (parent for parent in artifact.parents if parent.is_relative_to(self.workspace))
            for path in (*artifact.rglob("*"), artifact, *above):
                flush_to_disk(path)

    def end_run(self, run_id: str, status: str, reason: str, at: int) -> None:
        """Say how a run ended, and why if not well; one that has this status already keeps its time."""
        run = self.client.get_run(run_id)
        if reason:
            self.set_tags(run_id, {"reason": reason})
        elif "reason" in run.data.tags:
            self.client.delete_tag(run_id, "reason")
        if run.info.status != status:
            self.client.set_terminated(run_id, status, end_time=at)

    def running(self) -> list[StoredRun]:
        """The runs of the experiment that are said to run."""
        found = self.client.search_runs([self.experiment], "attributes.status = 'RUNNING'", ViewType.ACTIVE_ONLY)
        return list(found)


def tracking_uri(workspace: Path) -> str:
    """The address of the store; relative to the current folder where that is the workspace.

    SQLAlchemy and Alembic misread an address with a percent or a question mark in it; a relative one has none.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return given or f"sqlite:///{DATABASE if Path.cwd() == workspace else workspace / DATABASE}"


def database_of(workspace: Path) -> Path | None:
    """The file that the store is, None if it is a server or a folder."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if not given:
        return workspace / DATABASE
    return Path(given.removeprefix("sqlite:///")) if given.startswith("sqlite:///") else None


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


def is_refusal(error: Exception) -> bool:
    """Whether MLflow will never take what it was given, however often it is told."""
    return isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE"


def database_lock(workspace: Path) -> FileLock:
    """Held while the database is made, and while the champion changes; a wait is bounded."""
    return FileLock(workspace / f"{DATABASE}.lock", timeout=LOCK_TIMEOUT_S)


def _make_database(workspace: Path) -> None:
    """Make the database under another name, and give it its own once it is whole.

    A process that is killed on the way leaves no half-made database, which would never open again.
    """
    database = workspace / DATABASE
    if not database.exists() or any(workspace.glob(SCRATCH)):
        with database_lock(workspace):
            _sweep(workspace)  # what a killed process left
            if not database.exists():
                scratch = workspace / f".{DATABASE}-{os.getpid()}"
                uri = f"sqlite:///{scratch.name if Path.cwd() == workspace else scratch}"
                try:
                    _experiment(MlflowClient(tracking_uri=uri, registry_uri=uri), workspace, uri)
                    _give_name(scratch, database)
                finally:
                    _sweep(workspace)
    _wait_until_made(database)


def _sweep(workspace: Path) -> None:
    """Remove databases under other names, of which only the holder of the lock may make one."""
    for left in workspace.glob(SCRATCH):
        left.unlink(missing_ok=True)


def _give_name(scratch: Path, database: Path) -> None:
    """Rename a file, unless there is one of the new name already."""
    try:
        os.link(scratch, database)  # unlike a rename, it replaces nothing that came in between
    except FileExistsError:
        return
    except OSError:  # a file system without links
        scratch.rename(database)
    flush_to_disk(database.parent)


def _wait_until_made(database: Path) -> None:
    """Wait for another program, as `mlflow ui`, that is making the database at this moment."""
    before: list[tuple[int, int]] = []
    deadline = 0.0
    while _is_unfinished(database):
        files = [found.stat() for found in database.parent.glob(f"{DATABASE}*")]
        now = [(file.st_size, file.st_mtime_ns) for file in files]
        if now != before:
            before, deadline = now, time.monotonic() + QUIET_S
        elif time.monotonic() > deadline:
            raise TimeoutError("it was never finished")
        time.sleep(0.2)


def _is_unfinished(database: Path) -> bool:
    """Whether a database lacks what MLflow writes last when it makes one."""
    try:
        with contextlib.closing(_connect(database)) as connection:
            return not connection.execute("select count(*) from experiments").fetchone()[0]
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):
            raise
        return True


def _connect(database: Path) -> sqlite3.Connection:
    """Open a database for writing, so that SQLite takes back what a process that was killed did not finish."""
    return sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", uri=True, timeout=BUSY_S, isolation_level=None)


def _other_folder(experiment: Experiment, workspace: Path) -> str:
    """Where the workspace's own database keeps files since the workspace was moved or copied; "" where it was not."""
    location = urlsplit(experiment.artifact_location)
    is_moved = location.scheme == "file" and Path(unquote(location.path)).resolve() != _artifacts(workspace).resolve()
    return unquote(location.path) if is_moved else ""


def _artifacts(workspace: Path) -> Path:
    return workspace / "mlruns" / EXPERIMENT


def _experiment(client: MlflowClient, workspace: Path, uri: str) -> Experiment:
    """The experiment, made where there is none."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return found
    # An artifact location is fixed when the experiment is made, and relative ones follow the current folder.
    location = _artifacts(workspace).as_uri() if uri.startswith("sqlite:") else None
    kind = {"mlflow.experimentKind": "custom_model_development"}  # the page for training, not for chat
    try:
        return client.get_experiment(client.create_experiment(EXPERIMENT, artifact_location=location, tags=kind))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was quicker
            raise
        return _experiment(client, workspace, uri)
