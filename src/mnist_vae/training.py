"""Training: a LightningModule and a Trainer around vae.py.

Lightning's bookkeeping for one step is not small beside a step of this small model. So what Lightning sees as one step
is a chunk of CHUNK mini-batches, each with an optimiser step of its own (manual optimisation). The images stay in
memory as uint8, on the device that trains.
"""

import logging
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mnist_vae.binarization import binarize
from mnist_vae.encoding import to_unit
from mnist_vae.errors import UserError
from mnist_vae.params import Train
from mnist_vae.torchmetrics_extras import torchmetrics_without
from mnist_vae.vae import VAE, Architecture, Loss, negative_elbo

with torchmetrics_without("torchvision", "scipy"):
    import lightning as L
    from lightning.pytorch.callbacks import Callback, EarlyStopping
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

CHUNK = 32  # mini-batches per Lightning step
VALIDATION_BATCH = 2_000  # images; a constant, so that validation's noise does not depend on batch_size
REFRESH_S = 0.2  # between two readings of the running losses, each of which waits for the device

Losses = dict[str, float]  # loss, bce, kld (and val_…), nats per image


class Epoch(NamedTuple):
    """What is known at the end of an epoch."""

    number: int  # from 1
    losses: Losses
    vae: VAE


class Fit(NamedTuple):
    """A trained model and how it came about."""

    vae: VAE
    history: list[dict[str, float]]  # one row per epoch: epoch, loss, bce, kld (and val_…), nats per image
    seconds: float  # in the training loop

    @property
    def epochs(self) -> int:
        """How many there were; early stopping may have left some out."""
        return len(self.history)

    @property
    def losses(self) -> Losses:
        """Those of the last epoch."""
        return {name: value for name, value in self.history[-1].items() if name != "epoch"}


class Images:
    """Images in memory as uint8, given out in chunks: one epoch per iteration, shuffled where they are."""

    def __init__(self, images: Tensor, chunk_size: int, shuffle: bool) -> None:
        self.images, self.chunk_size, self.shuffle = images, chunk_size, shuffle  # (N, D) uint8

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.chunk_size)

    def __iter__(self) -> Iterator[Tensor]:
        """Chunks (≤ chunk_size, D), uint8."""
        if not self.shuffle:
            yield from self.images.split(self.chunk_size)
            return
        order = torch.randperm(len(self.images), device=self.images.device)
        for index in order.split(self.chunk_size):
            yield self.images[index]


def pixels(images: Tensor, redraw: torch.Generator | None = None) -> Tensor:
    """uint8 images (B, D) as pixels in [0, 1]; with ``redraw`` each is a fresh draw from Bernoulli(pixel)."""
    gray = to_unit(images)
    return gray if redraw is None else torch.bernoulli(gray, generator=redraw)


class VAETraining(L.LightningModule):
    """The optimisation of a VAE: Adam on the negative ELBO, summed over a mini-batch.

    Logs ``train_loss`` (and ``val_loss``) once per epoch, in nats per image, and hands each epoch to ``on_epoch``.
    """

    def __init__(
        self,
        vae: VAE,
        train: Tensor,
        validation: Tensor,
        settings: Train,
        on_epoch: Callable[[Epoch], None],
        redraw_seed: int | None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.vae, self.settings, self.on_epoch, self.redraw_seed = vae, settings, on_epoch, redraw_seed
        self.terms = self._terms if settings.compile == "none" else torch.compile(self._terms, mode=settings.compile)
        self.train_images, self.validation_images = train, validation  # (N, D) uint8
        self.train_sums: list[Tensor] = []  # (3,) per chunk of this epoch
        self.val_sums: list[Tensor] = []
        self.history: list[dict[str, float]] = []

    def train_dataloader(self) -> Images:
        self.redraw = self._generator(self.redraw_seed)
        return Images(self.train_images.to(self.device), self.settings.batch_size * CHUNK, shuffle=True)

    def val_dataloader(self) -> Images:
        return Images(self.validation_images.to(self.device), VALIDATION_BATCH, shuffle=False)

    def _generator(self, seed: int | None) -> torch.Generator | None:
        return None if seed is None else torch.Generator(self.device).manual_seed(seed)

    def _terms(self, x: Tensor, generator: torch.Generator | None = None) -> Loss:
        """The loss of a mini-batch (B, D), summed over it."""
        logits, posterior = self.vae(x, generator)
        return negative_elbo(logits, x, posterior, self.settings.kl_weight)

    def configure_optimizers(self) -> dict:
        settings = self.settings
        optimizer = torch.optim.Adam(
            self.vae.parameters(),
            lr=settings.learning_rate,
            betas=tuple(settings.betas),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        if settings.schedule == "constant":
            return {"optimizer": optimizer}
        steps = settings.epochs * math.ceil(len(self.train_images) / settings.batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_train_epoch_start(self) -> None:
        self.train_sums.clear()

    def training_step(self, chunk: Tensor, index: int) -> None:
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        total = torch.zeros(3, device=self.device)
        for images in chunk.split(self.settings.batch_size):
            terms = self.terms(pixels(images, self.redraw))
            optimizer.zero_grad()
            self.manual_backward(terms.loss)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            total += torch.stack(terms).detach()
        self.train_sums.append(total)

    def on_validation_epoch_start(self) -> None:
        self.val_sums.clear()
        # The same noise at every epoch: early stopping must not react to luck.
        self.noise = self._generator(self.settings.seed)

    def validation_step(self, images: Tensor, index: int) -> None:
        self.val_sums.append(torch.stack(self._terms(pixels(images), self.noise)))

    def on_validation_epoch_end(self) -> None:
        self.log("val_loss", per_image(self.val_sums, len(self.validation_images))["loss"])

    def on_train_epoch_end(self) -> None:
        losses = per_image(self.train_sums, len(self.train_images))
        self.log("train_loss", losses["loss"])
        if self.val_sums:
            validation = per_image(self.val_sums, len(self.validation_images))
            losses |= {f"val_{name}": value for name, value in validation.items()}
        number = self.current_epoch + 1
        self.history.append({"epoch": number, **losses})
        self.on_epoch(Epoch(number, losses, self.vae))


def per_image(sums: list[Tensor], images: int) -> Losses:
    """Sums of the loss's terms, (3,) each, to their means over images; waits for the device."""
    means = torch.stack(sums).cpu().double().sum(dim=0) / images
    return dict(zip(Loss._fields, means.tolist(), strict=True))


class Progress(Callback):
    """A bar per epoch, in images, with the running losses; where nobody watches (no terminal), a line per epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, module: VAETraining) -> None:
        self.title = f"epoch {module.current_epoch + 1}/{module.settings.epochs}"
        self.bar = tqdm(
            total=len(module.train_images),
            desc=self.title,
            unit=" images",
            unit_scale=True,
            disable=None,
            file=sys.stderr,
        )
        self.seen, self.read_at = 0, time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, module: VAETraining, outputs, batch: Tensor, index: int) -> None:
        self.seen += len(batch)
        self.bar.update(len(batch))
        done = self.seen == len(module.train_images)
        if not self.bar.disable and (done or time.monotonic() - self.read_at > REFRESH_S):
            self.bar.set_postfix_str(in_words(per_image(module.train_sums, self.seen)))
            self.read_at = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, module: VAETraining) -> None:
        if self.bar.disable:
            print(f"{self.title}: {in_words(per_image(module.train_sums, self.seen))}", file=sys.stderr)
        self.bar.close()


def in_words(losses: Losses) -> str:
    """The losses as a reader wants them: ``loss 156.21, bce 150.60, kld 5.61 nats/image``."""
    return ", ".join(f"{name} {value:.2f}" for name, value in losses.items()) + " nats/image"


def seed_everything(seed: int) -> None:
    """The notebook's seeds and cuDNN settings."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  for libraries that still draw from the global generator
    torch.manual_seed(seed)  # every device's
    torch.backends.cudnn.enabled = True
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.deterministic = True


def hold_out(images: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split images (N, …) at random into N − size for training and ``size`` for validation.

    Raises:
        UserError: nothing would be left to train on.
    """
    if size >= len(images):
        raise UserError(
            f"params.yaml: train.validation_size is {size}; it must be less than the {len(images)} training images"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return (images[order[size:]], images[order[:size]]) if size else (images, images[:0])


def fit(
    images: np.ndarray,
    architecture: Architecture,
    settings: Train,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    redraw_seed: int | None = None,
) -> Fit:
    """Train a VAE on uint8 images (N, 28, 28), from its initial weights to early stopping or the last epoch.

    With ``redraw_seed`` (dynamic binarisation) the pixels are drawn anew from Bernoulli(pixel) at each epoch; those
    held out for validation are drawn once.
    Equal seeds, settings and machines give equal bits; the number of threads is the caller's to set.

    Raises:
        UserError: too many images held out, an accelerator that is not there, or a loss that is not finite.
    """
    train, validation = hold_out(torch.from_numpy(images).flatten(1), settings.validation_size, settings.seed)
    if redraw_seed is not None:
        validation = torch.from_numpy(binarize(validation.numpy(), redraw_seed))
    seed_everything(settings.seed)
    module = VAETraining(VAE(architecture), train, validation, settings, on_epoch, redraw_seed)
    stopping = EarlyStopping(
        monitor="val_loss" if len(validation) else "train_loss",
        patience=settings.patience,
        min_delta=settings.min_delta,
        check_on_train_epoch_end=True,
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips, no inventory of accelerators
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning 2.6 beside torch 2.13: nothing a user can act on
    try:
        trainer = L.Trainer(
            accelerator=settings.accelerator,
            devices=1,
            max_epochs=settings.epochs,
            callbacks=[Progress(), stopping],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=1.0 if len(validation) else 0,
        )
    except (MisconfigurationException, RuntimeError) as error:
        raise UserError(f"params.yaml: train.accelerator is {settings.accelerator!r}: {error}") from error
    started = time.perf_counter()
    try:
        trainer.fit(module)
    except SystemExit as error:  # what Lightning makes of Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from error
        raise
    seconds = time.perf_counter() - started
    weights = torch.nn.utils.parameters_to_vector(module.vae.parameters())
    if not (weights.isfinite().all() and all(math.isfinite(value) for value in module.history[-1].values())):
        raise UserError(
            f"training diverged at epoch {len(module.history)} (the loss is not finite); "
            "in params.yaml, lower train.learning_rate or raise train.batch_size"
        )
    return Fit(module.vae.cpu(), module.history, seconds)
