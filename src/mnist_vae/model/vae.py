"""The variational autoencoder and its loss, in plain torch.

    posterior    q(z|x) = N(mean(x), diag exp(log_var(x)))      the encoder
    prior        p(z)   = N(0, I)
    likelihood   p(x|z) = Bernoulli(x; sigmoid(logits(z)))      the decoder

Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014, https://arxiv.org/abs/1312.6114.

Letters in shapes: B images, D pixels (784), H hidden units, Z latent dimensions, K draws of z per image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_vae.model.products import Linear

Activation = Literal["relu", "tanh"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class VAEConfig:
    """What defines a VAE; stored beside its weights."""

    hidden_dims: tuple[int, ...] = (256,)  # of the encoder, from the image to z; the decoder has them in reverse
    latent_dim: int = 2
    input_dim: int = 784
    activation: Activation = "relu"  # of every hidden layer


class Posterior(NamedTuple):
    """q(z|x): one diagonal normal distribution per image."""

    mean: Tensor  # (B, Z)
    log_var: Tensor  # (B, Z)

    def sample(self, generator: torch.Generator | None = None, draws: int | None = None) -> Tensor:
        """Reparameterised draws, z = mean + std · eps: one per image, (B, Z), or K = ``draws`` of them, (K, B, Z)."""
        shape = self.mean.shape if draws is None else (draws, *self.mean.shape)
        return self.at(self.mean.new_empty(shape).normal_(generator=generator))

    def at(self, eps: Tensor) -> Tensor:
        """z = mean + std · eps for eps (…, B, Z)."""
        return torch.addcmul(self.mean, torch.exp(0.5 * self.log_var), eps)

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z|x) at points (…, B, Z), (…, B)."""
        squares = (z - self.mean).square() / self.log_var.exp()
        return -0.5 * (squares + self.log_var + math.log(2 * math.pi)).sum(dim=-1)

    def kld(self) -> Tensor:
        """KL(q(z|x) ‖ p(z)) in nats, (B, Z): one term per image and latent dimension.

        −½ (1 + log σ² − μ² − σ²), appendix B of Kingma & Welling.
        """
        return -0.5 * (1 + self.log_var - self.mean.square() - self.log_var.exp())


class Loss(NamedTuple):
    """What is minimised and its terms, each a scalar in nats, summed over a batch."""

    loss: Tensor  # the negative bound: bce + kl_weight · kld for the ELBO
    bce: Tensor  # −log p(x|z), the mean over draws of z
    kld: Tensor  # KL(q(z|x) ‖ p(z))


class VAE(nn.Module):
    """A multi-layer perceptron on either side of the latent space, D-H-…-Z-…-H-D, one the mirror image of the other.

    Works on images as rows of pixels in [0, 1]. The decoder's result is logits, not pixels: the sigmoid is
    part of the likelihood, where it can be evaluated without overflow.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        hidden, latent_dim = config.hidden_dims, config.latent_dim
        self.encoder = nn.Sequential(*hidden_layers([config.input_dim, *hidden], config.activation))
        self.posterior = Linear(hidden[-1], 2 * latent_dim)  # mean and log-variance side by side
        self.decoder = nn.Sequential(
            *hidden_layers([latent_dim, *reversed(hidden)], config.activation), Linear(hidden[0], config.input_dim)
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.posterior.weight.device

    def encode(self, x: Tensor) -> Posterior:
        """Images (B, D) to their posterior."""
        mean, log_var = self.posterior(self.encoder(x)).chunk(2, dim=-1)
        return Posterior(mean, log_var)

    def decode(self, z: Tensor) -> Tensor:
        """Latent codes (…, Z) to the logits of the pixels (…, D)."""
        logits: Tensor = self.decoder(z)
        return logits

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Posterior]:
        """Images (B, D) through one draw of z to the logits of their reconstructions (B, D)."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(generator)), posterior


def hidden_layers(sizes: Sequence[int], activation: Activation) -> list[nn.Module]:
    """A linear layer from each size to the next, each with the activation behind it."""
    return [layer for a, b in pairwise(sizes) for layer in (Linear(a, b), ACTIVATIONS[activation]())]


def log_prior(z: Tensor) -> Tensor:
    """log p(z) = log N(z; 0, I) at points (…, Z), (…)."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=-1)


def negative_log_likelihood(logits: Tensor, x: Tensor) -> Tensor:
    """−log p(x|z) of images (…, D) under logits (…, D), in nats per image, (…).

    The Bernoulli form is used for gray pixels in [0, 1] too, as is usual for this model. It is then no
    normalised density: compare it with other gray results only.
    """
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(dim=-1)


def negative_elbo(logits: Tensor, x: Tensor, posterior: Posterior, kl_weight: float | Tensor = 1.0) -> Loss:
    """−ELBO = E_q[−log p(x|z)] + kl_weight · KL(q(z|x) ‖ p(z)), with one draw of z, summed over the batch.

    Equation (10) of Kingma & Welling; kl_weight ≠ 1 is the β of Higgins et al., "beta-VAE", ICLR 2017.
    """
    bce = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    kld = posterior.kld().sum()
    return Loss(bce + kl_weight * kld, bce, kld)


def negative_iwae_bound(
    logits: Tensor, x: Tensor, z: Tensor, posterior: Posterior, kl_weight: float | Tensor = 1.0
) -> Loss:
    """−log 1/K Σ_k p(x|z_k) p(z_k) / q(z_k|x) of images x (B, D), summed over the batch.

    z (K, B, Z) are draws from q(z|x), and logits (K, B, D) what they decode to. Equation (8) of Burda et al.,
    "Importance Weighted Autoencoders", ICLR 2016, https://arxiv.org/abs/1509.00519: the expectation is the ELBO for
    K = 1, and comes closer to log p(x) as K grows. kl_weight is an exponent of p(z_k) / q(z_k|x).
    """
    bce = negative_log_likelihood(logits, x.expand_as(logits))  # (K, B)
    log_ratio = log_prior(z) - posterior.log_prob(z)  # (K, B), log p(z) / q(z|x)
    log_weight = kl_weight * log_ratio - bce  # (K, B)
    bound = log_weight.logsumexp(dim=0) - math.log(len(z))  # (B,)
    return Loss(-bound.sum(), bce.mean(dim=0).sum(), posterior.kld().sum())


def to_pixels(logits: Tensor) -> Tensor:
    """The mean of the likelihood: logits (…, D) to pixel intensities in [0, 1], (…, D)."""
    return torch.sigmoid(logits)
