"""TrainState and the pure step (state, batch, key) -> (state, metrics).

A step whose loss or gradient is not finite changes nothing but the step's number.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# (batch, key) -> the batch with all that is random in a step, drawn for the whole of it
Draw = Callable[[Batch, jax.Array], Batch]
# (params, frozen weights, what was drawn) -> (scalar loss, scalars to log)
LossFn = Callable[[Any, Any, Batch], tuple[jax.Array, Metrics]]
# optimizer's state -> the largest norm of a gradient that it takes
Limit = Callable[[Any], jax.Array]


class TrainState(NamedTuple):
    """All that training carries from step to step.

    `step` counts the batches seen, those of skipped updates too: data and noise go on from it. The
    optimizer counts updates.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """Step 0; the average starts as a copy of the parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=tx.init(params),
    )


def ema_update(ema: Any, params: Any, decay: float) -> Any:
    """θ̄ <- decay·θ̄ + (1 - decay)·θ with the *updated* θ, from step 0, no warm-up."""
    return jax.tree.map(lambda a, p: a * decay + p * (1 - decay), ema, params)


def microbatches(batch: Batch, parts: int) -> Batch:
    """[B, ...] -> [parts, B/parts, ...]: part j has the rows j, j + parts, j + 2 parts, ...

    So a device that holds a run of rows holds an equal share of every part: nothing moves.
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
    """The mean of the parts' `gradient`, one part after another: (gradient, metrics).

    Only one part's activations are alive at a time. Gradients are summed in their own dtype,
    float32.
    """

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(part)), None

    split = microbatches(drawn, parts)
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], split))
    grads, metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, (place(grads), metrics), split)
    return jax.tree.map(lambda x: x / parts, total)


def no_limit(opt_state: Any) -> jax.Array:
    """Any gradient that is finite will do."""
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
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """One update, (state, frozen weights, batch) -> (state, metrics): gradient, Adam, average.

    It is skipped when the loss or the gradient's global norm is not finite, or the norm is above
    `limit`: parameters, average and optimizer then keep their bits, and metrics "skipped" bool[] is
    true.

    `key` is the run's key. It is folded with the step here and nowhere else, so that a step's
    randomness is a function of (seed, step). It is drawn before the batch is cut into `parts`: the
    update is the same for any number of them, but for rounding. `place` puts gradients where the
    parameters are.
    """

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        drawn = draw(batch, jax.random.fold_in(key, state.step))
        of_loss = jax.value_and_grad(loss_fn, has_aux=True)
        if parts == 1:
            (loss, metrics), grads = of_loss(state.params, frozen, drawn)
            grads, metrics = place(grads), {**metrics, "loss": loss}
        else:

            def gradient(part: Batch) -> tuple[Any, Metrics]:
                (loss, metrics), grads = of_loss(state.params, frozen, part)
                return place(grads), {**metrics, "loss": loss}

            grads, metrics = mean_gradient(gradient, drawn, parts, place)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm) & (norm <= limit(state.opt_state))

        def update() -> tuple[Any, Any, Any]:
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return params, ema_update(state.ema, params, ema_decay), opt_state

        # A branch and not a choice of every number: on CPUs that doubled the update's time.
        params, ema, opt_state = jax.lax.cond(
            good, update, lambda: (state.params, state.ema, state.opt_state)
        )
        new = TrainState(step=state.step + 1, params=params, ema=ema, opt_state=opt_state)
        return new, {**metrics, "grad_norm": norm, "skipped": ~good}

    return step
