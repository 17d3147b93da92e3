"""Feature extractors on a mesh: FID's Inception, DINOv2, or the shipped classifiers."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditjax.config import lookup
from ditjax.data import scenes
from ditjax.errors import UserError
from ditjax.evaluation.captions import caption_features, judged_attributes, judged_pairs
from ditjax.evaluation.classifiers import (
    FEATURE_CLASSIFIER,
    JUDGE,
    PAIRS,
    predict_class,
    recognise_shipped,
)
from ditjax.evaluation.clips import MOVING, clip_features, clip_measures, predict_clip_digit
from ditjax.evaluation.nowcast import rain_features
from ditjax.evaluation.scenes import predict_scene_digit, recognise_scenes
from ditjax.files.assets import load_asset
from ditjax.models import inception
from ditjax.models.classifier import CLIP_SIDE
from ditjax.models.dinov2 import DINO_SIDE, DinoV2, preprocess_dino
from ditjax.parallel import processes, rules
from ditjax.weights import tensors
from ditjax.weights.dinov2 import load_dinov2
from ditjax.weights.inception import load_inception

BATCH_PER_DEVICE = 16


class ImageFeatures(NamedTuple):
    """Features of a batch: pool f32[B,F], spatial f32[B,S] or None, logits f32[B,C]."""

    pool: np.ndarray
    spatial: np.ndarray | None
    logits: np.ndarray


class Extractor(NamedTuple):
    """A feature network. `extract` takes u8[B,H,W,C] with any B and C = 1 or 3.

    `record` identifies the features and is part of every protocol. `judge` returns i[B], the class
    that an independent classifier predicts. `side` is the size to which a data set's images are
    brought for a reference; None means the size of the samples. `family` names the features in
    metrics: '' means those of FID, 'mine' gives fd_mine. `shipped` says that the features are of a
    shipped classifier, for which the distance of real images to real images is computed as well.
    `clips`: the samples are clips u8[B,F,H,W,C]. `measures` are scores of each sample f[B], by
    name, whose means are reported. `attributes` are classes i[B] that samples show, by the names of
    the data set's features with classes: of samples of captions, they are compared with the record.
    `follows` are scores f64[B] of samples beside their captions, by name, NaN where one has none.
    """

    name: str
    extract: Callable[[np.ndarray], ImageFeatures]
    batch_size: int
    record: dict[str, Any]
    judge: Callable[[np.ndarray], np.ndarray] | None = None
    side: int | None = None
    family: str = ""
    shipped: bool = False
    clips: bool = False
    measures: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None
    attributes: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None
    follows: Callable[[np.ndarray, Sequence[str]], dict[str, np.ndarray]] | None = None


def inception_extractor(path: str | os.PathLike[str], mesh: Mesh, batch_size: int = 0) -> Extractor:
    """Load FID's Inception from its weights file; batches are split over the mesh.

    Raises UserError for a file of another network.
    """
    network = load_inception(path)
    if processes.is_primary():
        print(network.account, file=sys.stderr, flush=True)
    extract, size = _over_mesh(_of_inception, network.params, mesh, batch_size)

    def of_images(images: np.ndarray) -> ImageFeatures:
        return ImageFeatures(*extract(images))

    record = {
        "features": "FID's Inception (2015)",
        "features_sha256": tensors.sha256_of(network.files),
        "resize": "bilinear to 299, tf1 corners",
        "features_precision": "float32",
    }
    return Extractor("inception", of_images, size, record)


def _of_inception(params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
    out: Any = inception.FIDInception().apply(params, inception.preprocess(images))
    return out.pool, out.spatial, out.logits_unbiased


def planned_features(text: str) -> Callable[[jax.Array], Any] | None:
    """What 'inception:WEIGHTS' and 'dinov2:WEIGHTS' compute of images u8[B,H,W,3], to be traced.

    The weights are zeros, and of Inception no file is read. None for features that are small.
    """
    kind, _, path = text.partition(":")
    forward: Callable[[Any, jax.Array], Any]
    if kind == "inception":
        init, x = inception.FIDInception().init, jnp.zeros((1, 299, 299, 3))
        shapes, forward = jax.eval_shape(init, jax.random.key(0), x), _of_inception
    elif kind == "dinov2" and path:
        network = load_dinov2(path)
        shapes, forward = network.params, _of_dinov2(network.config)
    else:
        return None
    return lambda images: forward(jax.tree.map(lambda x: jnp.zeros(x.shape), shapes), images)


def _of_dinov2(config: Any) -> Callable[[Any, jax.Array], tuple[jax.Array, ...]]:
    apply: Callable[..., Any] = DinoV2(config).apply
    return lambda params, images: (apply({"params": params}, preprocess_dino(images)),)


def dinov2_extractor(path: str | os.PathLike[str], mesh: Mesh, batch_size: int = 0) -> Extractor:
    """Load DINOv2 for FD-DINOv2 and KDD (Stein et al. 2023); batches are split over the mesh.

    Raises UserError for a file of another network.
    """
    network = load_dinov2(path)
    if processes.is_primary():
        print(network.account, file=sys.stderr, flush=True)

    def of_images(images: np.ndarray) -> ImageFeatures:
        (pool,) = extract(images)
        return ImageFeatures(pool, None, np.zeros((len(pool), 1), np.float32))

    forward = _of_dinov2(network.config)
    extract, size = _over_mesh(forward, network.params, mesh, batch_size)
    record = {
        "features": f"DINOv2, class token of width {network.config.layers.width}",
        "features_sha256": tensors.sha256_of(network.files),
        "resize": f"bicubic with antialiasing to {DINO_SIDE}, not rounded",
        "features_precision": "float32",
    }
    return Extractor("dinov2", of_images, size, record, family="dinov2")


def _over_mesh(
    forward: Callable[[Any, jax.Array], tuple[jax.Array, ...]],
    params: Any,
    mesh: Mesh,
    batch_size: int,
) -> tuple[Callable[[np.ndarray], tuple[np.ndarray, ...]], int]:
    """A network of RGB images as a function of u8[B,H,W,C] with any B, and the size of its batches.

    Every process gets all features: they are small, and processing them is fast.
    """
    params = jax.device_put(params, rules.replicated(mesh))
    size = batch_size or BATCH_PER_DEVICE * mesh.size
    rules.check_batch(size, mesh, "the features' batch size")
    over_mesh = rules.batch_sharding(mesh)
    program = jax.jit(forward, in_shardings=(None, over_mesh), out_shardings=rules.replicated(mesh))

    def extract(images: np.ndarray) -> tuple[np.ndarray, ...]:
        if images.shape[-1] == 1:
            images = np.repeat(images, 3, axis=-1)
        parts = []
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            filled = processes.padded(batch, size)
            out = jax.device_get(program(params, processes.from_whole(over_mesh, filled)))
            parts.append([x[: len(batch)] for x in out])
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    return extract, size


def _shipped(
    name: str,
    features: str,
    recognise: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    judge: Callable[[np.ndarray], np.ndarray] | None,
    record: dict[str, Any],
    **others: Any,
) -> Extractor:
    """The features of an asset, by a function to features and logits, in batches of 512."""

    def extract(images: np.ndarray) -> ImageFeatures:
        pool, logits = recognise(images)
        return ImageFeatures(pool, None, logits)

    record = {
        "features": features,
        "features_sha256": load_asset(features)[1]["sha256"],
        "features_precision": "float32",
        **record,
    }
    return Extractor(name, extract, 512, record, judge, family=name)._replace(**others)


def _judged_by(asset: str) -> dict[str, str]:
    return {"judge_sha256": load_asset(asset)[1]["sha256"]}


def classifier_extractor(name: str) -> Extractor:
    """Return the features of a shipped pair of classifiers: 'mnist' gives FD-mnist (not FID)."""
    pair = PAIRS[name]
    return _shipped(
        name,
        pair.features,
        functools.partial(recognise_shipped, pair.features),
        functools.partial(predict_class, pair.judge),
        {"resize": f"bicubic to {pair.side} where larger, grey", **_judged_by(pair.judge)},
        side=pair.side,
        shipped=True,
    )


def digits_extractor() -> Extractor:
    """Return the features of FD-digits (not FID)."""
    return classifier_extractor("digits")


def mixer_extractor(mesh: Mesh, batch_size: int) -> Extractor:
    """Return the features of the other digit classifier, which judges: for FD-mixer (not FID).

    For networks that were trained on what `digits_convnet` says (`tasks/rewards.py`).
    """
    del mesh, batch_size
    side = PAIRS["digits"].side
    return _shipped(
        "mixer",
        JUDGE,
        functools.partial(recognise_shipped, JUDGE),
        functools.partial(predict_class, JUDGE),
        {"resize": f"bicubic to {side} where larger, grey"},
        side=side,
    )


def scenes_extractor() -> Extractor:
    """Return the features of windows of digit scenes, for FD-digits of scenes (not FID)."""
    windows = f"{FEATURE_CLASSIFIER} in windows of a scene, mean and largest, and colours"
    return _shipped(
        "scenes",
        FEATURE_CLASSIFIER,
        functools.partial(recognise_scenes, FEATURE_CLASSIFIER),
        predict_scene_digit,
        {"features": windows, "resize": "none", **_judged_by(JUDGE)},
        batch_size=256,
        side=scenes.SCENE_SIDE,
        family="digits",
        shipped=True,
    )


def clips_extractor() -> Extractor:
    """Return the features of FD-clips, of clips of moving digits (not FVD)."""
    return _shipped(
        "clips",
        MOVING,
        clip_features,
        predict_clip_digit,
        {"resize": f"bicubic to {CLIP_SIDE} where larger, grey", **_judged_by(JUDGE)},
        batch_size=256,
        clips=True,
        measures=clip_measures,
    )


def captions_extractor() -> Extractor:
    """Return the features of FD-captions, of caption scenes of any size (not FID)."""
    features = f"{FEATURE_CLASSIFIER} of the ink; its colour, place and amount"
    return _shipped(
        "captions",
        FEATURE_CLASSIFIER,
        caption_features,
        None,
        {"features": features, "resize": "none", **_judged_by(JUDGE)},
        batch_size=256,
        shipped=True,
        attributes=judged_attributes,
        follows=judged_pairs,
    )


def _on_one_device(make: Callable[[], Extractor], mesh: Mesh, batch_size: int) -> Extractor:
    del mesh, batch_size
    return make()


def rain_extractor() -> Extractor:
    """Return the features of FD-rain, statistics of clips of rain (no network, and not FVD)."""

    def extract(clips: np.ndarray) -> ImageFeatures:
        pool = rain_features(clips)
        return ImageFeatures(pool, None, np.zeros((len(pool), 1), np.float32))

    record = {"features": "statistics of rain: shares, bands of power, change"}
    return Extractor("rain", extract, 256, record, family="rain", clips=True)


def check_frames_of(extractor: Extractor, frames: int, what: str) -> None:
    """Raise UserError for features of clips and samples that are images, or the other way round."""
    if extractor.clips != (frames > 1):
        samples = f"clips of {frames} frames" if frames > 1 else "images"
        taken = "clips" if extractor.clips else "images"
        raise UserError(
            f"{what} are {samples}, and features {extractor.name!r} are of {taken}: choose others,"
            f" such as {'none, clips or rain' if frames > 1 else 'digits'}."
        )


# Of the shipped classifiers, which run on one device whatever the mesh.
SHIPPED_EXTRACTORS: dict[str, Callable[[], Extractor]] = {
    **{name: functools.partial(classifier_extractor, name) for name in PAIRS},
    "scenes": scenes_extractor,
    "clips": clips_extractor,
    "captions": captions_extractor,
    "rain": rain_extractor,
}
EXTRACTORS: dict[str, Callable[[Mesh, int], Extractor]] = {
    name: functools.partial(_on_one_device, make) for name, make in SHIPPED_EXTRACTORS.items()
}


def open_extractor(text: str, mesh: Mesh, batch_size: int = 0) -> Extractor:
    """Open 'inception:WEIGHTS', 'dinov2:WEIGHTS', one of `EXTRACTORS`, or a function's dotted name.

    The function is called with (mesh, batch_size) and returns an `Extractor`; a batch size of 0
    leaves the choice to the function. Raises UserError for other names.
    """
    kind, _, path = text.partition(":")
    if kind == "inception" and path:
        return inception_extractor(path, mesh, batch_size)
    if kind == "dinov2" and path:
        return dinov2_extractor(path, mesh, batch_size)
    if text not in EXTRACTORS and "." not in text:
        raise UserError(
            f"features {text!r}: expected inception:FILE (pt_inception-2015-12-05-6726825d.pth;"
            " docs/evaluation.md), dinov2:FILE (dinov2_vitl14_pretrain.pth),"
            f" {', '.join(EXTRACTORS)}, or the dotted name of a function."
        )
    if batch_size and text in EXTRACTORS:
        raise UserError(
            f"--batch_size={batch_size} has no effect on features {text!r}, which have a size of"
            " their own: remove it."
        )
    opened = lookup(text, "ditjax.evaluation.features.EXTRACTORS")
    extractor = opened(mesh, batch_size)
    if not isinstance(extractor, Extractor) or not (extractor.family or text in EXTRACTORS):
        raise UserError(
            f"features {text!r}: expected a function of (mesh, batch_size) that returns an"
            " Extractor whose `family` names its metrics."
        )
    return extractor
