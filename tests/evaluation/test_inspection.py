"""An instrument on a network that is given channels: it sees them, and nothing else changes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.diffusion.resampling import resized
from ditjax.evaluation.inspection import Instrument
from ditjax.files.assets import unflatten
from ditjax.models.network import Conditions
from ditjax.tasks import given, make_task
from ditjax.tasks.diffusion import denoiser_module
from ditjax.tasks.objective import process_of
from ditjax.weights.networks import shapes_of
from tests.seeded import seeded_state

B, L, N = 3, 2, 4
RNG = np.random.default_rng(0)
IMAGE, EPS = (RNG.uniform(-1, 1, (B, 8, 8, 1)).astype(np.float32) for _ in range(2))
LABEL, T = jnp.arange(B), jnp.int32(300)
GIVEN: dict[str, dict[str, Any]] = {
    "low": {"kind": "low", "side": 4, "noise_most": 0.4, "noise": 0.1},
    "mask": {"kind": "mask"},
}


@functools.cache
def opened(kind):
    """(recipe, instrument, examples with what is given behind them, how many channels that is)."""
    c = read(load_recipe(["--config=digits:2x16x2/4"]))
    c = changed(c, {"given": GIVEN[kind]})
    inside: Any = make_task(c).inside
    params = unflatten(seeded_state(shapes_of(c), 1))
    nothing: Any = None
    images = (nothing, nothing, B, nothing, nothing, nothing)
    tool = Instrument(c, inside, {"params": params}, nothing, nothing, (), (), (1, 2), *images)
    keys = jax.random.split(jax.random.key(1), B)
    x0 = jax.jit(inside.x0)({}, jnp.asarray(IMAGE), keys)
    return c, tool, x0


@pytest.mark.parametrize("kind", GIVEN)
def test_examples_carry_what_samples_are_given(kind):
    c, tool, x0 = opened(kind)
    np.testing.assert_array_equal(tool.own(x0), IMAGE)
    channels = x0[..., 1:]
    assert channels.shape[-1] == given.extra_channels(c)
    if kind == "mask":
        np.testing.assert_array_equal(channels[..., 1:], channels[..., :1] * IMAGE)
        assert tool.inside.levels(B) is None
        return
    # α y + σ ε at a tenth of the noise, enlarged.
    np.testing.assert_array_equal(tool.inside.levels(B), np.full(B, 100))
    at = process_of(c.diffusion).at(np.array([100]))
    clean = resized(resized(jnp.asarray(IMAGE), 4, "area"), 8, "bicubic")
    rest = np.asarray(channels - float(at.alpha[0]) * clean)
    assert 0.3 < rest.std() / float(at.sigma[0]) < 1.2


def test_it_reads_the_network_on_them():
    """The prediction is the network's, of x noised and the channels as they are."""
    c, tool, x0 = opened("low")
    x_t = tool.noised(x0, jnp.asarray(EPS), T)
    np.testing.assert_array_equal(x_t[..., 1:], x0[..., 1:])
    out, taps = tool.observe(tool.params, x_t, LABEL, T, "tokens")
    process = process_of(c.diffusion)
    x = process.noised(jnp.asarray(IMAGE), jnp.full(B, T), jnp.asarray(EPS))
    conditions = Conditions(label=LABEL, channels=x0[..., 1:], level=jnp.full(B, 100))
    expected: Any = denoiser_module(c).apply(tool.params, x, jnp.full(B, T), conditions)
    np.testing.assert_array_equal(out, expected[..., :1])
    np.testing.assert_array_equal(
        tool.through_lens(tool.params, taps.tokens[-1], x_t, LABEL, T), out
    )
    assert (
        tool.x0_of(out, x_t, T).shape == tool.target(x0, jnp.asarray(EPS), T).shape == IMAGE.shape
    )


def test_a_patch_of_all_tokens_is_the_donors_prediction():
    """What is given enters by the tokens alone: the donor's carry its channels, too."""
    _, tool, x0 = opened("low")
    donor = jnp.concatenate([x0[..., :1], x0[::-1, ..., 1:]], axis=-1)
    x_t, other = (tool.noised(each, jnp.asarray(EPS), T) for each in (x0, donor))
    out, taps = tool.observe(tool.params, other, LABEL, T, "tokens")
    plain, _ = tool.observe(tool.params, x_t, LABEL, T)
    mask = jnp.zeros((L, 1, N), bool).at[0].set(True)
    found = tool.patched(tool.params, x_t, LABEL, T, mask, taps.tokens)
    np.testing.assert_array_equal(found, out)
    assert np.abs(plain - out).max() > 1e-3
