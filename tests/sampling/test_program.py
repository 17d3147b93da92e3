"""What a sample depends on: the seed, its index and its label, never the batch or the devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.errors import UserError
from ditjax.models.network import Conditions
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.sampling.program import batch_sampler, sampling_of
from ditjax.tasks import make_task

MESHES: dict[str, dict[str, Any]] = {
    "data": {"data": 8, "fsdp": 1},
    "fsdp, context, tensor": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
}


def recipe(*overrides):
    small = (
        "--config=experiments/digits.py:2x32x2/2",
        "--config.model.unroll=1",
        "--config.sample.batch_size=8",
        "--config.sample.steps=ddim5",
    )
    return read(load_recipe([*small, *overrides]))


@functools.cache
def noisy_params():
    """Weights far from their start, so that labels and guidance matter."""
    rng = np.random.default_rng(0)
    start = jax.jit(make_task(recipe()).init)(jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), start)


def draw(c, mesh, start, labels=None, scale=1.0):
    c = changed(c, {"sample": {"cfg_scale": scale}})
    task = make_task(c, mesh)
    params = noisy_params()
    params = jax.device_put(params, rules.state_shardings(params, mesh, task.rules))
    sampler = batch_sampler(c, task, mesh)
    keys, conditions, label, _ = sampler.place(c.seed, start, labels)
    guidance = sampling_of(c, task).guidance
    return np.asarray(sampler.program(params, {}, keys, conditions, guidance)), label


@pytest.mark.parametrize(("sampler", "axes"), [("ddim", "fsdp, context, tensor"), ("ddpm", "data")])
def test_a_sample_is_a_function_of_seed_and_index(sampler, axes):
    c = recipe(f"--config.sample.sampler={sampler}", "--config.sample.steps=5")
    images, labels = draw(c, make_mesh(**MESHES[axes]), 0)
    assert images.shape == (8, 8, 8, 1)
    assert images.dtype == np.uint8
    again = recipe(
        f"--config.sample.sampler={sampler}",
        "--config.sample.steps=5",
        "--config.sample.batch_size=4",
    )
    one = make_mesh(1, 1, jax.devices()[:1])
    second, second_labels = draw(again, one, 4)
    np.testing.assert_array_equal(second_labels, labels[4:])
    assert np.abs(second.astype(int) - images[4:].astype(int)).max() <= 1
    assert len({image.tobytes() for image in images}) == 8


def test_labels_and_guidance_are_heard():
    c, mesh = recipe(), make_mesh(8, 1)
    label = np.full(8, 3, np.int32)
    plain, given = draw(c, mesh, 0, label)
    np.testing.assert_array_equal(given, label)
    other, _ = draw(c, mesh, 0, label + 1)
    guided, _ = draw(c, mesh, 0, label, 4.0)
    unguided, _ = draw(c, mesh, 0, label, 1.0 + 1e-6)
    assert (plain != other).any()
    assert (plain != guided).any()
    assert np.abs(unguided.astype(int) - plain.astype(int)).max() <= 1


def test_default_labels_are_uniform():
    c = recipe("--config.sample.batch_size=2000", "--config.sample.steps=ddim2")
    _, labels = draw(c, make_mesh(8, 1), 0)
    counts = np.bincount(labels, minlength=10)
    # Chi-squared with 9 degrees of freedom: 27.9 is its 99.9 % point.
    assert ((counts - 200.0) ** 2 / 200).sum() < 27.9


def test_a_task_that_draws_nothing_has_no_sampler():
    c = read({"task": "autoencoder"})
    with pytest.raises(UserError, match=r"'autoencoder', a KL autoencoder \(f=8\), which draws no"):
        batch_sampler(c, make_task(c), make_mesh(8, 1))


def test_frozen_weights_are_an_argument_of_the_sampler():
    """Of the decoder: a wider one makes no longer a program."""
    lengths, sizes = [], []
    for width in (8, 64):
        section = {"base_width": width, "multipliers": (1, 2), "groups": 4, "res_blocks": 1}
        data = {"image_size": 8, "channels": 1}
        decoder = make_task(read({"task": "autoencoder", "autoencoder": section, "data": data}))
        latent = {"autoencoder": {"kind": "kl", **section}, "sample": {"clip_x0": False}}
        c = changed(recipe(), latent)
        task = make_task(c)
        sampling = sampling_of(c, task)
        params, frozen = (jax.eval_shape(t.init, jax.random.key(0)) for t in (task, decoder))
        lowered = jax.jit(sampling.draw).lower(
            params,
            {"autoencoder": frozen},
            jax.random.split(jax.random.key(0), 2),
            Conditions(label=jnp.zeros(2, jnp.int32)),
            sampling.guidance,
        )
        assert lowered.out_info.shape == (2, 8, 8, 1)
        lengths.append(len(lowered.as_text()))
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(frozen)))
    assert sizes[1] > 30 * sizes[0]
    assert lengths[1] < 1.05 * lengths[0]
