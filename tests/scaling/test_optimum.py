"""The minimum of a sampled curve against the curve's own."""

import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.scaling.fit import Interval
from ditjax.scaling.optimum import Minimum, drift, fit_minimum, fit_optimum_law, lowest

RATES = 1e-3 * 2.0 ** np.arange(7)


@pytest.mark.parametrize("best", [2.5e-3, 1.1e-2, 3e-2])
def test_of_a_parabola_in_logarithms_it_is_exact(best):
    y = 0.3 * np.exp(0.2 * np.log(RATES / best) ** 2)
    found = lowest(RATES, y)
    assert found is not None
    assert not found.edge
    assert (found.x, found.y) == pytest.approx((best, 0.3), rel=1e-9)


def test_a_minimum_at_an_edge_is_said_to_be_there():
    for y, x in ((RATES, RATES[0]), (1 / RATES, RATES[-1])):
        found = lowest(RATES, y)
        assert found is not None
        assert found.edge
        assert found.x == x


def test_what_diverged_is_high_and_gives_no_slope():
    y = np.array([3.0, 2.0, 1.0, np.nan, np.inf, np.nan, np.nan])
    found = lowest(RATES, y)
    assert found is not None
    assert (found.x, found.edge) == (RATES[2], False)
    assert lowest(RATES, np.full(7, np.nan)) is None


def test_three_equal_points_have_the_middle():
    found = lowest(RATES[:5], np.array([2.0, 1.0, 1.0, 1.0, 2.0]))
    assert found is not None
    assert RATES[0] < found.x < RATES[2]


def test_drift_is_the_planted_exponent():
    widths = np.array([32.0, 32, 96, 96, 256, 256])
    assert drift(widths, 0.3 / widths) == pytest.approx(-1.0)
    assert drift(widths, np.full(6, 0.01)) == pytest.approx(0.0, abs=1e-12)
    assert np.isnan(drift(widths[:2], widths[:2]))


def planted(trial, skew=0.0, sigma=0.03, seeds=2):
    """Rates of seven values with two seeds each, a metric with noise, and the best rate."""
    rng = np.random.default_rng(trial)
    x, best = np.repeat(RATES, seeds), RATES[0] * 2 ** rng.uniform(1.2, 4.8)
    u = np.log(x / best)
    return x, 0.3 * np.exp(0.1 * u**2 + skew * u**3 + sigma * rng.normal(size=x.size)), best


def test_the_interval_of_a_minimum_holds_the_planted_one():
    """In 90 of 100 at least, half of them of a curve that is no parabola; most have two ends."""
    held, ended = [], []
    for trial in range(100):
        x, y, best = planted(trial, skew=0.02 * (trial % 2))
        found = fit_minimum(x, y, np.random.default_rng(trial), resamples=99)
        held.append(found.interval.low <= best <= found.interval.high)
        assert found.interval.low <= found.x <= found.interval.high
        ended.append(found.interval.low > 0 and found.interval.high < np.inf)
    assert sum(held) >= 90
    assert sum(ended[::2]) >= 30


def test_without_noise_it_is_the_vertex():
    x, y, best = planted(0, sigma=0.0)
    found = fit_minimum(x, y, np.random.default_rng(0))
    assert (found.x, found.y) == pytest.approx((best, 0.3), rel=1e-9)
    assert found.interval.low == pytest.approx(best, rel=0.05)
    assert found.interval.high == pytest.approx(best, rel=0.05)
    assert (found.n, found.values) in {(10, 5), (12, 6), (14, 7)}


@pytest.mark.parametrize(
    ("y", "why"),
    [
        (1 / RATES, "lowest at the largest value tried .0.064.: the best may lie above it"),
        (RATES, "lowest at the smallest value tried .0.001.: the best may lie below it"),
        (np.array([3, 1, 0.9, 9, 1, 0.8, 0.81]), "no minimum between the values"),
    ],
)
def test_where_no_minimum_is_shown_it_is_said(y, why):
    with pytest.raises(UserError, match=why):
        fit_minimum(RATES, y, np.random.default_rng(0))
    with pytest.raises(UserError, match="4 values were tried: a minimum needs 5"):
        fit_minimum(np.repeat(RATES[:4], 2), np.repeat(y[:4], 2), np.random.default_rng(0))


def test_minima_that_fall_with_size_have_their_exponent():
    sizes, rng = np.array([1.0, 4, 16, 64, 256]), np.random.default_rng(0)
    best = 1e-2 * sizes**-0.3 * np.exp(0.05 * rng.normal(size=5))
    minima = [Minimum(x, 1.0, Interval(0, np.inf, 0.95), 14, 7) for x in best]
    law = fit_optimum_law(sizes, minima, rng)
    assert law.exponent == pytest.approx(-0.3, abs=0.05)
    assert law.interval.low < -0.3 < law.interval.high < 0
    assert (law.n, law.k) == (5, pytest.approx(1e-2, rel=0.2))
    with pytest.raises(UserError, match="3"):
        fit_optimum_law(sizes[:2], minima[:2], rng)
