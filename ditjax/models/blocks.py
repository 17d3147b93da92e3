"""The four transformer blocks of the paper (DiT Fig. 3): what differs is where conditioning enters.

Every block is `(tokens [B,N,D], Conditioning) -> tokens`, so that the stack does not know which
one it scans.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ditjax.models.attention import CrossAttention, SelfAttention
from ditjax.models.embed import ANYWHERE, Linear, Placement, xavier_uniform

LAYER_NORM_EPS = 1e-6


class Conditioning(NamedTuple):
    """What a block may look at: `vector` [B, D] by adaLN, `context` [B, M, D] by attention."""

    vector: jax.Array
    context: jax.Array


def layer_norm(x: jax.Array, eps: float = LAYER_NORM_EPS) -> jax.Array:
    """(x - E[x]) / sqrt(Var[x] + eps) over the last axis, no affine, statistics in float32.

    The variance is the mean of squared deviations, as in PyTorch; E[x²] - E[x]² differs visibly.
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


class AffineLayerNorm(nn.Module):
    """`layer_norm` with a learned scale and bias [D]: for the blocks without adaLN."""

    eps: float = LAYER_NORM_EPS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        scale, bias = (p.astype(x.dtype)[None, None] for p in (scale, bias))
        return layer_norm(x, self.eps) * scale + bias


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x (1 + scale) + shift, per sample: x [B,N,D], shift and scale [B,D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Modulation(nn.Module):
    """DiT Sec. 3.2, adaLN: c [B,D] -> SiLU -> Linear -> `count` vectors [B,D]."""

    count: int
    zero: bool
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, c: jax.Array) -> list[jax.Array]:
        init = nn.initializers.zeros if self.zero else xavier_uniform
        out = Linear((self.count, c.shape[-1]), init, self.dtype, self.place, name="linear")(
            nn.silu(c)
        )
        out = self.place.put("modulation", self.place.put("columns", out))
        return [out[:, i] for i in range(self.count)]


class MLP(nn.Module):
    """Linear(D, ratio·D) -> GELU (tanh) -> Linear(ratio·D, D); no dropout."""

    ratio: float
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D, put = x.shape[-1], self.place.put
        h = Linear(int(D * self.ratio), dtype=self.dtype, place=self.place, name="in")(x)
        h = nn.gelu(put("hidden", h), approximate=True)
        return put("tokens", Linear(D, dtype=self.dtype, place=self.place, name="out")(h))


class InContextBlock(nn.Module):
    """A plain pre-norm ViT block: conditioning is already among the tokens."""

    heads: int
    mlp_ratio: float
    norm2_eps: float = LAYER_NORM_EPS
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE
    query_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, cond: Conditioning) -> jax.Array:
        attn = SelfAttention(self.heads, self.dtype, self.place, self.query_scale, name="attn")
        x = x + attn(AffineLayerNorm(name="norm1")(x))
        h = AffineLayerNorm(self.norm2_eps, name="norm2")(x)
        return x + MLP(self.mlp_ratio, self.dtype, self.place, name="mlp")(h)


class CrossAttentionBlock(nn.Module):
    """Self-attention, then cross-attention to the context (t and y as two vectors), then MLP."""

    heads: int
    mlp_ratio: float
    norm2_eps: float = LAYER_NORM_EPS
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE
    query_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, cond: Conditioning) -> jax.Array:
        attn = SelfAttention(self.heads, self.dtype, self.place, self.query_scale, name="attn")
        x = x + attn(AffineLayerNorm(name="norm1")(x))
        # No affine here: with it, the paper's 598.2M parameters for XL/2 would read 598.3M.
        cross = CrossAttention(self.heads, self.dtype, self.place, self.query_scale, name="cross")
        x = x + cross(layer_norm(x), cond.context)
        h = AffineLayerNorm(self.norm2_eps, name="norm2")(x)
        return x + MLP(self.mlp_ratio, self.dtype, self.place, name="mlp")(h)


class AdaLNBlock(nn.Module):
    """Shift and scale regressed from c before attention and MLP; no gates, standard init."""

    heads: int
    mlp_ratio: float
    norm2_eps: float = LAYER_NORM_EPS
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE
    query_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, cond: Conditioning) -> jax.Array:
        shift_msa, scale_msa, shift_mlp, scale_mlp = Modulation(
            4, False, self.dtype, self.place, name="adaln"
        )(cond.vector)
        h = modulate(layer_norm(x), shift_msa, scale_msa)
        attn = SelfAttention(self.heads, self.dtype, self.place, self.query_scale, name="attn")
        x = x + attn(h)
        h = modulate(layer_norm(x, self.norm2_eps), shift_mlp, scale_mlp)
        return x + MLP(self.mlp_ratio, self.dtype, self.place, name="mlp")(h)


class AdaLNZeroBlock(nn.Module):
    """adaLN with gates, all six regressed from zero weights: the block is the identity at init."""

    heads: int
    mlp_ratio: float
    norm2_eps: float = LAYER_NORM_EPS
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE
    query_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, cond: Conditioning) -> jax.Array:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = Modulation(
            6, True, self.dtype, self.place, name="adaln"
        )(cond.vector)
        h = modulate(layer_norm(x), shift_msa, scale_msa)
        attn = SelfAttention(self.heads, self.dtype, self.place, self.query_scale, name="attn")
        x = x + gate_msa[:, None] * attn(h)
        h = modulate(layer_norm(x, self.norm2_eps), shift_mlp, scale_mlp)
        return x + gate_mlp[:, None] * MLP(self.mlp_ratio, self.dtype, self.place, name="mlp")(h)


BLOCKS: dict[str, type[nn.Module]] = {
    "in_context": InContextBlock,
    "cross_attention": CrossAttentionBlock,
    "adaln": AdaLNBlock,
    "adaln_zero": AdaLNZeroBlock,
}
