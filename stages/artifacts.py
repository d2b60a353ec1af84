"""The files that stages pass to each other, relative to the folder that holds dvc.yaml."""

import json
import uuid
from pathlib import Path

from mnist_vae.data import Dataset, load_dataset
from mnist_vae.errors import UserError

PARAMS = Path("params.yaml")
DATASET = Path("data/dataset.npz")
ABOUT_DATASET = Path("data/dataset.json")
MODEL = Path("models/vae.pt")
RUN_ID = Path("models/run_id")
METRICS = Path("metrics")
PLOTS = Path("plots")


def read_dataset() -> Dataset:
    """The images that download chose."""
    try:
        name = json.loads(ABOUT_DATASET.read_text())["name"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{ABOUT_DATASET} is missing or damaged; `dvc repro download` makes it again") from error
    return load_dataset(DATASET, name)


def read_run_id() -> str:
    """The MLflow run that train opened."""
    try:
        return uuid.UUID(RUN_ID.read_text().strip()).hex
    except (OSError, ValueError) as error:
        raise UserError(f"{RUN_ID} is missing or damaged; `dvc repro train` makes it again") from error
