"""Uncertainty of scores: bootstrap intervals, and the Fréchet distance at infinitely many samples.

A bootstrap resample takes sample i of n w_i times, with w multinomial. To first order its score is
value + mean of (w_i - 1) psi_i, where psi is the influence function of the score (Hampel 1974). One
pass computes psi, and each resample then costs n additions and no eigendecomposition. Resampling
the Fréchet distance itself would be wrong as well as slow: a resample has fewer distinct samples,
its distance has about twice the O(1/n) bias, and the interval would lie above the value.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditjax.errors import UserError
from ditjax.metrics.frechet import (
    FeatureMoments,
    batch_moments,
    covariance,
    gaussian_root,
    merge,
    no_moments,
    update,
)

BLOCK = 4096


class ScoreInterval(NamedTuple):
    """A score, its standard error over sample sets of the same count, and its interval."""

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
) -> ScoreInterval:
    """Efron 1979: percentiles of value + mean of (w_i - 1) psi_i over `resamples` draws of w.

    influence f[n] may be that of any score; for precision and recall it is the indicator whose mean
    they are. The interval is for the score of n samples, including its O(1/n) bias.
    Raises UserError for fewer than 2 samples, a non-finite influence, or a level outside (0, 1).
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
    return ScoreInterval(
        value, float(psi.std() / np.sqrt(psi.size)), value + float(low), value + float(high)
    )


def systematic_error(values: ArrayLike, place: ArrayLike) -> float:
    """Wolter 1985, Sec. 8.2: sqrt(sum of (l_k+1 - l_k)² / (2 n (n-1))), in the order of `place`.

    The standard error of the mean of values f[n] at evenly spread places f[n], such as losses at
    timesteps. The trend of the loss over timesteps is not an error, because every part of the range
    is covered; the deviation over sqrt(n) would count it as one.
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


def frechet_influence(
    features: ArrayLike, mu: ArrayLike, sigma: ArrayLike
) -> tuple[float, NDArray[np.float64]]:
    """Fréchet distance of features f[n,d] to N(mu f[d], sigma f[d,d]), and its influence f64[n].

    With R R^T = sigma, c = x - mean and K = R^T S R, Tr (S^1/2 sigma S^1/2)^1/2 = Tr K^1/2, whose
    gradient by S is R K^-1/2 R^T / 2. So psi = 2 (mean - mu).c + n / (n - 1) (|c|^2 -
    |K^-1/4 R^T c|^2), minus its mean. With fewer than d samples K^-1/2 is taken on the range of K.
    The reference counts as exact: no interval includes the error of its own finite count. Cost: two
    eigendecompositions and 2 n d rank multiply-adds. Raises UserError as `frechet_distance` does.
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


class FrechetLimit(NamedTuple):
    """A Fréchet distance extrapolated to infinitely many samples.

    The fitted line is value + slope / size. `distances` f64[levels] are means over disjoint blocks
    of `sizes` f64[levels] samples. `standard_error` is that of `value`.
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
) -> FrechetLimit:
    """Chong & Forsyth 2020: the intercept of a line through distances at several N, over 1/N.

    features f[n,d] are shuffled by seed. The paper draws a subset for each N. Here level m is the
    mean over m disjoint blocks of n / m samples, so every sample counts once at every level and
    the error that levels share cancels from the slope. The standard error combines the sampling
    error of n samples and the difference between the intercepts of a parabola and of the line. The
    latter dominates where blocks are not many times d, because the bias is not linear in 1/N there.
    The limit is the distance to N(mu, sigma) as given, which the reference's finite count biases.
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
            f"{len(x)} samples in {max(levels)} blocks are {smallest} each: extrapolating a"
            f" distance of {dimensions} dimensions needs more than {max(levels) * dimensions}"
            " samples."
        )
    order = np.random.default_rng(seed).permutation(len(x))
    distances = []
    for level in levels:
        blocks = np.array_split(order, level)
        distances.append(np.mean([reference.distance_of(x, block) for block in blocks]))
    sizes, y = len(x) / np.array(levels, np.float64), np.array(distances)
    # Fit powers of n / N, which are near 1.
    powers = np.array(levels, np.float64)[:, None] ** np.arange(3)[None, :]
    line, *_ = np.linalg.lstsq(powers[:, :2], y, rcond=None)
    parabola, *_ = np.linalg.lstsq(powers, y, rcond=None)
    variance = frechet_influence(x, mu, sigma)[1].var() / len(x) + (parabola[0] - line[0]) ** 2
    return FrechetLimit(float(line[0]), float(np.sqrt(variance)), float(line[1]) * len(x), sizes, y)


class _Reference:
    """A Gaussian to measure many distances to, with one eigendecomposition each.

    The eigenvalues of K are the squares of what `gaussian_frechet_distance` sums, so small ones are
    accurate to 1e-8 of the largest instead of 1e-16. The sampling error is far larger.
    """

    def __init__(self, mu: ArrayLike, sigma: ArrayLike) -> None:
        self.mean, self.root, self.trace = gaussian_root(mu, sigma)

    def spectrum(self, moments: FeatureMoments) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Eigenvalues of K = R^T S R above rounding, and their eigenvectors."""
        if moments.mean.shape != self.mean.shape:
            raise UserError(
                f"features of {moments.mean.size} and {self.mean.size} dimensions: both sets must"
                " come from the same layer of the same network."
            )
        values, vectors = np.linalg.eigh(self.root.T @ covariance(moments) @ self.root)
        kept = values > values.size * np.finfo(np.float64).eps * np.abs(values).max(initial=0.0)
        return values[kept], vectors[:, kept]

    def distance(self, moments: FeatureMoments, values: NDArray[np.float64]) -> float:
        spread = np.trace(covariance(moments)) + self.trace - 2 * np.sqrt(values).sum()
        return max(0.0, float(((moments.mean - self.mean) ** 2).sum() + spread))

    def distance_of(self, x: NDArray[np.floating], rows: NDArray[np.int64]) -> float:
        moments = no_moments(self.mean.size)
        for start in range(0, len(rows), BLOCK):
            moments = merge(moments, batch_moments(x[rows[start : start + BLOCK]]))
        return self.distance(moments, self.spectrum(moments)[0])
