"""Denoising: the mean of x0 given y = x0 + σ n by one evaluation, large images, and σ from y."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.diffusion.gaussian import Denoise
from ditjax.diffusion.losses import Objective
from ditjax.diffusion.process import Process, per_sample, precondition


def posterior_mean(
    denoise: Denoise, objective: Objective, y: jax.Array, sigma: jax.Array
) -> jax.Array:
    """Robbins 1956, Miyasawa 1961: E[x0 | y] = y + σ² ∇ log p(y), which is the network's x̂0.

    y f32[B,H,W,C] = x0 + σ n, sigma f32[B] above 0. The network is evaluated once, on α y, at the
    time where the process has σ_t/α_t = σ; a discrete process is interpolated between its steps.
    """
    process = objective.process
    t = process.time_of(sigma)
    p = precondition(process, objective.prediction, t, t_eps=objective.t_eps)
    alpha, c_in, c_skip, c_out = (
        per_sample(each, y.ndim) for each in (process.at(t).alpha, p.c_in, p.c_skip, p.c_out)
    )
    x = alpha * y
    # A learned variance, if the network has one, is not read.
    out = denoise(c_in * x, p.c_noise)[..., : y.shape[-1]].astype(y.dtype)
    return c_skip * x + c_out * out


def noise_range(process: Process, most: float = 1.0) -> tuple[float, float]:
    """The smallest and largest σ/α of a process up to a share `most` of its times."""
    with jax.ensure_compile_time_eval():  # also while a program is traced
        ends = np.array([float(process.from_unit(u)) for u in (0.0, most)])
    c = process.at(ends)
    with np.errstate(divide="ignore"):
        low, high = c.sigma / c.alpha
    return float(low), float(high)


def residual_noise(
    mean: Callable[[jax.Array, jax.Array], jax.Array],
    y: jax.Array,
    low: float,
    high: float,
    steps: int = 14,
) -> jax.Array:
    """The noise of images y f32[B,H,W,C] -> σ f32[B]: where rms(y - x̂0(σ)), what is removed, is σ.

    mean(y, σ f32[B]) -> x̂0. σ is found by bisection of ln σ, up to the deviation of y. It is less
    than the true noise σ_n by what the mean keeps of it: on Gaussian data of variances λ it solves
    mean σ²(λ + σ_n²)/(λ + σ²)² = 1, which is σ_n where λ is 0.
    """
    axes = tuple(range(1, y.ndim))
    most = jnp.clip(y.std(axes), low, high)
    ends = jnp.full_like(most, np.log(low)), jnp.log(most)

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        below, above = ends
        middle = (below + above) / 2
        removed = jnp.sqrt(jnp.square(y - mean(y, jnp.exp(middle))).mean(axes))
        larger = removed < jnp.exp(middle)
        return jnp.where(larger, below, middle), jnp.where(larger, middle, above)

    below, above = jax.lax.fori_loop(0, steps, halve, ends)
    return jnp.exp((below + above) / 2)


def in_windows(apply: Callable[[jax.Array], jax.Array], image: jax.Array, size: int) -> jax.Array:
    """Apply a function of windows f32[B,size,size,C] to an image f32[B,H,W,C], H and W >= size.

    Its outputs f32[B,size,size,K] become one of [B,H,W,K]. Windows overlap by half, by more at the
    lower and right border, and are averaged with Hann weights.
    """
    B, H, W, C = image.shape
    corners = np.array([(i, j) for i in _starts(H, size) for j in _starts(W, size)], np.int32)
    K = jax.eval_shape(apply, jax.ShapeDtypeStruct((B, size, size, C), image.dtype)).shape[-1]
    hann = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    weight, total = np.outer(hann, hann)[None, :, :, None], np.zeros((1, H, W, 1))
    for i, j in corners:
        total[:, i : i + size, j : j + size] += weight

    def add(result: jax.Array, corner: jax.Array) -> tuple[jax.Array, None]:
        i, j = corner
        at, window = (0, i, j, 0), jax.lax.dynamic_slice(image, (0, i, j, 0), (B, size, size, C))
        done = apply(window) * jnp.asarray(weight, image.dtype)
        before = jax.lax.dynamic_slice(result, at, (B, size, size, K))
        return jax.lax.dynamic_update_slice(result, before + done, at), None

    result, _ = jax.lax.scan(add, jnp.zeros((B, H, W, K), image.dtype), jnp.asarray(corners))
    return result / jnp.asarray(total, image.dtype)


def _starts(length: int, size: int) -> list[int]:
    return [*range(0, length - size, max(size // 2, 1)), length - size]


_ROOT = 3**0.5
# The high-pass filter of Daubechies' wavelet with two vanishing moments.
_DB2 = np.array([-1 - _ROOT, 3 + _ROOT, _ROOT - 3, 1 - _ROOT]) / (4 * 2**0.5)
_NORMAL_QUARTILE = 0.6744897501960817


def estimate_noise(image: np.ndarray) -> float:
    """Donoho & Johnstone 1994: σ of white noise in an image [H,W,C], the mean over channels.

    It is the median of |diagonal details of the finest level|, but those that are 0, over that of a
    standard normal. 0 for an image without any. Clipping of y, and fine texture, bias it.
    """
    details = _details(np.swapaxes(_details(np.asarray(image, np.float64)), 0, 1))
    sizes = [np.abs(each[each != 0]) for each in np.moveaxis(details, -1, 0)]
    medians = [np.median(each) if each.size else 0.0 for each in sizes]
    return float(np.mean(medians)) / _NORMAL_QUARTILE


def _details(x: np.ndarray) -> np.ndarray:
    """Details along the first axis [n,...] -> [(n + 3) // 2,...], mirrored at the ends."""
    mirrored = np.pad(x, ((3, 3), *((0, 0),) * (x.ndim - 1)), "symmetric")
    found: np.ndarray = sum(w * mirrored[3 - j : len(x) + 6 - j] for j, w in enumerate(_DB2))
    return found[1::2]
