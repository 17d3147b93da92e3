"""Data whose perfect denoiser is known, and the network the release's goldens were taken with."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.diffusion.gaussian import Denoise
from ditjax.diffusion.schedule import Schedule


@pytest.fixture(scope="session")
def exact_diagonal() -> Callable[[Schedule, np.ndarray, np.ndarray], Denoise]:
    """(schedule, mean f64[C], variance f64[C]) -> the denoiser of N(mean, diag(variance)).

    eps is E[eps | x_t]; the variance channels hold Var[x_{t-1} | x_t], so the reverse chain is the
    forward one, exactly, at any number of steps. Fed a timestep that is not retained, it gives NaN.
    """

    def make(s: Schedule, mean: np.ndarray, variance: np.ndarray) -> Denoise:
        a = s.alphas_bar[:, None]
        total = a * variance + 1 - a
        before = np.concatenate([variance[None], total[:-1]])  # Var x_{t-1}
        beta = s.betas[:, None]
        reverse = 1 / (1 / before + (1 - beta) / beta)
        low, high = s.posterior_log_variance_clipped[:, None], np.log(beta)
        v = 2 * (np.log(reverse) - low) / (high - low) - 1
        tables = np.full((3, s.num_train_timesteps, mean.size), np.nan, np.float32)
        tables[:, s.timesteps] = np.sqrt(1 - a) / total, np.sqrt(a) * mean, v
        gain, centre, fraction = jnp.asarray(tables)

        def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
            eps = gain[t][:, None, None] * (x - centre[t][:, None, None])
            v = jnp.broadcast_to(fraction[t][:, None, None], x.shape)
            return jnp.concatenate([eps, v], axis=-1)

        return denoise

    return make


class Release:
    """Inputs by formula, so that DiT's PyTorch release (ed81ce2) could be run on the same ones."""

    t = jnp.array([0, 0, 1, 57, 500, 999], jnp.int32)
    x0 = jnp.asarray(np.sin(np.arange(96.0)), jnp.float32).reshape(6, 2, 2, 4)
    eps = jnp.asarray(np.cos(3 * np.arange(96.0) ** 2), jnp.float32).reshape(6, 2, 2, 4)
    weight = jnp.asarray(np.sin(np.arange(32.0)) / 2, jnp.float32).reshape(4, 8)

    @classmethod
    def denoise(cls, x: jax.Array, t: jax.Array) -> jax.Array:
        hidden = jnp.tanh(jnp.einsum("bhwc,cd->bhwd", x, cls.weight, precision="highest"))
        return hidden * (1 + t.astype(jnp.float32) / 1000)[:, None, None, None]

    @classmethod
    def noise(cls, i: jax.Array) -> jax.Array:
        phase = 7 * jnp.arange(96).reshape(cls.x0.shape) + 5 * i
        return jnp.cos(phase.astype(jnp.float32))


@pytest.fixture(scope="session")
def release() -> type[Release]:
    return Release
