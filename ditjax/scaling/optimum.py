"""The optimal value of a hyperparameter, and how it changes with the width of the network."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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
