"""Precision, recall, density, coverage and authenticity: which points lie in balls around others.

Squared distances are Gram matrices in float32 on the device, a block at a time, with a bound of
their rounding error. A block is computed once and answers every question on it. What the bound
leaves open, and all of small sets, is decided in float64 on the host: the results are those of
exact distances, at the speed of float32. Copies of an image are at distance 0 from each other, and
a point at the edge of a ball is inside.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

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
AT_ONCE = 2**18  # differences of features that are squared at once: the caches hold them

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


class Neighbourhoods(NamedTuple):
    """What the balls around the points of two sets say of both; `authentic` b[M] is of samples."""

    precision_recall: PrecisionRecall
    density_coverage: DensityCoverage
    authentic: NDArray[np.bool_]


def compare_neighbourhoods(
    reference: FeatureArray,
    samples: FeatureArray,
    k: int = 3,
    dc_k: int = 5,
    block: int = BLOCK_ROWS,
) -> Neighbourhoods:
    """`precision_recall` with k, `density_coverage` with dc_k and `authenticity`, in one pass.

    The distances of N points of the reference to M samples are computed once, not four times.
    Raises UserError as `precision_recall`.
    """
    reference, samples = _checked_sets(reference, samples, max(k, dc_k), block, "neighbourhoods")
    others = nearest_centres(reference, reference, max(k, dc_k) + 1, block)[0]
    nearest = _Nearest(samples, reference, 1)
    inside = _Balls(samples, reference, others[:, k])
    dense = _Balls(samples, reference, others[:, dc_k])
    back = _Balls(reference, samples, manifold_radii2(samples, k, block))
    _ask(samples, reference, (nearest, inside, dense, _Turned(back)), block)
    return Neighbourhoods(
        _precision_recall(inside.answer()[0], back.answer()[0]),
        _density_coverage(*dense.answer(), dc_k),
        _authentic(*nearest.answer(), others[:, 1]),
    )


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
    return _precision_recall(in_reference, in_samples)


def _precision_recall(in_reference: Indices, in_samples: Indices) -> PrecisionRecall:
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
    radii2 = manifold_radii2(reference, k, block)
    return _density_coverage(*count_balls(samples, reference, radii2, block), k)


def _density_coverage(counts: Indices, covered: NDArray[np.bool_], k: int) -> DensityCoverage:
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
    nearest = nearest_centres(samples, reference, 1, block)
    return _authentic(*nearest, manifold_radii2(reference, 1, block))


def _authentic(distances2: Distances, index: Indices, apart2: Distances) -> NDArray[np.bool_]:
    return distances2[:, 0] > apart2[index[:, 0]]


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
    nearest = _Nearest(points, centres, count)
    _ask(points, centres, (nearest,), block)
    return nearest.answer()


def count_balls(
    points: FeatureArray, centres: FeatureArray, radii2: Distances, block: int = BLOCK_ROWS
) -> tuple[Indices, NDArray[np.bool_]]:
    """How many balls hold each of points f[M,d], i64[M]; whether each holds any of them, b[N].

    Ball i is around centres f[N,d] row i, with the squared radius radii2 f64[N].
    """
    balls = _Balls(points, centres, radii2)
    _ask(points, centres, (balls,), block)
    return balls.answer()


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


@jax.jit
def _count_block(
    distances2: jax.Array,
    x_norm2: jax.Array,
    y_norm2: jax.Array,
    radii2: jax.Array,
    slack: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of rows and balls: how many are surely inside i32[B], b[C], and whether one is undecided."""
    scale = x_norm2[:, None] + y_norm2[None, :]
    gap = radii2[None, :] - distances2
    inside = gap > slack * scale
    unsure = (jnp.abs(gap) <= slack * scale) & jnp.isfinite(scale)
    return inside.sum(1, dtype=jnp.int32), inside.any(0), unsure.any(1), unsure.any(0)


# ---- questions


class _Question(Protocol):
    """What is asked of all distances; `begin` and `add` are called for sets that are not small."""

    def begin(self, rows: Sequence[_Block], columns: Sequence[_Block]) -> None: ...
    def add(self, a: int, b: int, distances2: jax.Array) -> None: ...


def _ask(
    points: FeatureArray, centres: FeatureArray, questions: Sequence[_Question], block: int
) -> None:
    """Show each question the distances of every block of points to every block of centres.

    Of one array, each pair of blocks is computed once and shown from both sides. Small sets are
    shown to none.
    """
    if len(points) * len(centres) <= ON_HOST:
        return
    centre, same = _centre(centres), points is centres
    columns = _blocks(centres, centre, block)
    rows = columns if same else _blocks(points, centre, block)
    for question in questions:
        question.begin(rows, columns)
    for a, r in enumerate(rows):
        for b in range(a if same else 0, len(columns)):
            c = columns[b]
            d2 = _distances2(r.x, r.norm2, c.x, c.norm2)
            for question in questions:
                question.add(a, b, d2)
                if same and b > a:
                    question.add(b, a, d2.T)


class _Turned:
    """A question on the distances of centres to points."""

    def __init__(self, question: _Question) -> None:
        self._question = question

    def begin(self, rows: Sequence[_Block], columns: Sequence[_Block]) -> None:
        self._question.begin(columns, rows)

    def add(self, a: int, b: int, distances2: jax.Array) -> None:
        self._question.add(b, a, distances2.T)


class _Nearest:
    """Which `count` of centres are the nearest to each of points, as `nearest_centres`."""

    def __init__(self, points: FeatureArray, centres: FeatureArray, count: int) -> None:
        self._points, self._centres, self._count = points, centres, count
        self._kept = min(count + SPARE, len(centres))
        self._rows: Sequence[_Block] = ()

    def begin(self, rows: Sequence[_Block], columns: Sequence[_Block]) -> None:
        self._rows, self._columns = rows, columns
        self._best = [jnp.full((len(r.x), self._kept), -jnp.inf) for r in rows]
        self._index = [jnp.zeros((len(r.x), self._kept), jnp.int32) for r in rows]

    def add(self, a: int, b: int, distances2: jax.Array) -> None:
        first = jnp.int32(self._columns[b].first)
        self._best[a], self._index[a] = _merge(self._best[a], self._index[a], distances2, first)

    def answer(self) -> tuple[Distances, Indices]:
        points, centres, kept, count = self._points, self._centres, self._kept, self._count
        if not self._rows:
            found = _nearest_on_host(points, centres, kept)
        else:
            index = [np.asarray(each) for each in self._index]
            found = np.concatenate(index)[: len(points)].astype(np.int64)
        distances2, found = _sorted_exactly(points, centres, found)
        if self._rows and kept < len(centres):
            # Nothing that was left out can be nearer than the last that is asked for.
            unsure = np.flatnonzero(~(distances2[:, count - 1] <= self._farther2()))
            again = _nearest_on_host(points[unsure], centres, kept)
            distances2[unsure], found[unsure] = _sorted_exactly(points[unsure], centres, again)
        return distances2[:, :count], found[:, :count]

    def _farther2(self) -> Distances:
        """A bound below the squared distances of what was left out, f64[M]."""
        M, d = self._points.shape
        last = -np.concatenate([np.asarray(each)[:, -1] for each in self._best])[:M]
        norm2 = _norms2(self._rows)[:M]
        largest = float(_norms2(self._columns)[: len(self._centres)].max())
        return last.astype(np.float64) - _slack(d) * (norm2 + largest)


class _Balls:
    """How many balls hold each of points, and whether each holds one, as `count_balls`."""

    def __init__(self, points: FeatureArray, centres: FeatureArray, radii2: Distances) -> None:
        self._points, self._centres, self._radii2 = points, centres, radii2
        self._found: dict[str, list[Any]] = {}

    def begin(self, rows: Sequence[_Block], columns: Sequence[_Block]) -> None:
        self._rows, self._columns = rows, columns
        radii = np.zeros(sum(len(c.x) for c in columns), np.float32)
        radii[: len(self._radii2)] = self._radii2
        self._radii = [jnp.asarray(radii[c.first : c.first + len(c.x)]) for c in columns]
        self._found = {
            "counts": [0] * len(rows),
            "holds": [False] * len(columns),
            "open_points": [False] * len(rows),
            "open_balls": [False] * len(columns),
        }

    def add(self, a: int, b: int, distances2: jax.Array) -> None:
        norms = self._rows[a].norm2, self._columns[b].norm2
        slack = _slack(self._points.shape[1])
        inside, held, rows, balls = _count_block(distances2, *norms, self._radii[b], slack)
        found = self._found
        found["counts"][a] += inside
        found["holds"][b] |= held
        found["open_points"][a] |= rows
        found["open_balls"][b] |= balls

    def sure(self) -> tuple[Indices, NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
        """What is decided: counts i64[M], holds b[N]; then the points and balls that are open."""
        M, N = len(self._points), len(self._centres)
        if not self._found:
            return np.zeros(M, np.int64), np.zeros(N, bool), np.ones(M, bool), np.ones(N, bool)
        each = {name: np.concatenate(list(map(np.asarray, x))) for name, x in self._found.items()}
        counts, holds = each["counts"][:M].astype(np.int64), each["holds"][:N]
        return counts, holds, each["open_points"][:M], each["open_balls"][:N]

    def answer(self) -> tuple[Indices, NDArray[np.bool_]]:
        points, centres, radii2 = self._points, self._centres, self._radii2
        counts, holds, open_points, open_balls = self.sure()
        rows, balls = np.flatnonzero(open_points), np.flatnonzero(open_balls & ~holds)
        for at, inside in _inside_on_host(points[rows], centres, radii2):
            counts[rows[at]] = inside.sum(axis=1)
            holds |= inside.any(axis=0)
        balls = balls[~holds[balls]]
        for _, inside in _inside_on_host(points, centres[balls], radii2[balls]):
            holds[balls] |= inside.any(axis=0)
        return counts, holds


def _norms2(blocks: Sequence[_Block]) -> Distances:
    return np.concatenate([np.asarray(each.norm2) for each in blocks]).astype(np.float64)


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
    rows = max(1, AT_ONCE // max(1, index.shape[1] * points.shape[1]))
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
        step = max(1, AT_ONCE // points.shape[1])
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
    apart = (x.astype(np.float64) - y.astype(np.float64)).reshape(-1, x.shape[-1])
    # One order of summing, whatever the shape: two distances of one pair are the same number.
    return np.einsum("nd,nd->n", apart, apart).reshape(np.broadcast_shapes(x.shape, y.shape)[:-1])


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
