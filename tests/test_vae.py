"""The model and its loss against torch.distributions and against counts by hand."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from mnist_vae.model.vae import (
    VAE,
    Posterior,
    VAEConfig,
    negative_elbo,
    negative_log_likelihood,
    to_pixels,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_posterior(images=7, latent_dim=3):
    return Posterior(3 * random(images, latent_dim, seed=1), 2 * random(images, latent_dim, seed=2))


def test_kld_matches_torch_distributions():
    posterior = random_posterior()
    normal = Normal(posterior.mean, torch.exp(posterior.log_var).sqrt())

    torch.testing.assert_close(posterior.kld(), kl_divergence(normal, Normal(0.0, 1.0)))


def test_kld_is_zero_where_the_posterior_is_the_prior():
    assert Posterior(torch.zeros(2, 3), torch.zeros(2, 3)).kld().abs().max() == 0


def test_negative_log_likelihood_of_binary_images_matches_torch_distributions():
    logits, x = 4 * random(5, 784), (random(5, 784, seed=3) > 0).double()

    log_prob = Bernoulli(logits=logits).log_prob(x).sum(dim=1)

    torch.testing.assert_close(negative_log_likelihood(logits, x), -log_prob)


def test_negative_log_likelihood_of_gray_images_is_a_mean_of_the_two_binary_ones():
    logits = 4 * random(5, 784)
    ink, paper = torch.ones(5, 784).double(), torch.zeros(5, 784).double()

    mixed = 0.3 * negative_log_likelihood(logits, ink) + 0.7 * negative_log_likelihood(logits, paper)

    torch.testing.assert_close(negative_log_likelihood(logits, 0.3 * ink), mixed)


@pytest.mark.parametrize("kl_weight", [0.0, 1.0, 4.0])
def test_negative_elbo_is_bce_plus_weighted_kld_summed_over_the_batch(kl_weight):
    logits, x, posterior = random(7, 784), random(7, 784, seed=3).sigmoid(), random_posterior()

    loss, bce, kld = negative_elbo(logits, x, posterior, kl_weight)

    torch.testing.assert_close(bce, sum(negative_log_likelihood(logits[[i]], x[[i]]).squeeze() for i in range(7)))
    torch.testing.assert_close(kld, sum(posterior.kld()[i, z] for i in range(7) for z in range(3)))
    torch.testing.assert_close(loss, bce + kl_weight * kld)


def test_negative_elbo_has_a_kl_weight_of_one_by_default():
    loss, bce, kld = negative_elbo(random(7, 784), random(7, 784, seed=3).sigmoid(), random_posterior())

    torch.testing.assert_close(loss, bce + kld)


def test_posterior_sample_has_the_posteriors_mean_and_standard_deviation():
    mean, std = torch.tensor([[-3.0, 0.0, 5.0]]), torch.tensor([[0.5, 1.0, 4.0]])
    posterior = Posterior(mean.expand(100_000, 3), (2 * std.log()).expand(100_000, 3))

    z = posterior.sample(torch.Generator().manual_seed(0))

    torch.testing.assert_close(z.std(dim=0), std[0], rtol=0.01, atol=0)
    assert ((z.mean(dim=0) - mean[0]).abs() < 5 * std[0] / math.sqrt(len(z))).all()


def test_posterior_sample_carries_gradients_to_mean_and_log_variance():
    mean, log_var = torch.zeros(4, 2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
    posterior = Posterior(mean, log_var)

    z = posterior.sample()
    z.sum().backward()

    assert (mean.grad == 1).all()
    torch.testing.assert_close(log_var.grad, 0.5 * z.detach())  # d(exp(v/2) · eps)/dv at v = 0


def test_posterior_sample_is_the_same_for_the_same_generator():
    posterior = random_posterior()

    def first_draw(seed):
        return posterior.sample(torch.Generator().manual_seed(seed))

    assert torch.equal(first_draw(1), first_draw(1))
    assert not torch.equal(first_draw(1), first_draw(2))


def test_forward_decodes_a_draw_of_its_generator():
    torch.manual_seed(0)
    vae, x = VAE(VAEConfig(hidden_dims=(8,))), torch.rand(3, 784)

    logits, posterior = vae(x, torch.Generator().manual_seed(4))

    assert torch.equal(logits, vae.decode(posterior.sample(torch.Generator().manual_seed(4))))


def test_vae_has_layers_of_784_256_2_256_784():
    vae = VAE(VAEConfig())

    by_hand = (784 * 256 + 256) + 2 * (256 * 2 + 2) + (2 * 256 + 256) + (256 * 784 + 784)

    assert sum(parameter.numel() for parameter in vae.parameters()) == by_hand
    posterior = vae.encode(torch.rand(3, 784))
    assert posterior.mean.shape == posterior.log_var.shape == (3, 2)
    assert vae.decode(torch.zeros(3, 2)).shape == (3, 784)
    assert vae.decode(torch.zeros(5, 3, 2)).shape == (5, 3, 784)


@pytest.mark.parametrize(("activation", "function"), [("relu", torch.relu), ("tanh", torch.tanh)])
@pytest.mark.parametrize("hidden_dims", [(8,), (8, 5), (8, 5, 7)])
def test_vae_activates_each_hidden_layer_of_both_sides(hidden_dims, activation, function):
    torch.manual_seed(0)
    vae = VAE(VAEConfig(hidden_dims, latent_dim=2, activation=activation))
    x, z = torch.rand(3, 784), torch.randn(3, 2)

    def by_hand(y, *layers):
        *hidden, last = layers
        for layer in hidden:
            y = function(y @ layer.weight.T + layer.bias)
        return y @ last.weight.T + last.bias

    inwards, outwards = (
        [layer for layer in side if isinstance(layer, nn.Linear)] for side in (vae.encoder, vae.decoder)
    )
    torch.testing.assert_close(torch.cat(vae.encode(x), dim=1), by_hand(x, *inwards, vae.posterior))
    torch.testing.assert_close(vae.decode(z), by_hand(z, *outwards))


def test_the_decoder_is_the_mirror_image_of_the_encoder():
    vae = VAE(VAEConfig(hidden_dims=(9, 8, 7), latent_dim=3, input_dim=20))

    shapes = {name: tuple(weight.shape) for name, weight in vae.named_parameters() if name.endswith("weight")}

    sizes = [20, 9, 8, 7]
    assert shapes == {
        **{f"encoder.{2 * depth}.weight": (out, inputs) for depth, (inputs, out) in enumerate(pairwise(sizes))},
        "posterior.weight": (2 * 3, 7),
        "decoder.0.weight": (7, 3),
        **{
            f"decoder.{2 * depth}.weight": (out, inputs) for depth, (inputs, out) in enumerate(pairwise(sizes[::-1]), 1)
        },
    }


def test_negative_log_likelihood_of_extreme_logits_overflows_neither_in_value_nor_in_gradient():
    logits = torch.tensor([[1e4, -1e4, 1e4, -1e4]], requires_grad=True)
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]])  # right, right, wrong, wrong

    loss = negative_log_likelihood(logits, x)
    loss.sum().backward()

    assert loss.tolist() == [2e4]
    assert logits.grad.tolist() == [[0, 0, 1, -1]]


def test_to_pixels_gives_the_probability_of_ink():
    assert to_pixels(torch.tensor([-1e4, 0.0, 1e4])).tolist() == [0, 0.5, 1]
