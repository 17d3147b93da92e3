"""Forecasts without learning: persistence, and rain that moves on as it moved (Lagrangian).

The motion is found by correlation in windows, half way to that of phases alone (Kuglin & Hines
1975), and fields are carried along it backwards in time (Germann & Zawadzki 2002). Plain NumPy, one
clip at a time.
"""

import numpy as np

_WINDOW, _STEP = 24, 8  # pixels; a window sees motion up to two thirds of its side
_PAIRS = 3  # of the last frames, whose correlations are averaged
_WET = 0.02  # of the pixels' sum over the largest, below which a window says nothing


def persistence(past: np.ndarray, leads: int) -> np.ndarray:
    """The last frame of clips [N,T,H,W] at every lead -> [N,leads,H,W]."""
    return np.repeat(past[:, -1:], leads, axis=1)


def _peak(surface: np.ndarray) -> np.ndarray:
    """The place of the largest value of [n,n] around its middle, to fractions of a pixel."""
    n, middle, found = len(surface), len(surface) // 2, []
    reach = n // 3
    inside = surface[middle - reach : middle + reach + 1, middle - reach : middle + reach + 1]
    best = np.unravel_index(int(np.argmax(inside)), inside.shape)
    places = [int(b) + middle - reach for b in best]
    for axis, place in enumerate(places):
        line = surface[:, places[1]] if axis == 0 else surface[places[0]]
        before, at, after = (line[(place + k) % n] for k in (-1, 0, 1))
        curve = before - 2 * at + after
        offset = 0.5 * (before - after) / curve if curve < 0 else 0.0
        found.append(place - middle + float(np.clip(offset, -0.5, 0.5)))
    return np.array(found)


def motion(past: np.ndarray) -> np.ndarray:
    """Rows and columns a frame that rain moves at each pixel: past [T,H,W] -> f64[2,H,W].

    Windows without rain have the mean motion of the others.
    """
    _, H, W = past.shape
    size = min(_WINDOW, H, W)
    taper = np.hanning(size + 2)[1:-1]
    taper = taper[:, None] * taper[None]
    starts = [np.arange(0, side - size + 1, min(_STEP, size)) for side in (H, W)]
    pairs = min(_PAIRS, len(past) - 1)
    found = np.full((len(starts[0]), len(starts[1]), 2), np.nan)
    weights = np.zeros(found.shape[:2])
    for i, row in enumerate(starts[0]):
        for j, column in enumerate(starts[1]):
            cut = past[-pairs - 1 :, row : row + size, column : column + size].astype(np.float64)
            weights[i, j] = cut.sum()
            if not (cut.reshape(len(cut), -1).max(1) > 0).all():
                continue
            spectra = np.fft.fft2(cut * taper, s=(2 * size, 2 * size))
            cross = spectra[1:] * spectra[:-1].conj()
            cross = (cross / np.maximum(np.abs(cross) ** 0.5, 1e-9)).sum(0)
            found[i, j] = _peak(np.fft.fftshift(np.fft.ifft2(cross).real))
    known = ~np.isnan(found[..., 0]) & (weights > _WET * weights.max())
    mean = np.zeros(2)
    if known.any():
        mean = (found[known] * weights[known][:, None]).sum(0) / weights[known].sum()
    found = np.where(known[..., None], found, mean)
    centres = [each + (size - 1) / 2 for each in starts]
    return np.stack([_spread(found[..., axis], centres, (H, W)) for axis in (0, 1)])


def _spread(values: np.ndarray, centres: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Values at centres on every pixel, bilinear, and constant outside."""
    rows = np.stack([np.interp(np.arange(shape[0]), centres[0], each) for each in values.T])
    return np.stack([np.interp(np.arange(shape[1]), centres[1], each) for each in rows.T])


def _sampled(field: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A field [H,W] at real places, bilinear, and 0 outside."""
    padded = np.pad(field.astype(np.float64), 1)
    H, W = field.shape
    y = np.clip(rows + 1, 0, H + 1 - 1e-9)
    x = np.clip(columns + 1, 0, W + 1 - 1e-9)
    i, j = np.floor(y).astype(int), np.floor(x).astype(int)
    a, b = y - i, x - j
    top = padded[i, j] * (1 - b) + padded[i, j + 1] * b
    bottom = padded[i + 1, j] * (1 - b) + padded[i + 1, j + 1] * b
    return np.asarray(top * (1 - a) + bottom * a)


def carried(field: np.ndarray, flow: np.ndarray, leads: int) -> np.ndarray:
    """A field [H,W] at the next leads, moved along a flow [2,H,W] that does not change.

    Semi-Lagrangian and backwards: the way to where a pixel came from is followed frame by frame, so
    that the field is sampled once.
    """
    H, W = field.shape
    rows, columns = (each.astype(np.float64) for each in np.mgrid[:H, :W])
    frames = []
    for _ in range(leads):
        y, x = np.clip(rows, 0, H - 1), np.clip(columns, 0, W - 1)
        step = [_sampled(each, y, x) for each in flow]
        rows, columns = rows - step[0], columns - step[1]
        frames.append(_sampled(field, rows, columns))
    return np.stack(frames)


def advection(past: np.ndarray, leads: int) -> np.ndarray:
    """Lagrangian persistence of clips [N,T,H,W] -> f64[N,leads,H,W]; 0 comes in from outside."""
    return np.stack([carried(clip[-1], motion(clip), leads) for clip in past])
