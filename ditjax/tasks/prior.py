"""unCLIP's prior: diffusion of CLIP's vectors of images, given captions (Ramesh et al. 2022).

CLIP is frozen. Vectors are drawn as √E z of the unit vector z, so that each number is about of
variance 1, and the network predicts √E z itself.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditjax.config import (
    FRACTION,
    PATH,
    Config,
    Sample,
    Section,
    Text,
    at_least,
    key,
    network_module,
    positive,
)
from ditjax.data.tokenizers import Tokenizer, open_tokenizer
from ditjax.diffusion import losses, samplers
from ditjax.diffusion.gaussian import Denoise
from ditjax.diffusion.guidance import guide
from ditjax.errors import UserError
from ditjax.metrics.vectors import prior_scores
from ditjax.models.clip import CLIP, unit
from ditjax.models.network import Conditions
from ditjax.models.prior import PRIOR_RULES, PriorConfig, prior_cost, prior_layers
from ditjax.models.text import until_end
from ditjax.parallel import rules
from ditjax.tasks.clip import open_clip
from ditjax.tasks.objective import (
    Diffusion,
    check_sampling,
    objective_of,
    options_of,
    protocol_of,
    sampler_of,
    time_draw,
    times_of,
)
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
class Prior(Section):
    """The CLIP whose vectors are drawn, and how."""

    clip: str = key("", PATH)  # a run of task clip, or a folder of transformers
    drop: float = key(0.1, FRACTION)  # share of captions that are replaced by the empty one
    candidates: int = positive(2, most=1024, free=True)  # the nearest to the caption is kept
    samples: int = key(16, at_least(2), free=True)  # of each caption, for the scores


# ---- what CLIP gives


class ClipView:
    """What the frozen CLIP makes of images and captions, for a recipe."""

    def __init__(self, opened: Opened, null: np.ndarray) -> None:
        self._apply: Any = CLIP(opened.config).apply
        self._end = opened.config.text.end
        self._null = null  # ids i32[M] of the empty caption

    def image(self, params: Any, images: jax.Array) -> jax.Array:
        """The unit vectors of images: f32[B,E]."""
        z: jax.Array = self._apply(params, images, method="embed_image")
        return z

    def conditions(self, params: Any, ids: jax.Array) -> dict[str, jax.Array]:
        """Of captions i32[B,M]: context f32[B,M,C], context_mask bool[B,M], vector f32[B,E].

        The vector is √E times the unit vector, as those that are drawn.
        """
        found = self._apply(params, ids, method="encode_text")
        # The end of a text is where CLIP pools it; of OpenAI's old code the largest id.
        end = jnp.max(ids, axis=1, keepdims=True) if self._end < 0 else jnp.int32(self._end)
        return {
            "context": found.tokens,
            "context_mask": until_end(ids, end),
            "vector": standardized(unit(found.pooled)),
        }

    def dropped(self, key: jax.Array, ids: jax.Array, rate: float) -> jax.Array:
        """Captions, of which a share is replaced by the empty one."""
        drop = jax.random.bernoulli(key, rate, (len(ids), 1))
        return jnp.where(drop, jnp.asarray(self._null)[None], ids)

    def null(self, count: int) -> jax.Array:
        """The empty caption, so many times: i32[count,M]."""
        return jnp.broadcast_to(jnp.asarray(self._null)[None], (count, len(self._null)))


def view_of(c: Config, opened: Opened) -> ClipView:
    """What the CLIP of a recipe makes of its images and captions."""
    return ClipView(opened, open_tokenizer(c.text.tokenizer)([""], c.text.tokens).ids[0])


def standardized(z: jax.Array) -> jax.Array:
    """√E z of unit vectors z f32[B,E]: their numbers have mean square 1, as the noise has."""
    return z * np.sqrt(z.shape[-1]).astype(np.float32)


# ---- the task


def config_of_prior(c: Config, opened: Opened) -> PriorConfig:
    """The sizes of a recipe's prior: those of its CLIP, and its own layers."""
    text, image = opened.config.text, opened.config.image
    return PriorConfig(prior_layers(c.model), c.text.tokens, text.layers.width, image.projection)


def _inputs(config: PriorConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """One example: the vector of an image, and the conditions of its caption."""
    vector = jax.ShapeDtypeStruct((config.vector,), jnp.float32)
    return {
        "x0": vector,
        "context": jax.ShapeDtypeStruct((config.tokens, config.context), jnp.float32),
        "context_mask": jax.ShapeDtypeStruct((config.tokens,), jnp.bool_),
        "vector": vector,
    }


def make(c: Config, mesh: Mesh | None = None) -> Task:
    """Build the task of a recipe; its mesh may split the batch and the parameters, not tokens.

    Raises UserError for a CLIP that cannot be opened: the sizes of the prior follow from it.
    """
    place = rules.whole_placement(mesh, "unCLIP's prior")
    tokenizer = open_tokenizer(c.text.tokenizer)
    opened = open_clip(c, "prior.clip")
    view = view_of(c, opened)
    config = config_of_prior(c, opened)
    build = network_module(c.model.kind).NETWORK.module
    plain, apply = build(c.model, config), build(c.model, config, place).apply
    inputs = _inputs(config)

    def prepare(frozen: Frozen, batch: Batch, key: jax.Array) -> Batch:
        """Vectors of the images, and the captions encoded, of which some are dropped before."""
        ids = view.dropped(key, batch["caption"], c.prior.drop)
        z = standardized(view.image(frozen["clip"], batch["image"]))
        return {"x0": z, **view.conditions(frozen["clip"], ids)}

    times = time_draw(c.diffusion)

    def draw(batch: Batch, key: jax.Array) -> Batch:
        key_t, key_eps = jax.random.split(key)
        eps = jax.random.normal(key_eps, batch["x0"].shape, jnp.float32)
        return {**batch, **times(key_t, len(eps)), "eps": eps}

    def loss(params: Any, frozen: Frozen, drawn: Batch) -> tuple[jax.Array, Metrics]:
        """Ramesh et al. 2022 Eq. 2: the error of √E z itself, if the prediction is x0."""
        denoise = _denoise(apply, params, drawn)
        parts = losses.simple_loss(objective_of(c), denoise, drawn["x0"], drawn["t"], drawn["eps"])
        means = {name: value.mean() for name, value in parts.items()}
        return means["loss"], means

    def init(key: jax.Array) -> Any:
        rows = {name: jnp.zeros((1, *each.shape), each.dtype) for name, each in inputs.items()}
        return plain.init(key, rows.pop("x0"), jnp.zeros(1, jnp.int32), Conditions(**rows))

    cost = prior_cost(c.model, config)
    return Task(
        name=cost.name,
        inputs=inputs,
        init=init,
        prepare=prepare,
        draw=draw,
        loss=loss,
        frozen=lambda mesh: {"clip": opened.load(mesh)},
        reads=("clip",),
        open_rows=lambda: Additions(contents={"text.tokenizer": tokenizer.sha256}),
        rules=PRIOR_RULES,
        cost=cost,
        scores=(_score(c, apply, view, tokenizer),),
    )


def _denoise(apply: Callable[..., Any], params: Any, rows: Mapping[str, Any]) -> Denoise:
    """The network as a function of (x, t), of the conditions among `rows`."""
    given = Conditions(**{k: rows[k] for k in ("context", "context_mask", "vector")})

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        out: jax.Array = apply(params, x, t, given)
        return out

    return denoise


# ---- drawing


def draw_vectors(
    c: Config,
    apply: Callable[..., Any],
    params: Any,
    rows: Mapping[str, jax.Array],
    null: Mapping[str, jax.Array],
    keys: jax.Array,
) -> jax.Array:
    """Draw a unit vector f32[B,E] for each caption by config.sample.

    rows are `ClipView.conditions` of the captions, null those of empty ones; vector b follows from
    keys[b] and caption b alone. Guidance compares with the empty caption.
    """
    objective, shape = objective_of(c), rows["vector"].shape[1:]
    denoise = _denoise(apply, params, rows)
    if c.sample.cfg_scale != 1:
        empty = _denoise(apply, params, null)
        conditional = denoise
        denoise = guide(
            lambda x, t: (conditional(x, t), empty(x, t)),
            c.sample.cfg_scale,
            channels="all",
            x_channels=shape[0],
        )
    start = samplers.initial_noise(keys, shape) * np.float32(objective.process.prior_std)
    noise = samplers.per_sample_noise(keys, shape)
    options = {"clip_x0": False, **options_of(c)}
    solve = sampler_of(c).solve
    return unit(solve(denoise, objective, times_of(c), start, noise, **options))


def nearest_candidate(
    draw: Callable[[jax.Array], jax.Array], text: jax.Array, keys: jax.Array, count: int
) -> jax.Array:
    """Sec. 2.2: of `count` vectors drawn by `draw(keys)`, the one with the largest z·z_t: f32[B,E].

    The first candidate is that of `keys`.
    """

    def drawn(n: jax.Array) -> jax.Array:
        each = jax.vmap(jax.random.fold_in, (0, None))(keys, n)
        return draw(jnp.where(n == 0, keys, each))

    every = jax.lax.map(drawn, jnp.arange(count))  # [count,B,E]
    best = jnp.argmax((every * text[None]).sum(-1), axis=0)
    return jnp.take_along_axis(every, best[None, :, None], axis=0)[0]


def drawing(
    c: Config,
    apply: Callable[..., Any],
    view: ClipView,
    params: Any,
    clip: Any,
    ids: jax.Array,
) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """draw(keys) -> vectors of captions i32[B,M], as `draw_vectors`; and the captions' own."""
    rows, null = (view.conditions(clip, each) for each in (ids, view.null(len(ids))))
    return functools.partial(draw_vectors, c, apply, params, rows, null), unit(rows["vector"])


def vectors_of_captions(
    c: Config, opened: Opened, params: Any, clip: Any, ids: jax.Array, keys: jax.Array
) -> jax.Array:
    """The unit vectors f32[B,E] that the prior of a recipe draws for captions i32[B,M].

    `opened` is its CLIP, with the parameters `clip`. Of config.prior.candidates the nearest to the
    caption is taken. Vector b follows from keys[b] and caption b alone.
    """
    view = view_of(c, opened)
    apply = network_module(c.model.kind).NETWORK.module(c.model, config_of_prior(c, opened)).apply
    draw, text = drawing(c, apply, view, params, clip, ids)
    return nearest_candidate(draw, text, keys, c.prior.candidates)


# ---- the score


def _score(
    c: Config, apply: Callable[..., Any], view: ClipView, tokenizer: Tokenizer
) -> ValidationScore:
    """`metrics.vectors.prior_scores` of held-out images and their first captions."""

    def measure(params: Any, frozen: Frozen, keys: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        draw, text = drawing(c, apply, view, params, frozen["clip"], batch["caption"])

        def sample(n: jax.Array) -> jax.Array:
            return draw(jax.vmap(jax.random.fold_in, (0, None))(keys, n))

        samples = jax.lax.map(sample, jnp.arange(c.prior.samples)).swapaxes(0, 1)
        best = nearest_candidate(draw, text, keys, c.prior.candidates)
        found = {"image": view.image(frozen["clip"], batch["image"]), "text": text}
        found |= {"samples": samples, "best": best}
        return found | ({"classes": batch["classes"]} if "classes" in batch else {})

    def summary(measured: Mapping[str, np.ndarray]) -> dict[str, float]:
        best = (measured["best"] * measured["image"]).sum(-1)
        image, text, samples = (measured[name] for name in ("image", "text", "samples"))
        found = prior_scores(image, text, samples, measured.get("classes"))
        return {**found, "candidate_cosine": float(best[len(best) // 2 :].mean())}

    s = c.sample
    protocol = {
        "metric": "vectors of a prior",
        "energy": "pairs of different captions",
        "split": c.evaluate.split,
        "clip": c.prior.clip,
        "tokenizer": tokenizer.sha256,
        "samples": c.prior.samples,
        "candidates": c.prior.candidates,
        "sampler": s.sampler,
        "steps": s.steps,
        "cfg_scale": s.cfg_scale,
        **protocol_of(c),
    }
    return ValidationScore(measure, names={}, protocol=protocol, summary=summary)


def check(c: Config) -> None:
    """Raise UserError for settings that this task does not support."""
    check_draws_nothing(c)
    d, s = c.diffusion, c.sample
    if d.loss != "simple" or d.variance in ("learned_range", "unused"):
        raise UserError(
            f"config.diffusion.loss is {d.loss!r} and variance {d.variance!r}: a prior has no"
            " output for a variance; set loss 'simple' and variance 'fixed_small', or 'none' of a"
            " process in continuous time."
        )
    if s.clip_x0:
        raise UserError(
            "config.sample.clip_x0 is True, and the numbers of a vector are not in [-1, 1]: set it"
            " to False."
        )
    guidance = (s.cfg_channels, s.cfg_rule, s.cfg_interval)
    if s.cfg_scale != 1 and guidance != ("all", "cfg", (0.0, 1.0)):
        raise UserError(
            f"config.sample.cfg_scale is {s.cfg_scale} with cfg_channels, cfg_rule and cfg_interval"
            f" {guidance}: a vector is guided whole at every step; set cfg_channels to 'all', and"
            " leave the others out."
        )
    if c.evaluate.val_loss_num or c.evaluate.bpd_num:
        raise UserError(
            "config.evaluate.val_loss_num and bpd_num are of images, and a prior draws vectors: set"
            " them to 0."
        )
    check_sampling(c)


TASK = Definition(
    make=make,
    network="prior",
    sections={"text": Text, "diffusion": Diffusion, "prior": Prior, "sample": Sample},
    check=check,
)
