"""Classifier-free guidance: one denoiser from conditional and unconditional predictions."""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from ditjax.diffusion.gaussian import Denoise
from ditjax.errors import UserError, nearest

# (x f32[B,H,W,C], timesteps i32[B]) -> conditional, unconditional: f32[B,H,W,C or 2C] each
DenoisePair = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

GuidedChannels = Literal["all", "three"]


def guide(
    denoise_pair: DenoisePair,
    scale: jax.typing.ArrayLike,
    *,
    channels: GuidedChannels = "all",
    x_channels: int,
) -> Denoise:
    """DiT Sec. 3.1, Ho & Salimans Eq. 6 with s = 1 + w: ε̂ = ε(x,∅) + s (ε(x,c) - ε(x,∅)).

    scale f32[] or f32[B]: 0 is unconditional, 1 conditional. x_channels is C. channels: 'all'
    guides all C channels of the prediction; 'three' guides the first three only, as the DiT release
    does, and s = 1 + x then acts about as 'all' at s = 1 + ¾x. Other channels, always including the
    variance, stay conditional. The weights sum to 1, so the rule holds for ε, x0 and v predictions.

    Raises UserError for an unknown rule, for 'three' of fewer than three channels, and for two
    outputs that differ in shape or lack channels.
    """
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

    def guided(x: jax.Array, timesteps: jax.Array) -> jax.Array:
        conditional, unconditional = denoise_pair(x, timesteps)
        if conditional.shape != unconditional.shape or conditional.shape[-1] < x_channels:
            raise UserError(
                f"guidance of {conditional.shape} and {unconditional.shape}: expected two equal"
                f" shapes of at least {x_channels} channels; check x_channels and the network."
            )
        c, u = conditional[..., :guided_channels], unconditional[..., :guided_channels]
        s = jnp.asarray(scale, c.dtype)
        s = s.reshape(s.shape + (1,) * (c.ndim - 1)) if s.ndim else s
        return jnp.concatenate([u + s * (c - u), conditional[..., guided_channels:]], axis=-1)

    return guided


def within(
    guided: Denoise,
    conditional: Denoise,
    low: jax.typing.ArrayLike,
    high: jax.typing.ArrayLike,
) -> Denoise:
    """Kynkäänniemi et al. 2024, Eq. 4: guided at low <= t < high, conditional elsewhere.

    low, high f32[] are timesteps. The whole batch must be at one t, as in a sampler: outside the
    interval the unconditional half is not computed.
    """

    def denoise(x: jax.Array, timesteps: jax.Array) -> jax.Array:
        t = timesteps[0].astype(jnp.float32)
        return jax.lax.cond((low <= t) & (t < high), guided, conditional, x, timesteps)

    return denoise
