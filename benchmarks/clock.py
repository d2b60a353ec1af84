"""The seconds of each epoch under Lightning's Trainer, and those in which the device works."""

import time
from collections.abc import Iterable
from itertools import pairwise

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile


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


class DeviceClock(Callback):
    """The seconds of the last epoch in which the device runs a kernel or copies, as torch's profiler sees them.

    The profiler slows the process that launches the kernels, not the kernels: how long an epoch takes is to be measured
    without it. On the CPU, torch's operations are what counts as work.
    """

    seconds = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs:
            self.device = pl_module.device.type.upper()
            self.profiler = profile(activities=[getattr(ProfilerActivity, self.device)])
            self.profiler.start()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.profiler.stop()
        self.seconds = covered(
            (event.time_range.start, event.time_range.end)
            for event in self.profiler.events()
            if event.device_type.name == self.device and not event.is_user_annotation
        )
        self.seconds /= 1e6  # from microseconds


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of what intervals (start, end) cover together: what overlaps counts once."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
