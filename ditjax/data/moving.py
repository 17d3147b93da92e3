"""Moving digits: real handwritten digits that move on a canvas and bounce off its walls.

Clip i of a split is a function of (seed, split, i) alone, as a digit scene is
(`data/scenes.py`). Class, velocity and walls are known exactly, and no digit of a test clip occurs
in a training clip. After Srivastava et al. 2015 (Moving MNIST), who have 64x64 pixels and two
digits.
"""

import io
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ditjax.data.clips import as_animation
from ditjax.data.scenes import (
    GeneratedBuilder,
    Handwriting,
    load_handwriting,
    magnified,
    scene_uniforms,
)
from ditjax.errors import UserError

CLIP_FRAMES = 16
CANVASES = {1: 16, 2: 32}  # of the canvas, by the number of digits
BOXES = (8, 12)  # smallest and largest side of a digit's box in pixels
SPEEDS = (1.0, 2.5)  # pixels from a frame to the next
DEFAULT_CLIPS = 4_000

_SPLITS = ("train", "test")
_CLASSES = 10
_CONFIG = re.compile(r"([1-9]\d{1,7})(-two)?(?:-seed(\d{1,9}))?")
_WORDS_PER_DIGIT = 6


class MovingClip(NamedTuple):
    """frames u8[F,S,S]; the class of all digits; top-left corners f64[n,F,2] of their boxes."""

    frames: np.ndarray
    label: int
    corners: np.ndarray


def reflected(x: np.ndarray, room: float) -> np.ndarray:
    """Fold a straight line into [0, room]: a point that bounces off both walls."""
    folded = np.mod(x, 2 * room)
    return np.asarray(np.minimum(folded, 2 * room - folded))


def moving_clip(
    digits: Handwriting, seed: int, split: str, index: int, count: int = 1
) -> MovingClip:
    """Clip `index` of a split: `count` digits of one class, its label, each by another hand.

    A digit starts anywhere on the canvas, at a speed and in a direction of its own, and bounces off
    the walls. Where two overlap, the brighter pixel is seen.
    """
    stream = len(_SPLITS) + _SPLITS.index(split)
    u = scene_uniforms(seed, stream, index, 1 + count * _WORDS_PER_DIGIT)
    label, side = int(next(u) * _CLASSES), CANVASES[count]
    candidates, t = digits.of_class[label], np.arange(CLIP_FRAMES)
    canvas = np.zeros((CLIP_FRAMES, side, side))
    corners = np.empty((count, CLIP_FRAMES, 2))
    for n in range(count):
        record = candidates[int(next(u) * len(candidates))]
        size = BOXES[0] + int(next(u) * (BOXES[1] - BOXES[0] + 1))
        room = side - size
        start = np.array([next(u), next(u)]) * room
        speed = SPEEDS[0] + (SPEEDS[1] - SPEEDS[0]) * next(u)
        angle = 2 * np.pi * next(u)
        velocity = speed * np.array([np.sin(angle), np.cos(angle)])
        corners[n] = reflected(start + velocity * t[:, None], room)
        ink = magnified(digits.ink[record], size)
        for frame, corner in zip(canvas, corners[n], strict=True):
            np.maximum(frame, _placed(ink, corner, side), out=frame)
    # Rounded to six places first, so that the last bit of a product cannot change a pixel.
    frames = np.rint(np.round(255 * canvas, 6)).astype(np.uint8)
    return MovingClip(frames, label, corners)


def _placed(ink: np.ndarray, corner: np.ndarray, side: int) -> np.ndarray:
    """Ink f64[n,n] on an empty canvas, its corner between pixels: bilinear, which keeps its sum."""
    shift = []
    for start in corner:
        places = np.arange(side)[:, None] - start - np.arange(len(ink))
        shift.append(np.maximum(0, 1 - np.abs(places)))
    return np.asarray(shift[0] @ ink @ shift[1].T)


# ---- the data set


class ClipSet(NamedTuple):
    """The clips of a configuration 'N[-two][-seedS]': N training clips and N // 10 test clips."""

    examples: int
    digits: int
    seed: int

    @property
    def name(self) -> str:
        two = "-two" if self.digits == 2 else ""
        return f"{self.examples}{two}" + (f"-seed{self.seed}" if self.seed else "")


def parse_clip_set(config: str) -> ClipSet:
    """'4000', '4000-two' or '4000-seed1' -> ClipSet. Raises UserError."""
    match = _CONFIG.fullmatch(config)
    if match is None:
        raise UserError(
            f"data set 'moving_digits/{config}': expected 'moving_digits', 'moving_digits/N',"
            " 'moving_digits/N-two' or the same with '-seedS', with N from 10 to 99999999 training"
            " clips."
        )
    return ClipSet(int(match[1]), 2 if match[2] else 1, int(match[3] or 0))


class MovingDigits(
    GeneratedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """Clips as a data set: 16 frames of 16x16 grey, or of 32x32 with two digits, ten classes."""

    KIND = "Clips"

    def _info(self) -> tfds.core.DatasetInfo:
        side, count = CANVASES[self._size.digits], self._size.digits
        return self.info_of(
            f"{CLIP_FRAMES} frames of {side}x{side}, an animated PNG each, of {count} real"
            " handwritten digit(s) of one class that move and bounce off the walls; the class"
            " is the label. The digits are scikit-learn's load_digits: record i is in test"
            " clips iff i % 5 == 4, and in training clips otherwise. Clip i is a function of"
            " (seed, split, i).",
            {
                "image": tfds.features.Image(shape=(side, side, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=[str(d) for d in range(_CLASSES)]),
            },
        )

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        digits = load_handwriting(split)
        for i in range(count):
            made = moving_clip(digits, self._size.seed, split, i, self._size.digits)
            encoded = as_animation([Image.fromarray(frame) for frame in made.frames])
            yield i, {"image": io.BytesIO(encoded), "label": made.label}
