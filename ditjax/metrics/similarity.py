"""How alike two representations of the same images are: HSIC, and CKNNA of nearest neighbours."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditjax.errors import UserError

Kernel = NDArray[np.float64]


def unbiased_hsic(a: Kernel, b: Kernel) -> float:
    """Song et al. 2012 Eq. 5 of two kernels f64[n,n]; its expectation is 0 if they are independent.

    [Σ A∘Bᵀ + ΣA ΣB / ((n-1)(n-2)) - 2 Σ(AB) / (n-2)] / (n(n-3)), without the diagonals.
    Raises UserError for fewer than 4 rows.
    """
    n = len(a)
    if n < 4:
        raise UserError(f"HSIC of {n} images: expected at least 4.")
    a, b = (np.where(np.eye(n, dtype=bool), 0.0, each) for each in (a, b))
    product = float(a.sum(0) @ b.sum(1))
    trace = float((a * b.T).sum())
    means = float(a.sum() * b.sum()) / ((n - 1) * (n - 2))
    return (trace + means - 2 * product / (n - 2)) / (n * (n - 3))


def cknna(x: ArrayLike, y: ArrayLike, k: int = 10) -> float:
    """Huh et al. 2024 (arXiv:2405.07987): how alike the neighbourhoods of f[n,D] and f[n,E] are.

    Unbiased HSIC of the linear kernels, of pairs alone that are among the k nearest neighbours in
    both, divided by √(HSIC(K,K) HSIC(L,L)): 1 for features that agree up to a rotation, about 0 for
    independent ones. Rows are brought to unit length first, as a network's features grow with
    depth. Raises UserError for other than 1 <= k < n, and different n.
    """
    kernels = [_kernel(each) for each in (x, y)]
    n = len(kernels[0])
    if len(kernels[1]) != n or not 1 <= k < n:
        raise UserError(
            f"CKNNA of {n} and {len(kernels[1])} images with k={k}: expected as many of each, and"
            " more than k."
        )
    near = [_neighbours(each, k) for each in kernels]

    def similarity(i: int, j: int) -> float:
        both = near[i] & near[j]
        return unbiased_hsic(both * kernels[i], both * kernels[j])

    scale = similarity(0, 0) * similarity(1, 1)
    return similarity(0, 1) / (float(np.sqrt(max(scale, 0.0))) + 1e-6)


def _kernel(features: ArrayLike) -> Kernel:
    x = np.asarray(features, np.float64)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    x = x / np.where(length > 0, length, 1.0)
    return np.asarray(x @ x.T)


def _neighbours(kernel: Kernel, k: int) -> NDArray[np.bool_]:
    """Whether j is among the k nearest others of i: bool[n,n]."""
    others = np.where(np.eye(len(kernel), dtype=bool), -np.inf, kernel)
    nearest = np.argpartition(-others, k - 1, axis=1)[:, :k]
    found = np.zeros(kernel.shape, bool)
    np.put_along_axis(found, nearest, True, axis=1)
    return found
