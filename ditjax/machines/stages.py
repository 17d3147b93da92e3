"""What a recipe computes beside its training step: samples, their scores, encoded images.

Each stage has the products of one item and the number of items. The network's come from its closed
form; all else, such as decoders and encoders of texts, is counted in the traced program of the task
(`products.py`), so that a task of your own is planned like those that ship.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.config import Config
from ditjax.data.names import is_latents
from ditjax.errors import UserError
from ditjax.machines.products import COUNTED, traced_macs
from ditjax.machines.topology import Topology
from ditjax.models.network import NetworkCost
from ditjax.runs import opening
from ditjax.sampling.program import abstract_arguments, abstract_weights, sampling_of
from ditjax.studies.words import number as number_words
from ditjax.tasks import autoencoder, make_task, sampling_gflops
from ditjax.training.task import Task

CLOSED_FORM = "closed form"
Weights = Callable[[], tuple[Any, Any]]  # trained and frozen, as shapes


class Stage(NamedTuple):
    """The multiply-accumulates of one item of a stage, None if unknown, and how many there are.

    `source` says where the figure is from, or why there is none.
    """

    name: str
    item: str
    macs: float | None
    number: int | None
    source: str


def planned_cost(c: Config) -> NetworkCost:
    """The cost of a recipe's network: in closed form, or its loss counted in the trace."""
    task = make_task(c)
    if task.cost:
        return task.cost
    trained, frozen = abstract_weights(c, task)
    parameters = sum(x.size for x in jax.tree.leaves(trained))
    rows = {n: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for n, x in task.inputs.items()}

    def loss(trained: Any, frozen: Any, rows: Any) -> Any:
        drawn = task.draw(rows, jax.random.key(0))
        drawn = task.anneal(drawn, jnp.int32(0)) if task.anneal else drawn
        return task.loss(trained, frozen, drawn)[0]

    return NetworkCost(task.name, parameters, traced_macs(loss, trained, frozen, rows))


def stages_of(
    c: Config,
    steps: int,
    images: int | None = None,
    features: Callable[[], Callable[[Any], Any] | None] = lambda: None,
) -> list[Stage]:
    """The stages of a recipe, with so many steps of training.

    images: of the data set, which `encode` reads. `features()(images u8[B,H,W,3])`: what
    evaluation extracts from samples, if its products are to be counted.
    """
    task, cost, examples = make_task(c), planned_cost(c), steps * c.train.batch_size
    weights = functools.cache(lambda: abstract_weights(c, task))
    trained = Stage(
        "train",
        f"example of {steps:,} steps of {c.train.batch_size}",
        cost.passes * cost.macs + cost.training_macs,
        examples,
        CLOSED_FORM if task.cost else COUNTED,
    )
    found = [trained, *_prepared(c, task, examples, weights)]
    if task.sampling:
        found.append(_sampled(c, task, weights))
        found += _featured(c, features)
    # Without a number, a score is of the whole split, and only tasks without samples report it.
    scores = [i for i, score in enumerate(task.scores) if score.num or not task.sampling]
    return [*found, *(_validated(c, task, i, weights) for i in scores), *_encoded(c, images)]


def _counted(stage: Stage, trace: Callable[[], int]) -> Stage:
    """The stage with its products as counted, or with why they are not known."""
    try:
        return stage._replace(macs=trace(), source=COUNTED)
    except UserError as error:
        return stage._replace(source=f"not counted: {error}") if stage.macs is None else stage


def _rows(c: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """One record of a data set, as `prepare` and scores are given it."""
    spec = opening.data_spec(c)
    rows: dict[str, Any] = {"image": ((1, *spec.shape), jnp.float32), "label": ((1,), jnp.int32)}
    if spec.text:
        rows["caption"] = ((1, spec.text.tokens), jnp.int32)
        # Of any number of features with classes: no product has their width.
        rows["classes"] = ((1, 64), jnp.int32)
    return {name: jax.ShapeDtypeStruct(*each) for name, each in rows.items()}


def _prepared(c: Config, task: Task, number: int, weights: Weights) -> list[Stage]:
    """What frozen networks do to each example before its step."""
    if is_latents(c.data.name) or not task.reads:
        return []
    key = jax.eval_shape(lambda: jax.random.key(0))
    found = _counted(
        Stage("prepare", f"example: {', '.join(task.reads)}", None, number, ""),
        lambda: traced_macs(task.prepare, weights()[1], _rows(c), key),
    )
    return [] if found.macs == 0 else [found]


def _sampled(c: Config, task: Task, weights: Weights) -> Stage:
    """A sample with all that its program does; in closed form the network alone."""
    sampling, number = sampling_of(c, task), c.evaluate.num_samples
    stage = Stage("sample", "sample", None, number, "")
    if sampling.timesteps is not None and task.cost:
        gflops, times = sampling_gflops(c), len(sampling.timesteps)
        item = f"sample: {times} x {number_words(task.cost.gflops)} Gflops"
        if sampling.guided:
            item += f", {sampling.guided} of them twice"
        stage = stage._replace(item=item, macs=1e9 * gflops, source=f"{CLOSED_FORM}, network alone")

    def trace() -> int:
        return traced_macs(sampling.draw, *weights(), *abstract_arguments(c, task, 1))

    return _counted(stage, trace)


def _featured(c: Config, features: Callable[[], Callable[[Any], Any] | None]) -> list[Stage]:
    """The features of each sample; none that are not to be counted."""
    image = jax.ShapeDtypeStruct((1, *c.data.shape[-3:-1], 3), jnp.uint8)

    def trace() -> int:
        extract = features()
        return traced_macs(extract, image) if extract else 0

    stage = Stage("evaluate", "features of a sample", None, c.evaluate.num_samples, "")
    found = _counted(stage, trace)
    return [] if found.macs == 0 else [found]


def _validated(c: Config, task: Task, i: int, weights: Weights) -> Stage:
    """A held-out score of one example."""
    score = task.scores[i]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))

    def trace() -> int:
        batch = {**_rows(c), **score.drawn(np.arange(1))}
        return traced_macs(score.measure, *weights(), keys, batch)

    names = ", ".join(score.names.values()) or str(score.protocol.get("metric", "score"))
    return _counted(Stage("evaluate", f"example: {names}", None, score.num or None, ""), trace)


def _encoded(c: Config, images: int | None) -> list[Stage]:
    """The latents of an image and of its mirror image, as `encode` caches them."""
    if not c.latent or c.data.frames > 1:
        return []
    params = autoencoder.frozen_shapes(c)
    image = jax.ShapeDtypeStruct((1, *c.data.shape), jnp.float32)
    macs = 2 * traced_macs(lambda p, x: autoencoder.encode_images(c, p, x), params, image)
    return [Stage("encode", "image and its mirror image", macs, images, COUNTED)]


def stage_hours(
    c: Config, stages: Sequence[Stage], topology: Topology, share: float
) -> list[dict[str, Any]]:
    """The stages as plain data, with their hours on all chips at a share of the products' peak."""
    chip = topology.chip
    count = topology.chips * chip.cores * c.mesh.slices
    rate = share * count * chip.rates.device_flops(c.model.dtype, c.model.matmul)
    made = []
    for each in stages:
        hours = None
        if each.macs is not None and each.number is not None:
            hours = 2.0 * each.macs * each.number / rate / 3600
        gflops = None if each.macs is None else each.macs / 1e9
        made.append({**each._asdict(), "gflops": gflops, "hours": hours})
    return made
