"""Averages of the weights that are kept beside the EMA, and averages of any width made of them.

A power-function average (Karras et al. 2024, EDM2, Sec. 3 and App. C) of the weights θ_k after
update k = 1, 2, ... is, after update n,

    θ̄_n = θ̄_{n-1} + (1 - β_n)(θ_n - θ̄_{n-1}),    β_n = (1 - 1/n)^(γ+1).

β_1 is 0, so the initial weights have no share. θ_k has the share (k^(γ+1) - (k-1)^(γ+1)) / n^(γ+1),
the integral over (k-1, k] of the profile

    p(τ) = (γ+1) τ^γ / n^(γ+1),    0 < τ <= n.

The width of the profile is σ_rel, its standard deviation over n. It does not change as n grows.
Averages are linear in the weights: the average of another width is the sum of stored ones whose
profiles add up to its own, found by least squares (`coefficients`).
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

POWER, EMA = "power:", "ema:"  # prefixes of an average's name, before its std or its decay
# Not an average: "held:8" are the weights after the last update whose number 8 divides, "held:0"
# those that training started from.
HELD = "held:"


class Averages(NamedTuple):
    """The number of updates n, i32[], and an average for each name, such as 'power:0.05'."""

    updates: jax.Array
    trees: dict[str, Any]


def exponent_of(std: float) -> float:
    """γ of the profile with the relative standard deviation σ_rel = `std`.

    The real root above 0 of γ³ + 7γ² + (16 - σ⁻²)γ + 12 - σ⁻², for σ below 12^(-1/2).
    """
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(roots[np.isreal(roots)].real.max())


def share_of_newest(name: str, n: jax.Array) -> jax.Array | float:
    """1 - β_n, the share of the newest weights in an average after update n, f32[]."""
    if name.startswith(EMA):
        return 1 - float(name.removeprefix(EMA))
    power = exponent_of(float(name.removeprefix(POWER))) + 1
    # Not 1 - β: late in a training float32 would keep three digits of it.
    return -jnp.expm1(power * jnp.log1p(-1 / n.astype(jnp.float32)))


def no_averages(params: Any, names: Iterable[str]) -> Any:
    """The averages before the first update, copies of the parameters; () without names."""
    trees = {name: jax.tree.map(jnp.copy, params) for name in names}
    return Averages(jnp.zeros((), jnp.int32), trees) if trees else ()


def updated_averages(averages: Any, params: Any) -> Any:
    """The averages after an update whose result is `params`."""
    if averages == ():
        return averages
    n = averages.updates + 1

    def update(name: str, tree: Any) -> Any:
        if name.startswith(HELD):
            every = int(name.removeprefix(HELD))
            new = n % every == 0 if every else False
            return jax.tree.map(lambda a, p: jnp.where(new, p, a), tree, params)
        share = share_of_newest(name, n)
        return jax.tree.map(lambda a, p: a + share * (p - a), tree, params)

    return Averages(n, {name: update(name, tree) for name, tree in averages.trees.items()})


def held_weights(averages: Any) -> dict[str, Any]:
    """The weights that are held, by name; {} if there are none."""
    trees = averages.trees if averages != () else {}
    return {name: tree for name, tree in trees.items() if name.startswith(HELD)}


def inner_product(
    time_a: ArrayLike, exponent_a: ArrayLike, time_b: ArrayLike, exponent_b: ArrayLike
) -> NDArray[np.float64]:
    """∫ p_a p_b dτ of two profiles with the ends n = `time` and the exponents γ; broadcasts.

    With s the earlier end and γ_s its exponent, (γ_a+1)(γ_b+1)(s/l)^γ_l / ((γ_a+γ_b+1) l), where l
    is the later end and γ_l its exponent.
    """
    ta, ga, tb, gb = (np.asarray(x, np.float64) for x in (time_a, exponent_a, time_b, exponent_b))
    later = np.maximum(ta, tb)
    ratio = (np.minimum(ta, tb) / later) ** np.where(ta < tb, gb, ga)
    return (ga + 1) * (gb + 1) * ratio / ((ga + gb + 1) * later)


def coefficients(
    times: ArrayLike, stds: ArrayLike, time: float, std: float
) -> tuple[NDArray[np.float64], float]:
    """The stored averages' coefficients in the average of the width `std` after update `time`.

    Least squares over the profiles: A x = b with A and b their inner products; then x is divided by
    its sum, as the coefficients of an average must add up to 1. `times` and `stds` f64[m] describe
    the stored averages, each pair once. Returns (x f64[m], ‖Σ x_i p_i - p‖ / ‖p‖).
    """
    t, s = np.asarray(times, np.float64), np.asarray(stds, np.float64)
    g = np.array([exponent_of(float(each)) for each in s])
    wanted = time, exponent_of(std)
    A = inner_product(t[:, None], g[:, None], t, g)
    b = inner_product(t, g, *wanted)
    scale = np.sqrt(np.diag(A))  # unit profiles: the matrix is better conditioned
    x = np.linalg.solve(A / np.outer(scale, scale), b / scale) / scale
    x /= x.sum()
    norm = float(inner_product(*wanted, *wanted))
    squared = norm - 2 * float(x @ b) + float(x @ A @ x)
    return x, math.sqrt(max(squared, 0.0) / norm)
