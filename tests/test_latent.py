"""Images out of the latent space, with decoders that write z where the test can read it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import logit
from scipy.stats import norm

from mnist_vae.model.latent import decode, leading_dimensions, prior_draws, manifold, traverse
from mnist_vae.model.vae import VAE, VAEConfig


def transparent(latent_dim):
    """A decoder whose images carry z: the logit of every pixel in row i is z[i]; other rows are 0."""

    def write(z):
        images = torch.zeros(len(z), 28, 28)
        images[:, :latent_dim] = z[:, :, None]
        return images.flatten(1)

    return SimpleNamespace(architecture=VAEConfig(latent_dim=latent_dim), decode=write)


def read(grid, latent_dim):
    """What a transparent decoder was given, (down, across, Z)."""
    z = logit(grid.images[:, :latent_dim, 0].astype(float))
    return z.reshape(len(grid.down), len(grid.across), latent_dim)


def test_decoded_images_are_pixels_between_paper_and_ink():
    torch.manual_seed(0)
    vae = VAE(VAEConfig(hidden_dim=8))
    z = prior_draws(3, 2, seed=0)

    images = decode(vae, z)

    assert images.shape == (3, 28, 28)
    np.testing.assert_allclose(images.reshape(3, 784), torch.sigmoid(vae.decode(z)).detach().numpy())


def test_z0_runs_along_columns_and_z1_down_rows():
    size, values = 5, norm.ppf(np.linspace(0.05, 0.95, 5))

    grid = manifold(transparent(2), size, [0.05, 0.95], [3.0, 2.0])

    z = read(grid, 2)
    for i in range(size):
        np.testing.assert_allclose(z[i, :, 0], values, atol=1e-5)
        np.testing.assert_allclose(z[:, i, 1], values, atol=1e-5)
    assert grid.dimensions == (0, 1)


@pytest.mark.parametrize("kld", [[3.0, 2.0], [2.0, 3.0]])
def test_two_dimensions_keep_their_order_whichever_carries_more(kld):
    z = read(manifold(transparent(2), 3, [0.05, 0.95], kld), 2)

    assert (z[:, 2, 0] > z[:, 0, 0]).all()
    assert (z[2, :, 1] > z[0, :, 1]).all()


def test_the_axes_are_quantiles_of_the_prior():
    grid = manifold(transparent(2), 15, [0.05, 0.95], [1.0, 1.0])

    np.testing.assert_allclose(grid.across, norm.ppf(np.linspace(0.05, 0.95, 15)))
    np.testing.assert_allclose(grid.down, norm.ppf(np.linspace(0.05, 0.95, 15)))
    assert grid.images.shape == (225, 28, 28)


def test_the_quantiles_at_the_edges_can_be_chosen():
    grid = manifold(transparent(2), 3, [0.2, 0.6], [1.0, 1.0])

    np.testing.assert_allclose(grid.across, norm.ppf([0.2, 0.4, 0.6]))


def test_one_dimension_is_a_single_row():
    grid = manifold(transparent(1), 7, [0.05, 0.95], [3.0])

    assert grid.images.shape == (7, 28, 28)
    assert len(grid.down) == 1
    assert grid.dimensions == (0, 0)
    np.testing.assert_allclose(read(grid, 1)[0, :, 0], norm.ppf(np.linspace(0.05, 0.95, 7)), atol=1e-5)


def test_of_five_dimensions_the_two_that_carry_most_are_walked_and_the_others_stay_at_zero():
    values = norm.ppf(np.linspace(0.05, 0.95, 4))

    grid = manifold(transparent(5), 4, [0.05, 0.95], [0.1, 2.0, 0.0, 3.0, 1.0])

    z = read(grid, 5)
    assert grid.dimensions == (1, 3)
    np.testing.assert_allclose(z[:, :, 1], np.tile(values, (4, 1)), atol=1e-5)
    np.testing.assert_allclose(z[:, :, 3], np.tile(values[:, None], (1, 4)), atol=1e-5)
    assert (z[:, :, [0, 2, 4]] == 0).all()


def test_a_traversal_walks_one_dimension_per_row_and_leaves_the_others_at_zero():
    values = np.linspace(-3, 3, 4)

    z = logit(traverse(transparent(3), [2, 0], values)[:, :3, 0].astype(float)).reshape(2, 4, 3)

    np.testing.assert_allclose(z[0], values[:, None] * [0, 0, 1], atol=1e-5)
    np.testing.assert_allclose(z[1], values[:, None] * [1, 0, 0], atol=1e-5)


def test_leading_dimensions_are_those_with_the_largest_kl_in_their_order():
    assert leading_dimensions([0.1, 2.0, 0.0, 3.0]) == (1, 3)
    assert leading_dimensions([5.0, 2.0, 0.0, 3.0]) == (0, 3)
    assert leading_dimensions([3.0]) == (0, 0)


def test_the_seed_decides_the_draws_from_the_prior():
    first = prior_draws(72, 2, seed=1)
    torch.rand(3)  # the global generator has no part in it

    assert torch.equal(first, prior_draws(72, 2, seed=1))
    assert not torch.equal(first, prior_draws(72, 2, seed=2))


def test_draws_from_the_prior_are_standard_normal():
    z = prior_draws(50_000, 3, seed=0)

    assert z.shape == (50_000, 3)
    assert z.mean(dim=0).abs().max() < 5 / np.sqrt(50_000)
    torch.testing.assert_close(z.T.cov(), torch.eye(3), atol=0.03, rtol=0)
