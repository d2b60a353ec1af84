"""The files that stages pass to each other, relative to the folder that holds dvc.yaml."""

from pathlib import Path
from typing import TYPE_CHECKING

from mnist_vae.files import read_or_refuse

if TYPE_CHECKING:
    import pandas as pd

PARAMS = Path("params.yaml")
DATASET = Path("data/dataset")  # a folder
ABOUT_DATASET = DATASET.with_suffix(".json")
MODEL = Path("models/vae.safetensors")
LOSSES = Path("plots/losses.csv")
CODES = Path("plots/latents.csv")
METRICS = Path("metrics")
PLOTS = Path("plots")


def read_csv(name: str, stage: str, **types: str) -> "pd.DataFrame":
    """A table that ``stage`` wrote into plots/; ``types`` are those of columns that pandas would guess otherwise.

    Raises:
        UserError: it is missing or damaged.
    """
    import pandas as pd  # for two of the stages

    remedy = f"`dvc repro --force --single-item {stage}` makes it again"
    return read_or_refuse(PLOTS / name, lambda path: pd.read_csv(path, dtype=types), remedy, (OSError, ValueError))
