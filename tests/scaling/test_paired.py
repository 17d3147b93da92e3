"""The interval of a paired difference holds the planted one, and does without what pairs share."""

import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.scaling.paired import MANY, paired_difference


def test_a_difference_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, and t of two degrees of freedom is 4.303."""
    found = paired_difference([11.0, 4.0, 8.0], [10.0, 2.0, 5.0])
    assert found.mean == 2
    assert found.interval is not None
    half = 4.302653 / np.sqrt(3)
    assert (found.interval.low, found.interval.high) == pytest.approx((2 - half, 2 + half))
    assert not found.settled
    assert paired_difference([11.0, 4.1, 7.9], [10.0, 3.0, 7.0]).settled


def test_one_pair_has_a_difference_and_no_interval():
    found = paired_difference([3.0], [2.0])
    assert (found.mean, found.interval, found.pairs, found.settled) == (1, None, 1, False)
    with pytest.raises(UserError, match="0 points"):
        paired_difference([], [])
    with pytest.raises(UserError, match="finite"):
        paired_difference([1.0, np.nan], [1.0, 2.0])


@pytest.mark.parametrize("pairs", [2, 3, 5, MANY, 200])
@pytest.mark.parametrize("noise", ["normal", "skewed"])
def test_the_interval_holds_the_truth(pairs, noise):
    """In at least 90 of 100 trials, whatever a seed does to both arms; one is noisier, too."""
    rng, trials = np.random.default_rng([pairs, len(noise)]), 400
    held = wide = 0
    for _ in range(trials):
        shared = 10 * rng.standard_normal(pairs)
        own = (
            rng.standard_normal((2, pairs)) if noise == "normal" else rng.gamma(4, 0.5, (2, pairs))
        )
        first, second = 0.7 + shared + own[0], shared + 0.3 * own[1]
        truth = 0.7 if noise == "normal" else 0.7 + 2 - 0.3 * 2
        found = paired_difference(first, second, resamples=200)
        assert found.interval is not None
        held += found.interval.low <= truth <= found.interval.high
        wide += found.interval.high - found.interval.low > 10
    assert held >= 0.9 * trials
    if pairs >= 5:
        assert not wide  # the deviation of the seeds is 10
