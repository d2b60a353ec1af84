"""The models that a server answers with: decoder and encoder of each training, the best of them as champion."""

import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow import MlflowClient, pyfunc
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model, infer_signature

from mnist_vae.tracking import serving
from mnist_vae.tracking.store import EXPERIMENT, Store, database_lock

REGISTERED = {part: f"{EXPERIMENT}-{part}" for part in serving.SERVED}  # the names that models go by
CHAMPION = "champion"  # alias: the version to serve


def register_models(store: Store, run_id: str, path: Path, measured_on: Mapping[str, str], nll: float) -> bool:
    """Register the decoder and the encoder of a model file, and say whether they are the champions now.

    Both become champions if there are none yet, or if ``nll`` is lower than the champions' and was measured on the
    same: ``measured_on`` (data set, binarisation, which images) is equal. Other champions stay. A run's model is
    registered once; measured again, its versions get the new numbers. Processes of one workspace take turns. Done
    twice, it changes nothing, and what a killed process left half done is completed.
    """
    with database_lock(store.workspace):
        tags = {**measured_on, "nll": repr(nll), "fingerprint": serving.fingerprint(path)}
        versions = {part: _registered_version(store, run_id, path, part, tags) for part in REGISTERED}
        if not all(_beaten(store.client, part, versions[part], measured_on, nll) for part in REGISTERED):
            _agree(store.client)
            return False
        for part, name in REGISTERED.items():
            store.client.set_registered_model_alias(name, CHAMPION, versions[part])
        return True


def _beaten(client: MlflowClient, part: str, challenger: str, measured_on: Mapping[str, str], nll: float) -> bool:
    """Whether a version may take the place of the champion: there is none, it is the champion, or it is better."""
    champion = client.get_registered_model(REGISTERED[part]).aliases.get(CHAMPION)
    if champion is None or str(champion) == challenger:
        return True
    tags = client.get_model_version(REGISTERED[part], champion).tags
    return measured_on.items() <= tags.items() and nll < float(tags["nll"])


def _agree(client: MlflowClient) -> None:
    """Where a process was killed between the two aliases, have the encoder follow the decoder."""
    decoder, encoder = (
        client.get_model_version_by_alias(name, CHAMPION)
        for name in REGISTERED.values()
        if CHAMPION in client.get_registered_model(name).aliases
    )
    if decoder.run_id != encoder.run_id:
        name = REGISTERED["encoder"]
        same = f"name = '{name}' and run_id = '{decoder.run_id}'"
        for found in client.search_model_versions(same, max_results=1):
            client.set_registered_model_alias(name, CHAMPION, found.version)


def _registered_version(store: Store, run_id: str, path: Path, part: str, tags: Mapping[str, str]) -> str:
    """The version that holds this part of this run's model, made where there is none; tagged with ``tags``."""
    client, name = store.client, REGISTERED[part]
    if not client.search_registered_models(f"name = '{name}'"):
        try:
            client.create_registered_model(name, description=serving.SERVED[part].__doc__)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another machine was quicker
                raise
    same = f"name = '{name}' and run_id = '{run_id}' and tags.fingerprint = '{tags['fingerprint']}'"
    found = list(client.search_model_versions(same, max_results=1))
    if not found:
        model = _log_model(store, run_id, path, part)
        source, model_id = model.artifact_location, model.model_id
        found = [client.create_model_version(name, source, run_id, tags=dict(tags), model_id=model_id)]
    for tag, value in tags.items() - found[0].tags.items():
        client.set_model_version_tag(name, found[0].version, tag, value)
    return str(found[0].version)


def _log_model(store: Store, run_id: str, path: Path, part: str) -> LoggedModel:
    """Log a part of a model file with the code that serves it; loading it unpickles nothing."""
    client, served = store.client, serving.load(path, part)
    example = served.example()
    model = client.create_logged_model(store.experiment, part, source_run_id=run_id)
    with TemporaryDirectory() as scratch:
        folder, library = Path(scratch, part), Path(scratch, "mnist_vae")
        for file in serving.PACKED:
            target = library / file.relative_to(serving.LIBRARY)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        pyfunc.save_model(
            folder,
            loader_module=serving.__name__,
            data_path=path,
            model_config={"part": part},
            code_paths=[os.fspath(library)],
            mlflow_model=Model(run_id=run_id, model_id=model.model_id),
            signature=infer_signature(example, served.predict(example)),
            input_example=example,
            # Without them MLflow starts a process to find out. The CPU build of torch has a +cpu that no index knows.
            pip_requirements=[
                f"{package}=={version(package).partition('+')[0]}" for package in ("numpy", "safetensors", "torch")
            ],
        )
        client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return model
