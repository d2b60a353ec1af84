"""The variational autoencoder and its loss, in plain torch.

    posterior    q(z|x) = N(mean(x), diag exp(log_var(x)))      the encoder
    prior        p(z)   = N(0, I)
    likelihood   p(x|z) = Bernoulli(x; sigmoid(logits(z)))      the decoder

Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014, https://arxiv.org/abs/1312.6114.

Letters in shapes: B images, D pixels (784), H hidden units, Z latent dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One reparameterised draw per image, z = mean + std · eps, (B, Z)."""
        eps = torch.empty_like(self.mean).normal_(generator=generator)
        return torch.addcmul(self.mean, torch.exp(0.5 * self.log_var), eps)

    def kld(self) -> Tensor:
        """KL(q(z|x) ‖ p(z)) in nats, (B, Z): one term per image and latent dimension.

        −½ (1 + log σ² − μ² − σ²), appendix B of Kingma & Welling.
        """
        return -0.5 * (1 + self.log_var - self.mean.square() - self.log_var.exp())


class Loss(NamedTuple):
    """The terms of the negative ELBO, each a scalar in nats, summed over a batch."""

    loss: Tensor  # bce + kl_weight · kld
    bce: Tensor  # −log p(x|z)
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
        self.posterior = nn.Linear(hidden[-1], 2 * latent_dim)  # mean and log-variance side by side
        self.decoder = nn.Sequential(
            *hidden_layers([latent_dim, *reversed(hidden)], config.activation), nn.Linear(hidden[0], config.input_dim)
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
    return [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), ACTIVATIONS[activation]())]


def negative_log_likelihood(logits: Tensor, x: Tensor) -> Tensor:
    """−log p(x|z) of images (B, D) under logits (B, D), in nats per image, (B,).

    The Bernoulli form is used for gray pixels in [0, 1] too, as is usual for this model. It is then no
    normalised density: compare it with other gray results only.
    """
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(dim=-1)


def negative_elbo(logits: Tensor, x: Tensor, posterior: Posterior, kl_weight: float = 1.0) -> Loss:
    """−ELBO = E_q[−log p(x|z)] + kl_weight · KL(q(z|x) ‖ p(z)), with one draw of z, summed over the batch.

    Equation (10) of Kingma & Welling; kl_weight ≠ 1 is the β of Higgins et al., "beta-VAE", ICLR 2017.
    """
    bce = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    kld = posterior.kld().sum()
    return Loss(bce + kl_weight * kld, bce, kld)


def to_pixels(logits: Tensor) -> Tensor:
    """The mean of the likelihood: logits (…, D) to pixel intensities in [0, 1], (…, D)."""
    return torch.sigmoid(logits)
