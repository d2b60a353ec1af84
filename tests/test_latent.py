"""Into the latent space and out of it, with decoders that write z where the test can read it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import logit
from scipy.stats import norm

from mnist_vae.model import latent
from mnist_vae.model.latent import (
    decode,
    encode,
    leading_dimensions,
    manifold,
    mean_kld,
    prior_draws,
    tile,
    to_tensor,
    to_uint8,
    traverse,
)
from mnist_vae.model.vae import VAE, VAEConfig


def transparent(latent_dim):
    """A decoder whose images carry z: the logit of every pixel in row i is z[i]; other rows are 0."""

    def write(z):
        images = torch.zeros(len(z), 28, 28)
        images[:, :latent_dim] = z[:, :, None]
        return images.flatten(1)

    return SimpleNamespace(config=VAEConfig(latent_dim=latent_dim), decode=write)


def read(grid, latent_dim):
    """What a transparent decoder was given, (down, across, Z)."""
    z = logit(grid.images[:, :latent_dim, 0].astype(float))
    return z.reshape(len(grid.down), len(grid.across), latent_dim)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, size=(20, 28, 28), dtype=np.uint8)


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return VAE(VAEConfig(hidden_dims=(16,), latent_dim=2)).eval()


# into the latent space


def test_to_tensor_gives_rows_of_pixels_between_paper_and_ink(images):
    x = to_tensor(images)

    assert x.shape == (20, 784)
    assert x.dtype == torch.float32
    np.testing.assert_array_equal(x.numpy(), images.reshape(20, 784) / np.float32(255))


def test_encode_gives_each_image_its_own_posterior(vae, images):
    posterior = encode(vae, images)

    for index in (0, 7, 19):
        alone = vae.encode(torch.from_numpy(images[[index]]).reshape(1, 784) / 255)
        torch.testing.assert_close(posterior.mean[[index]], alone.mean)
        torch.testing.assert_close(posterior.log_var[[index]], alone.log_var)


def test_encode_gives_no_posteriors_of_no_images(vae, images):
    posterior = encode(vae, images[:0])

    assert posterior.mean.shape == posterior.log_var.shape == (0, 2)


def test_encode_does_not_depend_on_the_size_of_a_block(vae, images, monkeypatch):
    whole = encode(vae, images)
    monkeypatch.setattr(latent, "BLOCK", 7)
    in_blocks = encode(vae, images)

    assert whole.mean.shape == whole.log_var.shape == (20, 2)
    torch.testing.assert_close(in_blocks.mean, whole.mean)
    torch.testing.assert_close(in_blocks.log_var, whole.log_var)


def test_the_mean_kl_does_not_depend_on_how_many_codes_are_held_at_a_time(vae, images, monkeypatch):
    whole = encode(vae, images).kld().double().mean(dim=0).tolist()
    assert mean_kld(vae, images) == whole

    monkeypatch.setattr(latent, "MEASURED", 7)
    held = []
    monkeypatch.setattr(latent, "encode", lambda vae, some: held.append(len(some)) or encode(vae, some))
    assert mean_kld(vae, images) == pytest.approx(whole)
    assert held == [7, 7, 6]


# out of it


def test_decode_gives_pixels_between_paper_and_ink(vae):
    z = prior_draws(3, 2, seed=0)

    images = decode(vae, z)

    assert images.shape == (3, 28, 28)
    np.testing.assert_allclose(images.reshape(3, 784), torch.sigmoid(vae.decode(z)).detach().numpy())


def test_manifold_has_z0_along_columns_and_z1_down_rows():
    size, values = 5, norm.ppf(np.linspace(0.05, 0.95, 5))

    grid = manifold(transparent(2), size, [0.05, 0.95], [3.0, 2.0])

    z = read(grid, 2)
    for i in range(size):
        np.testing.assert_allclose(z[i, :, 0], values, atol=1e-5)
        np.testing.assert_allclose(z[:, i, 1], values, atol=1e-5)
    assert grid.dimensions == (0, 1)


@pytest.mark.parametrize("kld", [[3.0, 2.0], [2.0, 3.0]])
def test_manifold_keeps_two_dimensions_in_order_whichever_carries_more(kld):
    z = read(manifold(transparent(2), 3, [0.05, 0.95], kld), 2)

    assert (z[:, 2, 0] > z[:, 0, 0]).all()
    assert (z[2, :, 1] > z[0, :, 1]).all()


def test_manifold_has_quantiles_of_the_prior_as_axes():
    grid = manifold(transparent(2), 15, [0.05, 0.95], [1.0, 1.0])

    np.testing.assert_allclose(grid.across, norm.ppf(np.linspace(0.05, 0.95, 15)))
    np.testing.assert_allclose(grid.down, norm.ppf(np.linspace(0.05, 0.95, 15)))
    assert grid.images.shape == (225, 28, 28)


def test_manifold_reaches_from_one_given_quantile_to_the_other():
    grid = manifold(transparent(2), 3, [0.2, 0.6], [1.0, 1.0])

    np.testing.assert_allclose(grid.across, norm.ppf([0.2, 0.4, 0.6]))


def test_manifold_of_one_dimension_is_a_single_row():
    grid = manifold(transparent(1), 7, [0.05, 0.95], [3.0])

    assert grid.images.shape == (7, 28, 28)
    assert len(grid.down) == 1
    assert grid.dimensions == (0, 0)
    np.testing.assert_allclose(read(grid, 1)[0, :, 0], norm.ppf(np.linspace(0.05, 0.95, 7)), atol=1e-5)


def test_manifold_of_five_dimensions_walks_the_two_that_carry_most_and_leaves_the_others_at_zero():
    values = norm.ppf(np.linspace(0.05, 0.95, 4))

    grid = manifold(transparent(5), 4, [0.05, 0.95], [0.1, 2.0, 0.0, 3.0, 1.0])

    z = read(grid, 5)
    assert grid.dimensions == (1, 3)
    np.testing.assert_allclose(z[:, :, 1], np.tile(values, (4, 1)), atol=1e-5)
    np.testing.assert_allclose(z[:, :, 3], np.tile(values[:, None], (1, 4)), atol=1e-5)
    assert (z[:, :, [0, 2, 4]] == 0).all()


def test_traverse_walks_one_dimension_per_row_and_leaves_the_others_at_zero():
    values = np.linspace(-3, 3, 4)

    z = logit(traverse(transparent(3), [2, 0], values)[:, :3, 0].astype(float)).reshape(2, 4, 3)

    np.testing.assert_allclose(z[0], values[:, None] * [0, 0, 1], atol=1e-5)
    np.testing.assert_allclose(z[1], values[:, None] * [1, 0, 0], atol=1e-5)


def test_leading_dimensions_are_those_with_the_largest_kl_in_their_order():
    assert leading_dimensions([0.1, 2.0, 0.0, 3.0]) == (1, 3)
    assert leading_dimensions([5.0, 2.0, 0.0, 3.0]) == (0, 3)
    assert leading_dimensions([3.0]) == (0, 0)
    assert leading_dimensions([1.0, 1.0, 1.0]) == (0, 1)  # those that the explorer takes


def test_prior_draws_are_the_same_for_the_same_seed():
    first = prior_draws(72, 2, seed=1)
    torch.rand(3)  # the global generator has no part in it

    assert torch.equal(first, prior_draws(72, 2, seed=1))
    assert not torch.equal(first, prior_draws(72, 2, seed=2))


def test_prior_draws_are_standard_normal():
    z = prior_draws(50_000, 3, seed=0)

    assert z.shape == (50_000, 3)
    assert z.mean(dim=0).abs().max() < 5 / np.sqrt(50_000)
    torch.testing.assert_close(z.T.cov(), torch.eye(3), atol=0.03, rtol=0)


# images side by side


def test_tile_puts_image_k_in_row_k_div_cols_and_column_k_mod_cols():
    images = np.random.default_rng(0).random((6, 3, 2))

    canvas = tile(images, cols=3)

    assert canvas.shape == (2 * 3, 3 * 2)
    for k in range(6):
        row, column = divmod(k, 3)
        np.testing.assert_array_equal(canvas[3 * row : 3 * (row + 1), 2 * column : 2 * (column + 1)], images[k])


def test_to_uint8_makes_paper_0_and_ink_255():
    image = to_uint8(np.array([0.0, 0.5, 0.999, 1.0]))

    assert image.dtype == np.uint8
    assert image.tolist() == [0, 128, 255, 255]
