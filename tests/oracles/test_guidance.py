"""Our rules of guidance beside diffusers' on random predictions."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.guiders.guider_utils import rescale_noise_cfg

from ditjax.diffusion.guidance import projected, projected_along, rescaled, zero_star

C, U = np.random.default_rng(0).standard_normal((2, 3, 5, 4, 4)).astype(np.float32)
T = jnp.zeros(3)


def ours(rule, scale):
    return np.asarray(rule(jnp.asarray(C), jnp.asarray(U), jnp.float32(scale), jnp.asarray(C), T))


def in_x0_space(timesteps):
    one = jnp.ones((3, 1, 1, 1))
    return one, 0 * one, one


@pytest.mark.parametrize(("eta", "norm"), [(0.0, 0.0), (1.0, 2.5), (0.3, 5.0)])
def test_apg(eta, norm):
    """Their original formulation, whose scale is ours less 1."""
    expected = normalized_guidance(
        torch.tensor(C), torch.tensor(U), 2.0, None, eta, norm, use_original_formulation=True
    )
    np.testing.assert_allclose(ours(projected(eta, norm, in_x0_space), 3.0), expected, atol=5e-6)


@pytest.mark.parametrize(("eta", "norm"), [(0.0, 0.0), (0.3, 5.0)])
def test_apg_with_momentum(eta, norm):
    """Four evaluations, each of another pair."""
    rng, buffer = np.random.default_rng(1), MomentumBuffer(-0.75)
    rule, memory = projected_along(-0.75, eta, norm, in_x0_space), jnp.zeros(C.shape)
    for _ in range(4):
        c, u = rng.standard_normal((2, *C.shape)).astype(np.float32)
        expected = normalized_guidance(
            torch.tensor(c), torch.tensor(u), 2.0, buffer, eta, norm, use_original_formulation=True
        )
        c, u = jnp.asarray(c), jnp.asarray(u)
        found, memory = rule(c, u, jnp.float32(3), c, T, memory)
        np.testing.assert_allclose(found, expected, atol=5e-6)


def test_rescale():
    c, u = torch.tensor(C), torch.tensor(U)
    expected = rescale_noise_cfg(u + 3.0 * (c - u), c, 0.7)
    np.testing.assert_allclose(ours(rescaled(0.7), 3.0), expected, atol=5e-6)


def test_zero_star():
    c, u = torch.tensor(C), torch.tensor(U)
    share = cfg_zero_star_scale(c.flatten(1), u.flatten(1)).view(-1, 1, 1, 1)
    expected = share * u + 3.0 * (c - share * u)
    np.testing.assert_allclose(ours(zero_star, 3.0), expected, atol=5e-6)
