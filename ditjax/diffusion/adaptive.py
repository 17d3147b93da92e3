"""Dormand & Prince's method of order 5 with adaptive steps, each sample with its own.

One lax.while_loop over the whole batch: a sample that has arrived is kept as it is. So sample b
depends on its own error alone, not on the batch that it is solved in.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# (t [B], state: a tree of arrays [B,...]) -> the state's derivatives by t
VectorField = Callable[[jax.Array, Any], Any]

# Dormand & Prince 1980, Table 2. The last row of A is the solution of order 5, so that its stage is
# the next step's first.
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_FOURTH = (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)
_ERROR = tuple(a - b for a, b in zip((*_STAGES[-1], 0.0), _FOURTH, strict=True))


class Solved(NamedTuple):
    """The state at the end, the evaluations of each sample i32[B], and whether each arrived."""

    state: Any
    evaluations: jax.Array
    arrived: jax.Array


class _Carry(NamedTuple):
    t: jax.Array
    h: jax.Array
    state: Any
    slope: Any
    error: jax.Array  # of the last accepted step, at least 1e-4
    evaluations: jax.Array


def _of_each(value: jax.Array, leaf: jax.Array) -> jax.Array:
    return value.reshape((-1,) + (1,) * (leaf.ndim - 1))


def _added(state: Any, slopes: list[Any], weights: tuple[float, ...], h: jax.Array) -> Any:
    """Return y + h Σ w_k k of each sample."""

    def add(y: jax.Array, *k: jax.Array) -> jax.Array:
        return y + _of_each(h, y) * sum(w * each for w, each in zip(weights, k, strict=True))

    return jax.tree.map(add, state, *slopes)


def _scaled_rms(error: Any, old: Any, new: Any, rtol: float, atol: float) -> jax.Array:
    """Return the RMS of the error over atol + rtol·|y|, over all of a sample -> f[B]."""

    def squares(e: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        scaled = e / (atol + rtol * jnp.maximum(jnp.abs(a), jnp.abs(b)))
        return jnp.square(scaled).reshape(len(e), -1).sum(axis=1)

    parts = jax.tree.leaves(jax.tree.map(squares, error, old, new))
    size = sum(int(np.prod(leaf.shape[1:])) for leaf in jax.tree.leaves(error))
    return jnp.sqrt(sum(parts) / size)


def _step(
    field: VectorField, c: _Carry, end: float, sign: float, rtol: float, atol: float
) -> _Carry:
    """Try a step of each sample that has not arrived, and keep it where the error allows."""
    left = sign * (end - c.t)
    active = left > 0
    h = jnp.where(active, jnp.minimum(c.h, left), 0.0)
    slopes = [c.slope]
    for node, weights in zip(_NODES[1:], _STAGES[1:], strict=True):
        new = _added(c.state, slopes, weights, sign * h)
        slopes.append(field(c.t + sign * node * h, new))
    zero = jax.tree.map(jnp.zeros_like, c.state)
    e = _scaled_rms(_added(zero, slopes, _ERROR, sign * h), c.state, new, rtol, atol)
    good = active & (e <= 1)
    e = jnp.where(jnp.isfinite(e), jnp.maximum(e, 1e-4), 1e4)
    factor = jnp.clip(0.9 * e ** (-0.7 / 5) * c.error ** (0.4 / 5), 0.2, 10.0)

    def chosen(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(_of_each(good, a), a, b), new, old)

    # The end is set and not summed: a sum might stop short of it by a rounding.
    return _Carry(
        t=jnp.where(good, jnp.where(left <= h, end, c.t + sign * h), c.t),
        h=jnp.where(active, h * factor, c.h),
        state=chosen(new, c.state),
        slope=chosen(slopes[-1], c.slope),
        error=jnp.where(good, e, c.error),
        evaluations=c.evaluations + jnp.where(active, 6, 0),
    )


def dopri5(
    field: VectorField,
    state: Any,
    start: float,
    end: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    first_step: float = 0.01,
    max_steps: int = 1000,
) -> Solved:
    """Solve dy/dt = field(t, y) from `start` to `end`, forwards or backwards; y a tree of [B,...].

    A step is accepted if the RMS of its error over atol + rtol·|y| is at most 1, over all of a
    sample. The next is .9 e^(-.7/5) e_before^(.4/5) times as long, at least .2 and at most 10 times
    (a PI controller). A sample that has not arrived after `max_steps` steps is not finite.
    """
    first = jax.tree.leaves(state)[0]
    batch, kind, sign = first.shape[0], first.dtype, float(np.sign(end - start))
    t = jnp.full((batch,), start, kind)
    carry = _Carry(
        t=t,
        h=jnp.full((batch,), min(first_step, abs(end - start)), kind),
        state=state,
        slope=field(t, state),
        error=jnp.ones((batch,), kind),
        evaluations=jnp.ones((batch,), jnp.int32),
    )

    def unfinished(c: _Carry) -> jax.Array:
        return sign * (end - c.t) > 0

    _, carry = jax.lax.while_loop(
        lambda pair: (pair[0] < max_steps) & jnp.any(unfinished(pair[1])),
        lambda pair: (pair[0] + 1, _step(field, pair[1], end, sign, rtol, atol)),
        (jnp.int32(0), carry),
    )
    arrived = ~unfinished(carry)
    final = jax.tree.map(lambda y: jnp.where(_of_each(arrived, y), y, jnp.nan), carry.state)
    return Solved(final, carry.evaluations, arrived)
