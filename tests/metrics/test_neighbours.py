"""Precision, recall, density, coverage, authenticity: brute force, on device and on host."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.metrics import neighbours
from ditjax.metrics.neighbours import (
    authenticity,
    compare_neighbourhoods,
    count_balls,
    density_coverage,
    manifold_radii2,
    nearest_centres,
    precision_recall,
)
from tests import feature_sets

GOLDENS = Path(__file__).parent.parent / "goldens" / "scores.npz"


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as file:
        return dict(file)


@pytest.fixture(params=["device", "host"])
def on_device(request, monkeypatch):
    """Small sets are compared on the host, unless the bound is lowered."""
    if request.param == "device":
        monkeypatch.setattr(neighbours, "ON_HOST", 50)


def brute_precision(reference, samples, k):
    def distance(a, b):
        return np.sqrt(((a - b) ** 2).sum())

    radii = [sorted(distance(a, b) for b in reference)[k] for a in reference]
    inside = [
        any(distance(s, r) <= radius for r, radius in zip(reference, radii, strict=True))
        for s in samples
    ]
    return np.mean(inside), inside


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [16, 64])
def test_precision_and_recall_are_their_definition(k, block, on_device):
    rng = np.random.default_rng(k)
    reference, samples = rng.normal(size=(61, 6)), 0.8 + 1.2 * rng.normal(size=(53, 6))
    result = precision_recall(reference, samples, k, block)
    precision, inside = brute_precision(reference, samples, k)
    assert result.precision == precision
    np.testing.assert_array_equal(result.in_reference, inside)
    assert result.recall == brute_precision(samples, reference, k)[0]
    assert 0 < result.precision < result.recall < 1


def test_precision_and_recall_of_a_set_and_itself_and_of_what_is_far():
    x = feature_sets.features(200, 0)
    assert precision_recall(x, x)[:2] == (1.0, 1.0)
    assert precision_recall(x, x[::-1].copy(), block=37)[:2] == (1.0, 1.0)
    assert precision_recall(x, x + 1e4)[:2] == (0.0, 0.0)


def test_a_lost_mode_costs_recall_and_an_invented_one_precision():
    rng = np.random.default_rng(0)
    near, far = rng.normal(size=(100, 4)), rng.normal(size=(100, 4)) + 100
    dropped = precision_recall(np.concatenate([near, far]), near + 1e-9)
    assert dropped[:2] == (1.0, 0.5)
    invented = precision_recall(near, np.concatenate([near + 1e-9, far]))
    assert invented[:2] == (0.5, 1.0)


def test_copies_of_one_image_are_at_no_distance():
    """A radius of 0, far from the origin, where |x|^2 - 2 x.y + |y|^2 rounds to more than 0."""
    rng = np.random.default_rng(0)
    for dimensions in (64, 301, 1000):
        copies = np.tile(rng.uniform(size=(1, dimensions)) + 100, (9, 1))
        np.testing.assert_array_equal(manifold_radii2(copies, 3, block=4), np.zeros(9))
        assert precision_recall(copies, copies[:5], block=4)[:2] == (1.0, 1.0)
    apart = copies + 1e-4 * rng.normal(size=copies.shape)
    assert precision_recall(copies, apart)[0] == 0.0


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_of_torch_fidelity(goldens, k):
    reference = feature_sets.features(feature_sets.REFERENCE, 0)
    samples = feature_sets.features(feature_sets.SAMPLES, 1)
    result = precision_recall(reference, samples, k, block=100)
    np.testing.assert_allclose(result[:2], goldens[f"prc_{k}"], rtol=0, atol=1e-6)


def all_distances2(x, y):
    return ((x[:, None, :].astype(np.float64) - y[None, :, :]) ** 2).sum(-1)


@pytest.mark.parametrize("far", [0.0, 1e3])
def test_density_coverage_and_authenticity_are_their_definitions(on_device, far):
    """Far from the origin too, where float32 decides nothing, with copies and ties."""
    rng = np.random.default_rng(2)
    reference, samples = rng.normal(size=(90, 5)) + far, 0.7 * rng.normal(size=(70, 5)) + 0.3 + far
    samples[:10] = reference[:10]  # each at the edge of other balls, and a copy
    reference[-6:] = reference[-1]
    between, among = all_distances2(samples, reference), all_distances2(reference, reference)
    radii2 = np.sort(among, axis=1)[:, 5]
    inside = between <= radii2[None, :]
    found = density_coverage(reference, samples, 5, block=32)
    np.testing.assert_array_equal(found.balls * 5, inside.sum(1))
    np.testing.assert_array_equal(found.covered, inside.any(0))
    assert found.density == pytest.approx(inside.sum() / (5 * 70), rel=1e-12)
    assert found.coverage == inside.any(0).mean()
    nearby = between.argmin(1)
    apart = np.sort(among, axis=1)[:, 1]
    expected = between[np.arange(70), nearby] > apart[nearby]
    np.testing.assert_array_equal(authenticity(reference, samples, block=32), expected)
    assert not expected[:10].any()
    assert 0.2 < expected[10:].mean() < 1


def test_all_in_one_pass_is_what_each_is_by_itself(on_device, monkeypatch):
    """And a block of distances is computed once: of 3 x 3 and 2 x 2 blocks, and 3 x 2 between."""
    rng = np.random.default_rng(4)
    reference, samples = rng.normal(size=(50, 6)), 0.3 + 1.1 * rng.normal(size=(70, 6))
    each = precision_recall(reference, samples, 3), density_coverage(reference, samples, 5)
    authentic = authenticity(reference, samples)
    blocks, distances2 = [], neighbours._distances2

    def counted(*block):
        blocks.append(1)
        return distances2(*block)

    monkeypatch.setattr(neighbours, "_distances2", counted)
    found = compare_neighbourhoods(reference, samples, 3, 5, block=32)
    for one, other in zip(each, found[:2], strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(found.authentic, authentic)
    assert 0 < found.precision_recall.recall < 1
    assert len(blocks) in (0, 6 + 3 + 3 * 2)  # of small sets none, on the host


def test_what_float32_cannot_decide_is_decided_exactly(monkeypatch):
    """Radii a billionth off the distance of a point, on either side of it."""
    monkeypatch.setattr(neighbours, "ON_HOST", 50)
    rng = np.random.default_rng(0)
    points, centres = rng.normal(size=(80, 16)), rng.normal(size=(60, 16))
    distances2 = all_distances2(points, centres)
    for factor, held in ((1 + 1e-9, True), (1 - 1e-9, False)):
        radii2 = distances2.min(0) * factor
        counts, holds = count_balls(points, centres, radii2, block=64)
        assert holds.all() == held
        np.testing.assert_array_equal(counts, (distances2 <= radii2[None, :]).sum(1))
        assert (counts.sum() == 60) == held
    balls = neighbours._Balls(points, centres, distances2.min(0))
    neighbours._ask(points, centres, (balls,), 64)
    counts, _, _, open_balls = balls.sure()
    assert counts.sum() == 0
    assert open_balls.all(), "every ball is undecided"


def test_nearest_are_sorted_and_exact_where_candidates_are_within_rounding(on_device):
    """A cluster so far off and so tight that float32 takes any of it for the nearest."""
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(size=(40, 3)), 500 + 1e-4 * rng.normal(size=(40, 3))])
    distances2, index = nearest_centres(x, x, 4, block=32)
    expected = np.sort(all_distances2(x, x), axis=1)[:, :4]
    np.testing.assert_allclose(distances2, expected, rtol=1e-12)
    np.testing.assert_array_equal(index[:, 0], np.arange(80))


def test_equal_distributions_have_density_one_and_the_expected_coverage():
    rng = np.random.default_rng(0)
    found = density_coverage(rng.normal(size=(1200, 4)), rng.normal(size=(1200, 4)), 5)
    assert found.density == pytest.approx(1, abs=0.06)
    assert found.coverage == pytest.approx(1 - 2**-5, abs=0.02)


X = np.ones((4, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: precision_recall(X, X[:3]), "k=3 of 3 features in the sample set"),
        (lambda: precision_recall(X[:2], X), "k=3 of 2 features in the reference"),
        (lambda: precision_recall(X, X, 0), "k of at least 1"),
        (lambda: precision_recall(X, X, block=0), "block 0"),
        (lambda: precision_recall(X, np.full((5, 3), np.inf)), "5 of 5 rows"),
        (lambda: density_coverage(X, X), "density and coverage with k=5 of 4 features"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_the_nearest_of_many_columns_are_found_through_their_groups():
    """As by sorting all of them; equal distances, infinite ones and what was found before, too."""
    rng = np.random.default_rng(9)
    distances2 = rng.integers(1, 60, (16, 2048)).astype(np.float32)
    distances2[3, 5:] = np.inf
    distances2[4] = rng.permutation(2048)
    best = -np.sort(rng.uniform(0, 30, (16, 8)).astype(np.float32), axis=1)
    index = np.full((16, 8), -1, np.int32)
    values, found = map(
        np.asarray, neighbours._merge(*map(jnp.asarray, (best, index, distances2)), jnp.int32(100))
    )
    both = np.concatenate([-best, distances2], axis=1)
    np.testing.assert_array_equal(-values, np.sort(both, axis=1)[:, :8])
    new = found >= 0
    rows = np.nonzero(new)[0]
    np.testing.assert_array_equal(distances2[rows, found[new] - 100], -values[new])
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in found)
