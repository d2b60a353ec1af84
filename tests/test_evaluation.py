"""Every number of an evaluation, against models whose loss is known otherwise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from mnist_vae.data.binarization import binarize_dataset
from mnist_vae.data.dataset import Dataset
from mnist_vae.evaluation import evaluate as module
from mnist_vae.evaluation.evaluate import SampledBce, evaluate, measure_nll, sampled_bce, summarise_elbo
from mnist_vae.evaluation.likelihood import importance_nll, quadrature_nll
from mnist_vae.evaluation.model_card import meaning_of
from mnist_vae.model import latent
from mnist_vae.model.latent import decode, encode, prior_draws, to_tensor
from mnist_vae.model.vae import VAE, Posterior, VAEConfig
from mnist_vae.params import Evaluate

SETTINGS = Evaluate(seed=1, draws=2, quadrature_step=0.5, importance_samples=5, neighbours=5, quality_images=3000)


@pytest.fixture
def dataset(digits_dataset):
    part = digits_dataset
    return Dataset("digits", part.x_train[:7200:32], part.y_train[:7200:32], part.x_test[:60], part.y_test[:60])


@pytest.fixture
def images(digits_dataset):
    return digits_dataset.x_test[:20]


@pytest.fixture
def held_out(digits_dataset):
    return digits_dataset.x_train[-40:]


def untrained(latent_dim=2):
    torch.manual_seed(0)
    return VAE(VAEConfig(hidden_dims=(16,), latent_dim=latent_dim)).eval()


@pytest.fixture
def vae():
    return untrained()


def constant_decoder(logits):
    """A model whose decoder answers ``logits`` (784,) whatever z is."""
    vae = VAE(VAEConfig(hidden_dims=(16,), latent_dim=2))
    torch.nn.init.zeros_(vae.decoder[2].weight)
    vae.decoder[2].bias.data.copy_(torch.as_tensor(logits))
    return vae


def slope_decoder(slope):
    """A model with one latent dimension, in which every pixel's logit is slope · z."""
    vae = VAE(VAEConfig(hidden_dims=(2,), latent_dim=1))
    vae.decoder[0].weight.data = torch.tensor([[1.0], [-1.0]])  # relu(z) and relu(−z)
    vae.decoder[0].bias.data.zero_()
    vae.decoder[2].weight.data = torch.tensor([[slope, -slope]]).expand(784, 2).clone()
    vae.decoder[2].bias.data.zero_()
    return vae


def posteriors(images, latent_dim, mean=0.0, std=1.0):
    return Posterior(*(torch.full((images, latent_dim), value) for value in (mean, 2 * np.log(std))))


def log_sigmoid(logits):
    return -np.log1p(np.exp(-logits))


# the ELBO


def test_summarise_elbo_matches_a_calculation_by_hand():
    bce = torch.tensor([[100.0, 110.0], [104.0, 114.0], [99.0, 109.0]]).double()  # means over images: 105, 109, 104
    kld = torch.tensor([[1.0, 2.0], [3.0, 6.0]]).double()  # 3 and 9 nats

    summary = summarise_elbo(SampledBce(bce.mean(dim=0), bce.mean(dim=1)), kld, kl_weight=0.5)

    se = np.sqrt((1 + 9 + 4) / 2) / np.sqrt(3)
    assert {name: summary[name] for name in ("loss", "loss_se", "bce", "kld", "elbo", "elbo_se")} == pytest.approx(
        {"loss": 106 + 0.5 * 6, "loss_se": se, "bce": 106, "kld": 6, "elbo": -112, "elbo_se": se}
    )
    assert (summary["kld_z0"], summary["kld_z1"]) == (2, 4)


def test_summarise_elbo_gives_plain_numbers():
    bce = SampledBce(torch.ones(3).double(), torch.ones(2).double())

    summary = summarise_elbo(bce, torch.ones(3, 1).double(), kl_weight=1)

    assert all(type(value) is float for value in summary.values())


def test_sampled_bce_of_a_constant_decoder_has_its_closed_form(images):
    logits = np.linspace(-3, 3, 784)
    x = images.reshape(20, 784) / 255

    bce = sampled_bce(constant_decoder(logits), to_tensor(images), posteriors(20, 2), draws=4, seed=1)

    by_hand = -(x * log_sigmoid(logits) + (1 - x) * log_sigmoid(-logits)).sum(axis=1)
    np.testing.assert_allclose(bce.per_image, by_hand, rtol=1e-5)
    np.testing.assert_allclose(bce.per_draw, np.full(4, by_hand.mean()), rtol=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 2.0)])
def test_sampled_bce_draws_z_from_the_posterior(mean, std):
    x, posterior = torch.zeros(10_000, 784), posteriors(10_000, 1, mean, std)

    bce = sampled_bce(slope_decoder(2.0), x, posterior, draws=1, seed=1).per_image

    expected, _ = quad(lambda z: 784 * np.log1p(np.exp(2 * z)) * norm.pdf(z, mean, std), -30, 30)
    at_the_mean = 784 * np.log1p(np.exp(2 * mean))
    se = float(bce.std() / np.sqrt(bce.numel()))
    assert float(bce.mean()) == pytest.approx(expected, abs=5 * se)
    assert expected > at_the_mean + 20 * se


def test_sampled_bce_averages_its_draws_over_images_and_images_over_draws():
    x, posterior = torch.zeros(10, 784), posteriors(10, 1)

    bce = sampled_bce(slope_decoder(2.0), x, posterior, draws=4, seed=1)

    first = sampled_bce(slope_decoder(2.0), x, posterior, draws=1, seed=1)
    assert bce.per_image.shape == (10,)
    assert bce.per_draw.shape == (4,)
    assert bce.per_image.dtype == bce.per_draw.dtype == torch.float64
    assert bce.per_draw[0] == pytest.approx(first.per_image.mean())  # the same random numbers come first
    assert bce.per_image.mean() == pytest.approx(bce.per_draw.mean())


def test_sampled_bce_has_noise_of_its_own_for_each_draw_and_each_image():
    x, posterior = torch.zeros(10, 784), posteriors(10, 1)

    assert len(sampled_bce(slope_decoder(2.0), x, posterior, draws=1, seed=1).per_image.unique()) == 10
    assert len(sampled_bce(slope_decoder(2.0), x, posterior, draws=4, seed=1).per_draw.unique()) == 4


def test_sampled_bce_depends_on_its_seed_alone(vae, images):
    def measure(seed):
        return sampled_bce(vae, to_tensor(images), encode(vae, images), draws=4, seed=seed).per_image

    first = measure(1)
    torch.rand(3)  # the global generator has no part in it

    assert torch.equal(first, measure(1))
    assert (first != measure(2)).all()


def test_sampled_bce_does_not_depend_on_the_size_of_a_block(images, monkeypatch):
    vae = slope_decoder(2.0)
    narrow = Posterior(torch.linspace(-2, 2, 20)[:, None], torch.full((20, 1), -60.0))  # one z for each image
    whole = sampled_bce(vae, to_tensor(images), narrow, draws=2, seed=1)
    monkeypatch.setattr(module, "BLOCK", 7)

    in_blocks = sampled_bce(vae, to_tensor(images), narrow, draws=2, seed=1)

    torch.testing.assert_close(in_blocks.per_image, whole.per_image)
    torch.testing.assert_close(in_blocks.per_draw, whole.per_draw)


def test_encode_and_sampled_bce_take_no_more_than_a_block_at_once(vae, images, monkeypatch):
    monkeypatch.setattr(latent, "BLOCK", 7)
    monkeypatch.setattr(module, "BLOCK", 7)
    sizes = []
    for network in (vae.encoder, vae.decoder):
        network.register_forward_hook(lambda module, inputs, outputs: sizes.append(len(outputs)))

    sampled_bce(vae, to_tensor(images), encode(vae, images), draws=2, seed=1)

    assert max(sizes) <= 7
    assert sum(sizes) == 3 * 20  # encoded once, decoded twice


# −log p(x)


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_measure_nll_uses_quadrature_up_to_two_dimensions(images, latent_dim):
    vae, x = untrained(latent_dim), to_tensor(images)

    nll, metrics = measure_nll(vae, x, SETTINGS)

    expected = quadrature_nll(vae, x, step=0.5)
    torch.testing.assert_close(nll, expected.nll.double())
    assert metrics == {
        "nll": pytest.approx(expected.nll.double().mean().item()),
        "nll_se": pytest.approx(expected.nll.double().std().item() / np.sqrt(20)),
        "nll_method": "quadrature",
        "nll_halving_change": expected.change(),
    }


@pytest.mark.parametrize(("latent_dim", "step"), [(3, 0.5), (2, None)])
def test_measure_nll_samples_in_two_halves_where_there_is_no_grid(images, latent_dim, step):
    vae, x = untrained(latent_dim), to_tensor(images)

    nll, metrics = measure_nll(vae, x, SETTINGS.model_copy(update={"quadrature_step": step}))

    generator = torch.Generator().manual_seed(SETTINGS.seed)
    first, second = (importance_nll(vae, x, 2, generator).double() for _ in range(2))
    together = -torch.log((torch.exp(-first) + torch.exp(-second)) / 2)
    torch.testing.assert_close(nll, together)
    assert metrics["nll"] == pytest.approx(together.mean().item())
    assert metrics["nll_method"] == "importance sampling, K = 4"
    assert metrics["nll_half_samples"] == pytest.approx((first.mean() + second.mean()).item() / 2)
    assert metrics["nll_half_samples_se"] == pytest.approx(abs(first.mean() - second.mean()).item() / 2)
    assert metrics["nll"] <= metrics["nll_half_samples"]


# the whole


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_evaluate_gives_metrics_that_the_model_card_explains(dataset, held_out, latent_dim):
    metrics = evaluate(untrained(latent_dim), dataset, SETTINGS, 1.0, held_out).metrics

    assert all(meaning_of(name).text for name in metrics)
    assert {type(value) for name, value in metrics.items() if name != "nll_method"} == {float, int}
    assert np.isfinite([value for name, value in metrics.items() if name != "nll_method"]).all()


def test_evaluate_gives_what_pictures_need_of_each_test_image(vae, dataset):
    evaluation = evaluate(vae, dataset, SETTINGS, 1.0)

    x, posterior = to_tensor(dataset.x_test), encode(vae, dataset.x_test)
    torch.testing.assert_close(evaluation.posterior, posterior)
    np.testing.assert_allclose(evaluation.bce, sampled_bce(vae, x, posterior, draws=2, seed=1).per_image)
    np.testing.assert_allclose(evaluation.nll, quadrature_nll(vae, x, step=0.5).nll)


@pytest.mark.parametrize("latent_dim", [2, 3])
def test_evaluate_depends_on_its_seed_alone(dataset, latent_dim):
    vae = untrained(latent_dim)
    first = evaluate(vae, dataset, SETTINGS, 1.0).metrics
    torch.rand(3)  # the global generator has no part in it

    assert evaluate(vae, dataset, SETTINGS, 1.0).metrics == first
    assert evaluate(vae, dataset, SETTINGS.model_copy(update={"seed": 2}), 1.0).metrics != first


def test_evaluate_weighs_the_kld_in_the_loss_alone(vae, dataset):
    weighted, plain = (evaluate(vae, dataset, SETTINGS, kl_weight).metrics for kl_weight in (4.0, 1.0))

    assert weighted["loss"] == pytest.approx(weighted["bce"] + 4 * weighted["kld"])
    assert weighted | {"loss": plain["loss"]} == plain


def test_evaluate_measures_val_nll_on_the_images_held_out(vae, dataset, held_out):
    metrics = evaluate(vae, dataset, SETTINGS, 1.0, held_out).metrics

    nll = quadrature_nll(vae, to_tensor(held_out), step=0.5).nll.double()
    assert metrics["val_nll"] == pytest.approx(nll.mean().item())
    assert metrics["val_nll_se"] == pytest.approx(nll.std().item() / np.sqrt(40))
    assert metrics["val_nll"] != metrics["nll"]


def test_evaluate_measures_the_test_set_alike_whatever_is_held_out(vae, dataset, held_out):
    without, beside = evaluate(vae, dataset, SETTINGS, 1.0), evaluate(vae, dataset, SETTINGS, 1.0, held_out)

    assert {name: value for name, value in beside.metrics.items() if not name.startswith("val_")} == without.metrics
    np.testing.assert_array_equal(beside.nll, without.nll)


@pytest.mark.parametrize("count", [0, 1])
def test_evaluate_has_no_val_nll_with_fewer_than_two_images_held_out(vae, dataset, held_out, count):
    metrics = evaluate(vae, dataset, SETTINGS, 1.0, held_out[:count]).metrics

    assert not [name for name in metrics if name.startswith("val_")]


def test_evaluate_counts_no_active_unit_where_the_posterior_has_collapsed(vae, dataset):
    torch.nn.init.zeros_(vae.posterior.weight)

    assert evaluate(vae, dataset, SETTINGS, 1.0).metrics["active_units"] == 0


def test_evaluate_counts_active_units_by_means_and_not_by_variances(vae, dataset):
    mean, log_var = vae.posterior.weight.data.chunk(2)
    mean.zero_()
    log_var.mul_(100)

    evaluation = evaluate(vae, dataset, SETTINGS, 1.0)

    assert (evaluation.posterior.log_var.var(dim=0) > 1).all()
    assert evaluation.metrics["active_units"] == 0


def test_evaluate_classifies_by_the_first_training_codes_and_no_more_neighbours(vae, dataset, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "COMPARED", 8)
    monkeypatch.setattr(module, "knn_accuracy", lambda *args: asked.append(args) or 0.25)
    monkeypatch.setattr(module, "linear_probe_accuracy", lambda *args: asked.append(args) or 0.75)

    metrics = evaluate(vae, dataset, SETTINGS.model_copy(update={"neighbours": 50}), 1.0).metrics

    assert (metrics["knn_accuracy"], metrics["linear_probe_accuracy"]) == (0.25, 0.75)
    train, test = (encode(vae, images).mean for images in (dataset.x_train[:8], dataset.x_test))
    codes = (train, dataset.y_train[:8], test, dataset.y_test)
    for args, expected in zip(asked, [(*codes, 8), codes], strict=True):
        for arg, value in zip(args, expected, strict=True):
            np.testing.assert_allclose(arg, value, rtol=1e-5)


def test_evaluate_compares_test_images_with_samples_reconstructions_and_training_images(vae, dataset, monkeypatch):
    compared = []
    features = module.features
    monkeypatch.setattr(module, "features", lambda images: compared.append(images) or features(images))

    evaluate(vae, dataset, SETTINGS.model_copy(update={"quality_images": 40}), 1.0)

    generator = torch.Generator().manual_seed(SETTINGS.seed)
    test, train = (torch.randperm(count, generator=generator)[:40].numpy() for count in (60, 225))
    expected = [
        dataset.x_test[test] / 255,
        decode(vae, prior_draws(40, 2, SETTINGS.seed)),
        decode(vae, encode(vae, dataset.x_test[test]).mean),
        dataset.x_train[train] / 255,
    ]
    for images, those in zip(compared, expected, strict=True):
        np.testing.assert_allclose(images, those.reshape(40, 784), rtol=1e-5)


@pytest.mark.parametrize(("setting", "binary"), [("none", False), ("static", True)])
def test_evaluate_compares_pictures_of_a_binarised_model_as_draws_of_their_pixels(
    vae, dataset, monkeypatch, setting, binary
):
    pictures = []
    features = module.features
    monkeypatch.setattr(module, "features", lambda images: pictures.append(images) or features(images))

    evaluate(vae, binarize_dataset(dataset, setting, seed=1), SETTINGS, 1.0)

    assert [set(images.unique().tolist()) == {0.0, 1.0} for images in pictures] == [binary] * 4


def test_evaluate_draws_pixels_of_a_binarised_model_as_often_as_its_decoder_says(dataset, monkeypatch):
    pictures = []
    features = module.features
    monkeypatch.setattr(module, "features", lambda images: pictures.append(images) or features(images))
    vae = constant_decoder(np.full(784, np.log(0.25)))  # each pixel is on in one picture of five

    evaluate(vae, binarize_dataset(dataset, "static", seed=1), SETTINGS, 1.0)

    _, samples, reconstructions, _ = pictures
    assert samples.mean().item() == pytest.approx(0.2, abs=0.01)
    assert reconstructions.mean().item() == pytest.approx(0.2, abs=0.01)


def test_evaluate_compares_equal_numbers_of_images_however_many_there_are(vae, dataset, monkeypatch):
    sizes = []
    features = module.features
    monkeypatch.setattr(module, "features", lambda images: sizes.append(len(images)) or features(images))
    few = replace(dataset, x_train=dataset.x_train[:30], y_train=dataset.y_train[:30])

    for quality_images in (3000, 20):
        evaluate(vae, few, SETTINGS.model_copy(update={"quality_images": quality_images}), 1.0)

    assert sizes == [30] * 4 + [20] * 4
