"""The optimal value of a hyperparameter, and how it changes with the size of the network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditjax.errors import UserError
from ditjax.scaling.fit import Interval, Linearised, fit_power_law, half_width
from ditjax.scaling.points import Vector, check_level, group_index, positive_points

Floats = NDArray[np.floating[Any]]


class Optimum(NamedTuple):
    """The minimum of a curve. At an `edge` of the values tried the true one may lie beyond."""

    x: float
    y: float
    edge: bool


def lowest(x: Floats, y: Floats) -> Optimum | None:
    """The vertex of the parabola in (log x, log y) through the lowest point and its neighbours.

    x is increasing and positive. A y that is not finite and positive, as of a run that diverged,
    counts as infinite. None if all are. At an edge the result is the lowest point itself.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    good = np.isfinite(y) & (y > 0)
    if not good.any():
        return None
    y = np.where(good, y, np.inf)
    i = int(y.argmin())
    if i in (0, len(x) - 1):
        return Optimum(float(x[i]), float(y[i]), True)
    if not np.isfinite(y[i - 1 : i + 2]).all():  # a neighbour diverged: no slope to use
        return Optimum(float(x[i]), float(y[i]), False)
    u, v = np.log(x[i - 1 : i + 2]), np.log(y[i - 1 : i + 2])
    a, b, _ = np.polyfit(u - u[1], v - v[1], 2)
    if a <= 0:  # three equal points
        return Optimum(float(x[i]), float(y[i]), False)
    step = -b / (2 * a)
    return Optimum(float(np.exp(u[1] + step)), float(np.exp(v[1] - b * b / (4 * a))), False)


def drift(widths: Floats, optima: Floats) -> float:
    """β of optimum ∝ width^β, by least squares of the logs; NaN for fewer than two widths."""
    if len(np.unique(widths)) < 2:
        return float("nan")
    return float(np.polyfit(np.log(widths), np.log(optima), 1)[0])


AROUND = 3  # values on either side of the lowest that its parabola is fitted to
VALUES = 5  # at least: a parabola has 3 parameters, and fewer leave its interval without an end


@dataclass(frozen=True)
class Minimum:
    """The vertex (x, y) of a parabola in (log x, log y), and the interval of x.

    A side that the points do not bound is 0 or infinite. The parabola is fitted to `n` points at
    `values` values of x.
    """

    x: float
    y: float
    interval: Interval
    n: int
    values: int


def fit_minimum(
    x: ArrayLike,
    y: ArrayLike,
    rng: np.random.Generator,
    *,
    level: float = 0.95,
    resamples: int = 1999,
) -> Minimum:
    """Least squares of log y = p₀ + p₁·u + p₂·u², u = log x, around the lowest value of x.

    x, y f64[n] > 0; points of one x are its seeds. The parabola is fitted to the value of the
    lowest geometric mean and up to AROUND values on either side. The interval is Fieller's (1954):
    all v at which the slope p₁ + 2·p₂·v may be 0, by the studentised wild bootstrap of `fit.py`.
    The points of one x move together there: a loss is no parabola, they share its distance from
    one, and an interval of independent points would leave out the minimum of a skew curve.
    Raises UserError for fewer than VALUES values, a lowest one at an edge, and a parabola without a
    minimum between them.
    """
    x, y = positive_points(x, y, at_least=1)
    check_level(level)
    near = _near_lowest(x, y)
    kept = np.isin(x, near)
    middle = float(np.log(near).mean())
    found, theta = _parabola(np.log(x[kept]) - middle, np.log(y[kept]))
    ends = np.log(near[[0, -1]]) - middle
    vertex = float(-theta[1] / (2 * theta[2])) if theta[2] > 0 else np.inf
    if not ends[0] <= vertex <= ends[1]:
        raise UserError("the parabola around the lowest value has no minimum between the values.")
    label = group_index(x[kept].tolist(), int(kept.sum()), at_least=VALUES)
    seed = int(rng.integers(2**32))

    def turns(v: float) -> bool:
        """Whether the slope at v may be 0."""
        row = np.array([0.0, 1.0, 2 * v])
        draws = np.random.default_rng(seed)  # the same replicates at every v
        return bool(
            abs(row @ theta) <= half_width(found, row, label, draws, level=level, n=resamples)
        )

    low, high = (_last(turns, vertex, float(end)) for end in ends)
    return Minimum(
        float(np.exp(vertex + middle)),
        float(np.exp(theta[0] + theta[1] * vertex + theta[2] * vertex**2)),
        Interval(
            0.0 if low is None else float(np.exp(low + middle)),
            np.inf if high is None else float(np.exp(high + middle)),
            level,
        ),
        int(kept.sum()),
        len(near),
    )


def _near_lowest(x: Vector, y: Vector) -> Vector:
    """The values of x around the lowest geometric mean of y. Raises UserError as `fit_minimum`."""
    tried = np.unique(x)
    if len(tried) < VALUES:
        raise UserError(f"{len(tried)} values were tried: a minimum needs {VALUES}.")
    means = [np.log(y[x == each]).mean() for each in tried]
    lowest_at = int(np.argmin(means))
    if lowest_at in (0, len(tried) - 1):
        end, side = ("smallest", "below") if lowest_at == 0 else ("largest", "above")
        raise UserError(
            f"lowest at the {end} value tried ({tried[lowest_at]:.3g}): the best may lie {side} it."
        )
    return tried[max(0, lowest_at - AROUND) : lowest_at + AROUND + 1]


def _parabola(u: Vector, v: Vector) -> tuple[Linearised, Vector]:
    """The least-squares parabola v = θ₀ + θ₁·u + θ₂·u², and θ."""

    def gradient(at: Vector) -> Vector:
        return np.stack([np.ones_like(at), at, at**2], axis=1)

    jacobian = gradient(u)
    theta = np.asarray(np.linalg.lstsq(jacobian, v)[0], np.float64)
    fitted = Linearised((0.0, 0.0, 0.0), gradient, jacobian, v - jacobian @ theta, np.ones_like(u))
    return fitted, theta


def _last(holds: Callable[[float], bool], start: float, end: float) -> float | None:
    """The last place from `start` to `end` that holds, by bisection; None if `end` does."""
    if holds(end):
        return None
    for _ in range(6):
        middle = (start + end) / 2
        start, end = (middle, end) if holds(middle) else (start, middle)
    return end


@dataclass(frozen=True)
class OptimumLaw:
    """x* = k·N^exponent over `n` sizes N."""

    k: float
    exponent: float
    interval: Interval
    n: int


def fit_optimum_law(
    sizes: ArrayLike, minima: Sequence[Minimum], rng: np.random.Generator, *, level: float = 0.95
) -> OptimumLaw:
    """A power law through the minima at 3 sizes or more; its interval is `fit_power_law`'s.

    Raises UserError for fewer.
    """
    law = fit_power_law(sizes, [each.x for each in minima], rng, level=level)
    low, high = law.b_interval.low, law.b_interval.high
    return OptimumLaw(law.a, -law.b, Interval(-high, -low, level), law.n)
