"""The minimum of a sampled curve against the curve's own."""

import numpy as np
import pytest

from ditjax.scaling.optimum import drift, lowest

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
