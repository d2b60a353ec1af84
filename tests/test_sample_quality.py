"""Precision, recall, density and coverage against sets of points small enough to count by hand."""

import pytest
import torch

from mnist_vae.evaluation import sample_quality as module
from mnist_vae.evaluation.sample_quality import SampleQuality, cloud, features, sample_quality

#            ball of radius 1   of radius 1   of radius 2        (k = 1)
REAL = torch.tensor([[0.0], [1.0], [3.0]])
GENERATED = torch.tensor([[0.5], [0.75]])  # each with a ball of radius 0.25


def normal(points, seed):
    return torch.randn(points, 2, generator=torch.Generator().manual_seed(seed))


def test_cloud_measures_the_squared_radius_to_another_point():
    assert cloud(REAL, neighbours=1).squared_radii.tolist() == [1, 1, 4]
    assert cloud(REAL, neighbours=2).squared_radii.tolist() == [9, 4, 9]


def test_sample_quality_matches_a_count_by_hand():
    quality = sample_quality(cloud(REAL, neighbours=1), cloud(GENERATED, neighbours=1))

    assert quality == pytest.approx(SampleQuality(precision=1, recall=1 / 3, density=2, coverage=2 / 3))


def test_sample_quality_swaps_roles_with_the_sets():
    quality = sample_quality(cloud(GENERATED, neighbours=1), cloud(REAL, neighbours=1))

    assert quality == pytest.approx(SampleQuality(precision=1 / 3, recall=1, density=1 / 3, coverage=1 / 2))


def test_sample_quality_counts_density_per_neighbour():
    generated = cloud(torch.tensor([[0.5], [0.75], [2.5], [9.0]]), neighbours=2)

    assert sample_quality(cloud(REAL, neighbours=2), generated).density == pytest.approx((3 + 3 + 3) / (2 * 4))


def test_sample_quality_of_a_set_against_itself_is_perfect():
    itself = cloud(normal(300, seed=0))

    quality = sample_quality(itself, itself)

    assert (quality.precision, quality.recall, quality.coverage) == (1, 1, 1)


def test_sample_quality_of_sets_far_apart_is_zero():
    assert sample_quality(cloud(normal(300, seed=0)), cloud(normal(300, seed=1) + 100)) == (0, 0, 0, 0)


def test_sample_quality_of_two_samples_of_one_distribution_has_density_one_and_the_expected_coverage():
    quality = sample_quality(cloud(normal(2000, seed=0), neighbours=3), cloud(normal(2000, seed=1), neighbours=3))

    assert quality.density == pytest.approx(1, abs=0.05)
    assert quality.coverage == pytest.approx(1 - 2**-3, abs=0.03)  # Naeem et al., section 3.3, for large equal sets


def test_sample_quality_of_a_collapsed_generator_has_precision_but_no_recall():
    quality = sample_quality(cloud(normal(500, seed=0)), cloud(0.01 * normal(500, seed=1)))

    assert quality.precision > 0.99
    assert quality.recall < 0.01
    assert quality.coverage < 0.1
    assert quality.density > 1


def test_sample_quality_does_not_depend_on_the_blocks(monkeypatch):
    points = normal(100, seed=0), 0.7 * normal(80, seed=1)
    whole = sample_quality(*map(cloud, points))
    monkeypatch.setattr(module, "BLOCK_ROWS", 7)

    assert sample_quality(*map(cloud, points)) == whole


def test_features_are_the_averages_of_squares_of_pixels():
    image = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.4], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])

    torch.testing.assert_close(features(image.reshape(1, 16)), torch.tensor([[0.5, 0.1, 1.0, 0.0]]))


@pytest.mark.parametrize("neighbours", [0, 3])
def test_cloud_refuses_more_neighbours_than_there_are_other_points(neighbours):
    with pytest.raises(ValueError, match=f"neighbours is {neighbours}; with 3 images"):
        cloud(REAL, neighbours)
