"""Weights of a training loss, each stated in x0-space.

‖ŷ - y‖² of any prediction is ‖x̂0 - x0‖² / c_out² (`process.precondition`), so a weight w of the x0
error multiplies the loss in the space of the target by w c_out². SNR = α²/σ².
"""

import dataclasses
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.diffusion.process import Coefficients, Discrete, Process, mixture, precondition
from ditjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Weighting:
    """A weighting by name; 'none' is weight 1 in the space of the target.

    gamma: the bound of 'min_snr', the exponent of 'p2'. bias: b of 'sigmoid'. sigma_data: the
    data's standard deviation, for 'edm'. t_eps: σ is at least
    this in 'velocity' and 'likelihood', whose weights are unbounded at the data.
    """

    name: str = "none"
    gamma: float = 5.0
    bias: float = 1.0
    sigma_data: float = 0.5
    t_eps: float = 0.0


def _snr(c: Coefficients) -> Any:
    return (c.alpha / c.sigma) ** 2


def _velocity(p: Process, c: Coefficients, k: Weighting) -> Any:
    """(D/σ)² of the velocity: every prediction trained by the velocity's loss."""
    a, b = mixture(p, "velocity", c)
    return ((c.alpha * b - c.sigma * a) / jnp.maximum(c.sigma, k.t_eps)) ** 2


def _edm(p: Process, c: Coefficients, k: Weighting) -> Any:
    """Karras et al. 2022 Table 1: (σ² + σ_d²)/(σ σ_d)² of σ/α."""
    ratio = c.sigma / c.alpha
    return (ratio**2 + k.sigma_data**2) / (ratio * k.sigma_data) ** 2


def _likelihood(p: Process, c: Coefficients, k: Weighting) -> Any:
    """Song et al. 2021 (maximum likelihood): -½ dSNR/dt."""
    sigma = jnp.maximum(c.sigma, k.t_eps)
    return c.alpha / sigma**2 * (c.alpha * c.sigma_dot / sigma - c.alpha_dot)


# config.diffusion.weighting -> (process, coefficients, weighting) -> w in x0-space
WEIGHTINGS: Mapping[str, Callable[[Process, Coefficients, Weighting], Any]] = {
    "eps": lambda p, c, k: _snr(c),
    "x0": lambda p, c, k: jnp.ones_like(c.sigma),
    "velocity": _velocity,
    # Hang et al. 2023
    "min_snr": lambda p, c, k: jnp.minimum(_snr(c), k.gamma),
    # Choi et al. 2022, k = 1
    "p2": lambda p, c, k: _snr(c) / (1 + _snr(c)) ** k.gamma,
    "edm": _edm,
    # Kingma & Gao 2023: SNR sigmoid(b - ln SNR)
    "sigmoid": lambda p, c, k: _snr(c) * jax.nn.sigmoid(k.bias - jnp.log(_snr(c))),
    "likelihood": _likelihood,
}
_OF_DERIVATIVES = ("velocity", "likelihood")


def check_weighting(process: Process, name: str) -> None:
    """Raise UserError for a weighting that the process does not have."""
    if name in _OF_DERIVATIVES and isinstance(process, Discrete):
        raise UserError(
            f"weighting {name!r} with a process of discrete steps, which has no derivatives by t:"
            " expected a continuous process, or another weighting."
        )


def weight(process: Process, prediction: str, weighting: Weighting, t: jax.Array) -> jax.Array:
    """Return the weight of the loss in the space of the target: t [B] -> f32[B]."""
    w = WEIGHTINGS[weighting.name](process, process.at(t), weighting)
    return jnp.asarray(w * precondition(process, prediction, t).c_out ** 2, jnp.float32)


# ---- a weight that is learned

UNCERTAINTY_FEATURES = 128


def uncertainty_features(process: Process, t: jax.Array) -> jax.Array:
    """√2 cos(2π(f c + φ)) of c = ¼ ln(σ/α), Karras et al. 2024 (EDM2) App. B.1: t [B] -> f32[B,F].

    f are quantiles of N(0, 1), evenly spaced, and φ fractions of the golden ratio's multiples: the
    same in every run. c is EDM's c_noise; at the ends of a process, where it is infinite, it is
    kept within ±4.
    """
    at, n = process.at(t), UNCERTAINTY_FEATURES
    c = jnp.clip(0.25 * (jnp.log(at.sigma) - jnp.log(at.alpha)), -4.0, 4.0)
    f = np.array([NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)], np.float32)
    phase = np.modf(np.arange(n) * (5**0.5 - 1) / 2)[0].astype(np.float32)
    angle = 2 * np.pi * (c.astype(jnp.float32)[:, None] * f[None] + phase[None])
    return 2**0.5 * jnp.cos(angle)


def uncertain(loss: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Karras et al. 2024 Eq. 14: loss / exp(u) + u -> f32[B].

    Its minimum over u, at one level of noise, is u = ln E[loss]: every level then weighs the same.
    """
    return loss * jnp.exp(-log_variance) + log_variance
