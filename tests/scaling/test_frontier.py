"""Dominated points are left out; curves cross where they do."""

import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.scaling.frontier import crossing, frontier, interpolate


def test_frontier_by_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 12, (2, 60)).astype(float)
    kept = frontier(x, y)
    for i in range(60):
        dominated = np.any((x <= x[i]) & (y <= y[i]) & ((x < x[i]) | (y < y[i])))
        equal = np.flatnonzero((x == x[i]) & (y == y[i]))
        assert (i in kept) == (not dominated and equal[0] == i)
    assert np.all(np.diff(x[kept]) > 0)
    assert np.all(np.diff(y[kept]) < 0)


def test_frontier_of_nothing_is_nothing():
    assert frontier([], []).tolist() == []
    with pytest.raises(UserError, match="is nan"):
        frontier([1.0, 2.0], [np.nan, 1.0])


def test_power_laws_cross_where_they_are_equal():
    """3·x^(-0.2) = 10·x^(-0.5) at x = (10/3)^(1/0.3); straight lines in log-log."""
    at = (10 / 3) ** (1 / 0.3)
    x1, x2 = np.geomspace(1, 1e4, 7), np.geomspace(2, 1e5, 11)
    found = crossing(x1, 3 * x1**-0.2, x2, 10 * x2**-0.5)
    assert found == pytest.approx(at, rel=1e-9)
    assert crossing(x2, 10 * x2**-0.5, x1, 3 * x1**-0.2) is None  # 1 does not end below 2
    mixed = np.random.default_rng(0).permutation(7)
    assert crossing(x1[mixed], 3 * x1[mixed] ** -0.2, x2, 10 * x2**-0.5) == found


def test_the_last_crossing_counts():
    x = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert crossing(x, [1.0] * 5, x, [2.0, 0.5, 2.0, 0.5, 0.25]) == pytest.approx(4 * 2**0.5)
    assert crossing(x, [1.0] * 5, x, [2.0, 0.5, 2.0, 0.5, 1.0]) is None


def test_no_crossing_beyond_what_both_cover():
    x = np.geomspace(1, 100, 5)
    assert crossing(x, 1 / x, x, 0.5 / x) is None  # below throughout
    assert crossing(x, 1 / x, 1000 * x, 1e-9 / x) is None
    assert crossing([1.0], [1.0], x, 0.5 / x) is None
    assert crossing([], [], x, x) is None
    low, high = x[x < 20], x[x > 5]  # it is at 10, where both have been
    assert crossing(low, np.full(len(low), 0.1), high, 1 / high) is None
    assert crossing(x, np.full(5, 0.1), x, 1 / x) == pytest.approx(10.0)


def test_interpolation_is_straight_in_log_log_and_ends_with_the_points():
    x = np.array([1.0, 10.0, 100.0])
    assert interpolate(x, 5 * x**-0.3, 30.0) == pytest.approx(5 * 30.0**-0.3)
    assert interpolate(x[::-1], 5 * x[::-1] ** -0.3, 30.0) == pytest.approx(5 * 30.0**-0.3)
    assert interpolate(x, x, 100.0 * (1 + 1e-12)) == pytest.approx(100.0)
    assert interpolate(x, x, 100.1) is None
    assert interpolate(x, x, 0.99) is None
    with pytest.raises(UserError, match="x = 2 is there twice"):
        interpolate([1.0, 2.0, 2.0], [1.0, 1.0, 1.0], 1.5)
    with pytest.raises(UserError, match=r"y\[1\] is 0"):
        interpolate([1.0, 2.0], [1.0, 0.0], 1.5)
