"""Guidance: one denoiser from conditional and unconditional predictions."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from ditjax.diffusion.gaussian import Denoise, Stateful, stateful
from ditjax.errors import UserError, nearest

# (x f32[B,H,W,C], timesteps i32[B]) -> conditional, unconditional: f32[B,H,W,C or 2C] each
DenoisePair = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

GuidedChannels = Literal["all", "three"]

# (conditional, unconditional, scale, x, timesteps i32[B] or f32[B]) -> the guided prediction. All
# but the scale and the times are f32[B,H,W,C] of the guided channels; the prediction is in the
# network's own space, and x is the network's input.
GuidanceRule = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
# As a GuidanceRule, of the memory of the step before, too: -> the guided prediction, its memory.
# The memory is an array of the guided channels, 0 before the first step.
MemoryRule = Callable[..., tuple[jax.Array, jax.Array]]


def classifier_free(
    c: jax.Array, u: jax.Array, s: jax.Array, x: jax.Array, t: jax.Array
) -> jax.Array:
    """Ho & Salimans Eq. 6 with s = 1 + w. Its weights sum to 1: the same in any space."""
    return u + s * (c - u)


def rescaled(share: float) -> GuidanceRule:
    """Lin et al. 2023 Sec. 3.4: a share of the guided prediction gets the conditional one's std.

    The deviation is over H, W, C of each sample, so the rule depends on what the network predicts.
    """

    def rule(c: jax.Array, u: jax.Array, s: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        guided = classifier_free(c, u, s, x, t)
        axes = tuple(range(1, c.ndim))
        ratio = c.std(axes, keepdims=True, ddof=1) / guided.std(axes, keepdims=True, ddof=1)
        return share * (guided * ratio) + (1 - share) * guided

    return rule


def projected(
    eta: float, norm: float, coefficients: Callable[[jax.Array], tuple[jax.Array, ...]]
) -> GuidanceRule:
    """Sadat et al. 2024 (APG), in x0-space and without momentum (`projected_along` has it).

    x̂0 = x̂0_c + (s - 1)(Δ_⊥ + η Δ_∥): Δ = x̂0_c - x̂0_u, shortened to `norm` if that is above 0, is
    split along x̂0_c. coefficients(timesteps) -> c_in, c_skip, c_out f32[B,1,...,1] turn predictions
    into x̂0 and back.
    """

    def rule(c: jax.Array, u: jax.Array, s: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        c_in, c_skip, c_out = coefficients(t)
        x0, change = c_skip / c_in * x + c_out * c, c_out * (c - u)
        return c + (s - 1) * _projected(change, x0, eta, norm) / c_out

    return rule


def projected_along(
    momentum: float,
    eta: float,
    norm: float,
    coefficients: Callable[[jax.Array], tuple[jax.Array, ...]],
) -> MemoryRule:
    """Sadat et al. 2024 (APG) with momentum β: the change is x̂0_c - x̂0_u + β times the last one.

    The memory is that change before it is shortened and projected. Otherwise as `projected`.
    """

    def rule(
        c: jax.Array, u: jax.Array, s: jax.Array, x: jax.Array, t: jax.Array, memory: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        c_in, c_skip, c_out = coefficients(t)
        change = c_out * (c - u) + momentum * memory
        x0 = c_skip / c_in * x + c_out * c
        return c + (s - 1) * _projected(change, x0, eta, norm) / c_out, change

    return rule


def _projected(change: jax.Array, x0: jax.Array, eta: float, norm: float) -> jax.Array:
    """Shorten a change of x̂0 to `norm`, and keep the share `eta` of what is along x0."""
    axes = tuple(range(1, x0.ndim))
    if norm:
        length = jnp.sqrt(jnp.square(change).sum(axes, keepdims=True))
        change = change * jnp.minimum(1, norm / jnp.maximum(length, 1e-12))
    along = (change * x0).sum(axes, keepdims=True)
    parallel = along / jnp.maximum(jnp.square(x0).sum(axes, keepdims=True), 1e-12) * x0
    return change - parallel + eta * parallel


def zero_star(c: jax.Array, u: jax.Array, s: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    """Fan et al. 2025 (CFG-Zero*): the unconditional velocity is scaled onto the conditional one.

    s* = <c, u>/|u|²; s* u + s (c - s* u). For velocities only.
    """
    axes = tuple(range(1, c.ndim))
    share = (c * u).sum(axes, keepdims=True) / (jnp.square(u).sum(axes, keepdims=True) + 1e-8)
    return classifier_free(c, share * u, s, x, t)


def zero_above(
    denoise: Denoise, bound: float, time_of_noise: Callable[[jax.Array], jax.Array]
) -> Denoise:
    """Fan et al. 2025: a velocity of 0 at times t above `bound`, the first steps of a flow."""

    def still(x: jax.Array, timesteps: jax.Array) -> jax.Array:
        out = denoise(x, timesteps)
        moving = (time_of_noise(timesteps) <= bound + 1e-6).reshape((-1,) + (1,) * (out.ndim - 1))
        return jnp.where(moving, out, 0)

    return still


def guide(
    denoise_pair: DenoisePair,
    scale: jax.typing.ArrayLike,
    *,
    channels: GuidedChannels = "all",
    x_channels: int,
    rule: GuidanceRule = classifier_free,
) -> Denoise:
    """DiT Sec. 3.1, Ho & Salimans Eq. 6 with s = 1 + w: ε̂ = ε(x,∅) + s (ε(x,c) - ε(x,∅)).

    `rule` is another way to combine the two. The pair may also be of two networks, both
    conditional, a good and a worse one: Karras et al. 2024 (autoguidance).

    scale f32[] or f32[B]: 0 is unconditional, 1 conditional. x_channels is C. channels: 'all'
    guides all C channels of the prediction; 'three' guides the first three only, as the DiT release
    does, and s = 1 + x then acts about as 'all' at s = 1 + ¾x. Other channels, always including the
    variance, stay conditional. The weights sum to 1, so the rule holds for ε, x0 and v predictions.

    Raises UserError for an unknown rule, for 'three' of fewer than three channels, and for two
    outputs that differ in shape or lack channels.
    """
    combine = _combination(denoise_pair, scale, channels, x_channels)

    def guided(x: jax.Array, timesteps: jax.Array) -> jax.Array:
        return combine(x, timesteps, lambda *each: (rule(*each), None))[0]

    return guided


def guide_along(
    denoise_pair: DenoisePair,
    scale: jax.typing.ArrayLike,
    *,
    channels: GuidedChannels = "all",
    x_channels: int,
    rule: MemoryRule,
) -> Stateful:
    """As `guide`, by a rule with a memory along the trajectory."""
    combine = _combination(denoise_pair, scale, channels, x_channels)
    count = 3 if channels == "three" else x_channels

    def step(x: jax.Array, timesteps: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        return combine(x, timesteps, lambda *each: rule(*each, memory))

    return Stateful(lambda x: jnp.zeros_like(x[..., :count]), step)


def _combination(
    denoise_pair: DenoisePair,
    scale: jax.typing.ArrayLike,
    channels: GuidedChannels,
    x_channels: int,
) -> Callable[[jax.Array, jax.Array, Callable[..., tuple[jax.Array, Any]]], tuple[jax.Array, Any]]:
    """Build (x, timesteps, rule) -> (guided output, what the rule returned beside it)."""
    if channels not in get_args(GuidedChannels):
        legal = get_args(GuidedChannels)
        raise UserError(
            f"guided channels {channels!r}: expected one of {', '.join(legal)}."
            f"{nearest(channels, legal)}"
        )
    if channels == "three" and x_channels < 3:
        raise UserError(
            f"guidance of three channels, but x has {x_channels}: expected at least 3; use 'all'."
        )
    guided_channels = 3 if channels == "three" else x_channels

    def combine(
        x: jax.Array, timesteps: jax.Array, rule: Callable[..., tuple[jax.Array, Any]]
    ) -> tuple[jax.Array, Any]:
        conditional, unconditional = denoise_pair(x, timesteps)
        if conditional.shape != unconditional.shape or conditional.shape[-1] < x_channels:
            raise UserError(
                f"guidance of {conditional.shape} and {unconditional.shape}: expected two equal"
                f" shapes of at least {x_channels} channels; check x_channels and the network."
            )
        c, u = conditional[..., :guided_channels], unconditional[..., :guided_channels]
        s = jnp.asarray(scale, c.dtype)
        s = s.reshape(s.shape + (1,) * (c.ndim - 1)) if s.ndim else s
        combined, memory = rule(c, u, s, x[..., :guided_channels], timesteps)
        out = jnp.concatenate([combined, conditional[..., guided_channels:]], axis=-1)
        return out, memory

    return combine


def within(
    guided: Denoise,
    conditional: Denoise,
    low: jax.typing.ArrayLike,
    high: jax.typing.ArrayLike,
) -> Denoise:
    """Kynkäänniemi et al. 2024, Eq. 4: guided at low <= t < high, conditional elsewhere.

    low, high f32[] are timesteps. The whole batch must be at one t, as in a sampler: outside the
    interval the unconditional half is not computed, and a memory stays as it is.
    """

    def inside(timesteps: jax.Array) -> Any:
        t = timesteps[0].astype(jnp.float32)
        return (low <= t) & (t < high)

    if isinstance(guided, Stateful):
        outside = stateful(conditional).step

        def step(x: jax.Array, timesteps: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
            return jax.lax.cond(inside(timesteps), guided.step, outside, x, timesteps, memory)

        return Stateful(guided.start, step)

    def denoise(x: jax.Array, timesteps: jax.Array) -> jax.Array:
        return jax.lax.cond(inside(timesteps), guided, conditional, x, timesteps)

    return denoise
