"""The Pareto frontier of cost and quality, and the point where one curve overtakes another."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditjax.errors import UserError
from ditjax.scaling.points import Vector, finite_points, positive_points


def frontier(x: ArrayLike, y: ArrayLike) -> NDArray[np.intp]:
    """The Pareto frontier {i : no j has x_j <= x_i and y_j <= y_i, one of them strictly}.

    x, y f64[n], finite -> indices i[k], sorted by x, along which y falls. Of equal points only the
    first is included. The lower envelope of training curves (Hoffmann et al. 2022, Sec. 3.1) is the
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
    """The x from which curve 2 stays below curve 1, log y₂(x) = log y₁(x) (DiT Fig. 9).

    x1, y1 f64[n], x2, y2 f64[m] > 0, each x without repeats. Curves are interpolated linearly in
    log-log and compared over the range of x that both cover. None if curve 2 does not end below, if
    it is below throughout, and if the ranges do not overlap.
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
    """y at `at`, interpolated linearly in log-log; None outside the points, except by rounding.

    x, y f64[n] > 0, x without repeats, in any order.
    """
    u, v = _logs(x, y)
    where = np.log(at)
    if not len(u) or where < u[0] - 1e-9 or where > u[-1] + 1e-9:
        return None
    return float(np.exp(np.interp(where, u, v)))


def _logs(x: ArrayLike, y: ArrayLike) -> tuple[Vector, Vector]:
    """log x, sorted, and log y."""
    x, y = positive_points(x, y, at_least=0)
    order = np.argsort(x)
    repeats = np.flatnonzero(np.diff(x[order]) == 0)
    if repeats.size:
        raise UserError(
            f"x = {x[order][repeats[0]]:g} is there twice in one curve: expected one value per x."
        )
    return np.log(x[order]), np.log(y[order])
