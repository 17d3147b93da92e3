"""Training objectives, f32[B] each: L_simple, the bound, DiT's hybrid, MeanFlow, regression."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.diffusion.gaussian import (
    Denoise,
    Variance,
    discretized_gaussian_log_likelihood,
    normal_kl,
    p_mean_variance,
    q_posterior,
    split_channels,
    stateful,
)
from ditjax.diffusion.meanflow import (
    IntervalDenoise,
    adaptively_weighted,
    guided_velocity,
    meanflow_target,
    null_weight,
    total_derivative,
)
from ditjax.diffusion.process import Discrete, Process, per_sample
from ditjax.diffusion.schedule import Schedule, extract
from ditjax.diffusion.weighting import Weighting, weight
from ditjax.errors import UserError


class Objective(NamedTuple):
    """What a network is trained on: the process, what it predicts of it, and how errors count.

    variance: of a discrete process's p(x_{t-1} | x_t). t_eps: see `process.precondition`.
    """

    process: Process
    prediction: str = "eps"
    variance: Variance = "learned_range"
    weighting: Weighting = Weighting()
    t_eps: float = 0.0

    @property
    def schedule(self) -> Schedule:
        """The schedule of a discrete process. Raises UserError for another process."""
        if not isinstance(self.process, Discrete):
            raise UserError(
                "process in continuous time: its variational bound and its variances have no steps;"
                " expected process 'ddpm', or loss 'simple' and a sampler of any process."
            )
        return self.process.schedule


def simple_loss(
    objective: Objective, denoise: Denoise, x0: jax.Array, t: jax.Array, eps: jax.Array
) -> dict[str, jax.Array]:
    """DDPM Eq. 14 on any process: mean over H, W, C of (y - ŷ)², weighted -> loss, mse f32[B].

    x0, eps f32[B,H,W,C], t [B]; mse is not weighted. The variance is ignored: its channels, if the
    network has any, stay untrained.
    """
    process = objective.process
    out = process.evaluate(denoise, process.noised(x0, t, eps), t)
    mse = _mse(objective, out, x0, t, eps)
    return {"loss": _weighted(objective, mse, t), "mse": mse}


def without_x(objective: Objective, denoise: Denoise, shape: tuple[int, ...]) -> jax.Array:
    """x̂0 f32[B,H,W,C] of a network of x0 that is given zeros for x, at the noisiest time."""
    process = objective.process
    t = process.from_unit(jnp.ones(shape[0], jnp.float32))
    x, network = jnp.zeros(shape, jnp.float32), stateful(denoise)
    out, _ = network.step(x, process.c_noise(t), network.start(x))
    return out[..., : shape[-1]].astype(jnp.float32)


def regression_loss(
    objective: Objective, denoise: Denoise, x0: jax.Array, t: jax.Array, eps: jax.Array
) -> dict[str, jax.Array]:
    """The squared error of an estimate of x0 by its conditions alone -> loss, mse f32[B].

    Its minimum is E[x0 | conditions]: the regressor that super-resolution is compared with. x, t
    and eps have no part in it.
    """
    mse = _mean_flat(jnp.square(x0 - without_x(objective, denoise, x0.shape)))
    return {"loss": mse, "mse": mse}


def vlb_loss(
    objective: Objective, denoise: Denoise, x0: jax.Array, t: jax.Array, eps: jax.Array
) -> dict[str, jax.Array]:
    """Nichol & Dhariwal Eqs. 5-6: the bound's term at t, bits/dim -> loss, mse, vlb f32[B].

    It trains both mean and variance. For uniform t, S times this plus the prior term is an unbiased
    estimate of `vlb_bits_per_dim`. x0, eps f32[B,H,W,C], t i32[B].
    """
    process = objective.process
    x_t = process.noised(x0, t, eps)
    out = process.evaluate(denoise, x_t, t)
    vlb = _vlb_term(objective, out, x0, x_t, t)
    return {"loss": vlb, "mse": _mse(objective, out, x0, t, eps), "vlb": vlb}


def hybrid_loss(
    objective: Objective,
    denoise: Denoise,
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    vlb_weight: float = 1.0,
) -> dict[str, jax.Array]:
    """Nichol & Dhariwal Eq. 16: L_simple + λ L_vlb(stop_grad(ε̂), Σ) -> loss, mse, vlb f32[B].

    L_vlb, in bits/dim, trains the variance only. DiT's λ = 1 weighs the term at t; this equals
    Nichol & Dhariwal's λ = .001 of the sum over 1000 steps. x0, eps f32[B,H,W,C], t i32[B].

    Raises UserError for a fixed variance, with which the second term would train nothing.
    """
    if objective.variance != "learned_range":
        raise UserError(
            f"hybrid loss with variance {objective.variance!r}: expected 'learned_range', as its"
            " second term trains the variance alone; learn the variance, or use the simple loss."
        )
    process = objective.process
    x_t = process.noised(x0, t, eps)
    out = process.evaluate(denoise, x_t, t)
    predicted, v = split_channels(out, x0.shape[-1])
    parts = [jax.lax.stop_gradient(predicted)] + ([] if v is None else [v])
    frozen = jnp.concatenate(parts, axis=-1)
    mse = _mse(objective, out, x0, t, eps)
    vlb = _vlb_term(objective, frozen, x0, x_t, t)
    return {"loss": _weighted(objective, mse, t) + vlb_weight * vlb, "mse": mse, "vlb": vlb}


def meanflow_loss(
    objective: Objective,
    denoise: IntervalDenoise,
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    r: jax.Array,
    unconditional: Denoise,
    dropped: jax.Array,
    target_omega: float = 1.0,
    target_kappa: float = 0.0,
    adaptive_power: float = 1.0,
    adaptive_offset: float = 0.01,
    predicted_tangent: bool = False,
) -> dict[str, jax.Array]:
    """Geng et al. 2025 Alg. 1: the error of u against its identity -> loss, mse f32[B].

    x0, eps f32[B,H,W,C], t, r f32[B], r ≤ t. Squares are summed over H, W, C and
    `adaptively_weighted`; mse is their mean. A `dropped` label's velocity, bool[B], is not guided.

    Improved MeanFlow (Geng et al. 2025, arXiv:2512.02012) writes the error as that of
    u + (t - r) sg(du/dt) against v, and takes du/dt along the network's own velocity u(x, t, t)
    (`predicted_tangent`).
    """
    velocity = objective.process.target(x0, t, eps, "velocity")
    x_t = objective.process.noised(x0, t, eps)
    # The compiler leaves out what is not used below.
    own, null = (jax.lax.stop_gradient(network(x_t, t)) for network in (denoise, unconditional))
    guided = guided_velocity(velocity, own, null, target_omega, target_kappa)
    guided = jnp.where(per_sample(dropped, x0.ndim), velocity, guided)
    tangent = own if predicted_tangent else guided
    u, derivative = total_derivative(denoise, x_t, t, t - r, tangent)
    square = jnp.square(u - meanflow_target(guided, derivative, t, r))
    loss = adaptively_weighted(_sum_flat(square), adaptive_power, adaptive_offset)
    return {"loss": loss, "mse": _mean_flat(square)}


class VLB(NamedTuple):
    """The variational bound on -log2 p(x0) in bits/dim: total = prior + sum of terms over t."""

    total: jax.Array  # f32[B]
    prior: jax.Array  # f32[B]: L_T
    terms: jax.Array  # f32[S,B]: L_t at index t; t = 0 is the decoder's NLL


def vlb_bits_per_dim(
    objective: Objective,
    denoise: Denoise,
    x0: jax.Array,
    noise: Callable[[jax.Array], jax.Array],
    *,
    clip_x0: bool = False,
) -> VLB:
    """Nichol & Dhariwal Eqs. 4-7: L_0 + ... + L_T in one lax.scan over t = 0..S-1.

    x0 f32[B,H,W,C]; noise(t i32[]) -> f32[B,H,W,C] is the ε of step t. Published bits/dim of pixels
    use clip_x0.
    """
    schedule, process = objective.schedule, objective.process

    def term(carry: None, i: jax.Array) -> tuple[None, jax.Array]:
        t = jnp.full(x0.shape[:1], i)
        x_t = process.noised(x0, t, noise(i))
        out = process.evaluate(denoise, x_t, t)
        return carry, _vlb_term(objective, out, x0, x_t, t, clip_x0)

    _, terms = jax.lax.scan(term, None, jnp.arange(len(schedule), dtype=jnp.int32))
    prior = _prior_bits_per_dim(schedule, x0)
    return VLB(prior + terms.sum(axis=0), prior, terms)


def _mse(
    objective: Objective, out: jax.Array, x0: jax.Array, t: jax.Array, eps: jax.Array
) -> jax.Array:
    predicted, _ = split_channels(out, x0.shape[-1])
    wanted = objective.process.target(x0, t, eps, objective.prediction)
    return _mean_flat(jnp.square(wanted - predicted))


def _weighted(objective: Objective, mse: jax.Array, t: jax.Array) -> jax.Array:
    if objective.weighting.name == "none":
        return mse
    return weight(objective.process, objective.prediction, objective.weighting, t) * mse


def _vlb_term(
    objective: Objective,
    out: jax.Array,
    x0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    clip_x0: bool = False,
) -> jax.Array:
    """Nichol & Dhariwal Eq. 6: KL(q(x_{t-1}|x_t,x0) || p(x_{t-1}|x_t)), at t=0 Eq. 5 -> f32[B]."""
    schedule = objective.schedule
    p = p_mean_variance(
        schedule,
        out,
        x_t,
        t,
        prediction=objective.prediction,
        variance=objective.variance,
        clip_x0=clip_x0,
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


def _sum_flat(x: jax.Array) -> jax.Array:
    return x.sum(axis=tuple(range(1, x.ndim)))


def _bits_per_dim(nats: jax.Array) -> jax.Array:
    return _mean_flat(nats) / math.log(2)


class Loss(NamedTuple):
    """A training objective: `evaluate(objective, denoise, x0, t, eps, **options)` -> f32[B] each.

    Among what it returns is `loss`. `options` are the keys of config.diffusion that it reads, and
    `requires` the only values of others with which it has a meaning. `interval`: it trains a
    network of two times, denoise(x, t, h) with h = t - r, by forward derivatives. It is given
    r f32[B], the `unconditional` network and which labels are `dropped`, too, and evaluates a
    network `evaluations(**options)` further times. `blind`: its network is never given x.
    """

    evaluate: Callable[..., dict[str, jax.Array]]
    options: tuple[str, ...] = ()
    requires: Mapping[str, Any] = {}
    interval: bool = False
    evaluations: Callable[..., int] = lambda **options: 0
    blind: bool = False


def _meanflow_evaluations(
    *, target_omega: float, target_kappa: float, tangent: bool = False, **options: Any
) -> int:
    own, null = target_kappa != 0 or tangent, null_weight(target_omega, target_kappa) != 0
    return int(own) + int(null)


_MEANFLOW = Loss(
    meanflow_loss,
    options=("target_omega", "target_kappa", "adaptive_power", "adaptive_offset"),
    requires={
        "process": "flow",
        "prediction": "velocity",
        "variance": "none",
        "weighting": "none",
        "time_scale": 1.0,  # du/dt grows with it
        "time_from_noise": False,
        "t_eps": 0.0,
    },
    interval=True,
    evaluations=_meanflow_evaluations,
)

# config.diffusion.loss -> objective
LOSSES: dict[str, Loss] = {
    "hybrid": Loss(hybrid_loss),
    "simple": Loss(simple_loss),
    "vlb": Loss(vlb_loss),
    "regression": Loss(
        regression_loss, requires={"prediction": "x0", "weighting": "none"}, blind=True
    ),
    "meanflow": _MEANFLOW,
    "meanflow_v": _MEANFLOW._replace(
        evaluate=functools.partial(meanflow_loss, predicted_tangent=True),
        evaluations=functools.partial(_meanflow_evaluations, tangent=True),
    ),
}
