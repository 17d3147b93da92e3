"""Objectives, each an f32[B]: L_simple, the variational bound L_vlb, and DiT's hybrid of both."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.diffusion.gaussian import (
    Denoise,
    Prediction,
    Variance,
    discretized_gaussian_log_likelihood,
    normal_kl,
    p_mean_variance,
    predict,
    q_posterior,
    q_sample,
    split_channels,
    target,
)
from ditjax.diffusion.schedule import Schedule, extract
from ditjax.errors import UserError


def sample_timesteps(key: jax.Array, batch: int, num: int) -> jax.Array:
    """DDPM Alg. 1, line 3: t ~ Uniform{0, ..., num-1} -> i32[batch]."""
    return jax.random.randint(key, (batch,), 0, num, jnp.int32)


def stratified_timesteps(indices: np.ndarray, num: int, shift: int) -> np.ndarray:
    """van der Corput 1935, shifted as by Cranley & Patterson 1976: t of pair i -> i32[n].

    t_i = floor(num · frac(φ_2(i) + shift/2^32)), φ_2(i) being i's 32 bits mirrored at the point: a
    function of i alone, and yet the first n pairs leave no part of 0..num-1 out. indices i[n] below
    2^32, shift in 0..2^32-1; integers all through, so the same on every machine.
    """
    bits = np.asarray(indices, np.uint32)
    mirrored = np.zeros_like(bits)
    for k in range(32):
        mirrored |= ((bits >> np.uint32(k)) & np.uint32(1)) << np.uint32(31 - k)
    turned = (mirrored.astype(np.uint64) + np.uint64(shift)) % np.uint64(2**32)
    return (turned * np.uint64(num) >> np.uint64(32)).astype(np.int32)


def simple_loss(
    denoise: Denoise,
    schedule: Schedule,
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_small",
) -> dict[str, jax.Array]:
    """DDPM Eq. 14: mean over H, W, C of (ε - ε̂)², or of x0's or v's error -> loss, mse f32[B].

    x0, eps f32[B,H,W,C], t i32[B]. variance is taken so that the three losses are interchangeable,
    and is not read: variance channels, if the network has any, stay untrained.
    """
    del variance
    out = predict(denoise, schedule, q_sample(schedule, x0, t, eps), t)
    mse = _mse(schedule, out, x0, t, eps, prediction)
    return {"loss": mse, "mse": mse}


def vlb_loss(
    denoise: Denoise,
    schedule: Schedule,
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    prediction: Prediction = "eps",
    variance: Variance = "learned_range",
) -> dict[str, jax.Array]:
    """Nichol & Dhariwal Eqs. 5-6: the bound's term at t, bits/dim -> loss, mse, vlb f32[B].

    Trains mean and variance alike. For uniform t, S times this plus the prior term is an unbiased
    estimate of `vlb_bits_per_dim`. x0, eps f32[B,H,W,C], t i32[B].
    """
    x_t = q_sample(schedule, x0, t, eps)
    out = predict(denoise, schedule, x_t, t)
    vlb = _vlb_term(schedule, out, x0, x_t, t, prediction, variance, clip_x0=False)
    return {"loss": vlb, "mse": _mse(schedule, out, x0, t, eps, prediction), "vlb": vlb}


def hybrid_loss(
    denoise: Denoise,
    schedule: Schedule,
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    prediction: Prediction = "eps",
    variance: Variance = "learned_range",
    vlb_weight: float = 1.0,
) -> dict[str, jax.Array]:
    """Nichol & Dhariwal Eq. 16: L_simple + λ L_vlb(stop_grad(ε̂), Σ) -> loss, mse, vlb f32[B].

    L_vlb, bits/dim, trains the variance only. DiT's λ is 1 on the term at t; Nichol & Dhariwal's
    .001 is on the sum over 1000 steps, the same thing. x0, eps f32[B,H,W,C], t i32[B].

    Raises UserError when the variance is fixed: the second term would train nothing.
    """
    if variance != "learned_range":
        raise UserError(
            f"hybrid loss with variance {variance!r}: expected 'learned_range', as its second term"
            " trains the variance alone; learn the variance, or use the simple loss."
        )
    x_t = q_sample(schedule, x0, t, eps)
    out = predict(denoise, schedule, x_t, t)
    predicted, v = split_channels(out, x0.shape[-1])
    parts = [jax.lax.stop_gradient(predicted)] + ([] if v is None else [v])
    frozen = jnp.concatenate(parts, axis=-1)
    mse = _mse(schedule, out, x0, t, eps, prediction)
    vlb = _vlb_term(schedule, frozen, x0, x_t, t, prediction, variance, clip_x0=False)
    return {"loss": mse + vlb_weight * vlb, "mse": mse, "vlb": vlb}


class VLB(NamedTuple):
    """The variational bound on -log2 p(x0), bits/dim: total = prior + the sum of terms over t."""

    total: jax.Array  # f32[B]
    prior: jax.Array  # f32[B]: L_T
    terms: jax.Array  # f32[S,B]: L_t at index t; t = 0 is the decoder's NLL


def vlb_bits_per_dim(
    denoise: Denoise,
    schedule: Schedule,
    x0: jax.Array,
    noise: Callable[[jax.Array], jax.Array],
    *,
    prediction: Prediction = "eps",
    variance: Variance = "learned_range",
    clip_x0: bool = False,
) -> VLB:
    """Nichol & Dhariwal Eqs. 4-7: L_0 + ... + L_T in one lax.scan over t = 0..S-1.

    x0 f32[B,H,W,C]; noise(t i32[]) -> f32[B,H,W,C] is the ε of step t. clip_x0 is what published
    bits/dim of pixels use.
    """

    def term(carry: None, i: jax.Array) -> tuple[None, jax.Array]:
        t = jnp.full(x0.shape[:1], i)
        x_t = q_sample(schedule, x0, t, noise(i))
        out = predict(denoise, schedule, x_t, t)
        return carry, _vlb_term(schedule, out, x0, x_t, t, prediction, variance, clip_x0)

    _, terms = jax.lax.scan(term, None, jnp.arange(len(schedule), dtype=jnp.int32))
    prior = _prior_bits_per_dim(schedule, x0)
    return VLB(prior + terms.sum(axis=0), prior, terms)


def _mse(
    schedule: Schedule,
    out: jax.Array,
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    prediction: Prediction,
) -> jax.Array:
    predicted, _ = split_channels(out, x0.shape[-1])
    return _mean_flat(jnp.square(target(schedule, x0, t, eps, prediction) - predicted))


def _vlb_term(
    schedule: Schedule,
    out: jax.Array,
    x0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    prediction: Prediction,
    variance: Variance,
    clip_x0: bool,
) -> jax.Array:
    """Nichol & Dhariwal Eq. 6: KL(q(x_{t-1}|x_t,x0) || p(x_{t-1}|x_t)), at t=0 Eq. 5 -> f32[B]."""
    p = p_mean_variance(
        schedule, out, x_t, t, prediction=prediction, variance=variance, clip_x0=clip_x0
    )
    kl = normal_kl(*q_posterior(schedule, x0, x_t, t), p.mean, p.log_variance)
    nll = -discretized_gaussian_log_likelihood(x0, p.mean, 0.5 * p.log_variance)
    return _bits_per_dim(jnp.where((t == 0).reshape(t.shape + (1,) * (x0.ndim - 1)), nll, kl))


def _prior_bits_per_dim(schedule: Schedule, x0: jax.Array) -> jax.Array:
    """Nichol & Dhariwal Eq. 7: KL(q(x_T | x0) || N(0, 1)) -> f32[B]."""
    last = jnp.full(x0.shape[:1], len(schedule) - 1, jnp.int32)
    mean = extract(np.sqrt(schedule.alphas_bar), last, x0.ndim) * x0
    log_variance = extract(np.log1p(-schedule.alphas_bar), last, x0.ndim)
    return _bits_per_dim(normal_kl(mean, log_variance, jnp.float32(0), jnp.float32(0)))


def _mean_flat(x: jax.Array) -> jax.Array:
    return x.mean(axis=tuple(range(1, x.ndim)))


def _bits_per_dim(nats: jax.Array) -> jax.Array:
    return _mean_flat(nats) / math.log(2)
