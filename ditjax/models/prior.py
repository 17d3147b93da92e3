"""unCLIP's prior: CLIP's vector of an image from its caption (Ramesh et al. 2022, Sec. 2.2).

The tokens are [text's hidden states (M) | text's vector | time | noised image's vector | query],
under a causal mask; the output at the query predicts the image's vector. Parameters: `context`,
`vector`, `x`, `time_in`, `time_out`, `query`, `positions`, `blocks/` (`models/text.py`),
`norm_final` and `out`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ditjax.config import Model, above, key
from ditjax.models.attention import causal_bias, key_bias
from ditjax.models.blocks import AffineLayerNorm
from ditjax.models.dit import parse_size
from ditjax.models.embed import ANYWHERE, Linear, Placement, timestep_frequencies
from ditjax.models.network import DTYPES, Conditions, Network, NetworkCost, Rules
from ditjax.models.text import (
    LAYER_RULES,
    Layers,
    apply_layers,
    layers_macs,
    layers_parameters,
)

_BEHIND = 4  # tokens behind the text


@dataclass(frozen=True)
class PriorKeys(Model):
    """The keys of `config.model` for unCLIP's prior; the default is the paper's size."""

    kind: str = key("prior")
    size: str = key("24x2048x32")  # depth x width x heads
    norm_eps: float = key(1e-5, above(0))


class PriorConfig(NamedTuple):
    """The sizes of a prior: of texts of `tokens` tokens of width `context`, and of vectors."""

    layers: Layers
    tokens: int
    context: int
    vector: int


class PriorTransformer(nn.Module):
    """x f32[B,E] at time t [B], with context f32[B,M,C], its mask, vector f32[B,E] -> f32[B,E]."""

    config: PriorConfig
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, conditions: Conditions) -> jax.Array:
        c, D = self.config, self.config.layers.width
        conditions.only("context", "context_mask", "vector")

        def linear(name: str, features: int, value: Any) -> jax.Array:
            layer = Linear(features, dtype=self.dtype, place=self.place, name=name)
            return layer(jnp.asarray(value, jnp.float32))

        time = nn.silu(linear("time_in", D, timestep_frequencies(t, D)))
        rows = (
            linear("vector", D, conditions.vector),
            linear("time_out", D, time),
            linear("x", D, x),
        )
        query = jnp.broadcast_to(self._table("query", 1).astype(self.dtype), rows[0].shape)
        behind = jnp.stack([*rows, query], axis=1)
        tokens = jnp.concatenate([linear("context", D, conditions.context), behind], axis=1)
        S = c.tokens + _BEHIND
        tokens = tokens + self._table("positions", S).astype(self.dtype)[None]
        bias = jnp.asarray(causal_bias(S))
        if conditions.context_mask is not None:
            mask = jnp.asarray(conditions.context_mask, bool)
            bias = bias + key_bias(jnp.pad(mask, ((0, 0), (0, _BEHIND)), constant_values=True))
        tokens = apply_layers(c.layers, tokens, bias, self.dtype, self.place)
        last = AffineLayerNorm(c.layers.eps, name="norm_final")(tokens[:, -1:])
        return linear("out", c.vector, last[:, 0]).astype(jnp.float32)

    def _table(self, name: str, rows: int) -> jax.Array:
        normal = nn.initializers.normal(0.01)
        return self.param(name, normal, (rows, self.config.layers.width), jnp.float32)


def prior_layers(k: PriorKeys) -> Layers:
    """The layers of a recipe's prior."""
    depth, width, heads = parse_size(k.size)
    return Layers(depth, width, heads, 4 * width, "gelu", k.norm_eps)


def module(k: PriorKeys, config: PriorConfig, place: Placement = ANYWHERE) -> PriorTransformer:
    """Build the prior of a recipe."""
    return PriorTransformer(config, DTYPES[k.dtype], place)


def prior_cost(k: PriorKeys, c: PriorConfig) -> NetworkCost:
    """Parameters and multiply-accumulates of one vector, in closed form."""
    D, S = c.layers.width, c.tokens + _BEHIND
    inputs = c.context + 2 * c.vector + 2 * D + 5  # of five linear layers with biases
    return NetworkCost(
        name=f"unCLIP prior-{k.size}",
        parameters=layers_parameters(c.layers) + D * (inputs + 1 + S + 2) + (D + 1) * c.vector,
        macs=layers_macs(c.layers, S) + D * (c.tokens * c.context + 3 * c.vector + 2 * D),
        tokens=S,
        description={"size": k.size, "vector": c.vector, "context": c.context},
    )


PRIOR_RULES: Rules = (
    *LAYER_RULES,
    (r"query", (None, "fsdp")),
    (r"(context|vector|x|time_in|time_out|out)/kernel", ("fsdp", None)),
)

# `cost` follows from CLIP's sizes, too: the task gives it (`prior_cost`).
NETWORK = Network(keys=PriorKeys, module=module, rules=PRIOR_RULES, varied=("size",))
