"""The jitted program that draws a batch of samples."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ditjax.config import Config
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


class BatchSampler(NamedTuple):
    """The jitted sampler of `batch_size` samples at a time.

    `place(seed, start, labels i[B] or None)` returns the arguments for samples start to start + B
    on the mesh: (keys, conditions, labels i32[B]). `program(params, frozen, keys, conditions,
    guidance)` returns the images u8[B,H,W,C]; call it inside `precise` and `compiling()`.
    """

    program: Callable[[Any, Frozen, Any, Conditions, Any], jax.Array]
    place: Callable[[int, int, np.ndarray | None], tuple[Any, Conditions, np.ndarray]]
    compiling: Callable[[], AbstractContextManager[None]]
    batch_size: int


def batch_sampler(c: Config, task: Task, mesh: Mesh) -> BatchSampler:
    """Build the sampler of a recipe on a mesh.

    Sample i depends only on (seed, i) and its label, not on the batch or the mesh. Without labels,
    label i is uniform over the classes and also depends only on (seed, i). Another seed or guidance
    does not recompile as long as `Sampling.compiled` is the same.
    """
    draw = sampling_of(c, task).draw
    B = c.sample.batch_size
    rules.check_batch(B, mesh, "config.sample.batch_size")
    batch_sharding = rules.batch_sharding(mesh)
    keys_of = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)), out_shardings=batch_sharding)

    @jax.jit
    def labels_of(key: jax.Array, indices: jax.Array) -> jax.Array:
        each = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        return jax.vmap(lambda key: jax.random.randint(key, (), 0, c.data.num_classes))(each)

    def place(
        seed: int, start: int, labels: np.ndarray | None
    ) -> tuple[Any, Conditions, np.ndarray]:
        indices = np.arange(start, start + B, dtype=np.uint32)
        if labels is None:
            labels = np.asarray(labels_of(keys.stream(seed, keys.LABELS), indices))
        on_mesh = [processes.from_whole(batch_sharding, x) for x in (indices, labels)]
        each = keys_of(keys.stream(seed, keys.SAMPLE), on_mesh[0])
        return each, Conditions(label=on_mesh[1]), np.asarray(labels, np.int32)

    program = jax.jit(
        draw,
        in_shardings=(None, None, batch_sharding, batch_sharding, None),
        out_shardings=rules.replicated(mesh),
    )
    return BatchSampler(program, place, compiling.once(), B)
