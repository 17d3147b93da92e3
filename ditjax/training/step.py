"""TrainState and the pure step (state, batch, key) -> (state, metrics)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# (params, batch, key) -> (scalar loss, scalars to log)
LossFn = Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]]


class TrainState(NamedTuple):
    """All that training carries from step to step; `step` counts finished updates."""

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


def make_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, ema_decay: float
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """One update: loss and gradient, optimizer, average.

    `key` is the run's key; it is folded with the step here and nowhere else, so that a step's
    randomness is a function of (seed, step).
    """

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(
            step=state.step + 1,
            params=params,
            ema=ema_update(state.ema, params, ema_decay),
            opt_state=opt_state,
        )
        return new, {**metrics, "loss": loss, "grad_norm": optax.tree.norm(grads)}

    return step
