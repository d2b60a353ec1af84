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


def read_losses() -> "pd.DataFrame":
    """The losses of each epoch, as train wrote them; the validation's too, where images were held out.

    Raises:
        UserError: the table is missing or damaged.
    """
    losses = dict.fromkeys(("loss", "bce", "kld"), "float64")
    validation = {f"val_{name}": kind for name, kind in losses.items()}
    return _read_csv(LOSSES, "train", {"epoch": "int64", **losses, "binarize": "str"}, validation)


def read_codes(latent_dim: int) -> "pd.DataFrame":
    """The posterior mean of each test image, as evaluate wrote them; its digit too, where the images have labels.

    Raises:
        UserError: the table is missing, damaged, or of a model with another number of dimensions.
    """
    return _read_csv(CODES, "evaluate", {f"z{dim}": "float64" for dim in range(latent_dim)}, {"digit": "uint8"})


def _read_csv(path: Path, stage: str, columns: dict[str, str], optional: dict[str, str]) -> "pd.DataFrame":
    """A table of these columns, each with its type, and perhaps of optional ones; ``stage`` wrote it.

    Raises:
        UserError: it is missing, or has other columns, no rows, or a value that is not of its column's type.
    """

    def read(path: Path) -> "pd.DataFrame":
        import numpy as np  # not above: stages/__main__.py sets it up before it is loaded
        import pandas as pd  # for two of the stages

        table = pd.read_csv(path, dtype=columns | optional)
        if not columns.keys() <= set(table) <= columns.keys() | optional.keys():
            raise ValueError(f"its columns are {', '.join(map(str, table))}")
        if type(table.index) is not pd.RangeIndex:  # pandas takes the first value of each row for its name
            raise ValueError("its rows have more values than its first line has names")
        if table.empty:
            raise ValueError("it has no rows")
        if not np.isfinite(table.select_dtypes("number")).all(axis=None):
            raise ValueError("a value is missing or not finite")
        return table

    remedy = f"`dvc repro --force --single-item {stage}` makes it again"
    return read_or_refuse(path, read, remedy, (OSError, ValueError, OverflowError))
