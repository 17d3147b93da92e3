"""The Gaussians of diffusion: q(x_t | x_0), its posterior, and the network's p(x_{t-1} | x_t).

Glossary: x0 data, x_t noised data, eps the noise in it, v the velocity; B H W C; S retained steps.
`t i32[B]` always indexes the schedule's tables; only `timesteps_of` turns it into a network's
timestep.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.diffusion.schedule import Schedule, extract
from ditjax.errors import UserError, nearest

# A network, as diffusion sees it: (x f32[B,H,W,C], timesteps i32[B]) -> f32[B,H,W,C or 2C].
Denoise = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Stateful:
    """A network with a memory along its trajectory, such as the momentum of guidance.

    `start(x)` -> the memory before the first evaluation; `step(x, timesteps, memory)` ->
    (output, memory). A sampler that asks `stateful` for it carries the memory from one evaluation
    to the next; to any other, it is a `Denoise` that raises an error unless its memory is empty.
    """

    start: Callable[[jax.Array], Any]
    step: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]

    def __call__(self, x: jax.Array, timesteps: jax.Array) -> jax.Array:
        memory = self.start(x)
        if jax.tree.leaves(memory):
            raise UserError(
                "this sampler does not carry the momentum of guidance from one evaluation to the"
                " next: set config.sample.apg_momentum to 0, or choose another sampler."
            )
        return self.step(x, timesteps, memory)[0]


def stateful(denoise: Denoise) -> Stateful:
    """Give a network without a memory an empty one, which adds nothing to a sampler's state."""
    if isinstance(denoise, Stateful):
        return denoise
    return Stateful(lambda x: (), lambda x, timesteps, memory: (denoise(x, timesteps), memory))


DISCRETE_PREDICTIONS = ("eps", "x0", "v")
# Of a process in continuous time, whose steps have no variance: "none", or "unused" if the network
# has channels for one all the same, as SiT's.
Variance = Literal["learned_range", "fixed_small", "fixed_large", "none", "unused"]


def q_sample(schedule: Schedule, x0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """DDPM Eq. 4: x_t = √ᾱ_t x0 + √(1-ᾱ_t) ε; x0, eps f32[B,...], t i32[B] -> f32[B,...]."""
    signal = extract(np.sqrt(schedule.alphas_bar), t, x0.ndim)
    noise = extract(np.sqrt(1 - schedule.alphas_bar), t, x0.ndim)
    return signal * x0 + noise * eps


def q_posterior(
    schedule: Schedule, x0: jax.Array, x_t: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """DDPM Eqs. 6-7: q(x_{t-1} | x_t, x0) -> mean f32[B,...], log variance f32[B,1,...,1].

    At t = 0 the variance is 0, so its log is clipped to that of t = 1.
    """
    mean = (
        extract(schedule.posterior_mean_x0, t, x_t.ndim) * x0
        + extract(schedule.posterior_mean_x_t, t, x_t.ndim) * x_t
    )
    return mean, extract(schedule.posterior_log_variance_clipped, t, x_t.ndim)


def x0_from_eps(schedule: Schedule, x_t: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """DDPM Eq. 4 solved for x0: x0 = x_t/√ᾱ_t - √(1/ᾱ_t - 1) ε -> f32[B,...]."""
    alphas_bar = schedule.alphas_bar
    return (
        extract(1 / np.sqrt(alphas_bar), t, x_t.ndim) * x_t
        - extract(np.sqrt(1 / alphas_bar - 1), t, x_t.ndim) * eps
    )


def eps_from_x0(schedule: Schedule, x_t: jax.Array, t: jax.Array, x0: jax.Array) -> jax.Array:
    """DDPM Eq. 4 solved for ε: ε = (x_t - √ᾱ_t x0) / √(1-ᾱ_t) -> f32[B,...]."""
    alphas_bar = schedule.alphas_bar
    signal = extract(np.sqrt(alphas_bar), t, x_t.ndim)
    return (x_t - signal * x0) * extract(1 / np.sqrt(1 - alphas_bar), t, x_t.ndim)


def v_from_x0_eps(schedule: Schedule, x0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """Salimans & Ho 2022, Sec. 4: v = √ᾱ_t ε - √(1-ᾱ_t) x0 -> f32[B,...]."""
    # Eq. 4 with ε as the data and -x0 as the noise.
    return q_sample(schedule, eps, t, -x0)


def x0_from_v(schedule: Schedule, x_t: jax.Array, t: jax.Array, v: jax.Array) -> jax.Array:
    """Salimans & Ho 2022, Sec. 4: x0 = √ᾱ_t x_t - √(1-ᾱ_t) v -> f32[B,...]."""
    return q_sample(schedule, x_t, t, -v)


def eps_from_v(schedule: Schedule, x_t: jax.Array, t: jax.Array, v: jax.Array) -> jax.Array:
    """Salimans & Ho 2022, App. D: ε = √ᾱ_t v + √(1-ᾱ_t) x_t -> f32[B,...]."""
    return q_sample(schedule, v, t, x_t)


def target(
    schedule: Schedule, x0: jax.Array, t: jax.Array, eps: jax.Array, prediction: str
) -> jax.Array:
    """The regression target of a parametrisation: eps, x0 or v -> f32[B,...].

    Raises UserError for an unknown prediction.
    """
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    if prediction == "v":
        return v_from_x0_eps(schedule, x0, t, eps)
    raise _unknown("prediction", prediction, DISCRETE_PREDICTIONS)


def learned_range_log_variance(schedule: Schedule, v: jax.Array, t: jax.Array) -> jax.Array:
    """Nichol & Dhariwal Eq. 15: log Σ = f log β_t + (1-f) log β̃_t, f = (v+1)/2.

    v f32[B,...] are the network's raw variance channels -> f32[B,...]. They tend to lie in [-1, 1],
    but nothing bounds them.
    """
    low = extract(schedule.posterior_log_variance_clipped, t, v.ndim)
    high = extract(schedule.log_betas, t, v.ndim)
    fraction = (v + 1) / 2
    return fraction * high + (1 - fraction) * low


def normal_kl(
    mean1: jax.Array, log_variance1: jax.Array, mean2: jax.Array, log_variance2: jax.Array
) -> jax.Array:
    """KL(N(mean1, e^log_variance1) || N(mean2, e^log_variance2)), elementwise, in nats."""
    gap = log_variance1 - log_variance2
    return 0.5 * (jnp.expm1(gap) - gap + jnp.square(mean1 - mean2) * jnp.exp(-log_variance2))


def discretized_gaussian_log_likelihood(
    x: jax.Array, mean: jax.Array, log_scale: jax.Array
) -> jax.Array:
    """DDPM Eq. 13: log of the mass of N(mean, e^(2 log_scale)) in the bin of x, in nats.

    Elementwise; x f32[...] is in [-1, 1]. Bins have a half-width of 1/255, and those beyond ±.999
    extend to infinity. The mass is floored at 1e-12. Φ is the tanh approximation of ADM and DiT,
    within 3e-4 of the exact one, so that bits/dim and losses compare with published ones.
    """
    centred = x - mean
    inverse_scale = jnp.exp(-log_scale)
    above = _normal_cdf((centred + 1 / 255) * inverse_scale)
    below = _normal_cdf((centred - 1 / 255) * inverse_scale)
    mass = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1 - below, above - below))
    return jnp.log(jnp.maximum(mass, 1e-12))


def _normal_cdf(z: jax.Array) -> jax.Array:
    """Page 1977: Φ(z) ≈ ½(1 + tanh(√(2/π)(z + .044715 z³)))."""
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z)))


def predict(denoise: Denoise, schedule: Schedule, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """The network's raw output at x_t f32[B,...], t i32[B] -> f32[B,...,C or 2C]."""
    return denoise(x_t, timesteps_of(schedule, t)).astype(jnp.float32)


def predict_along(
    network: Stateful, schedule: Schedule, x_t: jax.Array, t: jax.Array, memory: Any
) -> tuple[jax.Array, Any]:
    """As `predict`, with the memory of the network -> (f32[B,...,C or 2C], memory)."""
    out, memory = network.step(x_t, timesteps_of(schedule, t), memory)
    return out.astype(jnp.float32), memory


def timesteps_of(schedule: Schedule, t: jax.Array) -> jax.Array:
    """The original timesteps of indices into the tables, t i32[B] -> i32[B].

    This is the only place where a table index becomes a network's timestep.
    """
    return jnp.asarray(schedule.timesteps, jnp.int32)[t]


def split_channels(out: jax.Array, channels: int) -> tuple[jax.Array, jax.Array | None]:
    """Split out f32[...,C or 2C] into the prediction f32[...,C] and the variance channels or None.

    Raises UserError when the network outputs neither C nor 2C channels.
    """
    if out.shape[-1] not in (channels, 2 * channels):
        raise UserError(
            f"network gives {out.shape[-1]} channels for an input of {channels}: expected"
            f" {channels}, or {2 * channels} with a learned variance; change its output channels."
        )
    return out[..., :channels], out[..., channels:] if out.shape[-1] > channels else None


class PMeanVariance(NamedTuple):
    """p(x_{t-1} | x_t) = N(mean, e^log_variance), and the x0 and eps that it is computed from."""

    mean: jax.Array  # f32[B,...,C]
    log_variance: jax.Array  # f32[B,...,C]
    x0: jax.Array  # f32[B,...,C]
    eps: jax.Array  # f32[B,...,C]


def p_mean_variance(
    schedule: Schedule,
    out: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    *,
    prediction: str,
    variance: Variance,
    clip_x0: bool = False,
) -> PMeanVariance:
    """DDPM Eq. 7 at the predicted x0: out f32[B,...,C or 2C], x_t f32[B,...,C], t i32[B].

    variance: 'learned_range' reads the channels past C; 'fixed_small' (β̃_t) and 'fixed_large' (β_t)
    ignore them. clip_x0, for pixels only, clips x0 to [-1, 1] and recomputes eps from it.

    Raises UserError for an unknown prediction or variance, or a wrong number of channels.
    """
    predicted, v = split_channels(out, x_t.shape[-1])
    x0, eps = _x0_and_eps(schedule, predicted, x_t, t, prediction)
    if clip_x0:
        x0 = jnp.clip(x0, -1, 1)
        eps = eps_from_x0(schedule, x_t, t, x0)
    mean, log_variance = q_posterior(schedule, x0, x_t, t)  # log_variance is 'fixed_small'
    if variance == "learned_range":
        if v is None:
            raise UserError(
                f"variance 'learned_range' needs a network with {2 * x_t.shape[-1]} output channels"
                f" and it has {out.shape[-1]}: learn the variance, or use 'fixed_small'."
            )
        log_variance = learned_range_log_variance(schedule, v, t)
    elif variance == "fixed_large":
        log_variance = extract(schedule.log_betas_clipped, t, x_t.ndim)
    elif variance != "fixed_small":
        raise _unknown("variance", variance, get_args(Variance)[:3])
    return PMeanVariance(mean, jnp.broadcast_to(log_variance, x_t.shape), x0, eps)


def _x0_and_eps(
    schedule: Schedule, predicted: jax.Array, x_t: jax.Array, t: jax.Array, prediction: str
) -> tuple[jax.Array, jax.Array]:
    """Convert a network's prediction, whichever of the three it is, to x0 and eps."""
    if prediction == "eps":
        return x0_from_eps(schedule, x_t, t, predicted), predicted
    if prediction == "x0":
        return predicted, eps_from_x0(schedule, x_t, t, predicted)
    if prediction == "v":
        return x0_from_v(schedule, x_t, t, predicted), eps_from_v(schedule, x_t, t, predicted)
    raise _unknown("prediction", prediction, DISCRETE_PREDICTIONS)


def _unknown(what: str, came: str, legal: tuple[str, ...]) -> UserError:
    return UserError(
        f"{what} {came!r} is unknown: expected one of {', '.join(legal)}.{nearest(came, legal)}"
    )
