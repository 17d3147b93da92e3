"""The jitted program that draws a batch of samples."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ditjax.config import Config
from ditjax.data.records import HostBatch
from ditjax.errors import UserError
from ditjax.models.network import Conditions
from ditjax.parallel import compiling, processes, rules
from ditjax.training import keys
from ditjax.training.task import Frozen, Sampling, Task


def sampling_of(c: Config, task: Task) -> Sampling:
    """The sampling of a task. Raises UserError for a task that draws no samples."""
    if task.sampling is None:
        raise UserError(f"config.task is {c.task!r}, a {task.name}, which draws no samples.")
    return task.sampling


NO_CONTROLS: HostBatch = {}


def _no_maps(images: jax.Array, keys: jax.Array) -> jax.Array:
    raise ValueError("control images are given to a task that takes none")


class BatchSampler(NamedTuple):
    """The jitted sampler of `batch_size` samples at a time.

    `place(seed, start, labels i[B] or None, controls)` returns the arguments for samples start to
    start + B on the mesh: (keys, conditions, labels i32[B]). `controls` are the rows of
    `controls.Controls`, by default none; their labels are taken if none are given.
    `program(params, frozen, keys, conditions, guidance)` returns the images u8[B,H,W,C]; call it
    inside `precise` and `compiling()`. `spread` puts an array whose first axis is the batch on the
    mesh.
    """

    program: Callable[[Any, Frozen, Any, Conditions, Any], jax.Array]
    place: Callable[..., tuple[Any, Conditions, np.ndarray]]
    compiling: Callable[[], AbstractContextManager[None]]
    batch_size: int
    spread: Callable[[np.ndarray], jax.Array]


def batch_sampler(c: Config, task: Task, mesh: Mesh) -> BatchSampler:
    """Build the sampler of a recipe on a mesh.

    Sample i depends only on (seed, i) and its label, not on the batch or the mesh. Without labels,
    label i is uniform over the classes and also depends only on (seed, i). Another seed or guidance
    does not recompile as long as `Sampling.compiled` is the same.
    """
    sampling = sampling_of(c, task)
    B = c.sample.batch_size
    rules.check_batch(B, mesh, "config.sample.batch_size")
    batch_sharding = rules.batch_sharding(mesh)
    keys_of = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)), out_shardings=batch_sharding)

    @jax.jit
    def labels_of(key: jax.Array, indices: jax.Array) -> jax.Array:
        each = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        return jax.vmap(lambda key: jax.random.randint(key, (), 0, c.data.num_classes))(each)

    spread = functools.partial(processes.from_whole, batch_sharding)

    maps_of = jax.jit(sampling.control or _no_maps, out_shardings=batch_sharding)

    def channels_of(seed: int, indices: jax.Array, controls: HostBatch) -> jax.Array | None:
        if "maps" in controls:
            return spread(controls["maps"])
        if "image" not in controls:
            return None
        images = spread(controls["image"])
        return maps_of(images, keys_of(keys.stream(seed, keys.CONTROL), indices))

    def place(
        seed: int, start: int, labels: np.ndarray | None, controls: HostBatch = NO_CONTROLS
    ) -> tuple[Any, Conditions, np.ndarray]:
        indices = np.arange(start, start + B, dtype=np.uint32)
        labels = controls.get("label") if labels is None else labels
        if labels is None:
            labels = np.asarray(labels_of(keys.stream(seed, keys.LABELS), indices))
        labels = np.asarray(labels, np.int32)
        on_mesh = [spread(x) for x in (indices, labels)]
        each = keys_of(keys.stream(seed, keys.SAMPLE), on_mesh[0])
        channels = channels_of(seed, on_mesh[0], controls)
        return each, Conditions(label=on_mesh[1], channels=channels), labels

    program = jax.jit(
        sampling.draw,
        in_shardings=(None, None, batch_sharding, batch_sharding, None),
        out_shardings=rules.replicated(mesh),
    )
    return BatchSampler(program, place, compiling.once(), B, spread)
