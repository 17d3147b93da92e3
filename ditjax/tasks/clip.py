"""CLIP: images and their captions embedded in one space (Radford et al. 2021).

The loss compares every image of a batch with every caption. Zero-shot classification and retrieval
are its scores.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditjax.config import Config, Section, Text, at_least, key, network_module, text_pairs
from ditjax.data import source
from ditjax.data.tokenizers import Tokenizer, open_tokenizer
from ditjax.errors import UserError, shown
from ditjax.files import store
from ditjax.models.clip import CLIP_RULES, ClipConfig, clip_config, clip_cost, unit
from ditjax.models.embed import ANYWHERE, Placement
from ditjax.parallel import rules
from ditjax.runs import rundir
from ditjax.tasks.opened import Opened, check_channels, opened_run
from ditjax.training.step import Batch, Metrics
from ditjax.training.task import (
    Additions,
    Definition,
    Frozen,
    Task,
    ValidationScore,
    check_draws_nothing,
)
from ditjax.weights.clip import load_clip
from ditjax.weights.tensors import CONFIG_FILE

_EXAMPLE = ("colour", "a {} digit")


@dataclass(frozen=True)
class Clip(Section):
    """The loss of CLIP and its scores."""

    # softmax: CLIP's; sigmoid: SigLIP's; sum: of raw dot products, without mean and temperature
    loss: Literal["softmax", "sigmoid", "sum"] = key("softmax")
    # captions: an image's targets are all captions equal to its own
    targets: Literal["pairs", "captions"] = key("pairs")
    # local: each device compares its own rows with those of all, and never holds N x N
    form: Literal["global", "local"] = key("global")
    max_scale: float = key(100.0, at_least(1))  # of the logits, exp(logit_scale)
    # Pairs of a feature with classes and a template of its texts, for zero-shot classification.
    templates: tuple[tuple[str, str], ...] = key(
        (("label", "a photo of a {}."),), read=text_pairs("clip.templates", _EXAMPLE)
    )
    retrieval_num: int = key(256, at_least(2))  # held-out images with different captions


# ---- the loss


class Pairs(NamedTuple):
    """Embeddings v and w f32[N,E] of images and captions, and the captions' ids i32[N,M]."""

    image: jax.Array
    text: jax.Array
    caption: jax.Array


class Scaling(NamedTuple):
    """exp(scale) times a product, plus bias, is a logit: f32[] each."""

    scale: jax.Array
    bias: jax.Array


def contrastive_rows(
    kind: str,
    targets: str,
    own: Pairs,
    whole: Pairs,
    first: Any,
    shared: Scaling,
    place: Placement = ANYWHERE,
) -> dict[str, jax.Array]:
    """The loss of n pairs among N, with `own = whole[first : first + n]`: f32[n] of each metric.

    softmax, Radford et al. 2021 Fig. 3: half the cross-entropies of an image among all captions and
    of a caption among all images. sigmoid, Zhai et al. 2023 Alg. 1: the sum over captions of
    -log σ(±logit). sum: 2N times softmax's, so that the mean over rows is the sum of all
    cross-entropies. `floor` is the least possible loss: ln n for n equal captions. `accuracy` is
    the share of images whose own caption, or one equal to it, is the nearest.
    """
    n, N = len(own.image), len(whole.image)
    same = (own.caption[:, None] == whole.caption[None]).all(-1)
    alone = first + jnp.arange(n)[:, None] == jnp.arange(N)[None]
    matches = (same if targets == "captions" else alone).astype(jnp.float32)
    share = matches / matches.sum(1, keepdims=True)

    def logits(rows: jax.Array, columns: jax.Array) -> jax.Array:
        return place.put("similarities", jnp.exp(shared.scale) * rows @ columns.T + shared.bias)

    by_image = logits(own.image, whole.text)
    nearest = jnp.take_along_axis(same, jnp.argmax(by_image, axis=1)[:, None], axis=1)[:, 0]
    found = {"accuracy": nearest.astype(jnp.float32)}
    if kind == "sigmoid":
        loss = -jax.nn.log_sigmoid((2 * matches - 1) * by_image).sum(1)
        return {**found, "loss": loss, "floor": jnp.zeros(n)}
    by_text = logits(own.text, whole.image)
    halves = [
        jax.nn.logsumexp(each, axis=1) - (share * each).sum(1) for each in (by_image, by_text)
    ]
    loss = 0.5 * (halves[0] + halves[1])
    floor = jnp.log(same.sum(1).astype(jnp.float32))
    factor = 2.0 * N if kind == "sum" else 1.0
    return {**found, "loss": factor * loss, "floor": factor * floor}


def contrastive_loss(
    c: Clip,
    pairs: Pairs,
    log_scale: jax.Array,
    bias: jax.Array,
    mesh: Mesh | None,
    place: Placement,
) -> tuple[jax.Array, Metrics]:
    """The loss f32[] of a batch, and metrics. `pairs` are not normalised, `log_scale` not clipped.

    The scale has no gradient where it is clipped. Each form computes the same loss.
    """
    if c.loss == "sum":
        shared = Scaling(jnp.zeros(()), jnp.zeros(()))
    else:
        pairs = pairs._replace(image=unit(pairs.image), text=unit(pairs.text))
        shared = Scaling(jnp.minimum(log_scale, np.log(c.max_scale)), bias)
    of_rows = functools.partial(contrastive_rows, c.loss, c.targets)
    if c.form == "local" and mesh is not None:
        rows = rules.by_rows(of_rows, mesh)(pairs, shared)
    else:
        rows = of_rows(pairs, pairs, 0, shared, place)
    means = {name: each.mean() for name, each in rows.items()}
    loss = means.pop("loss")
    metrics = {"accuracy": means["accuracy"], "above_floor": loss - means["floor"]}
    return loss, {**metrics, "scale": jnp.exp(shared.scale)}


# ---- scores


def retrieval(
    image: np.ndarray, text: np.ndarray, caption: np.ndarray, num: int
) -> dict[str, float]:
    """R@1 and R@5 both ways, among the first `num` examples with different captions.

    image, text: unit vectors f[N,E]; caption: ids i[N,M]. R@k is the share of rows whose own
    partner is among the k nearest.
    """
    first: dict[bytes, int] = {}
    for i, ids in enumerate(caption):
        first.setdefault(ids.tobytes(), i)
    chosen = list(first.values())[:num]
    similar = image[chosen] @ text[chosen].T
    found: dict[str, float] = {"retrieval_num": float(len(chosen))}
    for name, each in (("image_to_text", similar), ("text_to_image", similar.T)):
        rank = (each > np.diag(each)[:, None]).sum(1)
        found |= {f"{name}_r{k}": float(np.mean(rank < k)) for k in (1, 5)}
    return found


def class_vectors(embedded: jax.Array) -> jax.Array:
    """Radford et al. 2021 Sec. 3.1.4: the unit mean of unit vectors [K,T,E] of T templates."""
    return unit(embedded.mean(1))


def _prompts(c: Config, tokenizer: Tokenizer) -> dict[str, tuple[int, np.ndarray]]:
    """Feature -> (its place among the classes of a batch, ids i32[K,T,M]). Raises UserError."""
    opened = source.open_split(c.data.name, c.evaluate.split, c.data.data_dir or None)
    names = source.class_names_by_feature(opened.builder.info.features)
    templates: dict[str, list[str]] = {}
    for feature, template in c.clip.templates:
        templates.setdefault(feature, []).append(template)
    found = {}
    for feature, texts in templates.items():
        if feature not in names:
            if c.clip.templates == Clip().templates:
                continue  # images without classes: there is no zero-shot score
            raise UserError(
                f"config.clip.templates names {feature!r}, which is no feature with classes of"
                f" {c.data.name!r}: it has {', '.join(names) or 'none'}."
            )
        every = [text.format(name) for name in names[feature] for text in texts]
        ids = tokenizer(every, c.text.tokens).ids
        place = list(names).index(feature)
        found[feature] = (place, ids.reshape(len(names[feature]), len(texts), -1))
    return found


def _score(c: Config, apply: Any, of_prompts: Any, tokenizer: Tokenizer) -> ValidationScore:
    """The score of a recipe. `of_prompts` applies the towers to what is no batch of the mesh's."""
    prompts = functools.cache(lambda: _prompts(c, tokenizer))

    def measure(params: Any, frozen: Frozen, keys: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Embeddings, and for each feature 1 where the nearest class is right; NaN for no class."""
        image = apply(params, batch["image"], method="embed_image")
        text = apply(params, batch["caption"], method="embed_text")
        found = {"image": image, "text": text, "caption": batch["caption"]}
        for feature, (place, ids) in prompts().items():
            K, T, M = ids.shape
            embedded = of_prompts(params, jnp.asarray(ids.reshape(-1, M)), method="embed_text")
            classes = class_vectors(embedded.reshape(K, T, -1))
            truth = batch["classes"][:, place]
            right = jnp.argmax(image @ classes.T, axis=1) == truth
            found[feature] = jnp.where(truth < 0, jnp.nan, right.astype(jnp.float32))
        return found

    def summary(measured: Mapping[str, np.ndarray]) -> dict[str, float]:
        found = {f"zero_shot_{name}": float(np.nanmean(measured[name])) for name in prompts()}
        image, text, caption = (measured[name] for name in Pairs._fields)
        return found | retrieval(image, text, caption, c.clip.retrieval_num)

    protocol = {
        "metric": "CLIP zero-shot and retrieval",
        "split": c.evaluate.split,
        "image_size": c.data.image_size,
        "templates": [list(pair) for pair in c.clip.templates],
        "retrieval_num": c.clip.retrieval_num,
        "tokens": c.text.tokens,
        "tokenizer": tokenizer.sha256,
    }
    return ValidationScore(measure, names={}, protocol=protocol, summary=summary)


# ---- the task


def towers(c: Config) -> ClipConfig:
    """The towers of a recipe."""
    biased = c.clip.loss == "sigmoid"
    return clip_config(c.model, c.data.image_size, c.data.channels, c.text.tokens, biased)


def make(c: Config, mesh: Mesh | None = None) -> Task:
    """Build the task of a recipe; its mesh may split the batch and the parameters, not tokens."""
    place = rules.whole_placement(mesh, "CLIP")
    tokenizer = open_tokenizer(c.text.tokenizer)
    check_tokenizer(c, tokenizer)
    config = towers(c)
    build = network_module(c.model.kind).NETWORK.module
    plain, apply = build(c.model, config), build(c.model, config, place).apply
    side = c.data.image_size
    inputs = {
        "image": jax.ShapeDtypeStruct((side, side, c.data.channels), jnp.float32),
        "caption": jax.ShapeDtypeStruct((c.text.tokens,), jnp.int32),
    }

    def loss(params: Any, frozen: Frozen, drawn: Batch) -> tuple[jax.Array, Metrics]:
        v, w, scale, bias = apply(params, drawn["image"], drawn["caption"])
        pairs = Pairs(v, w, drawn["caption"])
        return contrastive_loss(
            c.clip, pairs, scale, bias, None if place is ANYWHERE else mesh, place
        )

    def init(key: jax.Array) -> Any:
        x, ids = (jnp.zeros((1, *each.shape), each.dtype) for each in inputs.values())
        return plain.init(key, x, ids)

    cost = clip_cost(c.model, config)
    return Task(
        name=cost.name,
        inputs=inputs,
        init=init,
        prepare=lambda frozen, batch, key: {name: batch[name] for name in inputs},
        draw=lambda batch, key: batch,
        loss=loss,
        open_rows=lambda: Additions(contents={"text.tokenizer": tokenizer.sha256}),
        rules=CLIP_RULES,
        cost=cost,
        scores=(_score(c, apply, plain.apply, tokenizer),),
    )


def check_tokenizer(c: Config, tokenizer: Tokenizer) -> None:
    """Raise UserError unless the network of a recipe knows the tokens of its tokenizer."""
    k = c.model
    if tokenizer.vocabulary > k.vocabulary:
        raise UserError(
            f"config.model.vocabulary is {k.vocabulary}, and the tokenizer {c.text.tokenizer!r} has"
            f" {tokenizer.vocabulary} tokens: set it to at least that."
        )
    if k.end not in (tokenizer.end, -1):
        raise UserError(
            f"config.model.end is {k.end}, and the tokenizer {c.text.tokenizer!r} ends texts with"
            f" {tokenizer.end}: set it to that."
        )


def check(c: Config) -> None:
    """Raise UserError for settings that this task does not support."""
    if c.train.microbatches > 1:
        raise UserError(
            f"config.train.microbatches is {c.train.microbatches}: a pair is compared with all"
            " others of its batch, and the mean over parts is another loss; set it to 1."
        )
    check_draws_nothing(c)
    for feature, template in c.clip.templates:
        if template.count("{}") != 1 or "{" in template.replace("{}", ""):
            raise UserError(
                f"config.clip.templates has {shown(template)} for {feature!r}: expected one {{}},"
                " in the place of the class."
            )


TASK = Definition(make=make, network="clip", sections={"text": Text, "clip": Clip}, check=check)


# ---- the frozen CLIP of other tasks


def opened_clip(path: str, key_name: str) -> Opened:
    """The CLIP of a run, or of a folder of transformers, at the path that `key_name` names.

    Raises UserError for another network.
    """
    if (store.place(path) / CONFIG_FILE).is_file() and not rundir.is_run(path):
        loaded = load_clip(path)
        return Opened(loaded.config, lambda mesh: {"params": loaded.params}, loaded.account)
    opened = opened_run(path, key_name, "clip")
    return opened._replace(config=towers(opened.recipe))


def open_clip(c: Config, key_name: str) -> Opened:
    """The CLIP of a run, or of a folder of transformers, that config.`key_name` names.

    Its captions are those of the recipe `c`. Raises UserError if it reads other images or tokens.
    """
    section, _, leaf = key_name.partition(".")
    path: str = getattr(getattr(c, section), leaf)
    opened = opened_clip(path, key_name)
    if opened.recipe:
        theirs: Text = opened.recipe.text
        if theirs.tokenizer != c.text.tokenizer:
            raise UserError(
                f"config.text.tokenizer is {c.text.tokenizer!r}, and the CLIP at {path} was trained"
                f" with {theirs.tokenizer!r}: set it to that."
            )
    image, text = opened.config.image, opened.config.text
    check_channels(path, image.channels, c.data.channels)
    for name, ours, least in (
        ("data.image_size", c.data.image_size, image.side),
        ("text.tokens", c.text.tokens, min(c.text.tokens, text.positions)),
    ):
        if ours != least:
            raise UserError(f"config.{name} is {ours}, and the CLIP at {path} reads {least}.")
    return opened
