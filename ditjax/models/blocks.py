"""The four transformer blocks of the paper (DiT Fig. 3), which differ in how they are conditioned.

Every block maps `(tokens [B,N,D], Conditioning) -> tokens`, so that one stack can scan any of them.
The block with adaLN-Zero takes groups of tokens, too, [B,G,N,D]: attention stays within a group.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ditjax.models.attention import CrossAttention, SelfAttention, rms_norm
from ditjax.models.embed import ANYWHERE, Initializer, Linear, Placement, xavier_uniform

LAYER_NORM_EPS = 1e-6


class Conditioning(NamedTuple):
    """Conditioning of a block: `vector` [B, D] for adaLN, `context` [B, M, D] for attention."""

    vector: jax.Array
    context: jax.Array


def layer_norm(x: jax.Array, eps: float = LAYER_NORM_EPS) -> jax.Array:
    """(x - E[x]) / sqrt(Var[x] + eps) over the last axis, without affine, statistics in float32.

    The variance is the mean of squared deviations, as in PyTorch; E[x²] - E[x]² is less accurate.
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


# config.model.norm -> the norm of the blocks with adaLN
NORMS: dict[str, Callable[..., jax.Array]] = {"layer": layer_norm, "rms": rms_norm}


class AffineLayerNorm(nn.Module):
    """`layer_norm` with a learned scale and bias [D], for the blocks without adaLN."""

    eps: float = LAYER_NORM_EPS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        scale, bias = (p.astype(x.dtype)[None, None] for p in (scale, bias))
        return layer_norm(x, self.eps) * scale + bias


def over_tokens(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector [B,D] of each sample, to be broadcast over its tokens x [B,..,N,D]."""
    return jnp.expand_dims(vector, tuple(range(1, x.ndim - 1)))


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x (1 + scale) + shift, per sample: x [B,..,N,D], shift and scale [B,D]."""
    return x * (1 + over_tokens(scale, x)) + over_tokens(shift, x)


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


ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "gelu": functools.partial(nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # Hendrycks & Gimpel 2016, Sec. 2
    "silu": nn.silu,
    "relu": nn.relu,
}


class MLP(nn.Module):
    """Linear(D, ratio·D) -> GELU (tanh) -> Linear(ratio·D, D); no dropout.

    `activation` is another of ACTIVATION_FUNCTIONS; `inits` are those of both kernels.
    """

    ratio: float
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE
    activation: str = "gelu_tanh"
    use_bias: bool = True
    inits: tuple[Initializer, Initializer] = (xavier_uniform, xavier_uniform)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D, put = x.shape[-1], self.place.put
        linear = functools.partial(
            Linear, dtype=self.dtype, place=self.place, use_bias=self.use_bias
        )
        h = linear(int(D * self.ratio), kernel_init=self.inits[0], name="in")(x)
        h = ACTIVATION_FUNCTIONS[self.activation](put("hidden", h))
        return put("tokens", linear(D, kernel_init=self.inits[1], name="out")(h))


class SwiGLU(nn.Module):
    """Shazeer 2020 Eq. 6: Linear(D, D) of silu(gate) · up, each of width ratio·D; no dropout.

    One product computes both: kernel [D, 2, ratio·D]. With another `activation` it is another gated
    unit of the same paper, such as GEGLU.
    """

    ratio: float
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE
    activation: str = "silu"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D, put = x.shape[-1], self.place.put
        linear = functools.partial(
            Linear, dtype=self.dtype, place=self.place, use_bias=self.use_bias
        )
        h = linear((2, int(D * self.ratio)), name="gate_up")(x)
        h = put("hidden", ACTIVATION_FUNCTIONS[self.activation](h[:, :, 0]) * h[:, :, 1])
        return put("tokens", linear(D, name="out")(h))


# config.model.mlp -> the MLP of a block
MLPS: dict[str, type[MLP] | type[SwiGLU]] = {"gelu": MLP, "swiglu": SwiGLU}


class BlockConfig(NamedTuple):
    """Hyperparameters of a block. `query_scale` multiplies queries in addition to 1 / √d (μP).

    `rope`: rows and columns of the patches, whose positions rotate queries and keys; None is none.
    """

    heads: int
    mlp_ratio: float
    norm2_eps: float = LAYER_NORM_EPS
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE
    query_scale: float = 1.0
    norm: str = "layer"
    mlp: str = "gelu"
    qk_norm: bool = False
    rope: tuple[int, int] | None = None


class Block(nn.Module):
    """Base class of the four blocks: (tokens [B,N,D], Conditioning) -> tokens."""

    config: BlockConfig

    @nn.nowrap
    def attend(self, x: jax.Array) -> jax.Array:
        c = self.config
        return SelfAttention(
            c.heads, c.dtype, c.place, c.query_scale, c.qk_norm, c.rope, name="attn"
        )(x)

    @nn.nowrap
    def normalised(self, x: jax.Array, eps: float = LAYER_NORM_EPS) -> jax.Array:
        return NORMS[self.config.norm](x, eps)

    @nn.nowrap
    def mlp(self, x: jax.Array) -> jax.Array:
        c = self.config
        return MLPS[c.mlp](c.mlp_ratio, c.dtype, c.place, name="mlp")(x)

    @nn.nowrap
    def modulation(self, count: int, zero: bool, vector: jax.Array) -> list[jax.Array]:
        c = self.config
        return Modulation(count, zero, c.dtype, c.place, name="adaln")(vector)


class InContextBlock(Block):
    """A plain pre-norm ViT block; the conditioning tokens are part of the sequence."""

    @nn.compact
    def __call__(self, x: jax.Array, cond: Conditioning) -> jax.Array:
        x = x + self.attend(AffineLayerNorm(name="norm1")(x))
        return x + self.mlp(AffineLayerNorm(self.config.norm2_eps, name="norm2")(x))


class CrossAttentionBlock(Block):
    """Self-attention, then cross-attention to the context (t and y as two vectors), then MLP."""

    @nn.compact
    def __call__(self, x: jax.Array, cond: Conditioning) -> jax.Array:
        c = self.config
        x = x + self.attend(AffineLayerNorm(name="norm1")(x))
        # Without affine: with it, XL/2 would have 598.3M parameters instead of the paper's 598.2M.
        cross = CrossAttention(c.heads, c.dtype, c.place, c.query_scale, name="cross")
        x = x + cross(layer_norm(x), cond.context)
        return x + self.mlp(AffineLayerNorm(c.norm2_eps, name="norm2")(x))


class AdaLNBlock(Block):
    """Shift and scale before attention and MLP, regressed from c; no gates, standard init."""

    @nn.compact
    def __call__(self, x: jax.Array, cond: Conditioning) -> jax.Array:
        shift_msa, scale_msa, shift_mlp, scale_mlp = self.modulation(4, False, cond.vector)
        x = x + self.attend(modulate(self.normalised(x), shift_msa, scale_msa))
        h = modulate(self.normalised(x, self.config.norm2_eps), shift_mlp, scale_mlp)
        return x + self.mlp(h)


class AdaLNZeroBlock(Block):
    """adaLN with gates; all six vectors start at zero, so the block is the identity at init."""

    @nn.compact
    def __call__(self, x: jax.Array, cond: Conditioning) -> jax.Array:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(
            6, True, cond.vector
        )
        h = modulate(self.normalised(x), shift_msa, scale_msa)
        x = x + over_tokens(gate_msa, x) * self.attend(h)
        h = modulate(self.normalised(x, self.config.norm2_eps), shift_mlp, scale_mlp)
        return x + over_tokens(gate_mlp, x) * self.mlp(h)


BLOCKS: dict[str, type[Block]] = {
    "in_context": InContextBlock,
    "cross_attention": CrossAttentionBlock,
    "adaln": AdaLNBlock,
    "adaln_zero": AdaLNZeroBlock,
}
