"""The model and its bounds against torch.distributions and against counts by hand."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from mnist_vae.evaluation.likelihood import importance_nll
from mnist_vae.model.vae import (
    VAE,
    Posterior,
    VAEConfig,
    log_prior,
    negative_elbo,
    negative_iwae_bound,
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


def test_posterior_sample_of_several_draws_gives_each_image_its_own():
    posterior = Posterior(torch.tensor([[-9.0, 0.0], [0.0, 9.0]]).double(), torch.full((2, 2), -2.0).double())

    z = posterior.sample(torch.Generator().manual_seed(0), draws=1000)

    assert z.shape == (1000, 2, 2)
    assert len(z.unique()) == z.numel()
    torch.testing.assert_close(z.mean(dim=0), posterior.mean, rtol=0, atol=0.1)


def test_log_densities_match_torch_distributions():
    posterior, z = random_posterior(), random(4, 7, 3, seed=5)
    normal = Normal(posterior.mean, torch.exp(0.5 * posterior.log_var))

    torch.testing.assert_close(posterior.log_prob(z), normal.log_prob(z).sum(dim=-1))
    torch.testing.assert_close(log_prior(z), Normal(0.0, 1.0).log_prob(z).sum(dim=-1))


# the IWAE bound


def tiny(seed=0):
    """A model of 6 pixels in float64, not far from a trained one, and 7 binary images."""
    torch.manual_seed(seed)
    vae = VAE(VAEConfig(hidden_dims=(5, 4), latent_dim=3, input_dim=6, activation="tanh")).double()
    for weight in vae.parameters():
        weight.data.mul_(2)
    return vae, (random(7, 6, seed=3) > 0).double()


def iwae_bound(vae, x, draws, seed=4, kl_weight=1.0):
    """The loss of images (B, D) from so many draws."""
    posterior = vae.encode(x)
    z = posterior.sample(torch.Generator().manual_seed(seed), draws)
    return negative_iwae_bound(vae.decode(z), x, z, posterior, kl_weight)


@pytest.mark.parametrize("draws", [1, 2, 50])
@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_negative_iwae_bound_matches_a_sum_by_brute_force(draws, kl_weight):
    vae, x = tiny()
    posterior = vae.encode(x)
    z = posterior.sample(torch.Generator().manual_seed(4), draws)

    total = 0.0
    for image, (pixels, mean, log_var) in enumerate(zip(x, *posterior, strict=True)):
        weights = []
        for code in z[:, image]:
            likelihood = Bernoulli(logits=vae.decode(code)).log_prob(pixels).exp().prod()
            prior = Normal(0.0, 1.0).log_prob(code).exp().prod()
            proposal = Normal(mean, (log_var / 2).exp()).log_prob(code).exp().prod()
            weights.append(likelihood * (prior / proposal) ** kl_weight)
        total -= math.log(sum(weights).item() / draws)

    assert iwae_bound(vae, x, draws, kl_weight=kl_weight).loss.item() == pytest.approx(total, rel=1e-12)


def test_negative_iwae_bound_has_the_terms_of_the_elbo_beside_it():
    vae, x = tiny()
    posterior = vae.encode(x)
    z = posterior.sample(torch.Generator().manual_seed(4), 50)

    _, bce, kld = iwae_bound(vae, x, 50)

    each = [negative_elbo(vae.decode(code), x, posterior) for code in z]
    torch.testing.assert_close(bce, sum(loss.bce for loss in each) / 50)
    torch.testing.assert_close(kld, each[0].kld)


@pytest.mark.parametrize("draws", [1, 20])
def test_negative_iwae_bound_is_importance_nll_of_the_same_draws(draws):
    vae, x = tiny()

    nll = importance_nll(vae, x, draws, torch.Generator().manual_seed(4))

    assert iwae_bound(vae, x, draws).loss.item() == pytest.approx(nll.sum().item(), rel=1e-12)


def test_the_iwae_bound_tightens_as_k_grows_from_the_elbo_towards_the_likelihood():
    vae, x = tiny()
    vae.requires_grad_(False)

    one, five, fifty = (iwae_bound(vae, x.repeat(2_000, 1), draws).loss.item() / 2_000 for draws in (1, 5, 50))
    nll, bce, kld = (term.item() for term in iwae_bound(vae, x, 100_000))

    assert one == pytest.approx(bce + kld, abs=0.1)  # the negative ELBO
    assert one > five + 0.5 > fifty + 1.0 > nll + 1.0


def test_the_iwae_bound_is_at_least_the_mean_over_its_draws_one_by_one():
    vae, x = tiny()
    posterior = vae.encode(x)
    z = posterior.sample(torch.Generator().manual_seed(4), 20)

    together = negative_iwae_bound(vae.decode(z), x, z, posterior).loss
    one_by_one = [negative_iwae_bound(vae.decode(code), x, code, posterior).loss for code in z.split(1)]

    assert together < sum(one_by_one) / 20


def gradient(loss, vae):
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(vae.parameters()))])


def test_the_gradient_of_the_iwae_bound_of_one_draw_is_that_of_the_sampled_elbo():
    vae, x = tiny()
    eps = random(7, 3, seed=9)

    mean, log_var = vae.encode(x)
    std = (0.5 * log_var).exp()
    z = mean + std * eps
    log_joint = Bernoulli(logits=vae.decode(z)).log_prob(x).sum() + Normal(0.0, 1.0).log_prob(z).sum()
    expected = gradient(-(log_joint - Normal(mean, std).log_prob(z).sum()), vae)

    posterior = vae.encode(x)
    z = (posterior.mean + (0.5 * posterior.log_var).exp() * eps)[None]
    loss = negative_iwae_bound(vae.decode(z), x, z, posterior).loss
    torch.testing.assert_close(gradient(loss, vae), expected)


def test_the_gradient_of_the_iwae_bound_of_one_draw_is_on_average_that_of_the_elbo():
    vae, x = tiny()
    repeats = 20_000
    x = x.repeat(repeats, 1)

    sampled = gradient(iwae_bound(vae, x, 1).loss, vae) / repeats
    logits, posterior = vae(x, torch.Generator().manual_seed(5))
    exact_kld = gradient(negative_elbo(logits, x, posterior).loss, vae) / repeats

    torch.testing.assert_close(sampled, exact_kld, rtol=0.02, atol=0.05)


def test_the_gradient_of_the_iwae_bound_weighs_draws_by_their_likelihood():
    """Equation (13) of Burda et al.: the gradients of log w_k, weighted by w_k / Σ w."""
    vae, x = tiny()
    image, draws = x[:1], 5

    posterior = vae.encode(image)
    z = posterior.sample(torch.Generator().manual_seed(4), draws)
    log_weights = [-negative_iwae_bound(vae.decode(code), image, code, posterior).loss for code in z.split(1)]
    shares = torch.stack(log_weights).detach().softmax(dim=0)
    gradients = [torch.autograd.grad(w, [*vae.parameters()], retain_graph=True) for w in log_weights]
    expected = -sum(s * torch.cat([part.flatten() for part in g]) for s, g in zip(shares, gradients, strict=True))

    assert shares.max() < 0.9
    torch.testing.assert_close(gradient(iwae_bound(vae, image, draws).loss, vae), expected)


# the network


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
