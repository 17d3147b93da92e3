"""Control images: maps that are computed from an image, on the device.

Each function takes an image f32[H,W,C] in [-1, 1] and a random key, and returns a map f32[H,W,K] in
[-1, 1]. Your own is named by its dotted name.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

AnyImage = jax.Array | np.ndarray
ControlMap = Callable[[AnyImage, jax.Array], jax.Array]

LOW_CELL = 4  # pixels a side that `low_map` averages


def ink_map(image: AnyImage, key: jax.Array) -> jax.Array:
    """The bright pixels by Otsu's threshold (Otsu 1979): 1 where brighter, -1 elsewhere, K = 1.

    The threshold is the byte that maximises the variance between the two classes; of several, the
    lowest.
    """
    grey = jnp.clip(jnp.rint((jnp.asarray(image).mean(-1) + 1) * 127.5), 0, 255).astype(jnp.int32)
    share = jnp.bincount(grey.reshape(-1), length=256) / grey.size
    below, moment = jnp.cumsum(share), jnp.cumsum(share * jnp.arange(256))
    spread = below * (1 - below)
    between = jnp.square(moment[-1] * below - moment) / jnp.maximum(spread, 1e-6)
    threshold = jnp.argmax(jnp.where(spread > 1e-6, between, 0))
    return jnp.where(grey > threshold, 1.0, -1.0)[..., None]


def edge_map(image: AnyImage, key: jax.Array) -> jax.Array:
    """The length of the Sobel gradient of the grey image as a share of its largest, K = 1.

    The border is repeated. A share of s is 2s - 1.
    """
    x = jnp.pad(jnp.asarray(image).mean(-1), 1, mode="edge")

    def smooth(a: jax.Array, axis: int) -> jax.Array:
        low, mid, high = (
            jax.lax.slice_in_dim(a, i, i + a.shape[axis] - 2, axis=axis) for i in (0, 1, 2)
        )
        return low + 2 * mid + high

    down = smooth(x[2:] - x[:-2], 1)
    right = smooth(x[:, 2:] - x[:, :-2], 0)
    length = jnp.sqrt(jnp.square(down) + jnp.square(right))
    return (2 * length / jnp.maximum(length.max(), 1e-6) - 1)[..., None]


def low_map(image: AnyImage, key: jax.Array) -> jax.Array:
    """The means of cells of 4x4 pixels, at the image's size, K = C."""
    H, W, C = image.shape
    cells = (
        jnp.asarray(image).reshape(H // LOW_CELL, LOW_CELL, W // LOW_CELL, LOW_CELL, C).mean((1, 3))
    )
    return jnp.repeat(jnp.repeat(cells, LOW_CELL, 0), LOW_CELL, 1)


# config.control.source -> the map
CONTROL_MAPS: dict[str, ControlMap] = {"edges": edge_map, "ink": ink_map, "low": low_map}
