"""Training from start to end: a Trainer around the module, resumed where it was interrupted."""

import logging
import os
import random
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from mnist_vae.data.dataset import ImageSource
from mnist_vae.errors import UserError
from mnist_vae.model.vae import VAE, VAEConfig
from mnist_vae.params import Train
from mnist_vae.training.callbacks import CallersSignals, Progress
from mnist_vae.training.checkpoints import (
    BEST,
    LAST,
    AtomicCheckpointIO,
    Keep,
    ResumableEarlyStopping,
    last_checkpoint,
    load_checkpoint,
    path_of,
    spread_checkpoint,
)
from mnist_vae.training.data_module import ImagesDataModule
from mnist_vae.training.module import Losses, VAETraining
from mnist_vae.training.processes import Share, own_share
from mnist_vae.training.strategies import IS_POSSIBLE, SharedMemoryStrategy, SummingDDPStrategy


class Fit(NamedTuple):
    """A trained model and how it came about."""

    vae: VAE  # with the weights of ``best_epoch``
    history: list[dict[str, float]]  # one row per epoch: epoch, loss, bce, kld (and val_…), nats per image
    best_epoch: int  # from 1: the one with the lowest validation loss, the last where no images are held out
    seconds: float  # in the training loop, since it was last resumed
    resumed_after: int  # epochs that an interrupted training had behind it

    @property
    def losses(self) -> Losses:
        """Those of ``best_epoch``."""
        return {name: value for name, value in self.history[self.best_epoch - 1].items() if name != "epoch"}


def fit(
    images: ImageSource,
    config: VAEConfig,
    settings: Train,
    *,
    redraw_seed: int | None = None,
    logger: Logger | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoints: Path | None = None,
) -> Fit:
    """Train a VAE on uint8 images (N, 28, 28), from its initial weights to early stopping or the last epoch.

    With ``redraw_seed`` (dynamic binarisation) the pixels are drawn anew from Bernoulli(pixel) at each epoch; those
    held out for validation are drawn once. With a folder for ``checkpoints``, training goes on from what an
    interrupted call with the same arguments left there, and ends with the same bits as if nothing had happened.
    Equal seeds, settings and machines give equal bits; the number of threads is the caller's to set. ``callbacks`` hear
    of epochs and of chunks of mini-batches; in float32 (``FullPrecision``) not of each optimiser step.

    Several processes (``processes``) each call it with the same arguments, take their share of each mini-batch, and
    get the same result up to rounding. Only the first needs a logger, callbacks and the folder.

    Raises:
        UserError: too many images held out, an accelerator that is not there or lacks the precision, or a loss that is
            not finite.
    """
    share = own_share()
    if share.is_all and settings.devices * settings.nodes > 1:
        raise UserError(
            f"params.yaml: train.devices is {settings.devices} and train.nodes {settings.nodes}, and this is the only "
            "process: `python -m stages train` starts the others, and mnist_vae.training.processes does in a script"
        )
    data = ImagesDataModule(
        images,
        batch_size=settings.batch_size,
        validation_size=settings.validation_size,
        seed=settings.seed,
        redraw_seed=redraw_seed,
        shuffle_window=settings.shuffle_window,
        share=share,
    )
    validation = settings.validation_size > 0
    seed_everything(settings.seed)
    module = VAETraining(VAE(config), settings, redraw_seed, len(data.train_images), share)
    if share.rank > 0:
        checkpoints = Path("checkpoints")  # never written to
    with nullcontext(checkpoints) if checkpoints else TemporaryDirectory(prefix="checkpoints-") as kept:
        folder = Path(kept)
        path, epochs = last_checkpoint(folder, validation=validation) if share.rank == 0 else (None, 0)
        content = None
        if not share.is_all:
            path, epochs, content = spread_checkpoint(path, epochs)
        if path and share.rank == 0:
            print(f"resuming after epoch {epochs} of at most {settings.epochs}", file=sys.stderr)
        own = [*([Progress()] if share.rank == 0 else []), *callbacks]
        own += [ResumableEarlyStopping(settings, validation=validation)]
        if not share.is_all:
            own.append(CallersSignals())
        best = [Keep(folder, BEST, monitor="val_loss")] if validation else []
        last = Keep(folder, LAST)  # after the best, whose score it holds
        trainer = _trainer(settings, [*own, *best, last], logger, share, content, validation=validation)
        started = time.perf_counter()
        try:
            trainer.fit(module, datamodule=data, ckpt_path=path)
        except SystemExit as error:  # what Lightning makes of Ctrl-C
            if trainer.interrupted and type(error) is SystemExit:
                raise KeyboardInterrupt from error
            raise
        seconds = time.perf_counter() - started
        best_epoch = len(module.history)
        if best:
            chosen: list[Any] = [None, None]
            if share.rank == 0:
                loaded = load_checkpoint(path_of(folder, BEST))
                chosen = [loaded["state_dict"], len(loaded["history"])]
            if not share.is_all:
                dist.broadcast_object_list(chosen, src=0)
            weights, best_epoch = chosen
            module.load_state_dict(weights)
    return Fit(module.vae.cpu(), module.history, best_epoch, seconds, epochs)


class FullPrecision(Precision):
    """float32 without three hooks that Lightning calls on every callback in each optimiser step.

    None of ours has them, and the calls take time that is not small beside a step on 64 images.
    """

    def pre_backward(self, tensor: Tensor, module: Any) -> Tensor:
        return tensor

    def post_backward(self, tensor: Tensor, module: Any) -> Tensor:
        return tensor.detach()

    def optimizer_step(self, optimizer: Any, model: Any = None, closure: Any = None, **rest: Any) -> Any:
        return optimizer.step(closure=closure, **rest)


def _trainer(
    settings: Train,
    callbacks: list[Callback],
    logger: Logger | None,
    share: Share,
    checkpoint: bytes | None,
    *,
    validation: bool,
) -> L.Trainer:
    """A Trainer that reports through our callbacks only.

    Raises:
        UserError: the accelerator is not there, or has no such precision.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips, no inventory of accelerators
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning 2.6 beside torch 2.13: nothing a user can act on
    warnings.filterwarnings("ignore", ".*checkpoint directory.*")  # it is meant to hold what a run left
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")  # what is logged is the same on all processes
    warnings.filterwarnings("ignore", ".*fp16 is not supported.*")  # it is refused below
    strategy: str | DDPStrategy = "auto"
    plugins: list[Any] = [AtomicCheckpointIO(checkpoint)]
    is_full = settings.precision == "32-true"
    if is_full:
        plugins.append(FullPrecision())
    devices = nodes = 1
    if not share.is_all:
        # The process group is there already. Lightning reads from the environment what torchrun, too, leaves there.
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        can_share = IS_POSSIBLE and devices == share.processes and dist.get_backend() == "gloo"
        strategy = SharedMemoryStrategy() if can_share else SummingDDPStrategy(gradient_as_bucket_view=True)
        plugins.append(TorchElasticEnvironment())
        nodes = share.processes // devices
    try:
        trainer = L.Trainer(
            accelerator=settings.accelerator,
            precision=None if is_full else settings.precision,
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            use_distributed_sampler=False,  # our data module knows this process's share
            plugins=plugins,
            max_epochs=settings.epochs,
            callbacks=callbacks,
            logger=logger or False,
            log_every_n_steps=1,  # once per epoch is how we log; this keeps Lightning from warning of few steps
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=1.0 if validation else 0,
        )
    except (MisconfigurationException, RuntimeError) as error:
        raise UserError(f"params.yaml: train.accelerator is {settings.accelerator!r}: {error}") from error
    if trainer.precision != settings.precision:  # Lightning takes another one on a CPU
        raise UserError(
            f"params.yaml: train.precision is {settings.precision!r}, which needs a GPU; bf16-mixed works on a CPU too"
        )
    return trainer


def seed_everything(seed: int) -> None:
    """The notebook's seeds and cuDNN settings."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  for libraries that still draw from the global generator
    torch.manual_seed(seed)  # every device's
    torch.backends.cudnn.enabled = True
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.deterministic = True
