"""Samplers: DDPM's ancestral sampling and DDIM, each one lax.scan from x_T to x0."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.diffusion.gaussian import (
    Denoise,
    Variance,
    p_mean_variance,
    predict_along,
    stateful,
)
from ditjax.diffusion.schedule import Schedule, extract
from ditjax.errors import UserError

# step i32[], counted from 0 at the noisiest -> standard normal f32[B,H,W,C]
Noise = Callable[[jax.Array], jax.Array]

# Streams of a sample's key. Step indices are folded into the second only.
_INITIAL, _STEPS, _GIVEN = 0, 1, 2


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x_T ~ N(0, 1), sample b from keys[b] alone: keys key[B], shape (H,W,C) -> f32[B,H,W,C].

    It is independent of all that `per_sample_noise` draws from the same keys. Raises UserError for
    keys other than one threefry key per sample.
    """
    return _normal_each(_stream(keys, _INITIAL), shape)


def per_sample_noise(keys: jax.Array, shape: tuple[int, ...]) -> Noise:
    """noise(i) whose sample b depends on (keys[b], i) alone: keys key[B], shape (H,W,C).

    A sample is therefore the same in any batch, at any place in it, on any number of devices.
    Raises UserError for keys other than one threefry key per sample.
    """
    stream = _stream(keys, _STEPS)

    def noise(i: jax.Array) -> jax.Array:
        return _normal_each(jax.vmap(jax.random.fold_in, (0, None))(stream, i), shape)

    return noise


def given_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The noise that is added to what a sample is given: keys key[B] -> f32[B,*shape].

    It is independent of what `initial_noise` and `per_sample_noise` draw. Raises as they do.
    """
    return _normal_each(_stream(keys, _GIVEN), shape)


def _stream(keys: jax.Array, stream: int) -> jax.Array:
    # Under vmap, rbg draws a whole batch from its first key: a sample would depend on its batch.
    one_key_each = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) and keys.ndim == 1
    if not one_key_each or not str(jax.random.key_impl(keys)).startswith("threefry"):
        raise UserError(
            f"sampling keys are {keys.dtype}{list(keys.shape)}: expected one threefry key per"
            " sample, key<fry>[B]; split jax.random.key(seed, impl='threefry2x32') into B keys."
        )
    return jax.vmap(jax.random.fold_in, (0, None))(keys, stream)


def _normal_each(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


class Steps(NamedTuple):
    """The steps of a sampler, from the noise x_T to the data.

    `step(x, memory, row, noise)` -> x at the next time, the memory, and the x̂0 that it was computed
    from. `memory` is what a step leaves to the next beside x, such as the network's
    (`gaussian.Stateful`), as it is before the first. `row` is one of `rows`, tables [n, ...].
    `sigma` f64[n] is the standard deviation of the noise that a step adds to its mean; None if it
    depends on the network, or if no step adds noise.
    """

    step: Callable[[jax.Array, Any, Any, Noise], tuple[jax.Array, Any, jax.Array]]
    memory: Any
    rows: Any
    sigma: np.ndarray | None = None


def walk(steps: Steps, x_T: jax.Array, noise: Noise) -> jax.Array:
    """Take every step once, from x_T to x0."""

    def move(carry: tuple[jax.Array, Any], row: Any) -> tuple[tuple[jax.Array, Any], None]:
        x, memory, _ = steps.step(*carry, row, noise)
        return (x, memory), None

    (x0, _), _ = jax.lax.scan(move, (x_T, steps.memory), steps.rows)
    return x0


def ddpm(
    denoise: Denoise,
    schedule: Schedule,
    x_T: jax.Array,
    noise: Noise,
    *,
    prediction: str = "eps",
    variance: Variance = "learned_range",
    clip_x0: bool = False,
) -> jax.Array:
    """DDPM Alg. 2: x_{t-1} = μ(x_t) + σ_t z for S steps; x_T f32[B,H,W,C] -> x0.

    The last step adds no noise.

    Raises UserError as `gaussian.p_mean_variance` does.
    """
    steps = ddpm_steps(
        denoise, schedule, x_T, prediction=prediction, variance=variance, clip_x0=clip_x0
    )
    return walk(steps, x_T, noise)


def ddpm_steps(
    denoise: Denoise,
    schedule: Schedule,
    x_T: jax.Array,
    *,
    prediction: str = "eps",
    variance: Variance = "learned_range",
    clip_x0: bool = False,
) -> Steps:
    """Build the steps of `ddpm`."""
    network = stateful(denoise)

    def step(
        x_t: jax.Array, memory: Any, i: jax.Array, noise: Noise
    ) -> tuple[jax.Array, Any, jax.Array]:
        t = _table_index(schedule, x_t, i)
        out, memory = predict_along(network, schedule, x_t, t, memory)
        p = p_mean_variance(
            schedule, out, x_t, t, prediction=prediction, variance=variance, clip_x0=clip_x0
        )
        sigma = jnp.where(i < len(schedule) - 1, jnp.exp(0.5 * p.log_variance), 0.0)
        return p.mean + sigma * noise(i), memory, p.x0

    log_variance = {
        "fixed_small": schedule.posterior_log_variance_clipped,
        "fixed_large": schedule.log_betas_clipped,
    }.get(variance)
    sigmas = None
    if log_variance is not None:
        sigmas = np.append(np.exp(0.5 * log_variance[:0:-1]), 0.0)
    rows = jnp.arange(len(schedule), dtype=jnp.int32)
    return Steps(step, network.start(x_T), rows, sigmas)


def ddim(
    denoise: Denoise,
    schedule: Schedule,
    x_T: jax.Array,
    noise: Noise,
    *,
    eta: float = 0.0,
    prediction: str = "eps",
    clip_x0: bool = False,
) -> jax.Array:
    """DDIM Eq. 12: x_{t-1} = √ᾱ_{t-1} x0 + √(1-ᾱ_{t-1}-σ_t²) ε + σ_t z; x_T f32[B,H,W,C] -> x0.

    σ_t = η√β̃_t (Eq. 16). η = 0 is deterministic and never calls noise; η = 1 equals `ddpm` with
    'fixed_small', step for step. A learned variance is not read.

    Raises UserError for η outside [0, 1], and as `gaussian.p_mean_variance` does.
    """
    steps = ddim_steps(denoise, schedule, x_T, eta=eta, prediction=prediction, clip_x0=clip_x0)
    return walk(steps, x_T, noise)


def ddim_steps(
    denoise: Denoise,
    schedule: Schedule,
    x_T: jax.Array,
    *,
    eta: float = 0.0,
    prediction: str = "eps",
    clip_x0: bool = False,
) -> Steps:
    """Build the steps of `ddim`."""
    if not 0 <= eta <= 1:
        raise UserError(
            f"ddim's eta is {eta}: expected 0 (deterministic) to 1 (as much noise as DDPM)."
        )
    sigma = eta * np.sqrt(schedule.posterior_variance)
    signal = np.sqrt(schedule.alphas_bar_prev)
    direction = np.sqrt(1 - schedule.alphas_bar_prev - sigma**2)
    network = stateful(denoise)

    def step(
        x_t: jax.Array, memory: Any, i: jax.Array, noise: Noise
    ) -> tuple[jax.Array, Any, jax.Array]:
        t = _table_index(schedule, x_t, i)
        out, memory = predict_along(network, schedule, x_t, t, memory)
        p = p_mean_variance(
            schedule, out, x_t, t, prediction=prediction, variance="fixed_small", clip_x0=clip_x0
        )
        x = extract(signal, t, x_t.ndim) * p.x0 + extract(direction, t, x_t.ndim) * p.eps
        if eta > 0:
            x = x + extract(sigma, t, x_t.ndim) * noise(i)
        return x, memory, p.x0

    rows = jnp.arange(len(schedule), dtype=jnp.int32)
    return Steps(step, network.start(x_T), rows, sigma[::-1])


def _table_index(schedule: Schedule, x_t: jax.Array, i: jax.Array) -> jax.Array:
    """The index into the tables of step i, counted from the noisiest, per sample -> i32[B]."""
    return jnp.full(x_t.shape[:1], len(schedule) - 1 - i)
