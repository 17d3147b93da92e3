"""What scores are taken of in tests: features that every environment can make again."""

import numpy as np

# Samples, reference, dimensions; not a multiple of any split or block.
SAMPLES, REFERENCE, DIMENSIONS, CLASSES = 403, 377, 24, 7
KID_SUBSETS, KID_SIZE = 5, 100
ISC_SPLITS = (1, 10)


def features(count: int, seed: int, dimensions: int = DIMENSIONS) -> np.ndarray:
    """f32[count,d], at least 0 as Inception's are, correlated, of unequal variances."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dimensions, dimensions)) / dimensions**0.5
    x = rng.normal(size=(count, dimensions)) * np.logspace(0, -1.5, dimensions)
    return np.maximum(x @ mixing + 0.1 + 0.02 * seed, 0).astype(np.float32)


def logits(count: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """f32[count,CLASSES], sorted by class, so that splits and shuffles matter."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, CLASSES)) + 3 * np.eye(CLASSES)[rng.integers(CLASSES, size=count)]
    return x[np.argsort(x.argmax(axis=1), kind="stable")].astype(np.float32)


def log_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """log p(y|x) of probabilities f[n,C] -> f64[n,C]; the logarithm of zero is -inf."""
    with np.errstate(divide="ignore"):
        return np.log(probabilities)


def even_splits(count: int, splits: int = 10, order: np.ndarray | None = None) -> np.ndarray:
    """The split of each sample i64[count] in torch-fidelity: borders at i count // splits.

    `order` i[count] shuffles first, as its `samples_shuffle` does: sample order[j] takes place j.
    """
    borders = np.arange(1, splits) * count // splits
    split = np.empty(count, np.int64)
    split[np.arange(count) if order is None else order] = np.searchsorted(
        borders, np.arange(count), side="right"
    )
    return split


def centred(count: int, seed: int, dimensions: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Mean f64[d] of count samples, and C f64[count,d] with C^T C their unbiased covariance."""
    x = features(count, seed, dimensions).astype(np.float64)
    return x.mean(axis=0), (x - x.mean(axis=0)) / (count - 1) ** 0.5


# Sample counts of two Gaussians in 64 dimensions: full rank, and fewer samples than dimensions.
GAUSSIANS = {"full": (900, 800), "one_singular": (40, 800), "both_singular": (40, 30)}


def gaussians(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    """mu1, sigma1, mu2, sigma2 of a case, and their distance by another road, exact to rounding.

    Tr (S1^1/2 S2 S1^1/2)^1/2 is the sum of singular values of C1 C2^T, [n1,n2]: no root of a
    singular matrix is taken.
    """
    (mu1, c1), (mu2, c2) = (centred(n, seed) for seed, n in enumerate(GAUSSIANS[name]))
    cross = np.linalg.svd(c1 @ c2.T, compute_uv=False).sum()
    distance = ((mu1 - mu2) ** 2).sum() + (c1**2).sum() + (c2**2).sum() - 2 * cross
    return mu1, c1.T @ c1, mu2, c2.T @ c2, float(distance)
