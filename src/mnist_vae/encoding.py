"""Images into the latent space."""

import numpy as np
import torch
from torch import Tensor

from mnist_vae.vae import VAE, Posterior

BLOCK = 250  # images at a time: memory does not grow with their number, and what a layer computes stays in the cache


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 images (N, 28, 28) to rows of pixels in [0, 1], (N, 784) float32."""
    return to_unit(torch.from_numpy(images).flatten(1))


def to_unit(images: Tensor) -> Tensor:
    """uint8 pixels, 0 to 255, to float32 in [0, 1]."""
    return images.float().div_(255)


@torch.inference_mode()
def encode(vae: VAE, images: np.ndarray) -> Posterior:
    """The posteriors of uint8 images (N, 28, 28), block by block: mean and log-variance (N, Z)."""
    blocks = [vae.encode(to_tensor(block)) for block in np.array_split(images, -(-len(images) // BLOCK))]
    return Posterior(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))
