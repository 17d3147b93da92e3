"""Probes, CKNNA and the numbers of tokens: closed forms, and scikit-learn's regression."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from ditjax.errors import UserError
from ditjax.metrics.probing import fit_probe, logistic_regression
from ditjax.metrics.similarity import cknna, unbiased_hsic
from ditjax.metrics.tokens import (
    attention_distance,
    attention_entropy,
    best_matches,
    correct_keypoints,
    distances,
    overlaps,
    places,
    recovered,
)

RNG = np.random.default_rng(0)


def clusters(n: int, width: int = 12, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    labels = rng.integers(0, classes, n)
    centres = np.random.default_rng(1).normal(size=(classes, width))
    return centres[labels] + 1.5 * rng.normal(size=(n, width)), labels


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_the_probe_is_the_regression_of_scikit_learn(l2):
    x, labels = clusters(400)
    held, truth = clusters(2000)
    probe = fit_probe(x, labels, 4, [l2])
    mean, std = x.mean(0), x.std(0)
    theirs = LogisticRegression(C=1 / (l2 * 400), tol=1e-8, max_iter=2000)
    theirs.fit((x - mean) / std, labels)
    assert probe.accuracy(held, truth) == pytest.approx(
        theirs.score((held - mean) / std, truth), abs=1e-3
    )
    np.testing.assert_allclose(probe.weights.T, theirs.coef_, atol=2e-3)
    centred = probe.bias - probe.bias.mean()
    np.testing.assert_allclose(centred, theirs.intercept_ - theirs.intercept_.mean(), atol=4e-3)


def test_the_regression_has_no_gradient_left():
    x, labels = clusters(60, 5)
    x = np.concatenate([x, np.ones((60, 1))], axis=1)
    y = np.eye(4)[labels]
    w = logistic_regression(x, y, 0.01, np.zeros((6, 4)))
    p = np.exp(x @ w) / np.exp(x @ w).sum(1, keepdims=True)
    gradient = x.T @ (p - y) / 60 + 0.01 * w * (np.arange(6) < 5)[:, None]
    assert np.abs(gradient).max() < 1e-4


def test_the_penalty_is_chosen_on_rows_that_were_not_fitted():
    """Noise of many dimensions is fitted perfectly without a penalty, and better with one."""
    x, labels = clusters(400)
    wide = np.concatenate([x, 2 * np.random.default_rng(5).normal(size=(400, 60))], axis=1)
    assert fit_probe(wide, labels, 4, [1e-4]).accuracy(wide[:300], labels[:300]) == 1
    assert fit_probe(wide, labels, 4, [1e-4, 1e-1]).l2 == pytest.approx(0.1)


def test_a_probe_refuses_what_it_cannot_fit():
    x, labels = clusters(100)
    with pytest.raises(UserError, match="at least 8"):
        fit_probe(x[:7], labels[:7], 4)
    x[3, 2] = np.nan
    with pytest.raises(UserError, match="not finite"):
        fit_probe(x, labels, 4)
    constant = np.concatenate([clusters(100)[0], np.ones((100, 1))], axis=1)
    assert np.isfinite(fit_probe(constant, labels, 4).weights).all()


def test_hsic_is_the_sum_over_different_indices():
    """Song et al. 2012: the mean over all i, j, q, r that differ of K_ij (L_ij + L_qr - 2 L_iq)."""
    n = 6
    k, other = (x @ x.T for x in (RNG.normal(size=(n, 3)), RNG.normal(size=(n, 2))))
    values = [
        k[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q])
        for i, j, q, r in itertools.permutations(range(n), 4)
    ]
    assert unbiased_hsic(k, other) == pytest.approx(np.mean(values), rel=1e-10)


def test_cknna_is_of_mutual_neighbours():
    """By its definition, pair by pair."""
    n, k = 14, 3
    x, y = (RNG.normal(size=(n, d)) for d in (3, 5))
    a, b = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (x, y))

    def near(x):
        return [{*sorted(set(range(n)) - {i}, key=lambda j: -(x[i] @ x[j]))[:k]} for i in range(n)]

    def similarity(x, y):
        both = np.array(
            [[j in a & b for j in range(n)] for a, b in zip(near(x), near(y), strict=False)]
        )
        return unbiased_hsic(both * (x @ x.T), both * (y @ y.T))

    scale = np.sqrt(similarity(a, a) * similarity(b, b)) + 1e-6
    assert cknna(x, y, k) == pytest.approx(similarity(a, b) / scale, rel=1e-9)


def test_cknna():
    x = RNG.normal(size=(300, 8)) @ np.diag(np.arange(1, 9))
    rotation, _ = np.linalg.qr(RNG.normal(size=(8, 8)))
    assert cknna(x, x) == pytest.approx(1, abs=1e-3)
    assert cknna(x, 3 * x @ rotation) == pytest.approx(1, abs=1e-3)
    near = cknna(x, x + 2 * RNG.normal(size=x.shape))
    far = cknna(x, x + 8 * RNG.normal(size=x.shape))
    assert 0.05 < far < near < 0.95
    y = RNG.normal(size=(1000, 8))
    assert cknna(RNG.normal(size=(1000, 8)), y) == pytest.approx(0, abs=0.02)
    with pytest.raises(UserError, match="more than k"):
        cknna(x[:10], x[:10])
    with pytest.raises(UserError, match="300 and 299"):
        cknna(x, x[1:])


def test_entropy_and_distance_of_attention():
    N = 12
    uniform, own = jnp.full((N, N), 1 / N), jnp.eye(N)
    assert float(attention_entropy(uniform)) == pytest.approx(np.log(N), rel=1e-6)
    assert float(attention_entropy(own)) == 0
    assert float(attention_distance(uniform, 3, 4)) == pytest.approx(distances(3, 4).mean())
    assert float(attention_distance(own, 3, 4)) == 0
    right = jnp.eye(N)[np.arange(N) ^ 1]  # the other column of a pair
    assert float(attention_distance(right, 3, 4)) == pytest.approx(1)
    assert float(attention_distance(0.5 * right, 3, 4)) == pytest.approx(1)


def test_matches_are_the_nearest_directions():
    tokens = RNG.normal(size=(2, 9, 5)).astype(np.float32)
    order = RNG.permutation(9)
    lengths = RNG.uniform(1, 50, (2, 9, 1)).astype(np.float32)
    found = np.asarray(best_matches(jnp.asarray((lengths * tokens)[:, order]), jnp.asarray(tokens)))
    np.testing.assert_array_equal(found, np.broadcast_to(order, (2, 9)))
    source = places(3, 3)[order] + np.array([0.6, -0.6], np.float32)
    assert correct_keypoints(found[0], source, 3, 3).all()
    assert not correct_keypoints(found[0], source + np.array([0.3, -0.3], np.float32), 3, 3).any()


def test_what_a_patch_recovers():
    corrupt, clean = (jnp.asarray(RNG.normal(size=(3, 2, 2)), jnp.float32) for _ in range(2))

    def effect(out):
        part, whole = recovered(out, corrupt, clean)
        return np.asarray(part / whole)

    np.testing.assert_allclose(effect(clean), 1, rtol=1e-6)
    np.testing.assert_array_equal(effect(corrupt), 0)
    np.testing.assert_allclose(effect(0.75 * corrupt + 0.25 * clean), 0.25, rtol=1e-4)


def test_the_overlap_is_what_both_have_of_what_either_has():
    region = np.array([[True, True, False, False], [False] * 4])
    found = np.array([[[1, 0], [0, 0], [1, 0], [0, 0]], [[0, 1], [0, 0], [0, 0], [0, 0]]], bool)
    np.testing.assert_array_equal(overlaps(found, region), [[1 / 3, 0], [0, 0]])
    np.testing.assert_array_equal(overlaps(region[:1, :, None], region[:1]), [[1]])
