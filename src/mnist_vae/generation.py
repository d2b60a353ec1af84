"""Images out of the latent space: draws from the prior, and a walk over its quantiles."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mnist_vae.vae import VAE, to_pixels

SIDE = 28


class LatentGrid(NamedTuple):
    """Images at the crossings of two axes of the latent space."""

    images: np.ndarray  # (down · across, 28, 28) in [0, 1], row by row
    across: np.ndarray  # values of z along columns
    down: np.ndarray  # values of z along rows
    dimensions: tuple[int, int]  # which z goes across, which down


@torch.inference_mode()
def decode(vae: VAE, z: Tensor) -> np.ndarray:
    """Latent codes (N, Z) to images (N, 28, 28) in [0, 1]."""
    return to_pixels(vae.decode(z)).reshape(-1, SIDE, SIDE).cpu().numpy()


def prior_draws(count: int, latent_dim: int, seed: int) -> Tensor:
    """``count`` draws of z from the prior N(0, I), (count, Z)."""
    return torch.randn(count, latent_dim, generator=torch.Generator().manual_seed(seed))


def quantile_grid(vae: VAE, size: int, quantiles: list[float], kld_per_dim: list[float]) -> LatentGrid:
    """size × size images at evenly spaced quantiles of the prior: the first axis along columns, the second down rows.

    The notebook's walk. With more than two dimensions the axes are the two that carry the most information
    (largest KL, in nats), the others stay at the prior's mean; with one dimension there is a single row.
    """
    from scipy.special import ndtri  # only here, and a sixth of what a small stage imports

    values = ndtri(np.linspace(*quantiles, size))  # the standard normal's inverse distribution function
    latent_dim = vae.architecture.latent_dim
    down = values if latent_dim > 1 else np.zeros(1)
    dimensions = leading_dimensions(kld_per_dim)
    z = torch.zeros(len(down), size, latent_dim)
    if latent_dim > 1:
        z[:, :, dimensions[1]] = torch.from_numpy(down).float()[:, None]
    z[:, :, dimensions[0]] = torch.from_numpy(values).float()[None, :]
    return LatentGrid(decode(vae, z.flatten(0, 1)), values, down, dimensions)


@torch.inference_mode()
def traverse(vae: VAE, dimensions: list[int], values: np.ndarray) -> np.ndarray:
    """Images (len(dimensions) · len(values), 28, 28): each dimension in turn takes ``values``, the others stay 0."""
    z = torch.zeros(len(dimensions), len(values), vae.architecture.latent_dim)
    for row, dimension in enumerate(dimensions):
        z[row, :, dimension] = torch.from_numpy(values).float()
    return decode(vae, z.flatten(0, 1))


def leading_dimensions(kld_per_dim: list[float]) -> tuple[int, int]:
    """The two dimensions with the largest KL, the lower index first; (0, 0) where there is one only."""
    first, second = sorted(np.argsort(kld_per_dim, kind="stable")[-2:]) if len(kld_per_dim) > 1 else (0, 0)
    return int(first), int(second)
