"""Speed of the metrics of two feature sets beside their definitions in float64 NumPy.

    python -m tests.metrics.speed [--samples=50000] [--reference=10000] [--dimensions=2048]
        [--subsets=100] [--directions=1000]

Prints seconds of CPU and of the clock of both, their ratio, and the largest difference of values.
What compiles is compiled before. 50,000 samples take half an hour on two cores; with fewer, what is
not a product of matrices weighs more, and ditjax gains less.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ditjax.metrics import frechet, neighbours, scores, sliced, uncertainty

BLOCK = 2000
Seconds = tuple[float, float]


def smooth_features(count: int, seed: int, dimensions: int) -> np.ndarray:
    """f32[count,d] near a manifold of 24 dimensions, at least 0 as Inception's are."""
    mixing = np.random.default_rng(1)
    first = mixing.normal(size=(24, 256)) / 24**0.5
    second = mixing.normal(size=(256, dimensions)) / 16
    rng = np.random.default_rng(seed)
    hidden = np.tanh((1 + 0.05 * seed) * rng.normal(size=(count, 24)) @ first)
    noise = 0.05 * rng.normal(size=(count, dimensions))
    return np.maximum(hidden @ second + noise, 0).astype(np.float32) / 2


# ---- the definitions


def distances2(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x.astype(np.float64), y.astype(np.float64)
    found = (x**2).sum(1)[:, None] + (y**2).sum(1)[None, :] - 2 * (x @ y.T)
    return np.maximum(found, 0)


def nearest2(x: np.ndarray, y: np.ndarray, k: int) -> np.ndarray:
    """Squared distances to the k + 1 nearest, f64[n,k+1], nearest first."""
    found = []
    for rows in np.array_split(x, -(-len(x) // BLOCK)):
        best = np.full((len(rows), k + 1), np.inf)
        for columns in np.array_split(y, -(-len(y) // BLOCK)):
            both = np.concatenate([best, distances2(rows, columns)], axis=1)
            best = np.partition(both, k, axis=1)[:, : k + 1]
        found.append(np.sort(best, axis=1))
    return np.concatenate(found)


def inside(points: np.ndarray, centres: np.ndarray, radii2: np.ndarray) -> np.ndarray:
    rows = np.array_split(points, -(-len(points) // BLOCK))
    return np.concatenate([distances2(r, centres) <= radii2[None, :] for r in rows])


def plain_neighbourhoods(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Precision, recall, density, coverage and authenticity, each by itself."""
    precision = inside(x, y, nearest2(y, y, 3)[:, 3]).any(1).mean()
    recall = inside(y, x, nearest2(x, x, 3)[:, 3]).any(1).mean()
    balls = inside(x, y, nearest2(y, y, 5)[:, 5])
    own = nearest2(y, y, 1)[:, 1]
    parts = np.array_split(x, -(-len(x) // BLOCK))
    between = [distances2(part, y) for part in parts]
    authentic = np.mean(np.concatenate([d.min(1) > own[d.argmin(1)] for d in between]))
    return np.array([precision, recall, balls.sum(1).mean() / 5, balls.any(0).mean(), authentic])


def our_neighbourhoods(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    pr, dc, authentic = neighbours.compare_neighbourhoods(y, x)
    return np.array([pr.precision, pr.recall, dc.density, dc.coverage, authentic.mean()])


def plain_kid(x: np.ndarray, y: np.ndarray, subsets: Any) -> np.ndarray:
    """KID, and the influence of every sample by the first pair of subsets."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a.astype(np.float64) @ b.astype(np.float64).T / a.shape[1] + 1) ** 3

    def within(a: np.ndarray) -> float:
        k = kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))

    values = [within(x[i]) + within(y[j]) - 2 * kernel(x[i], y[j]).mean() for i, j in subsets]
    parts = np.array_split(x, -(-len(x) // BLOCK))
    i, j = subsets[0]
    psi = [kernel(p, x[i]).mean(1) - kernel(p, y[j]).mean(1) for p in parts]
    assert len(np.concatenate(psi)) == len(x)
    return np.array([np.mean(values)])


def our_kid(x: np.ndarray, y: np.ndarray, subsets: Any) -> np.ndarray:
    scores.kid_influence(x, y, subsets[0])
    return np.array([scores.kid(x, y, subsets)[0]])


def plain_mind(x: np.ndarray, y: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """The value alone, by quantiles at every step of either set."""
    n, m = len(x), len(y)
    steps = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    weights = np.diff(steps) / (n * m)
    of_x, of_y = steps[:-1] // m, steps[:-1] // n
    a, b = (np.sort(directions @ features.astype(np.float64).T, axis=1) for features in (x, y))
    return np.array([((a[:, of_x] - b[:, of_y]) ** 2 @ weights).mean()])


def our_mind(x: np.ndarray, y: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """The value, and the influence of every sample."""
    return np.array([sliced.sliced_wasserstein2(x, y, directions).value])


def plain_resample(x: np.ndarray, mu: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """One Fréchet distance; a bootstrap takes as many as it has resamples, here 1,000."""
    x = x.astype(np.float64)
    return np.array([frechet.gaussian_frechet_distance(x.mean(0), np.cov(x.T), mu, sigma)])


def our_bootstrap(x: np.ndarray, mu: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """A Fréchet distance and the interval of 1,000 resamples."""
    found = uncertainty.frechet_influence(x, frechet.gaussian_root(mu, sigma))
    return np.array([uncertainty.bootstrap_interval(*found, 0).value])


def timed(run: Callable[[], np.ndarray]) -> tuple[np.ndarray, Seconds]:
    cpu, clock = time.process_time(), time.perf_counter()
    found = run()
    return found, (time.process_time() - cpu, time.perf_counter() - clock)


def compared(title: str, plain: Callable[[], np.ndarray], ours: Callable[[], np.ndarray]) -> None:
    theirs, plainly = timed(plain)
    found, here = timed(ours)
    print(
        f"{title:<34} NumPy {plainly[0]:8.2f} s of CPU, {plainly[1]:8.2f} s;"
        f" ditjax {here[0]:8.2f}, {here[1]:8.2f}; ratio {here[0] / plainly[0]:.3f},"
        f" {here[1] / plainly[1]:.3f}; values differ by {np.abs(theirs - found).max():.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        *(("samples", 50_000), ("reference", 10_000), ("dimensions", 2048)),
        *(("subsets", 100), ("directions", 1000)),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    x = smooth_features(args.samples, 1, args.dimensions)
    y = smooth_features(args.reference, 0, args.dimensions)
    size = min(1000, len(x), len(y))
    subsets = list(scores.random_subsets(len(x), len(y), args.subsets, size, 0))
    directions = sliced.random_directions(args.directions, args.dimensions, 0)
    mu, sigma = y.mean(0, dtype=np.float64), np.cov(y.T.astype(np.float64))
    our_neighbourhoods(y, x)  # compiles
    our_kid(x, y, subsets[:1])
    compared(
        "precision, recall, density, ...",
        lambda: plain_neighbourhoods(y, x),
        lambda: our_neighbourhoods(y, x),
    )
    compared("KID", lambda: plain_kid(x, y, subsets), lambda: our_kid(x, y, subsets))
    compared(
        "MIND (NumPy without an interval)",
        lambda: plain_mind(x, y, directions),
        lambda: our_mind(x, y, directions),
    )
    compared(
        "FD, 1,000 resamples (NumPy: 1)",
        lambda: plain_resample(x, mu, sigma),
        lambda: our_bootstrap(x, mu, sigma),
    )


if __name__ == "__main__":
    main()
