"""The optimisation of a VAE as a LightningModule around vae.py."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from mnist_vae.errors import UserError
from mnist_vae.model.latent import to_unit
from mnist_vae.model.vae import VAE, Loss, Posterior, negative_elbo, negative_iwae_bound
from mnist_vae.params import Train
from mnist_vae.training import data_module
from mnist_vae.training.processes import ALL, Share

Losses = dict[str, float]  # loss, bce, kld (and val_…), nats per image


class VAETraining(L.LightningModule):
    """Adam on the negative ELBO, or on the negative IWAE bound, summed over a mini-batch.

    What Lightning sees as one batch is a chunk of mini-batches (``data_module.CHUNK`` says why), each with an optimiser
    step of its own: manual optimisation. Losses are in nats per image, once per epoch: logged as ``train/loss``, …,
    monitored as ``train_loss`` and ``val_loss``, and kept in ``history``; always with the full KL weight, also while
    that which is minimised has a lower one (``kl_weight``).

    Of several processes each takes its ``share`` of a mini-batch. All draw the noise of the whole mini-batch, so that
    it does not depend on their number, and all see the sums over all of them.
    """

    def __init__(
        self, vae: VAE, settings: Train, redraw_seed: int | None, train_images: int, share: Share = ALL
    ) -> None:
        """With ``redraw_seed`` (dynamic binarisation) pixels are fresh draws from Bernoulli(pixel) at each epoch."""
        super().__init__()
        self.automatic_optimization = False
        self.vae, self.settings, self.redraw_seed, self.train_images = vae, settings, redraw_seed, train_images
        self.share = share
        self.terms = self._terms if settings.compile == "none" else torch.compile(self._terms, mode=settings.compile)
        self.train_sums: list[Tensor] = []  # (3,) per chunk of this epoch
        self.val_sums: list[Tensor] = []
        self.val_images = 0
        self.history: list[dict[str, float]] = []  # one row per epoch: epoch, loss, bce, kld (and val_…)
        self._resumed_generators: dict[str, Tensor] = {}

    def _generator(self, seed: int | None) -> torch.Generator | None:
        return None if seed is None else torch.Generator(self.device).manual_seed(seed)

    def _terms(
        self, x: Tensor, images: int, generator: torch.Generator | None = None, kl_weight: Tensor | None = None
    ) -> tuple[Tensor, Loss]:
        """What to minimise on x (B, D), this process's share of so many images, and the loss to report, both summed.

        The first differs from the loss where it has a ``kl_weight`` of its own.
        """
        draws = self.settings.importance_samples
        posterior = Posterior(*(part.float() for part in self.vae.encode(x)))  # also where layers have less precision
        shape = (images, posterior.mean.shape[1]) if draws == 1 else (draws, images, posterior.mean.shape[1])
        eps = self.share.of(posterior.mean.new_empty(shape).normal_(generator=generator), dim=-2)
        z = posterior.at(eps)  # (B, Z), or (K, B, Z) for K draws
        logits = self.vae.decode(z).float()
        if draws == 1:
            negative_bound = partial(negative_elbo, logits, x, posterior)
        else:
            negative_bound = partial(negative_iwae_bound, logits, x, z, posterior)
        reported = negative_bound(self.settings.kl_weight)
        return reported.loss if kl_weight is None else negative_bound(kl_weight).loss, reported

    def kl_weight(self, step: int) -> float:
        """The KL weight at an optimiser step of the whole training, from 0.

        kl_weight · min(1, step / rise), where rise is the share kl_warmup of all steps.
        """
        settings = self.settings
        rise = settings.kl_warmup * settings.epochs * self.steps_per_epoch
        return settings.kl_weight if step >= rise else settings.kl_weight * step / rise

    def configure_optimizers(self) -> OptimizerLRScheduler:
        settings = self.settings
        optimizer = torch.optim.Adam(
            self.vae.parameters(),
            lr=settings.learning_rate,
            betas=(settings.betas[0], settings.betas[1]),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        if settings.schedule == "constant":
            return {"optimizer": optimizer}
        steps = settings.epochs * self.steps_per_epoch
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    @property
    def steps_per_epoch(self) -> int:
        """Mini-batches in an epoch."""
        return math.ceil(self.train_images / self.settings.batch_size)

    def on_fit_start(self) -> None:
        self.redraw = self._generator(self.redraw_seed)

    def on_train_epoch_start(self) -> None:
        self.train_sums.clear()
        self.steps = 0
        if self._resumed_generators:
            self._restore_generators(self._resumed_generators)
            self._resumed_generators = {}

    def training_step(self, chunk: Tensor, index: int) -> None:
        """Train on a chunk (≤ CHUNK · batch_size, D) of uint8 images, or on this process's share of it.

        Raises:
            UserError: the loss of a mini-batch, or at the epoch's end a weight or a moment of Adam, is not finite.
        """
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, L.pytorch.core.optimizer.LightningOptimizer)
        assert not isinstance(schedule, list)
        parameters = [*self.vae.parameters()]
        totals = [torch.zeros(3, device=self.device)]  # after each step
        steps_before = self.current_epoch * self.steps_per_epoch + self.steps
        for step, (x, images) in enumerate(self._mini_batches(chunk), steps_before):
            weight = self.kl_weight(step)
            rising = None if weight == self.settings.kl_weight else torch.tensor(weight, device=self.device)
            minimised, terms = self.terms(x, images, kl_weight=rising)
            for parameter in parameters:  # as optimizer.zero_grad, in less time: steps are short
                parameter.grad = None
            self.manual_backward(minimised)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            totals.append(totals[-1] + torch.stack(terms).detach())
        totals = self._over_processes(totals)
        if not totals[-1].isfinite().all():
            finite = torch.stack(totals).isfinite().all(dim=1)
            raise self._diverged(self.steps + int(finite.sum()), "the loss")
        self.steps += len(totals) - 1
        self.train_sums.append(totals[-1])
        if self.steps == self.steps_per_epoch:  # before a checkpoint keeps what is not finite
            moments = (tensor for state in optimizer.optimizer.state.values() for tensor in state.values())
            if not all(tensor.isfinite().all() for tensor in (*self.vae.parameters(), *moments)):
                raise self._diverged(self.steps, "a weight or a moment of Adam")

    def _mini_batches(self, chunk: Tensor) -> Iterator[tuple[Tensor, int]]:
        """This process's shares of the mini-batches of a chunk, as pixels, and the number of images of each as a whole.

        A chunk has the shares only, unless pixels are drawn: those are drawn of the whole mini-batch.
        """
        batch_size = self.settings.batch_size
        if self.share.is_all or self.redraw is not None:
            for images in chunk.split(batch_size):
                yield self.share.of(pixels(images, self.redraw)), len(images)
            return
        left = self.train_images - self.steps * batch_size
        firsts = range(0, min(left, data_module.CHUNK * batch_size), batch_size)
        sizes = [min(batch_size, left - first) for first in firsts]
        for images, size in zip(chunk.split([self.share.size(size) for size in sizes]), sizes, strict=True):
            yield pixels(images), size

    def _over_processes(self, sums: list[Tensor]) -> list[Tensor]:
        """Sums of this process to sums over all processes, which all of them get."""
        if self.share.is_all:
            return sums
        total = self.trainer.strategy.reduce(torch.stack(sums), reduce_op="sum")
        assert isinstance(total, Tensor)
        return list(total)

    def _diverged(self, step: int, what: str) -> UserError:
        return UserError(
            f"training diverged at epoch {self.current_epoch + 1}, step {step} of {self.steps_per_epoch}: "
            f"{what} is not finite; in params.yaml, lower train.learning_rate or raise train.batch_size"
        )

    def on_validation_epoch_start(self) -> None:
        self.val_sums.clear()
        self.val_images = 0
        # The same noise at every epoch: early stopping must not react to luck.
        self.noise = self._generator(self.settings.seed)

    def validation_step(self, images: Tensor, index: int) -> None:
        fewer = max(1, len(images) // self.settings.importance_samples)  # so that memory does not grow with the draws
        for block in images.split(fewer):
            _, terms = self._terms(self.share.of(pixels(block)), len(block), self.noise)
            self.val_sums.append(torch.stack(terms))
        self.val_images += len(images)

    def on_validation_epoch_end(self) -> None:
        self.val_sums = self._over_processes(self.val_sums)
        loss = per_image(self.val_sums, self.val_images)["loss"]
        if not math.isfinite(loss):
            raise self._diverged(self.steps, "the validation loss")
        self.log("val_loss", loss, logger=False)

    def on_train_epoch_end(self) -> None:
        losses = per_image(self.train_sums, self.train_images)
        self.log("train_loss", losses["loss"], logger=False)
        logged = {f"train/{name}": value for name, value in losses.items()}
        if self.val_sums:
            validation = per_image(self.val_sums, self.val_images)
            logged |= {f"val/{name}": value for name, value in validation.items()}
            losses |= {f"val_{name}": value for name, value in validation.items()}
        epoch = self.current_epoch + 1
        self.history.append({"epoch": epoch, **losses})
        for logger in self.loggers:  # not self.log, which would round to float32
            logger.log_metrics(logged, step=epoch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not keep: the history and the state of every generator that training draws from."""
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.redraw is not None:
            generators["redraw"] = self.redraw.get_state()
        checkpoint |= {"history": self.history, "generators": generators}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Restored when the next epoch begins: what Lightning sets up before may draw too.
        self.history, self._resumed_generators = checkpoint["history"], checkpoint["generators"]

    def _restore_generators(self, states: dict[str, Tensor]) -> None:
        torch.set_rng_state(states["cpu"].cpu())
        if "cuda" in states and self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"].cpu(), self.device)
        if "redraw" in states and self.redraw is not None:
            self.redraw.set_state(states["redraw"].cpu())


def pixels(images: Tensor, redraw: torch.Generator | None = None) -> Tensor:
    """uint8 images (B, D) as pixels in [0, 1]; with ``redraw`` each is a fresh draw from Bernoulli(pixel)."""
    gray = to_unit(images)
    return gray if redraw is None else torch.bernoulli(gray, generator=redraw)


def per_image(sums: list[Tensor], images: int) -> Losses:
    """Sums of the loss's terms, (3,) each, to their means over images; waits for the device."""
    means = torch.stack(sums).cpu().double().sum(dim=0) / images
    return dict(zip(Loss._fields, means.tolist(), strict=True))
