"""The jitted programs of training: initialise, prepare a batch, update."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from ditjax.config import Config
from ditjax.parallel import compiling, processes, rules
from ditjax.training import keys
from ditjax.training.optim import learning_rate_schedule, make_optimizer, spike_limit
from ditjax.training.step import Batch, Metrics, TrainState, init_state, make_step, no_limit
from ditjax.training.task import IDENTITY, Frozen, Task


def precise(c: Config) -> AbstractContextManager[None]:
    """Set a recipe's precision of float32 products; with 'default', TPUs round to bfloat16."""
    return jax.default_matmul_precision(None if c.model.matmul == "default" else "float32")


def learning_rate_of(c: Config) -> optax.Schedule:
    """The learning rate of a recipe by the number of updates before."""
    o = c.optim
    return learning_rate_schedule(
        o.learning_rate, o.schedule, o.warmup_steps, c.train.steps, o.restarts
    )


def optimizer_of(
    c: Config, rates: Callable[[str], float] | None = None
) -> optax.GradientTransformation:
    """The optax chain of a recipe; `rates` maps a parameter's path to its rate's multiplier."""
    o = c.optim
    return make_optimizer(
        learning_rate_of(c),
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        clip_norm=o.clip_norm,
        spike_factor=o.spike_factor,
        scale=None if rates is None else functools.partial(_scaled, rates),
        decayed=_kernels if o.decay == "kernels" else None,
    )


def _kernels(params: Any) -> Any:
    """Which parameters decay in Radford et al. 2021, Sec. 2.5: no gain, no bias, no temperature."""

    def decays(path: Any, leaf: Any) -> bool:
        name = rules.path_of(path).rpartition("/")[2]
        return not name.endswith(("scale", "bias"))

    return jax.tree_util.tree_map_with_path(decays, params)


def _scaled(rates: Callable[[str], float], updates: Any) -> Any:
    """Multiply each parameter's update by the multiplier of its learning rate."""

    def scale(path: Any, update: jax.Array) -> jax.Array:
        multiplier = rates(rules.path_of(path))
        return update if multiplier == 1 else update * multiplier

    return jax.tree_util.tree_map_with_path(scale, updates)


class Training(NamedTuple):
    """The functions of a training loop, called inside `precise`. `step` donates its state."""

    init: Callable[..., TrainState]  # () or (parameters to start from)
    abstract_state: TrainState  # shapes, dtypes and shardings: the target of a restore
    rows: np.ndarray  # the rows of the global batch that this process's devices hold
    put: Callable[[Mapping[str, np.ndarray]], Batch]  # these rows -> global arrays
    prepare: Callable[[Frozen, Batch, jax.Array], Batch]  # (.., batch, step) -> examples
    step: Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]
    compiling: Callable[[bool], AbstractContextManager[None]]  # around `step`; True: the first
    lower: Callable[[], jax.stages.Lowered]  # `step` for the shapes of prepared examples


def initial_state(c: Config, task: Task, start: Any = None) -> TrainState:
    """The state at step 0, from the parameters `start` or, without them, the network's own."""
    key = keys.stream(c.seed, keys.INIT)
    params = task.init(key) if start is None else start
    trained = task.transform.init(params, key)
    names = (*c.train.averages, *task.holds)
    return init_state(trained, optimizer_of(c, task.rates), names)


def abstract_state(c: Config, task: Task, mesh: Mesh) -> TrainState:
    """The shapes, dtypes and shardings of the training state, by the task's rules."""
    return _abstract(jax.eval_shape(lambda: initial_state(c, task)), task, mesh)


def _abstract(tree: Any, task: Task, mesh: Mesh) -> Any:
    return rules.placed_shapes(tree, rules.state_shardings(tree, mesh, task.rules))


def abstract_base(c: Config, task: Task, mesh: Mesh) -> Frozen:
    """The frozen weights that the step reads, as shapes: the base of a transform."""
    if task.transform is IDENTITY:
        return {}
    params = jax.eval_shape(lambda: task.init(keys.stream(c.seed, keys.INIT)))
    return {"base": _abstract(params, task, mesh)}


def _jit_step(c: Config, task: Task, mesh: Mesh, shardings: TrainState) -> jax.stages.Wrapped:
    """The jitted training step; it donates its state."""
    factor = c.optim.spike_factor
    step = make_step(
        task.draw,
        task.loss,
        optimizer_of(c, task.rates),
        c.train.ema_decay,
        keys.stream(c.seed, keys.TRAIN),
        parts=c.train.microbatches,
        place=lambda grads: jax.lax.with_sharding_constraint(grads, shardings.params),
        limit=functools.partial(spike_limit, factor=factor) if factor else no_limit,
        averages=task.averages,
        rollout=task.rollout,
        anneal=task.anneal,
    )
    return jax.jit(
        step,
        in_shardings=(shardings, None, rules.batch_sharding(mesh)),
        out_shardings=(shardings, rules.replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiling.step_options(mesh.devices.flat[0].device_kind, mesh.shape),
    )


def training(c: Config, task: Task, mesh: Mesh) -> Training:
    """The training programs of a recipe's task on a mesh.

    Raises UserError if the mesh does not divide the batch, or does not split the parameters.
    """
    _check_microbatches(c, mesh)
    abstract = abstract_state(c, task, mesh)
    base = abstract_base(c, task, mesh)
    # Beside a frozen base, what is trained may be small enough to be whole on every device.
    rules.check_split((abstract.params, base) if base else abstract.params, mesh, task.rules)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    init = jax.jit(functools.partial(initial_state, c, task), out_shardings=shardings)
    batch_sharding = rules.batch_sharding(mesh)
    rows = processes.local_rows(batch_sharding, c.train.batch_size)
    jit_step = _jit_step(c, task, mesh, shardings)

    @jax.jit
    def prepare(frozen: Frozen, batch: Batch, step: jax.Array) -> Batch:
        """Turn rows of the data set into the examples of a step, on the mesh."""
        return task.prepare(
            frozen, batch, jax.random.fold_in(keys.stream(c.seed, keys.LATENTS), step)
        )

    def put(local: Mapping[str, np.ndarray]) -> Batch:
        return {
            name: processes.global_rows(batch_sharding, c.train.batch_size, rows, value)
            for name, value in local.items()
            if name != "index"
        }

    def lower() -> jax.stages.Lowered:
        batch = {
            name: jax.ShapeDtypeStruct((c.train.batch_size, *one.shape), one.dtype)
            for name, one in task.inputs.items()
        }
        shapes = task.shapes()
        others = rules.placed_shapes(shapes, rules.state_shardings(shapes, mesh, ()))
        with precise(c):
            return jit_step.lower(abstract, base | others, batch)

    return Training(
        init,
        abstract,
        rows,
        put,
        prepare,
        jit_step,
        lambda first: compiling.watching(mesh) if first else contextlib.nullcontext(),
        lower,
    )


def _check_microbatches(c: Config, mesh: Mesh) -> None:
    """Raise UserError if the devices do not divide the microbatches of a step."""
    B, parts = c.train.batch_size, c.train.microbatches
    if parts == 1:
        rules.check_batch(B, mesh, "config.train.batch_size")
        return
    rules.check_batch(
        B // parts, mesh, f"config.train.batch_size / config.train.microbatches = {B} / {parts}"
    )
