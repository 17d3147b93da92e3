"""Multi-head attention: softmax(q kᵀ / √d) v."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from ditjax.models.embed import ANYWHERE, Linear, Placement


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Vaswani et al. 2017 Eq. 1: q [B,H,N,d], k and v [B,H,M,d] -> [B,H,N,d].

    Heads are a leading axis of explicit batched products: on CPUs this is faster than
    `jax.nn.dot_product_attention`. The softmax is taken in float32; its denominator divides the
    result, d values a token, and not the weights, M of them.
    """
    logits = jnp.einsum("bhnd,bhmd->bhnm", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    y = jnp.einsum("bhnm,bhmd->bhnd", weights.astype(v.dtype), v)
    return (y.astype(jnp.float32) / total).astype(v.dtype)


def _heads_first(x: jax.Array) -> jax.Array:
    return x.transpose(0, 2, 1, 3)


class SelfAttention(nn.Module):
    """x [B, N, D] -> [B, N, D]; one fused qkv product, kernel [D, 3, H, d], with bias."""

    heads: int
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D, put = x.shape[-1], self.place.put
        qkv = Linear(
            (3, self.heads, D // self.heads), dtype=self.dtype, place=self.place, name="qkv"
        )(x)
        q, k, v = (_heads_first(qkv[:, :, i]) for i in range(3))
        y = attend(put("queries", q), put("keys", k), put("keys", v))
        y = _heads_first(put("queries", y)).reshape(x.shape)
        return put("tokens", Linear(D, dtype=self.dtype, place=self.place, name="out")(y))


class CrossAttention(nn.Module):
    """x [B, N, D] attends to context [B, M, D_c] -> [B, N, D].

    Kernels q [D, H, d] and kv [D_c, 2, H, d].
    """

    heads: int
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        D, put = x.shape[-1], self.place.put
        q = Linear((self.heads, D // self.heads), dtype=self.dtype, place=self.place, name="q")(x)
        kv = Linear(
            (2, self.heads, D // self.heads), dtype=self.dtype, place=self.place, name="kv"
        )(context)
        k, v = (_heads_first(kv[:, :, i]) for i in range(2))
        y = attend(put("queries", _heads_first(q)), put("keys", k), put("keys", v))
        y = _heads_first(put("queries", y)).reshape(x.shape)
        return put("tokens", Linear(D, dtype=self.dtype, place=self.place, name="out")(y))
