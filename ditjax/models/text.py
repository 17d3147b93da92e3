"""Text encoders in the layouts of BERT, CLIP's text tower and T5's encoder.

Token ids i32[B,M] and a mask bool[B,M] -> the features of every token, and one vector of each text.
A padded token's features mean nothing: whoever attends to them masks them. The sizes of an encoder
are a `TextConfig`, which `weights/text.py` reads from a folder; `data/tokenizers.py` makes the ids.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ditjax.models.attention import SelfAttention, causal_bias, key_bias, rms_norm
from ditjax.models.blocks import MLP, AffineLayerNorm, SwiGLU
from ditjax.models.embed import ANYWHERE, Initializer, Placement, xavier_uniform
from ditjax.models.network import Rules


class Layers(NamedTuple):
    """The layers of a stack: `depth` of width D, with H heads and an MLP of width `hidden`.

    `post_norm`: BERT's order, x = norm(x + f(x)), instead of x + f(norm(x)). `rms`: RMSNorm in the
    place of LayerNorm. `head_width` is d, D / H if 0. `plain_logits`: q kᵀ, not divided by √d.
    `openai_init`: the initial values of CLIP's code, instead of Xavier's. `layer_scale`: what a
    sublayer adds is multiplied by a learned vector first (Touvron et al. 2021, Eq. 4).
    """

    depth: int
    width: int
    heads: int
    hidden: int
    activation: str
    eps: float
    post_norm: bool = False
    rms: bool = False
    biases: bool = True
    gated: bool = False
    head_width: int = 0
    plain_logits: bool = False
    openai_init: bool = False
    layer_scale: bool = False


class AffineRMSNorm(nn.Module):
    """Zhang & Sennrich 2019 Eq. 4 with a learned scale [D]; no mean, no bias."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        return rms_norm(x, self.eps) * scale.astype(x.dtype)[None, None]


def _norm(c: Layers, name: str) -> nn.Module:
    return (AffineRMSNorm if c.rms else AffineLayerNorm)(c.eps, name=name)


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each with a norm and a residual: x [B,M,D], bias -> [B,M,D]."""

    config: Layers
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        c = self.config
        norm1, norm2 = _norm(c, "norm1"), _norm(c, "norm2")
        into: Initializer = xavier_uniform
        out, hidden = into, into
        if c.openai_init:  # openai/CLIP, model.py, initialize_parameters
            normal, std = nn.initializers.normal, c.width**-0.5
            into, out = normal(std), normal(std * (2 * c.depth) ** -0.5)
            hidden = normal((2 * c.width) ** -0.5)
        d = c.head_width or c.width // c.heads
        attention = SelfAttention(
            c.heads,
            self.dtype,
            self.place,
            query_scale=d**0.5 if c.plain_logits else 1.0,
            head_width=d,
            use_bias=c.biases,
            inits=(into, out),
            name="attn",
        )
        ratio = (c.hidden + 0.5) / c.width  # the MLP rounds down
        mlp: nn.Module
        if c.gated:
            mlp = SwiGLU(ratio, self.dtype, self.place, c.activation, c.biases, name="mlp")
        else:
            inits = (hidden, out)
            mlp = MLP(ratio, self.dtype, self.place, c.activation, c.biases, inits, name="mlp")
        if c.post_norm:
            x = norm1(x + attention(x, bias))
            return norm2(x + mlp(x))
        x = x + self._scaled("scale1", attention(norm1(x), bias))
        return x + self._scaled("scale2", mlp(norm2(x)))

    def _scaled(self, name: str, x: jax.Array) -> jax.Array:
        if not self.config.layer_scale:
            return x
        scale = self.param(name, nn.initializers.constant(1e-5), x.shape[-1:], jnp.float32)
        return x * scale.astype(x.dtype)[None, None]


def apply_layers(
    c: Layers,
    x: jax.Array,
    bias: jax.Array | None,
    dtype: Any,
    place: Placement,
    kinds: np.ndarray | None = None,
) -> jax.Array:
    """The stack, as one scan over the parameters `blocks/` of its layers; called in a module.

    With `kinds` i[L], layer l adds `bias[kinds[l]]`, of biases [P, ...]. The collection 'cache' of
    a layer (`SelfAttention`) is stacked as its parameters are.
    """

    def body(module: nn.Module, x: jax.Array, kind: Any, bias: Any) -> tuple[jax.Array, None]:
        chosen = bias if kind is None else bias[kind]
        return place.put("tokens", module(x, chosen)), None

    scan = nn.scan(
        body,
        variable_axes={"params": 0, "cache": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=c.depth,
    )
    layers = EncoderLayer(c, dtype, place, name="blocks")
    return scan(layers, x, None if kinds is None else jnp.asarray(kinds), bias)[0]


def layers_macs(c: Layers, tokens: int) -> int:
    """Multiply-accumulates of a stack without gates, on so many tokens."""
    return c.depth * tokens * (4 * c.width**2 + 2 * c.width * c.hidden + 2 * tokens * c.width)


def layers_parameters(c: Layers) -> int:
    """The number of parameters of a stack of LayerNorms, biases and no gates."""
    return c.depth * (4 * c.width**2 + 2 * c.width * c.hidden + 9 * c.width + c.hidden)


# The sharding rules of a stack and its tables.
LAYER_RULES: Rules = (
    (r"attn/qkv/kernel", ("fsdp", None, "tensor", None)),
    (r"attn/qkv/bias", (None, "tensor", None)),
    (r"attn/out/kernel", ("tensor", "fsdp")),
    (r"mlp/in/kernel", ("fsdp", "tensor")),
    (r"mlp/in/bias", ("tensor",)),
    (r"mlp/out/kernel", ("tensor", "fsdp")),
    (r"(words|positions)", (None, "fsdp")),
)


def until_end(ids: jax.Array, end: int | jax.Array) -> jax.Array:
    """Where ids i32[B,M] are text: up to the first `end`, which every text has -> bool[B,M].

    `end` is one id, or one of each text, i32[B,1].
    """
    ends = (ids == end).astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) - ends == 0


class TextConfig(NamedTuple):
    """The sizes of a text encoder, and what differs between the three layouts.

    `positions` is the length of the table of positions, 0 for T5, which has none. `projection` is
    the width of CLIP's pooled vector, 0 if it is not projected. `end` is the id at whose first
    place CLIP pools; -1 stands for the largest id, as in OpenAI's code.
    """

    layout: Literal["bert", "clip", "t5"]
    vocabulary: int
    layers: Layers
    positions: int = 0
    types: int = 0
    projection: int = 0
    end: int = -1
    buckets: int = 32
    max_distance: int = 128


class Encoded(NamedTuple):
    """The features of a text: tokens f32[B,M,C], and pooled f32[B,E]."""

    tokens: jax.Array
    pooled: jax.Array


def relative_buckets(tokens: int, buckets: int, max_distance: int) -> np.ndarray:
    """Raffel et al. 2020 Sec. 2.1, bidirectional: the bucket of key m seen from query n: i32[M,M].

    Half of the buckets are of keys behind the query. Half of those are of one distance each, the
    others of logarithmically growing ranges up to `max_distance`.
    """
    away = np.arange(tokens)[None, :] - np.arange(tokens)[:, None]
    half, exact = buckets // 2, buckets // 4
    far = np.maximum(np.abs(away), 1).astype(np.float32) / np.float32(exact)
    steps = np.log(far) / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    large = np.minimum(exact + steps.astype(np.int32), half - 1)
    bucket = np.where(np.abs(away) < exact, np.abs(away), large)
    return (bucket + half * (away > 0)).astype(np.int32)


class TextEncoder(nn.Module):
    """ids i32[B,M], mask bool[B,M] -> Encoded.

    BERT (Devlin et al. 2019): post-norm, pooled by the mean over the mask. CLIP (Radford et al.
    2021): causal, pooled where the text ends. T5 (Raffel et al. 2020): relative positions that all
    layers share, pooled by the mean. CLIP needs no mask: what follows the end is not seen.
    """

    config: TextConfig
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> Encoded:
        c, M = self.config, ids.shape[1]
        if c.positions and c.positions < M:
            raise ValueError(f"texts of {M} tokens: this encoder has {c.positions} positions")
        x = jnp.take(self._table("words", c.vocabulary, 0.02), ids, axis=0)
        if c.positions:
            x = x + self._table("positions", c.positions, 0.01)[None, :M]
        if c.types:
            x = x + self._table("types", c.types, 0.02)[None, :1]
        x = x.astype(self.dtype)
        if c.layout == "bert":
            x = AffineLayerNorm(c.layers.eps, name="norm")(x)
        bias = self._bias(M) if mask is None else key_bias(mask) + self._bias(M)
        x = apply_layers(c.layers, x, bias, self.dtype, self.place)
        if c.layout != "bert":
            x = _norm(c.layers, "norm_final")(x)
        x = x.astype(jnp.float32)
        return Encoded(x, self._pooled(x, ids, mask))

    def _table(self, name: str, rows: int, std: float) -> jax.Array:
        normal = nn.initializers.normal(std)
        return self.param(name, normal, (rows, self.config.layers.width), jnp.float32)

    def _bias(self, M: int) -> jax.Array:
        """What is added to the logits of every text: f32 [1, 1 or H, M, M]."""
        c = self.config
        if c.layout == "clip":
            return jnp.asarray(causal_bias(M))
        if c.layout == "bert":
            return jnp.zeros((1, 1, 1, 1), jnp.float32)
        shape = (c.buckets, c.layers.heads)
        table = self.param("relative", nn.initializers.normal(0.02), shape, jnp.float32)
        return table[relative_buckets(M, c.buckets, c.max_distance)].transpose(2, 0, 1)[None]

    def _pooled(self, x: jax.Array, ids: jax.Array, mask: jax.Array | None) -> jax.Array:
        c = self.config
        if c.layout != "clip":
            live = jnp.ones(ids.shape) if mask is None else mask.astype(jnp.float32)
            return (x * live[..., None]).sum(1) / live.sum(1)[:, None]
        ends = ids if c.end < 0 else (ids == c.end).astype(jnp.int32)
        last = jnp.argmax(ends, axis=1)
        pooled = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        if not c.projection:
            return pooled
        normal = nn.initializers.normal(c.layers.width**-0.5)
        shape = (c.layers.width, c.projection)
        return pooled @ self.param("projection", normal, shape, jnp.float32)
