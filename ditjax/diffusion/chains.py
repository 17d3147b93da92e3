"""A sampler's steps as Gaussians p(x' | x), and the gradients of a reward of what they end in.

The denoising steps are a policy (Black et al. 2023, arXiv:2305.13301, Sec. 4): a state is (x, t),
an action x', and only x0 has a reward r. With ρ = p(x' | x) / p_old(x' | x) of the weights that
drew x',

    ∇ E[r] = E[Σ_t ∇ log p(x_{t-1} | x_t) r]              (score function, Eq. 3)
           = E_old[Σ_t ρ_t ∇ log p(x_{t-1} | x_t) r]      (importance sampling, Eq. 4).

σ of a step does not depend on the network, so that only means are compared. "mean": a logarithm is
divided by the number of dimensions D, as in the authors' code (ddpo-pytorch): ρ is the D-th root of
the true ratio, and a bound of ρ is in these units.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.diffusion.samplers import Noise, Steps
from ditjax.errors import UserError

Reduction = Literal["mean", "sum"]


class Chains(NamedTuple):
    """n steps from noise to x0 of B samples, and the mean that each step was drawn about."""

    x: jax.Array  # f32[B,n + 1,H,W,C]
    mean: jax.Array  # f32[B,n,H,W,C]


def deviations(steps: Steps) -> np.ndarray:
    """The standard deviation of each step's noise -> f64[n].

    The last step of a sampler adds none; here it has that of the step before it, which is the
    variance that DDPM's decoder has. Without it x0 would be a function of the step before, whose
    own derivative the sum over log p lacks.

    Raises UserError for steps whose noise is not known before they are taken, is absent, or that
    build on each other.
    """
    sigma = steps.sigma
    if sigma is None or jax.tree.leaves(steps.memory) or len(sigma) < 2 or not all(sigma[:-1] > 0):
        raise UserError(
            "steps of a sampler as Gaussians: expected two or more, each with noise of a known"
            " standard deviation and without a memory of those before."
        )
    return np.append(sigma[:-1], sigma[-1] if sigma[-1] > 0 else sigma[-2])


def step_mean(steps: Steps, x: jax.Array, row: Any) -> jax.Array:
    """The mean of x at the next time, f32[B,H,W,C]: the step without its noise."""
    mean, _, _ = steps.step(x, steps.memory, row, lambda i: jnp.zeros((), x.dtype))
    return mean


def draw_chains(steps: Steps, x_T: jax.Array, noise: Noise) -> Chains:
    """Take every step once, from x_T f32[B,H,W,C], the last one with noise, too.

    Up to the last step these are the samples of `samplers.walk` with the same noise.
    """
    sigma = jnp.asarray(deviations(steps), x_T.dtype)

    def move(x: jax.Array, each: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        i, row, sigma = each
        mean = step_mean(steps, x, row)
        x = mean + sigma * noise(i)
        return x, (x, mean)

    _, (x, mean) = jax.lax.scan(move, x_T, (jnp.arange(len(sigma)), steps.rows, sigma))
    x = jnp.concatenate([x_T[None], x])
    return Chains(x.swapaxes(0, 1), mean.swapaxes(0, 1))


def _reduced(values: jax.Array, reduction: Reduction) -> jax.Array:
    flat = values.reshape(len(values), -1)
    return flat.mean(1) if reduction == "mean" else flat.sum(1)


def log_ratio(
    x: jax.Array, mean: jax.Array, old_mean: jax.Array, sigma: jax.Array, reduction: Reduction
) -> jax.Array:
    """log N(x; mean, σ²) - log N(x; old_mean, σ²) -> f32[B].

    It is (mean - old_mean)(2x - mean - old_mean) / 2σ²: as a difference of two sums of squares
    float32 would lose what a clip of 1e-4 compares. At old_mean = mean its gradient is that of
    log p.
    """
    gap = (mean - old_mean) * (2 * x - mean - old_mean)
    return _reduced(gap, reduction) / (2 * jnp.square(sigma))


def clipped_surrogate(log_ratio: jax.Array, advantage: jax.Array, clip: float) -> jax.Array:
    """PPO's max(-A ρ, -A clip(ρ, 1 - clip, 1 + clip)), as in DDPO -> f32[B].

    At ρ = 1 its gradient is the score function's, -A ∇ log p.
    """
    ratio = jnp.exp(log_ratio)
    return jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip, 1 + clip))


def step_divergence(
    mean: jax.Array, reference: jax.Array, sigma: jax.Array, reduction: Reduction
) -> jax.Array:
    """KL(N(mean, σ²) ‖ N(reference, σ²)) = (mean - reference)² / 2σ², DPOK's penalty -> f32[B].

    Fan et al. 2023 (arXiv:2305.16381), Sec. 4.
    """
    return _reduced(jnp.square(mean - reference), reduction) / (2 * jnp.square(sigma))


def advantages(reward: jax.Array, group: int, bound: float) -> jax.Array:
    """(r - mean) / (std + 1e-6) within each run of `group` rewards f32[B], in ±bound -> f32[B]."""
    r = reward.reshape(-1, group)
    centred = r - r.mean(1, keepdims=True)
    return jnp.clip(centred / (r.std(1, keepdims=True) + 1e-6), -bound, bound).reshape(-1)


def preference_loss(
    preferred: jax.Array,
    other: jax.Array,
    reference_preferred: jax.Array,
    reference_other: jax.Array,
    beta: float,
) -> jax.Array:
    """Diffusion-DPO -> f32[B]: -log sigmoid(-β/2 [(e_w - e_l) - (e_w - e_l of the reference)]).

    Wallace et al. 2023 (arXiv:2311.12908) Eq. 14, with the mean squared errors f32[B] of two images
    of one label at one time and noise, as in the authors' code.
    """
    gap = (preferred - other) - (reference_preferred - reference_other)
    return -jax.nn.log_sigmoid(-0.5 * beta * gap)
