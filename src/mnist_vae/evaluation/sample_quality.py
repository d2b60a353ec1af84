"""Precision, recall, density and coverage: do generated images look real, and do they show all that is real?

Each set of images is a cloud of points in a feature space, and each point owns the ball that reaches to its k-th
nearest neighbour within its own set. The four figures count which points of one set fall in balls of the other.

    precision, recall    Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models",
                         NeurIPS 2019, https://arxiv.org/abs/1904.06991
    density, coverage    Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models",
                         ICML 2020, https://arxiv.org/abs/2002.09797

The figures mean something next to those of other images in the same feature space, with the same k and set sizes:
training images against test images show what real images score. Precision and density of smooth images may exceed it.

Letters in shapes: N images, M images of another set, R rows of a block, D pixels, F features.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_vae.model.products import product

FEATURE_SPACE = "pixels, averaged 2 × 2"  # nothing to train or download; averaging forgives a stroke moved by a pixel
NEIGHBOURS = 5  # k of Naeem et al.
BLOCK_ROWS = 1_000  # rows of a distance matrix held at a time


class Cloud(NamedTuple):
    """A set of images in the feature space."""

    features: Tensor  # (N, F)
    squared_radii: Tensor  # (N,) of the distance of each point to its k-th nearest neighbour, itself not counted
    neighbours: int  # k


class SampleQuality(NamedTuple):
    """How generated images compare with real ones; 0 is worst."""

    precision: float  # share of generated images inside any ball of a real one
    recall: float  # share of real images inside any ball of a generated one
    density: float  # real balls that hold a generated image, on average, over k; above 1 where real images are dense
    coverage: float  # share of real images whose ball holds any generated one


def features(images: Tensor) -> Tensor:
    """Square images as rows of pixels (N, D) to points of FEATURE_SPACE (N, F = D / 4 for an even side)."""
    side = math.isqrt(images.shape[-1])
    return F.avg_pool2d(images.reshape(-1, 1, side, side), kernel_size=2).flatten(start_dim=1)


def cloud(points: Tensor, neighbours: int = NEIGHBOURS) -> Cloud:
    """Points of a feature space (N, F) with their radii: made once, compared with many.

    Raises ValueError unless every point has ``neighbours`` others.
    """
    if not 1 <= neighbours < len(points):
        raise ValueError(
            f"cloud: neighbours is {neighbours}; with {len(points)} images it must be 1 to {len(points) - 1}"
        )
    squared_radii = []
    for first, rows in zip(range(0, len(points), BLOCK_ROWS), points.split(BLOCK_ROWS), strict=True):
        squares = squared_distances(rows, points)  # (R, N)
        squares.diagonal(offset=first).fill_(math.inf)  # a point is no neighbour of its own
        squared_radii.append(squares.topk(neighbours, largest=False).values[:, -1])
    return Cloud(points, torch.cat(squared_radii), neighbours)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """‖a_i − b_j‖² of points (R, F) and (M, F), (R, M): ‖a_i‖² + ‖b_j‖² − 2 a_i · b_j.

    Without the root that torch.cdist takes, whose last bits differ between processors.
    """
    squares = product(a, b.T).mul_(-2)
    squares += a.square().sum(dim=1)[:, None]
    squares += b.square().sum(dim=1)
    return squares.clamp_min_(0)


def sample_quality(real: Cloud, generated: Cloud) -> SampleQuality:
    """The four figures of ``generated`` (M images) against ``real`` (N images).

    The mean of a VAE's likelihood is a smooth image, nearer to the middle of the real ones than they are to each other.
    Precision and density reward that (density far beyond 1), and recall falls towards 0: read them together.
    """
    balls_around = torch.zeros_like(generated.squared_radii)  # (M,) real balls that hold each generated image
    recalled, covered = [], []  # (R,) each, by blocks of real images
    for points, radii in zip(real.features.split(BLOCK_ROWS), real.squared_radii.split(BLOCK_ROWS), strict=True):
        squares = squared_distances(points, generated.features)  # (R, M)
        inside_real = squares <= radii[:, None]  # (R, M)
        balls_around += inside_real.sum(dim=0)
        covered.append(inside_real.any(dim=1))
        recalled.append((squares <= generated.squared_radii).any(dim=1))
    return SampleQuality(
        precision=_mean(balls_around > 0),
        recall=_mean(torch.cat(recalled)),
        density=_mean(balls_around / real.neighbours),
        coverage=_mean(torch.cat(covered)),
    )


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
