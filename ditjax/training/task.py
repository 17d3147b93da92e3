"""What is learned, as training, sampling and evaluation see it: one `Task`.

A recipe names it by `config.task`: a module of `ditjax.tasks`, or a dotted name of yours. The
module defines `TASK`, a `Definition`, whose `make` turns a recipe into a `Task`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ditjax.config import Config, Section
from ditjax.models.network import Conditions, Cost, Rules
from ditjax.training.step import Batch, Metrics

# Frozen weights by name, as "autoencoder": read, never trained, an argument of jitted programs.
Frozen = dict[str, Any]


class Transform(NamedTuple):
    """What is trained of a network: `join(base, trained)` are the parameters that it runs with.

    `base` are frozen weights, or None. Optimizer, average and checkpoints hold `trained` alone.
    """

    init: Callable[[Any, jax.Array], Any]  # (initial parameters, key) -> what is trained
    join: Callable[[Any, Any], Any]


IDENTITY = Transform(init=lambda params, key: params, join=lambda base, trained: trained)


class Guidance(NamedTuple):
    """Arguments of guidance, f32[] each: its scale, and the timesteps low <= t < high of it."""

    scale: jax.Array | np.float32
    low: jax.Array | np.float32
    high: jax.Array | np.float32


class Sampling(NamedTuple):
    """How outputs are drawn.

    `draw(trained, frozen, keys key[B], conditions, guidance)` -> images u8[B,H,W,C]; output b
    depends on (keys[b], its conditions) alone. `guidance` are this recipe's arguments.
    Recipes of equal `compiled` share a program. `timesteps` i32[n] are those at which the network
    is evaluated, at `guided` of them twice.
    """

    draw: Callable[[Any, Frozen, jax.Array, Conditions, Any], jax.Array]
    guidance: Any
    compiled: Any
    timesteps: np.ndarray
    guided: int


class Score(NamedTuple):
    """Numbers of held-out examples, whose means are a model's.

    `measure(trained, frozen, keys key[B], batch)` -> name: f32[B]. With `num` > 0 that many
    examples are drawn, `drawn(indices i[n])` adding to them what depends on their index alone; with
    0 every example of the split is taken once. `names` are what the means are called. `protocol` is
    what two values must share to be compared.
    """

    measure: Callable[[Any, Frozen, jax.Array, Batch], dict[str, jax.Array]]
    names: Mapping[str, str]
    protocol: Mapping[str, Any]
    num: int = 0
    drawn: Callable[[np.ndarray], dict[str, np.ndarray]] = lambda indices: {}


class Task(NamedTuple):
    """All that the commands know of what is learned.

    A batch of a data set (`image` or the moments of latents, `label`) goes through `prepare` (of
    frozen weights, on the devices) to one of `inputs`, and through `draw`, which adds all that is
    random in a step. `reads` names the frozen weights that `prepare` and `loss` take: without them
    none is loaded before something is drawn.
    """

    name: str  # of the network, as in the paper: 'DiT-XL/2'
    inputs: dict[str, jax.ShapeDtypeStruct]  # one example
    init: Callable[[jax.Array], Any]  # key -> what is trained
    prepare: Callable[[Frozen, Batch, jax.Array], Batch]
    draw: Callable[[Batch, jax.Array], Batch]
    loss: Callable[[Any, Frozen, Batch], tuple[jax.Array, Metrics]]
    frozen: Callable[[Mesh], Frozen] = lambda mesh: {}
    reads: tuple[str, ...] = ()
    rules: Rules = ()  # where a mesh has what is trained
    rates: Callable[[str], float] | None = None  # a parameter's path -> multiplier of its rate
    cost: Cost | None = None
    sampling: Sampling | None = None
    score: Score | None = None


class Definition(NamedTuple):
    """A task as its module defines it.

    `make(c, mesh)` builds the task of a recipe, on a mesh or, with None, one device. `sections` are
    groups of keys that its recipes have beside those of `Config`. `network` is the default of
    config.model.kind. `check` raises UserError for a recipe that contradicts itself.
    """

    make: Callable[[Config, Mesh | None], Task]
    network: str
    sections: Mapping[str, type[Section]] = {}
    check: Callable[[Config], None] = lambda c: None
