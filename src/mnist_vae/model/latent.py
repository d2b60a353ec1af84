"""Into the latent space and out of it: encoding, draws from the prior, and the manifold of digits.

Letters in shapes: N images, H × W pixels, Z latent dimensions.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mnist_vae.model.vae import VAE, Posterior, to_pixels

Floats = NDArray[np.floating]
Bytes = NDArray[np.uint8]

SIDE = 28
BLOCK = 250  # images at a time: memory does not grow with their number, and what a layer computes stays in the cache
MEASURED = 100_000  # images whose codes are held at a time


class Manifold(NamedTuple):
    """Images at the crossings of two axes of the latent space."""

    images: Floats  # (down · across, 28, 28) in [0, 1], row by row
    across: Floats  # values of z along columns
    down: Floats  # values of z along rows
    dimensions: tuple[int, int]  # which z goes across, which down


class Sliced(Protocol):
    """uint8 images (N, 28, 28) that are read, or made, where a slice asks for them."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, key: slice, /) -> Bytes:
        """The images of a slice."""


def to_tensor(images: Bytes) -> Tensor:
    """uint8 images (N, 28, 28) to rows of pixels in [0, 1], (N, 784) float32."""
    return to_unit(torch.from_numpy(np.array(images)).flatten(1))  # a copy, as a mapped file is read-only


def to_unit(images: Tensor) -> Tensor:
    """uint8 pixels, 0 to 255, to float32 in [0, 1]."""
    return images.float().div_(255)


class Pixels(Protocol):
    """Rows of pixels in [0, 1] that can be had in blocks: a tensor (N, D) float32, or PixelBlocks."""

    def __len__(self) -> int:
        """N."""

    def split(self, split_size: int, /) -> Iterable[Tensor]:
        """All rows, (≤ split_size, D) at a time."""


class PixelBlocks:
    """uint8 images (N, 28, 28) as Pixels: a block is made when it is asked for."""

    def __init__(self, images: Sliced) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def split(self, split_size: int, /) -> Iterator[Tensor]:
        """All rows, (≤ split_size, 784) float32 at a time."""
        for first in range(0, len(self), split_size):
            yield to_tensor(self.images[first : first + split_size])


@torch.inference_mode()
def encode(vae: VAE, images: Sliced) -> Posterior:
    """The posteriors of uint8 images (N, 28, 28), in blocks of nearly equal size: mean and log-variance (N, Z)."""
    count = max(1, -(-len(images) // BLOCK))
    size, larger = divmod(len(images), count)  # the first ``larger`` blocks have one image more
    bounds = [block * size + min(block, larger) for block in range(count + 1)]
    weights = next(vae.parameters())
    posterior = Posterior(*(weights.new_empty(len(images), vae.config.latent_dim) for _ in Posterior._fields))
    for first, last in pairwise(bounds):
        for whole, part in zip(posterior, vae.encode(to_tensor(images[first:last])), strict=True):
            whole[first:last] = part  # at once: thousands of small tensors would leave the memory in pieces
    return posterior


def mean_kld(vae: VAE, images: Sliced) -> list[float]:
    """The KL of each latent dimension in nats per image, (Z,), over images (N, 28, 28), MEASURED of them at a time."""
    total = torch.zeros(vae.config.latent_dim, dtype=torch.float64)
    for first in range(0, len(images), MEASURED):
        total += encode(vae, images[first : first + MEASURED]).kld().double().sum(dim=0)
    return (total / len(images)).tolist()


@torch.inference_mode()
def decode(vae: VAE, z: Tensor) -> Floats:
    """Latent codes (N, Z) to images (N, 28, 28) in [0, 1]."""
    return to_pixels(vae.decode(z)).reshape(-1, SIDE, SIDE).cpu().numpy()


def prior_draws(count: int, latent_dim: int, seed: int) -> Tensor:
    """``count`` draws of z from the prior N(0, I), (count, Z)."""
    return torch.randn(count, latent_dim, generator=torch.Generator().manual_seed(seed))


def manifold(vae: VAE, size: int, quantiles: Sequence[float], kld_per_dim: Sequence[float]) -> Manifold:
    """size × size images at evenly spaced quantiles of the prior: the first axis along columns, the second down rows.

    The notebook's walk. With more than two dimensions the axes are the two that carry the most information
    (largest KL, in nats), the others stay at the prior's mean; with one dimension there is a single row.
    """
    from scipy.special import ndtri  # only here, and a sixth of what a small stage imports

    low, high = quantiles
    values: Floats = np.asarray(
        ndtri(np.linspace(low, high, size))
    )  # the standard normal's inverse distribution function
    latent_dim = vae.config.latent_dim
    down = values if latent_dim > 1 else np.zeros(1)
    dimensions = leading_dimensions(kld_per_dim)
    z = torch.zeros(len(down), size, latent_dim)
    if latent_dim > 1:
        z[:, :, dimensions[1]] = torch.from_numpy(down).float()[:, None]
    z[:, :, dimensions[0]] = torch.from_numpy(values).float()[None, :]
    return Manifold(decode(vae, z.flatten(0, 1)), values, down, dimensions)


@torch.inference_mode()
def traverse(vae: VAE, dimensions: list[int], values: Floats) -> Floats:
    """Images (len(dimensions) · len(values), 28, 28): each dimension in turn takes ``values``, the others stay 0."""
    z = torch.zeros(len(dimensions), len(values), vae.config.latent_dim)
    for row, dimension in enumerate(dimensions):
        z[row, :, dimension] = torch.from_numpy(values).float()
    return decode(vae, z.flatten(0, 1))


def leading_dimensions(kld_per_dim: Sequence[float]) -> tuple[int, int]:
    """The two dimensions with the largest KL, the lower index first; (0, 0) where there is one only."""
    first, second = sorted(np.argsort(-np.asarray(kld_per_dim), kind="stable")[:2]) if len(kld_per_dim) > 1 else (0, 0)
    return int(first), int(second)


def tile(images: NDArray[Any], cols: int) -> NDArray[Any]:
    """Images (rows · cols, H, W) in reading order to one image (rows · H, cols · W)."""
    _, height, width = images.shape
    rows = images.reshape(-1, cols, height, width)  # (rows, cols, H, W)
    return rows.transpose(0, 2, 1, 3).reshape(-1, cols * width)


def to_uint8(image: Floats) -> Bytes:
    """Pixels in [0, 1] to 0 … 255."""
    return np.rint(255 * image).astype(np.uint8)
