"""Classifiers of codes against codes whose classes are known by construction."""

import numpy as np
import pytest

from mnist_vae.evaluation.codes import active_units, knn_accuracy, linear_probe_accuracy

CENTRES = np.array([[0, 0], [8, 0], [0, 8], [8, 8]])


def clusters(codes, seed):
    """Well separated classes, (codes, 2) and (codes,)."""
    random = np.random.default_rng(seed)
    labels = random.integers(4, size=codes)
    return CENTRES[labels] + random.normal(size=(codes, 2)), labels


def rings(codes, seed):
    """A disc within a ring, (codes, 2) and (codes,)."""
    random = np.random.default_rng(seed)
    labels = random.integers(2, size=codes)
    angle = random.uniform(0, 2 * np.pi, size=codes)
    return (1 + 2 * labels)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1), labels


def test_knn_and_linear_probe_classify_separate_clusters_without_a_mistake():
    train, test = clusters(400, seed=0), clusters(100, seed=1)

    assert knn_accuracy(*train, *test, neighbours=5) == 1
    assert linear_probe_accuracy(*train, *test) == 1


def test_knn_and_linear_probe_are_at_chance_when_labels_are_shuffled():
    (codes, labels), test = clusters(2000, seed=0), clusters(2000, seed=1)
    shuffled = np.random.default_rng(2).permutation(labels)

    assert knn_accuracy(codes, shuffled, *test, neighbours=50) == pytest.approx(1 / 4, abs=0.08)
    assert linear_probe_accuracy(codes, shuffled, *test) == pytest.approx(1 / 4, abs=0.08)


def test_knn_separates_rings_and_the_linear_probe_does_not():
    train, test = rings(400, seed=0), rings(400, seed=1)

    assert knn_accuracy(*train, *test, neighbours=5) == 1
    assert linear_probe_accuracy(*train, *test) < 0.7


def test_knn_accuracy_lets_neighbours_outvote_a_single_wrong_label():
    codes, labels = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]]), np.array([1, 0, 0, 1, 1, 1])
    test = np.array([[0.0], [5.0]]), np.array([0, 1])

    assert knn_accuracy(codes, labels, *test, neighbours=1) == 0.5
    assert knn_accuracy(codes, labels, *test, neighbours=3) == 1


def test_linear_probe_accuracy_does_not_depend_on_the_scale_of_a_dimension():
    (train, train_labels), (test, test_labels) = clusters(400, seed=0), clusters(100, seed=1)
    scale = np.array([1e-4, 1.0])

    assert linear_probe_accuracy(train * scale, train_labels, test * scale, test_labels) == 1


def test_active_units_are_dimensions_whose_mean_varies_over_images_by_more_than_a_hundredth():
    means = np.array([[0.0, 3.0, 1.00], [0.0, 3.0, 1.30], [0.0, 3.0, 1.00], [0.0, 3.1, 1.30]])  # variances 0, <, >

    assert active_units(means).tolist() == [False, False, True]


def test_active_units_are_not_made_by_the_rounding_of_a_sum_over_many_images():
    means = np.full((8_000_000, 2), 3.0, dtype=np.float32)

    assert active_units(means).tolist() == [False, False]
