"""The negative log-likelihood of a trained VAE, −log p(x) = −log ∫ p(x|z) p(z) dz, in nats per image.

Two estimators of one integral: quadrature over a grid of z, nearly exact for one or two latent dimensions, and
importance sampling for any number of them. Neither is a bound that training optimised, so they tell how good the model
is apart from how good its encoder is.

Gray pixels in [0, 1] are scored with the Bernoulli form, as in training. That is no normalised density: compare these
figures with other gray results only.

Letters in shapes: B images, D pixels, Z latent dimensions, C cells, P points per cell, K samples, R rows of a block.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_vae.model.latent import Pixels
from mnist_vae.model.products import product
from mnist_vae.model.vae import VAE, log_prior, negative_log_likelihood

GRID_IMAGES = 10_000  # images that share one decoding of the grid
GRID_POINTS = 4_096  # grid points decoded at a time
CELL_SIDE = 8  # grid points along one side of a cell; even, so that every second point is the same in all cells
REACH = 6.0  # standard deviations of the prior, and of every posterior, that the grid covers
DROPPED = 1e-4  # no image loses a greater share of its likelihood to the cells that are left out

SAMPLE_IMAGES = 64  # the two block sizes fix the order of the random numbers: another size is another estimate
SAMPLE_DRAWS = 32


class Quadrature(NamedTuple):
    """−log p(x) of each image on a grid of z, with its own check."""

    nll: Tensor  # (B,) nats, on the grid of the given step
    nll_double_step: Tensor  # (B,) nats, on every second point of that grid along each axis

    def change(self) -> float:
        """What halving the step, from twice the given one to the given one, changed in the mean: nats per image.

        The rectangle rule on a smooth peak converges faster than any power of the step, so once this is small,
        what a further halving would change is smaller still.
        """
        return (self.nll - self.nll_double_step).mean().abs().item()


@torch.no_grad()
def quadrature_nll(vae: VAE, x: Pixels, step: float = 0.04) -> Quadrature:
    """−log p(x) of images (B, D) with pixels in [0, 1], by the rectangle rule over a uniform grid of z.

    −log Σ_z p(x|z) p(z) step^Z. The grid covers REACH standard deviations of the prior and of every posterior. It is
    cut in cells, and an image visits only the cells that can matter to it: with l_d between low_d and high_d inside a
    cell, every pixel given its best logit bounds the likelihood of all points of the cell at once,

        log p(x|z) = Σ_d x_d log σ(l_d) + (1 − x_d) log σ(−l_d) ≤ Σ_d x_d log σ(high_d) + (1 − x_d) log σ(−low_d),

    and a cell is left out when that bound is negligible against the likelihood at the one grid point nearest to the
    encoder's mean. A poor encoder therefore costs time, never accuracy: the cells left out hold at most a share
    DROPPED of the likelihood of any image. Time grows with step^−Z; memory does not, nor does it grow with B.

    Raises ValueError for more than two latent dimensions, where a grid is out of reach.
    """
    if vae.config.latent_dim > 2:
        raise ValueError(
            f"quadrature_nll: latent_dim is {vae.config.latent_dim}, and a grid serves at most 2; use importance_nll"
        )
    blocks = [_quadrature_block(vae, images, step) for images in x.split(GRID_IMAGES)]
    return Quadrature(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def _quadrature_block(vae: VAE, x: Tensor, step: float) -> Quadrature:
    posterior = vae.encode(x)
    reach = max(REACH, (posterior.mean.abs() + REACH * torch.exp(0.5 * posterior.log_var)).max().item())
    corners, offsets = _cells(reach, step, vae.config.latent_dim, like=x)  # (C, Z), (P, Z)
    on_double_step = (offsets / step).round().remainder(2).eq(0).all(dim=-1)  # (P,)

    near = (posterior.mean / step).round() * step  # (B, Z), a point of the grid: its term is less than the sum
    at_least = log_prior(near) - negative_log_likelihood(vae.decode(near), x)  # (B,)
    negligible = at_least + math.log(DROPPED / len(corners))  # (B,), C such cells add up to DROPPED

    log_sum = x.new_full((2, len(x)), -math.inf)  # log Σ p(x, z) over the points of step, and of 2 · step
    for cells in corners.split(max(1, GRID_POINTS // len(offsets))):
        z = cells[:, None] + offsets  # (C, P, Z)
        logits = vae.decode(z)  # (C, P, D)
        log_p_z = log_prior(z)  # (C, P)
        constant = log_p_z - F.softplus(logits).sum(dim=-1)  # (C, P), log p(x, z) = x · logits + constant

        log_on, log_off = F.logsigmoid(logits.amax(dim=1)), F.logsigmoid(-logits.amin(dim=1))  # (C, D), at their best
        at_most = product(x, (log_on - log_off).T) + log_off.sum(dim=-1) + log_p_z.logsumexp(dim=-1)  # (B, C)
        for cell, matters in enumerate((at_most > negligible[:, None]).T):
            images = matters.nonzero().squeeze(dim=1)  # (R,)
            log_joint = product(x[images], logits[cell].T).add_(constant[cell])  # (R, P)
            found = torch.stack([log_joint.logsumexp(dim=-1), log_joint[:, on_double_step].logsumexp(dim=-1)])
            log_sum[:, images] = torch.logaddexp(log_sum[:, images], found)

    steps = log_sum.new_tensor([[step], [2 * step]])
    return Quadrature(*-(log_sum + vae.config.latent_dim * steps.log()))


def _cells(reach: float, step: float, latent_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """A grid on the multiples of ``step`` as the first point of each cell (C, Z) and the points inside one (P, Z)."""
    side = CELL_SIDE * step
    count = math.ceil(reach / side) + 1
    axes = torch.arange(-count, count) * side, torch.arange(CELL_SIDE) * step
    corners, offsets = (torch.cartesian_prod(*[axis] * latent_dim).reshape(-1, latent_dim) for axis in axes)
    return corners.to(like), offsets.to(like)


@torch.no_grad()
def importance_nll(vae: VAE, x: Pixels, samples: int, generator: torch.Generator | None = None) -> Tensor:
    """−log p(x) of images (B, D) with pixels in [0, 1], estimated from ``samples`` draws of z each, nats, (B,).

    −log 1/K Σ_k p(x|z_k) p(z_k) / q(z_k|x), z_k ~ q(z|x): equation (8) of Burda et al., "Importance Weighted
    Autoencoders", ICLR 2016, https://arxiv.org/abs/1509.00519. In expectation it lies above −log p(x) and falls
    towards it as K grows, so K belongs beside the number; K = 1 is the negative ELBO. A mode that q does not
    know stays missing at any affordable K: where quadrature is possible, believe the quadrature. The sum over K is
    taken in blocks: memory grows with neither B nor K.
    """
    return torch.cat([_importance_block(vae, images, samples, generator) for images in x.split(SAMPLE_IMAGES)])


def _importance_block(vae: VAE, x: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    posterior = vae.encode(x)
    log_sum = x.new_full((len(x),), -math.inf)  # (B,), log Σ_k of the weights so far
    for first in range(0, samples, SAMPLE_DRAWS):
        draws = min(SAMPLE_DRAWS, samples - first)
        eps = x.new_empty(draws, *posterior.mean.shape).normal_(generator=generator)  # (K, B, Z)
        z = posterior.mean + torch.exp(0.5 * posterior.log_var) * eps  # (K, B, Z)
        logits = vae.decode(z)  # (K, B, D)
        log_likelihood = -negative_log_likelihood(logits, x.expand_as(logits))  # (K, B)
        log_posterior = log_prior(eps) - 0.5 * posterior.log_var.sum(dim=-1)  # (K, B), of z by change of variables
        log_weight = log_likelihood + log_prior(z) - log_posterior  # (K, B)
        log_sum = torch.logaddexp(log_sum, log_weight.logsumexp(dim=0))
    return math.log(samples) - log_sum


def standard_error(values: Tensor) -> float:
    """The standard error of the mean of independent values (N,), N ≥ 2, in their own unit.

    Of the nll of each image: how far another test set of this size would move the mean. Of the means of repeats with
    different random numbers: how far the random numbers move it.
    """
    return (values.std() / math.sqrt(len(values))).item()
