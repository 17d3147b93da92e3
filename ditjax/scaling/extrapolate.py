"""Held-out extrapolation: a law is fitted to the smaller models and asked for the largest.

Kaplan et al. 2020 and Hoffmann et al. 2022 fit small runs to foretell large ones; whether a study's
law does can be tested on what it has: leave out its largest models, predict them, print the error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ditjax.errors import UserError
from ditjax.scaling.fit import (
    Interval,
    carries_offset,
    half_width,
    linearised_offset,
    linearised_plain,
)
from ditjax.scaling.points import check_level, group_index, positive_points


@dataclass(frozen=True)
class HeldOut:
    """One model that the law has not seen. `measured` is the geometric mean of its runs.

    `interval` holds `measured` with probability `level`: the law's uncertainty at `x` and the
    model's own deviation from it.
    """

    name: Any
    x: float
    predicted: float
    interval: Interval
    measured: float

    @property
    def error(self) -> float:
        """predicted / measured - 1."""
        return self.predicted / self.measured - 1.0

    @property
    def inside(self) -> bool:
        return self.interval.low <= self.measured <= self.interval.high


@dataclass(frozen=True)
class Extrapolation:
    """y = c + a·x^(-b) fitted to `models_fitted` models up to `fitted_to`, and what it foretold.

    `held` are the models held out, by x; the figures named as one model's are those of the last,
    the largest.
    """

    a: float
    b: float
    c: float
    models_fitted: int
    fitted_to: float
    held: tuple[HeldOut, ...]

    @property
    def name(self) -> Any:
        return self.held[-1].name

    @property
    def x(self) -> float:
        return self.held[-1].x

    @property
    def predicted(self) -> float:
        return self.held[-1].predicted

    @property
    def interval(self) -> Interval:
        return self.held[-1].interval

    @property
    def measured(self) -> float:
        return self.held[-1].measured

    @property
    def error(self) -> float:
        """predicted / measured - 1 of the largest model."""
        return self.held[-1].error


def held_out(
    x: ArrayLike,
    y: ArrayLike,
    rng: np.random.Generator,
    *,
    groups: Sequence[Any] | None = None,
    hold: int = 1,
    offset: bool | None = None,
    level: float = 0.95,
    resamples: int = 1999,
) -> Extrapolation:
    """ŷ(x₀) = ĉ + â·x₀^(-b̂) of the `hold` largest groups by x, fitted to the others.

    Each group (a model; its points are its seeds) counts once, with the geometric means of its x
    and y. The interval is made on log y: [ŷ·e^(-h), ŷ·e^h], h by `fit.half_width` with
    `of_new`. It takes the large models' deviations from the law to be like the small ones'.
    `offset` as in `fit.fit_law`, decided by the models fitted. x, y f64[n] > 0; at least 3 groups
    must remain (5 with an offset). Raises UserError otherwise.
    """
    x, y = positive_points(x, y, at_least=1)
    label = group_index(groups, len(x), at_least=1)
    check_level(level)
    names = list(dict.fromkeys(range(len(x)) if groups is None else groups))
    size = np.bincount(label)
    x = np.exp(np.bincount(label, np.log(x)) / size)
    y = np.exp(np.bincount(label, np.log(y)) / size)
    order = np.argsort(x, kind="stable")
    needed = 5 if offset else 3
    if hold < 1 or len(order) - hold < needed:
        raise UserError(
            f"hold={hold} of {len(order)} models: expected at least 1 held out and {needed} left"
            " to fit a law to; add models to the study."
        )
    fitted, held = order[:-hold], order[-hold:]
    if x[held[0]] <= x[fitted[-1]] * (1 + 1e-9):
        raise UserError(
            f"hold={hold} parts models of one x ({x[held[0]]:g}): hold out all of them or none."
        )
    if offset is None:
        offset = carries_offset(x[fitted], y[fitted])
    found = (linearised_offset if offset else linearised_plain)(x[fitted], y[fitted])
    a, b, c = found.law
    rows = found.gradient(x[held])
    foretold = []
    for model, row in zip(held, rows, strict=True):
        half = half_width(
            found, row, np.arange(len(fitted)), rng, level=level, n=resamples, of_new=True
        )
        value = float(c + a * x[model] ** -b)
        with np.errstate(over="ignore"):  # what the points do not bound
            low, high = value * np.exp([-half, half])
        interval = Interval(float(low), float(high), level)
        foretold.append(HeldOut(names[model], float(x[model]), value, interval, float(y[model])))
    return Extrapolation(a, b, c, len(fitted), float(x[fitted[-1]]), tuple(foretold))
