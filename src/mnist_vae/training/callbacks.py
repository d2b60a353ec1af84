"""What a person sees of training while it runs: a bar per epoch, and digits that take shape."""

import signal
import sys
import threading
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from tqdm import tqdm

from mnist_vae.model.latent import decode, prior_draws, tile, to_uint8
from mnist_vae.training.module import Losses, VAETraining, per_image

REFRESH_S = 0.2  # between two readings of the running losses, each of which waits for the device
ROWS, COLS = 4, 18  # of the samples that take shape from epoch to epoch


class Progress(Callback):
    """A bar per epoch, in images, with the running losses; where there is no terminal, a line per epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, VAETraining)
        self.title = f"epoch {module.current_epoch + 1}/{module.settings.epochs}"
        self.bar = tqdm(
            total=module.train_images,
            desc=self.title,
            unit=" images",
            unit_scale=True,
            disable=None,
            file=sys.stderr,
        )
        self.seen, self.read_at = 0, time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Tensor, index: int
    ) -> None:
        assert isinstance(module, VAETraining)
        seen = min(module.steps * module.settings.batch_size, module.train_images)  # by all processes
        self.bar.update(seen - self.seen)
        self.seen = seen
        done = self.seen == module.train_images
        if not self.bar.disable and (done or time.monotonic() - self.read_at > REFRESH_S):
            self.bar.set_postfix_str(in_words(per_image(module.train_sums, self.seen)))
            self.read_at = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, VAETraining)
        if self.bar.disable:
            print(f"{self.title}: {in_words(per_image(module.train_sums, self.seen))}", file=sys.stderr)
        self.bar.close()


class SampleFrames(Callback):
    """At each epoch's end, the same draws from the prior, decoded: one frame of a slider for loggers with images."""

    def __init__(self, latent_dim: int, seed: int) -> None:
        self.z = prior_draws(ROWS * COLS, latent_dim, seed)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, VAETraining)
        frame = to_uint8(tile(decode(module.vae, self.z.to(module.device)), COLS))
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("samples", [frame], step=module.current_epoch + 1)


class CallersSignals(Callback):
    """Leaves SIGTERM to the handler of whoever calls ``fit``.

    Among several processes Lightning's own would have the first one tell the others, and wait for their answer, in the
    midst of what they do together.
    """

    def __init__(self) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.handler)


def in_words(losses: Losses) -> str:
    """The losses as a reader wants them: ``loss 156.21, bce 150.60, kld 5.61 nats/image``."""
    return ", ".join(f"{name} {value:.2f}" for name, value in losses.items()) + " nats/image"
