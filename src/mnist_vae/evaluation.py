"""How good a model is on images it has not seen: the ELBO with its error, and codes and reconstructions to look at."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mnist_vae.params import Evaluate
from mnist_vae.vae import VAE, Posterior, negative_log_likelihood

BLOCK = 2_000  # images at a time: memory does not grow with their number


class Elbo(NamedTuple):
    """The loss over a set of images, in nats per image, from several draws of z for each."""

    bce: np.ndarray  # (draws, N)  −log p(x|z) of each draw
    kld: np.ndarray  # (N, Z)      exact, per dimension

    def summary(self, kl_weight: float) -> dict[str, float]:
        """``loss`` = bce + kl_weight · kld, ``elbo`` = −(bce + kld), and the standard error over draws."""
        draws = self.bce.mean(axis=1)  # (draws,)
        bce, kld = draws.mean(), self.kld.sum(axis=1).mean()
        error = draws.std(ddof=1) / np.sqrt(len(draws))
        return {
            "loss": float(bce + kl_weight * kld),
            "loss_se": float(error),
            "bce": float(bce),
            "kld": float(kld),
        }


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 images (N, 28, 28) to rows of pixels in [0, 1], (N, 784) float32."""
    return torch.from_numpy(images).flatten(1).float().div_(255)


@torch.inference_mode()
def encode(vae: VAE, images: np.ndarray) -> Posterior:
    """The posteriors of uint8 images (N, 28, 28), block by block: mean and log-variance (N, Z)."""
    blocks = [vae.encode(to_tensor(block)) for block in np.array_split(images, _blocks(images))]
    return Posterior(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


@torch.inference_mode()
def measure_elbo(vae: VAE, images: np.ndarray, settings: Evaluate) -> Elbo:
    """The ELBO's terms for uint8 images (N, 28, 28), with ``settings.draws`` samples of z per image."""
    generator = torch.Generator().manual_seed(settings.seed)
    bce, kld = [], []
    for block in np.array_split(images, _blocks(images)):
        x = to_tensor(block)  # (B, D)
        posterior = vae.encode(x)
        draws = [
            negative_log_likelihood(vae.decode(posterior.sample(generator)), x).double() for _ in range(settings.draws)
        ]
        bce.append(torch.stack(draws))  # (draws, B)
        kld.append(posterior.kld().double())  # (B, Z)
    return Elbo(torch.cat(bce, dim=1).numpy(), torch.cat(kld).numpy())


def _blocks(images: np.ndarray) -> int:
    return -(-len(images) // BLOCK)
