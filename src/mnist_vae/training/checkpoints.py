"""Checkpoints that training resumes from: one file per epoch's end, whole even after a power cut."""

import hashlib
import io
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mnist_vae.files import write_bytes
from mnist_vae.params import Train

LAST, BEST = "last", "best"  # names of files, which end in .ckpt
DIGEST = 64  # characters of a SHA-256
DAMAGES = (OSError, ValueError, LookupError, TypeError, pickle.UnpicklingError)


def path_of(folder: Path, name: str) -> Path:
    """The file of this name, LAST or BEST."""
    return folder / f"{name}.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole and flushed to the disk, read without running any code in them."""

    def __init__(self, received: bytes | None = None) -> None:
        """What the first of several processes ``received`` from its disk is loaded from memory by the others."""
        super().__init__()
        self.received = received

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        archive = io.BytesIO()
        torch.save(checkpoint, archive)
        write_bytes(Path(path), seal(archive))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return load_checkpoint(Path(path)) if self.received is None else unseal(self.received, path)


def seal(archive: io.BytesIO) -> memoryview:
    """Give a zip archive its SHA-256 as the comment that it may end in: torch compares no checksums."""
    digest = hashlib.sha256(archive.getbuffer()).hexdigest().encode()
    archive.seek(-2, io.SEEK_END)  # where an archive says that it has no comment
    archive.write(DIGEST.to_bytes(2, "little") + digest)
    return archive.getbuffer()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU: plain types and tensors, whatever the file holds.

    Raises:
        ValueError: it is not what was written.
    """
    return unseal(path.read_bytes(), path)


def unseal(sealed: bytes, path: Path) -> dict[str, Any]:
    """The content of a checkpoint that was read from ``path``.

    Raises:
        ValueError: it is not what was written.
    """
    if seal(io.BytesIO(sealed[: -2 - DIGEST] + bytes(2))) != sealed:
        raise ValueError(f"{path} is damaged")
    content: dict[str, Any] = torch.load(io.BytesIO(sealed), map_location="cpu", weights_only=True)
    return content


def last_checkpoint(folder: Path, *, validation: bool) -> tuple[Path | None, int]:
    """The file to resume from and how many epochs it has behind it; (None, 0) where there is none that is whole.

    With ``validation`` the file of the best epoch so far must be whole as well.
    """
    last = path_of(folder, LAST)
    if not last.is_file():
        return None, 0
    try:
        epochs = len(load_checkpoint(last)["history"])
        if validation:
            load_checkpoint(path_of(folder, BEST))
    except DAMAGES:
        print(f"a checkpoint in {folder} is damaged: training starts again from its first epoch", file=sys.stderr)
        last.unlink()
        return None, 0
    return last, epochs


def spread_checkpoint(path: Path | None, epochs: int) -> tuple[Path | None, int, bytes | None]:
    """What the first of several processes resumes from, for all of them: its file, by name and content."""
    found = [(path, epochs, path.read_bytes() if path else None)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


class Keep(ModelCheckpoint):
    """Keeps one file: of the epoch with the lowest ``monitor``, or of the last epoch where nothing is monitored."""

    def __init__(self, folder: Path, name: str, monitor: str | None = None) -> None:
        super().__init__(
            dirpath=str(folder),
            filename=name,
            monitor=monitor,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the lowest value so far, which Lightning forgets where the folder has been moved."""
        path = self.format_checkpoint_name({})
        super().load_state_dict(
            state_dict
            | {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
            | {"best_k_models": {path: state_dict["best_model_score"]}}
        )


class ResumableEarlyStopping(EarlyStopping):
    """Early stopping that stays stopped: a run killed between its last epoch and its end trains no further epoch.

    It begins to watch when the KL weight has risen: before, the loss may grow though training goes as it should.
    """

    def __init__(self, settings: Train, *, validation: bool) -> None:
        super().__init__(
            monitor="val_loss" if validation else "train_loss",
            patience=settings.patience,
            min_delta=settings.min_delta,
            check_on_train_epoch_end=True,
        )
        self.watch_from = settings.kl_warmup * settings.epochs  # epochs

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch + 1 >= self.watch_from:
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.stopped_epoch:
            trainer.should_stop = True
