"""Two arms are compared by exponents, whose interval holds the planted difference."""

import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.scaling.slopes import Arm, compare_slopes
from tests.scaling.planted import study


def test_exact_laws_differ_exactly():
    x = np.geomspace(1e-3, 1, 6)
    found = compare_slopes(
        Arm(x, 2 * x**-0.6), Arm(x * 2, 3 * (x * 2) ** -0.4), np.random.default_rng(0)
    )
    assert found.b == pytest.approx((0.6, 0.4))
    assert found.difference == pytest.approx(0.2)
    assert (found.interval.low, found.interval.high) == pytest.approx((0.2, 0.2))
    assert found.at == pytest.approx(np.sqrt(2e-3))
    assert found.ratio == pytest.approx(2 / 3 * found.at**-0.2)
    assert found.settled


@pytest.mark.parametrize(
    ("models", "seeds", "noise", "other"),
    [(6, 1, "even", "even"), (4, 3, "even", "even"), (9, 2, "small end", "large end")],
)
def test_the_intervals_hold_the_truth_of_two_planted_arms(models, seeds, noise, other):
    """In at least 90 of 100 trials; the arms have other noise, too."""
    rng, trials = np.random.default_rng(7), 100
    held = level = 0
    for _ in range(trials):
        one = study(rng, models=models, seeds=seeds, noise=noise, b=0.6, a=0.05)
        two = study(rng, models=models, seeds=seeds, noise=other, b=0.4, a=0.1, sigma=0.2)
        found = compare_slopes(
            Arm(one.x, one.y, one.model), Arm(two.x, two.y, two.model), rng, resamples=200
        )
        held += found.interval.low <= 0.2 <= found.interval.high
        truth = 0.5 * found.at**-0.2
        level += found.ratio_interval.low <= truth <= found.ratio_interval.high
    assert held >= 0.9 * trials
    assert level >= 0.9 * trials


def test_equal_arms_are_seldom_told_apart_and_different_ones_are():
    rng = np.random.default_rng(8)
    alike = apart = 0
    for _ in range(50):
        one, two = (study(rng, models=8, b=0.5) for _ in range(2))
        steep = study(rng, models=8, b=0.8)
        alike += compare_slopes(Arm(*one[:2]), Arm(*two[:2]), rng, resamples=200).settled
        apart += compare_slopes(Arm(*one[:2]), Arm(*steep[:2]), rng, resamples=200).settled
    assert alike <= 5
    assert apart >= 40


def test_an_arm_of_two_models_is_refused():
    x = np.geomspace(1e-3, 1, 4)
    with pytest.raises(UserError, match="2 groups"):
        compare_slopes(Arm(x, 1 / x), Arm(x, 1 / x, [0, 0, 1, 1]), np.random.default_rng(0))
