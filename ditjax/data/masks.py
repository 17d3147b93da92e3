"""Random masks of what is known of an image, drawn on the device: functions of a key alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

STROKES = 4  # at most
# Shares of holes that are a rectangle, a half plane, strokes, and the whole image.
KIND_SHARES = (0.3, 0.3, 0.3, 0.1)


def _grid(height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """The centres of pixels in (0, 1), f32[H,1] and f32[1,W]."""
    rows, columns = ((jnp.arange(n, dtype=jnp.float32) + 0.5) / n for n in (height, width))
    return rows[:, None], columns[None]


def _rectangle(key: jax.Array, height: int, width: int) -> jax.Array:
    """Sides of a quarter to three quarters of the image's, anywhere within it."""
    size, place = jax.random.uniform(key, (2, 2))
    size = 0.25 + 0.5 * size
    low = place * (1 - size)
    row, column = _grid(height, width)
    inside = (row >= low[0]) & (row < low[0] + size[0])
    return inside & (column >= low[1]) & (column < low[1] + size[1])


def _half_plane(key: jax.Array, height: int, width: int) -> jax.Array:
    """A side of a line through the inner half of the image; half of the lines are straight."""
    turn, straight, *point = jax.random.uniform(key, (4,))
    turn = jnp.where(straight < 0.5, jnp.floor(4 * turn) / 4, turn)
    down, right = jnp.cos(2 * jnp.pi * turn), jnp.sin(2 * jnp.pi * turn)
    row, column = _grid(height, width)
    y, x = (0.25 + 0.5 * each for each in point)
    return down * (row - y) + right * (column - x) > 0


def _strokes(key: jax.Array, height: int, width: int) -> jax.Array:
    """A line of 1 to 4 segments, a tenth to three tenths of the image thick."""
    key_points, key_rest = jax.random.split(key)
    points = jax.random.uniform(key_points, (STROKES + 1, 2))
    count, thickness = jax.random.uniform(key_rest, (2,))
    row, column = _grid(height, width)

    def distance(start: jax.Array, end: jax.Array) -> jax.Array:
        along = end - start
        share = (row - start[0]) * along[0] + (column - start[1]) * along[1]
        share = jnp.clip(share / jnp.maximum(jnp.square(along).sum(), 1e-6), 0, 1)
        return jnp.hypot(row - start[0] - share * along[0], column - start[1] - share * along[1])

    apart = jax.vmap(distance)(points[:-1], points[1:])
    drawn = jnp.arange(STROKES) < 1 + jnp.floor(STROKES * count)
    return jnp.where(drawn[:, None, None], apart, jnp.inf).min(0) < 0.05 + 0.1 * thickness


def _everything(key: jax.Array, height: int, width: int) -> jax.Array:
    return jnp.ones((height, width), bool)


_HOLES: tuple[Callable[[jax.Array, int, int], jax.Array], ...] = (
    _rectangle,
    _half_plane,
    _strokes,
    _everything,
)


def random_mask(key: jax.Array, height: int, width: int) -> jax.Array:
    """What is known of an image -> f32[H,W,1], 1 where a pixel is known and 0 in the hole."""
    key_kind, key_hole = jax.random.split(key)
    kind = jax.random.choice(key_kind, len(KIND_SHARES), p=jnp.asarray(KIND_SHARES))
    holes = jnp.stack([hole(key_hole, height, width) for hole in _HOLES])
    return 1.0 - holes[kind].astype(jnp.float32)[..., None]
