"""The judge of caption scenes: digit, colour and place of one, the two colours of a pair.

All is read off the pixels.

No network here was trained on scenes: the digit is judged by the shipped classifier of handwriting.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from ditjax.data.caption_scenes import DIGIT_NAMES, HUES, INK_COLOURS
from ditjax.errors import UserError
from ditjax.evaluation.classifiers import FEATURE_CLASSIFIER, JUDGE, recognise
from ditjax.models.classifier import DIGIT_SIDE
from ditjax.weights.shipped import shipped_classifier

_SEEN = 0.3  # of the darkest ink: fainter pixels are no part of the digit
_FAINT = 0.3  # of full brightness: a half whose ink is fainter shows no digit
_BATCH = 512
_THING = f"an? ({'|'.join(INK_COLOURS)}) (?:{'|'.join(DIGIT_NAMES)})"
_PAIR = re.compile(f"{_THING} (left of|above) {_THING}")


class Judged(NamedTuple):
    """Indices of digits, colours and places, i[B] each (`data/caption_scenes.py`)."""

    digit: np.ndarray
    colour: np.ndarray
    place: np.ndarray


def judge_scenes(images: np.ndarray) -> Judged:
    """What images u8[B,S,S,3] show. Raises UserError for images of another shape."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UserError(
            f"images are {images.dtype}{list(images.shape)}: scenes are uint8 [N,S,S,3]."
        )
    x, ink, digits = _parts(images)
    logits = recognise(*shipped_classifier(JUDGE), digits, _BATCH)[1]
    return Judged(np.argmax(logits, axis=1), _colours(x, ink), _places(ink))


def judged_attributes(images: np.ndarray) -> dict[str, np.ndarray]:
    """`judge_scenes` by the names of the data set's classes."""
    return judge_scenes(images)._asdict()


def judged_pairs(images: np.ndarray, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Whether the two digits of scenes u8[B,S,S,3] have the colours of their captions: f64[B].

    `pair_colours` is 1 where each half shows the colour of its digit, `pair_colours_swapped` where
    each shows the other's. NaN where the caption is not of two digits in two colours.
    """
    x = _scaled(images)
    own, other = np.full(len(x), np.nan), np.full(len(x), np.nan)
    for i, caption in enumerate(captions):
        match = _PAIR.fullmatch(caption)
        if match is None or match[1] == match[3]:
            continue
        first, second = np.array_split(x[i], 2, axis=1 if match[2] == "left of" else 0)
        found = [_half_colour(first), _half_colour(second)]
        asked = [INK_COLOURS.index(match[1]), INK_COLOURS.index(match[3])]
        own[i], other[i] = found == asked, found == asked[::-1]
    return {"pair_colours": own, "pair_colours_swapped": other}


def _half_colour(half: np.ndarray) -> int:
    """The colour of the digit in half a scene, f32[h,w,3] in [0, 1]; -1 if it shows none."""
    ink = _brightness(half[None])
    return int(_colours(half[None], ink)[0]) if ink.max() > _FAINT else -1


def caption_features(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features f32[B,F] and logits of scenes u8[B,S,S,3], for FD-captions (not FID).

    Of the digit as the other classifier sees it, the ink's mean colour, its middle and its amount.
    """
    x, ink, digits = _parts(images)
    pool, logits = recognise(*shipped_classifier(FEATURE_CLASSIFIER), digits, _BATCH)
    total = np.maximum(ink.sum((1, 2)), 1e-6)
    colour = (x * ink[..., None]).sum((1, 2)) / total[:, None]
    more = np.stack([*_centre(ink), ink.mean((1, 2))], axis=1)
    return np.concatenate([pool, colour, more], axis=1).astype(np.float32), logits


def _parts(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scenes in [0, 1], their ink f32[B,S,S] by brightness, and the digits u8[B,8,8,1] in it."""
    x = _scaled(images)
    ink = _brightness(x)
    ink = ink / np.maximum(ink.max(axis=(1, 2), keepdims=True), np.float32(0.1))
    return x, ink, np.stack([_cut(each) for each in ink])[..., None]


def _scaled(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / np.float32(255)


def _brightness(x: np.ndarray) -> np.ndarray:
    """How much brighter than the median each pixel of scenes f32[B,H,W,3] is: f32[B,H,W]."""
    found = x.max(-1)
    return np.maximum(found - np.median(found, axis=(1, 2), keepdims=True), 0)


def _cut(ink: np.ndarray) -> np.ndarray:
    """The square around the ink of a scene, f32[S,S] -> u8[8,8]: as tall as the digit."""
    seen = ink > _SEEN
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    if not len(rows):
        return np.zeros((DIGIT_SIDE, DIGIT_SIDE), np.uint8)
    side = max(np.ptp(rows), np.ptp(columns)) + 1
    middle = (rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2
    top, left = (centre - side / 2 for centre in middle)
    picture = Image.fromarray(np.pad(ink, side))
    box = (left + side, top + side, left + 2 * side, top + 2 * side)
    small = picture.resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BOX, box)
    return np.rint(255 * np.clip(np.asarray(small), 0, 1)).astype(np.uint8)


def _colours(x: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """The colour whose hue is nearest to that of the ink's mean colour."""
    mean = (x * ink[..., None] ** 2).sum((1, 2)) / np.maximum((ink**2).sum((1, 2)), 1e-6)[:, None]
    red, green, blue = mean.T
    hue = np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue))
    # The angle on the colour circle is not that of HSV: both are taken of pure colours.
    of_names = np.array([_circle(each) for each in HUES])
    away = np.abs((hue[:, None] - of_names + 180) % 360 - 180)
    return np.argmin(away, axis=1)


def _circle(hue: float) -> float:
    """The angle on the colour circle of a pure colour of HSV."""
    k = (np.array([5.0, 3.0, 1.0]) + hue / 60) % 6
    red, green, blue = 1 - np.clip(np.minimum(k, 4 - k), 0, 1)
    return float(np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)))


def _places(ink: np.ndarray) -> np.ndarray:
    """The third of the canvas that holds the middle of the ink, in rows and columns."""
    row, column = (np.clip((3 * each).astype(int), 0, 2) for each in _centre(ink))
    return np.asarray(3 * row + column)


def _centre(ink: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row and the column of the middle of the ink, as shares of the side: f64[B] each."""
    centres = (np.arange(ink.shape[1]) + 0.5) / ink.shape[1]
    total = np.maximum(ink.sum((1, 2)), 1e-6)
    return (ink.sum(2) * centres).sum(1) / total, (ink.sum(1) * centres).sum(1) / total
