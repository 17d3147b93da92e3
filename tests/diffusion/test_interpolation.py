"""slerp: its ends, its norm, its speed, and arcs that are nearly lines."""

import jax.numpy as jnp
import numpy as np

from ditjax.diffusion.interpolation import slerp


def test_the_arc_has_constant_norm_and_speed_and_its_ends_are_exact():
    rng, shares = np.random.default_rng(0), np.linspace(0, 1, 5)
    a, b = rng.standard_normal((2, 3, 4)).astype(np.float32)
    a, b = (np.repeat(3 * each[None] / np.linalg.norm(each), 5, 0) for each in (a, b))
    found = np.asarray(slerp(jnp.asarray(a), jnp.asarray(b), jnp.asarray(shares, jnp.float32)))
    np.testing.assert_array_equal(found[[0, -1]], [a[0], b[0]])
    np.testing.assert_allclose(np.linalg.norm(found.reshape(5, -1), axis=1), 3, rtol=1e-6)
    angles = np.arccos(np.clip((found * a).sum((1, 2)) / 9, -1, 1))
    whole = np.arccos((a[0] * b[0]).sum() / 9)
    np.testing.assert_allclose(angles, shares * whole, atol=2e-3)
    assert 0.3 < whole < 2.8


def test_a_short_arc_is_a_line():
    a = jnp.asarray([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    b = jnp.asarray([[1.0, 1e-6], [1.0, 1e-2], [2.0, 0.0]])
    found = slerp(a, b, jnp.full(3, 0.25))
    np.testing.assert_allclose(found, [[1.0, 2.5e-7], [1.0, 2.5e-3], [2.0, 0.0]], rtol=1e-4)
