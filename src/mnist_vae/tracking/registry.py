"""The models that a server answers with: decoder and encoder of each training, the best of them as champion."""

import os
import random
import shutil
import time
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow import MlflowClient, pyfunc
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, infer_signature

from mnist_vae.tracking import serving
from mnist_vae.tracking.store import EXPERIMENT, Store, database_lock

REGISTERED = {part: f"{EXPERIMENT}-{part}" for part in serving.SERVED}  # the names that models go by
CHAMPION = "champion"  # alias: the version to serve
CROWNED = "has_been_champion"  # tag
ATTEMPTS = 10  # to get a number for a version that no other machine takes at the same moment


def register_models(store: Store, run_id: str, path: Path, measured_on: Mapping[str, str], nll: float) -> bool:
    """Register the decoder and the encoder of a model file, and say whether they are the champions now.

    Both become champions if there are none yet, or if ``nll`` is lower than the champions' and was measured on the
    same: ``measured_on`` (data set, binarisation, which images) is equal. Other champions stay. A run's model is
    registered once; measured again, its versions get the new numbers. Done twice, it changes nothing, and what a killed
    process left half done is completed. Processes of one workspace take turns; processes elsewhere correct each other.
    """
    with database_lock(store.workspace):
        tags = {**measured_on, "nll": repr(nll), "fingerprint": serving.fingerprint(path)}
        versions = {part: _registered_version(store, run_id, path, part, tags) for part in REGISTERED}
        former = {part: _crowned(store.client, part).keys() for part in REGISTERED}
        if all(_beaten(store, part, versions[part], measured_on, nll) for part in REGISTERED):
            _crown(store.client, versions)
        return _settle(store, measured_on, former) == versions


def _beaten(store: Store, part: str, challenger: str, measured_on: Mapping[str, str], nll: float) -> bool:
    """Whether a version may take the place of the champion: there is none any more, it is it, or it is better."""
    client, name = store.client, REGISTERED[part]
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    if champion is None or str(champion) == challenger:
        return True
    found = client.get_model_version(name, champion)
    if store.active_run(found.run_id or "") is None:
        return True
    return measured_on.items() <= found.tags.items() and nll < float(found.tags["nll"])


def _crown(client: MlflowClient, versions: Mapping[str, str]) -> None:
    """Make versions the champions; that they have been will still be seen when others are."""
    for part, number in versions.items():
        client.set_registered_model_alias(REGISTERED[part], CHAMPION, number)
    for part, number in versions.items():
        client.set_model_version_tag(REGISTERED[part], number, CROWNED, "true")


def _crowned(client: MlflowClient, part: str) -> dict[str, ModelVersion]:
    """All that are or have been champions."""
    found = client.search_model_versions(f"name = '{REGISTERED[part]}' and tags.{CROWNED} = 'true'")
    return {str(version.version): version for version in found}


def _settle(store: Store, measured_on: Mapping[str, str], former: Mapping[str, Collection[str]]) -> dict[str, str]:
    """Correct the champions until they are as they should be; their versions.

    MLflow moves an alias without a look at where it is. So a process that has looked, and found its model better, may
    put it in the place of one that is better still and became champion since. But every process looks here after its
    last move. Of two at once, the later one sees both, since a model is tagged between its own move and this look: it
    leaves both aliases on the better model. ``former`` were champions before this process first looked, and may have
    lost their place to a person.
    """
    while True:
        wanted = _champions(store, measured_on, former)
        aliases = {part: store.client.get_registered_model(name).aliases for part, name in REGISTERED.items()}
        if all(str(aliases[part].get(CHAMPION)) == version for part, version in wanted.items()):
            return wanted
        _crown(store.client, wanted)


def _champions(store: Store, measured_on: Mapping[str, str], former: Mapping[str, Collection[str]]) -> dict[str, str]:
    """The versions that should be champions, both of one run.

    They are those of the decoder's alias, or of the encoder's where there is no other: a process may have been killed
    between them. A better rival, champion for a moment at the same time, takes their place.
    """
    client = store.client
    aliases = {part: client.get_registered_model(name).aliases.get(CHAMPION) for part, name in REGISTERED.items()}
    part, version = next(((part, version) for part, version in aliases.items() if version is not None), ("", ""))
    if not part:  # somebody has just taken them away
        return {}
    best = client.get_model_version(REGISTERED[part], version)
    for number, rival in _crowned(client, part).items():
        if number in former[part] or not measured_on.items() <= rival.tags.items() & best.tags.items():
            continue
        if float(rival.tags["nll"]) < float(best.tags["nll"]) and store.active_run(rival.run_id or "") is not None:
            best = rival
    content = best.tags.get("fingerprint", "")
    twins = {part: _find_version(client, name, best.run_id or "", content) for part, name in REGISTERED.items()}
    return {part: str(twin.version) for part, twin in twins.items() if twin is not None}


def _find_version(client: MlflowClient, name: str, run_id: str, fingerprint: str) -> ModelVersion | None:
    """The version of a run's model with this content."""
    same = f"name = '{name}' and run_id = '{run_id}' and tags.fingerprint = '{fingerprint}'"
    return next(iter(client.search_model_versions(same, max_results=1)), None)


def _registered_version(store: Store, run_id: str, path: Path, part: str, tags: Mapping[str, str]) -> str:
    """The version that holds this part of this run's model, made where there is none; tagged with ``tags``."""
    client, name = store.client, REGISTERED[part]
    if not client.search_registered_models(f"name = '{name}'"):
        try:
            client.create_registered_model(name, description=serving.SERVED[part].__doc__)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another machine was quicker
                raise
    found = _find_version(client, name, run_id, tags["fingerprint"])
    if found is None:
        model = _logged_model(store, run_id, path, part, tags["fingerprint"])
        found = _new_version(client, name, model, run_id, tags)
    for tag, value in tags.items() - found.tags.items():
        client.set_model_version_tag(name, found.version, tag, value)
    return str(found.version)


def _new_version(
    client: MlflowClient, name: str, model: LoggedModel, run_id: str, tags: Mapping[str, str]
) -> ModelVersion:
    """A version with the next number. MLflow gives up when others take that number three times in a row."""
    for attempt in range(ATTEMPTS):
        try:
            return client.create_model_version(
                name, model.artifact_location, run_id, tags=dict(tags), model_id=model.model_id
            )
        except MlflowException as error:
            if attempt == ATTEMPTS - 1 or "Model Version creation error" not in str(error):
                raise
            time.sleep(random.uniform(0, 0.5))  # no two of them again at the same moment
    raise AssertionError("not reached")


def _logged_model(store: Store, run_id: str, path: Path, part: str, fingerprint: str) -> LoggedModel:
    """The part of a model file as the run shows it; one that a killed process left half done is completed."""
    client = store.client
    same = f"name = '{part}' AND source_run_id = '{run_id}' AND tags.fingerprint = '{fingerprint}'"
    model = next(iter(client.search_logged_models([store.experiment], same, max_results=1)), None)
    if model is None:
        tags = {"fingerprint": fingerprint}
        model = client.create_logged_model(store.experiment, part, source_run_id=run_id, tags=tags)
    if model.status != LoggedModelStatus.READY:
        _log_model(store, run_id, path, part, model)
        client.finalize_logged_model(model.model_id, "READY")
    outputs = client.get_run(run_id).outputs
    if outputs is None or model.model_id not in {shown.model_id for shown in outputs.model_outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return model


def _log_model(store: Store, run_id: str, path: Path, part: str, model: LoggedModel) -> None:
    """Write a part of a model file with the code that serves it; loading it unpickles nothing."""
    served = serving.load(path, part)
    example = served.example()
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
        store.client.log_model_artifacts(model.model_id, str(folder))
        store.flush_artifacts(model.artifact_location)
