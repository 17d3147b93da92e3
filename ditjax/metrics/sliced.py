"""The sliced Wasserstein distance of two feature sets, and MIND, which is a multiple of it.

In one dimension an optimal transport sorts both sets. Everything is float64 NumPy on the host.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditjax.errors import UserError
from ditjax.metrics.scores import FeatureArray, check_pair

DIRECTIONS = 1000
_AT_ONCE = 2**22  # projected numbers in memory


class SlicedDistance(NamedTuple):
    """A distance, and the influence of each sample on it, f64[n] of mean 0."""

    value: float
    influence: NDArray[np.float64]


def monge_distance(
    samples: FeatureArray, reference: FeatureArray, seed: int, directions: int = DIRECTIONS
) -> SlicedDistance:
    """Berthet et al. 2026 (arXiv:2605.06797): 3 d times the sliced Wasserstein distance W2².

    samples f[n,d], reference f[m,d]. It is MIND if the features are those of FID. For a shift by δ
    it is 3 |δ|², whatever d is. Counts may differ; the customary protocol has equal ones. Its
    expectation for equal distributions is above 0 by O(1/n), so only compare equal counts.
    Raises UserError for features that differ in dimensions or are not finite, or no direction.
    """
    samples, reference = check_pair(samples, reference)
    dimensions = samples.shape[1]
    found = sliced_wasserstein2(samples, reference, random_directions(directions, dimensions, seed))
    return SlicedDistance(3 * dimensions * found.value, 3 * dimensions * found.influence)


def random_directions(count: int, dimensions: int, seed: int) -> NDArray[np.float64]:
    """Unit vectors f64[count,d], uniform on the sphere. Raises UserError for none."""
    if count < 1:
        raise UserError(f"{count} directions: expected at least 1.")
    drawn = np.random.default_rng([seed, dimensions]).normal(size=(count, dimensions))
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))


def sliced_wasserstein2(
    x: FeatureArray, y: FeatureArray, directions: NDArray[np.float64]
) -> SlicedDistance:
    """Bonneel et al. 2015, Eq. 8: the mean over directions f64[L,d] of W2² of the projected sets.

    x f[n,d], y f[m,d]. W2² = ∫ (F⁻¹ - G⁻¹)², over the quantiles of both sets. The influence of x is
    the mean of the Kantorovich potentials φ, whose steps from one sorted point to the next are
    (a' - a) (a' + a - b' - b), b and b' the points of y on both sides of the quantile between them.
    """
    n, m = len(x), len(y)
    # All quantiles at which either set steps, times n m.
    steps = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    weights = np.diff(steps) / (n * m)
    of_x, of_y = steps[:-1] // m, steps[:-1] // n
    between = np.arange(1, n) * m
    below, above = (between - 1) // n, between // n
    x64, y64 = np.asarray(x, np.float64), np.asarray(y, np.float64)
    value, influence = 0.0, np.zeros(n)
    together = max(1, _AT_ONCE // (n + m))
    for start in range(0, len(directions), together):
        some = directions[start : start + together]
        # One direction at a time, whose numbers the caches hold.
        for projected, b in zip(some @ x64.T, np.sort(some @ y64.T, axis=1), strict=True):
            order = np.argsort(projected)
            a = projected[order]
            value += float((a[of_x] - b[of_y]) ** 2 @ weights)
            rises = np.diff(a) * (a[1:] + a[:-1] - b[below] - b[above])
            potential = np.concatenate([[0.0], np.cumsum(rises)])
            influence[order] += potential - potential.mean()
    return SlicedDistance(value / len(directions), influence / len(directions))
