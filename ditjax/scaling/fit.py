"""Laws fitted to a study: correlations, and power laws with and without an offset.

A scaling study has few points (9 to 24), its noise grows at the small end, and the seeds of one
model share that model's deviation from the law. A percentile bootstrap over so few points covers
the true exponent too rarely, so every interval here is a studentised wild bootstrap (Wu 1986;
Cameron, Gelbach & Miller 2008): residuals keep their place, change sign and size together within a
group, and the jackknife standard error is recomputed in each replicate.
`python -m tests.scaling.coverage` measures the coverage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from ditjax.errors import UserError
from ditjax.scaling.points import (
    Vector,
    centred,
    check_level,
    finite_points,
    group_index,
    positive_points,
)
from ditjax.scaling.spread import student_quantile

# Webb 2014: six weights of mean 0 and variance 1, so that a few groups still give many replicates.
_WEBB = np.sqrt([0.5, 1.0, 1.5])
_WEBB = np.concatenate([-_WEBB, _WEBB])


@dataclass(frozen=True)
class Interval:
    """low <= true value <= high with probability `level`; an unbounded side is infinite."""

    low: float
    high: float
    level: float


@dataclass(frozen=True)
class PowerLaw:
    """y = c + a·x^(-b), and how well the points determine it.

    `c` is 0.0 in a law without offset. `b_interval` is that of the exponent. `r2` is the explained
    share of the variance of log y. The law is fitted to `n` points in `groups` groups.
    """

    a: float
    b: float
    c: float
    b_interval: Interval
    r2: float
    n: int
    groups: int

    def __call__(self, x: ArrayLike) -> Vector:
        """c + a·x^(-b) at x > 0, of any shape."""
        return self.c + self.a * np.asarray(x, np.float64) ** -self.b


@dataclass(frozen=True)
class Linearised:
    """A law at its fitted parameters θ, around which log y is linear in θ.

    Intervals are computed from it. `law` is (a, b, c). `gradient(x)` f64[k,p] is ∂log y/∂θ at
    x f64[k]. At the n fitted points: `jacobian` f64[n,p], `residuals` f64[n] of log y, and
    `weights` f64[n] of the robust loss. `stretch` is the factor by which the estimate moves more
    than it would with fixed weights.
    """

    law: tuple[float, float, float]
    gradient: Callable[[Vector], Vector]
    jacobian: Vector
    residuals: Vector
    weights: Vector
    stretch: float = 1.0


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """r = Σ(x-x̄)(y-ȳ) / √(Σ(x-x̄)² Σ(y-ȳ)²).  x, y f64[n], n >= 3, neither constant."""
    x, y = finite_points(x, y, at_least=3)
    dx, dy = centred(x, "x"), centred(y, "y")
    return float(np.clip(dx @ dy, -1.0, 1.0))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's r of the ranks; ties share their mean rank.  x, y f64[n], n >= 3."""
    x, y = finite_points(x, y, at_least=3)
    return pearson(scipy.stats.rankdata(x), scipy.stats.rankdata(y))


def pearson_interval(r: float, n: int, level: float = 0.95) -> Interval:
    """Fisher's z: atanh r is approximately normal with standard error 1/√(n-3).

    It is exact only for normal pairs. With n = 3 the interval is [-1, 1].
    """
    check_level(level)
    if not -1.0 <= r <= 1.0 or n < 3:
        raise UserError(f"a correlation of {r} over {n} points: expected -1 <= r <= 1 and n >= 3.")
    if n == 3:
        return Interval(-1.0, 1.0, level)
    if abs(r) == 1.0:
        return Interval(r, r, level)
    half = NormalDist().inv_cdf(0.5 + level / 2) / np.sqrt(n - 3)
    low, high = np.tanh(np.arctanh(r) + np.array([-half, half]))
    return Interval(float(low), float(high), level)


def spearman_interval(r: float, n: int, level: float = 0.95) -> Interval:
    """Bonett & Wright 2000: atanh r is about normal with standard error √((1 + r²/2)/(n-3)).

    Ranks that agree wholly would leave no width: |r| counts as the next that n ranks can have, when
    two neighbours change places, and the interval reaches to 1. With n = 3 it is [-1, 1].
    """
    check_level(level)
    if not -1.0 <= r <= 1.0 or n < 3:
        raise UserError(f"a correlation of {r} over {n} points: expected -1 <= r <= 1 and n >= 3.")
    if n == 3:
        return Interval(-1.0, 1.0, level)
    near = float(np.clip(r, -1 + 12 / (n * (n**2 - 1)), 1 - 12 / (n * (n**2 - 1))))
    half = NormalDist().inv_cdf(0.5 + level / 2) * np.sqrt((1 + near**2 / 2) / (n - 3))
    low, high = np.tanh(np.arctanh(near) + np.array([-half, half]))
    return Interval(min(float(low), r), max(float(high), r), level)


def fit_power_law(
    x: ArrayLike,
    y: ArrayLike,
    rng: np.random.Generator,
    *,
    groups: Sequence[Any] | None = None,
    level: float = 0.95,
    resamples: int = 1999,
) -> PowerLaw:
    """y = a·x^(-b), by least squares of log y = log a - b·log x.

    Huber's loss would narrow the intervals of so few points and cost up to 3 % of coverage.
    x, y f64[n] > 0, x not all equal. `groups` names the group of each point, which is its model if
    a model has several seeds; None makes each point a group. At least 3 groups.
    Raises UserError otherwise.
    """
    x, y = positive_points(x, y, at_least=3)
    label = group_index(groups, len(x), at_least=3)
    check_level(level)
    found = linearised_plain(x, y)
    slope = np.array([0.0, 1.0])
    half = half_width(found, slope, label, rng, level=level, n=resamples)
    b = found.law[1]
    return _law(found, y, label, Interval(b - half, b + half, level))


def linearised_plain(x: Vector, y: Vector) -> Linearised:
    """Fit y = a·x^(-b) by least squares of log y; θ = (log y at the mean of log x, b)."""
    centred(x, "x")
    log_x, log_y = np.log(x), np.log(y)
    middle = log_x.mean()

    def gradient(at: Vector) -> Vector:
        return np.stack([np.ones_like(at), middle - np.log(at)], axis=1)

    jacobian = gradient(x)
    theta = np.linalg.lstsq(jacobian, log_y)[0]
    b = float(theta[1])
    law = (float(np.exp(theta[0] + b * middle)), b, 0.0)
    return Linearised(law, gradient, jacobian, log_y - jacobian @ theta, np.ones_like(log_x))


def fit_power_law_offset(
    x: ArrayLike,
    y: ArrayLike,
    rng: np.random.Generator,
    *,
    groups: Sequence[Any] | None = None,
    level: float = 0.95,
    resamples: int = 1999,
) -> PowerLaw:
    """y = c + a·x^(-b), c >= 0, b > 0: Huber's loss on log y - log(c + a·x^(-b)).

    Hoffmann et al. 2022, Sec. 3.3, use this loss with a constant delta. Here delta is 1.345 robust
    standard deviations of the residuals, so that it does not depend on units. The interval of b is
    computed on log b, where the estimate is closer to symmetric, from the linearised fit; c is free
    there even if its estimate is 0.
    x, y f64[n] > 0 with at least 4 different x, at least 5 groups (see `fit_power_law`).
    Raises UserError otherwise, and if y does not fall with x.
    """
    x, y = positive_points(x, y, at_least=5)
    label = group_index(groups, len(x), at_least=5)
    check_level(level)
    found = linearised_offset(x, y)
    log_b = np.array([0.0, 1.0, 0.0])
    half = half_width(found, log_b, label, rng, level=level, n=resamples)
    with np.errstate(over="ignore"):  # an exponent that the points do not bound
        low, high = found.law[1] * np.exp([-half, half])
    return _law(found, y, label, Interval(float(low), float(high), level))


def linearised_offset(x: Vector, y: Vector) -> Linearised:
    """Fit y = c + a·x^(-b) as `fit_power_law_offset`.

    θ = (log a, log b, c) with x and y in units of their geometric means.
    """
    if len(np.unique(x)) < 4:
        raise UserError(
            f"{len(np.unique(x))} different x: a power law with offset has 3 parameters and needs"
            " at least 4; fit the law without offset."
        )
    x_unit, y_unit = np.exp(np.log(x).mean()), np.exp(np.log(y).mean())
    u, v = np.log(x / x_unit), y / y_unit
    slope = -float(np.polyfit(u, np.log(v), 1)[0])
    if slope <= 0:
        raise UserError(
            f"y grows with x (exponent {-slope:.3g}): a power law with offset needs y that falls;"
            " read the correlation instead."
        )

    def residual(theta: Vector) -> Vector:
        return np.log(v) - np.log(theta[2] + np.exp(theta[0] - np.exp(theta[1]) * u))

    def jacobian_at(theta: Vector, u: Vector) -> Vector:
        power = np.exp(theta[0] - np.exp(theta[1]) * u)
        columns = [power, -np.exp(theta[1]) * u * power, np.ones_like(u)]
        return np.stack(columns, axis=1) / (theta[2] + power)[:, None]

    bounds = ([-30.0, np.log(1e-4), 0.0], [30.0, np.log(50.0), v.max()])
    # The delta of the residuals from the plain law is too wide if the law has an offset, so it is
    # recomputed from the residuals of each round.
    delta = huber_delta(np.log(v) - np.polyval(np.polyfit(u, np.log(v), 1), u))
    theta, residuals, delta = fit_huber(
        residual, lambda theta: -jacobian_at(theta, u), _offset_starts(u, v), bounds, delta
    )
    weights = np.minimum(1.0, delta / np.maximum(np.abs(residuals), delta * 1e-9))
    b, c = float(np.exp(theta[1])), float(theta[2] * y_unit)
    c = c if c > 1e-6 * y.min() else 0.0  # the solver stops just inside the bound
    return Linearised(
        law=(float(y_unit * np.exp(theta[0]) * x_unit**b), b, c),
        gradient=lambda at: jacobian_at(theta, np.log(at / x_unit)),
        jacobian=jacobian_at(theta, u),
        residuals=residuals,
        weights=weights,
        # The weights move with the data: Huber's estimate responds by 1/E[ψ'], not 1/E[ψ(e)/e].
        stretch=float(weights.mean() / np.mean(weights == 1.0)),
    )


def _offset_starts(u: Vector, v: Vector) -> list[Vector]:
    """Starting points θ: the loss has several minima in c, so start near each of them."""
    starts = []
    for c in (0.0, 0.3 * v.min(), 0.6 * v.min(), 0.9 * v.min(), *np.quantile(v, [0.1, 0.3])):
        # Noise may carry a point below the true c, so c is not bounded by min y.
        fall, level_at_0 = np.polyfit(u, np.log(np.maximum(v - c, 0.05 * v)), 1)
        starts.append(np.array([level_at_0, np.log(np.clip(-fall, 1e-3, 40.0)), c]))
    return starts


def fit_huber(
    residual: Callable[[Vector], Vector],
    jacobian: Callable[[Vector], Vector],
    starts: Sequence[Vector],
    bounds: tuple[Sequence[float], Sequence[float]],
    delta: float,
    max_nfev: int | None = None,
) -> tuple[Vector, Vector, float]:
    """Minimise Huber's loss: solve from each start, keep the best, then recompute delta 3 times.

    Returns θ, the residuals there, and the last delta.
    """

    def solve(start: Vector, delta: float) -> scipy.optimize.OptimizeResult:
        return scipy.optimize.least_squares(
            residual,
            np.clip(start, *bounds),
            jac=jacobian,
            bounds=bounds,
            x_scale="jac",
            loss="huber",
            f_scale=delta,
            max_nfev=max_nfev,
        )

    solution = min((solve(start, delta) for start in starts), key=lambda found: float(found.cost))
    for _ in range(3):
        delta = huber_delta(solution.fun)
        solution = solve(solution.x, delta)
    return solution.x, residual(solution.x), delta


def half_width(
    found: Linearised,
    row: Vector,
    label: NDArray[np.intp],
    rng: np.random.Generator,
    *,
    level: float,
    n: int = 1999,
    of_new: bool = False,
) -> float:
    """Half the width of the interval of row·θ: critical value times the jackknife standard error.

    row f64[p], label i[points] -> the half-width; infinite if one group alone determines row·θ.
    The critical value is that of |row·(θ*-θ̂)|/se* over the replicates. The parameters are linear
    in log y near the fit, so each replicate is one product with the functionals below. It is never
    less than that of Student's t with groups - p degrees of freedom, because with 6 to 12 points
    the bootstrap alone covers 91 to 94 % instead of 95 %.
    With `of_new`, where each group is one point, the interval is that of a further point, whose own
    deviation from the law is drawn from those of the points; its variance Σe²/(n-p) adds to se².
    """
    jacobian, residuals = found.jacobian, found.residuals
    root = np.sqrt(found.weights)[:, None]
    groups, parameters = int(label.max()) + 1, jacobian.shape[1]
    solve = np.linalg.pinv(jacobian * root) * root.T
    full = row @ solve
    without = np.zeros((len(residuals), groups))
    deleted = residuals.copy()  # residual from the fit to the other groups
    for group in range(groups):
        kept = label != group
        weighted = jacobian[kept] * root[kept]
        if np.linalg.matrix_rank(weighted) < parameters:
            return float("inf")
        others = np.linalg.pinv(weighted) * root[kept].T
        without[kept, group] = row @ others
        deleted[~kept] -= jacobian[~kept] @ (others @ residuals[kept])

    def standard_error(errors: Vector) -> Vector:
        shift = errors @ without - (errors @ full)[..., None]
        return found.stretch * np.sqrt((groups - 1) / groups * np.sum(shift**2, axis=-1))

    def deviation(errors: Vector) -> Vector:
        """Of a further point: root mean square of the errors that remain after the fit."""
        left = errors - errors @ (jacobian @ solve).T
        return np.sqrt(np.sum(left**2, axis=-1) / max(groups - parameters, 1))

    if found.residuals @ found.residuals <= 1e-24 * len(residuals):
        return 0.0  # the points lie on the law
    replicates = deleted * rng.choice(_WEBB, size=(n, groups))[:, label]
    error, spread = found.stretch * (replicates @ full), standard_error(replicates)
    width = standard_error(residuals)
    if of_new:
        error = error - rng.choice(deleted, n) * rng.choice(_WEBB, n)
        spread = np.hypot(spread, deviation(replicates))
        width = np.hypot(width, deviation(residuals))
    student = student_quantile(level, max(groups - parameters, 1))
    return float(width * max(np.quantile(np.abs(error) / spread, level), student))


def _law(found: Linearised, y: Vector, label: NDArray[np.intp], interval: Interval) -> PowerLaw:
    a, b, c = found.law
    return PowerLaw(
        a, b, c, interval, _r2(np.log(y), found.residuals), len(y), int(label.max()) + 1
    )


def huber_delta(residuals: Vector) -> float:
    """1.345 robust standard deviations (median absolute residual / 0.6745): 95 % efficiency."""
    return max(1.345 * float(np.median(np.abs(residuals))) / 0.6745, 1e-9)


def _r2(log_y: Vector, residuals: Vector) -> float:
    """1 - Σe² / Σ(log y - mean)²; NaN if y is constant."""
    total = float(np.sum((log_y - log_y.mean()) ** 2))
    return 1.0 - float(np.sum(residuals**2)) / total if total > 0 else float("nan")
