"""IsoFLOP profiles and the compute-optimal model size (Hoffmann et al. 2022, Sec. 3.2).

N is the size of a model (its forward Gflops, or its parameters), C the compute of training it, and
D = C / (compute per image) the number of images it has seen. With a budget C, a small model sees
many images and a large one few; in between lies the best size for C.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ditjax.errors import UserError
from ditjax.scaling.fit import Interval
from ditjax.scaling.frontier import interpolate
from ditjax.scaling.points import Vector, check_level, positive_points
from ditjax.scaling.spread import student_quantile


class ComputeCurve(NamedTuple):
    """One run: the size N of its model, and a metric (lower is better) against training compute.

    `per_image` is the compute of training on one image, in the unit of `compute`; None means 3·N,
    which is right if N is forward Gflops. Curves of one size are its seeds.
    """

    size: float
    compute: ArrayLike
    metric: ArrayLike
    per_image: float | None = None


@dataclass(frozen=True)
class Profile:
    """The models that reach one budget of training compute, and the best size for it.

    `sizes` are sorted; `images` and `metrics` are those of each model at the budget. `parabola` are
    the coefficients of log metric ≈ p₀ + p₁·u + p₂·u², u = log(N / N̄), where N̄ is the geometric
    mean of `sizes`. `best_*` are its minimum and `interval` that of `best_size`. If the models show
    no minimum these are None, and `why` is the reason.
    """

    budget: float
    sizes: tuple[float, ...]
    images: tuple[float, ...]
    metrics: tuple[float, ...]
    parabola: tuple[float, float, float] | None = None
    best_size: float | None = None
    best_images: float | None = None
    best_metric: float | None = None
    interval: Interval | None = None
    why: str = ""


@dataclass(frozen=True)
class Growth:
    """y = k·C^exponent."""

    k: float
    exponent: float
    interval: Interval

    def __call__(self, compute: ArrayLike) -> Vector:
        """y at C."""
        return self.k * np.asarray(compute, np.float64) ** self.exponent


@dataclass(frozen=True)
class ComputeOptimal:
    """N*(C) and D*(C), fitted to the minima at `budgets`; the `left_out` budgets show none."""

    size: Growth
    images: Growth
    budgets: tuple[float, ...]
    left_out: tuple[float, ...]


def isoflop(
    curves: Iterable[ComputeCurve | tuple[float, ArrayLike, ArrayLike]],
    budgets: Sequence[float],
    *,
    level: float = 0.95,
) -> tuple[Profile, ...]:
    """Hoffmann et al. 2022, Sec. 3.2: a parabola in log N at each budget, and its minimum.

    Curves are interpolated linearly in log-log and not extrapolated: a model that does not reach a
    budget, or starts above it, is not in its profile. The metrics of one size are averaged
    (geometric mean). There is no minimum with fewer than 3 sizes, with the lowest metric at the
    smallest or largest size, and for a parabola that opens downwards or has its vertex outside the
    sizes. The interval is Fieller's (1954) of -p₁/2p₂; with 3 sizes, which a parabola fits exactly,
    it is unbounded. Raises UserError for a budget, size or metric that is not positive.
    """
    check_level(level)
    by_size: dict[float, list[ComputeCurve]] = defaultdict(list)
    for curve in (ComputeCurve(*each) for each in curves):
        positive_points(curve.compute, curve.metric, at_least=1)
        positive_points([curve.size], [_per_image(curve)], at_least=1)
        same = by_size[float(curve.size)]
        same.append(curve)
        if not np.isclose(_per_image(same[0]), _per_image(curve), rtol=1e-6):
            raise UserError(
                f"two models of size {curve.size:g} cost {_per_image(same[0]):g} and"
                f" {_per_image(curve):g} an image: expected one model of each size; select one"
                " patch size, or use Gflops as the size."
            )
    positive_points(budgets, budgets, at_least=0)
    return tuple(_profile(by_size, float(budget), level) for budget in budgets)


def _per_image(curve: ComputeCurve) -> float:
    return float(3 * curve.size if curve.per_image is None else curve.per_image)


def _profile(by_size: dict[float, list[ComputeCurve]], budget: float, level: float) -> Profile:
    sizes, images, metrics = [], [], []
    for size in sorted(by_size):
        reached = [interpolate(curve.compute, curve.metric, budget) for curve in by_size[size]]
        logs = [np.log(value) for value in reached if value is not None]
        if logs:
            sizes.append(size)
            images.append(budget / _per_image(by_size[size][0]))
            metrics.append(float(np.exp(np.mean(logs))))
    bare = Profile(budget, tuple(sizes), tuple(images), tuple(metrics))
    if len(sizes) < 3:
        return replace(bare, why=f"{len(sizes)} of the models reach it: a parabola needs 3")
    design, solve, theta = _parabola(bare)
    p0, p1, p2 = (float(p) for p in theta)
    fitted = replace(bare, parabola=(p0, p1, p2))
    lowest = int(np.argmin(metrics))
    if lowest in (0, len(sizes) - 1):
        end, side = ("smallest", "below") if lowest == 0 else ("largest", "above")
        why = f"lowest at the {end} model ({sizes[lowest]:.3g}): the best size may lie {side} it"
        return replace(fitted, why=why)
    if p2 <= 0:
        return replace(fitted, why="the parabola opens downwards: no minimum")
    vertex = -p1 / (2 * p2)
    if not design[0, 1] <= vertex <= design[-1, 1]:
        return replace(fitted, why="the parabola's minimum lies outside the models")
    middle = _middle(sizes)
    low, high = _fieller(p1, p2, np.log(metrics) - design @ theta, solve, level)
    best = float(middle * np.exp(vertex))
    log_images = np.interp(np.log(best), np.log(sizes), np.log(images))
    with np.errstate(over="ignore"):
        interval = Interval(float(middle * np.exp(low)), float(middle * np.exp(high)), level)
    return replace(
        fitted,
        best_size=best,
        best_images=float(np.exp(log_images)),
        best_metric=float(np.exp(p0 + p1 * vertex + p2 * vertex**2)),
        interval=interval,
    )


def _middle(sizes: Sequence[float]) -> float:
    return float(np.exp(np.log(sizes).mean()))


def _parabola(profile: Profile) -> tuple[Vector, Vector, Vector]:
    """The design f64[k,3] in u, its pseudo-inverse f64[3,k], and the coefficients (p₀, p₁, p₂)."""
    u = np.log(np.array(profile.sizes) / _middle(profile.sizes))
    design = np.stack([np.ones_like(u), u, u**2], axis=1)
    solve = np.linalg.pinv(design)
    return design, solve, solve @ np.log(profile.metrics)


def _fieller(
    p1: float, p2: float, residuals: Vector, solve: Vector, level: float
) -> tuple[float, float]:
    """Fieller 1954: the range of v, in u, for which p₁ + 2v·p₂ is within t·se of 0.

    With S = t²s²·(solve·solveᵀ): (4p₂²-4S₂₂)v² + (4p₁p₂-4S₁₂)v + (p₁²-S₁₁) <= 0. It is unbounded if
    the curvature is not significantly different from 0, and without residuals to estimate s².
    """
    freedom = len(residuals) - 3
    if freedom < 1:
        return -np.inf, np.inf
    t = student_quantile(level, freedom)
    S = t**2 * (residuals @ residuals) / freedom * (solve @ solve.T)
    square, linear = 4 * (p2**2 - S[2, 2]), 4 * (p1 * p2 - S[1, 2])
    if square <= 0:
        return -np.inf, np.inf
    root = np.sqrt(max(linear**2 - 4 * square * (p1**2 - S[1, 1]), 0.0))
    return float((-linear - root) / (2 * square)), float((-linear + root) / (2 * square))


def compute_optimal(profiles: Sequence[Profile], *, level: float = 0.95) -> ComputeOptimal:
    """Hoffmann et al. 2022, Sec. 3.2: N* = k·C^a and D* = k'·C^a' through the profiles' minima.

    Least squares of the logs; each budget with a minimum counts once. All budgets share the same
    runs, so more budgets are not more evidence: the standard error clusters residuals by model (the
    sandwich estimator, each residual over √(1 - leverage)), and Student's t has models - 3 degrees
    of freedom. The interval is unbounded if a budget has 3 models. Raises UserError for fewer than
    2 different budgets with a minimum.
    """
    check_level(level)
    used = [profile for profile in profiles if profile.best_size is not None]
    budgets = np.array([profile.budget for profile in used])
    if len(set(budgets.tolist())) < 2:
        why = "; ".join(dict.fromkeys(p.why for p in profiles if p.why))
        raise UserError(
            f"{len(used)} of {len(profiles)} budgets show a best size: expected at least 2"
            f" different ones; train more sizes at those budgets{f' ({why})' if why else ''}."
        )
    log_c = np.log(budgets)
    lever = (log_c - log_c.mean()) / np.sum((log_c - log_c.mean()) ** 2)
    by_model: dict[float, Vector] = defaultdict(lambda: np.zeros(2))
    known = True
    for profile, weight in zip(used, lever, strict=True):
        design, solve, theta = _parabola(profile)
        known &= len(profile.sizes) > 3
        of_vertex = -solve[1] / (2 * theta[2]) + theta[1] * solve[2] / (2 * theta[2] ** 2)
        free = np.sqrt(np.maximum(1 - np.diag(design @ solve), 1e-9))
        residuals = (np.log(profile.metrics) - design @ theta) / free
        slope = _images_slope(profile)
        for size, moved in zip(profile.sizes, weight * of_vertex * residuals, strict=True):
            by_model[size] += np.array([moved, slope * moved])
    freedom = len(by_model) - 3
    se = np.sqrt(np.sum([shift**2 for shift in by_model.values()], axis=0))
    t = student_quantile(level, freedom) if known and freedom > 0 else np.inf

    def growth(values: Sequence[float | None], error: float) -> Growth:
        logs = np.log(np.array(values, np.float64))
        exponent = float(lever @ logs)
        half = float(t * error) if np.isfinite(t) else np.inf
        return Growth(
            float(np.exp(logs.mean() - exponent * log_c.mean())),
            exponent,
            Interval(exponent - half, exponent + half, level),
        )

    return ComputeOptimal(
        growth([profile.best_size for profile in used], se[0]),
        growth([profile.best_images for profile in used], se[1]),
        tuple(budgets.tolist()),
        tuple(profile.budget for profile in profiles if profile.best_size is None),
    )


def _images_slope(profile: Profile) -> float:
    """d log D / d log N at the best size, between its neighbouring models."""
    assert profile.best_size is not None
    right = int(np.searchsorted(profile.sizes, profile.best_size).clip(1, len(profile.sizes) - 1))
    rise = np.log(profile.images[right] / profile.images[right - 1])
    return float(rise / np.log(profile.sizes[right] / profile.sizes[right - 1]))
