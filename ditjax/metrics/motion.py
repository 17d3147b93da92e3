"""How well the ink of a clip moves as a thing that bounces off walls (data of `moving_digits`)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_FAINT = 0.125  # of full ink; fainter pixels are background
_STEP = 0.1  # of the velocities that are tried, pixels a frame
_PHASES = 48  # places in a period of a reflected line that are tried


def centroids(ink: np.ndarray) -> np.ndarray:
    """The centre of the ink: f[B,F,H,W] in [0, 1] -> f64[B,F,2], row and column.

    Of a frame without ink it is the centre of the frame.
    """
    x = np.where(ink < _FAINT, 0.0, ink).astype(np.float64)
    x[x.sum((2, 3)) == 0] = 1.0
    total = x.sum((2, 3))
    rows, columns = (np.arange(n, dtype=np.float64) for n in x.shape[2:])
    return np.stack([x.sum(3) @ rows / total, x.sum(2) @ columns / total], axis=-1)


class Lines(NamedTuple):
    """Reflected lines of one room: centred paths f64[V,P,F] by velocity and phase."""

    paths: np.ndarray
    squares: np.ndarray


def _lines(room: float, velocities: np.ndarray, frames: int) -> Lines:
    phase = np.arange(_PHASES) * (2 * room / _PHASES)
    straight = phase[:, None] + velocities[:, None, None] * np.arange(frames)
    folded = np.mod(straight, 2 * room)
    path = np.minimum(folded, 2 * room - folded)
    path -= path.mean(-1, keepdims=True)  # the place of the walls is free
    return Lines(path, (path**2).sum(-1))


def motion_error(
    ink: np.ndarray, rooms: Sequence[float], speeds: tuple[float, float]
) -> np.ndarray:
    """The root mean square distance of the ink's centre from its best path: f[B,F,H,W] -> f64[B].

    In pixels. A path is a straight line at a constant speed within `speeds` that is reflected by
    the walls of a square room of one of the sizes `rooms`, which may be anywhere. Paths are tried
    on a grid, so that a true one has an error of some hundredths.
    """
    found = centroids(ink)
    found -= found.mean(1, keepdims=True)
    frames, best = found.shape[1], np.full(len(found), np.inf)
    velocities = np.arange(0.0, speeds[1] + _STEP / 2, _STEP)
    speed = np.hypot(velocities[:, None], velocities[None, :])
    legal = (speed >= speeds[0] - 1e-9) & (speed <= speeds[1] + 1e-9)
    for room in rooms:
        lines = _lines(room, velocities, frames)
        # Squared distances of every clip's rows and columns from the best phase of each velocity.
        products = np.einsum("bfa,vpf->abvp", found, lines.paths, optimize=True)
        squares = (found**2).sum(1).T[:, :, None]
        axes = squares + (lines.squares - 2 * products).min(-1)  # [2,B,V]
        both = axes[0][:, :, None] + axes[1][:, None, :]
        best = np.minimum(best, both[:, legal].min(-1))
    return np.sqrt(np.maximum(best, 0.0) / frames)
