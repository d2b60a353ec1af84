"""The two estimators of −log p(x) against models whose likelihood is known otherwise."""

import math
from types import SimpleNamespace

import pytest
import torch
from scipy.integrate import quad
from torch.nn import functional as F

from mnist_vae.evaluation import likelihood
from mnist_vae.evaluation.likelihood import importance_nll, quadrature_nll, standard_error
from mnist_vae.model.vae import VAE, Posterior, VAEConfig, negative_log_likelihood

PIXELS = torch.tensor([[0.0, 1.0, 1.0, 0.3], [1.0, 0.0, 0.7, 0.0], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)


def model(decode, latent_dim, mean=0.0, std=1.0):
    """A VAE by its decoder; its encoder answers N(mean, std²) for every image."""

    def encode(x):
        at = x.new_full((len(x), latent_dim), mean)
        return Posterior(at, torch.full_like(at, 2 * math.log(std)))

    return SimpleNamespace(config=VAEConfig(latent_dim=latent_dim), encode=encode, decode=decode)


def constant(logits):
    return lambda z: logits.expand(*z.shape[:-1], -1)


def linear(latent_dim, slope=1.5, pixels=4):
    weight = slope * torch.randn(latent_dim, pixels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return lambda z: z @ weight + 0.3


def peaked_vae():
    """A random VAE whose true posteriors are narrow, and whose untrained encoder does not know where they are."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(hidden_dims=(16,), latent_dim=2, input_dim=50)).double()
    vae.decoder[0].weight.data.mul_(2)
    vae.decoder[2].weight.data.mul_(12)
    codes = 1.5 * torch.randn(40, 2, dtype=torch.float64)
    return vae, torch.sigmoid(vae.decode(codes)).bernoulli().detach()


def by_scipy(decode, image):
    """−log ∫ p(x|z) p(z) dz over one latent dimension."""

    def joint(z):
        logits = decode(torch.tensor([z], dtype=torch.float64))
        return math.exp(-negative_log_likelihood(logits, image).item() - z * z / 2) / math.sqrt(2 * math.pi)

    return -math.log(quad(joint, -12, 12, epsabs=0, limit=400, points=[-9, -3, 0, 3, 9])[0])


def by_the_whole_grid(vae, x, step, reach=8.0):
    """−log Σ p(x|z) p(z) step² over each point of a grid of two latent dimensions."""
    axis = torch.arange(-round(reach / step), round(reach / step) + 1, dtype=x.dtype) * step
    z = torch.cartesian_prod(axis, axis)
    logits = vae.decode(z)
    prior = torch.distributions.Normal(0, 1)
    log_joint = x @ logits.T - F.softplus(logits).sum(dim=-1) + prior.log_prob(z).sum(dim=-1)
    return -(log_joint.logsumexp(dim=-1) + 2 * math.log(step)).detach()


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_both_estimators_give_the_cross_entropy_of_a_decoder_that_ignores_z(latent_dim):
    logits = torch.tensor([-2.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    vae = model(constant(logits), latent_dim)
    expected = negative_log_likelihood(logits.expand_as(PIXELS), PIXELS)

    torch.testing.assert_close(quadrature_nll(vae, PIXELS).nll, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(importance_nll(vae, PIXELS, samples=70), expected)


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_quadrature_makes_the_likelihoods_of_all_images_of_two_pixels_add_up_to_one(latent_dim):
    every_image = torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0)).double()
    vae = model(linear(latent_dim, slope=4.0, pixels=2), latent_dim)

    assert quadrature_nll(vae, every_image).nll.neg().exp().sum().item() == pytest.approx(1, abs=2e-4)


def test_quadrature_matches_scipy_for_a_decoder_linear_in_z():
    decode = linear(latent_dim=1)
    expected = torch.tensor([by_scipy(decode, image) for image in PIXELS])

    torch.testing.assert_close(
        quadrature_nll(model(decode, 1), PIXELS).nll, expected, atol=1e-4, rtol=0, check_dtype=False
    )


def test_importance_sampling_matches_scipy_whatever_its_proposal():
    decode = linear(latent_dim=1)
    expected = [by_scipy(decode, image) for image in PIXELS]
    vae = model(decode, 1, mean=0.4, std=1.6)

    estimate = importance_nll(vae, PIXELS, samples=40_000, generator=torch.Generator().manual_seed(0))

    assert estimate.tolist() == pytest.approx(expected, abs=0.03)


def test_quadrature_and_importance_sampling_agree_within_the_standard_error_of_repeats():
    vae = model(linear(latent_dim=2), 2, std=1.3)
    exact = quadrature_nll(vae, PIXELS).nll.mean().item()
    generator = torch.Generator().manual_seed(0)

    repeats = torch.stack([importance_nll(vae, PIXELS, samples=2_000, generator=generator).mean() for _ in range(20)])

    assert standard_error(repeats) < 0.005
    assert repeats.mean().item() == pytest.approx(exact, abs=3 * standard_error(repeats))


def test_importance_sampling_tightens_towards_quadrature_as_k_grows():
    vae = model(linear(latent_dim=2, pixels=12), 2, std=0.7)
    images = torch.rand(200, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).round()
    exact = quadrature_nll(vae, images).nll.mean()

    one, ten, hundred = (importance_nll(vae, images, k, torch.Generator().manual_seed(0)).mean() for k in (1, 10, 100))

    assert one > ten + 0.1 > hundred + 0.2 > exact


@pytest.mark.parametrize("step", [0.1, 0.2, 0.4])
def test_quadrature_equals_the_whole_grid_even_where_the_encoder_is_wrong(step):
    vae, images = peaked_vae()

    visited = quadrature_nll(vae, images, step).nll

    torch.testing.assert_close(visited, by_the_whole_grid(vae, images, step), atol=likelihood.DROPPED, rtol=0)


def test_quadrature_leaves_out_cells_that_cannot_matter(monkeypatch):
    vae, images = peaked_vae()
    results = []
    product = likelihood.product
    monkeypatch.setattr(likelihood, "product", lambda *args: results.append(product(*args)) or results[-1])
    monkeypatch.setattr(likelihood, "GRID_POINTS", 10 * likelihood.CELL_SIDE**2)  # 10 cells at a time have 10 bounds

    quadrature_nll(vae, images, step=0.05)

    visited = sum(found.numel() for found in results if found.shape[1] == likelihood.CELL_SIDE**2)
    assert 0 < visited < 0.25 * len(images) * (2 * likelihood.REACH / 0.05) ** 2


def test_quadrature_counts_cells_that_matter_only_together():
    def decode(z):
        return 33.5 * (z.norm(dim=-1, keepdim=True) < 0.02).to(z) - 13.5  # a peak on one point, a plain around it

    image = torch.ones(1, 1, dtype=torch.float64)
    vae = model(decode, 2)

    nll = quadrature_nll(vae, image, step=0.04).nll

    torch.testing.assert_close(nll, by_the_whole_grid(vae, image, step=0.04), atol=likelihood.DROPPED, rtol=0)


def test_quadrature_counts_a_mode_that_the_encoder_does_not_know():
    def decode(z):
        return 60 * torch.cat([z.abs() - 1.8, 2.2 - z.abs()], dim=-1)  # both pixels on: z near −2 or near 2

    image = torch.ones(1, 2, dtype=torch.float64)
    vae = model(decode, 1, mean=2.0, std=0.1)
    exact = quadrature_nll(vae, image).nll.item()

    assert exact == pytest.approx(by_scipy(decode, image[0]), abs=1e-3)
    half = importance_nll(vae, image, samples=20_000, generator=torch.Generator().manual_seed(0)).item()
    assert half == pytest.approx(exact + math.log(2), abs=0.05)


@pytest.mark.parametrize(("mean", "std"), [(9.0, 0.1), (0.0, 2.0)], ids=["far posterior", "wide posterior"])
def test_quadrature_reaches_codes_far_from_the_prior(mean, std):
    def decode(z):
        return 20 * torch.cat([z - 8.8, 9.2 - z], dim=-1)  # both pixels on: z near 9

    image = torch.ones(1, 2, dtype=torch.float64)

    nll = quadrature_nll(model(decode, 1, mean, std), image).nll.item()

    assert nll == pytest.approx(by_scipy(decode, image[0]), abs=1e-3)


def test_quadrature_reports_the_result_of_a_grid_twice_as_coarse():
    vae, images = peaked_vae()

    fine, coarse = quadrature_nll(vae, images, step=0.05), quadrature_nll(vae, images, step=0.1)

    torch.testing.assert_close(fine.nll_double_step, coarse.nll, atol=2e-4, rtol=0)
    assert fine.change() == pytest.approx(abs((fine.nll - coarse.nll).mean().item()), abs=2e-4)
    assert 1e-4 < fine.change() < 0.01


def test_quadrature_does_not_depend_on_its_blocks(monkeypatch):
    vae, images = peaked_vae()
    whole = quadrature_nll(vae, images, step=0.1)
    monkeypatch.setattr(likelihood, "GRID_IMAGES", 7)
    monkeypatch.setattr(likelihood, "GRID_POINTS", 130)

    for blockwise, expected in zip(quadrature_nll(vae, images, step=0.1), whole, strict=True):
        torch.testing.assert_close(blockwise, expected, atol=2e-4, rtol=0)


def test_importance_sampling_decodes_no_more_at_once_with_more_images_or_samples():
    rows = []

    def decode(z):
        rows.append(z.numel())
        return z.expand(*z.shape[:-1], 4)

    importance_nll(model(decode, 1), PIXELS.repeat(100, 1), samples=100)

    assert max(rows) == likelihood.SAMPLE_IMAGES * likelihood.SAMPLE_DRAWS
    assert sum(rows) == 300 * 100


def test_importance_sampling_draws_from_its_generator_alone():
    vae = model(linear(latent_dim=2), 2)
    first = importance_nll(vae, PIXELS, 50, torch.Generator().manual_seed(3))
    torch.manual_seed(99)

    torch.testing.assert_close(importance_nll(vae, PIXELS, 50, torch.Generator().manual_seed(3)), first, atol=0, rtol=0)
    assert not torch.equal(importance_nll(vae, PIXELS, 50, torch.Generator().manual_seed(4)), first)


def test_quadrature_refuses_three_latent_dimensions():
    with pytest.raises(ValueError, match="latent_dim is 3, and a grid serves at most 2"):
        quadrature_nll(model(linear(3), 3), PIXELS)


def test_standard_error_is_that_of_the_mean():
    assert standard_error(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(math.sqrt(5 / 3) / 2)
