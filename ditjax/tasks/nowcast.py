"""Forecasts of clips: a network that is given the first frames draws the others.

What is drawn, x0, are the future frames alone. The channels beside it span all frames: the past (0
in the future), whether a frame is of the past, and, if `config.given.first` names a run, the
forecast of that run in the future frames. This is LLMDiff's second stage; its first is a run of the
same task with `config.diffusion.loss='regression'`, whose network sees no x. With a `residual_std`,
x0 is the error of the first forecast, divided by it.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditjax.config import Config
from ditjax.diffusion.losses import without_x
from ditjax.errors import UserError, one_line
from ditjax.models.network import Conditions
from ditjax.parallel.processes import is_primary
from ditjax.runs import opening, rundir
from ditjax.tasks import language, make_task
from ditjax.tasks.objective import objective_of, training_loss
from ditjax.tasks.opened import check_trained_alike
from ditjax.training.task import Frozen, Known

FIRST = "first"  # the frozen network of the first stage


class Example(NamedTuple):
    """x0 f32[B,T,H,W,C], channels f32[B,F,H,W,K], and the first forecast f32[B,T,H,W,C] or None."""

    x0: jax.Array
    channels: jax.Array
    forecast: jax.Array | None


def is_nowcast(c: Config) -> bool:
    """Whether a recipe's network draws the future of clips."""
    return bool(c.given.kind == "past")


def future_shape(c: Config) -> tuple[int, ...]:
    """The shape of what is drawn."""
    F, *rest = c.input_shape
    return (F - c.given.past, *rest)


@functools.lru_cache(maxsize=8)
def _recipe(path: str) -> Config:
    if not rundir.is_run(path):
        raise UserError(
            f"config.given.first={path} is no run: expected the directory of one that was trained"
            " with config.diffusion.loss='regression'."
        )
    return opening.recipe_of(path)


def first_recipe(c: Config) -> Config:
    """The recipe of the run at config.given.first. Raises UserError for one that does not fit."""
    path = c.given.first
    first = _recipe(path)
    if first.task != c.task or not is_nowcast(first) or not training_loss(first.diffusion).blind:
        raise UserError(
            f"config.given.first={path} is a run of another kind: expected one with"
            " config.given.kind='past' and config.diffusion.loss='regression'."
        )
    if first.given.first:
        raise UserError(f"config.given.first={path} is given a first forecast itself: name that.")
    if first.data.num_classes > 1 and first.model.label_dropout == 0:
        raise UserError(
            f"config.given.first={path} needs a class, and its forecast is given of the past"
            " alone: train it on one class, or with config.model.label_dropout above 0."
        )
    names = ("given.past", "data.frames", "data.frame_stride", "data.image_size")
    check_trained_alike(c, first, names, f"the run at config.given.first={path}")
    return first


def load_first(c: Config, mesh: Mesh) -> Frozen:
    """{"first": the variables of the first stage's network on the mesh}, or {} without one."""
    if not is_nowcast(c) or not c.given.first:
        return {}
    first = first_recipe(c)
    params, step = opening.network_weights(first, make_task(first), c.given.first, mesh)
    if is_primary():
        line = f"first stage: {opening.account(c.given.first, step, first)}"
        print(one_line(line), file=sys.stderr, flush=True)
    return {FIRST: language.with_layers(language.load_language(first, mesh), params)}


def channels_of(clips: jax.Array | np.ndarray, past: int) -> jax.Array:
    """The past frames of clips f32[B,F,H,W,C], and where they are: f32[B,F,H,W,C+1]."""
    known = jnp.asarray(np.arange(clips.shape[1]) < past, jnp.float32)[None, :, None, None, None]
    mask = jnp.broadcast_to(known, (*clips.shape[:-1], 1))
    return jnp.concatenate([known * clips, mask], axis=-1)


def example_maker(
    c: Config, build: Callable[[Config], Any]
) -> Callable[[Frozen, jax.Array], Example]:
    """Build (frozen, clips f32[B,F,H,W,C]) -> Example; `build` makes a recipe's network.

    Of the clips, the channels read the past frames alone.
    """
    past, std = c.given.past, c.given.residual_std

    def make(frozen: Frozen, clips: jax.Array) -> Example:
        channels, future = channels_of(clips, past), clips[:, past:]
        if not c.given.first:
            return Example(future, channels, None)
        first = first_recipe(c)
        apply = build(first).apply
        null = first.data.num_classes if first.model.label_dropout > 0 else 0
        label = jnp.full(len(clips), null, jnp.int32)
        denoise = functools.partial(
            apply, frozen[FIRST], conditions=Conditions(label, channels=channels)
        )
        forecast = without_x(objective_of(first), denoise, future.shape)
        forecast = jax.lax.stop_gradient(forecast)
        placed = jnp.pad(forecast, ((0, 0), (past, 0), (0, 0), (0, 0), (0, 0)))
        x0 = (future - forecast) / std if std else future
        return Example(x0, jnp.concatenate([channels, placed], axis=-1), forecast)

    return make


def finished(c: Config, given: Known, x0: jax.Array, forecast: jax.Array | None) -> jax.Array:
    """Whole clips f32[B,F,H,W,C]: the known past, and the future that was drawn as x0."""
    if c.given.residual_std and forecast is not None:
        x0 = forecast + c.given.residual_std * x0
    past = jnp.asarray(given.image)[:, : c.given.past]
    return jnp.concatenate([past, x0], axis=1)
