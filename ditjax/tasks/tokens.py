"""DALL·E's second stage: text and image codes, one after another (Ramesh et al. 2021, Sec. 2.2).

The codes are those of a frozen discrete VAE. Samples are drawn for texts, by default the captions
of held-out records, and the best of several candidates is kept if a CLIP ranks them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditjax.config import (
    PATH,
    Config,
    Sample,
    Section,
    Text,
    above,
    at_most,
    between,
    key,
    network_module,
    non_negative,
    positive,
)
from ditjax.data.tokenizers import Tokenizer
from ditjax.errors import UserError
from ditjax.models.clip import CLIP
from ditjax.models.dvae import DVAE
from ditjax.models.network import DTYPES, Conditions
from ditjax.models.text import until_end
from ditjax.models.tokens import (
    TOKENS_RULES,
    Picking,
    TokensConfig,
    draw_codes,
    token_nats,
    tokens_config,
    tokens_cost,
)
from ditjax.parallel import rules
from ditjax.tasks.clip import check_tokenizer, open_clip
from ditjax.tasks.diffusion import to_uint8
from ditjax.tasks.dvae import open_dvae
from ditjax.tasks.opened import Opened
from ditjax.tasks.text_conditions import tokenizer_of, tokens_of
from ditjax.training.step import Batch, Metrics
from ditjax.training.task import (
    Additions,
    Beside,
    Definition,
    FromRecords,
    Frozen,
    Sampling,
    Task,
    ValidationScore,
)


@dataclass(frozen=True)
class TokensSection(Section):
    """The discrete VAE, the loss, and how codes are drawn."""

    dvae: str = key("", PATH)  # a run of task dvae, or the folder of a release
    text_loss_weight: float = key(0.125, between(0, 1))  # of text; the rest is of codes
    temperature: float = key(1.0, above(0), free=True)
    top_k: int = non_negative(0, free=True)  # 0 = all codes
    top_p: float = key(1.0, above(0), at_most(1), free=True)
    candidates: int = positive(1, most=4096, free=True)  # of which CLIP keeps the best
    clip: str = key("", PATH, free=True)  # what ranks them: a run of task clip, or its weights

    def unused(self, name: str, c: Config) -> str:
        return "tokens.candidates" if name == "clip" and self.candidates == 1 else ""

    def check(self, c: Config) -> None:
        if self.candidates > 1 and not self.clip:
            raise UserError(
                f"config.tokens.candidates is {self.candidates} and config.tokens.clip is '': a"
                " CLIP keeps the best of them; name one, or set candidates to 1."
            )

    @property
    def picking(self) -> Picking:
        """How a code is drawn."""
        return Picking(self.temperature, self.top_k, self.top_p)


def config_of(c: Config) -> TokensConfig:
    """The sizes of a recipe's transformer."""
    return tokens_config(c.model, c.text.tokens)


# ---- the frozen networks


def encoded_codes(opened: Opened, params: Any, images: jax.Array) -> jax.Array:
    """The codes of images f32[B,H,W,C], row by row: i32[B,N]."""
    codes: Any = DVAE(opened.config).apply(params, images, method="codes")
    return codes.reshape(len(images), -1)


def decoded_codes(opened: Opened, params: Any, codes: jax.Array, grid: int) -> jax.Array:
    """The images f32[B,H,W,C] of codes i32[B,N]."""
    images: Any = DVAE(opened.config).apply(params, codes.reshape(-1, grid, grid), method="images")
    return images


def _dvae_of(c: Config) -> Opened:
    """The discrete VAE of a recipe. Raises UserError for other codes or another grid."""
    opened = open_dvae(c.tokens.dvae, "tokens.dvae", c.data.channels)
    for name, ours, theirs in (
        ("codes", c.model.codes, opened.config.codes),
        ("grid", c.model.grid, c.data.image_size / opened.config.downsample),
    ):
        if ours != theirs:
            raise UserError(
                f"config.model.{name} is {ours}, and the discrete VAE at {c.tokens.dvae} makes"
                f" {theirs:g} of images of {c.data.image_size} pixels: set it to that."
            )
    return opened


# ---- the task


def make(c: Config, mesh: Mesh | None = None) -> Task:
    """Build the task of a recipe; its mesh may split the batch and the parameters, not tokens."""
    place = rules.whole_placement(mesh, "the transformer over text and codes")
    tokenizer = tokenizer_of(c.text.tokenizer)
    check_tokenizer(c, tokenizer)
    config = config_of(c)
    build = network_module(c.model.kind).NETWORK.module
    plain, apply = build(c.model, config), build(c.model, config, place).apply
    # Opened when they are needed: a plan needs neither.
    dvae = functools.cache(lambda: _dvae_of(c))
    ranks = c.tokens.candidates > 1
    clip = functools.cache(lambda: open_clip(c, "tokens.clip"))
    inputs = {
        "codes": jax.ShapeDtypeStruct((config.grid**2,), jnp.int32),
        "caption": jax.ShapeDtypeStruct((config.tokens,), jnp.int32),
    }

    def frozen(mesh: Mesh) -> Frozen:
        found = {"dvae": dvae().load(mesh)}
        return {**found, "clip": clip().load(mesh)} if ranks else found

    def prepare(frozen: Frozen, batch: Batch, key: jax.Array) -> Batch:
        codes = encoded_codes(dvae(), frozen["dvae"], batch["image"])
        return {"codes": codes, "caption": batch["caption"]}

    def loss(params: Any, frozen: Frozen, drawn: Batch) -> tuple[jax.Array, Metrics]:
        of_text, of_codes = nats(apply, config, params, drawn["caption"], drawn["codes"])
        text, image = of_text.mean(), of_codes.mean()
        weight = c.tokens.text_loss_weight
        bits = image / np.log(2).astype(np.float32)
        return weight * text + (1 - weight) * image, {"text_nats": text, "bits_per_token": bits}

    def init(key: jax.Array) -> Any:
        text, codes = (
            jnp.zeros((1, *inputs[name].shape), jnp.int32) for name in ("caption", "codes")
        )
        return plain.init(key, text, codes[:, :-1])

    cost = tokens_cost(c.model, config)
    return Task(
        name=cost.name,
        inputs=inputs,
        init=init,
        prepare=prepare,
        draw=lambda batch, key: batch,
        loss=loss,
        frozen=frozen,
        reads=("dvae",),
        open_rows=lambda: Additions(contents={"text.tokenizer": tokenizer.sha256}),
        rules=TOKENS_RULES,
        cost=cost,
        sampling=_sampling(c, apply, dvae, clip, tokenizer),
        scores=(_score(c, apply, dvae, tokenizer),),
    )


def nats(
    apply: Callable[..., Any], c: TokensConfig, params: Any, text: jax.Array, codes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean -ln p of the text's tokens behind the first, and of the codes: f32[B] each.

    text i32[B,T], of which padding does not count; codes i32[B,N].
    """
    out = apply(params, text, codes[:, :-1])
    live = until_end(text, c.end)[:, 1:].astype(jnp.float32)
    of_text = (token_nats(out.text, text[:, 1:]) * live).sum(1) / jnp.maximum(live.sum(1), 1)
    return of_text, token_nats(out.codes, codes).mean(1)


# ---- drawing


def _sampling(
    c: Config,
    apply: Callable[..., Any],
    dvae: Callable[[], Opened],
    clip: Callable[[], Opened],
    tokenizer: Tokenizer,
) -> Sampling:
    """The sampling of a recipe, whose context are the tokens i32[B,T] of texts."""
    config, k = config_of(c), c.tokens

    def draw(
        params: Any, frozen: Frozen, keys: jax.Array, conditions: Conditions, guidance: Any
    ) -> jax.Array:
        text = jnp.asarray(conditions.context)
        images = functools.partial(decoded_codes, dvae(), frozen["dvae"], grid=config.grid)

        def candidate(n: jax.Array) -> jax.Array:
            each = jax.vmap(jax.random.fold_in, (0, None))(keys, n)
            return draw_codes(apply, config, params, text, each, k.picking, DTYPES[c.model.dtype])

        if k.candidates == 1:
            return to_uint8(images(candidate(jnp.int32(0))))
        score = functools.partial(_similarity, clip(), frozen["clip"], text)
        best = best_of(candidate, lambda codes: score(images(codes)), k.candidates)
        return to_uint8(images(best))

    ranked = {"candidates": k.candidates, "clip": k.clip} if k.candidates > 1 else {}
    sample = (c.sample.batch_size, c.sample.weights)
    return Sampling(
        draw=draw,
        guidance=(),
        compiled=(c.model, c.data, c.text, k, sample),
        # With the cache, all codes cost what one pass over the sequence does.
        timesteps=np.zeros(k.candidates),
        guided=0,
        protocol={
            "codes": list(k.picking),
            "text": {"tokenizer": tokenizer.sha256, "tokens": c.text.tokens},
            **ranked,
        },
        needs=FromRecords(
            lambda captions, keys: Beside(context=captions),
            "captions",
            reads="caption",
            texts=functools.partial(tokens_of, c),
        ),
    )


def best_of(
    candidate: Callable[[jax.Array], jax.Array],
    score: Callable[[jax.Array], jax.Array],
    count: int,
) -> jax.Array:
    """Of `count` candidates i32[B,N], by number, that of each row with the highest score f32[B].

    One is in memory at a time. Of equal ones the first is kept.
    """

    def step(kept: tuple[jax.Array, jax.Array], n: jax.Array) -> tuple[Any, None]:
        codes, best = kept
        new = candidate(n)
        found = score(new)
        better = found > best
        return (jnp.where(better[:, None], new, codes), jnp.where(better, found, best)), None

    first = candidate(jnp.int32(0))
    (codes, _), _ = jax.lax.scan(step, (first, score(first)), jnp.arange(1, count))
    return codes


def _similarity(opened: Opened, params: Any, text: jax.Array, images: jax.Array) -> jax.Array:
    """The cosines of images and texts by CLIP: f32[B]."""
    apply: Any = CLIP(opened.config).apply
    image = apply(params, images, method="embed_image")
    return (image * apply(params, text, method="embed_text")).sum(-1)


# ---- the score


def _score(
    c: Config, apply: Callable[..., Any], dvae: Callable[[], Opened], tokenizer: Tokenizer
) -> ValidationScore:
    """Bits of a held-out image's codes, under its first caption."""
    config = config_of(c)

    def measure(params: Any, frozen: Frozen, keys: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        codes = encoded_codes(dvae(), frozen["dvae"], batch["image"])
        found = nats(apply, config, params, batch["caption"], codes)[1]
        return {"bits": found / np.log(2).astype(np.float32)}

    return ValidationScore(
        measure,
        names={"bits": "bits_per_token"},
        protocol={"dvae": c.tokens.dvae, "tokens": c.text.tokens, "tokenizer": tokenizer.sha256},
        num=c.evaluate.val_loss_num,
    )


def check(c: Config) -> None:
    """Raise UserError for settings that this task does not support."""
    of_diffusion = ("sampler", "steps", "grid", "cfg_scale", "guide", "adapters", "clip_x0")
    defaults = Sample()
    for name in of_diffusion:
        if getattr(c.sample, name) != getattr(defaults, name):
            raise UserError(
                f"config.sample.{name} is {getattr(c.sample, name)!r}, and task {c.task!r} draws"
                " codes, not by steps of diffusion: leave it out; its keys are config.tokens'."
            )


TASK = Definition(
    make=make,
    network="tokens",
    sections={"text": Text, "tokens": TokensSection, "sample": Sample},
    check=check,
)
