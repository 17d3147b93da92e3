"""Resampling of images by two fixed matrices, y = A x Aᵀ: the same for data and for sampling."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.errors import UserError


def _area(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(np.float64)


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys 1981 with a = -1/2."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


KERNELS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {"area": _area, "bicubic": _bicubic}


def resampling_matrix(kernel: str, old: int, new: int) -> np.ndarray:
    """The matrix A f64[new, old] that resamples `old` pixels of a line to `new`.

    A shrinking kernel is stretched over the pixels that it averages, and weights beyond the border
    are left out, as in Pillow's `resize`. 'area' is its BOX: means of pixels.
    """
    if kernel not in KERNELS:
        raise UserError(f"kernel {kernel!r}: expected one of {', '.join(KERNELS)}.")
    scale = old / new
    centre = (np.arange(new) + 0.5) * scale
    weights = KERNELS[kernel]((np.arange(old) + 0.5 - centre[:, None]) / max(scale, 1.0))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def resized(x: jax.Array | np.ndarray, side: int, kernel: str) -> jax.Array:
    """Resample images f32[B,H,W,C] -> f32[B,side,side,C]."""
    image = jnp.asarray(x)
    rows, columns = (
        jnp.asarray(resampling_matrix(kernel, n, side), image.dtype) for n in image.shape[1:3]
    )
    return jnp.einsum("ij,bjkc,lk->bilc", rows, image, columns, precision="highest")


def blurred(x: jax.Array, sigma: jax.Array, radius: jax.Array) -> jax.Array:
    """Blur images f32[B,H,W,C] by Gaussians of deviation sigma f32[B] pixels, cut at radius i[B].

    Weights beyond the border are left out, as in `resampling_matrix`, so that a constant image
    stays as it is. A sigma of 0 changes nothing.
    """

    def matrix(n: int) -> jax.Array:
        apart = jnp.abs(jnp.arange(n)[:, None] - jnp.arange(n)[None])[None]
        width = jnp.maximum(sigma, 1e-3)[:, None, None]
        weights = jnp.exp(-0.5 * (apart / width) ** 2) * (apart <= radius[:, None, None])
        return weights / weights.sum(-1, keepdims=True)

    rows, columns = (matrix(n) for n in x.shape[1:3])
    return jnp.einsum("bij,bjkc,blk->bilc", rows, x, columns, precision="highest")
