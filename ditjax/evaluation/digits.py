"""The two shipped digit classifiers at work: features of FD-digits, and an independent judge."""

import functools
from typing import Any, cast

import jax
import numpy as np

from ditjax.data import stream
from ditjax.files.assets import load_asset
from ditjax.models import classifier
from ditjax.models.classifier import DigitsConvNet, DigitsMixer, Recognition

FEATURES = "digits_convnet"
JUDGE = "digits_mixer"


def normalise(images: np.ndarray) -> np.ndarray:
    """u8[N,8,8,1] -> f32[N,8,8,1] in [-1, 1]."""
    return (images.astype(np.float32) / np.float32(127.5)) - np.float32(1.0)


def apply(network: DigitsConvNet | DigitsMixer, params: Any, x: jax.Array) -> Recognition:
    """f32[B,8,8,1] in [-1,1] -> features and logits."""
    return cast(Recognition, network.apply({"params": params}, x))


_forward = jax.jit(apply, static_argnums=0)


def recognise(
    network: DigitsConvNet | DigitsMixer,
    params: dict[str, Any],
    images: np.ndarray,
    batch_size: int = 512,
) -> tuple[np.ndarray, np.ndarray]:
    """images u8[N,8,8,1] -> features f32[N,F], logits f32[N,10], in batches."""

    parts: list[Recognition] = []
    for start in range(0, len(images), batch_size):
        x = normalise(images[start : start + batch_size])
        # The last batch is filled up, so that one shape is compiled.
        x = np.pad(x, ((0, batch_size - len(x)), (0, 0), (0, 0), (0, 0)))
        parts.append(_forward(network, params, x))
    features = np.concatenate([np.asarray(part.features) for part in parts])[: len(images)]
    return features, np.concatenate([np.asarray(part.logits) for part in parts])[: len(images)]


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of rows whose largest logit is the label: f32[N,10], i32[N] -> [0, 1]."""
    return float(np.mean(np.argmax(logits, axis=1) == labels))


@functools.cache
def shipped(name: str) -> tuple[classifier.DigitsConvNet | classifier.DigitsMixer, Any]:
    """A shipped classifier and its parameters."""
    params, record = load_asset(name)
    widths = dict(record["network"])
    return getattr(classifier, widths.pop("name"))(**widths), params


def see(name: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A shipped classifier on u8[N,H,W,C] of any size -> features f32[N,F], logits f32[N,10]."""
    small = stream.resize_images(images, classifier.SIDE)
    if small.shape[-1] == 3:
        small = small.mean(-1, keepdims=True).round().astype(np.uint8)
    return recognise(*shipped(name), small)


def see_class(images: np.ndarray) -> np.ndarray:
    """The digit that an independent classifier sees: u8[N,H,W,C] -> i[N]."""
    return np.argmax(see(JUDGE, images)[1], axis=1)
