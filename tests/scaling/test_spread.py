"""Seed noise: the pooled spread, and a band that holds what it should."""

import math

import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.scaling.published import REPEATS
from ditjax.scaling.spread import Spread, noise_band, spread


def test_one_recipe_is_the_sample_deviation_of_the_logs():
    values = [3.0, 4.0, 6.0]
    found = spread([values])
    assert found.deviation == pytest.approx(np.std(np.log(values), ddof=1))
    assert found.freedom == 2


def test_recipes_are_pooled_by_their_degrees_of_freedom():
    # Two of a factor e² apart: s² = 2; three equal ones: s² = 0.
    found = spread([[1.0, math.e**2], [5.0, 5.0, 5.0]])
    assert found == pytest.approx((math.sqrt(2 / 3), 3))
    assert spread(REPEATS.values()).freedom == 3


# Student's t of two degrees of freedom: .975 quantile 4.302653.
def test_the_band_is_students():
    low, high = noise_band(10.0, Spread(0.1, 2), 1)
    width = 4.302653 * 0.1 * math.sqrt(2)
    assert (low, high) == pytest.approx((10 * math.exp(-width), 10 * math.exp(width)))
    low_of_many, _ = noise_band(10.0, Spread(0.1, 2), 1000)
    assert low < low_of_many < 10


def test_another_training_falls_into_the_band_95_times_of_100():
    rng = np.random.default_rng(0)
    logs = rng.normal(3.0, 0.2, (4000, 4))  # three seeds of ours, one of theirs
    inside = 0
    for *ours, theirs in np.exp(logs):
        low, high = noise_band(theirs, spread([ours]), len(ours))
        inside += low <= math.exp(np.log(ours).mean()) <= high
    # A binomial's deviation is 0.35 %.
    assert inside / len(logs) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize("values", [[[1.0]], [], [[1.0, 0.0]], [[1.0, math.nan]]])
def test_no_spread(values):
    with pytest.raises(UserError):
        spread(values)


def test_a_wild_spread_overflows_nothing():
    low, high = noise_band(1.0, Spread(1e6, 1), 1)
    assert 0 < low < high < math.inf
