"""Random weights that every environment can make again: what golden files were computed with."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def seeded_state(
    shapes: Mapping[str, tuple[int, ...]], seed: int, gain: float = 1.0
) -> dict[str, np.ndarray]:
    """f32 tensors by name, each from (seed, its own name) alone, so that order does not matter.

    A matrix or convolution [out, in, ...] is N(0, gain² / fan_in); a norm's weight and a running
    variance are U(0.5, 1.5); biases and running means N(0, 0.1²). Nothing is zero, so that a
    wrong gate or a lost bias shows.
    """
    state = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if len(shape) >= 2:
            value = rng.standard_normal(shape) * gain / np.sqrt(np.prod(shape[1:]))
        elif name.endswith(("running_var", "weight", "scale")):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.standard_normal(shape) * 0.1
        state[name] = value.astype(np.float32)
    return state


def seeded_params(init: Callable[..., Any], *inputs: Any, seed: int = 0) -> Any:
    """Parameters f32 of the shapes of `init(key, *inputs)`, which is not compiled.

    Kernels [in, .., out] are N(0, 1 / fan_in), tables and biases N(0, 0.1²), scales U(0.5, 1.5).
    """
    tree, rng = jax.eval_shape(init, jax.random.key(0), *inputs), np.random.default_rng(seed)

    def drawn(path: Any, leaf: Any) -> np.ndarray:
        name = str(path[-1])
        if "kernel" in name or "projection" in name:
            # A stack has a leading axis of its layers.
            stacked = leaf.ndim > 2 and "'blocks'" in str(path)
            fan_in = np.prod(leaf.shape[stacked:-1]) if leaf.ndim == 4 and not stacked else 0
            std = 1 / np.sqrt(fan_in or leaf.shape[int(stacked)])
            return np.asarray(std * rng.standard_normal(leaf.shape), np.float32)
        if "scale" in name:
            return np.asarray(rng.uniform(0.5, 1.5, leaf.shape), np.float32)
        return np.asarray(0.1 * rng.standard_normal(leaf.shape), np.float32)

    return jax.tree_util.tree_map_with_path(drawn, tree)


def seeded_images(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """u8 images of `shape` with structure at several scales, not white noise."""
    rng = np.random.default_rng(seed)
    B, H, W, C = shape
    image = np.zeros(shape)
    for side in (2, 5, 13):
        coarse = rng.standard_normal((B, side, side, C))
        rows, columns = np.arange(H) * side // H, np.arange(W) * side // W
        image += coarse[:, rows][:, :, columns]
    image += 0.2 * rng.standard_normal(shape)
    return np.clip(127.5 + 50 * image, 0, 255).astype(np.uint8)
