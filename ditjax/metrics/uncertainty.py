"""How sure a score is: bootstrap intervals, and the Fréchet distance of infinitely many samples.

A bootstrap of n samples takes each w_i times, w multinomial. To first order a score of them is
value + mean of (w_i - 1) psi_i, where psi is the score's influence function (Hampel 1974), so one
pass gives psi and each resample costs n additions: no eigendecomposition. Resampling the Fréchet
distance itself would be wrong as well as slow: a resample holds fewer different samples, so its
distance has about twice the bias of O(1/n), and the interval lies above the value that it is for.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditjax.errors import UserError
from ditjax.metrics.frechet import (
    Moments,
    batch_moments,
    covariance,
    gaussian_root,
    merge,
    no_moments,
    update,
)
from ditjax.metrics.scores import ScoreSums, split_scores

BLOCK = 4096


class Interval(NamedTuple):
    """A value, the standard error of it over sample sets of the same count, and its interval."""

    value: float
    standard_error: float
    low: float
    high: float


def bootstrap_interval(
    value: float,
    influence: ArrayLike,
    seed: int,
    *,
    resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Efron 1979: the percentiles of value + mean of (w_i - 1) psi_i over `resamples` draws of w.

    influence f[n] of any score: of a precision or recall it is the indicator that it is the mean
    of. The interval is for scores of n samples: their bias of O(1/n) is left in it.
    Raises UserError for fewer than 2 samples, an influence not finite, or a level outside (0, 1).
    """
    psi = np.asarray(influence, np.float64)
    if psi.ndim != 1 or psi.size < 2 or not np.isfinite(psi).all():
        raise UserError(
            f"influence of shape {psi.shape}: expected one finite number for each of 2 samples"
            " or more."
        )
    if not (0 < level < 1 and resamples >= 1):
        raise UserError(
            f"an interval of level {level} from {resamples} resamples: expected a level between"
            " 0 and 1 and at least 1 resample."
        )
    psi = psi - psi.mean()
    rng = np.random.default_rng(seed)
    shifts = np.array([psi[rng.integers(psi.size, size=psi.size)].mean() for _ in range(resamples)])
    tail = (1 - level) / 2
    low, high = np.quantile(shifts, [tail, 1 - tail])
    return Interval(
        value, float(psi.std() / np.sqrt(psi.size)), value + float(low), value + float(high)
    )


def systematic_error(values: ArrayLike, place: ArrayLike) -> float:
    """Wolter 1985, Sec. 8.2: sqrt(sum of (l_k+1 - l_k)² / (2 n (n-1))), in the order of `place`.

    The standard error of the mean of values f[n] at evenly spread places f[n]. Of losses and their
    timesteps: how the loss depends on the timestep is no error, as every part of the timesteps is
    there, and the deviation over sqrt(n) would count it as one.
    Raises UserError for fewer than 2 values, or another number of places.
    """
    values, place = np.asarray(values, np.float64), np.asarray(place)
    if values.ndim != 1 or values.size < 2 or place.shape != values.shape:
        raise UserError(
            f"values of shape {values.shape} at places of shape {place.shape}: expected one place"
            " for each of 2 values or more."
        )
    steps = np.diff(values[np.argsort(place, kind="stable")])
    n = values.size
    return float(np.sqrt(np.square(steps).sum() / (2 * n * (n - 1))))


def inception_influence(
    sums: ScoreSums, log_p: NDArray[np.float64], split: ArrayLike
) -> NDArray[np.float64]:
    """Influence of each sample on `inception_score`, for log_p f64[m,C] in splits i[m] -> f64[m].

    In split s of n_s samples of n, of score IS_s: n / (S n_s) IS_s (sum_y p log p - log p(y) p,
    less its mean). `sums` are those of all n samples, of which these m may be a batch.
    """
    split = np.asarray(split)
    score = split_scores(sums)
    marginal = sums.marginal / sums.samples[:, None]
    # Where a split's p(y) is 0 so is every p(y|x) of it: the term is 0 log 0.
    log_marginal = np.log(np.where(marginal > 0, marginal, 1.0))
    p = np.exp(log_p)
    divergence = (p * (np.where(p > 0, log_p, 0.0) - log_marginal[split])).sum(axis=1)
    weight = sums.samples.sum() / (len(sums.samples) * sums.samples[split])
    return weight * score[split] * (divergence - np.log(score[split]))


def frechet_influence(
    features: ArrayLike, mu: ArrayLike, sigma: ArrayLike
) -> tuple[float, NDArray[np.float64]]:
    """Fréchet distance of features f[n,d] to N(mu f[d], sigma f[d,d]), and its influence f64[n].

    With R R^T = sigma, c = x - mean and K = R^T S R, Tr (S^1/2 sigma S^1/2)^1/2 = Tr K^1/2, whose
    gradient by S is R K^-1/2 R^T / 2, so psi = 2 (mean - mu).c + n / (n - 1) (|c|^2 -
    |K^-1/4 R^T c|^2), less its mean. The reference is taken as known: its own finite count is in
    no interval. Holds below d samples too (K^-1/2 on K's range). Cost: two eigendecompositions
    and 2 n d rank multiply-adds. Raises UserError as `frechet_distance` does.
    """
    x = np.asarray(features)
    reference = _Reference(mu, sigma)
    moments = no_moments(reference.mean.size)
    for start in range(0, len(x), BLOCK):
        moments = update(moments, x[start : start + BLOCK])
    values, vectors = reference.spectrum(moments)
    whiten = reference.root @ (vectors * values[None, :] ** -0.25)
    shift = moments.mean - reference.mean
    unbiased = len(x) / (len(x) - 1)
    psi = np.empty(len(x))
    for start in range(0, len(x), BLOCK):
        c = x[start : start + BLOCK].astype(np.float64) - moments.mean[None, :]
        psi[start : start + BLOCK] = 2 * (c @ shift) + unbiased * (
            (c**2).sum(axis=1) - ((c @ whiten) ** 2).sum(axis=1)
        )
    return reference.distance(moments, values), psi - psi.mean()


class Extrapolation(NamedTuple):
    """A Fréchet distance at infinitely many samples, and the line that it is the end of.

    `distances` f64[levels] are means over disjoint blocks of `sizes` f64[levels] samples;
    the line is value + slope / size. `standard_error` is that of `value`.
    """

    value: float
    standard_error: float
    slope: float
    sizes: NDArray[np.float64]
    distances: NDArray[np.float64]


def frechet_infinite(
    features: ArrayLike,
    mu: ArrayLike,
    sigma: ArrayLike,
    seed: int,
    levels: Sequence[int] = (1, 2, 3, 4),
) -> Extrapolation:
    """Chong & Forsyth 2020: the intercept of a line through the distance at several N, over 1/N.

    features f[n,d], shuffled by seed. They draw a subset for each N; here a level m is the mean
    over m disjoint blocks of n / m, so every sample counts once at every level and what the levels
    share cancels from the slope. The error is the root of two squares: the sampling error of n
    samples, and how far a parabola's intercept is from the line's, which is the larger where
    blocks are not many times d: the bias is then no line in 1/N.
    The limit is the distance to N(mu, sigma) as given, whose own finite count still biases it.
    Cost: sum(levels) eigendecompositions. Raises UserError for fewer than three levels, or a block
    of d samples or fewer.
    """
    x = np.asarray(features)
    reference = _Reference(mu, sigma)
    if len(set(levels)) < 3 or min(levels) < 1:
        raise UserError(f"levels {list(levels)}: expected three or more different block counts.")
    smallest, dimensions = len(x) // max(levels), reference.mean.size
    if smallest <= dimensions:
        raise UserError(
            f"{len(x)} samples in {max(levels)} blocks are {smallest} each: to extrapolate a"
            f" distance of {dimensions} dimensions needs more than {max(levels) * dimensions}"
            " samples."
        )
    order = np.random.default_rng(seed).permutation(len(x))
    distances = []
    for level in levels:
        blocks = np.array_split(order, level)
        distances.append(np.mean([reference.distance_of(x, block) for block in blocks]))
    sizes, y = len(x) / np.array(levels, np.float64), np.array(distances)
    # Powers of n / N, so that both fits are of numbers near 1.
    powers = np.array(levels, np.float64)[:, None] ** np.arange(3)[None, :]
    line, *_ = np.linalg.lstsq(powers[:, :2], y, rcond=None)
    parabola, *_ = np.linalg.lstsq(powers, y, rcond=None)
    variance = frechet_influence(x, mu, sigma)[1].var() / len(x) + (parabola[0] - line[0]) ** 2
    return Extrapolation(
        float(line[0]), float(np.sqrt(variance)), float(line[1]) * len(x), sizes, y
    )


class _Reference:
    """A Gaussian to which many distances are taken: one eigendecomposition each.

    K's eigenvalues are squares of what `gaussian_frechet_distance` sums, so that the small ones
    are known to 1e-8 of the largest and not to 1e-16: enough beside a sampling error.
    """

    def __init__(self, mu: ArrayLike, sigma: ArrayLike) -> None:
        self.mean, self.root, self.trace = gaussian_root(mu, sigma)

    def spectrum(self, moments: Moments) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Eigenvalues of K = R^T S R above rounding, and their vectors."""
        if moments.mean.shape != self.mean.shape:
            raise UserError(
                f"features of {moments.mean.size} and {self.mean.size} dimensions: both sets must"
                " come from the same layer of the same network."
            )
        values, vectors = np.linalg.eigh(self.root.T @ covariance(moments) @ self.root)
        kept = values > values.size * np.finfo(np.float64).eps * np.abs(values).max(initial=0.0)
        return values[kept], vectors[:, kept]

    def distance(self, moments: Moments, values: NDArray[np.float64]) -> float:
        spread = np.trace(covariance(moments)) + self.trace - 2 * np.sqrt(values).sum()
        return max(0.0, float(((moments.mean - self.mean) ** 2).sum() + spread))

    def distance_of(self, x: NDArray[np.floating], rows: NDArray[np.int64]) -> float:
        moments = no_moments(self.mean.size)
        for start in range(0, len(rows), BLOCK):
            moments = merge(moments, batch_moments(x[rows[start : start + BLOCK]]))
        return self.distance(moments, self.spectrum(moments)[0])
