"""Two arms of a study compared by their laws: slopes, not points.

Arms are what a study compares: two blocks, processes, networks or tokenizers, each at several
costs. One arm may be better at every cost that was tried and have the flatter law, so that it loses
at a larger one. Both laws y = a·x^(-b) are fitted at once, and the interval of b₁ - b₂ is that of
one fit (`scaling/fit.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ditjax.scaling.fit import Interval, Linearised, half_width, linearised_plain
from ditjax.scaling.points import Vector, check_level, group_index, positive_points


class Arm(NamedTuple):
    """Runs of one arm: x, y f64[n] > 0, and the model of each run (None: each is its own)."""

    x: ArrayLike
    y: ArrayLike
    groups: Sequence[Any] | None = None


@dataclass(frozen=True)
class SlopeDifference:
    """Laws of two arms beside each other.

    `difference` is b₁ - b₂: above 0 the first arm gains more from cost. `ratio` is y₁/y₂ by the two
    laws at x = `at`, in the middle of the range that both cover, or of the gap between them.
    """

    b: tuple[float, float]
    difference: float
    interval: Interval
    at: float
    ratio: float
    ratio_interval: Interval

    @property
    def settled(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return not self.interval.low <= 0 <= self.interval.high


def compare_slopes(
    first: Arm,
    second: Arm,
    rng: np.random.Generator,
    *,
    level: float = 0.95,
    resamples: int = 1999,
) -> SlopeDifference:
    """Fit y = a·x^(-b) to both arms, and compare exponents and levels.

    The studentised wild bootstrap of `fit.half_width`, with residuals of either arm's own size, and
    Student's t with models - 4 degrees of freedom. An arm needs 3 models. Raises UserError
    otherwise.
    """
    check_level(level)
    points = [positive_points(arm.x, arm.y, at_least=3) for arm in (first, second)]
    labels = [
        group_index(arm.groups, len(x), at_least=3)
        for arm, (x, _) in zip((first, second), points, strict=True)
    ]
    low = max(float(x.min()) for x, _ in points)
    high = min(float(x.max()) for x, _ in points)
    laws = [linearised_plain(x, y) for x, y in points]
    at = float(np.sqrt(low * high))
    both = _both(laws)
    label = np.concatenate([labels[0], labels[1] + labels[0].max() + 1])

    def half(row: Vector) -> float:
        return half_width(both, row, label, rng, level=level, n=resamples)

    slope = half(np.array([0.0, 1.0, 0.0, -1.0]))
    rows = [law.gradient(np.array([at]))[0] for law in laws]
    apart = half(np.concatenate([rows[0], -rows[1]]))
    (a1, b1, _), (a2, b2, _) = (law.law for law in laws)
    ratio = float(a1 / a2 * at ** (b2 - b1))
    with np.errstate(over="ignore"):
        ends = ratio * np.exp([-apart, apart])
    return SlopeDifference(
        (b1, b2),
        b1 - b2,
        Interval(b1 - b2 - slope, b1 - b2 + slope, level),
        at,
        ratio,
        Interval(float(ends[0]), float(ends[1]), level),
    )


def _both(laws: Sequence[Linearised]) -> Linearised:
    """Two laws as one fit of four parameters; its `law` and `gradient` are those of the first."""
    n, m = (len(law.residuals) for law in laws)
    jacobian = np.zeros((n + m, 4))
    jacobian[:n, :2], jacobian[n:, 2:] = (law.jacobian for law in laws)
    residuals = np.concatenate([law.residuals for law in laws])
    return Linearised(laws[0].law, laws[0].gradient, jacobian, residuals, np.ones(len(residuals)))
