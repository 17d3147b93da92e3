"""Representation alignment: the tokens of a block are drawn towards a teacher's features.

REPA (Yu et al. 2024, arXiv:2410.06940, Sec. 3): L - λ mean cos(MLP(h_l), f(x0)), where h_l are the
tokens of block l of the noisy image, and f(x0) the features of a fixed network of the clean one, at
the same places. λ = .5, l = 8 of 28 and a projector of width 2,048 are the published values
(sihyun-yu/REPA at 67f7145).

A score is circular if it is measured with the teacher: such recipes are refused.
"""

import dataclasses
import functools
import hashlib
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.config import Config, Rule, Section, above, key, non_negative, replaced
from ditjax.data import source
from ditjax.data.folders import report_reading
from ditjax.data.names import is_latents
from ditjax.diffusion.losses import Objective
from ditjax.errors import UserError, first_few
from ditjax.files import npz
from ditjax.models.classifier import DIGIT_SIDE
from ditjax.models.network import Conditions, Inputs, Network
from ditjax.parallel.processes import is_primary
from ditjax.training.step import AVERAGE, Batch
from ditjax.training.task import Additions, Frozen
from ditjax.weights.shipped import shipped_classifier

Build = Callable[[Config], Any]

FEATURES = "features"  # of a batch, and of a file: f[n,T,Z], T tokens row by row

_NAMED = ("none", "digits_mixer", "digits_convnet", "random", "self")
_FILE = "file:"
_TEACHER = Rule(
    lambda v: v in _NAMED or bool(v.startswith(_FILE) and v.removeprefix(_FILE)),
    f"one of {', '.join(map(repr, _NAMED))}, or 'file:NPZ'",
)


@dataclasses.dataclass(frozen=True)
class Align(Section):
    """Representation alignment; `config.model.align_block` says which tokens are aligned."""

    # 'none', 'digits_mixer', 'digits_convnet', 'random', 'self' or 'file:NPZ'
    teacher: str = key("none", _TEACHER)
    weight: float = key(0.5, above(0))  # λ
    # of 'self': the averaged network's block whose tokens are the features; 0 = the aligned one
    teacher_block: int = non_negative(0)

    def unused(self, name: str, c: Config) -> str:
        if name == "teacher":
            return ""
        if self.teacher == "none":
            return "teacher"
        return "teacher" if name == "teacher_block" and self.teacher != "self" else ""


# ---- teachers that are classifiers of digits


class _Tap(NamedTuple):
    """A shipped classifier, and its layer whose outputs are a map of features."""

    asset: str
    layer: str
    random: bool = False


# 'random' is the control: the mixer's architecture with initial weights, the same in every run.
_CLASSIFIERS = {
    "digits_mixer": _Tap("digits_mixer", "final_norm"),
    "digits_convnet": _Tap("digits_convnet", "conv_2"),
    "random": _Tap("digits_mixer", "final_norm", random=True),
}
# Features of config.evaluate -> the networks that its distances, and its accuracy, are measured by.
_DISTANCES = {"digits": "digits_convnet", "scenes": "digits_convnet"}
_JUDGES = {"digits": "digits_mixer", "scenes": "digits_mixer"}


def classifier_features(name: str, images: jax.Array) -> jax.Array:
    """The teacher's map of features of images f32[B,H,W,C] in [-1, 1] -> f32[B,h,w,Z].

    The images are brought to the 8x8 grey pixels that the classifiers know.
    """
    tap = _CLASSIFIERS[name]
    network, params = shipped_classifier(tap.asset)
    images = digit_images(images)
    if tap.random:
        params = network.init(jax.random.key(0), images[:1])["params"]
    _, state = network.apply(
        {"params": params},
        images,
        capture_intermediates=lambda module, method: module.name == tap.layer,
        mutable=["intermediates"],
    )
    return as_map(state["intermediates"][tap.layer]["__call__"][0])


def digit_images(images: jax.Array) -> jax.Array:
    """Bring images f32[B,H,W,C] in [-1, 1] to the classifiers' 8x8 grey pixels."""
    B = images.shape[0]
    if images.shape[1:3] != (DIGIT_SIDE, DIGIT_SIDE):
        images = jax.image.resize(images, (B, DIGIT_SIDE, DIGIT_SIDE, images.shape[3]), "linear")
    return images.mean(-1, keepdims=True) if images.shape[3] > 1 else images


def as_map(features: Any) -> jax.Array:
    """Tokens [B,T,Z], row by row, as a map [B,√T,√T,Z]; a map stays as it is."""
    found = jnp.asarray(features)
    if found.ndim == 3:
        side = math.isqrt(found.shape[1])
        found = found.reshape(found.shape[0], side, side, found.shape[2])
    return found


def as_tokens(features: jax.Array, tokens: int) -> jax.Array:
    """A map f[B,h,w,Z] at the places of T tokens, a square number -> f32[B,T,Z].

    Another number of places than the map's is interpolated bilinearly.
    """
    B, h, w, Z = features.shape
    side = math.isqrt(tokens)
    features = features.astype(jnp.float32)
    if (h, w) != (side, side):
        features = jax.image.resize(features, (B, side, side, Z), "linear")
    return features.reshape(B, tokens, Z)


def mean_cosine(aligned: jax.Array, features: jax.Array) -> jax.Array:
    """Yu et al. 2024 Eq. 8: the mean over images and tokens of cos(a, f), f32[B,T,Z] each.

    A vector of zeros has the cosine 0 with any other.
    """
    a, f = (x.astype(jnp.float32) for x in (aligned, features))
    squares = jnp.square(a).sum(-1) * jnp.square(f).sum(-1)
    return ((a * f).sum(-1) * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))).mean()


# ---- in a task


class Alignment(NamedTuple):
    """The alignment of a recipe: what it adds to a batch, and what tokens are aligned to."""

    weight: float
    inputs: Mapping[str, jax.ShapeDtypeStruct]  # what `prepare` adds, for one example
    prepare: Callable[[Batch], Batch]
    features: Callable[[Frozen, Batch], jax.Array]  # of a drawn batch: f32[B,T,Z]


def alignment_of(
    c: Config, network: Network, inputs: Inputs, objective: Objective, build: Build
) -> Alignment | None:
    """The alignment of a recipe, or None if it has none. `build` makes the network of a recipe."""
    teacher = c.align.teacher
    if teacher == "none":
        return None
    tokens, width = _tokens(c, network, inputs), c.model.align_features
    if teacher == "self":
        features = _of_average(c, objective, build)
        return Alignment(c.align.weight, {}, lambda batch: {}, features)

    def prepare(batch: Batch) -> Batch:
        if teacher in _CLASSIFIERS:
            found = classifier_features(teacher, batch["image"])
        elif FEATURES in batch:
            found = as_map(batch[FEATURES])
        else:
            raise UserError(
                f"config.align.teacher is {teacher!r}, whose features belong to records of the data"
                " set: a batch that was not read from it has none."
            )
        return {FEATURES: as_tokens(found, tokens)}

    shape = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
    return Alignment(
        c.align.weight, {FEATURES: shape}, prepare, lambda frozen, drawn: drawn[FEATURES]
    )


def _of_average(
    c: Config, objective: Objective, build: Build
) -> Callable[[Frozen, Batch], jax.Array]:
    """The tokens of the averaged network at the least noise, with the labels of the step."""
    block = c.align.teacher_block or c.model.align_block
    module = build(replaced(c, model=dataclasses.replace(c.model, align_block=block)))
    process = objective.process

    def features(frozen: Frozen, drawn: Batch) -> jax.Array:
        average, x0 = jax.lax.stop_gradient((frozen[AVERAGE], drawn["x0"]))
        t = process.from_unit(jnp.zeros(x0.shape[:1]))
        tap = Tapped(functools.partial(module.apply, average), drawn["y"])
        process.evaluate(tap, process.noised(x0, t, drawn["eps"]), t)
        return jax.lax.stop_gradient(tap.only("tapped"))

    return features


class Tapped:
    """A denoising function that keeps what its network sows in its one evaluation."""

    def __init__(self, apply: Callable[..., Any], label: jax.Array) -> None:
        self._apply, self._label = apply, label
        self._sown: list[Any] = []

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        out: jax.Array
        out, found = self._apply(x, t, Conditions(label=self._label), mutable=["intermediates"])
        self._sown.append(found["intermediates"])
        return out

    def only(self, name: str) -> jax.Array:
        """What was sown by that name. Raises UserError unless the network was evaluated once."""
        if len(self._sown) != 1:
            raise UserError(
                f"config.align needs a loss that evaluates the network once; config.diffusion.loss"
                f" evaluated it {len(self._sown)} times: set config.align.teacher to 'none'."
            )
        found: jax.Array = self._sown[0][name][0]
        return found


def _tokens(c: Config, network: Network, inputs: Inputs) -> int:
    split = network.attention(c.model, inputs)
    assert split is not None
    return split.tokens


# ---- refusals


def check_alignment(c: Config, network: Network, inputs: Inputs) -> None:
    """Raise UserError for an alignment that is circular, or that does not fit its network."""
    teacher = c.align.teacher
    if teacher == "none":
        return
    said = f"config.align.teacher is {teacher!r}"
    if inputs.interval:
        raise UserError(
            f"{said} and config.diffusion.loss {c.diffusion.loss!r}, whose forward derivatives"
            " cannot be tapped: set the teacher to 'none', or choose another loss."
        )
    if teacher == _DISTANCES.get(c.evaluate.features):
        raise UserError(
            f"{said} and config.evaluate.features {c.evaluate.features!r}: the distance would be"
            " measured with the teacher, and its gain would be circular; choose teacher"
            " 'digits_mixer', or features 'none'."
        )
    if c.adapt.kind != "full":
        raise UserError(
            f"{said} and config.adapt.kind {c.adapt.kind!r}: an alignment trains the network whole;"
            " set config.adapt.kind to 'full', or the teacher to 'none'."
        )
    if not getattr(c.model, "align_block", 0):
        raise UserError(
            f"{said}, and the network has no projector to align: set config.model.align_block to a"
            " block of a 'dit', such as a third of its depth."
        )
    split = network.attention(c.model, inputs)
    if split is None or math.isqrt(split.tokens) ** 2 != split.tokens:
        raise UserError(f"{said}: expected a network with a square number of tokens.")
    if teacher in _CLASSIFIERS and is_latents(c.data.name):
        raise UserError(
            f"{said}, a network of pixels, and config.data.name {c.data.name!r} holds latents"
            " alone: name the images, or give their features as 'file:NPZ'."
        )
    if teacher.startswith(_FILE) and c.data.flip:
        raise UserError(
            f"{said}, features of images as they are, and config.data.flip mirrors half of them:"
            " set it to False."
        )
    if teacher == "self":
        _check_self(c, network, inputs)
    elif teacher in _CLASSIFIERS:
        image = jax.ShapeDtypeStruct((1, c.data.image_size, c.data.image_size, 1), jnp.float32)
        found = jax.eval_shape(functools.partial(classifier_features, teacher), image)
        _check_width(c, found.shape[-1], "the teacher")


def _check_self(c: Config, network: Network, inputs: Inputs) -> None:
    described = network.cost(c.model, inputs).description if network.cost else {}
    _check_width(c, described.get("width", c.model.align_features), "the network itself")
    if c.align.teacher_block > described.get("depth", c.align.teacher_block):
        raise UserError(
            f"config.align.teacher_block is {c.align.teacher_block}, and the network has"
            f" {described['depth']} blocks: expected one of them, or 0 for the aligned one."
        )


def _check_width(c: Config, width: int, what: str) -> None:
    if c.model.align_features != width:
        raise UserError(
            f"config.model.align_features is {c.model.align_features}, and {what} has features of"
            f" width {width}: set it to that."
        )


# ---- features that another program computed


def open_features(c: Config, network: Network, inputs: Inputs) -> Additions:
    """What training adds to the rows that it reads, and what it must know beforehand.

    Raises UserError for a projector that nothing trains, and for a file of other features.
    """
    teacher = c.align.teacher
    if teacher == "none" and getattr(c.model, "align_block", 0):
        raise UserError(
            f"config.model.align_block is {c.model.align_block} and config.align.teacher 'none':"
            " nothing would train the projector; set align_block to 0, or name a teacher."
        )
    if teacher == _JUDGES.get(c.evaluate.features) and is_primary():
        print(
            f"note: accuracy is judged by {teacher}, the teacher of the alignment: it is circular."
            " Distances are not, and neither is the validation loss",
            file=sys.stderr,
        )
    if not teacher.startswith(_FILE):
        return Additions()
    path = Path(teacher.removeprefix(_FILE))
    with npz.reading(path) as archive:
        others = [name for name in npz.names(archive) if name != FEATURES]
        features = npz.read_array(archive, FEATURES)
    d = c.data
    records = source.dataset_info(d.name, d.split, d.data_dir or None, d.max_damaged).num_examples
    shape = features.shape
    fits = len(shape) == 3 and math.isqrt(shape[1]) ** 2 == shape[1]
    if not fits or shape[0] != records or not np.issubdtype(features.dtype, np.floating):
        raise UserError(
            f"{path}: {FEATURES!r} is {features.dtype}{list(shape)}: expected floating-point"
            f" numbers [{records}, T, Z], one row for each record of {d.name} {d.split} in order,"
            " and T a square number of places, row by row."
        )
    _check_width(c, shape[2], str(path))
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features)).any(axis=(1, 2)).sum())
        raise UserError(
            f"{path}: {FEATURES!r} of {bad} of {records} records are not finite in their type,"
            f" {features.dtype}: compute them again."
        )
    if is_primary():
        left = f"; arrays left out: {first_few(others, 5)}" if others else ", nothing left out"
        report_reading(f"align: {path}: {FEATURES} of {records:,} records taken{left}")

    def add(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**rows, FEATURES: features[rows["index"]]}

    return Additions(add, {"align.teacher": hashlib.sha256(features.tobytes()).hexdigest()})
