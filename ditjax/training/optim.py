"""The optimizer as one optax chain, and the guard against spikes of the gradient norm."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# The running mean covers about 1 / (1 - NORM_DECAY) updates. The guard is off for the first ones.
NORM_DECAY = 0.99
FIRST_NORMS = 100


def learning_rate_schedule(
    peak: float,
    schedule: str,
    warmup_steps: int,
    total_steps: int,
    restarts: Sequence[int] = (),
) -> optax.Schedule:
    """Linear warm-up from 0 over `warmup_steps`, then constant or a half cosine to 0.

    At each of `restarts` the schedule ends, and another begins with its warm-up (compare Loshchilov
    & Hutter 2017, which restarts without one).
    """
    bounds = itertools.pairwise((0, *restarts, total_steps))
    phases = [_phase(peak, schedule, warmup_steps, end - start) for start, end in bounds]
    return optax.join_schedules(phases, list(restarts)) if restarts else phases[0]


def _phase(peak: float, schedule: str, warmup_steps: int, steps: int) -> optax.Schedule:
    after = steps - warmup_steps
    main = (
        optax.cosine_decay_schedule(peak, after)
        if schedule == "cosine"
        else optax.constant_schedule(peak)
    )
    if not warmup_steps:
        return main
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, main], [warmup_steps])


def make_optimizer(
    learning_rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
    spike_factor: float = 0.0,
    scale: Callable[[Any], Any] | None = None,
    decayed: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, Alg. 2), after clipping to a global norm if clip_norm > 0.

    The paper trains with weight decay 0; optax's default is not 0. With a `spike_factor` the state
    starts with the running norm that `spike_limit` reads. `scale` multiplies Adam's update, a tree
    like the parameters, by learning rates per parameter. It does not affect weight decay, which is
    learning_rate · weight_decay for all of them, or for those where the tree `decayed(params)` is
    true.
    """
    parts = [running_norm()] if spike_factor else []
    if clip_norm:
        parts.append(optax.clip_by_global_norm(clip_norm))
    parts.append(optax.scale_by_adam(b1, b2, eps))
    if scale is not None:
        parts.append(optax.stateless(lambda updates, params: scale(updates)))
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, decayed))
    parts.append(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(*parts)


class NormState(NamedTuple):
    """The number of updates n, i32[], and the running mean m_n of their gradient norms, f32[]."""

    updates: jax.Array
    mean: jax.Array


def running_norm() -> optax.GradientTransformation:
    """Track m_n = β m_{n-1} + (1 - β) ‖g_n‖, m_0 = 0, and pass the gradient on unchanged.

    β is NORM_DECAY. A skipped update leaves this state unchanged, so its norm is not averaged.
    """

    def init(params: Any) -> NormState:
        return NormState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(grads: Any, state: NormState, params: Any = None) -> tuple[Any, NormState]:
        mean = NORM_DECAY * state.mean + (1 - NORM_DECAY) * optax.tree.norm(grads)
        return grads, NormState(state.updates + 1, mean)

    return optax.GradientTransformation(init, update)


def spike_limit(opt_state: Any, factor: float) -> jax.Array:
    """The gradient norm above which an update is a spike: factor · m_n / (1 - βⁿ), f32[].

    The divisor corrects the bias of the mean as in Adam (Kingma & Ba 2015, Sec. 3). The limit is
    infinite for the first FIRST_NORMS updates. `opt_state` must be that of `make_optimizer` with a
    spike_factor.
    """
    n, mean = opt_state[0]
    average = mean / (1 - NORM_DECAY ** jnp.maximum(n, 1).astype(jnp.float32))
    return jnp.where(n < FIRST_NORMS, jnp.inf, factor * average)
