"""train: fit the VAE, live in MLflow.   data, model.*, train.* → models/…, plots/losses.*, metrics/train.json"""

import os
import platform
from typing import Any

import torch

from mnist_vae import figures
from mnist_vae.binarization import Kind, binarized, column
from mnist_vae.checkpoint import Checkpoint, save_checkpoint
from mnist_vae.cpu import set_up_cpu
from mnist_vae.data import Dataset
from mnist_vae.encoding import encode
from mnist_vae.files import replacing, write_csv, write_json
from mnist_vae.generation import decode, prior_draws
from mnist_vae.params import Params, load_params
from mnist_vae.provenance import git_state
from mnist_vae.training import Epoch, Losses, fit, in_words
from mnist_vae.vae import Architecture
from stages import HERE, WORKSPACE, tracker
from stages.artifacts import METRICS, MODEL, PARAMS, PLOTS, RUN_ID, read_dataset

ROWS, COLS = 4, 18  # of the samples that take shape from epoch to epoch


def main() -> None:
    params = load_params(PARAMS)
    set_up_cpu(params.train.threads)
    dataset = read_dataset()
    about = dataset.about()
    kind, seed = params.data.binarize, params.data.binarize_seed
    measured = binarized(dataset, kind, seed)
    images = measured.x_train if kind == "static" else dataset.x_train
    architecture = Architecture(params.model.hidden_dim, params.model.latent_dim)
    z = prior_draws(ROWS * COLS, architecture.latent_dim, params.train.seed)  # the same at every epoch

    with tracker.start_run(WORKSPACE, run_name(params, dataset), run_tags(params, about)) as run:
        run.log_params(params.flat("data", "model", "train"))
        run.log_dataset(about)

        def log_epoch(epoch: Epoch) -> None:
            run.log_metrics(stored(epoch.losses, kind), step=epoch.number)
            run.log_image(
                figures.to_uint8(figures.tile(decode(epoch.vae, z.to(epoch.vae.device)), COLS)),
                "samples",
                step=epoch.number,
            )

        redraw_seed = seed if kind == "dynamic" else None
        trained = fit(images, architecture, params.train, log_epoch, redraw_seed)

        kld_per_dim = encode(trained.vae, measured.x_train).kld().double().mean(dim=0).tolist()
        save_checkpoint(MODEL, Checkpoint(trained.vae, measured.title, kld_per_dim))
        write_csv(PLOTS / "losses.csv", [{**epoch, "binarize": kind} for epoch in trained.history])
        columns = {name: [epoch[name] for epoch in trained.history] for name in trained.history[0]}
        figures.save_png(PLOTS / "losses.png", figures.losses_figure(columns, measured.title))
        epochs, losses = trained.epochs, trained.losses
        about_losses = {"dataset": dataset.name, "binarize": kind, "epochs": epochs}
        write_json(METRICS / "train.json", {**about_losses, **stored(losses, kind)})

        run.log_metrics({"epochs": epochs, "train_seconds": trained.seconds})
        for path in (MODEL, PLOTS / "losses.csv", PLOTS / "losses.png", METRICS / "train.json"):
            run.log_file(path)
        with replacing(RUN_ID) as scratch:
            scratch.write_text(run.id + "\n")
    per_second = epochs * len(images) / trained.seconds
    print(f"{epochs} epochs in {trained.seconds:.1f} s ({per_second:,.0f} images/s): {in_words(losses)}")


def stored(losses: Losses, kind: Kind) -> Losses:
    """Losses under the names that they are stored by: with the split in front, and the kind of pixels behind."""
    return {column(name if name.startswith("val_") else f"train_{name}", kind): value for name, value in losses.items()}


def run_name(params: Params, dataset: Dataset) -> str:
    """DVC's name for the experiment where there is one, else the data set's, and what distinguishes the model."""
    model, train = params.model, params.train
    name = os.environ.get("DVC_EXP_NAME") or dataset.name
    return f"{name} · z {model.latent_dim}, h {model.hidden_dim}, batch {train.batch_size}, {train.epochs} epochs"


def run_tags(params: Params, about: dict[str, Any]) -> dict[str, Any]:
    """What to filter runs by: data, model, code, machine."""
    git = git_state(HERE)
    return {
        "dataset": about["name"],
        "dataset_digest": about["digest"],
        "binarize": params.data.binarize,
        "latent_dim": params.model.latent_dim,
        **git,
        "mlflow.source.git.commit": git["git_commit"],
        "mlflow.source.name": "stages/train.py",
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        **({"dvc_experiment": os.environ["DVC_EXP_NAME"]} if os.environ.get("DVC_EXP_NAME") else {}),
    }
