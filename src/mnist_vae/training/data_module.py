"""The images as Lightning wants them: in memory as uint8, on the device that trains, in chunks of mini-batches."""

import math
from collections.abc import Iterator

import lightning as L
import torch
from torch import Tensor

from mnist_vae.data.binarization import binarize
from mnist_vae.data.dataset import Images, hold_out
from mnist_vae.training.processes import ALL, Share

# Mini-batches that Lightning sees as one batch. Its bookkeeping for a batch is not small beside a training step of so
# small a model: with one mini-batch per Lightning step an epoch takes more than twice as long.
CHUNK = 32
VALIDATION_BATCH = 2_000  # images; a constant, so that validation's noise does not depend on train.batch_size


class Chunks:
    """Images (N, D) in chunks: one epoch per iteration, shuffled where they are."""

    def __init__(self, images: Tensor, chunk_size: int, *, shuffle: bool, share: Share = ALL) -> None:
        """With a ``share``, of each of the CHUNK mini-batches of a chunk only that."""
        self.images, self.chunk_size, self.shuffle, self.share = images, chunk_size, shuffle, share

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.chunk_size)

    def __iter__(self) -> Iterator[Tensor]:
        """Chunks (≤ chunk_size, D), uint8."""
        if not self.shuffle:
            yield from self.images.split(self.chunk_size)
            return
        order = torch.randperm(len(self.images), device=self.images.device)
        for index in order.split(self.chunk_size):
            yield self.images[share_of_each(index, self.chunk_size // CHUNK, self.share)]


def share_of_each(images: Tensor, batch_size: int, share: Share) -> Tensor:
    """Of each mini-batch among images or their numbers (N, …), the share of one process."""
    return images if share.is_all else torch.cat([share.of(batch) for batch in images.split(batch_size)])


class ImagesDataModule(L.LightningDataModule):
    """Training and validation images, from uint8 images (N, 28, 28) of which some are held out."""

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        validation_size: int,
        seed: int,
        redraw_seed: int | None,
        share: Share = ALL,
    ) -> None:
        """Hold out ``validation_size`` images; with ``redraw_seed`` (dynamic binarisation) those are drawn once.

        A training process gets its ``share`` of each mini-batch, or all of it where its pixels are drawn.
        """
        super().__init__()
        self.share = share if redraw_seed is None else ALL
        train, validation = hold_out(images, validation_size, seed)
        if redraw_seed is not None:
            validation = binarize(validation, redraw_seed)
        self.batch_size = batch_size
        self.train_images, self.validation_images = (
            torch.from_numpy(part).flatten(1) for part in (train, validation)
        )  # (N, D) uint8

    def train_dataloader(self) -> Chunks:
        """Chunks of CHUNK mini-batches."""
        return Chunks(self._on_device(self.train_images), self.batch_size * CHUNK, shuffle=True, share=self.share)

    def val_dataloader(self) -> Chunks:
        """Batches of VALIDATION_BATCH images, in order."""
        return Chunks(self._on_device(self.validation_images), VALIDATION_BATCH, shuffle=False)

    def _on_device(self, images: Tensor) -> Tensor:
        assert self.trainer is not None
        return images.to(self.trainer.strategy.root_device)
