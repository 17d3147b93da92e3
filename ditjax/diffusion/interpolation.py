"""Points between two vectors, on the arc that leads from one to the other."""

import jax
import jax.numpy as jnp

_STRAIGHT = 1e-4  # radians, below which the arc is a line


def slerp(a: jax.Array, b: jax.Array, share: jax.Array) -> jax.Array:
    """Shoemake 1985: [sin((1-s)φ) a + sin(sφ) b]/sin φ, φ the angle of a and b f32[N,...].

    The share f32[N] of the way is an angle: the speed is constant, and the norm is kept where both
    have the same. The ends are a and b to the bit.
    """

    def rows(each: jax.Array) -> jax.Array:
        return each.reshape(len(a), -1)

    def unit(each: jax.Array) -> jax.Array:
        return rows(each) / jnp.linalg.norm(rows(each), axis=1, keepdims=True)

    apart, along = (
        jnp.linalg.norm(each, axis=1) for each in (unit(a) - unit(b), unit(a) + unit(b))
    )
    angle = 2 * jnp.arctan2(apart, along)  # which is exact for small angles, unlike arccos
    bent = angle > _STRAIGHT
    phi = jnp.where(bent, angle, 1.0)
    first = jnp.where(bent, jnp.sin((1 - share) * phi) / jnp.sin(phi), 1 - share)
    second = jnp.where(bent, jnp.sin(share * phi) / jnp.sin(phi), share)
    return (first[:, None] * rows(a) + second[:, None] * rows(b)).reshape(a.shape)
