"""How much trainings of one recipe differ by their seeds alone."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import scipy  # loads its parts as they are used: scipy.stats alone takes a second

from ditjax.errors import UserError


class Spread(NamedTuple):
    """Standard deviation of ln(metric) between seeds, and the degrees of freedom behind it."""

    deviation: float
    freedom: int


def spread(repeats: Iterable[Sequence[float]]) -> Spread:
    """Pooled over recipes: s² = Σ_i Σ_j (ln y_ij - mean_i)² / Σ_i (n_i - 1).

    repeats: the values > 0 of each recipe. Raises UserError if no recipe has two.
    """
    squares, freedom = 0.0, 0
    for values in repeats:
        y = np.asarray(values, np.float64)
        if not (np.isfinite(y) & (y > 0)).all():
            raise UserError(f"values {list(values)}: expected numbers above 0.")
        logs = np.log(y)
        squares += float(np.square(logs - logs.mean()).sum())
        freedom += len(logs) - 1
    if freedom < 1:
        raise UserError("the spread between seeds needs two values of one recipe.")
    return Spread(math.sqrt(squares / freedom), freedom)


def student_quantile(level: float, freedom: float) -> float:
    """The t of which a share `level` of Student's distribution lies within -t and t."""
    return float(scipy.special.stdtrit(freedom, (1 + level) / 2))


def noise_band(value: float, s: Spread, runs: int, level: float = 0.95) -> tuple[float, float]:
    """The range (low, high) of the mean of `runs` trainings if a further training gave `value`.

    ln band = ln value -/+ t_{level, f} s √(1 + 1/runs): the prediction interval of Student's t.
    """
    t = student_quantile(level, s.freedom)
    width = min(t * s.deviation * math.sqrt(1 + 1 / runs), 300.0)
    return value * math.exp(-width), value * math.exp(width)


def share_band(held: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper & Pearson 1934: the exact interval of a share that was `held` in `trials`."""
    tail = (1 - level) / 2
    low = scipy.special.betaincinv(held, trials - held + 1, tail) if held else 0.0
    high = scipy.special.betaincinv(held + 1, trials - held, 1 - tail) if held < trials else 1.0
    return float(low), float(high)
