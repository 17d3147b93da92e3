"""Held-out extrapolation: fit a law to the smaller models and predict the largest.

Kaplan et al. 2020 and Hoffmann et al. 2022 fit small runs to predict large ones. Whether the law of
a study does so can be tested on the study itself: leave out its largest models, predict them, and
report the error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ditjax.errors import UserError
from ditjax.scaling.fit import (
    Interval,
    Linearised,
    half_width,
    linearised_offset,
    linearised_plain,
)
from ditjax.scaling.points import Vector, check_level, group_index, positive_points


@dataclass(frozen=True)
class HeldOut:
    """A model that the law was not fitted to. `measured` is the geometric mean of its runs.

    `interval` contains `measured` with probability `level`; it covers the uncertainty of the law at
    `x` and the model's own deviation from it.
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
        """Whether the interval contains the measured value."""
        return self.interval.low <= self.measured <= self.interval.high


@dataclass(frozen=True)
class Extrapolation:
    """y = c + a·x^(-b), fitted to `models_fitted` models up to `fitted_to`, and its predictions.

    `held` are the models held out, sorted by x. The properties are those of the last, the largest.
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


@dataclass(frozen=True)
class Forecast:
    """What the law y = c + a·x^(-b) of `models` models says of a further model, at `x`."""

    a: float
    b: float
    c: float
    models: int
    x: float
    predicted: float
    interval: Interval


def forecast(
    x: ArrayLike,
    y: ArrayLike,
    at: float,
    seed: int | np.random.Generator,
    *,
    groups: Sequence[Any] | None = None,
    offset: bool | None = None,
    level: float = 0.95,
    resamples: int = 1999,
) -> Forecast:
    """Predict y of a further model at x = `at` > 0, with an interval for what it will measure.

    Points, offset, interval and errors are those of `predict_held_out`, which tests this on models
    that are there.
    """
    check_level(level)
    rng = np.random.default_rng(seed)
    _, x, y = _model_means(x, y, groups)
    if len(x) < (5 if offset else 3):
        raise UserError(
            f"{len(x)} models: a law that predicts needs {5 if offset else 3}; add models to the"
            " study."
        )
    found = _law_of(x, y, offset)
    ((value, interval),) = _predictions(
        found, np.array([at], np.float64), len(x), rng, level, resamples
    )
    return Forecast(*found.law, len(x), float(at), value, interval)


def power_at(x: ArrayLike, y: ArrayLike, at: float) -> float:
    """The value at x = `at` of y = a·x^b, by least squares of the logs."""
    x, y = positive_points(x, y, at_least=1)
    if np.ptp(y) == 0:
        return float(y[0])
    return float(np.exp(np.polyval(np.polyfit(np.log(x), np.log(y), 1), np.log(at))))


def predict_held_out(
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
    """Predict ŷ(x₀) = ĉ + â·x₀^(-b̂) for the `hold` largest groups by x, fitted to the others.

    Each group (a model, whose points are its seeds) counts once, with the geometric means of its x
    and y. The interval is computed on log y: [ŷ·e^(-h), ŷ·e^h], h by `fit.half_width` with
    `of_new`, which assumes that large models deviate from the law as much as small ones do. With
    offset=None the law has an offset if the fitted models support one (5 models, 4 different x, y
    that falls). The quality of the fit has no say in it, because choosing the better fit would make
    the interval too narrow. x, y f64[n] > 0; at least 3 groups must remain, 5 with an offset.
    Raises UserError otherwise.
    """
    names, x, y = _model_means(x, y, groups)
    check_level(level)
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
    found = _law_of(x[fitted], y[fitted], offset)
    told = _predictions(found, x[held], len(fitted), rng, level, resamples)
    predictions = tuple(
        HeldOut(names[model], float(x[model]), value, interval, float(y[model]))
        for model, (value, interval) in zip(held, told, strict=True)
    )
    return Extrapolation(*found.law, len(fitted), float(x[fitted[-1]]), predictions)


def _model_means(
    x: ArrayLike, y: ArrayLike, groups: Sequence[Any] | None
) -> tuple[list[Any], Vector, Vector]:
    """The name of each group, and the geometric means of its x and y."""
    x, y = positive_points(x, y, at_least=1)
    label = group_index(groups, len(x), at_least=1)
    names = list(dict.fromkeys(range(len(x)) if groups is None else groups))
    size = np.bincount(label)
    return (
        names,
        np.exp(np.bincount(label, np.log(x)) / size),
        np.exp(np.bincount(label, np.log(y)) / size),
    )


def _law_of(x: Vector, y: Vector, offset: bool | None) -> Linearised:
    if offset is None:
        offset = _supports_offset(x, y)
    return (linearised_offset if offset else linearised_plain)(x, y)


def _predictions(
    found: Linearised, at: Vector, models: int, rng: np.random.Generator, level: float, n: int
) -> list[tuple[float, Interval]]:
    """The law's values at x = `at` f64[k], and the intervals of further models there."""
    a, b, c = found.law
    told = []
    for x, row in zip(at, found.gradient(at), strict=True):
        half = half_width(found, row, np.arange(models), rng, level=level, n=n, of_new=True)
        value = float(c + a * x**-b)
        with np.errstate(over="ignore"):  # what the points do not bound
            low, high = value * np.exp([-half, half])
        told.append((value, Interval(float(low), float(high), level)))
    return told


def _supports_offset(x: Vector, y: Vector) -> bool:
    """Whether `fit.fit_power_law_offset` accepts these points."""
    enough = len(x) >= 5 and len(np.unique(x)) >= 4
    return enough and bool(np.polyfit(np.log(x), np.log(y), 1)[0] < 0)
