"""train: fit the VAE, live in MLflow.   data, model.*, train.* → models/vae.safetensors, plots/losses.csv, metrics/…"""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from mnist_vae.data.binarization import binarize_dataset, metric_name
from mnist_vae.data.dataset import Dataset, load_dataset
from mnist_vae.files import write_csv, write_json
from mnist_vae.fingerprint import PACKAGES, digest_of_code, environment, fingerprint
from mnist_vae.model.cpu import set_up_cpu
from mnist_vae.model.latent import mean_kld
from mnist_vae.model.model_file import SavedModel, save_model
from mnist_vae.model.vae import VAEConfig
from mnist_vae.params import Params, load_params
from mnist_vae.portable import is_portable
from mnist_vae.tracking.logger import JournalLogger
from mnist_vae.tracking.provenance import git_state
from mnist_vae.tracking.session import Session
from mnist_vae.training.callbacks import SampleFrames, in_words
from mnist_vae.training.fit import Fit, fit
from mnist_vae.training.processes import processes
from stages import HERE, WORKSPACE
from stages.artifacts import DATASET, LOSSES, METRICS, MODEL, PARAMS
from stages.key import code_of

LOCK_TIMEOUT_S = 30
COMMAND = (sys.executable, "-m", "stages", "train")  # starts another process of the same training
PROCESSES = ("train.devices", "train.nodes")


def main(session: Session) -> None:
    params = load_params(PARAMS)
    binarize = params.data.binarize
    with processes(params.train, COMMAND) as group:
        set_up_cpu(params.train.threads)
        dataset = load_dataset(DATASET)
        measured = binarize_dataset(dataset, binarize, params.data.binarize_seed)
        name = identity(params, dataset)

        recorded = params.flat("data", "model", "train")
        session.begin(name, "", run_name(params, dataset), recorded, run_tags(params, dataset, group.place.processes))
        session.log_dataset(dataset.about)

        with checkpoints_of(name) as folder:
            group.join(about(params, dataset))
            trained = fit(
                **arguments(params, dataset, measured),
                logger=JournalLogger(session, binarize),
                callbacks=[SampleFrames(params.model.latent_dim, params.train.seed)],
                checkpoints=folder,
            )

            save_model(MODEL, SavedModel(trained.vae, measured.title, mean_kld(trained.vae, measured.x_train), name))
            write_csv(LOSSES, [{**epoch, "binarize": binarize} for epoch in trained.history])
            write_json(METRICS / "train.json", summary(trained, dataset, params))

            session.log_metrics({"train/epochs": len(trained.history), "train/seconds": trained.seconds})
            for path in (MODEL, LOSSES, METRICS / "train.json"):
                session.log_file(path)
    print(f"{len(trained.history)} epochs in {trained.seconds:.1f} s: {in_words(trained.losses)}")
    if params.train.validation_size:
        print(f"saved: epoch {trained.best_epoch}, which has the lowest validation loss")


def work() -> None:
    """What all processes but the first do: their share of the training, and nothing that stays."""
    params = load_params(PARAMS)
    with processes(params.train, COMMAND) as group:
        set_up_cpu(params.train.threads)
        dataset = load_dataset(DATASET)
        measured = binarize_dataset(dataset, params.data.binarize, params.data.binarize_seed)
        group.join(about(params, dataset))
        fit(**arguments(params, dataset, measured))


def arguments(params: Params, dataset: Dataset, measured: Dataset) -> dict[str, Any]:
    """What ``fit`` needs in all processes."""
    binarize, model = params.data.binarize, params.model
    return {
        "images": measured.x_train if binarize == "static" else dataset.x_train,
        "config": VAEConfig(tuple(model.hidden_dims), model.latent_dim, activation=model.activation),
        "settings": params.train,
        "redraw_seed": params.data.binarize_seed if binarize == "dynamic" else None,
    }


def identity(params: Params, dataset: Dataset) -> str:
    """What determines this training: its data, code, parameters and environment, as one name."""
    train = params.train
    plain = (train.threads, train.compile, train.precision) == (1, "none", "32-true")  # else torch has its own kernels
    where = environment(portable=plain and is_portable())
    return fingerprint(**ingredients(params, dataset), environment=dict(where))


def about(params: Params, dataset: Dataset) -> dict[str, str]:
    """What must be the same on all hosts of a training."""
    packages = {name: version for name, version in environment().items() if name in PACKAGES}
    return {
        name: fingerprint(part=part) for name, part in (ingredients(params, dataset) | {"packages": packages}).items()
    }


def ingredients(params: Params, dataset: Dataset) -> dict[str, Any]:
    """A training's data, code and parameters.

    Without the number of processes: it moves no more than the last digits of a result, and an interrupted training may
    go on with another.
    """
    relevant = {name: value for name, value in params.flat("model", "train").items() if name not in PROCESSES}
    return {
        "data": dataset.about["digest"],
        "code": digest_of_code(code_of("train")),
        "params": relevant | {"binarize": params.data.binarize, "binarize_seed": params.data.binarize_seed},
    }


@contextmanager
def checkpoints_of(name: str) -> Iterator[Path | None]:
    """The folder that this training resumes from, gone when it has succeeded.

    None, which means none to resume from, where another process is at the very same training and does not end.
    """
    folder = WORKSPACE / "checkpoints" / name
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"train: waiting up to {LOCK_TIMEOUT_S} s for a process that is at the same training", file=sys.stderr)
        try:
            lock.acquire(timeout=LOCK_TIMEOUT_S)
        except Timeout:
            yield None
            return
    with lock:
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".lock").unlink(missing_ok=True)


def summary(trained: Fit, dataset: Dataset, params: Params) -> dict[str, Any]:
    """metrics/train.json: the losses of the epoch whose weights are saved."""
    best = {"best_epoch": trained.best_epoch} if params.train.validation_size else {}
    binarize = params.data.binarize
    losses = {
        metric_name(name if name.startswith("val_") else f"train_{name}", binarize): value
        for name, value in trained.losses.items()
    }
    return {"dataset": dataset.name, "binarize": binarize, "epochs": len(trained.history), **best, **losses}


def run_name(params: Params, dataset: Dataset) -> str:
    """DVC's name for the experiment where there is one, else the data set's, and what distinguishes the model."""
    model, train = params.model, params.train
    name = os.environ.get("DVC_EXP_NAME") or dataset.name
    hidden = "-".join(map(str, model.hidden_dims))
    return f"{name} · z {model.latent_dim}, h {hidden}, batch {train.batch_size}, {train.epochs} epochs"


def run_tags(params: Params, dataset: Dataset, processes: int) -> dict[str, Any]:
    """What to filter runs by: data, model, code, machine."""
    git = git_state(HERE)
    return {
        "dataset": dataset.name,
        "dataset_digest": dataset.about["digest"],
        "binarize": params.data.binarize,
        "latent_dim": params.model.latent_dim,
        **git,
        "mlflow.source.git.commit": git["git_commit"],
        "torch": torch.__version__,
        "processes": processes,
        "machine": f"{platform.system()} {platform.machine()}",
        **({"dvc_experiment": os.environ["DVC_EXP_NAME"]} if os.environ.get("DVC_EXP_NAME") else {}),
    }
