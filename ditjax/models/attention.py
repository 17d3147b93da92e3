"""Multi-head attention: softmax(q kᵀ / √d) v."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ditjax.models.embed import ANYWHERE, Attend, Initializer, Linear, Placement, xavier_uniform


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Vaswani et al. 2017 Eq. 1: q [B,H,N,d], k and v [B,H,M,d] -> [B,H,N,d].

    Heads are a leading axis of batched products: on CPUs this is faster than
    `jax.nn.dot_product_attention`. The softmax is computed in float32. Its denominator divides the
    d values of a token's output instead of its M weights, in the gradient too. That saves two
    passes over the largest arrays and the memory of one of them; JAX's own gradient would not.
    """
    return _attend(q, k, v)[0]


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return y and the residuals of the gradient: weights are not divided by their `total`."""
    q = q * q.shape[-1] ** -0.5
    logits = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
    logits = logits if bias is None else logits + bias
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    weights = weights.astype(v.dtype)
    y = jnp.einsum("bhnm,bhmd->bhnd", weights, v, preferred_element_type=jnp.float32)
    return (y / total).astype(v.dtype), (q, k, v, weights, total)


def _gradient(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
    """(dq, dk, dv). dlogits = w/t (dw - Σ dw w/t), with dw = dy vᵀ of weights w and total t."""
    q, k, v, weights, total = saved
    dy = (dy.astype(jnp.float32) / total).astype(v.dtype)
    dweights = jnp.einsum("bhnd,bhmd->bhnm", dy, v, preferred_element_type=jnp.float32)
    w = weights.astype(jnp.float32)
    mean = (w * dweights).sum(-1, keepdims=True) / total
    dlogits = (w * (dweights - mean)).astype(v.dtype)
    dq = jnp.einsum("bhnm,bhmd->bhnd", dlogits, k) * q.shape[-1] ** -0.5
    dk = jnp.einsum("bhnm,bhnd->bhmd", dlogits, q)
    dv = jnp.einsum("bhnm,bhnd->bhmd", weights, dy)
    return dq, dk, dv


attend.defvjp(_attend, _gradient)


def attention_weights(
    q: jax.Array, k: jax.Array, scale: float = 1.0, bias: jax.Array | None = None
) -> jax.Array:
    """softmax(q kᵀ / √d · scale + bias), f32[..,N,M], the weights that `attend` does not keep."""
    q = _scaled(q, scale) * q.shape[-1] ** -0.5
    logits = jnp.einsum("...nd,...md->...nm", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits if bias is None else logits + bias, axis=-1)


def autodiff_attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attend`, differentiated by JAX itself: forwards, too, which a `custom_vjp` refuses."""
    return _attend(q, k, v)[0]


MASKED = -1e9  # finite: a row whose keys are all masked attends to all of them, and stays finite


def biased_attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """`attend` with a bias that is added to the logits; differentiated by JAX itself.

    bias: f32 [1 or B, 1 or H, 1 or N, M], such as MASKED for a key that is not to be seen.
    """
    return _attend(q, k, v, bias)[0]


def causal_bias(tokens: int) -> np.ndarray:
    """The bias under which token i sees tokens 0 to i: f32 [1, 1, N, N]."""
    return np.triu(np.full((tokens, tokens), MASKED, np.float32), 1)[None, None]


def key_bias(mask: jax.Array) -> jax.Array:
    """The bias under which keys are seen where mask bool[B, M] is true: f32 [B, 1, 1, M]."""
    return jnp.where(mask, np.float32(0), np.float32(MASKED))[:, None, None, :]


# ---- windows and hops


class Window(NamedTuple):
    """The places that a token of a grid sees: those at most `radius` rows and columns away."""

    rows: int
    columns: int
    radius: int


def _neighbours(x: jax.Array, window: Window) -> list[jax.Array]:
    """The tokens of x [B,H,N,d] that each token sees, zeros beyond the grid: (2r+1)² of [B,H,N,d].

    Each is a slice of the padded grid: nothing is gathered.
    """
    rows, columns, r = window
    grid = x.reshape(*x.shape[:2], rows, columns, -1)
    padded = jnp.pad(grid, ((0, 0), (0, 0), (r, r), (r, r), (0, 0)))
    shifts = [(i, j) for i in range(2 * r + 1) for j in range(2 * r + 1)]
    return [padded[:, :, i : i + rows, j : j + columns].reshape(x.shape) for i, j in shifts]


def window_bias(window: Window) -> np.ndarray:
    """0 for a neighbour on the grid and -inf for one beyond it: f32[N, (2r+1)²]."""
    rows, columns, r = window
    y, x = (each.reshape(-1, 1) for each in np.indices((rows, columns)))
    dy, dx = (each.reshape(1, -1) - r for each in np.indices((2 * r + 1, 2 * r + 1)))
    inside = (y + dy >= 0) & (y + dy < rows) & (x + dx >= 0) & (x + dx < columns)
    return np.where(inside, np.float32(0), np.float32(-np.inf))


def mixing(
    q: jax.Array, k: jax.Array, window: Window | None = None
) -> Callable[[jax.Array], jax.Array]:
    """Build the product with A, the softmax of q kᵀ / √d: f32[B,H,N,d] -> A z, of the same shape.

    With a window, a row of A is the softmax over the token's neighbours.
    """
    if window is None:
        weights = attention_weights(q, k)
        return lambda z: jnp.einsum("bhnm,bhmd->bhnd", weights, z)
    q32, k32 = q.astype(jnp.float32) * q.shape[-1] ** -0.5, k.astype(jnp.float32)
    logits = jnp.stack([(q32 * each).sum(-1) for each in _neighbours(k32, window)], -1)
    of = jax.nn.softmax(logits + window_bias(window)[None, None], axis=-1)
    return lambda z: sum(
        (of[..., i, None] * each for i, each in enumerate(_neighbours(z, window))),
        start=jnp.zeros_like(z),
    )


def diffused_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    hops: int,
    alpha: float,
    window: Window | None = None,
) -> jax.Array:
    """Attention diffusion after Wang et al. 2021 (MAGNA) Eqs. 3-6, with the softmax of `attend`.

    Z⁰ = V, Z^{k+1} = (1 - α) A Z^k + α V; the output is Z^hops. Its limit is α (I - (1 - α) A)⁻¹ V,
    from which it differs by at most 2 (1 - α)^hops max|V|. hops=1 with α=0 is attention. With a
    window of radius r, a token depends on those within hops·r rows and columns. A and Z are
    float32. q, k and v are [B,H,N,d] of one sequence.
    """
    spread, v32 = mixing(q, k, window), v.astype(jnp.float32)

    def hop(z: jax.Array, _: None) -> tuple[jax.Array, None]:
        return (1 - alpha) * spread(z) + alpha * v32, None

    return jax.lax.scan(hop, v32, None, length=hops)[0].astype(v.dtype)


def _heads_first(x: jax.Array) -> jax.Array:
    return x.swapaxes(-3, -2)


def _within_groups(
    compute: Attend, place: Placement, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """Attention within each group of q, k and v [B,G,H,N,d]."""
    if place.merge_rows:  # the groups are samples
        return compute(*(x.reshape(-1, *x.shape[2:]) for x in (q, k, v))).reshape(q.shape)
    # Groups on several devices are no longer beside each other in a merged axis.
    return jax.vmap(attend, 1, 1)(q, k, v)


def _scaled(q: jax.Array, by: float) -> jax.Array:
    """Scale the queries; the attention kernels apply 1 / √d themselves."""
    return q if by == 1 else q * by


def rms_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Zhang & Sennrich 2019 Eq. 4: x / sqrt(E[x²] + eps) over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    mean = jnp.square(x32).mean(-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean + eps)).astype(x.dtype)


class HeadNorm(nn.Module):
    """Henry et al. 2020, as RMSNorm: x [B,..,N,d] / RMS over d, times a learned scale [d]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        scale = jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
        return (rms_norm(x.astype(jnp.float32)) * scale).astype(x.dtype)


def rotary_table(rows: int, columns: int, d: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Su et al. 2021 Eq. 15 on a grid: cos, sin f32[tokens, d/2] of the angles y ω_i and x ω_i.

    The first half of the frequencies turns by the row, the second by the column, with
    ω_i = 10⁴^(-4i/d). Tokens after the rows·columns patches have no position: angle 0.
    """
    omega = 1e4 ** (-np.arange(d // 4) / (d // 4))
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    angles = np.concatenate([y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega], axis=1)
    angles = np.pad(angles, ((0, tokens - rows * columns), (0, 0)))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotated(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Rotate the pairs (x_i, x_{i+d/2}) of x [B,H,N,d] by each token's position."""
    N, d = x.shape[2:]
    cos, sin = (jnp.asarray(each)[None, None] for each in rotary_table(rows, columns, d, N))
    first, second = (half.astype(jnp.float32) for half in (x[..., : d // 2], x[..., d // 2 :]))
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class SelfAttention(nn.Module):
    """x [B, N, D] -> [B, N, D], with one fused qkv product: kernel [D, 3, H, d] and bias.

    Of groups of tokens, [B, G, N, D], each attends to itself.

    The logits are q kᵀ / √d times `query_scale`, plus `bias` (`biased_attend`) if it is given.
    `qk_norm` normalises queries and keys of each head; `rope` (rows, columns) rotates them by their
    positions (`rotated`). d is D / H, or `head_width`. `inits` are those of both kernels.

    If the collection 'cache' has keys and values [B, H, S, d] of this layer, those of x are written
    to it from its `position` on, and x attends to all S: the bias masks what is not yet written.
    """

    heads: int
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE
    query_scale: float = 1.0
    qk_norm: bool = False
    rope: tuple[int, int] | None = None
    head_width: int = 0
    use_bias: bool = True
    inits: tuple[Initializer, Initializer] = (xavier_uniform, xavier_uniform)

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        D, put = x.shape[-1], self.place.put
        linear = functools.partial(
            Linear, dtype=self.dtype, place=self.place, use_bias=self.use_bias
        )
        features = (3, self.heads, self.head_width or D // self.heads)
        first = self.place.heads_first
        qkv = linear(features, kernel_init=self.inits[0], heads_first=first, name="qkv")(x)
        q, k, v = qkv if first else (_heads_first(qkv[..., i, :, :]) for i in range(3))
        if self.qk_norm:
            q, k = HeadNorm(name="q_norm")(q), HeadNorm(name="k_norm")(k)
        if self.rope:
            q, k = (rotated(each, *self.rope) for each in (q, k))
        if self.has_variable("cache", "keys"):
            k, v = self._with_cached(k, v)
        compute = self.place.attend or attend
        if bias is not None:
            compute = functools.partial(biased_attend, bias=bias)
        if x.ndim == 4:
            compute = functools.partial(_within_groups, compute, self.place)
        q = _scaled(q, self.query_scale)
        y = compute(put("queries", q), put("keys", k), put("keys", v))
        y = _heads_first(put("queries", y)).reshape(*x.shape[:-1], -1)
        return put("tokens", linear(D, kernel_init=self.inits[1], name="out")(y))

    def _with_cached(self, k: jax.Array, v: jax.Array) -> list[jax.Array]:
        """The keys and values of the collection 'cache', with these at its position."""
        first: Any = self.get_variable("cache", "position")
        found = []
        for name, new in (("keys", k), ("values", v)):
            kept: Any = self.get_variable("cache", name)
            found.append(jax.lax.dynamic_update_slice_in_dim(kept, new, first, axis=2))
            self.put_variable("cache", name, found[-1])
        self.put_variable("cache", "position", first + np.int32(k.shape[2]))
        return found


class CrossAttention(nn.Module):
    """x [B, N, D] attends to context [B, M, D_c] -> [B, N, D].

    Kernels q [D, H, d] and kv [D_c, 2, H, d]. Always plain attention: a fused kernel would pad the
    two keys to 128. The logits are q kᵀ / √d times `query_scale`. With a mask bool[B, M] only the
    tokens of the context where it is true are seen.
    """

    heads: int
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE
    query_scale: float = 1.0
    out_init: Initializer = xavier_uniform

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        D, put = x.shape[-1], self.place.put
        q = Linear((self.heads, D // self.heads), dtype=self.dtype, place=self.place, name="q")(x)
        kv = Linear(
            (2, self.heads, D // self.heads), dtype=self.dtype, place=self.place, name="kv"
        )(context)
        k, v = (_heads_first(kv[:, :, i]) for i in range(2))
        q = _scaled(_heads_first(q), self.query_scale)
        compute: Attend = attend
        if mask is not None:
            compute = functools.partial(biased_attend, bias=key_bias(mask))
        y = compute(put("queries", q), put("keys", k), put("keys", v))
        y = _heads_first(put("queries", y)).reshape(x.shape)
        return put("tokens", Linear(D, self.out_init, self.dtype, self.place, name="out")(y))
