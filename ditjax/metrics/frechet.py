"""The Fréchet distance between the Gaussians of two feature sets, and their streaming moments.

It is FID (Heusel et al. 2017, Eq. 6) only if the features are the pool_3 activations of the 2015
Inception graph. With other features it is named after them, for example FD-digits.

Everything is float64 NumPy on the host: thousands of nearly dependent features have eigenvalues far
below the float32 rounding error of the largest, and float64 in JAX is float32 unless x64 is on.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditjax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Count n, mean f64[d] and centred second moment m2 = sum (x - mean)(x - mean)^T, f64[d,d]."""

    count: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]


class GaussianRoot(NamedTuple):
    """A Gaussian as its mean f64[d], R f64[d,rank] with R R^T its covariance, and Tr R R^T."""

    mean: NDArray[np.float64]
    root: NDArray[np.float64]
    trace: float


def no_moments(dimensions: int) -> FeatureMoments:
    """The moments of no sample: the neutral element of `merge`."""
    return FeatureMoments(0, np.zeros(dimensions), np.zeros((dimensions, dimensions)))


def batch_moments(features: ArrayLike) -> FeatureMoments:
    """Two-pass moments of one batch of features f[n,d].

    Raises UserError unless features are a finite [n,d] array.
    """
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or x.shape[1] == 0:
        raise UserError(f"features of shape {x.shape}: expected [samples, dimensions].")
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if bad.size:
        raise UserError(
            f"{bad.size} of {len(x)} feature rows are not finite (first: row {bad[0]}): the images"
            " or the network diverged; inspect those samples before scoring."
        )
    if len(x) == 0:
        return no_moments(x.shape[1])
    mean = x.mean(axis=0)
    centred = x - mean[None, :]
    return FeatureMoments(len(x), mean, centred.T @ centred)


def merge(a: FeatureMoments, b: FeatureMoments) -> FeatureMoments:
    """Chan, Golub & LeVeque 1979: m2 = m2_a + m2_b + (n_a n_b / n) delta delta^T.

    Up to rounding this equals one pass over both sets, in any order and grouping. Raises UserError
    if the dimensions differ.
    """
    _check_dimensions(a.mean, b.mean)
    count = a.count + b.count
    if count == 0:
        return a
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    m2 = a.m2 + b.m2 + np.outer(delta, delta) * (a.count * b.count / count)
    return FeatureMoments(count, mean, m2)


def update(moments: FeatureMoments, features: ArrayLike) -> FeatureMoments:
    """Add a batch of features f[n,d] to moments; n may be 0."""
    return merge(moments, batch_moments(features))


def covariance(moments: FeatureMoments) -> NDArray[np.float64]:
    """Unbiased covariance m2 / (n - 1), f64[d,d]. Raises UserError for fewer than 2 samples."""
    if moments.count < 2:
        raise UserError(
            f"{moments.count} samples have no covariance: a Fréchet distance needs at least 2 in"
            " each set, and thousands to be meaningful."
        )
    return moments.m2 / (moments.count - 1)


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """Dowson & Landau 1982: `gaussian_frechet_distance` of the Gaussians fitted to two sets.

    Its expectation exceeds the distance of the distributions by O(1/n), so only compare distances
    of equal counts. Raises UserError for fewer than 2 samples in a set, or different dimensions.
    """
    return gaussian_frechet_distance(a.mean, covariance(a), b.mean, covariance(b))


def gaussian_frechet_distance(
    mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike
) -> float:
    """`root_distance` of Gaussians with means f[d] and covariances f[d,d], and what it raises."""
    return root_distance(gaussian_root(mu1, sigma1), gaussian_root(mu2, sigma2))


def root_distance(a: GaussianRoot, b: GaussianRoot) -> float:
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2).

    With S1 = U diag(l) U^T and S2 = V diag(m) V^T, the trace of the square root is the sum of the
    singular values of diag(l)^1/2 U^T V diag(m)^1/2. No squared rounding error is under a root, so
    this is accurate for singular covariances, where the usual sqrtm(S1 S2) is not.
    Raises UserError for different dimensions.
    """
    (mean1, root1, trace1), (mean2, root2, trace2) = a, b
    _check_dimensions(mean1, mean2)
    cross = (
        np.linalg.svd(root1.T @ root2, compute_uv=False).sum() if root1.size and root2.size else 0.0
    )
    distance = np.sum((mean1 - mean2) ** 2) + trace1 + trace2 - 2.0 * cross
    # Rounding can make the distance of equal Gaussians negative.
    return max(0.0, float(distance))


def gaussian_root(mu: ArrayLike, sigma: ArrayLike) -> GaussianRoot:
    """Factor a Gaussian with mu f[d], sigma f[d,d].

    R R^T = sigma; eigenvalues below rounding are dropped. Raises UserError for wrong shapes, values
    that are not finite, and matrices that are not covariances.
    """
    mean, cov = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
    if mean.ndim != 1 or mean.size == 0 or cov.shape != (mean.size, mean.size):
        raise UserError(
            f"a Gaussian with a mean of shape {mean.shape} and a covariance of shape {cov.shape}:"
            " expected [d] and [d, d]."
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise UserError("a Gaussian's mean or covariance is not finite: recompute its features.")
    scale = np.abs(cov).max()
    if not np.allclose(cov, cov.T, rtol=0.0, atol=1e-8 * scale):
        raise UserError("a covariance is not symmetric: check the sigma of the file.")
    values, vectors = np.linalg.eigh(0.5 * (cov + cov.T))
    # eigh is backward stable: below d * eps * |largest| an eigenvalue is a rounded zero.
    noise = mean.size * np.finfo(np.float64).eps * np.abs(values).max()
    # Files written in float32 have its rounding errors, hence the wider bound on negative values.
    if values[0] < -1e-5 * np.abs(values).max():
        raise UserError(
            f"a covariance has the eigenvalue {values[0]:.3g}: expected none below zero."
        )
    kept = values > noise
    root = vectors[:, kept] * np.sqrt(values[kept])[None, :]
    return GaussianRoot(mean, root, float(values[kept].sum()))


def _check_dimensions(mean1: NDArray[np.float64], mean2: NDArray[np.float64]) -> None:
    if mean1.shape != mean2.shape:
        raise UserError(
            f"features of {mean1.size} and {mean2.size} dimensions: both sets must come from the"
            " same layer of the same network."
        )
