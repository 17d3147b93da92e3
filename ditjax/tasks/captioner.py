"""A captioner: what a frozen CLIP sees of an image, as a text (Betker et al. 2023, Sec. 2.1).

Which captions it learns to write, short or long ones, its data say (config.text.captions). Text to
image is trained on its captions in the place of the data set's (`tasks/recaptioning.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ditjax.config import (
    PATH,
    Config,
    Section,
    Text,
    above,
    at_most,
    key,
    network_module,
    non_negative,
)
from ditjax.data.tokenizers import Tokenizer, open_tokenizer
from ditjax.errors import UserError
from ditjax.models.captioner import (
    CAPTIONER_RULES,
    CaptionerConfig,
    captioner_config,
    captioner_cost,
    draw_captions,
)
from ditjax.models.clip import CLIP
from ditjax.models.network import DTYPES
from ditjax.models.text import until_end
from ditjax.models.tokens import Picking, token_nats
from ditjax.parallel import rules
from ditjax.tasks.clip import check_tokenizer, open_clip
from ditjax.tasks.opened import Opened
from ditjax.training.step import Batch, Metrics
from ditjax.training.task import (
    Additions,
    Definition,
    Frozen,
    Task,
    ValidationScore,
    check_draws_nothing,
)


@dataclass(frozen=True)
class CaptionerSection(Section):
    """The CLIP whose states are read, and how a token is drawn."""

    clip: str = key("", PATH)  # a run of task clip, or a folder of transformers
    temperature: float = key(1.0, above(0), free=True)
    top_k: int = non_negative(1, free=True)  # 1 = the likeliest token; 0 = all tokens
    top_p: float = key(1.0, above(0), at_most(1), free=True)

    @property
    def picking(self) -> Picking:
        """How a token is drawn."""
        return Picking(self.temperature, self.top_k, self.top_p)


def config_of_captioner(c: Config, opened: Opened) -> CaptionerConfig:
    """The sizes of a recipe's captioner: its own layers, and the states of its CLIP."""
    image = opened.config.image
    states = 1 + (image.side // image.patch) ** 2
    return captioner_config(c.model, c.text.tokens, states, image.layers.width)


def image_states(opened: Opened, params: Any, images: jax.Array) -> jax.Array:
    """The states of images f32[B,H,W,C] in a frozen CLIP: f32[B,N,F]."""
    apply: Any = CLIP(opened.config).apply
    states: jax.Array = apply(params, images, method="encode_image")
    return states


def written_captions(
    c: Config, opened: Opened, params: Any, states: jax.Array, keys: jax.Array, pad: int
) -> jax.Array:
    """The captions i32[B,T] that the captioner of a recipe writes of states f32[B,N,F]; key[B]."""
    config = config_of_captioner(c, opened)
    apply = network_module(c.model.kind).NETWORK.module(c.model, config).apply
    how = c.captioner.picking
    return draw_captions(apply, config, params, states, keys, how, pad, DTYPES[c.model.dtype])


# ---- the task


def make(c: Config, mesh: Mesh | None = None) -> Task:
    """Build the task of a recipe; its mesh may split the batch and the parameters, not tokens.

    Raises UserError for a CLIP that cannot be opened: the sizes of the captioner follow from it.
    """
    place = rules.whole_placement(mesh, "a captioner")
    tokenizer = open_tokenizer(c.text.tokenizer)
    check_tokenizer(c, tokenizer)
    opened = open_clip(c, "captioner.clip")
    config = config_of_captioner(c, opened)
    build = network_module(c.model.kind).NETWORK.module
    plain, apply = build(c.model, config), build(c.model, config, place).apply
    inputs = {
        "states": jax.ShapeDtypeStruct((config.states, config.features), jnp.float32),
        "caption": jax.ShapeDtypeStruct((config.tokens,), jnp.int32),
    }

    def prepare(frozen: Frozen, batch: Batch, key: jax.Array) -> Batch:
        states = image_states(opened, frozen["clip"], batch["image"])
        return {"states": states, "caption": batch["caption"]}

    def loss(params: Any, frozen: Frozen, drawn: Batch) -> tuple[jax.Array, Metrics]:
        mean = caption_nats(apply, config, params, drawn["states"], drawn["caption"]).mean()
        return mean, {"nats_per_token": mean}

    def init(key: jax.Array) -> Any:
        states, ids = (jnp.zeros((1, *each.shape), each.dtype) for each in inputs.values())
        return plain.init(key, states, ids[:, :-1])

    cost = captioner_cost(c.model, config)
    return Task(
        name=cost.name,
        inputs=inputs,
        init=init,
        prepare=prepare,
        draw=lambda batch, key: batch,
        loss=loss,
        frozen=lambda mesh: {"clip": opened.load(mesh)},
        reads=("clip",),
        open_rows=lambda: Additions(contents={"text.tokenizer": tokenizer.sha256}),
        rules=CAPTIONER_RULES,
        cost=cost,
        scores=(_score(c, apply, opened, tokenizer),),
    )


def caption_nats(
    apply: Callable[..., Any], c: CaptionerConfig, params: Any, states: jax.Array, ids: jax.Array
) -> jax.Array:
    """Mean -ln p of the tokens of captions i32[B,T], their ends included: f32[B].

    states f32[B,N,F] are of their images.
    """
    nats = token_nats(apply(params, states, ids[:, :-1]), ids)
    live = until_end(ids, c.end).astype(jnp.float32)
    return (nats * live).sum(1) / live.sum(1)


def _score(
    c: Config, apply: Callable[..., Any], opened: Opened, tokenizer: Tokenizer
) -> ValidationScore:
    """Of held-out images: nats of a token of their first caption, and the share written exactly.

    Where the first caption says all that is true of an image, the share is of images of which the
    captioner got everything right.
    """
    config = config_of_captioner(c, opened)

    def measure(params: Any, frozen: Frozen, keys: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        ids = batch["caption"]
        states = image_states(opened, frozen["clip"], batch["image"])
        written = written_captions(c, opened, params, states, keys, tokenizer.pad)
        right = (written == ids) | ~until_end(ids, config.end)
        return {
            "nats": caption_nats(apply, config, params, states, ids),
            "exact": right.all(1).astype(jnp.float32),
            "tokens": right.mean(1),
        }

    return ValidationScore(
        measure,
        names={
            "nats": "nats_per_token",
            "exact": "captions_exact",
            "tokens": "caption_tokens_right",
        },
        protocol={
            "metric": "captions",
            "split": c.evaluate.split,
            "clip": c.captioner.clip,
            "drawn": list(c.captioner.picking),
            "tokens": c.text.tokens,
            "tokenizer": tokenizer.sha256,
        },
    )


def check(c: Config) -> None:
    """Raise UserError for settings that this task does not support."""
    check_draws_nothing(c)
    if c.text.captions == "concat":
        raise UserError(
            "config.text.captions is 'concat', and a captioner writes one caption: expected 'first'"
            " or 'random'."
        )


TASK = Definition(
    make=make,
    network="captioner",
    sections={"text": Text, "captioner": CaptionerSection},
    check=check,
)
