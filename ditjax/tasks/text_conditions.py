"""Conditions that are texts: a frozen encoder's features of captions, prompts and the null text.

A network is given the features as context of cross-attention. The label that a batch carries along
is not seen by it; the null label marks the examples that are given the null text, the encoder's
features of "", or of the negative prompt while samples are drawn (Ho & Salimans 2022). So dropping,
guidance and its rules are those of labels.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditjax.config import PATH, Config, Text, between, key, positive
from ditjax.data.names import is_latents
from ditjax.data.tokenizers import Tokenizer, cut_line, open_tokenizer
from ditjax.errors import UserError, one_line
from ditjax.models.embed import ANYWHERE
from ditjax.models.network import Conditions, Context, Inputs, Network
from ditjax.models.text import TextConfig, TextEncoder, until_end
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.parallel.processes import is_primary
from ditjax.runs import opening, rundir
from ditjax.tasks import make_task
from ditjax.tasks.clip import towers
from ditjax.tasks.image_vectors import (
    VECTOR,
    image_behind,
    load_vectors,
    prepare_vectors,
    vector_inputs,
    vector_protocol,
    with_image_vectors,
)
from ditjax.tasks.recaptioning import recaptions
from ditjax.training.step import Batch
from ditjax.training.task import Additions, Beside, FromRecords, Frozen
from ditjax.weights.clip import write_clip_text
from ditjax.weights.text import load_text_encoder
from ditjax.weights.text_pipeline import copy_encoder

ENCODER, NULL = "text", "null_text"  # frozen weights, and the features of the null text
_FIELDS = ("context", "context_mask")  # of `Conditions`


@dataclass(frozen=True)
class TextConditions(Text):
    """The captions of a data set as conditions: their tokens, and a frozen encoder's features."""

    tokens: int = positive(16, most=4096)  # to which every text is padded or cut
    # the frozen encoder: a folder of transformers (BERT's, CLIP's, T5's) or a run of CLIP
    encoder: str = key("", PATH, free=True)
    width: int = positive(768, most=65_536)  # of its features of a token
    # all tokens, or the one vector that the encoder makes of a text
    features: Literal["tokens", "pooled"] = key("tokens")
    # each text is encoded once, alone, and kept in memory as float16 while a run trains
    cache: bool = key(False)
    # a run of task captioner, whose captions a share of the records are given in training
    captioner: str = key("", PATH)
    synthetic_share: float = key(0.95, between(0, 1))
    # what the unconditional half is given instead of the null text, while samples are drawn
    negative: str = key("", free=True, protocol=True)

    def unused(self, name: str, c: Config) -> str:
        without = name == "synthetic_share" and not self.captioner
        return "text.captioner" if without else super().unused(name, c)

    def check(self, c: Config) -> None:
        super().check(c)
        if self.negative and c.sample.cfg_scale == 1 and c.evaluate.guided_scale in (0, 1):
            raise UserError(
                f"config.text.negative is {self.negative[:60]!r} and config.sample.cfg_scale 1:"
                " without guidance no prompt is negative; raise the scale, or leave it out."
            )


def has_texts(c: Config) -> bool:
    """Whether a recipe's network is conditioned on texts."""
    return isinstance(getattr(c, "text", None), TextConditions)


def context_of(c: Config) -> Context:
    """The tokens and the width of what a recipe's network is given; none without texts."""
    if not has_texts(c):
        return Context()
    return Context(c.text.tokens if c.text.features == "tokens" else 1, c.text.width)


def text_inputs(c: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """What an example of a recipe has beside x0 and its label."""
    if not has_texts(c):
        return {}
    M, C = context_of(c)
    shapes = jax.ShapeDtypeStruct((M, C), jnp.float32), jax.ShapeDtypeStruct((M,), jnp.bool_)
    return {**dict(zip(_FIELDS, shapes, strict=True)), **vector_inputs(c)}


def example_conditions(inputs: Inputs) -> Conditions:
    """Conditions of one example that a network of texts is initialised with."""
    M, C = inputs.context
    vector = jnp.zeros((1, inputs.vector)) if inputs.vector else None
    return Conditions(
        vector=vector, context=jnp.zeros((1, M, C)), context_mask=jnp.ones((1, M), bool)
    )


# ---- the encoder


class OpenedEncoder(NamedTuple):
    """A frozen text encoder. `tokenizer` is the one that a run of CLIP was trained with, or ''."""

    config: TextConfig
    params: Any  # float32, on the host
    tokenizer: str = ""


@functools.lru_cache(maxsize=2)
def open_encoder(path: str) -> OpenedEncoder:
    """The encoder at a path: a folder of transformers, or a run of CLIP. Raises UserError."""
    if not path:
        raise UserError(
            "config.text.encoder is '': expected a folder of transformers with a text encoder, or a"
            " run of CLIP (docs/text2image.md)."
        )
    if not rundir.is_run(path):
        found = load_text_encoder(path)
        return OpenedEncoder(found.config, found.params)
    trained = opening.recipe_of(path)
    if not hasattr(trained, "clip"):
        raise UserError(
            f"config.text.encoder={path} is a run of task {trained.task!r}: expected a run of CLIP,"
            " or a folder of transformers."
        )
    params = opening.load_weights(trained, make_task(trained), path, make_mesh(-1, 1))[0]
    host = jax.tree.map(np.asarray, params["params"]["text"])
    return OpenedEncoder(towers(trained).text, host, trained.text.tokenizer)


def write_encoder(c: Config, folder: Path) -> str:
    """Write a recipe's encoder as a folder of transformers; returns its class. Raises UserError."""
    _checked_encoder(c)
    if not rundir.is_run(c.text.encoder):
        return copy_encoder(c.text.encoder, folder)
    encoder = open_encoder(c.text.encoder)
    return write_clip_text(folder, encoder.config, encoder.params)


@functools.lru_cache(maxsize=8)
def tokenizer_of(path: str) -> Tokenizer:
    """An opened tokenizer; a file is read once."""
    return open_tokenizer(path)


def _checked_encoder(c: Config) -> OpenedEncoder:
    """The encoder of a recipe. Raises UserError for other features, tokens or texts than its."""
    encoder, tokenizer = open_encoder(c.text.encoder), tokenizer_of(c.text.tokenizer)
    config, said = encoder.config, f"the encoder config.text.encoder={c.text.encoder}"
    width = config.layers.width
    if c.text.features == "pooled" and config.projection:
        width = config.projection
    if c.text.width != width:
        raise UserError(
            f"config.text.width is {c.text.width}, and {said} has features of width {width}: set it"
            " to that."
        )
    other = encoder.tokenizer not in ("", c.text.tokenizer)
    if other and tokenizer_of(encoder.tokenizer).sha256 != tokenizer.sha256:
        raise UserError(
            f"config.text.tokenizer is {c.text.tokenizer!r}, and {said} was trained with"
            f" {encoder.tokenizer!r}: set it to that."
        )
    if tokenizer.vocabulary > config.vocabulary:
        raise UserError(
            f"config.text.tokenizer {c.text.tokenizer!r} has {tokenizer.vocabulary} tokens, and"
            f" {said} a table of {config.vocabulary}: give the encoder's own tokenizer."
        )
    if config.positions and c.text.tokens > config.positions:
        raise UserError(
            f"config.text.tokens is {c.text.tokens}, and {said} has {config.positions} positions:"
            " expected at most as many."
        )
    return encoder


def live_tokens(ids: jax.Array, end: int, pad: int) -> jax.Array:
    """Where ids i32[B,M] are of the text, its end included: bool[B,M]."""
    return ids != pad if end < 0 else until_end(ids, end)


def encode_texts(
    c: Config, params: Any, ids: jax.Array, mesh: Mesh | None = None
) -> dict[str, jax.Array]:
    """Token ids i32[B,M] -> the fields of `Conditions`: context f32[B,M,C], context_mask.

    On a mesh each device encodes its rows of a batch.
    """
    tokenizer, config = tokenizer_of(c.text.tokenizer), open_encoder(c.text.encoder).config
    mask = live_tokens(ids, tokenizer.end, tokenizer.pad)
    place = ANYWHERE if len(ids) == 1 else rules.rows_placement(mesh)
    found: Any = TextEncoder(config, place=place).apply({"params": params}, ids, mask)
    if c.text.features == "pooled":
        return {"context": found.pooled[:, None], "context_mask": jnp.ones((len(ids), 1), bool)}
    return {"context": found.tokens, "context_mask": mask}


def load_texts(c: Config, mesh: Mesh) -> Frozen:
    """The frozen encoder on the mesh, the features of the null text, and what vectors need.

    Raises UserError.
    """
    if not has_texts(c):
        return {}
    params = opening.spread_on_mesh(_checked_encoder(c).params, mesh)
    ids = jnp.asarray(tokens_of(c, [""]))
    null = jax.jit(functools.partial(encode_texts, c))(params, ids)
    return {ENCODER: params, NULL: opening.put_on_mesh(null, mesh), **load_vectors(c, mesh)}


def text_shapes(c: Config) -> Frozen:
    """The shapes of what a step reads of the frozen weights."""
    if not has_texts(c):
        return {}
    return {
        NULL: {
            name: jax.ShapeDtypeStruct((1, *one.shape), one.dtype)
            for name, one in text_inputs(c).items()
            if name in _FIELDS
        }
    }


def tokens_of(c: Config, texts: Sequence[str]) -> np.ndarray:
    """The tokens i32[n,M] of texts; a line names those that are cut."""
    found = tokenizer_of(c.text.tokenizer)(texts, c.text.tokens)
    if found.cut and is_primary():
        print(one_line(cut_line(found, c.text.tokens)), file=sys.stderr)
    return found.ids


# ---- in training


def prepare_texts(
    c: Config, frozen: Frozen, batch: Batch, mesh: Mesh | None = None
) -> dict[str, jax.Array]:
    """The features of a batch's captions, which may be there already (`cached_texts`).

    And the vectors of its images, if the network is given those.
    """
    if not has_texts(c):
        return {}
    found = prepare_vectors(c, frozen, batch)
    if "context" in batch:
        context, mask = (batch[name] for name in _FIELDS)
        return {"context": context.astype(jnp.float32), "context_mask": mask, **found}
    return {**encode_texts(c, frozen[ENCODER], batch["caption"], mesh), **found}


def drawn_texts(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Conditions` in a drawn batch."""
    return {name: batch[name] for name in (*_FIELDS, VECTOR) if name in batch}


def cached_texts(c: Config, others: Additions) -> Additions:
    """What training adds to the rows that it reads: `others`, and features if they are cached."""
    if not has_texts(c):
        return others
    encoder, tokenizer = _checked_encoder(c), tokenizer_of(c.text.tokenizer)
    written = recaptions(c)

    def recaptioned(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return written.add(others.add(rows))

    contents = {
        **others.contents,
        **written.contents,
        "text.tokenizer": tokenizer.sha256,
        "text.encoder": opening.digest(encoder.params),
    }
    if not c.text.cache:
        return Additions(recaptioned, contents)
    kept: dict[bytes, dict[str, np.ndarray]] = {}
    program = jax.jit(functools.partial(encode_texts, c))
    params = jax.device_put(encoder.params)

    def features(ids: np.ndarray) -> dict[str, np.ndarray]:
        """Of one text alone, so that its bits do not depend on the texts beside it."""
        name = ids.tobytes()
        if name not in kept:
            found = {k: np.asarray(v[0]) for k, v in program(params, ids[None]).items()}
            kept[name] = {**found, "context": found["context"].astype(np.float16)}
        return kept[name]

    def add(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = recaptioned(rows)
        each = [features(ids) for ids in rows["caption"]]
        return {**rows, **{n: np.stack([x[n] for x in each]) for n in _FIELDS}}

    return Additions(add, contents)


# ---- in the network


def with_null_text(c: Config, apply: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a network of texts, (variables, x, t, conditions), by its `apply`.

    The examples with the null label are given the null text, which is variables[NULL].
    """

    def of_texts(
        variables: Any, x: jax.Array, t: jax.Array, conditions: Conditions, *more: Any, **named: Any
    ) -> Any:
        null = variables[NULL]
        dropped = jnp.asarray(conditions.label) == c.data.num_classes
        found = {}
        for name in _FIELDS:
            value = jnp.asarray(getattr(conditions, name))
            rows = jnp.expand_dims(dropped, tuple(range(1, value.ndim)))
            found[name] = jnp.where(rows, null[name], value)
        own = {name: value for name, value in variables.items() if name != NULL}
        return apply(own, x, t, conditions._replace(label=None, **found), *more, **named)

    return of_texts


def with_null(frozen: Frozen, variables: Any) -> Any:
    """The variables of `with_null_text`; those of other networks are as they were."""
    return {**variables, NULL: frozen[NULL]} if NULL in frozen else variables


def pieces_of(c: Config) -> Callable[[np.ndarray], list[list[str]]] | None:
    """Token ids i32[n,M] -> the text of each, '' of none; None if a network is given no tokens."""
    if not has_texts(c) or c.text.features != "tokens":
        return None
    return lambda ids: tokenizer_of(c.text.tokenizer).pieces(ids)


# ---- in sampling


def negative_ids(c: Config) -> np.ndarray | None:
    """The tokens i32[1,M] of a recipe's negative prompt; None for the null text."""
    return tokens_of(c, [c.text.negative]) if has_texts(c) and c.text.negative else None


def encoded_conditions(
    c: Config,
    frozen: Frozen,
    conditions: Conditions,
    negative: Any,
    keys: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> tuple[Conditions, Frozen]:
    """Conditions whose context are tokens i32[B,M], encoded; and frozen weights with their null.

    negative: tokens i32[1,M] in the place of the null text, or None. keys: the samples' key[B],
    of which vectors of images may be drawn.
    """
    if not has_texts(c):
        return conditions, frozen
    conditions = with_image_vectors(c, frozen, conditions, keys)
    encode = functools.partial(encode_texts, c, frozen[ENCODER], mesh=mesh)
    if negative is not None:
        frozen = {**frozen, NULL: encode(negative)}
    return conditions._replace(**encode(jnp.asarray(conditions.context))), frozen


def captions_from_records(c: Config) -> FromRecords:
    """What samples are given by default: captions of held-out records."""

    def beside(captions: jax.Array, keys: jax.Array) -> Beside:
        return Beside(context=captions)

    def tokens(texts: Sequence[str]) -> np.ndarray:
        return tokens_of(c, texts)

    return FromRecords(
        beside,
        "captions",
        reads="caption",
        protocol=lambda: text_protocol(c),
        texts=tokens,
        image=image_behind(c),
    )


def text_protocol(c: Config) -> dict[str, Any]:
    """What texts add to a sampling protocol, beside the encoder's digest."""
    t = c.text
    return {
        "text": {
            "tokenizer": tokenizer_of(t.tokenizer).sha256,
            "tokens": t.tokens,
            "features": t.features,
            **({"negative": t.negative} if t.negative and c.sample.cfg_scale != 1 else {}),
        },
        **vector_protocol(c),
    }


def clips_of(c: Config) -> set[str]:
    """The CLIPs that a recipe's samples follow from, by which a score of them is circular."""
    keys = (("text", "encoder"), ("unclip", "clip"), ("tokens", "clip"))
    return {getattr(getattr(c, section, None), name, "") for section, name in keys} - {""}


# ---- refusals


def check_texts(c: Config, network: Network) -> None:
    """Raise UserError for what does not go with a network of texts, or for one without texts."""
    kind = f"config.model.kind is {c.model.kind!r}"
    if network.texts != has_texts(c):
        raise UserError(
            f"{kind} and config.task {c.task!r}: a network of texts (kind 'text_dit', of clips"
            " 'text_video') goes with task 'text2image' or 'unclip', and no other network does."
        )
    if not has_texts(c):
        return
    if is_latents(c.data.name):
        raise UserError(
            f"config.data.name is {c.data.name!r}, encoded latents, which hold no captions: name a"
            " data set of images with captions."
        )
    if c.evaluate.labels != "uniform":
        raise UserError(
            f"config.evaluate.labels is {c.evaluate.labels!r}, and samples are drawn of the"
            " captions of records: leave it out."
        )
    others = {
        "config.sample.guide": bool(c.sample.guide),
        "config.reward.method": c.reward.method != "none",
        "config.given.kind": c.given.kind != "none",
    }
    for name, wrong in others.items():
        if wrong:
            raise UserError(f"{name} is set, which a network of texts does not have: leave it out.")
