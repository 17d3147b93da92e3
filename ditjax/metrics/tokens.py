"""Numbers from the tokens of an image, and from maps of attention between them.

Tokens are rows x columns places, row by row; a place is (row, column) in units of tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray


def places(rows: int, columns: int) -> NDArray[np.float32]:
    """The place of each token -> f32[N,2]."""
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return np.stack([row.reshape(-1), column.reshape(-1)], axis=1).astype(np.float32)


def distances(rows: int, columns: int) -> NDArray[np.float32]:
    """The distance between each two tokens -> f32[N,N]."""
    at = places(rows, columns)
    return np.linalg.norm(at[:, None] - at[None], axis=-1)


def attention_entropy(weights: jax.Array) -> jax.Array:
    """-Σ a ln a over the last axis, in nats, mean over queries: f[..,N,M] -> f[..].

    From 0, where each query attends to one token, to ln M, where it attends to all alike.
    """
    p = jnp.maximum(weights, jnp.finfo(jnp.float32).tiny)
    return -(weights * jnp.log(p)).sum(-1).mean(-1)


def attention_distance(weights: jax.Array, rows: int, columns: int) -> jax.Array:
    """Σ a |place of query - place of key|, mean over queries, in tokens: f[..,N,N] -> f[..].

    Dosovitskiy et al. 2021 (ViT) Fig. 7. Rows that sum to less than 1 are brought to 1.
    """
    apart = jnp.asarray(distances(rows, columns))
    return (jnp.einsum("...nm,nm->...n", weights, apart) / weights.sum(-1)).mean(-1)


def best_matches(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Tang et al. 2023 (DIFT, arXiv:2306.03881): the key of the largest cosine with each query.

    queries and keys f[..,N,D] -> i32[..,N]. Tokens grow with depth, so lengths are left out.
    """
    q, k = (
        x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
        for x in (queries.astype(jnp.float32), keys.astype(jnp.float32))
    )
    return jnp.argmax(jnp.einsum("...nd,...md->...nm", q, k), axis=-1)


def correct_keypoints(
    matches: NDArray[np.integer], source: NDArray[np.float32], rows: int, columns: int
) -> NDArray[np.bool_]:
    """Whether a match i[..,N] lies within 1 token of its true place f32[..,N,2]: PCK@1."""
    apart = np.linalg.norm(places(rows, columns)[matches] - source, axis=-1)
    return np.asarray(apart <= 1.0 + 1e-5)


def recovered(out: jax.Array, corrupt: jax.Array, clean: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two parts of a patch's effect [m(patched) - m(corrupt)] / [m(clean) - m(corrupt)].

    m is linear: the component along clean - corrupt, f[B,...] each -> f32[B], f32[B]. The effect of
    a set of examples is the ratio of their sums (Heimersheim & Nanda 2024, arXiv:2404.15255).
    """
    axes = tuple(range(1, out.ndim))
    direction = clean - corrupt
    return ((out - corrupt) * direction).sum(axes), jnp.square(direction).sum(axes)


def overlaps(found: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Intersection over union of tokens bool[n,N,M] with regions bool[n,N] -> f64[n,M].

    0 if neither has a token.
    """
    region = region[:, :, None]
    both, either = (found & region).sum(1), (found | region).sum(1)
    return np.asarray(both / np.maximum(either, 1))
