"""Codes, and the ELBO with its error, against models whose loss is known otherwise."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from mnist_vae import encoding, evaluation
from mnist_vae.model.latent import encode, to_tensor
from mnist_vae.evaluation.evaluate import sampled_bce, summarise_elbo
from mnist_vae.model.vae import VAE, VAEConfig, Posterior


@pytest.fixture
def images(digits_dataset):
    return digits_dataset.x_test[:20]


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return VAE(VAEConfig(hidden_dim=16, latent_dim=2)).eval()


def constant_decoder(logits):
    """A model whose decoder answers ``logits`` (784,) whatever z is."""
    vae = VAE(VAEConfig(hidden_dim=16, latent_dim=2))
    torch.nn.init.zeros_(vae.decoder[2].weight)
    vae.decoder[2].bias.data.copy_(torch.as_tensor(logits))
    return vae


def slope_decoder(slope):
    """A model with one latent dimension, in which every pixel's logit is slope · z."""
    vae = VAE(VAEConfig(hidden_dim=2, latent_dim=1))
    vae.decoder[0].weight.data = torch.tensor([[1.0], [-1.0]])  # relu(z) and relu(−z)
    vae.decoder[0].bias.data.zero_()
    vae.decoder[2].weight.data = torch.tensor([[slope, -slope]]).expand(784, 2).clone()
    vae.decoder[2].bias.data.zero_()
    return vae


def posteriors(images, latent_dim, mean=0.0, std=1.0):
    return Posterior(*(torch.full((images, latent_dim), value) for value in (mean, 2 * np.log(std))))


def log_sigmoid(logits):
    return -np.log1p(np.exp(-logits))


def test_the_summary_of_draws_by_hand():
    bce = torch.tensor([[100.0, 110.0], [104.0, 114.0], [99.0, 109.0]]).double()  # means over images: 105, 109, 104
    kld = torch.tensor([[1.0, 2.0], [3.0, 6.0]]).double()  # 3 and 9 nats

    summary = summarise_elbo(bce, kld, kl_weight=0.5)

    se = np.sqrt((1 + 9 + 4) / 2) / np.sqrt(3)
    assert {name: summary[name] for name in ("loss", "loss_se", "bce", "kld", "elbo", "elbo_se")} == pytest.approx(
        {"loss": 106 + 0.5 * 6, "loss_se": se, "bce": 106, "kld": 6, "elbo": -112, "elbo_se": se}
    )
    assert (summary["kld_z0"], summary["kld_z1"]) == (2, 4)


def test_the_summary_is_plain_numbers():
    summary = summarise_elbo(torch.ones(2, 3).double(), torch.ones(3, 1).double(), kl_weight=1)

    assert all(type(value) is float for value in summary.values())


def test_a_constant_decoder_has_its_closed_form_loss(images):
    logits = np.linspace(-3, 3, 784)
    x = images.reshape(20, 784) / 255

    bce = sampled_bce(constant_decoder(logits), to_tensor(images), posteriors(20, 2), draws=4, seed=1)

    by_hand = -(x * log_sigmoid(logits) + (1 - x) * log_sigmoid(-logits)).sum(axis=1)
    assert bce.shape == (4, 20)
    np.testing.assert_allclose(bce, np.tile(by_hand, (4, 1)), rtol=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 2.0)])
def test_z_is_drawn_from_the_posterior(mean, std):
    bce = sampled_bce(slope_decoder(2.0), torch.zeros(500, 784), posteriors(500, 1, mean, std), draws=20, seed=1)

    expected, _ = quad(lambda z: 784 * np.log1p(np.exp(2 * z)) * norm.pdf(z, mean, std), -30, 30)
    at_the_mean = 784 * np.log1p(np.exp(2 * mean))
    se = float(bce.std() / np.sqrt(bce.numel()))
    assert float(bce.mean()) == pytest.approx(expected, abs=5 * se)
    assert expected > at_the_mean + 20 * se


def test_each_draw_and_each_image_has_noise_of_its_own():
    bce = sampled_bce(slope_decoder(2.0), torch.zeros(10, 784), posteriors(10, 1), draws=4, seed=1)

    assert len(bce.unique()) == 40


def test_the_seed_decides_the_draws(vae, images):
    def measure(seed):
        return sampled_bce(vae, to_tensor(images), encode(vae, images), draws=4, seed=seed)

    first = measure(1)
    torch.rand(3)  # the global generator has no part in it

    assert torch.equal(first, measure(1))
    assert (first != measure(2)).all()


def test_a_code_is_the_posterior_of_its_image(vae, images):
    posterior = encode(vae, images)

    for index in (0, 7, 19):
        alone = vae.encode(torch.from_numpy(images[[index]]).reshape(1, 784) / 255)
        torch.testing.assert_close(posterior.mean[[index]], alone.mean)
        torch.testing.assert_close(posterior.log_var[[index]], alone.log_var)


def test_codes_do_not_depend_on_the_size_of_a_block(vae, images, monkeypatch):
    whole = encode(vae, images)
    monkeypatch.setattr(encoding, "BLOCK", 7)
    in_blocks = encode(vae, images)

    assert whole.mean.shape == whole.log_var.shape == (20, 2)
    torch.testing.assert_close(in_blocks.mean, whole.mean)
    torch.testing.assert_close(in_blocks.log_var, whole.log_var)


def test_the_loss_of_an_image_does_not_depend_on_the_size_of_a_block(images, monkeypatch):
    vae = slope_decoder(2.0)
    narrow = Posterior(torch.linspace(-2, 2, 20)[:, None], torch.full((20, 1), -60.0))  # one z for each image
    whole = sampled_bce(vae, to_tensor(images), narrow, draws=2, seed=1)
    monkeypatch.setattr(evaluation, "BLOCK", 7)

    torch.testing.assert_close(sampled_bce(vae, to_tensor(images), narrow, draws=2, seed=1), whole)


def test_no_block_is_larger_than_block(vae, images, monkeypatch):
    monkeypatch.setattr(encoding, "BLOCK", 7)
    monkeypatch.setattr(evaluation, "BLOCK", 7)
    sizes = []
    for network in (vae.encoder, vae.decoder):
        network.register_forward_hook(lambda module, inputs, outputs: sizes.append(len(outputs)))

    sampled_bce(vae, to_tensor(images), encode(vae, images), draws=2, seed=1)

    assert max(sizes) <= 7
    assert sum(sizes) == 3 * 20  # encoded once, decoded twice
