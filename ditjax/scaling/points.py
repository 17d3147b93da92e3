"""Validation of the points of a study: finite, positive where needed, and enough of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditjax.errors import UserError

Vector = NDArray[np.float64]


def finite_points(x: ArrayLike, y: ArrayLike, *, at_least: int) -> tuple[Vector, Vector]:
    """Return x, y as f64[n], n >= at_least, all finite. Raises UserError otherwise."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise UserError(f"x has shape {x.shape}, y {y.shape}: expected two lists of one length.")
    for name, values in (("x", x), ("y", y)):
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise UserError(
                f"{name}[{bad[0]}] is {values[bad[0]]}: expected finite numbers;"
                " leave out the failed run."
            )
    if len(x) < at_least:
        raise UserError(f"{len(x)} points: expected at least {at_least}; add runs to the study.")
    return x, y


def positive_points(x: ArrayLike, y: ArrayLike, *, at_least: int) -> tuple[Vector, Vector]:
    """As `finite_points`, and all positive."""
    x, y = finite_points(x, y, at_least=at_least)
    for name, values in (("x", x), ("y", y)):
        bad = np.flatnonzero(values <= 0)
        if bad.size:
            raise UserError(
                f"{name}[{bad[0]}] is {values[bad[0]]:g}: a power law needs positive numbers;"
                " leave out the run."
            )
    return x, y


def centred(values: Vector, name: str) -> Vector:
    """(v - mean) / |v - mean|. Raises UserError if all values are equal."""
    if values.min() == values.max():
        raise UserError(f"all {len(values)} {name} equal {values[0]:g}: expected different values.")
    shifted = (values - values.mean()) / (values.max() - values.min())
    return np.asarray(shifted / np.linalg.norm(shifted))


def group_index(groups: Sequence[Any] | None, n: int, *, at_least: int) -> NDArray[np.intp]:
    """Group names [n] -> 0..G-1 [n], in order of first appearance; None: one group per point."""
    names = range(n) if groups is None else groups
    if len(names) != n:
        raise UserError(f"{len(names)} group names for {n} points: expected one for each point.")
    order = {name: index for index, name in enumerate(dict.fromkeys(names))}
    if len(order) < at_least:
        raise UserError(
            f"{len(order)} groups of points: expected at least {at_least}; add models to the study."
        )
    return np.array([order[name] for name in names], np.intp)


def check_level(level: float) -> None:
    """Raise UserError unless 0 < level < 1."""
    if not 0.0 < level < 1.0:
        raise UserError(f"interval level {level}: expected a probability such as 0.95.")
