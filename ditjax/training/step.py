"""TrainState, and the pure training step (state, frozen weights, batch) -> (state, metrics).

A step with a non-finite loss or gradient changes only the step counter.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ditjax.training.averages import held_weights, no_averages, updated_averages

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# (batch, key) -> the batch with all of a step's random numbers
Draw = Callable[[Batch, jax.Array], Batch]
# (params, frozen weights, drawn batch) -> (scalar loss, scalars to log)
LossFn = Callable[[Any, Any, Batch], tuple[jax.Array, Metrics]]
# (params, frozen weights, drawn batch) -> the batch with what the network itself draws
Rollout = Callable[[Any, Any, Batch], Batch]
# The frozen weights that are the average of the trained ones, for a loss that asks for them.
AVERAGE = "average"
# optimizer state -> the largest gradient norm that is not skipped
Limit = Callable[[Any], jax.Array]


class TrainState(NamedTuple):
    """The state of training.

    `step` counts batches, including those of skipped updates: it determines the data and the noise.
    The optimizer counts updates. `averages` are those beside the EMA (`averages.Averages`), () if
    there are none.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any
    averages: Any = ()


# The field of the training state that config.sample.weights names.
WEIGHTS = {"ema": "ema", "model": "params"}


def weights_named(state: TrainState, name: str) -> Any:
    """The weights of a name: 'ema', 'model' (as trained) or one of the averages, 'power:0.05'."""
    return getattr(state, WEIGHTS[name]) if name in WEIGHTS else state.averages.trees[name]


def init_state(
    params: Any, tx: optax.GradientTransformation, averages: Sequence[str] = ()
) -> TrainState:
    """The state at step 0; every average starts as a copy of the parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=tx.init(params),
        averages=no_averages(params, averages),
    )


def ema_update(ema: Any, params: Any, decay: float) -> Any:
    """θ̄ <- decay·θ̄ + (1 - decay)·θ with the updated θ, from step 0, without warm-up."""
    return jax.tree.map(lambda a, p: a * decay + p * (1 - decay), ema, params)


def microbatches(batch: Batch, parts: int) -> Batch:
    """[B, ...] -> [parts, B/parts, ...]: part j has the rows j, j + parts, j + 2 parts, ...

    A device that holds consecutive rows then holds an equal share of every part: no data moves.
    """
    return jax.tree.map(
        lambda x: x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )


def mean_gradient(
    gradient: Callable[[Batch], tuple[Any, Metrics]],
    drawn: Batch,
    parts: int,
    place: Callable[[Any], Any],
) -> tuple[Any, Metrics]:
    """The mean of (gradient, metrics) over the parts of a batch, one part after another.

    Only one part's activations are in memory at a time. Gradients are summed in float32, their
    dtype.
    """

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(part)), None

    split = microbatches(drawn, parts)
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], split))
    grads, metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, (place(grads), metrics), split)
    return jax.tree.map(lambda x: x / parts, total)


def _with_weights_of(state: TrainState, frozen: Any, average: bool) -> Any:
    """Add what a loss reads of the state, beside the weights that it differentiates."""
    found = {**held_weights(state.averages), **({AVERAGE: state.ema} if average else {})}
    return {**frozen, **found} if found else frozen


def no_limit(opt_state: Any) -> jax.Array:
    """Accept every finite gradient."""
    return jnp.array(jnp.inf)


def make_step(
    draw: Draw,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    ema_decay: float,
    key: jax.Array,
    *,
    parts: int = 1,
    place: Callable[[Any], Any] = lambda gradient: gradient,
    limit: Limit = no_limit,
    averages: bool = False,
    rollout: Rollout | None = None,
    anneal: Callable[[Batch, jax.Array], Batch] | None = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """Build the training step (state, frozen weights, batch) -> (state, metrics).

    A step updates the parameters and the averages. The update is skipped if the loss or the
    gradient's global norm is not finite, or the norm above `limit`: then parameters, averages and
    optimizer state keep their bits, and the metric "skipped" bool[] is true.

    The run's `key` is folded with the step only here, so that a step's random numbers depend only
    on (seed, step). They are drawn before the batch is split into `parts`: the update is the same
    for any number of parts, up to rounding. `place` shards gradients as the parameters
    are. With `averages`, the frozen weights of the loss hold the average as `AVERAGE`; weights that
    the state holds (`averages.HELD`) are among them by name. `anneal` adds what follows from the
    step, `rollout` what the network draws itself, both before the batch is split.
    """

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        drawn = draw(batch, jax.random.fold_in(key, state.step))
        drawn = drawn if anneal is None else anneal(drawn, state.step)
        frozen = _with_weights_of(state, frozen, averages)
        if rollout is not None:
            drawn = rollout(state.params, frozen, drawn)
        loss_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        if parts == 1:
            (loss, metrics), grads = loss_and_grad(state.params, frozen, drawn)
            grads, metrics = place(grads), {**metrics, "loss": loss}
        else:

            def gradient(part: Batch) -> tuple[Any, Metrics]:
                (loss, metrics), grads = loss_and_grad(state.params, frozen, part)
                return place(grads), {**metrics, "loss": loss}

            grads, metrics = mean_gradient(gradient, drawn, parts, place)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm) & (norm <= limit(state.opt_state))

        def update() -> tuple[Any, ...]:
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = ema_update(state.ema, params, ema_decay)
            return params, ema, opt_state, updated_averages(state.averages, params)

        # A branch instead of a select for every number: on CPUs that doubled the update's time.
        changed = jax.lax.cond(good, update, lambda: tuple(state[1:]))
        new = TrainState(state.step + 1, *changed)
        return new, {**metrics, "grad_norm": norm, "skipped": ~good}

    return step
