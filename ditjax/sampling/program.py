"""The jitted program that draws a batch of samples."""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditjax.config import Config
from ditjax.errors import UserError
from ditjax.models.network import Conditions
from ditjax.parallel import compiling, processes, rules
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening
from ditjax.training import keys
from ditjax.training.program import abstract_base, abstract_state, initial_state
from ditjax.training.task import IDENTITY, Beside, FromRecords, Frozen, Known, Sampling, Task


def sampling_of(c: Config, task: Task) -> Sampling:
    """The sampling of a task. Raises UserError for a task that draws no samples."""
    if task.sampling is None:
        raise UserError(f"config.task is {c.task!r}, a {task.name}, which draws no samples.")
    return task.sampling


NOTHING: Mapping[str, Any] = {}


def _nothing(values: jax.Array, keys: jax.Array) -> Beside:
    raise ValueError("records are given to a task whose samples need none")


_NO_NEEDS = FromRecords(_nothing, "")


def abstract_weights(c: Config, task: Task, mesh: Mesh | None = None) -> tuple[Any, Frozen]:
    """The trained and the frozen weights of a recipe as shapes, on a mesh with their shardings.

    Raises UserError for frozen weights whose shapes follow from a file that is missing.
    """
    frozen = abstract_frozen(task, mesh)
    if mesh is not None:
        return abstract_state(c, task, mesh).params, frozen | abstract_base(c, task, mesh)
    trained = jax.eval_shape(lambda: initial_state(c, task)).params
    if task.transform is not IDENTITY:
        frozen["base"] = jax.eval_shape(lambda: task.init(keys.stream(c.seed, keys.INIT)))
    return trained, frozen


def abstract_frozen(task: Task, mesh: Mesh | None = None) -> Frozen:
    """The frozen weights beside a base as `abstract_weights` has them. Raises UserError."""
    load = task.planned or (lambda: task.frozen(make_mesh(-1, 1)))
    found: Frozen = jax.eval_shape(lambda x: x, load())
    if mesh is None:
        return found

    def placed(name: str, tree: Any) -> Any:
        spread = name in task.spread
        shardings = (
            rules.spread_shardings(tree, mesh) if spread else rules.state_shardings(tree, mesh, ())
        )
        return rules.placed_shapes(tree, shardings)

    return {name: placed(name, tree) for name, tree in found.items()}


def abstract_arguments(c: Config, task: Task, batch: int) -> tuple[Any, Conditions, Any]:
    """The arguments of `Sampling.draw` behind the weights, as shapes: (keys, conditions, guidance).

    What samples are given follows from records of the recipe's data set.
    """
    sampling = sampling_of(c, task)
    each = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    beside, needs = Beside(), sampling.needs
    if needs is not None:
        spec = opening.data_spec(c)
        images: Any = jax.ShapeDtypeStruct((batch, *spec.shape), jnp.float32)
        values = images
        if needs.reads == "caption":
            assert spec.text
            values = jax.ShapeDtypeStruct((batch, spec.text.tokens), jnp.int32)
        beside = jax.eval_shape(needs.beside, values, each)
        if needs.image is not None:
            beside = beside._replace(vector=images)
    conditions = _conditions(jax.ShapeDtypeStruct((batch,), jnp.int32), beside)
    guidance = sampling.guidance
    if beside.known is not None:
        guidance = guidance._replace(given=beside.known)
    return each, conditions, guidance


def _conditions(label: Any, beside: Beside) -> Conditions:
    """What the network is given of samples: their labels, and what stands beside them."""
    given = {name: getattr(beside, name) for name in ("channels", "context", "vector")}
    return Conditions(label=label, **given)


class BatchSampler(NamedTuple):
    """The jitted sampler of `batch_size` samples at a time.

    `place(seed, start, labels i[B] or None, rows)` returns the arguments for samples start to
    start + B on the mesh: (keys, conditions, labels i32[B], what is known or None). `rows` are of
    `given.GivenRows`, by default none; their labels are taken if no others are given.
    `program(params, frozen, keys, conditions, guidance)` returns the images u8[B,H,W,C]; call it
    inside `precise` and `compiling()`.
    """

    program: Callable[[Any, Frozen, Any, Conditions, Any], jax.Array]
    place: Callable[..., tuple[Any, Conditions, np.ndarray, Known | None]]
    compiling: Callable[[], AbstractContextManager[None]]
    batch_size: int


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

    needs = sampling.needs or _NO_NEEDS
    of_records = jax.jit(needs.beside, out_shardings=batch_sharding)

    def beside_of(seed: int, indices: jax.Array, rows: Mapping[str, Any]) -> Beside:
        given: Beside = jax.tree.map(spread, rows.get("beside", Beside()))
        if needs.reads not in rows:
            return given
        each = keys_of(keys.stream(seed, keys.CONTROL), indices)
        found: Beside = of_records(spread(rows[needs.reads]), each)
        return found._replace(**{k: v for k, v in given._asdict().items() if v is not None})

    def place(
        seed: int, start: int, labels: np.ndarray | None, rows: Mapping[str, Any] = NOTHING
    ) -> tuple[Any, Conditions, np.ndarray, Known | None]:
        indices = np.arange(start, start + B, dtype=np.uint32)
        labels = rows.get("label") if labels is None else labels
        if labels is None:
            labels = np.asarray(labels_of(keys.stream(seed, keys.LABELS), indices))
        labels = np.asarray(labels, np.int32)
        on_mesh = [spread(x) for x in (indices, labels)]
        each = keys_of(keys.stream(seed, keys.SAMPLE), on_mesh[0])
        beside = beside_of(seed, on_mesh[0], rows)
        return each, _conditions(on_mesh[1], beside), labels, beside.known

    program = jax.jit(
        sampling.draw,
        in_shardings=(None, None, batch_sharding, batch_sharding, None),
        out_shardings=rules.replicated(mesh),
    )
    return BatchSampler(program, place, compiling.once(), B)
