"""A transformer that writes captions of images, token by token (Betker et al. 2023, Eq. 2).

The sequence are N states of an image by a frozen network, which all see one another, then the T
tokens of its caption, each of which sees the image and the tokens before it. The last state
predicts the first token. Parameters: `states` (a linear map), `places` (of the states), `words`,
`positions` (of the tokens), `blocks/` (`models/text.py`), `norm_final` and `head`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ditjax.config import Model, above, at_least, at_most, key, positive
from ditjax.models.attention import causal_bias
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
from ditjax.models.tokens import Picking, draw_sequence, empty_cache


@dataclass(frozen=True)
class CaptionerKeys(Model):
    """The keys of `config.model` for a captioner."""

    kind: str = key("captioner")
    size: str = key("12x768x12")  # depth x width x heads
    vocabulary: int = positive(49_408)  # rows of the table of tokens
    end: int = key(49_407, at_least(0), at_most(2**24))  # the token that ends a text
    norm_eps: float = key(1e-5, above(0))


class CaptionerConfig(NamedTuple):
    """The sizes of a captioner: T `tokens`, and N `states` of width `features`."""

    layers: Layers
    vocabulary: int
    end: int
    tokens: int
    states: int
    features: int

    @property
    def length(self) -> int:
        """Of the sequence that is read: the last token predicts nothing."""
        return self.states + self.tokens - 1


class Captioner(nn.Module):
    """states f32[B,N,F] and ids i32[B,n] -> the logits f32[B,n+1,V] of tokens 0 to n.

    With the collection 'cache' (`tokens.empty_cache`), which must be mutable, the call continues
    the sequence that the cache holds: states are None but for the first call, and the logits
    f32[B,n,V] are those of the tokens behind the ones that are given.
    """

    config: CaptionerConfig
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, states: jax.Array | None, ids: jax.Array) -> jax.Array:
        c, N = self.config, self.config.states
        cached = self.has_variable("cache", "blocks")
        first: Any = np.int32(0)
        if cached:
            first = self.get_variable("cache", "blocks")["attn"]["position"][0]
        at = np.arange(ids.shape[1], dtype=np.int32)
        at = at if states is not None else first - np.int32(N) + at
        x = jnp.take(self._table("words", c.vocabulary, 0.02), ids, axis=0)
        x = x + jnp.take(self._table("positions", c.tokens), at, axis=0)[None]
        if states is not None:
            linear = Linear(c.layers.width, dtype=self.dtype, place=self.place, name="states")
            image = linear(states.astype(self.dtype)) + self._table("places", N)[None]
            x = jnp.concatenate([image, x], axis=1)
        bias = causal_bias(c.length).copy()
        bias[..., :N, :N] = 0
        rows = jax.lax.dynamic_slice_in_dim(jnp.asarray(bias), first, x.shape[1], axis=2)
        rows = rows if cached else rows[..., : x.shape[1]]
        x = apply_layers(c.layers, x.astype(self.dtype), rows, self.dtype, self.place)
        x = AffineLayerNorm(c.layers.eps, name="norm_final")(x)
        x = x if states is None else x[:, N - 1 :]
        head = Linear(c.vocabulary, dtype=self.dtype, place=self.place, name="head")
        return head(x).astype(jnp.float32)

    def _table(self, name: str, rows: int, std: float = 0.01) -> jax.Array:
        normal = nn.initializers.normal(std)
        return self.param(name, normal, (rows, self.config.layers.width), jnp.float32)


def draw_captions(
    apply: Callable[..., Any],
    c: CaptionerConfig,
    params: Any,
    states: jax.Array,
    keys: jax.Array,
    how: Picking,
    pad: int,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Write a caption of each image, by its states f32[B,N,F] and keys key[B]: i32[B,T].

    Behind its end stands `pad`; a caption that has no end in time ends at the last token, as one
    that is cut does. Caption b follows from states[b] and keys[b] alone.
    """

    def extended(cache: Any, states: Any, ids: jax.Array) -> tuple[jax.Array, Any]:
        logits, state = apply({**params, "cache": cache}, states, ids, mutable=["cache"])
        return logits[:, -1], state["cache"]

    cache = empty_cache(c, len(states), dtype)
    ids = draw_sequence(extended, cache, states, c.tokens, keys, how)
    ends = jnp.any(ids == c.end, axis=1, keepdims=True)
    last = jnp.arange(c.tokens)[None] == c.tokens - 1
    ids = jnp.where(~ends & last, jnp.int32(c.end), ids)
    return jnp.where(until_end(ids, c.end), ids, jnp.int32(pad))


# ---- the definition


def captioner_config(k: CaptionerKeys, tokens: int, states: int, features: int) -> CaptionerConfig:
    """The sizes of a recipe's captioner, for texts of so many tokens and states of an image."""
    depth, width, heads = parse_size(k.size)
    layers = Layers(depth, width, heads, 4 * width, "gelu_tanh", k.norm_eps, openai_init=True)
    return CaptionerConfig(layers, k.vocabulary, k.end, tokens, states, features)


def module(k: CaptionerKeys, config: CaptionerConfig, place: Placement = ANYWHERE) -> Captioner:
    """Build the captioner of a recipe."""
    return Captioner(config, DTYPES[k.dtype], place)


def captioner_cost(k: CaptionerKeys, c: CaptionerConfig) -> NetworkCost:
    """Parameters and multiply-accumulates of one image and caption, in closed form."""
    D, V, N, T, F = c.layers.width, c.vocabulary, c.states, c.tokens, c.features
    tables = V + T + N + 2  # of the last norm, too
    return NetworkCost(
        name=f"Captioner-{k.size}",
        parameters=layers_parameters(c.layers) + D * (tables + F + 1) + (D + 1) * V,
        macs=layers_macs(c.layers, c.length) + D * (N * F + T * V),
        tokens=c.length,
        description={"size": k.size, "states": N},
    )


CAPTIONER_RULES: Rules = (
    *LAYER_RULES,
    (r"places", (None, "fsdp")),
    (r"states/kernel", (None, "fsdp")),
    (r"head/kernel", ("fsdp", "tensor")),
    (r"head/bias", ("tensor",)),
)

# `cost` follows from the texts' length, too: the task gives it (`captioner_cost`).
NETWORK = Network(keys=CaptionerKeys, module=module, rules=CAPTIONER_RULES, varied=("size",))
