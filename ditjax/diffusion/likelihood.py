"""The likelihood of data under the probability-flow ODE, in bits/dim."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.diffusion.adaptive import dopri5
from ditjax.diffusion.gaussian import Denoise
from ditjax.diffusion.losses import Objective
from ditjax.diffusion.process import Discrete
from ditjax.diffusion.solvers import data_time, velocity_of
from ditjax.errors import UserError


class Likelihood(NamedTuple):
    """log p(x0) in nats f32[B], and the evaluations of the network i32[B]."""

    log_density: jax.Array
    evaluations: jax.Array


def log_density(
    objective: Objective,
    denoise: Denoise,
    x0: jax.Array,
    probe: jax.Array,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Likelihood:
    """Song et al. 2021 Eq. 39: log p(x0) = log p(x_1) + ∫ ∇·v dt, x0 f[B,...].

    ∇·v is estimated by probeᵀ (∂v/∂x) probe with one `probe` of ±1 per sample (Hutchinson), the
    same for the whole solution. x0 is continuous: bytes are dequantised first.

    Raises UserError for a process without derivatives, whose own bound is `vlb_bits_per_dim`.
    """
    process = objective.process
    if isinstance(process, Discrete):
        raise UserError(
            "process 'ddpm' has no flow in continuous time, and so no likelihood: take another"
            " process, or its variational bound (vlb_bits_per_dim)."
        )

    def field(t: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        v, back = jax.vjp(lambda x: velocity_of(objective, denoise, t, x), state[0])
        trace = (back(probe)[0] * probe).reshape(len(probe), -1).sum(axis=1)
        return v, trace

    start, end = data_time(objective), process.first_time(objective.prediction)
    zero = jnp.zeros(x0.shape[:1], x0.dtype)
    found = dopri5(field, (x0, zero), start, end, rtol=rtol, atol=atol)
    x1, volume = found.state
    c = process.at(np.float64(end))
    # x_1 ~ N(0, α² + σ²) but for the data's own spread, which is of unit variance at most.
    std = process.prior_std if process.prior_std != 1 else float(np.hypot(c.alpha, c.sigma))
    d = int(np.prod(x0.shape[1:]))
    squares = jnp.square(x1 / std).reshape(len(x1), -1).sum(axis=1)
    prior = -0.5 * (squares + d * math.log(2 * math.pi)) - d * math.log(std)
    return Likelihood(prior + volume, found.evaluations)


def density_bits_per_dim(log_p: jax.Array, dims: int, bin_width: float) -> jax.Array:
    """Bits/dim of data in bins: -log2 p / D - log2 of a bin's width, f32[B]."""
    return -log_p / (dims * math.log(2)) - math.log2(bin_width)
