"""Average velocities of a flow: MeanFlow (Geng et al. 2025, arXiv:2505.13447).

u(x_t, r, t) is the mean of the velocity v over the path from t to r ≤ t, so that one step is exact:
x_r = x_t - (t - r) u. Differentiating (t - r) u by t along the path gives the identity

    u = v - (t - r) du/dt,  du/dt = v·∂u/∂x + ∂u/∂t at fixed r,

whose right side is the target. At r = t it is flow matching. A network is given t and h = t - r.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ditjax.diffusion.process import per_sample

# (x f32[B,H,W,C], t f32[B], h f32[B]) -> f32[B,H,W,C]; without h, at h = 0
IntervalDenoise = Callable[..., jax.Array]


def total_derivative(
    denoise: IntervalDenoise, x: jax.Array, t: jax.Array, h: jax.Array, velocity: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return u and du/dt along dx/dt = velocity at fixed r, where dh/dt = 1: one forward pass."""
    one = jnp.ones_like(t)
    u, derivative = jax.jvp(denoise, (x, t, h), (velocity, one, one))
    return u, derivative


def meanflow_target(
    velocity: jax.Array, derivative: jax.Array, t: jax.Array, r: jax.Array
) -> jax.Array:
    """Geng et al. 2025 Eq. 6: v - (t - r) du/dt, without gradients."""
    return jax.lax.stop_gradient(velocity - per_sample(t - r, velocity.ndim) * derivative)


def null_weight(omega: float, kappa: float) -> float:
    """The weight 1 - ω - κ of the unconditional velocity, 0 where it is only rounding."""
    return round(1 - omega - kappa, 9)


def guided_velocity(
    velocity: jax.Array,
    conditional: jax.Array,
    unconditional: jax.Array,
    omega: float,
    kappa: float,
) -> jax.Array:
    """Geng et al. 2025 App.: ω v + κ u(c,t,t) + (1 - ω - κ) u(∅,t,t), each f32[B,H,W,C].

    Its fixed point is the velocity guided at the scale ω/(1 - κ). Improved MeanFlow's
    v + (1 - 1/w)(u(c,t,t) - u(∅,t,t)) is ω = 1, κ = 1 - 1/w. A term of weight 0 is left out.
    """
    guided = omega * velocity
    for weight, each in ((kappa, conditional), (null_weight(omega, kappa), unconditional)):
        guided = guided + weight * each if weight else guided
    return guided


def adaptively_weighted(error: jax.Array, power: float, offset: float) -> jax.Array:
    """Weigh squared errors summed over a sample by 1/(error + offset)^power: f32[B] -> f32[B]."""
    return error / jax.lax.stop_gradient((error + offset) ** power)
