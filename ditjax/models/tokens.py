"""The transformer of DALL·E over text and image codes in one sequence (Ramesh et al. 2021, App. B).

The sequence is T text tokens, then the N codes of an image, row by row. Each predicts the next: the
last text token predicts the first code. Parameters: `words`, `padding`, `positions`, `codes`,
`rows`, `columns`, `blocks/` (`models/text.py`), `norm_final`, `text_head` and `image_head`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ditjax.config import Model, Rule, above, at_least, at_most, key, positive
from ditjax.models.attention import MASKED, causal_bias
from ditjax.models.blocks import AffineLayerNorm
from ditjax.models.dit import parse_size
from ditjax.models.embed import ANYWHERE, Linear, Placement
from ditjax.models.network import DTYPES, Network, NetworkCost, Rules
from ditjax.models.text import (
    LAYER_RULES,
    Layers,
    apply_layers,
    layers_macs,
    layers_parameters,
    until_end,
)

_ODD = Rule(lambda v: v % 2 == 1, "an odd number")


@dataclass(frozen=True)
class TokensKeys(Model):
    """The keys of `config.model` for the transformer; codes and grid are those of the dVAE."""

    kind: str = key("tokens")
    size: str = key("64x3968x62")  # depth x width x heads
    vocabulary: int = positive(16_384)  # rows of the table of text tokens
    end: int = key(1, at_least(0), at_most(2**24))  # the token that ends a text
    codes: int = positive(8192)
    grid: int = positive(32, most=1024)  # side of the grid of codes
    # full: every code sees all before it; sparse: rows, columns and a convolution, by layer
    attention: Literal["full", "sparse"] = key("full")
    kernel: int = key(11, at_least(1), _ODD)  # side of the convolution of the last sparse layer
    norm_eps: float = key(1e-5, above(0))

    def unused(self, name: str, c: Any) -> str:
        return "attention" if name == "kernel" and self.attention == "full" else ""


class TokensConfig(NamedTuple):
    """The sizes of the transformer; `tokens` is T."""

    layers: Layers
    vocabulary: int
    end: int
    tokens: int
    codes: int
    grid: int
    attention: str
    kernel: int

    @property
    def length(self) -> int:
        """Of the sequence that is read: the last code predicts nothing."""
        return self.tokens + self.grid**2 - 1


# ---- what a code sees


def code_bias(kind: str, c: TokensConfig) -> np.ndarray:
    """The bias of a kind of layer, f32 [1, 1, S, S]: all are causal, and codes see all text.

    Ramesh et al. 2021 Fig. 11. `row`: a code sees the codes before it up to the one above it;
    `column`: those above it; `convolution`: those of a square of side `kernel` around it, which
    wraps at the ends of a row as `row` does.
    """
    bias = causal_bias(c.length).copy()
    i = np.arange(c.grid**2 - 1)
    back = i[:, None] - i[None, :]
    if kind == "row":
        seen = back <= c.grid
    elif kind == "column":
        seen = back % c.grid == 0
    elif kind == "convolution":
        half = c.kernel // 2
        rows, columns = np.mgrid[: half + 1, -half : half + 1]
        seen = np.isin(back, rows * c.grid + columns)
    else:
        seen = np.ones_like(back, bool)
    codes = bias[0, 0, c.tokens :, c.tokens :]
    codes[~seen] = MASKED
    return bias


def layer_patterns(c: TokensConfig) -> tuple[tuple[str, ...], np.ndarray]:
    """The kinds of layers that there are, and which each of the layers is, i32[L].

    Sparse (App. B.1): layer i, from 1, is `column` if (i - 2) mod 4 = 0 and `row` otherwise; the
    last is `convolution`.
    """
    if c.attention == "full":
        return ("full",), np.zeros(c.layers.depth, np.int32)
    number = 1 + np.arange(c.layers.depth)
    which = np.where((number - 2) % 4 == 0, 1, 0).astype(np.int32)
    which[-1] = 2
    return ("row", "column", "convolution"), which


# ---- the network


class Predicted(NamedTuple):
    """Logits: text f32[B,T-1,V] of tokens 1 to T-1, None without text; codes f32[B,n,K]."""

    text: jax.Array | None
    codes: jax.Array


class CodeTransformer(nn.Module):
    """text i32[B,T] and codes i32[B,n] before the last -> the logits of codes 0 to n.

    With the collection 'cache' (`empty_cache`), which must be mutable, the call continues the
    sequence that the cache holds: text is None but for the first call, and the logits are those of
    the codes behind the ones that are given.
    """

    config: TokensConfig
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, text: jax.Array | None, codes: jax.Array) -> Predicted:
        c, T = self.config, self.config.tokens
        cached = self.has_variable("cache", "blocks")
        first: Any = np.int32(0)
        if cached:
            first = self.get_variable("cache", "blocks")["attn"]["position"][0]
        x = self._embedded_codes(codes, first if text is None else first + np.int32(T))
        if text is not None:
            x = jnp.concatenate([self._embedded_text(text), x], axis=1)
        kinds, which = layer_patterns(c)
        bias = jnp.asarray(np.stack([code_bias(kind, c) for kind in kinds]))
        bias = jax.lax.dynamic_slice_in_dim(bias, first, x.shape[1], axis=3)
        bias = bias if cached else bias[..., : x.shape[1]]
        x = apply_layers(c.layers, x.astype(self.dtype), bias, self.dtype, self.place, which)
        x = AffineLayerNorm(c.layers.eps, name="norm_final")(x)
        text_logits = None
        if text is not None:
            head = Linear(c.vocabulary, dtype=self.dtype, place=self.place, name="text_head")
            text_logits, x = head(x[:, : T - 1]).astype(jnp.float32), x[:, T - 1 :]
        head = Linear(c.codes, dtype=self.dtype, place=self.place, name="image_head")
        return Predicted(text_logits, head(x).astype(jnp.float32))

    def _table(self, name: str, rows: int, std: float = 0.01) -> jax.Array:
        normal = nn.initializers.normal(std)
        return self.param(name, normal, (rows, self.config.layers.width), jnp.float32)

    def _embedded_text(self, ids: jax.Array) -> jax.Array:
        """A padded place has an embedding of its own, whatever its id is (App. B.1)."""
        c = self.config
        words = jnp.take(self._table("words", c.vocabulary, 0.02), ids, axis=0)
        live = until_end(ids, c.end)[..., None]
        x = jnp.where(live, words, self._table("padding", c.tokens)[None])
        return x + self._table("positions", c.tokens)[None]

    def _embedded_codes(self, codes: jax.Array, first: jax.Array) -> jax.Array:
        """Codes, the first of which is at place `first` of the sequence."""
        c = self.config
        at = first - np.int32(c.tokens) + np.arange(codes.shape[1], dtype=np.int32)
        x = jnp.take(self._table("codes", c.codes, 0.02), codes, axis=0)
        for name, place in (("rows", at // np.int32(c.grid)), ("columns", at % np.int32(c.grid))):
            x = x + jnp.take(self._table(name, c.grid), place, axis=0)[None]
        return x


class SequenceConfig(Protocol):
    """The sizes of a stack that reads sequences of a length."""

    @property
    def layers(self) -> Layers: ...

    @property
    def length(self) -> int: ...


def empty_cache(c: SequenceConfig, batch: int, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The collection 'cache' of a sequence that is yet to begin."""
    L, H = c.layers.depth, c.layers.heads
    shape = (L, batch, H, c.length, c.layers.width // H)
    attention = {
        "keys": jnp.zeros(shape, dtype),
        "values": jnp.zeros(shape, dtype),
        "position": jnp.zeros(L, jnp.int32),
    }
    return {"blocks": {"attn": attention}}


def token_nats(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """-ln p of tokens i32[B,n] by their logits f32[B,n,V]: f32[B,n]."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1)
    return -chosen[..., 0]


# ---- drawing


class Picking(NamedTuple):
    """How a code is drawn: from the `top_k` likeliest, 0 for all, that make up `top_p`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def filtered_logits(logits: jax.Array, how: Picking) -> jax.Array:
    """Logits f32[B,K] over the temperature; those that cannot be drawn are MASKED.

    top_p: Holtzman et al. 2019, Sec. 3.1: the fewest codes whose probabilities add up to it.
    """
    logits = logits / how.temperature
    if how.top_k and how.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, how.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, jnp.float32(MASKED), logits)
    if how.top_p < 1:
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]
        share = jax.nn.softmax(ordered)
        before = jnp.cumsum(share, axis=-1) - share
        kept = jnp.where(before < how.top_p, ordered, jnp.float32(np.inf))
        logits = jnp.where(logits < kept.min(-1, keepdims=True), jnp.float32(MASKED), logits)
    return logits


def draw_codes(
    apply: Callable[..., Any],
    c: TokensConfig,
    params: Any,
    text: jax.Array,
    keys: jax.Array,
    how: Picking,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Draw the codes of an image for each text, one after another: i32[B,N].

    text i32[B,T], keys key[B]. Code i of image b follows from keys[b] and text b alone.
    """

    def extended(cache: Any, text: Any, codes: jax.Array) -> tuple[jax.Array, Any]:
        out, state = apply({**params, "cache": cache}, text, codes, mutable=["cache"])
        return out.codes[:, -1], state["cache"]

    return draw_sequence(extended, empty_cache(c, len(text), dtype), text, c.grid**2, keys, how)


def draw_sequence(
    extended: Callable[..., tuple[jax.Array, Any]],
    cache: Any,
    prefix: jax.Array,
    count: int,
    keys: jax.Array,
    how: Picking,
) -> jax.Array:
    """Draw `count` tokens behind a prefix [B,...], one after another: i32[B,count]; keys key[B].

    extended(cache, prefix or None, tokens i32[B,n]) -> the next token's logits f32[B,K], and the
    cache.
    """

    def picked(logits: jax.Array, i: jax.Array) -> jax.Array:
        each = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        drawn = jax.vmap(jax.random.categorical)(each, filtered_logits(logits, how))
        return drawn.astype(jnp.int32)

    def step(carry: Any, i: jax.Array) -> tuple[Any, jax.Array]:
        logits, cache = carry
        token = picked(logits, i)
        return extended(cache, None, token[:, None]), token

    started = extended(cache, prefix, jnp.zeros((len(prefix), 0), jnp.int32))
    (logits, _), tokens = jax.lax.scan(step, started, jnp.arange(count - 1))
    last = picked(logits, jnp.int32(count - 1))[:, None]
    return jnp.concatenate([tokens.T, last], axis=1)


# ---- the definition


def tokens_config(k: TokensKeys, tokens: int) -> TokensConfig:
    """The sizes of a recipe's transformer, for texts of so many tokens."""
    depth, width, heads = parse_size(k.size)
    layers = Layers(depth, width, heads, 4 * width, "gelu_tanh", k.norm_eps, openai_init=True)
    sizes = (k.vocabulary, k.end, tokens, k.codes, k.grid)
    return TokensConfig(layers, *sizes, k.attention, k.kernel)


def module(k: TokensKeys, config: TokensConfig, place: Placement = ANYWHERE) -> CodeTransformer:
    """Build the transformer of a recipe."""
    return CodeTransformer(config, DTYPES[k.dtype], place)


def tokens_cost(k: TokensKeys, c: TokensConfig) -> NetworkCost:
    """Parameters and multiply-accumulates of one sequence, in closed form."""
    D, V, K, T, N = c.layers.width, c.vocabulary, c.codes, c.tokens, c.grid**2
    tables = V + 2 * T + K + 2 * c.grid + 2  # of the last norm, too
    return NetworkCost(
        name=f"DALL·E-{k.size}",
        parameters=layers_parameters(c.layers) + D * tables + (D + 1) * (V + K),
        macs=layers_macs(c.layers, c.length) + D * ((T - 1) * V + N * K),
        tokens=c.length,
        description={"size": k.size, "codes": K, "grid": c.grid, "attention": c.attention},
    )


TOKENS_RULES: Rules = (
    *LAYER_RULES,
    (r"(padding|codes|rows|columns)", (None, "fsdp")),
    (r"(text|image)_head/kernel", ("fsdp", "tensor")),
    (r"(text|image)_head/bias", ("tensor",)),
)

# `cost` follows from the texts' length, too: the task gives it (`tokens_cost`).
NETWORK = Network(keys=TokensKeys, module=module, rules=TOKENS_RULES, varied=("size",))
