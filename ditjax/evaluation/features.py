"""Images to features on a mesh: FID's Inception, or our digit classifiers, on scenes too."""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ditjax.config import lookup
from ditjax.data import scenes
from ditjax.errors import UserError
from ditjax.evaluation.digits import FEATURES, JUDGE, predict_digit, recognise_digits
from ditjax.evaluation.scenes import predict_scene_digit, recognise_scenes
from ditjax.files.assets import load_asset
from ditjax.models import classifier, inception
from ditjax.parallel import processes, rules
from ditjax.weights import tensors
from ditjax.weights.inception import load_inception

BATCH_PER_DEVICE = 16


class Features(NamedTuple):
    """Of a batch: pool f32[B,F], spatial f32[B,S] or None, logits f32[B,C] for class scores."""

    pool: np.ndarray
    spatial: np.ndarray | None
    logits: np.ndarray


class Extractor(NamedTuple):
    """A feature network: `extract` takes u8[B,H,W,C], any B and C = 1 or 3.

    `record` fixes what the features are and goes into every protocol. `judge` gives i[B], the class
    that an independent classifier sees. `side`: what a data set's images are brought to for a
    reference; None is the size of the samples. `family` names the features in metrics: '' is FID's
    own, 'mine' gives fd_mine. `shipped`: the features are of a classifier that ships, so that the
    distance of real images to real images is known, too.
    """

    name: str
    extract: Callable[[np.ndarray], Features]
    batch_size: int
    record: dict[str, Any]
    judge: Callable[[np.ndarray], np.ndarray] | None = None
    side: int | None = None
    family: str = ""
    shipped: bool = False


def inception_extractor(
    path: str | os.PathLike[str], mesh: Mesh, batch_size: int = 0, convention: Any = "tf1"
) -> Extractor:
    """FID's Inception from its weights file; batches are split over the mesh.

    Raises UserError for a file that is not that network.
    """
    network = load_inception(path)
    params = jax.device_put(network.params, rules.replicated(mesh))
    size = batch_size or BATCH_PER_DEVICE * mesh.size
    rules.check_batch(size, mesh, "the features' batch size")
    over_mesh = rules.batch_sharding(mesh)

    # Every process gets all features: they are few, and what is made of them is quick.
    @functools.partial(
        jax.jit, in_shardings=(None, over_mesh), out_shardings=rules.replicated(mesh)
    )
    def forward(params: Any, images: jax.Array) -> inception.Features:
        apply: Callable[..., Any] = inception.FIDInception().apply
        return apply(params, inception.preprocess(images, convention))

    def extract(images: np.ndarray) -> Features:
        if images.shape[-1] == 1:
            images = np.repeat(images, 3, axis=-1)
        parts = []
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            filled = processes.padded(batch, size)
            out = jax.device_get(forward(params, processes.from_whole(over_mesh, filled)))
            parts.append([x[: len(batch)] for x in (out.pool, out.spatial, out.logits_unbiased)])
        return Features(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    record = {
        "features": "FID's Inception (2015)",
        "features_sha256": tensors.sha256_of(network.files),
        "resize": f"bilinear to 299, {convention} corners",
        "features_precision": "float32",
    }
    return Extractor("inception", extract, size, record)


def digits_extractor() -> Extractor:
    """The shipped digit classifier: FD-digits, never FID."""
    resize = f"bicubic to {classifier.SIDE} where larger, grey"
    return _shipped(
        "digits", "digits_convnet", resize, recognise_digits, predict_digit, 512, classifier.SIDE
    )


def scenes_extractor() -> Extractor:
    """The shipped digit classifiers in windows of a digit scene: FD-digits of scenes, never FID."""
    features = "digits_convnet in windows of a scene, mean and largest, and colours"
    return _shipped(
        "scenes", features, "none", recognise_scenes, predict_scene_digit, 256, scenes.SCENE_SIDE
    )


def _shipped(
    name: str,
    features: str,
    resize: str,
    seen: Callable[[str, np.ndarray], tuple[np.ndarray, np.ndarray]],
    judge: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
    side: int,
) -> Extractor:
    """The two classifiers that ship: one gives features and logits by `seen`, the other judges."""

    def extract(images: np.ndarray) -> Features:
        pool, logits = seen(FEATURES, images)
        return Features(pool, None, logits)

    record = {
        "features": features,
        "features_sha256": load_asset(FEATURES)[1]["sha256"],
        "judge_sha256": load_asset(JUDGE)[1]["sha256"],
        "resize": resize,
        "features_precision": "float32",
    }
    return Extractor(name, extract, batch_size, record, judge, side, family="digits", shipped=True)


SHIPPED: dict[str, Callable[[Mesh, int], Extractor]] = {
    "digits": lambda mesh, batch_size: digits_extractor(),
    "scenes": lambda mesh, batch_size: scenes_extractor(),
}


def open_extractor(text: str, mesh: Mesh, batch_size: int = 0) -> Extractor:
    """'inception:WEIGHTS', 'digits', 'scenes', or the dotted name of a function of yours.

    The function is called with (mesh, batch_size) and returns an `Extractor`; a batch size of 0
    leaves the choice to it. Raises UserError for another name.
    """
    kind, _, path = text.partition(":")
    if kind == "inception" and path:
        return inception_extractor(path, mesh, batch_size)
    if text not in SHIPPED and "." not in text:
        raise UserError(
            f"features {text!r}: expected inception:FILE (pt_inception-2015-12-05-6726825d.pth;"
            f" docs/evaluation.md), {', '.join(SHIPPED)}, or a dotted name of a function of yours."
        )
    opened = lookup(text, "ditjax.evaluation.features.SHIPPED")
    extractor = opened(mesh, batch_size)
    if not isinstance(extractor, Extractor) or not (extractor.family or text in SHIPPED):
        raise UserError(
            f"features {text!r}: expected a function of (mesh, batch_size) that returns an"
            " Extractor with a `family`, the name of its metrics."
        )
    return extractor
