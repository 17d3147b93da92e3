"""Influence is a derivative and its spread that of fresh samples; then the extrapolation."""

import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.metrics.frechet import (
    FeatureMoments,
    batch_moments,
    covariance,
    frechet_distance,
    gaussian_frechet_distance,
    gaussian_root,
)
from ditjax.metrics.uncertainty import (
    bootstrap_interval,
    frechet_infinite,
    frechet_influence,
    systematic_error,
)


def gaussian(seed, d):
    """Mean, covariance and its root, of eigenvalues over two orders of magnitude."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(d, d)))[0]
    root = q * np.logspace(0, -1, d)
    return 0.1 * rng.normal(size=d), root @ root.T, root


def draw(seed, n, mu, root):
    return mu + np.random.default_rng(seed).normal(size=(n, len(mu))) @ root.T


def weighted(x, w):
    """FeatureMoments of x with sample i taken w_i times, w real."""
    mean = w @ x / w.sum()
    c = x - mean
    return FeatureMoments(w.sum(), mean, (c * w[:, None]).T @ c)


def slope(value, n, i):
    """n dvalue/dw_i at w = 1 with the sum of w kept, by central differences."""
    e, h = np.eye(n)[i] - 1 / n, 1e-4
    return n * (value(1 + h * e) - value(1 - h * e)) / (2 * h)


@pytest.mark.parametrize(("n", "d"), [(40, 6), (9, 12)])
def test_influence_is_how_the_distance_changes_with_a_sample(n, d):
    """With fewer samples than dimensions too, where K is singular."""
    mu1, _, root = gaussian(1, d)
    mu2, sigma2, _ = gaussian(2, d)
    x = draw(0, n, mu1, root)

    def distance(w):
        m = weighted(x, w)
        # n - 1, which resampled counts keep: their sum is n.
        return gaussian_frechet_distance(m.mean, covariance(m), mu2, sigma2)

    value, influence = frechet_influence(x, gaussian_root(mu2, sigma2))
    assert value == pytest.approx(distance(np.ones(n)), rel=1e-9)
    assert influence.mean() == pytest.approx(0, abs=1e-12)
    expected = [slope(distance, n, i) for i in range(n)]
    np.testing.assert_allclose(influence, expected, rtol=1e-4, atol=1e-4 * float(influence.std()))


@pytest.mark.parametrize(("n", "d"), [(150, 12), (18, 24)])
def test_standard_error_is_the_spread_of_distances_of_fresh_samples(n, d):
    mu1, _, root = gaussian(3, d)
    mu2, sigma2, _ = gaussian(4, d)
    distances, errors = [], []
    for seed in range(150):
        value, influence = frechet_influence(draw(seed, n, mu1, root), gaussian_root(mu2, sigma2))
        distances.append(value)
        errors.append(bootstrap_interval(value, influence, 0, resamples=2).standard_error)
    # A deviation of 150 numbers is known to 6 %.
    assert np.mean(errors) == pytest.approx(np.std(distances), rel=0.25)


def test_interval_of_a_mean_is_the_textbook_one():
    x = np.random.default_rng(0).exponential(size=400)
    interval = bootstrap_interval(x.mean(), x, 1, resamples=4000)
    error = x.std() / 20
    assert interval.standard_error == pytest.approx(error)
    assert interval.low - x.mean() == pytest.approx(-1.96 * error, rel=0.1)
    assert interval.high - x.mean() == pytest.approx(1.96 * error, rel=0.1)
    narrow = bootstrap_interval(x.mean(), x, 1, resamples=4000, level=0.5)
    assert narrow.high - x.mean() == pytest.approx(0.674 * error, rel=0.1)
    assert bootstrap_interval(x.mean(), x, 1) == bootstrap_interval(x.mean(), x, 1)
    assert bootstrap_interval(x.mean(), x, 1) != bootstrap_interval(x.mean(), x, 2)


def test_intervals_hold_the_expected_distance_as_often_as_they_say():
    """The mean distance of sets of n, which is what a result of n samples is one draw of."""
    mu1, _, root = gaussian(5, 4)
    mu2, sigma2, _ = gaussian(6, 4)
    intervals = [
        bootstrap_interval(
            *frechet_influence(draw(s, 100, mu1, root), gaussian_root(mu2, sigma2)),
            s,
            resamples=400,
        )
        for s in range(300)
    ]
    expected = np.mean([i.value for i in intervals])
    share = np.mean([i.low <= expected <= i.high for i in intervals])
    # 95 % less 4 standard errors of 300 draws, above a 99.5 % that is too wide.
    assert 0.9 <= share < 0.995


def test_the_distance_of_infinitely_many_samples_is_that_of_the_distributions():
    """N samples are above it by a bias of O(1/N); the line's end is within its stated error."""
    d, n = 32, 256
    mu1, sigma1, root = gaussian(7, d)
    mu2, sigma2, _ = gaussian(8, d)
    truth = gaussian_frechet_distance(mu1, sigma1, mu2, sigma2)
    raw, found = [], []
    for seed in range(60):
        x = draw(seed, n, mu1, root)
        raw.append(
            frechet_distance(batch_moments(x), FeatureMoments(10**9, mu2, sigma2 * (10**9 - 1)))
        )
        found.append(frechet_infinite(x, gaussian_root(mu2, sigma2), seed))
    values, errors = np.array([f.value for f in found]), np.array([f.standard_error for f in found])
    error = np.std(values) / 60**0.5
    assert np.mean(raw) - truth > 8 * error
    assert abs(values.mean() - truth) < 4 * error
    assert np.mean(np.abs(values - truth) < 1.96 * errors) >= 0.85
    # And the error is not vast: the values' own spread.
    assert np.median(errors) < 1.5 * np.std(values)
    np.testing.assert_allclose([f.distances[0] for f in found], raw, rtol=1e-9)
    np.testing.assert_allclose(found[0].sizes, [256, 128, 256 / 3, 64])
    assert np.all(np.diff(found[0].distances) > 0)
    line = found[0].value + found[0].slope / found[0].sizes
    np.testing.assert_allclose(line, found[0].distances, rtol=0.02)


def test_each_level_is_the_mean_distance_of_its_blocks():
    """201 samples make blocks of unequal sizes, which share their pieces."""
    rng = np.random.default_rng(0)
    x, (mu2, sigma2, _) = rng.normal(size=(201, 5)), gaussian(2, 5)
    found = frechet_infinite(x, gaussian_root(mu2, sigma2), 3)
    order = np.random.default_rng(3).permutation(201)
    for level, distance in zip((1, 2, 3, 4), found.distances, strict=True):
        moments = [batch_moments(x[block]) for block in np.array_split(order, level)]
        each = [gaussian_frechet_distance(m.mean, covariance(m), mu2, sigma2) for m in moments]
        assert distance == pytest.approx(np.mean(each), rel=1e-9)


def test_a_bias_that_is_no_line_in_1_over_n_is_in_the_error():
    """Blocks of hardly more than d samples: a line misses by far more than sampling explains."""
    d = 200
    zero, sigma = np.zeros(d), np.eye(d)
    x = np.random.default_rng(0).normal(size=(820, d))
    found = frechet_infinite(x, gaussian_root(zero, sigma), 0)
    sampling = frechet_influence(x, gaussian_root(zero, sigma))[1].std() / 820**0.5
    assert abs(found.value) > 4 * sampling
    assert abs(found.value) < 2 * found.standard_error


def test_blocks_are_shuffled():
    """Samples sorted by class must give blocks of all classes: else each is a set of its own."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3)) + np.repeat(10 * np.eye(3)[[0, 1, 2, 0]], 100, axis=0)
    m = batch_moments(x)
    found = frechet_infinite(x, gaussian_root(m.mean, covariance(m)), 0)
    assert found.distances.max() < 2.0
    assert found.value == frechet_infinite(x, gaussian_root(m.mean, covariance(m)), 0).value
    assert found.value != frechet_infinite(x, gaussian_root(m.mean, covariance(m)), 1).value


X = np.random.default_rng(0).normal(size=(40, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval(1.0, [1.0], 0), "one finite number"),
        (lambda: bootstrap_interval(1.0, [1.0, np.nan], 0), "one finite number"),
        (lambda: bootstrap_interval(1.0, [1.0, 2.0], 0, level=1.0), "level between"),
        (lambda: bootstrap_interval(1.0, [1.0, 2.0], 0, resamples=0), "at least 1 resample"),
        (
            lambda: frechet_influence(X, gaussian_root(np.zeros(3), np.eye(3))),
            "3 and 4 dimensions|4 and 3",
        ),
        (
            lambda: frechet_influence(X[:1], gaussian_root(np.zeros(4), np.eye(4))),
            "1 samples have no",
        ),
        (lambda: frechet_influence(X, gaussian_root(np.zeros(4), -np.eye(4))), "eigenvalue"),
        (
            lambda: frechet_infinite(X[:16], gaussian_root(np.zeros(4), np.eye(4)), 0),
            "more than 16 samples",
        ),
        (
            lambda: frechet_infinite(X, gaussian_root(np.zeros(4), np.eye(4)), 0, (1, 2)),
            "three or more",
        ),
        (
            lambda: frechet_infinite(X, gaussian_root(np.zeros(4), np.eye(4)), 0, (0, 1, 2)),
            "block counts",
        ),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_the_error_of_a_mean_over_places_is_that_of_new_noise_at_them():
    """The trend over the places, however large, is none of it."""
    n, trials, rng = 400, 400, np.random.default_rng(0)
    place = rng.permutation(n)
    values = 50 * np.exp(-place / 40) + rng.normal(size=(trials, n))
    errors = np.array([systematic_error(each, place) for each in values])
    np.testing.assert_allclose(errors.mean(), values.mean(1).std(), rtol=0.1)
    assert errors.std() < 0.1 * errors.mean()
    assert values[0].std() / np.sqrt(n) > 5 * errors.mean()
    with pytest.raises(UserError, match=r"shape \(1,\).*one place for each of 2 values"):
        systematic_error([1.0], [0])
