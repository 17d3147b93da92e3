"""Precision, recall, density, coverage and authenticity: which points lie in balls around others.

Squared distances are Gram matrices in float32 on the device, a block at a time, with a bound of
their rounding error. What the bound leaves open, and all of small sets, is decided in float64 on
the host: the results are those of exact distances, at the speed of float32. Copies of an image are
at distance 0 from each other, and a point at the edge of a ball is inside.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from ditjax.errors import UserError
from ditjax.metrics.scores import FeatureArray, Indices, check_pair

BLOCK_ROWS = 4096  # rows and columns of a Gram matrix: 64 MiB in float32
ON_HOST = 2**22  # pairs of points that are compared on the host at once, and without the device
FILL = 64  # of which the size of a block is a multiple, so that few shapes are compiled
GROUP = 32  # columns of which first only the nearest is looked at
SPARE = 4  # candidates beyond the neighbours that are asked for

Distances = NDArray[np.float64]


class PrecisionRecall(NamedTuple):
    """Precision and recall in [0,1], the means of `in_reference` b[M] and `in_samples` b[N]."""

    precision: float
    recall: float
    in_reference: NDArray[np.bool_]
    in_samples: NDArray[np.bool_]


class DensityCoverage(NamedTuple):
    """Density from 0, and coverage in [0,1]: the means of `balls` f64[M] and `covered` b[N]."""

    density: float
    coverage: float
    balls: NDArray[np.float64]
    covered: NDArray[np.bool_]


def precision_recall(
    reference: FeatureArray, samples: FeatureArray, k: int = 3, block: int = BLOCK_ROWS
) -> PrecisionRecall:
    """Kynkäänniemi et al. 2019, Eq. 2: the share of samples in the reference's manifold, and back.

    reference f[N,d], samples f[M,d]. A manifold is the union of the balls around its points, each
    with a radius of the distance to the k-th nearest other point. ADM uses k=3, all samples and a
    reference of 10,000. Memory: a few times block^2 float32 numbers, whatever N and M are.

    ADM rounds distances to float16, which moves points across the edge of a ball and changes the
    numbers by about 5e-4. torch-fidelity rounds to float32, which makes no difference.
    Raises UserError for features that differ in dimensions or are not finite, or k points or fewer.
    """
    reference, samples = _checked_sets(reference, samples, k, block, "precision and recall")
    in_reference, _ = count_balls(samples, reference, manifold_radii2(reference, k, block), block)
    in_samples, _ = count_balls(reference, samples, manifold_radii2(samples, k, block), block)
    inside, back = in_reference > 0, in_samples > 0
    return PrecisionRecall(float(inside.mean()), float(back.mean()), inside, back)


def density_coverage(
    reference: FeatureArray, samples: FeatureArray, k: int = 5, block: int = BLOCK_ROWS
) -> DensityCoverage:
    """Naeem et al. 2020, Eqs. 4 and 5: how many balls hold a sample, how many balls hold one.

    reference f[N,d], samples f[M,d]. The balls are around the reference's points, to the k-th
    nearest other. Density is the mean over samples of the balls that hold it, over k; it is not
    bounded by 1. Coverage is the share of balls with a sample inside. Of equal distributions
    density is 1, and coverage 1 - 2^-k for many points. Raises UserError as `precision_recall`.
    """
    reference, samples = _checked_sets(reference, samples, k, block, "density and coverage")
    counts, covered = count_balls(samples, reference, manifold_radii2(reference, k, block), block)
    balls = counts / k
    return DensityCoverage(float(balls.mean()), float(covered.mean()), balls, covered)


def authenticity(
    reference: FeatureArray, samples: FeatureArray, block: int = BLOCK_ROWS
) -> NDArray[np.bool_]:
    """Alaa et al. 2022, Sec. 3.2: whether each sample is no near copy of a reference point, b[M].

    reference f[N,d], samples f[M,d]. A sample is authentic if it is farther from the nearest point
    of the reference than that point is from its nearest other. Copies of the reference have a mean
    of 0; that of unseen images is no constant, and is measured on held-out ones.
    Raises UserError as `precision_recall`.
    """
    reference, samples = _checked_sets(reference, samples, 1, block, "authenticity")
    distances2, index = nearest_centres(samples, reference, 1, block)
    apart = manifold_radii2(reference, 1, block)
    return distances2[:, 0] > apart[index[:, 0]]


def manifold_radii2(features: FeatureArray, k: int, block: int = BLOCK_ROWS) -> Distances:
    """Squared distance of each of features f[N,d] to its k-th nearest other, f64[N]."""
    # A point is its own nearest, at distance 0: the k-th other is the (k+1)-th.
    return nearest_centres(features, features, k + 1, block)[0][:, k]


def nearest_centres(
    points: FeatureArray, centres: FeatureArray, count: int, block: int = BLOCK_ROWS
) -> tuple[Distances, Indices]:
    """The `count` nearest of centres f[N,d] to each of points f[M,d].

    Returns squared distances f64[M,count] and indices i64[M,count], nearest first. If both arrays
    are the same, half of the work is saved.
    """
    kept = min(count + SPARE, len(centres))
    if len(points) * len(centres) <= ON_HOST:
        found = _nearest_on_host(points, centres, kept)
    else:
        found, farther2 = _nearest_on_device(points, centres, kept, block)
    distances2, found = _sorted_exactly(points, centres, found)
    if len(points) * len(centres) > ON_HOST and kept < len(centres):
        # Nothing that was left out can be nearer than the last that is asked for.
        unsure = np.flatnonzero(~(distances2[:, count - 1] <= farther2))
        again = _nearest_on_host(points[unsure], centres, kept)
        distances2[unsure], found[unsure] = _sorted_exactly(points[unsure], centres, again)
    return distances2[:, :count], found[:, :count]


def count_balls(
    points: FeatureArray, centres: FeatureArray, radii2: Distances, block: int = BLOCK_ROWS
) -> tuple[Indices, NDArray[np.bool_]]:
    """How many balls hold each of points f[M,d], i64[M]; whether each holds any of them, b[N].

    Ball i is around centres f[N,d] row i, with the squared radius radii2 f64[N].
    """
    counts, holds = np.zeros(len(points), np.int64), np.zeros(len(centres), np.bool_)
    open_points, open_balls = np.ones(len(points), np.bool_), np.ones(len(centres), np.bool_)
    if len(points) * len(centres) > ON_HOST:
        counts, holds, open_points, open_balls = _counts_on_device(points, centres, radii2, block)
    rows, balls = np.flatnonzero(open_points), np.flatnonzero(open_balls & ~holds)
    for at, inside in _inside_on_host(points[rows], centres, radii2):
        counts[rows[at]] = inside.sum(axis=1)
        holds |= inside.any(axis=0)
    balls = balls[~holds[balls]]
    for _, inside in _inside_on_host(points, centres[balls], radii2[balls]):
        holds[balls] |= inside.any(axis=0)
    return counts, holds


# ---- on the device, in float32


class _Block(NamedTuple):
    """Rows from `first` on, centred and filled up: x f32[B,d]; |x|² f32[B], infinite in fillers."""

    first: int
    x: jax.Array
    norm2: jax.Array


def _blocks(features: FeatureArray, centre: Distances, block: int) -> list[_Block]:
    """Blocks of one size, at most `block`, with little to fill up."""
    count = -(-len(features) // block)
    size = min(block, -(-len(features) // (count * FILL)) * FILL)
    found = []
    for first in range(0, len(features), size):
        rows = features[first : first + size].astype(np.float64) - centre[None, :]
        x = np.zeros((size, features.shape[1]), np.float32)
        x[: len(rows)] = rows
        norm2 = np.full(size, np.inf, np.float32)
        norm2[: len(rows)] = (x[: len(rows)].astype(np.float64) ** 2).sum(axis=1)
        found.append(_Block(first, jnp.asarray(x), jnp.asarray(norm2)))
    return found


def _centre(features: FeatureArray) -> Distances:
    """A point among the features: distances are then no small differences of large numbers."""
    return np.asarray(features.mean(axis=0, dtype=np.float64))


def _slack(dimensions: int) -> np.float32:
    """The bound of the error of a squared distance, over |x|² + |y|²."""
    return np.float32(8 * np.finfo(np.float32).eps * np.sqrt(dimensions))


def _gram_distances2(
    x: jax.Array, x_norm2: jax.Array, y: jax.Array, y_norm2: jax.Array
) -> jax.Array:
    dots = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    return x_norm2[:, None] + y_norm2[None, :] - 2 * dots


_distances2 = jax.jit(_gram_distances2)


@jax.jit
def _merge(
    best: jax.Array, index: jax.Array, distances2: jax.Array, first: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The largest of best f32[B,c] and -distances2 f32[B,C], and the columns that they are of.

    The c nearest lie in the c groups of columns whose own nearest are the nearest: only these are
    sorted.
    """
    (B, C), c = distances2.shape, best.shape[1]
    columns = jax.lax.broadcasted_iota(jnp.int32, distances2.shape, 1)
    if C % GROUP == 0 and 4 * c * GROUP <= C:
        groups = distances2.reshape(B, C // GROUP, GROUP)
        _, nearest = jax.lax.top_k(-groups.min(2), c)
        distances2 = jnp.take_along_axis(groups, nearest[:, :, None], 1).reshape(B, c * GROUP)
        columns = nearest[:, :, None] * GROUP + jnp.arange(GROUP, dtype=jnp.int32)[None, None]
        columns = columns.reshape(B, c * GROUP)
    columns = first + columns
    values, at = jax.lax.top_k(jnp.concatenate([best, -distances2], 1), best.shape[1])
    return values, jnp.take_along_axis(jnp.concatenate([index, columns], 1), at, 1)


def _nearest_on_device(
    points: FeatureArray, centres: FeatureArray, kept: int, block: int
) -> tuple[Indices, Distances]:
    """The `kept` nearest of each point, i64[M,kept], and a bound below all other d², f64[M]."""
    centre, same = _centre(centres), points is centres
    columns = _blocks(centres, centre, block)
    rows = columns if same else _blocks(points, centre, block)
    best = [jnp.full((len(r.x), kept), -jnp.inf) for r in rows]
    index = [jnp.zeros((len(r.x), kept), jnp.int32) for r in rows]
    for a, r in enumerate(rows):
        for b, c in enumerate(columns):
            if same and b < a:
                continue
            d2 = _distances2(r.x, r.norm2, c.x, c.norm2)
            best[a], index[a] = _merge(best[a], index[a], d2, jnp.int32(c.first))
            if same and b > a:
                best[b], index[b] = _merge(best[b], index[b], d2.T, jnp.int32(r.first))
    found = np.concatenate([np.asarray(each) for each in index])[: len(points)].astype(np.int64)
    last = -np.concatenate([np.asarray(each)[:, -1] for each in best])[: len(points)]
    norm2 = np.concatenate([np.asarray(r.norm2) for r in rows])[: len(points)].astype(np.float64)
    largest = max(float(jnp.where(jnp.isfinite(c.norm2), c.norm2, 0).max()) for c in columns)
    return found, last.astype(np.float64) - _slack(points.shape[1]) * (norm2 + largest)


@jax.jit
def _count_block(
    x: jax.Array,
    x_norm2: jax.Array,
    y: jax.Array,
    y_norm2: jax.Array,
    radii2: jax.Array,
    slack: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of rows and balls: how many are surely inside i32[B], b[C], and whether one is undecided."""
    scale = x_norm2[:, None] + y_norm2[None, :]
    gap = radii2[None, :] - _gram_distances2(x, x_norm2, y, y_norm2)
    inside = gap > slack * scale
    unsure = (jnp.abs(gap) <= slack * scale) & jnp.isfinite(scale)
    return inside.sum(1, dtype=jnp.int32), inside.any(0), unsure.any(1), unsure.any(0)


def _counts_on_device(
    points: FeatureArray, centres: FeatureArray, radii2: Distances, block: int
) -> tuple[Indices, NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """`count_balls` of what float32 decides; then the points and the balls that it does not."""
    centre = _centre(centres)
    rows, columns = _blocks(points, centre, block), _blocks(centres, centre, block)
    counts = np.zeros((len(rows), len(rows[0].x)), np.int64)
    holds = np.zeros((len(columns), len(columns[0].x)), np.bool_)
    open_points, open_balls = np.zeros(counts.shape, np.bool_), np.zeros(holds.shape, np.bool_)
    radii = np.zeros(holds.size, np.float32)
    radii[: len(radii2)] = radii2
    slack = _slack(points.shape[1])
    for b, c in enumerate(columns):
        of_block = jnp.asarray(radii[c.first : c.first + len(c.x)])
        for a, r in enumerate(rows):
            found = _count_block(r.x, r.norm2, c.x, c.norm2, of_block, slack)
            inside, held, unsure_points, unsure_balls = (np.asarray(each) for each in found)
            counts[a] += inside
            holds[b] |= held
            open_points[a] |= unsure_points
            open_balls[b] |= unsure_balls
    M, N = len(points), len(centres)
    return (
        counts.reshape(-1)[:M],
        holds.reshape(-1)[:N],
        open_points.reshape(-1)[:M],
        open_balls.reshape(-1)[:N],
    )


# ---- on the host, in float64


def _nearest_on_host(points: FeatureArray, centres: FeatureArray, kept: int) -> Indices:
    found = np.empty((len(points), kept), np.int64)
    for at, distances2, _ in _float64_distances2(points, centres):
        found[at] = np.argpartition(distances2, kept - 1, axis=1)[:, :kept]
    return found


def _sorted_exactly(
    points: FeatureArray, centres: FeatureArray, index: Indices
) -> tuple[Distances, Indices]:
    """Squared distances of points to the centres index i64[M,c], from differences, and sorted."""
    distances2 = np.empty(index.shape)
    rows = max(1, 2 * ON_HOST // max(1, index.shape[1] * points.shape[1]))
    for first in range(0, len(points), rows):
        at = slice(first, first + rows)
        distances2[at] = _exact_distances2(points[at, None, :], centres[index[at]])
    order = np.argsort(distances2, axis=1, kind="stable")
    return np.take_along_axis(distances2, order, 1), np.take_along_axis(index, order, 1)


def _inside_on_host(
    points: FeatureArray, centres: FeatureArray, radii2: Distances
) -> Iterator[tuple[slice, NDArray[np.bool_]]]:
    """Some of the points, and whether each of the balls holds them, b[m,N]."""
    for at, distances2, noise in _float64_distances2(points, centres):
        inside = distances2 <= radii2[None, :]
        row, column = np.nonzero(np.abs(distances2 - radii2[None, :]) <= noise)
        step = max(1, 2 * ON_HOST // points.shape[1])
        for first in range(0, len(row), step):
            r, c = row[first : first + step], column[first : first + step]
            exact = _exact_distances2(points[at][r], centres[c])
            inside[r, c] = exact <= radii2[c]
        yield at, inside


def _float64_distances2(
    points: FeatureArray, centres: FeatureArray
) -> Iterator[tuple[slice, Distances, Distances]]:
    """Some of the points, their squared distances f64[m,N], and the bound of the error of each."""
    if not (len(points) and len(centres)):
        return
    centre = _centre(centres)
    y = centres.astype(np.float64) - centre[None, :]
    y_norm2 = (y**2).sum(axis=1)[None, :]
    rows = max(1, ON_HOST // len(centres))
    for first in range(0, len(points), rows):
        x = points[first : first + rows].astype(np.float64) - centre[None, :]
        scale = (x**2).sum(axis=1)[:, None] + y_norm2
        noise = 8 * np.finfo(np.float64).eps * np.sqrt(x.shape[1]) * scale
        yield slice(first, first + len(x)), scale - 2 * (x @ y.T), noise


def _exact_distances2(x: FeatureArray, y: FeatureArray) -> Distances:
    """Squared distances of rows, from their differences in float64: exactly 0 of copies."""
    return np.asarray(((x.astype(np.float64) - y.astype(np.float64)) ** 2).sum(axis=-1))


def _checked_sets(
    reference: FeatureArray, samples: FeatureArray, k: int, block: int, what: str
) -> tuple[FeatureArray, FeatureArray]:
    reference, samples = check_pair(reference, samples)
    for name, features in (("the reference", reference), ("the sample set", samples)):
        if not 1 <= k < len(features):
            raise UserError(
                f"{what} with k={k} of {len(features)} features in {name}: expected"
                " more than k of them, and k of at least 1."
            )
    if block < 1:
        raise UserError(f"block {block}: expected at least 1 row.")
    return reference, samples
