"""The difference of two arms of a study, paired by what they share: a seed, or a record."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ditjax.scaling.fit import Interval
from ditjax.scaling.points import check_level, finite_points
from ditjax.scaling.spread import student_quantile

MANY = 30  # pairs from which the interval is a bootstrap's


@dataclass(frozen=True)
class PairedDifference:
    """The mean of y₁ - y₂ over `pairs`, and its interval; None of a single pair."""

    mean: float
    interval: Interval | None
    pairs: int

    @property
    def settled(self) -> bool:
        """Whether there is an interval, and it leaves out 0."""
        return self.interval is not None and not self.interval.low <= 0 <= self.interval.high


def paired_difference(
    first: ArrayLike, second: ArrayLike, *, level: float = 0.95, resamples: int = 1999
) -> PairedDifference:
    """Compare y₁, y₂ f64[n] of the same n seeds or records.

    What a pair shares, such as a hard seed, cancels. The interval of the mean difference is that of
    Student's t with n - 1 degrees of freedom, which needs no equal noise of the arms; from MANY
    pairs on, it is the percentiles of a bootstrap over pairs (Efron 1979), which needs no normal
    differences. Raises UserError for no pair, or a number that is not finite.
    """
    check_level(level)
    one, two = finite_points(first, second, at_least=1)
    apart, n = one - two, len(one)
    mean = float(apart.mean())
    if n < 2:
        return PairedDifference(mean, None, n)
    if n < MANY:
        half = student_quantile(level, n - 1) * float(apart.std(ddof=1)) / np.sqrt(n)
        low, high = mean - half, mean + half
    else:
        picks = np.random.default_rng(0).integers(n, size=(resamples, n))
        tail = (1 - level) / 2
        low, high = np.quantile(apart[picks].mean(1), [tail, 1 - tail])
    return PairedDifference(mean, Interval(float(low), float(high), level), n)
