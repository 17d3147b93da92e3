"""The Fréchet distance: closed forms first, then scipy, then the streaming sums that feed it."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg

from ditjax.errors import UserError
from ditjax.metrics.frechet import (
    FeatureMoments,
    batch_moments,
    covariance,
    frechet_distance,
    gaussian_frechet_distance,
    gaussian_root,
    merge,
    no_moments,
    update,
)
from tests import feature_sets

GOLDENS = Path(__file__).parent.parent / "goldens" / "scores.npz"


def random_covariance(rng, d):
    factor = rng.normal(size=(d, d))
    return factor @ factor.T / d + 0.1 * np.eye(d)


def orthogonal(rng, d):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def test_equal_covariances_leave_the_squared_distance_of_the_means():
    rng = np.random.default_rng(0)
    sigma, mu, shift = random_covariance(rng, 6), rng.normal(size=6), rng.normal(size=6)
    distance = gaussian_frechet_distance(mu, sigma, mu + shift, sigma)
    np.testing.assert_allclose(distance, shift @ shift, rtol=1e-12)


def test_commuting_covariances_give_the_squared_distance_of_the_deviations():
    """S1 = Q diag(s^2) Q^T, S2 = Q diag(t^2) Q^T: sum (s - t)^2, over 16 orders of variance."""
    rng = np.random.default_rng(1)
    s, t = np.logspace(0, -8, 40), np.logspace(-8, 0, 40)
    q, zero = orthogonal(rng, 40), np.zeros(40)
    sigma1, sigma2 = (q * s**2) @ q.T, (q * t**2) @ q.T
    distance = gaussian_frechet_distance(zero, sigma1, zero, sigma2)
    # The matrices hold variances to 1e-16 of the largest, so deviations to 1e-8 at worst.
    np.testing.assert_allclose(distance, np.sum((s - t) ** 2), atol=1e-6)


def test_one_dimension_is_the_textbook_formula():
    assert gaussian_frechet_distance([1.0], [[4.0]], [3.0], [[0.25]]) == pytest.approx(4 + 1.5**2)


def test_a_distribution_is_at_zero_from_itself():
    rng = np.random.default_rng(2)
    a = batch_moments(rng.normal(size=(50, 64)) * 100.0)
    assert 0.0 <= frechet_distance(a, a) < 1e-9 * np.trace(covariance(a))


def test_well_conditioned_covariances_agree_with_scipy_sqrtm():
    rng = np.random.default_rng(3)
    sigma1, sigma2 = random_covariance(rng, 20), random_covariance(rng, 20)
    mu1, mu2 = rng.normal(size=20), rng.normal(size=20)
    root = np.real(scipy.linalg.sqrtm(sigma1 @ sigma2))
    expected = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * root)
    distance = gaussian_frechet_distance(mu1, sigma1, mu2, sigma2)
    np.testing.assert_allclose(distance, expected, rtol=1e-10)
    np.testing.assert_allclose(
        gaussian_frechet_distance(mu2, sigma2, mu1, sigma1), distance, rtol=1e-12
    )


def test_rank_one_covariances_have_their_exact_distance():
    """S1 = u u^T, S2 = v v^T: |u|^2 + |v|^2 - 2 |u . v|, which roots of rounding would miss."""
    rng = np.random.default_rng(4)
    u, v = rng.normal(size=500), rng.normal(size=500)
    zero = np.zeros(500)
    distance = gaussian_frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v))
    np.testing.assert_allclose(distance, u @ u + v @ v - 2 * abs(u @ v), rtol=1e-12)


def test_fewer_samples_than_dimensions_equal_the_distance_in_the_subspace_they_span():
    """10 samples of 200 dimensions span 5 of them; the other 195 carry nothing."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(10, 5)), 0.5 + 2.0 * rng.normal(size=(12, 5))
    embed = orthogonal(rng, 200)[:, :5]
    inside = frechet_distance(batch_moments(x), batch_moments(y))
    outside = frechet_distance(batch_moments(x @ embed.T), batch_moments(y @ embed.T))
    np.testing.assert_allclose(outside, inside, rtol=1e-10)
    still = batch_moments(np.ones((4, 3)))
    assert frechet_distance(still, batch_moments(np.full((4, 3), 3.0))) == pytest.approx(12.0)


@pytest.mark.parametrize("name", feature_sets.GAUSSIANS)
def test_statistics_give_the_distance_of_pytorch_fid_and_adm(name):
    """To 1e-6, singular covariances too, where sqrtm is the one that is 5e-8 off."""
    mu1, sigma1, mu2, sigma2, exact = feature_sets.gaussians(name)
    distance = gaussian_frechet_distance(mu1, sigma1, mu2, sigma2)
    np.testing.assert_allclose(distance, exact, rtol=1e-12)
    with np.load(GOLDENS) as goldens:
        np.testing.assert_allclose(distance, goldens[f"fid_{name}"], rtol=1e-6)


def test_a_root_has_the_columns_of_the_rank_alone():
    mu, _, _, sigma, _ = feature_sets.gaussians("both_singular")
    mean, root, trace = gaussian_root(mu, sigma)
    assert root.shape == (64, 29)
    np.testing.assert_allclose(root @ root.T, sigma, atol=1e-12 * np.abs(sigma).max())
    np.testing.assert_array_equal(mean, mu)
    assert trace == pytest.approx(np.trace(sigma))


def test_moments_of_samples_estimate_the_distance_of_their_distributions():
    """N(0, I) and N(1, 4I) in 3 dimensions: 3 + 3(2 - 1)^2 = 6, with a bias of O(1/n) far below."""
    rng = np.random.default_rng(6)
    a = batch_moments(rng.normal(size=(100_000, 3)))
    b = batch_moments(1.0 + 2.0 * rng.normal(size=(100_000, 3)))
    # Each term's standard error is below 2 * 2 / sqrt(n): 0.1 is beyond 6 of their sum.
    assert frechet_distance(a, b) == pytest.approx(6.0, abs=0.1)


def test_streaming_equals_one_pass_for_any_batches():
    rng = np.random.default_rng(7)
    x = (1e4 + rng.normal(size=(103, 7))).astype(np.float32)
    moments = no_moments(7)
    for batch in np.split(x, [1, 2, 2, 40, 90]):
        moments = update(moments, batch)
    assert moments.count == 103
    x64 = x.astype(np.float64)
    np.testing.assert_allclose(moments.mean, x64.mean(axis=0), rtol=1e-14)
    # A sum of squares without centring would keep 8 digits fewer at this offset.
    np.testing.assert_allclose(covariance(moments), np.cov(x64, rowvar=False), rtol=1e-9, atol=1e-9)


def test_merging_is_associative_and_commutative():
    rng = np.random.default_rng(8)
    a, b, c = (batch_moments(rng.normal(size=(n, 4)) * n) for n in (1, 5, 30))
    left, right, swapped = merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(b, a))
    for other in (right, swapped):
        assert other.count == left.count == 36
        np.testing.assert_allclose(other.mean, left.mean, rtol=1e-12)
        np.testing.assert_allclose(other.m2, left.m2, rtol=1e-12, atol=1e-9)
    empty = merge(no_moments(4), no_moments(4))
    assert empty.count == 0
    np.testing.assert_array_equal(merge(empty, c).m2, c.m2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused_by_row(bad):
    features = np.zeros((5, 3), np.float32)
    features[3, 1] = bad
    with pytest.raises(UserError, match=r"1 of 5 feature rows are not finite.*row 3"):
        batch_moments(features)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (4, 0)])
def test_features_of_another_rank_are_refused(shape):
    with pytest.raises(UserError, match="samples, dimensions"):
        batch_moments(np.zeros(shape))


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_samples_are_refused(count):
    few, enough = batch_moments(np.zeros((count, 3))), batch_moments(np.zeros((2, 3)))
    with pytest.raises(UserError, match=f"{count} samples have no covariance"):
        frechet_distance(enough, few)


def test_features_of_different_networks_are_refused():
    a, b = batch_moments(np.eye(3)), batch_moments(np.eye(4))
    for operation in (merge, frechet_distance):
        with pytest.raises(UserError, match="3 and 4 dimensions"):
            operation(a, b)


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        ([[1.0, 0.5], [0.0, 1.0]], "not symmetric"),
        ([[1.0, 0.0], [0.0, -0.1]], "eigenvalue -0.1"),
        ([[1.0, np.nan], [np.nan, 1.0]], "not finite"),
        ([[1.0]], r"\[d, d\]"),
    ],
)
def test_what_is_not_a_covariance_is_refused(sigma, message):
    with pytest.raises(UserError, match=message):
        gaussian_frechet_distance([0.0, 0.0], np.eye(2), [0.0, 0.0], sigma)


def test_a_covariance_stored_in_float32_is_accepted():
    """Its rounding makes null eigenvalues slightly negative."""
    rng = np.random.default_rng(9)
    a = batch_moments(rng.normal(size=(20, 50)))
    stored = covariance(a).astype(np.float32)
    assert np.linalg.eigvalsh(stored.astype(np.float64))[0] < 0.0
    assert gaussian_frechet_distance(a.mean, stored, a.mean, covariance(a)) < 1e-2


def test_moments_count_is_the_number_of_rows():
    assert isinstance(batch_moments(np.eye(2)), FeatureMoments)
    assert update(batch_moments(np.eye(2)), np.ones((3, 2))).count == 5
