"""Laws fitted to a study: correlations, power laws with and without offset, honest intervals.

The points of a scaling study are few (9 to 24), their noise grows at the small end, and seeds of
one model share that model's distance from the law. A percentile bootstrap over so few points
covers the true exponent too seldom, so every interval here is a studentised wild bootstrap
(Wu 1986; Cameron, Gelbach & Miller 2008): residuals keep their place and change sign and size
together within a group, and the jackknife standard error is recomputed in each replicate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from ditjax.errors import UserError

Vector = NDArray[np.float64]

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
    """y = c + a·x^(-b), and how well the points fix it.

    `c` is 0.0 for the law without offset. `r2` is the share of the variance of log y explained.
    `n` points in `groups` groups were fitted; `b_interval` holds the exponent.
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


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """r = Σ(x-x̄)(y-ȳ) / √(Σ(x-x̄)² Σ(y-ȳ)²).  x, y f64[n], n >= 3, neither constant."""
    x, y = _points(x, y, at_least=3)
    dx, dy = _centred(x, "x"), _centred(y, "y")
    return float(np.clip(dx @ dy, -1.0, 1.0))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's r of the ranks; ties share their mean rank.  x, y f64[n], n >= 3."""
    x, y = _points(x, y, at_least=3)
    return pearson(stats.rankdata(x), stats.rankdata(y))


def pearson_interval(r: float, n: int, level: float = 0.95) -> Interval:
    """Fisher's z: atanh r is near normal with standard error 1/√(n-3).

    Exact only for normal pairs; with n = 3 nothing is known and the interval is [-1, 1].
    """
    _check_level(level)
    if not -1.0 <= r <= 1.0 or n < 3:
        raise UserError(f"a correlation of {r} over {n} points: expected -1 <= r <= 1 and n >= 3.")
    if n == 3:
        return Interval(-1.0, 1.0, level)
    if abs(r) == 1.0:
        return Interval(r, r, level)
    half = NormalDist().inv_cdf(0.5 + level / 2) / np.sqrt(n - 3)
    low, high = np.tanh(np.arctanh(r) + np.array([-half, half]))
    return Interval(float(low), float(high), level)


def fit_power_law(
    x: ArrayLike,
    y: ArrayLike,
    rng: np.random.Generator,
    *,
    groups: Sequence[Any] | None = None,
    level: float = 0.95,
    resamples: int = 1999,
) -> PowerLaw:
    """y = a·x^(-b), least squares of log y = log a - b·log x.

    x, y f64[n] > 0, x not all equal; `groups` names each point's group (the model, when several
    seeds of it are among the points; each point its own when None). At least 3 groups.
    Raises UserError otherwise.
    """
    x, y = _positive_points(x, y, at_least=3)
    label = _group_index(groups, len(x), at_least=3)
    _check_level(level)
    _centred(x, "x")
    log_x, log_y = np.log(x), np.log(y)
    middle = log_x.mean()
    jacobian = np.stack([np.ones_like(log_x), middle - log_x], axis=1)
    theta = np.linalg.lstsq(jacobian, log_y)[0]
    residuals = log_y - jacobian @ theta
    half = _half_width(
        jacobian, np.ones_like(log_x), residuals, label, rng, column=1, level=level, n=resamples
    )
    b = float(theta[1])
    return PowerLaw(
        a=float(np.exp(theta[0] + b * middle)),
        b=b,
        c=0.0,
        b_interval=Interval(b - half, b + half, level),
        r2=_r2(log_y, residuals),
        n=len(x),
        groups=int(label.max()) + 1,
    )


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

    The loss on logs is that of Hoffmann et al. 2022, Sec. 3.3; its bend sits at 1.345 robust
    standard deviations of the residuals instead of a constant, so that it depends on no unit.
    The interval of b is made on log b, where the estimate is closer to symmetric, from the
    linearised fit; c is free there even when its estimate is 0.
    x, y f64[n] > 0 with at least 4 different x, at least 5 groups (see `fit_power_law`).
    Raises UserError otherwise, and where y does not fall with x.
    """
    x, y = _positive_points(x, y, at_least=5)
    label = _group_index(groups, len(x), at_least=5)
    _check_level(level)
    if len(np.unique(x)) < 4:
        raise UserError(
            f"{len(np.unique(x))} different x: a power law with offset has 3 parameters and needs"
            " at least 4; fit the law without offset."
        )
    # Unit-free coordinates: θ = (log a, log b, c) for x and y over their geometric means.
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

    def jacobian_of_law(theta: Vector) -> NDArray[np.float64]:
        power = np.exp(theta[0] - np.exp(theta[1]) * u)
        columns = [power, -np.exp(theta[1]) * u * power, np.ones_like(u)]
        return np.stack(columns, axis=1) / (theta[2] + power)[:, None]

    def solve(start: Vector, bend: float) -> optimize.OptimizeResult:
        return optimize.least_squares(
            residual,
            start,
            jac=lambda theta: -jacobian_of_law(theta),
            bounds=([-30.0, np.log(1e-4), 0.0], [30.0, np.log(50.0), v.max()]),
            x_scale="jac",
            loss="huber",
            f_scale=bend,
        )

    # The loss has several valleys in c: start in each. The spread about the plain law is too wide
    # a bend where the law has an offset, so each round takes it anew from the last residuals.
    starts = []
    for c in (0.0, 0.3 * v.min(), 0.6 * v.min(), 0.9 * v.min(), *np.quantile(v, [0.1, 0.3])):
        # Noise may carry a point below the true c, so c is not held below min y.
        fall, level_at_0 = np.polyfit(u, np.log(np.maximum(v - c, 0.05 * v)), 1)
        starts.append(np.array([level_at_0, np.log(np.clip(-fall, 1e-3, 40.0)), c]))
    bend = _huber_bend(np.log(v) - np.polyval(np.polyfit(u, np.log(v), 1), u))
    solution = min((solve(start, bend) for start in starts), key=lambda found: float(found.cost))
    for _ in range(3):
        bend = _huber_bend(solution.fun)
        solution = solve(solution.x, bend)
    theta, residuals = solution.x, residual(solution.x)
    weights = np.minimum(1.0, bend / np.maximum(np.abs(residuals), bend * 1e-9))
    half = _half_width(
        jacobian_of_law(theta), weights, residuals, label, rng, column=1, level=level, n=resamples
    )
    # The weights move with the data: Huber's estimate responds by 1/E[ψ'], not 1/E[ψ(e)/e].
    half *= float(weights.mean() / np.mean(weights == 1.0))
    b, c = float(np.exp(theta[1])), float(theta[2] * y_unit)
    with np.errstate(over="ignore"):  # an exponent that the points do not bound
        low, high = b * np.exp([-half, half])
    return PowerLaw(
        a=float(y_unit * np.exp(theta[0]) * x_unit**b),
        b=b,
        c=c if c > 1e-6 * y.min() else 0.0,  # the solver stays a hair inside the bound
        b_interval=Interval(float(low), float(high), level),
        r2=_r2(np.log(v), residuals),
        n=len(x),
        groups=int(label.max()) + 1,
    )


def _half_width(
    jacobian: Vector,
    weights: Vector,
    residuals: Vector,
    label: NDArray[np.intp],
    rng: np.random.Generator,
    *,
    column: int,
    level: float,
    n: int,
) -> float:
    """Half the interval of one parameter: critical value of |θ*-θ̂|/se* times the jackknife se.

    jacobian f64[n,p] of the fitted log y, weights f64[n] of a robust loss, residuals f64[n],
    label i[n] -> the half-width; infinite where one group alone fixes the parameter. The parameter
    is linear in y near the fit, so each replicate is one product with the functionals below. The
    critical value is never less than Student's at groups - p degrees of freedom, because at 6 to
    12 points the bootstrap's alone covers 91 to 94 % instead of 95 %.
    """
    root = np.sqrt(weights)[:, None]
    groups, parameters = int(label.max()) + 1, jacobian.shape[1]
    full = (np.linalg.pinv(jacobian * root) * root.T)[column]
    without = np.zeros((len(residuals), groups))
    deleted = residuals.copy()  # residual from the fit to the other groups
    for group in range(groups):
        kept = label != group
        weighted = jacobian[kept] * root[kept]
        if np.linalg.matrix_rank(weighted) < parameters:
            return float("inf")
        solve = np.linalg.pinv(weighted) * root[kept].T
        without[kept, group] = solve[column]
        deleted[~kept] -= jacobian[~kept] @ (solve @ residuals[kept])

    def standard_error(errors: Vector) -> Vector:
        shift = errors @ without - (errors @ full)[..., None]
        return np.sqrt((groups - 1) / groups * np.sum(shift**2, axis=-1))

    se = float(standard_error(residuals))
    if se <= 1e-12:
        return 0.0  # the points lie on the law
    replicates = deleted * rng.choice(_WEBB, size=(n, groups))[:, label]
    ratio = np.abs(replicates @ full) / standard_error(replicates)
    student = stats.t.ppf(0.5 + level / 2, max(groups - parameters, 1))
    return se * float(max(np.quantile(ratio, level), student))


def _huber_bend(residuals: Vector) -> float:
    """1.345 robust standard deviations (median absolute residual / 0.6745): Huber's 95 %."""
    return max(1.345 * float(np.median(np.abs(residuals))) / 0.6745, 1e-9)


def _r2(log_y: Vector, residuals: Vector) -> float:
    """1 - Σe² / Σ(log y - mean)²; NaN where y is constant."""
    total = float(np.sum((log_y - log_y.mean()) ** 2))
    return 1.0 - float(np.sum(residuals**2)) / total if total > 0 else float("nan")


def _centred(values: Vector, name: str) -> Vector:
    """(v - mean) / |v - mean|; UserError where all values are equal."""
    if values.min() == values.max():
        raise UserError(f"all {len(values)} {name} equal {values[0]:g}: expected different values.")
    centred = (values - values.mean()) / (values.max() - values.min())
    return np.asarray(centred / np.linalg.norm(centred))


def _points(x: ArrayLike, y: ArrayLike, *, at_least: int) -> tuple[Vector, Vector]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise UserError(f"x has shape {x.shape}, y {y.shape}: expected two lists of one length.")
    for name, values in (("x", x), ("y", y)):
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise UserError(
                f"{name}[{bad[0]}] is {values[bad[0]]}: expected finite numbers;"
                " leave the failed run out."
            )
    if len(x) < at_least:
        raise UserError(f"{len(x)} points: expected at least {at_least}; add runs to the study.")
    return x, y


def _positive_points(x: ArrayLike, y: ArrayLike, *, at_least: int) -> tuple[Vector, Vector]:
    x, y = _points(x, y, at_least=at_least)
    for name, values in (("x", x), ("y", y)):
        bad = np.flatnonzero(values <= 0)
        if bad.size:
            raise UserError(
                f"{name}[{bad[0]}] is {values[bad[0]]:g}: a power law needs positive numbers;"
                " leave the run out."
            )
    return x, y


def _group_index(groups: Sequence[Any] | None, n: int, *, at_least: int) -> NDArray[np.intp]:
    """Group names [n] -> 0..G-1 [n], in order of first appearance."""
    names = range(n) if groups is None else groups
    if len(names) != n:
        raise UserError(f"{len(names)} group names for {n} points: expected one for each point.")
    order = {name: index for index, name in enumerate(dict.fromkeys(names))}
    if len(order) < at_least:
        raise UserError(
            f"{len(order)} groups of points: expected at least {at_least}; add models to the study."
        )
    return np.array([order[name] for name in names], np.intp)


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise UserError(f"interval level {level}: expected a share between 0 and 1, such as 0.95.")
