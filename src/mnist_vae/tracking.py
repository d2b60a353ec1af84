"""The only file that knows MLflow: one run per trained model, opened by training and resumed by later stages.

To the run belong the decoder and the encoder that a server answers with, registered with the best one as champion.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from filelock import FileLock

from mnist_vae.errors import UserError

# Read while mlflow is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

from mlflow import MlflowClient, pyfunc
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModel, LoggedModelOutput, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model, infer_signature

EXPERIMENT = "mnist-vae"
REGISTERED = {part: f"{EXPERIMENT}-{part}" for part in ("decoder", "encoder")}  # the names that models go by
CHAMPION = "champion"  # alias: the version to serve
REPLACES = "replaces_run"  # tag: the id of a run that this store does not know


class Run:
    """A run in the store. Metrics are in nats per image unless their name says otherwise."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client, self.id = client, run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters. MLflow never changes one, so a second value becomes a tag of the same name."""
        known = self.client.get_run(self.id).data.params
        fresh = [Param(name, str(value)) for name, value in params.items() if name not in known]
        self.client.log_batch(self.id, params=fresh)
        self.set_tags({name: value for name, value in params.items() if known.get(name, str(value)) != str(value)})

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record numbers; whatever is not a number is left out."""
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self.client.log_metric(self.id, name, value, step=step, synchronous=True)

    def log_image(self, image: np.ndarray, key: str, step: int) -> None:
        """Record one frame of a slider: a gray uint8 image (H, W)."""
        self.client.log_image(self.id, image, key=key, step=step, synchronous=True)

    def log_file(self, path: Path) -> None:
        """Record a copy of a file, under its own folder's name (plots/grid.png)."""
        self.client.log_artifact(self.id, str(path), artifact_path=path.parent.name or None)

    def log_dataset(self, about: Mapping[str, Any]) -> None:
        """Record what was trained on (``Dataset.about()``), shown beside the run and searchable by name and digest."""
        sizes = json.dumps({name: about[name] for name in ("train_images", "test_images")})
        dataset = Dataset(about["name"], about["digest"][:8], source_type="code", source="{}", profile=sizes)
        self.client.log_inputs(self.id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def describe(self, text: str, picture: np.ndarray) -> None:
        """The run's description: a gray uint8 image (H, W) over a line of Markdown."""
        self.client.log_image(self.id, picture, artifact_file="description.png")
        image = f"![picture](get-artifact?path=description.png&run_uuid={self.id})"  # relative to MLflow's own page
        self.set_tags({"mlflow.note.content": f"{image}\n\n{text}"})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags, the only entries of a run that may change."""
        self.client.log_batch(self.id, tags=[RunTag(name, str(value)) for name, value in tags.items()])


@contextmanager
def start_run(workspace: Path, name: str, tags: Mapping[str, Any]) -> Iterator[Run]:
    """A new run, marked finished at a clean exit, failed or killed otherwise."""
    client, experiment = open_store(workspace)
    with _friendly(client):
        run = Run(client, client.create_run(experiment, run_name=name).info.run_id)
        run.set_tags(tags)
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        client.set_terminated(run.id, status)


def resume_run(workspace: Path, run_id: str) -> Run:
    """The run of this id, for more to be logged.

    A store that does not know it (a clone with pulled artifacts) or has deleted it gets one run in its place,
    tagged with the old id; every later call finds that one.
    """
    client, experiment = open_store(workspace)
    with _friendly(client):
        try:
            if client.get_run(run_id).info.lifecycle_stage == "active":
                return Run(client, run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        with _lock(workspace):  # two stages at once must not make two
            found = client.search_runs([experiment], f"tags.{REPLACES} = '{run_id}'", max_results=1)
            if found:
                return Run(client, found[0].info.run_id)
            run = Run(client, client.create_run(experiment, run_name=f"instead of {run_id[:8]}").info.run_id)
            run.set_tags({REPLACES: run_id})
            client.set_terminated(run.id)
            return run


def register_models(workspace: Path, run: Run, path: Path, measured_on: Mapping[str, Any], nll: float) -> bool:
    """Log the decoder and the encoder of a checkpoint, register them, and say whether they are the champions now.

    Both become champions if there are none yet, or if ``nll`` is lower than the champions' and was measured on the
    same: ``measured_on`` (data set, digest, binarisation) is equal. Other champions stay. A run's model is registered
    once; measured again, its versions get the new numbers. Processes of one workspace take turns.
    """
    from mnist_vae import serving  # which needs torch; a stage without a model to register does not wait for it

    about = {name: str(value) for name, value in measured_on.items()}
    with _friendly(run.client), _lock(workspace):
        tags = {**about, "nll": repr(nll), "content_sha256": serving.content_sha256(path)}
        versions = {part: _registered_version(run, path, part, tags) for part in REGISTERED}
        if not all(_beaten(run.client, part, versions[part], about, nll) for part in REGISTERED):
            return False
        for part, name in REGISTERED.items():
            run.client.set_registered_model_alias(name, CHAMPION, versions[part])
        return True


def _beaten(client: MlflowClient, part: str, challenger: str, about: Mapping[str, str], nll: float) -> bool:
    """Whether a version may take the place of the champion: there is none, it is the champion, or it is better."""
    champion = client.get_registered_model(REGISTERED[part]).aliases.get(CHAMPION)
    if champion is None or str(champion) == challenger:
        return True
    tags = client.get_model_version(REGISTERED[part], champion).tags
    return about.items() <= tags.items() and nll < float(tags["nll"])


def _registered_version(run: Run, path: Path, part: str, tags: Mapping[str, str]) -> str:
    """The version that holds this part of this run's model, made where there is none; tagged with ``tags``."""
    from mnist_vae import serving

    client, name = run.client, REGISTERED[part]
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description=serving.SERVED[part].__doc__)
    same = f"name = '{name}' and run_id = '{run.id}' and tags.content_sha256 = '{tags['content_sha256']}'"
    found = client.search_model_versions(same, max_results=1)
    if not found:
        model = _log_model(run, path, part)
        source, model_id = model.artifact_location, model.model_id
        found = [client.create_model_version(name, source, run.id, tags=dict(tags), model_id=model_id)]
    for tag, value in tags.items() - found[0].tags.items():
        client.set_model_version_tag(name, found[0].version, tag, value)
    return str(found[0].version)


def _log_model(run: Run, path: Path, part: str) -> LoggedModel:
    """Log a part of a checkpoint with the code that serves it; loading it unpickles nothing."""
    from mnist_vae import serving

    client, served = run.client, serving.load(path, part)
    example = served.example()
    model = client.create_logged_model(client.get_run(run.id).info.experiment_id, part, source_run_id=run.id)
    with TemporaryDirectory() as scratch:
        folder, library = Path(scratch, part), Path(scratch, "mnist_vae")
        library.mkdir()
        for file in serving.PACKED:
            shutil.copy(file, library)
        pyfunc.save_model(
            folder,
            loader_module=serving.__name__,
            data_path=path,
            model_config={"part": part},
            code_paths=[library],
            mlflow_model=Model(run_id=run.id, model_id=model.model_id),
            signature=infer_signature(example, served.predict(example)),
            input_example=example,
            # Without them MLflow starts a process to find out. The CPU build of torch has a +cpu that no index knows.
            pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in ("numpy", "torch")],
        )
        client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run.id, [LoggedModelOutput(model.model_id, step=0)])
    return model


def open_store(workspace: Path) -> tuple[MlflowClient, str]:
    """The store and the experiment's id: MLFLOW_TRACKING_URI, or mlflow.db and mlruns/ in ``workspace``."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workspace / 'mlflow.db'}"
    # An artifact location is fixed when the experiment is made, and relative ones follow the current folder.
    location = (workspace / "mlruns" / EXPERIMENT).as_uri() if uri.startswith("sqlite:") else None
    with _lock(workspace):  # two processes that make a fresh store at once: one would die
        try:
            client = MlflowClient(tracking_uri=uri)
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                kind = {"mlflow.experimentKind": "custom_model_development"}  # the page for training, not for chat
                return client, client.create_experiment(EXPERIMENT, artifact_location=location, tags=kind)
        except Exception as error:
            raise UserError(
                f"MLflow's store {uri} does not open: {str(error).splitlines()[0]}; "
                "see that MLFLOW_TRACKING_URI is right and its server runs, or unset it for mlflow.db in this folder"
            ) from error
    if found.lifecycle_stage != "active":
        raise UserError(
            f"the MLflow experiment {EXPERIMENT} was deleted; "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}` brings it back"
        )
    return client, found.experiment_id


def _lock(workspace: Path) -> FileLock:
    return FileLock(workspace / "mlflow.db.lock")


@contextmanager
def _friendly(client: MlflowClient) -> Iterator[None]:
    """MLflow's own errors as a user's."""
    try:
        yield
    except MlflowException as error:
        raise UserError(f"MLflow ({client.tracking_uri}): {str(error).splitlines()[0]}") from error
