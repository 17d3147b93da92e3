"""The interface of a task for training, sampling and evaluation.

A recipe selects its task with `config.task`: a module of `ditjax.tasks`, or your own module by its
dotted name. The module defines `TASK`, a `Definition`, whose `make` turns a recipe into a `Task`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ditjax.config import Config, Section
from ditjax.data.records import HostBatch
from ditjax.diffusion.losses import Objective
from ditjax.errors import UserError
from ditjax.models.network import Conditions, NetworkCost, Rules, Taps
from ditjax.training.step import Batch, Metrics

# Frozen weights by name, such as "autoencoder": not trained, but an argument of jitted programs.
Frozen = dict[str, Any]


class Transform(NamedTuple):
    """The trained part of a network: `join(base, trained)` are the parameters that it runs with.

    `base` are frozen weights, or None. Optimizer, average and checkpoints hold only `trained`.
    `merge(base, trained)` are the same network's parameters without additions such as factors.
    """

    init: Callable[[Any, jax.Array], Any]  # (initial parameters, key) -> the trained part
    join: Callable[[Any, Any], Any]
    merge: Callable[[Any, Any], Any]


def _trained(base: Any, trained: Any) -> Any:
    return trained


IDENTITY = Transform(init=lambda params, key: params, join=_trained, merge=_trained)


class Start(NamedTuple):
    """Parameters that training starts from, on the mesh, and what is known of them.

    `record` is what a run keeps beside its recipe, `lines` what is printed when it begins.
    """

    params: Any
    record: Mapping[str, Any]
    lines: tuple[str, ...]


class Known(NamedTuple):
    """What is known of the images that are drawn: an image of each sample in [-1, 1].

    With mask f32[B,H,W,1], 1 where a pixel of image f32[B,H,W,C] is known and 0 where it is to be
    drawn. With sigma f32[B], the image plus white noise of that standard deviation. With neither,
    image f32[B,h,w,C] holds the means of the pixels of the image to be drawn.
    """

    image: jax.Array | np.ndarray
    mask: jax.Array | np.ndarray | None = None
    sigma: jax.Array | np.ndarray | None = None


class Beside(NamedTuple):
    """What each sample is given beside its label: channels of `Conditions`, and what is known.

    context i32[B,M] are the tokens of a text, which the task encodes. vector is that of
    `Conditions`, or images f32[B,H,W,C], whose vectors the task computes.
    """

    channels: jax.Array | np.ndarray | None = None
    known: Known | None = None
    context: jax.Array | np.ndarray | None = None
    vector: jax.Array | np.ndarray | None = None


class Guidance(NamedTuple):
    """Arguments of guidance, f32[] each: the scale, and its timesteps low <= t < high.

    `given` is what the images are to agree with, or None; `control` are the arguments of a control,
    if there is one; `level` is the noise that is added to given channels, if the network reads it.
    `negative` i32[1,M] are the tokens of what takes the place of the null text, if anything does.
    """

    scale: jax.Array | np.float32
    low: jax.Array | np.float32
    high: jax.Array | np.float32
    control: Any = None
    given: Known | None = None
    level: jax.Array | np.float32 | None = None
    negative: jax.Array | np.ndarray | None = None


def _no_protocol() -> Mapping[str, Any]:
    return {}


class FromRecords(NamedTuple):
    """What a task needs beside the labels of its samples, as it follows from records of a data set.

    `beside(values, keys key[B])` makes it on the device of what it `reads`: 'image', f32[B,H,W,C]
    in [-1, 1], or 'caption', tokens i32[B,M]. `name` is the entry of a protocol that says which
    records, and `protocol()` are further ones. `edited`: an edit gives it, too. `texts` turns texts
    into what it reads, if that is captions. `image`: a sample is also given, as `Beside.vector`,
    the image of the record so many places behind its own.
    """

    beside: Callable[[jax.Array, jax.Array], Beside]
    name: str
    edited: bool = False
    reads: str = "image"
    protocol: Callable[[], Mapping[str, Any]] = _no_protocol
    texts: Callable[[Sequence[str]], np.ndarray] | None = None
    image: int | None = None


class Sampling(NamedTuple):
    """The sampling of a task.

    `draw(trained, frozen, keys key[B], conditions, guidance)` -> images u8[B,H,W,C]; output b
    depends only on keys[b] and its conditions. `guidance` are the arguments of this recipe.
    Recipes with equal `compiled` share a program. The network is evaluated at `timesteps` [n], the
    times that it is given, twice at `guided` of them; None if they are not known before. `weak` is
    the recipe of another network that takes the place of the second evaluation there. `protocol`
    are the fields of the sampling protocol that only this task has.

    `needs` is None if samples need nothing but labels: otherwise they are of control images, of
    low-resolution or incomplete ones, or of captions.

    A task that can draw images that agree with `guidance.given` says what that adds to the protocol
    by `edits(given)`, which raises UserError for what does not go with the recipe.
    """

    draw: Callable[[Any, Frozen, jax.Array, Conditions, Any], jax.Array]
    guidance: Any
    compiled: Any
    timesteps: np.ndarray | None
    guided: int
    protocol: Mapping[str, Any] = {}
    weak: Config | None = None
    needs: FromRecords | None = None
    edits: Callable[[Known], Mapping[str, Any]] | None = None


class ValidationScore(NamedTuple):
    """Scores of held-out examples, whose means are reported for a model.

    `measure(trained, frozen, keys key[B], batch)` -> {name: f32[B]}. If `num` > 0, that many
    examples are drawn, and `drawn(indices i[n])` adds arrays that depend only on an example's
    index; if 0, every example of the split is used once, and only by `evaluate`. `names` maps each
    score to the name of its mean. `summary` makes scores of all examples together, such as
    retrieval, of what was measured [N, ...]; only if `num` is 0. `images` names reconstructions of
    the batch's images that are measured, f32[B,H,W,C] in [-1, 1]: with config.evaluate.features
    their distance to these is computed; only if `num` is 0. Two values can be compared if their
    `protocol` is equal.
    """

    measure: Callable[[Any, Frozen, jax.Array, Batch], dict[str, jax.Array]]
    names: Mapping[str, str]
    protocol: Mapping[str, Any]
    num: int = 0
    drawn: Callable[[np.ndarray], dict[str, np.ndarray]] = lambda indices: {}
    summary: Callable[[Mapping[str, np.ndarray]], dict[str, float]] = lambda measured: {}
    images: str = ""


class Inside(NamedTuple):
    """What inspection reads and changes in the network of a task, and what that network predicts.

    `x0(frozen, images f32[B,H,W,C] in [-1, 1], keys key[B])` are the examples of a process that is
    the objective's. Of a network that is given channels they have these behind their own;
    `levels(B)` are those of the noise in them, if there is any. `read`, `patch` and `lens` are
    those of `network.InspectionSeam`, of the `variables(frozen, parameters)`. `beside(frozen, batch
    of records)` are the conditions beside the label, rows by name; if they are texts, `pieces(ids
    i32[n,M])` is what each token says. The network has `depth` blocks on rows x columns of tokens,
    and stacks their parameters below `stack`, where `branches` maps each branch of a block to its
    last linear layer. `null` is the label that says nothing, or None.
    """

    objective: Objective
    x0: Callable[[Frozen, jax.Array, jax.Array], jax.Array]
    decode: Callable[[Frozen, jax.Array], jax.Array]  # examples -> images f32[B,H,W,C]
    shape: tuple[int, ...]  # of an example, without what the network is given
    depth: int
    grid: tuple[int, int]
    stack: str
    branches: Mapping[str, str]
    null: int | None
    levels: Callable[[int], jax.Array | None]
    read: Callable[..., tuple[jax.Array, Taps]]
    patch: Callable[..., jax.Array]
    lens: Callable[..., jax.Array]
    variables: Callable[[Frozen, Any], Any]
    beside: Callable[[Frozen, Batch], dict[str, jax.Array]]
    pieces: Callable[[np.ndarray], list[list[str]]] | None


class Additions(NamedTuple):
    """What training adds on the host to the rows that it reads, such as features from a file.

    `contents` identify what lies at the places in a recipe, by key: a resumed run compares them.
    """

    add: Callable[[HostBatch], HostBatch] = lambda rows: rows
    contents: Mapping[str, str] = {}


class Task(NamedTuple):
    """A task, as the commands use it.

    `prepare` turns a batch of a data set (`image` or the moments of latents, and `label`) into a
    batch of `inputs`, on the devices and with the frozen weights; `draw` adds all random numbers of
    a step. `reads` names the frozen weights that `prepare` and `loss` need; if it is empty, they
    are loaded only for sampling. `open_rows` is called once by training, before anything compiles.
    `anneal(drawn, step)` adds what follows from the number of the step, such as a temperature, for
    every example. With `averages`, `loss` finds the average of the trained parameters in
    `frozen[AVERAGE]`.

    `rollout(trained, frozen, drawn)` adds to a drawn batch what the network draws itself, such as
    images for a reward; no gradient passes through it. The training state `holds` trained weights
    of earlier steps, such as "held:8" (`averages.HELD`), which `rollout` and `loss` find in
    `frozen` by name. `shapes` are those of what the two read of `frozen` beside "base"; `planned`
    those of all of it beside "base", for programs that are only traced: None loads it. Of `spread`
    frozen weights each device holds a part (`rules.spread_shardings`), of others without rules all.

    `start` loads the parameters that a run begins with, if these are not `init`'s. `transform` is
    what it trains of them; unless that is all, frozen weights "base" are what `start` loads.
    """

    name: str  # of the network, as in the paper: 'DiT-XL/2'
    inputs: dict[str, jax.ShapeDtypeStruct]  # one example
    init: Callable[[jax.Array], Any]  # key -> the network's parameters
    prepare: Callable[[Frozen, Batch, jax.Array], Batch]
    draw: Callable[[Batch, jax.Array], Batch]
    loss: Callable[[Any, Frozen, Batch], tuple[jax.Array, Metrics]]
    anneal: Callable[[Batch, jax.Array], Batch] | None = None
    frozen: Callable[[Mesh], Frozen] = lambda mesh: {}
    planned: Callable[[], Frozen] | None = None
    spread: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    open_rows: Callable[[], Additions] = Additions
    rollout: Callable[[Any, Frozen, Batch], Batch] | None = None
    holds: tuple[str, ...] = ()
    shapes: Callable[[], Frozen] = dict
    averages: bool = False
    transform: Transform = IDENTITY
    start: Callable[[Mesh], Start] | None = None
    rules: Rules = ()  # sharding rules of the parameters
    rates: Callable[[str], float] | None = None  # a parameter's path -> multiplier of its rate
    cost: NetworkCost | None = None
    sampling: Sampling | None = None
    scores: tuple[ValidationScore, ...] = ()
    inside: Inside | None = None  # None: its network has no blocks that can be read


class Definition(NamedTuple):
    """The definition of a task by its module.

    `make(c, mesh)` builds the task of a recipe for a mesh, or for one device if `mesh` is None.
    `sections` are the sections that its recipes have in addition to those of `Config`. `network` is
    the default of config.model.kind. `check` raises UserError for keys that contradict each other.
    `resolve(c, workdir)` fills in the keys that follow from files when a run begins.
    """

    make: Callable[[Config, Mesh | None], Task]
    network: str
    sections: Mapping[str, type[Section]] = {}
    check: Callable[[Config], None] = lambda c: None
    resolve: Callable[[Config, str | os.PathLike[str]], Config] = lambda c, workdir: c


def check_draws_nothing(c: Config) -> None:
    """Raise UserError for an evaluation during training, by a task that draws no samples."""
    if c.train.evaluate_every_steps:
        raise UserError(
            f"config.train.evaluate_every_steps is {c.train.evaluate_every_steps} and config.task"
            f" is {c.task!r}: only tasks that draw samples are evaluated during training. Set it to"
            " 0."
        )
