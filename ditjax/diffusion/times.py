"""Distributions of training times, each a quantile function of u ~ U(0, 1).

A time in (0, 1) rises with the noise; `Process.from_unit` maps it to the process's own time. For
EDM it is σ/(1 + σ), so a logit-normal time is EDM's log-normal σ.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.diffusion.process import Discrete, Process, shifted


def sample_timesteps(key: jax.Array, batch: int, num: int) -> jax.Array:
    """DDPM Alg. 1, line 3: t ~ Uniform{0, ..., num-1} -> i32[batch]."""
    return jax.random.randint(key, (batch,), 0, num, jnp.int32)


@dataclasses.dataclass(frozen=True)
class Times:
    """A distribution of training times.

    mean, std: of the logit of the time, for 'logit_normal'. mode: s of SD3's 'mode'. stratified:
    u_i = (i + U)/B mod 1 over the global batch, in random order, instead of independent u_i (Kingma
    et al. 2021, App. I.1). shift: t ← st/(1 + (s-1)t), which adds ln s to the logit of t. most:
    times are multiplied by it, so that a network of little noise is trained on no more.
    """

    distribution: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    mode: float = 1.29
    stratified: bool = False
    shift: float = 1.0
    most: float = 1.0


def normal_quantile(u: jax.Array) -> jax.Array:
    """Φ⁻¹(u), finite: in float32, u is kept within [2^-24, 1 - 2^-24]."""
    return jax.scipy.special.ndtri(jnp.clip(u, 2.0**-24, 1 - 2.0**-24))


def _cosmap(u: jax.Array) -> jax.Array:
    """Esser et al. 2024 Eq. 21: density 2/(π - 2πt + 2πt²)."""
    return 1 - 1 / (jnp.tan(math.pi / 2 * u) + 1)


def _mode(u: jax.Array, s: float) -> jax.Array:
    """Esser et al. 2024 Eq. 20."""
    return 1 - u - s * (jnp.cos(math.pi / 2 * u) ** 2 - 1 + u)


# config.diffusion.time -> (u, times) -> t in (0, 1)
QUANTILES: Mapping[str, Callable[[jax.Array, Times], jax.Array]] = {
    "uniform": lambda u, k: u,
    "logit_normal": lambda u, k: jax.nn.sigmoid(k.mean + k.std * normal_quantile(u)),
    "mode": lambda u, k: _mode(u, k.mode),
    "cosmap": lambda u, k: _cosmap(u),
}


def draw_times(times: Times, process: Process, key: jax.Array, batch: int) -> jax.Array:
    """Draw the times of a batch -> f32[B], or i32[B] for a discrete process."""
    if times == Times() and isinstance(process, Discrete):
        return sample_timesteps(key, batch, len(process.schedule))
    if times.stratified:
        key_u, key_order = jax.random.split(key)
        rows = jnp.arange(batch, dtype=jnp.float32)
        u = (rows + jax.random.uniform(key_u, (), jnp.float32)) / batch
        u = jax.random.permutation(key_order, u)
    else:
        u = jax.random.uniform(key, (batch,), jnp.float32)
    t = shifted(QUANTILES[times.distribution](u, times), times.shift)
    return process.from_unit(t if times.most == 1 else times.most * t)


def draw_intervals(
    times: Times, process: Process, key: jax.Array, batch: int, share: float
) -> tuple[jax.Array, jax.Array]:
    """Draw t and r ≤ t: two times each, sorted; r = t but for a share of them -> f32[B] each.

    As in MeanFlow (Geng et al. 2025).
    """
    key_one, key_other, key_share = jax.random.split(key, 3)
    one, other = (draw_times(times, process, each, batch) for each in (key_one, key_other))
    t = jnp.maximum(one, other)
    apart = jax.random.bernoulli(key_share, share, (batch,))
    return t, jnp.where(apart, jnp.minimum(one, other), t)


def stratified_timesteps(indices: np.ndarray, num: int, shift: int) -> np.ndarray:
    """The timestep of pair i, floor(num · `_van_der_corput`) -> i32[n], below num.

    Integer arithmetic gives the same t on every machine.
    """
    return (_van_der_corput(indices, shift) * np.uint64(num) >> np.uint64(32)).astype(np.int32)


def stratified_times(
    process: Process, indices: np.ndarray, shift: int, most: float = 1.0
) -> np.ndarray:
    """The time of pair i, spread evenly up to `most` as in `stratified_timesteps` -> [n]."""
    if isinstance(process, Discrete) and most == 1:
        return stratified_timesteps(indices, len(process.schedule), shift)
    u = (_van_der_corput(indices, shift).astype(np.float64) + 0.5) / 2**32
    found = np.asarray(process.from_unit(most * u))
    return found if isinstance(process, Discrete) else found.astype(np.float32)


def _van_der_corput(indices: np.ndarray, shift: int) -> np.ndarray:
    """van der Corput 1935, shifted as in Cranley & Patterson 1976: 2^32 · u_i -> u64[n].

    u_i = frac(φ_2(i) + shift/2^32), where φ_2(i) mirrors i's 32 bits at the point. It depends on i
    alone, yet the first n numbers, for any n, cover (0, 1) evenly. indices i[n] are below 2^32,
    shift is in 0..2^32-1.
    """
    bits = np.asarray(indices, np.uint32)
    mirrored = np.zeros_like(bits)
    for k in range(32):
        mirrored |= ((bits >> np.uint32(k)) & np.uint32(1)) << np.uint32(31 - k)
    return (mirrored.astype(np.uint64) + np.uint64(shift)) % np.uint64(2**32)
