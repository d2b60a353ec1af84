"""The seconds of each epoch under Lightning's Trainer."""

import time
from itertools import pairwise

import lightning as L
from lightning.pytorch.callbacks import Callback


class EpochClock(Callback):
    """Takes the time whenever an epoch starts, so that an epoch has all of its bookkeeping, checkpoints included."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.moments.append(time.perf_counter())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.moments.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of each epoch."""
        return [end - start for start, end in pairwise(self.moments)]
