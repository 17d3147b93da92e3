"""Fields and cuboids that golden files were computed with."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tests.seeded import seeded_images, seeded_state

THRESHOLDS = (16, 74, 133, 219)
WIDTH, HEADS = 12, 3


def fields() -> tuple[np.ndarray, np.ndarray]:
    """A forecast and an observation u8[N, T, H, W], alike and not equal."""
    base = seeded_images((6, 20, 16, 2), 4).reshape(3, 2, 20, 16, 2)
    blend = 0.7 * base[..., 0] + 0.3 * base[..., 1]
    return base[..., 0].astype(np.uint8), blend.astype(np.uint8)


def untied() -> tuple[np.ndarray, np.ndarray]:
    """Members f64[7, 300] and observations f64[300]; no two values are equal."""
    rng = np.random.default_rng(9)
    return rng.gamma(1.0, 5.0, (7, 300)), rng.gamma(1.2, 5.0, 300)


class CuboidCase(NamedTuple):
    """A layer of cuboid attention on x f32[2,*shape,WIDTH]; `memory`: cross-attention to it."""

    shape: tuple[int, int, int]
    cuboid: tuple[int, int, int] = (1, 1, 1)
    shift: tuple[int, int, int] = (0, 0, 0)
    strategy: str = "lll"
    globals: int = 0
    separate: bool = False
    memory: int = 0  # its frames


CUBOIDS = {
    "local": CuboidCase((4, 6, 6), (2, 3, 3)),
    "dilated": CuboidCase((4, 6, 6), (2, 3, 2), strategy="ldd"),
    "shifted": CuboidCase((4, 6, 6), (2, 3, 3), (1, 1, 2)),
    "padded": CuboidCase((4, 5, 7), (2, 3, 3)),
    "shifted_padded": CuboidCase((4, 5, 7), (2, 3, 3), (0, 1, 1)),
    "axial": CuboidCase((4, 6, 6), (4, 1, 1)),
    "globals": CuboidCase((4, 6, 6), (2, 3, 3), globals=2),
    "separate": CuboidCase((4, 6, 6), (1, 6, 1), globals=2, separate=True),
    "cross": CuboidCase((3, 4, 5), memory=5),
}


def cuboid_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Their names -> seeded weights; none is zero."""
    return seeded_state(shapes, 17)


def cuboid_inputs(case: CuboidCase) -> tuple[np.ndarray, np.ndarray]:
    """x, and the memory f32[2,M,H,W,WIDTH] or the global vectors f32[2,P,WIDTH]."""
    rng = np.random.default_rng(31)
    T, H, W = case.shape
    x = rng.standard_normal((2, T, H, W, WIDTH)).astype(np.float32)
    shape = (case.memory, H, W) if case.memory else (case.globals,)
    return x, rng.standard_normal((2, *shape, WIDTH)).astype(np.float32)
