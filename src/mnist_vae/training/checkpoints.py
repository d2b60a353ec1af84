"""Checkpoints that training resumes from: one file per epoch's end, whole even after a power cut."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mnist_vae.files import atomic_write
from mnist_vae.params import Train

LAST, BEST = "last", "best"  # names of files, which end in .ckpt

# What torch.load was seen to raise for files with bytes flipped or missing.
DAMAGES = (
    *(zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError),
    *(LookupError, AttributeError, TypeError, ValueError),
)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole and flushed to the disk, read without running any code in them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_write(Path(path)) as scratch:
            torch.save(checkpoint, scratch)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return load_checkpoint(Path(path))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU: plain types and tensors, whatever the file holds."""
    with zipfile.ZipFile(path) as archive:  # torch itself does not compare checksums
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} is damaged")
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def last_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """The file to resume from and how many epochs it has behind it; (None, 0) where there is none that is whole."""
    path = folder / f"{LAST}.ckpt"
    if path.is_file():
        try:
            return path, len(load_checkpoint(path)["history"])
        except DAMAGES:
            path.unlink()
    return None, 0


def keep(folder: Path, name: str, monitor: str | None = None) -> ModelCheckpoint:
    """Keep one file: of the epoch with the lowest ``monitor``, or of the last epoch where nothing is monitored."""
    return ModelCheckpoint(
        dirpath=folder,
        filename=name,
        monitor=monitor,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


class ResumableEarlyStopping(EarlyStopping):
    """Early stopping that stays stopped: a run killed between its last epoch and its end trains no further epoch."""

    def __init__(self, settings: Train, *, validation: bool) -> None:
        super().__init__(
            monitor="val_loss" if validation else "train_loss",
            patience=settings.patience,
            min_delta=settings.min_delta,
            check_on_train_epoch_end=True,
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.stopped_epoch:
            trainer.should_stop = True
