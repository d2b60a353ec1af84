"""How much of the digit is in the latent codes: classifiers that see nothing else, and how many dimensions are used.

The codes are the posterior means of the images. Letters in shapes: N images, Z latent dimensions.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

ACTIVE_VARIANCE = 0.01  # the threshold of Burda et al.


def knn_accuracy(
    train_codes: NDArray[Any],
    train_labels: NDArray[Any],
    test_codes: NDArray[Any],
    test_labels: NDArray[Any],
    neighbours: int,
) -> float:
    """Share of test codes (N, Z) whose label (N,) is the commonest among the nearest ``neighbours`` training codes.

    Distances are not rescaled: the prior gives every latent dimension the same unit.
    """
    classifier = KNeighborsClassifier(n_neighbors=neighbours).fit(train_codes, train_labels)
    return float(classifier.score(test_codes, test_labels))


def linear_probe_accuracy(
    train_codes: NDArray[Any], train_labels: NDArray[Any], test_codes: NDArray[Any], test_labels: NDArray[Any]
) -> float:
    """Share of test codes (N, Z) whose label (N,) a logistic regression on the training codes gets right.

    High where the digits lie in sectors that straight lines can part; the k-NN sees curved clusters too.
    Newton's method: with many codes of few dimensions its matrix is tiny, and it converges in a few exact steps
    that need neither random numbers nor a tolerance to tune.
    """
    probe = make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cholesky"))
    return float(probe.fit(train_codes, train_labels).score(test_codes, test_labels))


def active_units(posterior_means: NDArray[Any]) -> NDArray[np.bool_]:
    """Which latent dimensions tell images apart, as booleans (Z,), from the posterior means (N, Z) of many images.

    Cov_x(E_q(z|x)[z]) > 0.01: section 5.2 of Burda et al., "Importance Weighted Autoencoders", ICLR 2016,
    https://arxiv.org/abs/1509.00519. A dimension that fell back on the prior has the same mean for every image.
    """
    active: NDArray[np.bool_] = posterior_means.var(axis=0, dtype=np.float64) > ACTIVE_VARIANCE
    return active
