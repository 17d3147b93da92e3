"""The shipped classifiers, in pairs: one gives the features of a distance, the other the judge."""

from typing import Any, NamedTuple, cast

import jax
import numpy as np

from ditjax.data.crop import normalize, resize_images
from ditjax.models.classifier import DIGIT_SIDE, MNIST_SIDE, Recognition
from ditjax.parallel.processes import padded
from ditjax.weights.shipped import Classifier, shipped_classifier


class Pair(NamedTuple):
    """Two classifiers of a data set, and the side of its images.

    `features` and `judge` are assets. They share neither architecture, nor seed, nor augmentation.
    """

    data: str
    features: str
    judge: str
    side: int


# By the name of their features: 'mnist' gives FD-mnist.
PAIRS = {
    "digits": Pair("digits", "digits_convnet", "digits_mixer", DIGIT_SIDE),
    "mnist": Pair("mnist", "mnist_convnet", "mnist_mixer", MNIST_SIDE),
    "fashion": Pair("fashion_mnist", "fashion_convnet", "fashion_mixer", MNIST_SIDE),
}
FEATURE_CLASSIFIER = PAIRS["digits"].features
JUDGE = PAIRS["digits"].judge


def apply_classifier(network: Classifier, params: Any, x: jax.Array) -> Recognition:
    """Apply a classifier to f32[B,side,side,1] in [-1,1]. Returns features and logits."""
    return cast(Recognition, network.apply({"params": params}, x))


_forward = jax.jit(apply_classifier, static_argnums=0)


def recognise(
    network: Classifier, params: dict[str, Any], images: np.ndarray, batch_size: int = 512
) -> tuple[np.ndarray, np.ndarray]:
    """Classify images u8[N,side,side,1] in batches. Returns features f32[N,F], logits f32[N,10]."""
    parts: list[Recognition] = []
    for start in range(0, len(images), batch_size):
        x = normalize(images[start : start + batch_size])
        parts.append(_forward(network, params, padded(x, batch_size)))
    features = np.concatenate([np.asarray(part.features) for part in parts])[: len(images)]
    return features, np.concatenate([np.asarray(part.logits) for part in parts])[: len(images)]


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the fraction of rows whose largest logit is the label: f32[N,10], i32[N] -> [0, 1]."""
    return float(np.mean(np.argmax(logits, axis=1) == labels))


def recognise_shipped(name: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classify u8[N,H,W,C] of any size by a shipped classifier: f32[N,F], logits f32[N,10]."""
    network, params = shipped_classifier(name)
    small = resize_images(images, network.side)
    if small.shape[-1] == 3:
        small = small.mean(-1, keepdims=True).round().astype(np.uint8)
    return recognise(network, params, small)


def predict_class(judge: str, images: np.ndarray) -> np.ndarray:
    """Return the class that a shipped classifier predicts for each image: u8[N,H,W,C] -> i[N]."""
    return np.argmax(recognise_shipped(judge, images)[1], axis=1)
