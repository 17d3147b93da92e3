"""Our scores against torch-fidelity's and pytorch-fid's own functions on the same features."""

import numpy as np
import pytest

from ditjax.metrics.frechet import gaussian_frechet_distance
from ditjax.metrics.neighbours import precision_recall
from ditjax.metrics.scores import (
    inception_score,
    kid,
    log_softmax,
    no_scores,
    update_scores,
)
from tests import feature_sets
from tests.oracles import scores as oracle


@pytest.mark.parametrize("splits", [1, 3, 10])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("count", [500, 1003])
def test_inception_score(splits, shuffle, count):
    logits = feature_sets.logits(count, seed=splits)
    order = oracle.isc_order(count) if shuffle else None
    split = feature_sets.even_splits(count, splits, order)
    ours = inception_score(update_scores(no_scores(splits, 7), log_softmax(logits), split))
    theirs = oracle.inception_score(logits, splits, shuffle)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_kid(dtype, tolerance):
    """In float32, which Inception's features come in, torch-fidelity's own rounding is left."""
    x = feature_sets.features(600, 1, 128).astype(dtype)
    y = feature_sets.features(500, 20, 128).astype(dtype)
    ours = kid(x, y, oracle.kid_subsets(600, 500, 8, 200))
    np.testing.assert_allclose(ours, oracle.kid(x, y, 8, 200), rtol=tolerance)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall(k):
    reference, samples = feature_sets.features(700, 0, 48), feature_sets.features(650, 4, 48)
    ours = precision_recall(reference, samples, k, block=128)
    theirs = oracle.precision_recall(reference, samples, k, 300)
    np.testing.assert_allclose((ours.precision, ours.recall), theirs, rtol=0, atol=1e-6)
    assert 0.1 < ours.precision < 0.99
    assert 0.1 < ours.recall < 0.99


@pytest.mark.parametrize("name", feature_sets.GAUSSIANS)
def test_frechet_distance(name):
    """To 1e-6 everywhere; and where covariances are singular, ours is the one that is right."""
    mu1, sigma1, mu2, sigma2, exact = feature_sets.gaussians(name)
    ours = gaussian_frechet_distance(mu1, sigma1, mu2, sigma2)
    theirs = oracle.frechet_distance(mu1, sigma1, mu2, sigma2)
    np.testing.assert_allclose(ours, exact, rtol=1e-12)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    if name != "full":
        assert abs(ours - exact) < abs(theirs - exact)


def test_frechet_distance_in_fifty_digits():
    """Fewer samples than dimensions: mpmath's eigenvalues of the same float64 covariances."""
    mpmath = pytest.importorskip("mpmath")  # which torch depends on
    (mu1, c1), (mu2, c2) = (feature_sets.centred(n, n, 10) for n in (6, 8))
    with mpmath.workdps(50):
        x, y = mpmath.matrix(c1.tolist()), mpmath.matrix(c2.tolist())
        gram = (x * y.T) * (y * x.T)  # its eigenvalues are squares of singular values
        values = mpmath.eigsy((gram + gram.T) / 2, eigvals_only=True)
        cross = sum(mpmath.sqrt(max(value, 0)) for value in values)
        traces = sum(v * v for v in x) + sum(v * v for v in y)
        shift = sum((mpmath.mpf(a) - mpmath.mpf(b)) ** 2 for a, b in zip(mu1, mu2, strict=True))
        exact = float(shift + traces - 2 * cross)
    ours = gaussian_frechet_distance(mu1, c1.T @ c1, mu2, c2.T @ c2)
    np.testing.assert_allclose(ours, exact, rtol=1e-12)
