"""What training and sampling depend on: the seed and the index, never the devices."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.tasks import build, programs

STEPS = 50


def recipe(*overrides):
    small = (
        "--config=experiments/digits.py:2x32x2/2",
        "--config.model.unroll=1",
        "--config.train.batch_size=16",
        "--config.sample.batch_size=8",
        "--config.sample.steps=ddim5",
    )
    return read(load_recipe([*small, *overrides]).to_dict())


@functools.cache
def host_batches():
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.uniform(-1, 1, (16, 8, 8, 1)).astype(np.float32),
            "label": rng.integers(0, 10, 16).astype(np.int32),
            "index": np.arange(16),
        }
        for _ in range(STEPS)
    ]


def train(c, mesh):
    """(losses of 50 steps, final averaged parameters)."""
    p = programs.training(c, mesh)
    state = p.init()
    losses = []
    for rows in host_batches():
        state, metrics = p.step(state, p.put(rows))
        # Waited for, as the training waits for the step before the last: XLA's CPU client has 32
        # programs in flight on a device, and with more their collectives wait for one another.
        losses.append(float(metrics["loss"]))
    return np.array(losses), jax.device_get(state.ema)


@functools.cache
def one_device():
    return train(recipe(), make_mesh(1, 1, jax.devices()[:1]))


MESHES: dict[str, dict[str, Any]] = {
    "data": {"data": 8, "fsdp": 1},
    "slices, fsdp": {"data": 1, "fsdp": 4, "slices": 2},
    "data, tensor": {"data": 4, "fsdp": 1, "tensor": 2},
    "fsdp, context, tensor": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
}


@pytest.mark.parametrize("axes", MESHES)
def test_the_same_training_on_one_and_eight_devices(axes):
    losses, ema = train(recipe(), make_mesh(**MESHES[axes]))
    expected, expected_ema = one_device()
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(ema), jax.tree.leaves(expected_ema), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert losses[-5:].mean() < losses[:5].mean(), "it does not learn"


def collectives(axes):
    """(operation, shape, where it comes from) of every exchange in a compiled step."""
    text = programs.training(recipe(), make_mesh(**MESHES[axes])).lower().compile().as_text()
    assert text is not None
    operations = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return re.findall(rf'= (.*?) ({operations})(?:-start)?\(.*op_name="([^"]*)"', text)


def test_data_parallel_training_gathers_nothing():
    assert {kind for _, kind, _ in collectives("data")} == {"all-reduce"}


def test_tensor_parallel_blocks_sum_tokens_twice_each_way():
    """Megatron (Shoeybi et al. 2019, Fig. 4): after attention and after the MLP, and backwards.

    A device has 4 samples of 16 tokens. With adaLN its vectors travel too, without the N.
    """
    tokens = [
        (kind, name.split("blocks/")[-1], "transpose" in name)
        for shape, kind, name in collectives("data, tensor")
        if shape.startswith("f32[64,32]")
    ]
    assert sorted(tokens) == [
        ("all-reduce", "attn/out/dot_general", False),
        ("all-reduce", "attn/qkv/dot_general", True),
        ("all-reduce", "mlp/in/dot_general", True),
        ("all-reduce", "mlp/out/dot_general", False),
    ]


def test_the_same_training_in_microbatches():
    """Random draws are the whole batch's, and no device sends another its rows."""
    c = recipe("--config.train.microbatches=2")
    losses, ema = train(c, make_mesh(1, 1, jax.devices()[:1]))
    expected, expected_ema = one_device()
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(ema), jax.tree.leaves(expected_ema), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    two = make_mesh(2, 1, jax.devices()[:2])
    compiled = programs.training(c, two).lower().compile().as_text() or ""
    assert "while(" in compiled, "the parts are not one after another"
    assert "all-reduce" in compiled
    for moves in ("all-gather", "all-to-all", "collective-permute"):
        assert moves not in compiled


def test_another_seed_is_another_training():
    losses, _ = train(recipe("--config.seed=1"), make_mesh(1, 1, jax.devices()[:1]))
    assert np.abs(losses - one_device()[0]).max() > 1e-3


def test_state_stays_where_the_rules_put_it():
    p = programs.training(recipe(), make_mesh(**MESHES["slices, fsdp"]))
    state = p.init()
    expected = [leaf.sharding for leaf in jax.tree.leaves(p.abstract_state)]
    rows = host_batches()[0]
    for _ in range(3):
        state, _ = p.step(state, p.put(rows))
        assert [leaf.sharding for leaf in jax.tree.leaves(state)] == expected


def test_the_state_is_donated():
    p = programs.training(recipe(), make_mesh(8, 1))
    state = p.init()
    p.step(state, p.put(host_batches()[0]))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def with_nan(rows):
    """The batch with one pixel of one example not a number."""
    image = rows["image"].copy()
    image[3, 5, 2, 0] = np.nan
    return {**rows, "image": image}


AUTOENCODER = (
    "--config.train.network=autoencoder",
    "--config.autoencoder.kind=kl",
    "--config.train.evaluate_every_steps=0",
    "--config.autoencoder.base_width=8",
    "--config.autoencoder.multipliers=(1,2)",
    "--config.autoencoder.groups=4",
    "--config.autoencoder.res_blocks=1",
    "--config.model.patch=1",
)
QUICK = (
    "--config.model.size=1x32x2",
    "--config.diffusion.loss=simple",  # compile faster
    "--config.diffusion.variance=fixed_small",
    "--config.optim.warmup_steps=0",  # else the first update is of rate 0
)
ONE: dict[str, Any] = {"data": 1, "fsdp": 1, "devices": jax.devices()[:1]}


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (MESHES["data"], ()),
        (MESHES["fsdp, context, tensor"], ()),
        (ONE, ("--config.train.microbatches=2",)),
        (ONE, AUTOENCODER),
    ],
    ids=["data", "fsdp, context, tensor", "microbatches", "autoencoder"],
)
def test_a_nan_in_one_example_changes_nothing(axes, words):
    p = programs.training(recipe(*QUICK, *words), make_mesh(**axes))
    state = p.init()
    seen = []
    for k, change in enumerate((dict, with_nan, with_nan, dict)):
        # Copies: the state is donated.
        before = jax.tree.map(np.array, jax.device_get(state))
        state, metrics = p.step(state, p.put(change(host_batches()[k])))
        seen.append(bool(metrics["skipped"]))
        assert np.isnan(metrics["loss"]) == seen[-1]
        assert int(state.step) == k + 1
        for name in ("params", "ema", "opt_state"):
            old, new = jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(state, name))
            same = [np.array_equal(a, b) for a, b in zip(old, new, strict=True)]
            assert all(same) if seen[-1] else not all(same), name
            assert all(np.isfinite(leaf).all() for leaf in new)
    assert seen == [False, True, True, False]


def test_a_spike_is_skipped_where_the_recipe_guards_against_it():
    p = programs.training(recipe(*QUICK, "--config.optim.spike_factor=2.0"), make_mesh(**ONE))
    state = p.init()
    seen = []
    for usual in (1e3, 1e-6):  # norms so far: 100 of them, as of gradients at a thousand, and none
        first, *rest = state.opt_state
        first = first._replace(
            updates=jnp.full_like(first.updates, 100), mean=jnp.full_like(first.mean, usual)
        )
        state = state._replace(opt_state=(first, *rest))
        before = jax.tree.map(np.array, jax.device_get(state.params))
        state, metrics = p.step(state, p.put(host_batches()[0]))
        assert np.isfinite(metrics["loss"])
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True)
        seen.append((bool(metrics["skipped"]), all(np.array_equal(a, b) for a, b in pairs)))
    assert seen == [(False, False), (True, True)]


@functools.cache
def noisy_params():
    """Weights far from their start, so that labels and guidance matter."""
    rng = np.random.default_rng(0)
    noise = lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(noise, one_device()[1])


def draw(c, mesh, start, labels=None, scale=1.0):
    params = noisy_params()
    params = jax.device_put(params, rules.state_shardings(params, mesh))
    c = changed(c, {"sample": {"cfg_scale": scale}})
    return programs.sampling(c, mesh).draw(params, c.seed, start, labels, build.guidance_of(c))


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
