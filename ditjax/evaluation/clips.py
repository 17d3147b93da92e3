"""Scores of clips of moving digits: features of FD-clips, motion error, and identity.

FD-clips is a Fréchet distance on features of a small network that was trained on such clips. It is
not FVD, whose features are those of I3D trained on Kinetics.
"""

import functools

import jax
import numpy as np
from PIL import Image

from ditjax.data.crop import normalize, resize_images
from ditjax.data.moving import BOXES, CANVASES, SPEEDS
from ditjax.errors import UserError
from ditjax.evaluation.classifiers import JUDGE, recognise
from ditjax.metrics.motion import motion_error
from ditjax.models.classifier import CLIP_LENGTH, CLIP_SIDE, DIGIT_SIDE, NUM_CLASSES
from ditjax.parallel.processes import padded
from ditjax.weights.shipped import shipped_classifier

MOVING = "moving_convnet"
_BATCH = 250
_FAINT = 64  # of 255; fainter pixels are no part of a digit's box


def grey(clips: np.ndarray) -> np.ndarray:
    """u8[B,F,H,W,C] -> u8[B,F,S,S], the side of the canvas of one digit."""
    if clips.ndim != 5 or clips.shape[1] != CLIP_LENGTH:
        raise UserError(
            f"samples are {clips.dtype}{list(clips.shape)}: features 'clips' take clips of"
            f" {CLIP_LENGTH} frames; set config.data.frames so, or use other features."
        )
    B, F = clips.shape[:2]
    frames = resize_images(clips.reshape(B * F, *clips.shape[2:]), CLIP_SIDE)
    mean = frames.astype(np.float32).mean(-1).round().astype(np.uint8)
    return np.asarray(mean.reshape(B, F, CLIP_SIDE, CLIP_SIDE))


@functools.cache
def _network() -> tuple[object, object]:
    network, params = shipped_classifier(MOVING)
    return jax.jit(network.apply), params


def clip_features(clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features f32[B,64] and logits of the digit f32[B,10] of clips u8[B,8,H,W,C]."""
    apply, params = _network()
    x, parts = normalize(grey(clips))[..., None], []
    for start in range(0, len(x), _BATCH):
        parts.append(apply({"params": params}, padded(x[start : start + _BATCH], _BATCH)))  # type: ignore[operator]
    found = [np.concatenate([np.asarray(p[k]) for p in parts])[: len(x)] for k in (0, 1)]
    return found[0], found[1]


def digit_crops(frames: np.ndarray) -> np.ndarray:
    """The digit in each frame u8[N,S,S] as the judge sees digits: u8[N,8,8,1].

    It is the square around the box of the ink, shrunk. A frame without ink stays empty.
    """
    crops = np.zeros((len(frames), DIGIT_SIDE, DIGIT_SIDE, 1), np.uint8)
    for crop, frame in zip(crops, frames, strict=True):
        rows, columns = (np.flatnonzero((frame >= _FAINT).any(axis)) for axis in (1, 0))
        if not len(rows):
            continue
        centre = np.array([columns[0] + columns[-1] + 1, rows[0] + rows[-1] + 1]) / 2
        side = int(max(rows[-1] - rows[0], columns[-1] - columns[0])) + 1
        low = centre - side / 2 + side  # in a frame with an empty rim around it
        around = Image.fromarray(np.pad(frame, side))
        box = (low[0], low[1], low[0] + side, low[1] + side)
        small = around.resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BILINEAR, box)
        crop[..., 0] = np.asarray(small)
    return crops


def predict_frames(clips: np.ndarray) -> np.ndarray:
    """The digit that the judge sees in every frame: u8[B,F,H,W,C] -> i[B,F]."""
    frames = grey(clips)
    crops = digit_crops(frames.reshape(-1, *frames.shape[2:]))
    logits = recognise(*shipped_classifier(JUDGE), crops)[1]
    return np.asarray(np.argmax(logits, axis=1).reshape(frames.shape[:2]))


def _votes(clips: np.ndarray) -> np.ndarray:
    """i[B,10]: the number of frames in which the judge sees each digit."""
    return (predict_frames(clips)[:, :, None] == np.arange(NUM_CLASSES)).sum(1)


def predict_clip_digit(clips: np.ndarray) -> np.ndarray:
    """The digit that the judge sees in most frames of each clip: u8[B,F,H,W,C] -> i[B]."""
    return np.asarray(np.argmax(_votes(clips), axis=1))


def clip_measures(clips: np.ndarray) -> dict[str, np.ndarray]:
    """Scores f64[B] of clips u8[B,F,H,W,C]: `motion_error` in pixels, and `identity`.

    identity is the share of frames in which the judge sees the digit of most frames.
    """
    rooms = [CANVASES[1] - size for size in range(BOXES[0], BOXES[1] + 1)]
    return {
        "motion_error": motion_error(grey(clips) / 255, rooms, SPEEDS),
        "identity": _votes(clips).max(1) / clips.shape[1],
    }
