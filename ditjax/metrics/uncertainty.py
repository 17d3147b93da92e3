"""Uncertainty of scores: bootstrap intervals, and the Fréchet distance at infinitely many samples.

A bootstrap resample takes sample i of n w_i times, with w multinomial. To first order its score is
value + mean of (w_i - 1) psi_i, where psi is the influence function of the score (Hampel 1974). One
pass computes psi, and each resample then costs n additions and no eigendecomposition. Resampling
the Fréchet distance itself would be wrong as well as slow: a resample has fewer distinct samples,
its distance has about twice the O(1/n) bias, and the interval would lie above the value.
"""

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditjax.errors import UserError
from ditjax.metrics.frechet import (
    FeatureMoments,
    GaussianRoot,
    batch_moments,
    covariance,
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


class FrechetInfluence(NamedTuple):
    """A Fréchet distance, and the influence of each sample on it, f64[n] of mean 0."""

    value: float
    influence: NDArray[np.float64]


def frechet_influence(features: ArrayLike, reference: GaussianRoot) -> FrechetInfluence:
    """Fréchet distance of features f[n,d] to a Gaussian N(mu, R R^T), and its influence.

    With c = x - mean and K = R^T S R, Tr (S^1/2 sigma S^1/2)^1/2 = Tr K^1/2, whose
    gradient by S is R K^-1/2 R^T / 2. So psi = 2 (mean - mu).c + n / (n - 1) (|c|^2 -
    |K^-1/4 R^T c|^2), minus its mean. With fewer than d samples K^-1/2 is taken on the range of K.
    The reference counts as exact: no interval includes the error of its own finite count. Cost: one
    eigendecomposition and 2 n d rank multiply-adds. Raises UserError as `frechet_distance` does.
    """
    x = np.asarray(features)
    moments = no_moments(reference.mean.size)
    for start in range(0, len(x), BLOCK):
        moments = update(moments, x[start : start + BLOCK])
    values, vectors = np.linalg.eigh(_whitened(moments, reference))
    kept = _above_rounding(values)
    values, vectors = values[kept], vectors[:, kept]
    whiten = reference.root @ (vectors * values[None, :] ** -0.25)
    shift = moments.mean - reference.mean
    unbiased = len(x) / (len(x) - 1)
    psi = np.empty(len(x))
    for start in range(0, len(x), BLOCK):
        c = x[start : start + BLOCK].astype(np.float64) - moments.mean[None, :]
        psi[start : start + BLOCK] = 2 * (c @ shift) + unbiased * (
            (c**2).sum(axis=1) - ((c @ whiten) ** 2).sum(axis=1)
        )
    return FrechetInfluence(_distance(moments, reference, values), psi - psi.mean())


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
    reference: GaussianRoot,
    seed: int,
    levels: Sequence[int] = (1, 2, 3, 4),
    whole: FrechetInfluence | None = None,
) -> FrechetLimit:
    """Chong & Forsyth 2020: the intercept of a line through distances at several N, over 1/N.

    features f[n,d] are shuffled by seed. The paper draws a subset for each N. Here level m is the
    mean over m disjoint blocks of n / m samples, so every sample counts once at every level and
    the error that levels share cancels from the slope. The standard error combines the sampling
    error of n samples and the difference between the intercepts of a parabola and of the line. The
    latter dominates where blocks are not many times d, because the bias is not linear in 1/N there.
    The limit is the distance to the reference as given, which its finite count biases. Cost: a pass
    over the features, and sum(levels) times the eigenvalues. `whole` is what `frechet_influence`
    gave, if it is known. Raises UserError for fewer than three levels, or a block of d samples or
    fewer.
    """
    x = np.asarray(features)
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
    whole = whole or frechet_influence(x, reference)
    distances = _mean_distances(x[order], reference, levels, whole.value)
    sizes, y = len(x) / np.array(levels, np.float64), np.array(distances)
    # Fit powers of n / N, which are near 1.
    powers = np.array(levels, np.float64)[:, None] ** np.arange(3)[None, :]
    line, *_ = np.linalg.lstsq(powers[:, :2], y, rcond=None)
    parabola, *_ = np.linalg.lstsq(powers, y, rcond=None)
    variance = whole.influence.var() / len(x) + (parabola[0] - line[0]) ** 2
    return FrechetLimit(float(line[0]), float(np.sqrt(variance)), float(line[1]) * len(x), sizes, y)


def _mean_distances(
    x: NDArray[np.floating], reference: GaussianRoot, levels: Sequence[int], whole: float
) -> list[float]:
    """The mean distance of each level's blocks, of which level 1 has `whole`.

    The blocks of all levels are made of the same pieces, whose moments are computed once.
    """
    ends = {level: [0, *np.cumsum([len(b) for b in np.array_split(x, level)])] for level in levels}
    cuts = sorted(set().union(*ends.values()))
    pieces: dict[int, FeatureMoments] = {}
    for first, last in pairwise(cuts):
        pieces[first] = no_moments(reference.mean.size)
        for start in range(first, last, BLOCK):
            part = batch_moments(x[start : min(start + BLOCK, last)])
            pieces[first] = merge(pieces[first], part)

    def distance(first: int, last: int) -> float:
        moments = reduce(merge, [pieces[at] for at in cuts if first <= at < last])
        values = np.asarray(np.linalg.eigvalsh(_whitened(moments, reference)), np.float64)
        return _distance(moments, reference, values[_above_rounding(values)])

    return [
        float(np.mean([distance(*block) for block in pairwise(ends[level])]))
        if level > 1
        else whole
        for level in levels
    ]


def _whitened(moments: FeatureMoments, reference: GaussianRoot) -> NDArray[np.float64]:
    """K = R^T S R, whose eigenvalues are the squares of what `root_distance` sums.

    Small ones are accurate to 1e-8 of the largest instead of 1e-16. The sampling error is far
    larger.
    """
    if moments.mean.shape != reference.mean.shape:
        raise UserError(
            f"features of {moments.mean.size} and {reference.mean.size} dimensions: both sets must"
            " come from the same layer of the same network."
        )
    return np.asarray(reference.root.T @ covariance(moments) @ reference.root)


def _above_rounding(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    return values > values.size * np.finfo(np.float64).eps * np.abs(values).max(initial=0.0)


def _distance(
    moments: FeatureMoments, reference: GaussianRoot, values: NDArray[np.float64]
) -> float:
    """The distance, from the eigenvalues of K above rounding."""
    spread = np.trace(covariance(moments)) + reference.trace - 2 * np.sqrt(values).sum()
    return max(0.0, float(((moments.mean - reference.mean) ** 2).sum() + spread))
