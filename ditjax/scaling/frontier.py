"""What is best for its cost: the Pareto frontier, and where one curve overtakes another."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditjax.errors import UserError
from ditjax.scaling.points import Vector, finite_points, positive_points


def frontier(x: ArrayLike, y: ArrayLike) -> NDArray[np.intp]:
    """{i : no j has x_j <= x_i and y_j <= y_i, one of them less}: lower y for no more x.

    x, y f64[n], finite -> indices i[k] in order of x, along which y falls. Of equal points the
    first is named. The lower envelope of training curves (Hoffmann et al. 2022, Sec. 3.1) is the
    frontier of all their points.
    """
    x, y = finite_points(x, y, at_least=0)
    order = np.lexsort((np.arange(len(x)), y, x))
    kept, lowest = [], np.inf
    for i in order:
        if y[i] < lowest:
            kept.append(i)
            lowest = y[i]
    return np.array(kept, np.intp)


def crossing(x1: ArrayLike, y1: ArrayLike, x2: ArrayLike, y2: ArrayLike) -> float | None:
    """The x after which curve 2 stays below curve 1: log y₂(x) = log y₁(x) there (DiT Fig. 9).

    x1, y1 f64[n], x2, y2 f64[m] > 0, each x without repeats. Curves are straight between their
    points in log-log and say nothing beyond them, so only the x that both cover count. None where
    curve 2 does not end below, where it is below throughout, and where the two share no stretch.
    """
    u1, v1 = _logs(x1, y1)
    u2, v2 = _logs(x2, y2)
    if not (len(u1) and len(u2)):
        return None
    low, high = max(u1[0], u2[0]), min(u1[-1], u2[-1])
    if low >= high:
        return None
    knots = np.unique(np.concatenate([u1, u2, [low, high]]).clip(low, high))
    gap = np.interp(knots, u2, v2) - np.interp(knots, u1, v1)
    above = np.flatnonzero(gap >= 0)
    if not above.size or above[-1] == len(knots) - 1:
        return None
    i = above[-1]
    share = gap[i] / (gap[i] - gap[i + 1])
    return float(np.exp(knots[i] + share * (knots[i + 1] - knots[i])))


def interpolate(x: ArrayLike, y: ArrayLike, at: float) -> float | None:
    """y at `at`, straight in log-log between the points; None beyond them, by more than rounding.

    x, y f64[n] > 0, x without repeats, in any order.
    """
    u, v = _logs(x, y)
    where = np.log(at)
    if not len(u) or where < u[0] - 1e-9 or where > u[-1] + 1e-9:
        return None
    return float(np.exp(np.interp(where, u, v)))


def _logs(x: ArrayLike, y: ArrayLike) -> tuple[Vector, Vector]:
    """log x, rising, and log y."""
    x, y = positive_points(x, y, at_least=0)
    order = np.argsort(x)
    repeats = np.flatnonzero(np.diff(x[order]) == 0)
    if repeats.size:
        raise UserError(
            f"x = {x[order][repeats[0]]:g} is there twice in one curve: expected one value at each."
        )
    return np.log(x[order]), np.log(y[order])
