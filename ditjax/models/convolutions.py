"""What networks of convolutions share, channels last."""

import jax
import jax.numpy as jnp
from flax import linen as nn


def group_norm(x: jax.Array, groups: int, epsilon: float, name: str) -> jax.Array:
    """GroupNorm of f[B,H,W,C] -> f32[B,H,W,C], a submodule of the module that calls it.

    E[x²] - E[x]² cancels where |mean| >> deviation: the variance is about the mean, as PyTorch's.
    """
    norm = nn.GroupNorm(groups, epsilon=epsilon, use_fast_variance=False, name=name)
    return norm(x.astype(jnp.float32))


def doubled(x: jax.Array) -> jax.Array:
    """Nearest-neighbour upsampling: f[B,H,W,C] -> f[B,2H,2W,C]."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
