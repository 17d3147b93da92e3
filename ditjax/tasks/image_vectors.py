"""CLIP's vectors of images as conditions of unCLIP's decoder (Ramesh et al. 2022, Sec. 2.1).

In training a vector is that of the example itself, as a frozen CLIP embeds it. While samples are
drawn it is given, or follows from the caption, by a prior (`tasks/prior.py`). What a network is
given is √E z of the unit vector z, and 0 for no image.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ditjax.config import FRACTION, PATH, Config, Section, between, changed, key, positive
from ditjax.errors import UserError
from ditjax.models.clip import CLIP
from ditjax.models.network import Conditions
from ditjax.runs import opening
from ditjax.tasks.clip import open_clip
from ditjax.tasks.opened import Opened, check_trained_alike, opened_run
from ditjax.tasks.prior import standardized, vectors_of_captions
from ditjax.training.step import Batch
from ditjax.training.task import Frozen

IMAGE_CLIP, PRIOR = "image_clip", "prior"  # frozen weights
VECTOR = "vector"  # of `Conditions`, and of a batch
_DROP = 4  # of a step's key, behind what `diffusion.draw` folds in
_PRIOR_STREAM = 3  # of a sample's key, behind those of `diffusion/samplers.py`
_OF_PRIOR = ("source", ("prior",))
_BEHIND = {"image": 0, "other": 1}  # sources that are images of records: so many records behind


@dataclass(frozen=True)
class ImageVectors(Section):
    """The CLIP whose vectors of images a network is given, and whose vector a sample is given."""

    clip: str = key("", PATH)  # a run of task clip, or a folder of transformers
    width: int = positive(768, most=65_536)  # of its vectors
    drop: float = key(0.1, FRACTION)  # share of examples that are given no vector
    # of the record's image, or of the next record's; drawn of the caption by a prior, or the
    # caption's own; or none
    source: Literal["image", "other", "prior", "text", "none"] = key(
        "image", free=True, protocol=True
    )
    # a run of task prior, of the same CLIP
    prior: str = key("", PATH, free=True, protocol=True, used_if=_OF_PRIOR)
    # vectors of which the nearest to the caption is kept; 0 = as many as the prior's recipe says
    candidates: int = key(0, between(0, 1024), free=True, protocol=True, used_if=_OF_PRIOR)


def has_vectors(c: Config) -> bool:
    """Whether a recipe's network is given vectors of images."""
    return isinstance(getattr(c, "unclip", None), ImageVectors)


def vector_width(c: Config) -> int:
    """The width of the vectors that a recipe's network is given; 0 for none."""
    return c.unclip.width if has_vectors(c) else 0


def vector_inputs(c: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """What an example of a recipe has of its image."""
    shape = jax.ShapeDtypeStruct((vector_width(c),), jnp.float32)
    return {VECTOR: shape} if has_vectors(c) else {}


def image_behind(c: Config) -> int | None:
    """Which record's image a sample is given beside its own caption; None for none."""
    return _BEHIND.get(c.unclip.source) if has_vectors(c) else None


# ---- the frozen networks


def _clip_of(c: Config) -> Opened:
    """The CLIP of a recipe. Raises UserError for vectors of another width."""
    opened = open_clip(c, "unclip.clip")
    width = opened.config.image.projection
    if c.unclip.width != width:
        raise UserError(
            f"config.unclip.width is {c.unclip.width}, and the CLIP at {c.unclip.clip} has vectors"
            f" of width {width}: set it to that."
        )
    return opened


def _prior_of(c: Config) -> Opened:
    """The prior of a recipe, with its number of candidates. Raises UserError for other texts."""
    opened = opened_run(c.unclip.prior, "unclip.prior", "prior")
    names = ("text.tokenizer", "text.tokens")
    check_trained_alike(c, opened.recipe, names, f"the prior at {c.unclip.prior}")
    own = {"candidates": c.unclip.candidates or opened.recipe.prior.candidates}
    return opened._replace(recipe=changed(opened.recipe, {"prior": own}))


def load_vectors(c: Config, mesh: Mesh) -> Frozen:
    """The frozen CLIP on the mesh, and the prior if samples need it. Raises UserError."""
    if not has_vectors(c):
        return {}
    found: Frozen = {IMAGE_CLIP: _clip_of(c).load(mesh)}
    if c.unclip.source != "prior":
        return found
    prior = _prior_of(c)
    try:
        theirs = open_clip(prior.recipe, "prior.clip").load(mesh)
    except UserError as error:
        raise UserError(f"config.unclip.prior is {c.unclip.prior}: {error}") from None
    if opening.digest(theirs) != opening.digest(found[IMAGE_CLIP]):
        raise UserError(
            f"config.unclip.clip is {c.unclip.clip}, and the prior at {c.unclip.prior} draws"
            f" vectors of another CLIP, {prior.recipe.prior.clip}: expected the same."
        )
    return {**found, PRIOR: prior.load(mesh)}


# ---- in training


def embedded_images(c: Config, frozen: Frozen, images: jax.Array) -> jax.Array:
    """√E z of images f32[B,H,W,C] in [-1, 1]: f32[B,E]."""
    apply: Any = CLIP(_clip_of(c).config).apply
    return standardized(apply(frozen[IMAGE_CLIP], images, method="embed_image"))


def embedded_texts(c: Config, frozen: Frozen, ids: jax.Array) -> jax.Array:
    """√E times the unit vectors of captions i32[B,M]: f32[B,E]."""
    apply: Any = CLIP(_clip_of(c).config).apply
    return standardized(apply(frozen[IMAGE_CLIP], ids, method="embed_text"))


def prepare_vectors(c: Config, frozen: Frozen, batch: Batch) -> dict[str, jax.Array]:
    """The vectors of a batch's images."""
    return {VECTOR: embedded_images(c, frozen, batch["image"])} if has_vectors(c) else {}


def drop_vectors(c: Config, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
    """The vectors of a batch, a share of them 0, whatever becomes of the captions.

    key: a step's, of which `tasks/diffusion.py` draws the rest.
    """
    if not has_vectors(c):
        return {}
    own = jax.random.fold_in(key, _DROP)
    drop = jax.random.bernoulli(own, c.unclip.drop, (len(batch[VECTOR]), 1))
    return {VECTOR: jnp.where(drop, 0.0, batch[VECTOR])}


# ---- in sampling


def with_image_vectors(
    c: Config, frozen: Frozen, conditions: Conditions, keys: jax.Array | None
) -> Conditions:
    """The conditions of samples, key[B], with their vectors f32[B,E].

    conditions.vector are vectors, or images f32[B,H,W,C], which are embedded, or None: then vectors
    follow from conditions.context, the tokens of captions i32[B,M], as config.unclip.source says.
    """
    if not has_vectors(c):
        return conditions
    given = conditions.vector
    if given is not None and given.ndim == 2:
        return conditions
    if given is not None:
        vector = embedded_images(c, frozen, jnp.asarray(given))
    else:
        vector = _of_captions(c, frozen, jnp.asarray(conditions.context), keys)
    return conditions._replace(vector=vector)


def _of_captions(c: Config, frozen: Frozen, ids: jax.Array, keys: jax.Array | None) -> jax.Array:
    """Vectors that follow from captions i32[B,M]: f32[B,E]."""
    source = c.unclip.source
    if source == "none":
        return jnp.zeros((len(ids), c.unclip.width), jnp.float32)
    if source == "text":
        return embedded_texts(c, frozen, ids)
    if source != "prior" or keys is None:
        raise ValueError(f"samples of config.unclip.source={source} are given their images or keys")
    # Of keys of its own, as the image begins with the noise of the sample's.
    own = jax.vmap(jax.random.fold_in, (0, None))(keys, _PRIOR_STREAM)
    recipe, weights = _prior_of(c).recipe, (frozen[PRIOR], frozen[IMAGE_CLIP])
    return standardized(vectors_of_captions(recipe, _clip_of(c), *weights, ids, own))


def vector_protocol(c: Config) -> dict[str, Any]:
    """What vectors add to a sampling protocol, beside the digests of CLIP and prior."""
    if not has_vectors(c):
        return {}
    found: dict[str, Any] = {"source": c.unclip.source}
    if c.unclip.source == "prior":
        theirs = _prior_of(c).recipe
        s = theirs.sample
        found["prior"] = {name: getattr(s, name) for name in ("sampler", "steps", "cfg_scale")}
        found["prior"] |= {"candidates": theirs.prior.candidates}
    return {"unclip": found}
