"""The shipped digit classifiers, applied to the ink in windows of digit scenes."""

import numpy as np

from ditjax.data.scenes import SCENE_SIDE
from ditjax.errors import UserError
from ditjax.evaluation.classifiers import JUDGE, recognise
from ditjax.models.classifier import DIGIT_SIDE as WINDOW
from ditjax.models.classifier import NUM_CLASSES
from ditjax.weights.shipped import shipped_classifier

# The side to which a scene is shrunk before windows are cut. Digits of 12 to 16 pixels then have 7
# to 9, about the 8 that the classifiers were trained on.
SCALE = 18
# A window holds a whole digit if there is ink in it and none on the rim around it.
RIM_WEIGHT = 3.0
WINDOWS_JUDGED = 6
BATCH = 4096  # windows per batch
COLOUR_WEIGHT = 8.0  # makes colours vary about as much as the features of windows
FAINT = 0.3  # fainter ink is not stretched to full, so that noise stays noise


def ink(images: np.ndarray) -> np.ndarray:
    """Return the ink per pixel: u8[B,32,32,3] -> f32[B,32,32].

    The ink is the largest distance of a channel from the background, which is the median colour of
    the image; the most distant pixel has 1. Raises UserError for images of another shape.
    """
    if images.dtype != np.uint8 or images.shape[1:] != (SCENE_SIDE, SCENE_SIDE, 3):
        raise UserError(
            f"images are {images.dtype}{list(images.shape)}: features 'scenes' take uint8"
            f" [N,{SCENE_SIDE},{SCENE_SIDE},3]; set data.image_size and data.channels so, or use"
            " other features."
        )
    x = images.astype(np.float32) / np.float32(255)
    away = np.abs(x - np.median(x, axis=(1, 2), keepdims=True)).max(-1)
    most = away.max(axis=(1, 2), keepdims=True)
    return np.asarray(away / np.maximum(most, np.float32(FAINT)))


def shrink(x: np.ndarray, side: int) -> np.ndarray:
    """Average over cells: f32[B,S,S] -> f32[B,side,side]."""
    edges = np.linspace(0, x.shape[1], side + 1)
    pixels = np.arange(x.shape[1])
    share = np.clip(
        np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels), 0, None
    )
    cell = (share / share.sum(1, keepdims=True)).astype(np.float32)
    return cell @ x @ cell.T


def windows(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut scenes u8[B,32,32,3] into windows of ink u8[B,n,8,8,1], with a score f32[B,n] for each.

    The score is the window's ink less three times the ink on the rim around it: it is high for a
    whole digit.
    """
    # Padded with empty canvas, so that a digit at the edge has a window too.
    dark = np.pad(shrink(ink(images), SCALE), ((0, 0), (2, 2), (2, 2)))
    rimmed = np.lib.stride_tricks.sliding_window_view(dark, (WINDOW + 2,) * 2, axis=(1, 2))
    rimmed = rimmed.reshape(len(images), -1, WINDOW + 2, WINDOW + 2)
    cut = rimmed[:, :, 1:-1, 1:-1]
    within = cut.sum((2, 3))
    whole = within - RIM_WEIGHT * (rimmed.sum((2, 3)) - within)
    stretched = cut / np.maximum(cut.max((2, 3), keepdims=True), np.float32(FAINT))
    return np.rint(255 * stretched).astype(np.uint8)[..., None], whole


def recognise_scenes(name: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classify scenes u8[B,32,32,3] by a shipped classifier: features f32[B,F], logits f32[B,10].

    Features: the mean and the maximum over all windows of each feature of the classifier, and the
    mean colour of each quarter of the canvas. Logits: the mean over the windows with the highest
    scores.
    """
    cut, whole = windows(images)
    B, n = whole.shape
    cut = cut.reshape(B * n, WINDOW, WINDOW, 1)
    each, logits = recognise(*shipped_classifier(name), cut, BATCH)
    each, logits = each.reshape(B, n, -1), logits.reshape(B, n, NUM_CLASSES)
    quarter = SCENE_SIDE // 2
    colours = (
        (images.astype(np.float32) * np.float32(COLOUR_WEIGHT / 127.5))
        .reshape(B, 2, quarter, 2, quarter, 3)
        .mean((2, 4))
        .reshape(B, -1)
    )
    best = np.argsort(-whole, axis=1, kind="stable")[:, :WINDOWS_JUDGED, None]
    chosen = np.take_along_axis(logits, best, axis=1).mean(1)
    return np.concatenate([each.mean(1), each.max(1), colours], axis=1), chosen


def predict_scene_digit(images: np.ndarray) -> np.ndarray:
    """Return the digit that the judge predicts for each scene: u8[B,32,32,3] -> i[B]."""
    return np.argmax(recognise_scenes(JUDGE, images)[1], axis=1)
