"""The sliced distance: brute-force transports, closed forms, and its influence."""

import itertools

import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.metrics import sliced
from ditjax.metrics.sliced import monge_distance, random_directions, sliced_wasserstein2


def transport(a, b):
    """W2² of two small sets of numbers: the cheapest of all assignments of their copies."""
    n = np.lcm(len(a), len(b))
    a, b = np.repeat(a, n // len(a)), np.repeat(b, n // len(b))
    return min(np.mean((a - b[list(p)]) ** 2) for p in itertools.permutations(range(n)))


@pytest.mark.parametrize(("n", "m"), [(6, 6), (2, 3), (3, 6), (7, 1), (1, 1)])
def test_it_is_the_mean_of_cheapest_transports(n, m, monkeypatch):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, 3)), 2 * rng.normal(size=(m, 3)) + 1
    directions = random_directions(5, 3, 0)
    expected = np.mean([transport(x @ u, y @ u) for u in directions])
    found = sliced_wasserstein2(x, y, directions)
    assert found.value == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(sliced, "_AT_ONCE", 1)
    by_ones = sliced_wasserstein2(x, y, directions)
    assert by_ones.value == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(by_ones.influence, found.influence, atol=1e-12)


def test_closed_forms():
    """A shift by δ costs 3 |δ|² and a zoom by s of N(0, 1) in d dimensions 3 d (s - 1)²."""
    x = np.random.default_rng(0).normal(size=(500, 6)).astype(np.float32)
    assert monge_distance(x, x, 0).value == pytest.approx(0, abs=1e-12)
    shift = np.array([1.0, -2.0, 0, 0, 0, 2.0])
    # The mean of (u.δ)² over 2,000 directions is |δ|²/d within 4 %.
    assert monge_distance(x + shift, x, 0, 2000).value == pytest.approx(27, rel=0.1)
    second = (x.astype(np.float64) ** 2).sum(1).mean() / 6
    assert monge_distance(1.5 * x, x, 0).value == pytest.approx(18 * 0.25 * second, rel=0.05)
    assert monge_distance(x, x + 1, 0) != monge_distance(x, x + 1, 1)


@pytest.mark.parametrize(("n", "m"), [(8, 8), (8, 5)])
def test_influence_is_how_the_distance_changes_with_a_sample(n, m):
    """The mean of both one-sided slopes: with equal counts a transport has a kink."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 2)), rng.normal(size=(m, 2)) + 0.5
    directions = random_directions(4, 2, 0)

    def distance(w):  # of samples that weigh w
        total = 0.0
        for u in directions:
            order = np.argsort(x @ u)
            a, b, mass = (x @ u)[order], np.sort(y @ u), np.cumsum(w[order] / w.sum())
            steps = np.union1d(np.append(mass[:-1], [0, 1]), np.arange(m + 1) / m)
            middle = (steps[1:] + steps[:-1]) / 2
            at_x, at_y = np.searchsorted(mass[:-1], middle), (middle * m).astype(int)
            total += (np.diff(steps) * (a[at_x] - b[at_y]) ** 2).sum() / len(directions)
        return total

    found = sliced_wasserstein2(x, y, directions)
    assert found.value == pytest.approx(distance(np.ones(n)), rel=1e-9)
    for i in range(n):
        e, h = np.eye(n)[i] - 1 / n, 1e-5
        slope = n * (distance(1 + h * e) - distance(1 - h * e)) / (2 * h)
        assert found.influence[i] == pytest.approx(slope, rel=1e-5, abs=1e-5)
    assert found.influence.mean() == pytest.approx(0, abs=1e-12)


def test_its_spread_is_that_of_fresh_samples():
    rng = np.random.default_rng(0)
    y, directions = rng.normal(size=(150, 4)), random_directions(20, 4, 0)
    found = [
        sliced_wasserstein2(1.3 * rng.normal(size=(100, 4)) + 0.4, y, directions)
        for _ in range(200)
    ]
    errors = [each.influence.std() / 10 for each in found]
    assert np.mean(errors) == pytest.approx(np.std([each.value for each in found]), rel=0.2)


def test_mistakes():
    with pytest.raises(UserError, match="0 directions"):
        monge_distance(np.ones((3, 2)), np.ones((3, 2)), 0, 0)
    with pytest.raises(UserError, match="2 and 3 dimensions"):
        monge_distance(np.ones((3, 2)), np.ones((3, 3)), 0)
