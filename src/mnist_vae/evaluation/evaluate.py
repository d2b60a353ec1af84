"""How good a model is on images it has not seen: every number of metrics/evaluate.json, and what pictures need."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mnist_vae.data.dataset import COMPARED, Dataset, ImageSource
from mnist_vae.evaluation.codes import active_units, knn_accuracy, linear_probe_accuracy
from mnist_vae.evaluation.likelihood import importance_nll, quadrature_nll, standard_error
from mnist_vae.evaluation.sample_quality import cloud, features, sample_quality
from mnist_vae.model.latent import BLOCK, PixelBlocks, Pixels, encode, prior_draws, to_tensor
from mnist_vae.model.vae import VAE, Posterior, negative_log_likelihood, to_pixels
from mnist_vae.params import Evaluate

Metrics = dict[str, float | int | str]


class Evaluation(NamedTuple):
    """What was measured on N test images."""

    metrics: Metrics  # named and explained in model_card.MEANINGS
    bce: np.ndarray  # (N,) −log p(x|z), mean over draws of z, nats
    nll: np.ndarray  # (N,) −log p(x), nats
    posterior: Posterior  # of the test images, (N, Z)


def evaluate(
    vae: VAE, dataset: Dataset, settings: Evaluate, kl_weight: float, held_out: ImageSource | None = None
) -> Evaluation:
    """Measure a model on the test images of a data set; the training images serve as what codes are compared with.

    With ``held_out`` images (M, 28, 28), which were not trained on, their nll is measured too: a model is chosen by it.

    Deterministic for equal settings and threads. Memory does not grow with samples or draws (by 8 bytes a draw).
    """
    x_test = PixelBlocks(dataset.x_test)  # (N, D)
    test = encode(vae, dataset.x_test)
    bce = sampled_bce(vae, x_test, test, settings.draws, settings.seed)
    nll, nll_metrics = measure_nll(vae, x_test, settings)
    if held_out is not None and len(held_out) > 1:
        _, of_held_out = measure_nll(vae, PixelBlocks(held_out), settings)
        nll_metrics |= {f"val_{name}": of_held_out[name] for name in ("nll", "nll_se")}
    metrics = {
        **summarise_elbo(bce, test.kld().double(), kl_weight),
        **nll_metrics,
        "active_units": int(active_units(test.mean.numpy()).sum()),
        **classify_codes(vae, dataset, test, settings.neighbours),
        **measure_quality(vae, dataset, test, settings),
    }
    return Evaluation(metrics, bce.per_image.numpy(), nll.numpy(), test)


def classify_codes(vae: VAE, dataset: Dataset, test: Posterior, neighbours: int) -> Metrics:
    """How much of the digit is in the codes of the test images; nothing where images have no labels."""
    if dataset.y_train is None or dataset.y_test is None:
        return {}
    labels = dataset.y_train[:COMPARED]
    train = encode(vae, dataset.x_train[:COMPARED])
    codes = (train.mean.numpy(), labels, test.mean.numpy(), dataset.y_test)
    return {
        "knn_accuracy": knn_accuracy(*codes, min(neighbours, len(labels))),
        "linear_probe_accuracy": linear_probe_accuracy(*codes),
    }


class SampledBce(NamedTuple):
    """−log p(x|z) of N images, with several draws of z ~ q(z|x) each, in nats, float64."""

    per_image: Tensor  # (N,) mean over draws
    per_draw: Tensor  # (draws,) mean over images


@torch.inference_mode()
def sampled_bce(vae: VAE, x: Pixels, posterior: Posterior, draws: int, seed: int) -> SampledBce:
    """−log p(x|z) of images (N, D), z ~ q(z|x), of which only the means are kept."""
    generator = torch.Generator().manual_seed(seed)
    per_image = torch.zeros(len(x), dtype=torch.float64)
    per_draw = torch.zeros(draws, dtype=torch.float64)
    for draw in range(draws):
        bce = torch.cat([
            negative_log_likelihood(vae.decode(Posterior(*block).sample(generator)), images).double()
            for images, *block in zip(x.split(BLOCK), *(part.split(BLOCK) for part in posterior), strict=True)
        ])  # (N,)  # fmt: skip
        per_image += bce / draws
        per_draw[draw] = bce.mean()
    return SampledBce(per_image, per_draw)


def summarise_elbo(bce: SampledBce, kld: Tensor, kl_weight: float) -> Metrics:
    """The ELBO and its terms in nats per image, from −log p(x|z) and the KL per dimension (N, Z).

    The KL is exact, so the standard error is that of the mean of bce over draws: how far other draws of z would
    move it on the same images.
    """
    error = standard_error(bce.per_draw)
    mean_bce, kld_per_dim = bce.per_draw.mean().item(), kld.mean(dim=0).tolist()
    mean_kld = sum(kld_per_dim)
    return {
        "loss": mean_bce + kl_weight * mean_kld,
        "loss_se": error,
        "bce": mean_bce,
        "kld": mean_kld,
        "elbo": -(mean_bce + mean_kld),
        "elbo_se": error,
        **{f"kld_z{dim}": value for dim, value in enumerate(kld_per_dim)},
    }


def measure_nll(vae: VAE, x: Pixels, settings: Evaluate) -> tuple[Tensor, Metrics]:
    """−log p(x) per image (N,) and its summary: by quadrature, or by sampling where asked for or out of reach."""
    if settings.quadrature_step and vae.config.latent_dim <= 2:
        quadrature = quadrature_nll(vae, x, settings.quadrature_step)
        nll = quadrature.nll.double()
        how: Metrics = {"nll_method": "quadrature", "nll_halving_change": quadrature.change()}
    else:
        # Half of the samples twice: two repeats tell how far the random numbers move the result.
        halves = max(1, settings.importance_samples // 2)
        generator = torch.Generator().manual_seed(settings.seed)
        repeats = torch.stack([importance_nll(vae, x, halves, generator).double() for _ in range(2)])  # (2, N)
        nll = -torch.logsumexp(-repeats, dim=0) + np.log(2)  # the estimate from all samples
        how = {
            "nll_method": f"importance sampling, K = {2 * halves}",
            "nll_half_samples": repeats.mean().item(),
            "nll_half_samples_se": standard_error(repeats.mean(dim=1)),
        }
    return nll, {"nll": nll.mean().item(), "nll_se": standard_error(nll), **how}


@torch.inference_mode()
def measure_quality(vae: VAE, dataset: Dataset, posterior: Posterior, settings: Evaluate) -> Metrics:
    """Precision, recall, density and coverage against test images: of prior draws, reconstructions, training images.

    Pictures of a gray model are its pixel means; of a binarised one, draws of its pixels, like the data.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    count = min(settings.quality_images, len(dataset.x_test), len(dataset.x_train))
    test = torch.randperm(len(dataset.x_test), generator=generator)[:count]
    train = torch.randperm(len(dataset.x_train), generator=generator)[:count]

    def picture(z: Tensor) -> Tensor:
        pixels = to_pixels(vae.decode(z))
        return pixels if dataset.binarize == "none" else torch.bernoulli(pixels, generator=generator)

    contenders = {
        "samples": picture(prior_draws(count, vae.config.latent_dim, settings.seed)),
        "reconstructions": picture(posterior.mean[test]),
        "reference": to_tensor(dataset.x_train[train.numpy()]),
    }
    real = cloud(features(to_tensor(dataset.x_test[test.numpy()])))
    return {
        f"{name}_{figure}": value
        for name, images in contenders.items()
        for figure, value in sample_quality(real, cloud(features(images)))._asdict().items()
    }
