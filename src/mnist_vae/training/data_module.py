"""The images as Lightning wants them: as uint8, in chunks of mini-batches.

A set that is small beside the memory of the device that trains lies there as a whole. Of any other set, each chunk is
gathered from the mapped file when its turn has come.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import lightning as L
import numpy as np
import torch
from torch import Tensor

from mnist_vae.data.binarization import Binarized
from mnist_vae.data.dataset import ImageSource, Selection, hold_out
from mnist_vae.training.processes import ALL, Share

# Mini-batches that Lightning sees as one batch. Its bookkeeping for a batch is not small beside a training step of so
# small a model: with one mini-batch per Lightning step an epoch takes more than twice as long.
CHUNK = 32
VALIDATION_BATCH = 2_000  # images; a constant, so that validation's noise does not depend on train.batch_size
SHUFFLE_BLOCK = 1_024  # images that lie side by side in the file and enter the shuffle window together
IN_MEMORY = 2**28  # bytes of images that are taken into memory as a whole where training is on the CPU
COPIED = 10_000  # images at a time

Order = Callable[[], Iterable[Tensor]]  # an epoch's order: positions (n,) int64, part by part


class Chunks:
    """Images (N, D) in chunks: one epoch per iteration.

    A chunk holds mini-batches in the order of training, whole ones or, of each, the share of one process. That order is
    the same in every process whose generators are in the same state.
    """

    def __init__(
        self, images: Tensor | ImageSource, chunk_size: int, order: Order | None = None, share: Share = ALL
    ) -> None:
        """Images (N, D) as a tensor, or (N, 28, 28) to gather from; without an ``order`` they come as they lie.

        With a ``share``, of each of the CHUNK mini-batches of a chunk only that.
        """
        self.images, self.chunk_size, self.order, self.share = images, chunk_size, order, share

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.chunk_size)

    def __iter__(self) -> Iterator[Tensor]:
        """Chunks (≤ chunk_size, D), uint8."""
        if self.order is None:
            for first in range(0, len(self.images), self.chunk_size):
                yield rows(self.images, slice(first, first + self.chunk_size))
            return
        for positions in in_equal_parts(self.order(), self.chunk_size):
            yield rows(self.images, share_of_each(positions, self.chunk_size // CHUNK, self.share))


def share_of_each(images: Tensor, batch_size: int, share: Share) -> Tensor:
    """Of each mini-batch among images or their numbers (N, …), the share of one process."""
    return images if share.is_all else torch.cat([share.of(batch) for batch in images.split(batch_size)])


def rows(images: Tensor | ImageSource, which: slice | Tensor) -> Tensor:
    """Some of the images, (n, D) uint8."""
    if isinstance(images, Tensor):
        # index_select copies row by row, which an index in brackets does not
        return images[which] if isinstance(which, slice) else images.index_select(0, which.to(images.device))
    found = images[which] if isinstance(which, slice) else images[which.numpy(force=True)]
    own = found if found.flags.writeable else np.array(found)  # a mapped file is read-only, and torch takes no such
    return torch.from_numpy(own).flatten(1)


def in_equal_parts(order: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The positions of an order in parts of ``size``, of which only the last may be smaller."""
    rest = torch.empty(0, dtype=torch.int64)
    for part in order:
        joined = torch.cat([rest, part]) if len(rest) else part
        whole = len(joined) // size * size
        yield from joined[:whole].split(size) if whole else ()
        rest = joined[whole:]
    if len(rest):
        yield rest


def windowed_order(count: int, window: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """An epoch's order for more images than a window: blocks in random order, shuffled within windows of blocks.

    Positions (≤ window,) int64. Reading stays within a few blocks of the file for as long as a window lasts, and memory
    for the order does not grow with ``count``. A function of its arguments alone: no state, no other process.
    """
    generator = np.random.default_rng([seed, epoch])
    starts = generator.permutation(np.arange(0, count, SHUFFLE_BLOCK))
    blocks = max(1, window // SHUFFLE_BLOCK)
    for first in range(0, len(starts), blocks):
        of_window = (np.arange(start, min(start + SHUFFLE_BLOCK, count)) for start in starts[first : first + blocks])
        yield torch.from_numpy(generator.permutation(np.concatenate([*of_window])))


class ImagesDataModule(L.LightningDataModule):
    """Training and validation images, from uint8 images (N, 28, 28) of which some are held out."""

    def __init__(
        self,
        images: ImageSource,
        *,
        batch_size: int,
        validation_size: int,
        seed: int,
        redraw_seed: int | None,
        shuffle_window: int,
        share: Share = ALL,
    ) -> None:
        """Hold out ``validation_size`` images; with ``redraw_seed`` (dynamic binarisation) those are drawn once.

        A training process gets its ``share`` of each mini-batch, or all of it where its pixels are drawn.
        """
        super().__init__()
        self.share = share if redraw_seed is None else ALL
        self.train_images, self.validation_images = hold_out(images, validation_size, seed)
        if redraw_seed is not None:
            self.validation_images = Binarized(self.validation_images, redraw_seed)
        self.batch_size, self.seed, self.window = batch_size, seed, shuffle_window
        if isinstance(self.train_images, Selection) and self._is_beyond_window:
            self.train_images.positions.sort()  # as they lie in the file, for blocks to be blocks there

    @property
    def _is_beyond_window(self) -> bool:
        return len(self.train_images) > self.window

    def train_dataloader(self) -> Chunks:
        """Chunks of CHUNK mini-batches, shuffled."""
        return Chunks(self._placed(self.train_images), self.batch_size * CHUNK, self._order, self.share)

    def val_dataloader(self) -> Chunks:
        """Batches of VALIDATION_BATCH images, in order."""
        return Chunks(self._placed(self.validation_images), VALIDATION_BATCH)

    def _order(self) -> Iterable[Tensor]:
        """Of this epoch: up to the window a permutation from the device's own generator, beyond it window by window."""
        assert self.trainer is not None
        count = len(self.train_images)
        if self._is_beyond_window:
            return windowed_order(count, self.window, self.seed, self.trainer.current_epoch)
        return [torch.randperm(count, device=self._device)]

    @property
    def _device(self) -> torch.device:
        assert self.trainer is not None
        return self.trainer.strategy.root_device

    def _placed(self, images: ImageSource) -> Tensor | ImageSource:
        """The images (N, D) on the device that trains if there is room for all of them, else the source itself."""
        return on_device(images, self._device) if math.prod(images.shape) <= room_for_images(self._device) else images


def room_for_images(device: torch.device) -> int:
    """How many bytes of images may lie on a device: half of what a GPU has left, IN_MEMORY elsewhere."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else IN_MEMORY


def on_device(images: ImageSource, device: torch.device) -> Tensor:
    """A copy of all images, (N, D) uint8."""
    placed = torch.empty(len(images), math.prod(images.shape[1:]), dtype=torch.uint8, device=device)
    for first in range(0, len(images), COPIED):
        placed[first : first + COPIED] = rows(images, slice(first, first + COPIED))
    return placed
