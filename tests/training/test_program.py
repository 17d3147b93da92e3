"""What training depends on: the seed and the step, never the devices."""

import functools
import itertools
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.cli import load_recipe
from ditjax.config import as_tree, changed, read
from ditjax.parallel.mesh import make_mesh
from ditjax.tasks import make_task
from ditjax.training.program import precise, training

STEPS = 50


def recipe(*overrides):
    small = (
        "--config=experiments/digits.py:2x32x2/2",
        "--config.model.unroll=1",
        "--config.train.batch_size=16",
    )
    return read(load_recipe([*small, *overrides]))


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


def programs(c, mesh):
    """The training programs of a recipe, and a step of them as the loop takes it."""
    p, calls = training(c, make_task(c, mesh), mesh), itertools.count()

    def step(state, rows):
        with precise(c), p.compiling(next(calls) == 0):
            return p.step(state, {}, p.prepare({}, p.put(rows), state.step))

    return p, step


def train(c, mesh):
    """(losses of 50 steps, final averaged parameters)."""
    p, step = programs(c, mesh)
    state = p.init()
    losses = []
    for rows in host_batches():
        state, metrics = step(state, rows)
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


@pytest.mark.parametrize("axes", ["data", "slices, fsdp", "fsdp, context, tensor"])
def test_the_same_training_on_one_and_eight_devices(axes):
    losses, ema = train(recipe(), make_mesh(**MESHES[axes]))
    expected, expected_ema = one_device()
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(ema), jax.tree.leaves(expected_ema), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert losses[-5:].mean() < losses[:5].mean(), "it does not learn"


def collectives(axes):
    """(operation, shape, where it comes from) of every exchange in a compiled step."""
    text = programs(recipe(), make_mesh(**MESHES[axes]))[0].lower().compile().as_text()
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
        (kind, "/".join(name.split("/")[-3:]), "transpose" in name)
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
    texts = (programs(each, two)[0].lower().compile().as_text() or "" for each in (c, recipe()))
    compiled, whole = texts
    assert compiled.count("while(") > whole.count("while("), "the parts are not one after another"
    assert "all-reduce" in compiled
    for moves in ("all-gather", "all-to-all", "collective-permute"):
        assert moves not in compiled


def test_another_seed_is_another_training():
    losses, _ = train(recipe("--config.seed=1"), make_mesh(1, 1, jax.devices()[:1]))
    assert np.abs(losses - one_device()[0]).max() > 1e-3


def test_state_stays_where_the_rules_put_it():
    p, step = programs(recipe(), make_mesh(**MESHES["slices, fsdp"]))
    state = p.init()
    expected = [leaf.sharding for leaf in jax.tree.leaves(p.abstract_state)]
    rows = host_batches()[0]
    for _ in range(3):
        state, _ = step(state, rows)
        assert [leaf.sharding for leaf in jax.tree.leaves(state)] == expected


def test_the_state_is_donated():
    p, step = programs(recipe(), make_mesh(8, 1))
    state = p.init()
    step(state, host_batches()[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def with_nan(rows):
    """The batch with one pixel of one example not a number."""
    image = rows["image"].copy()
    image[3, 5, 2, 0] = np.nan
    return {**rows, "image": image}


SMALL_AUTOENCODER = {"base_width": 8, "multipliers": (1, 2), "groups": 4, "res_blocks": 1}


def autoencoder():
    """A recipe of the same data and optimizer."""
    tree = as_tree(recipe(*QUICK))
    shared = {name: tree[name] for name in ("data", "optim", "train")}
    return changed(
        read({"task": "autoencoder", "autoencoder": SMALL_AUTOENCODER}),
        {**shared, "train": {**shared["train"], "evaluate_every_steps": 0}},
    )


QUICK = (
    "--config.model.size=1x32x2",
    "--config.diffusion.loss=simple",  # compile faster
    "--config.diffusion.variance=fixed_small",
    "--config.optim.warmup_steps=0",  # else the first update is of rate 0
)
ONE: dict[str, Any] = {"data": 1, "fsdp": 1, "devices": jax.devices()[:1]}


@pytest.mark.parametrize(
    ("axes", "made"),
    [
        (MESHES["data"], lambda: recipe(*QUICK)),
        (MESHES["fsdp, context, tensor"], lambda: recipe(*QUICK)),
        (ONE, lambda: recipe(*QUICK, "--config.train.microbatches=2")),
        (ONE, lambda: changed(autoencoder(), {"autoencoder": {"multipliers": (1,)}})),
    ],
    ids=["data", "fsdp, context, tensor", "microbatches", "autoencoder"],
)
def test_a_nan_in_one_example_changes_nothing(axes, made):
    p, step = programs(made(), make_mesh(**axes))
    state = p.init()
    seen = []
    for k, change in enumerate((dict, with_nan, with_nan, dict)):
        # Copies: the state is donated.
        before = jax.tree.map(np.array, jax.device_get(state))
        state, metrics = step(state, change(host_batches()[k]))
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
    p, step = programs(recipe(*QUICK, "--config.optim.spike_factor=2.0"), make_mesh(**ONE))
    state = p.init()
    seen = []
    for usual in (1e3, 1e-6):  # norms so far: 100 of them, as of gradients at a thousand, and none
        first, *rest = state.opt_state
        first = first._replace(
            updates=jnp.full_like(first.updates, 100), mean=jnp.full_like(first.mean, usual)
        )
        state = state._replace(opt_state=(first, *rest))
        before = jax.tree.map(np.array, jax.device_get(state.params))
        state, metrics = step(state, host_batches()[0])
        assert np.isfinite(metrics["loss"])
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True)
        seen.append((bool(metrics["skipped"]), all(np.array_equal(a, b) for a, b in pairs)))
    assert seen == [(False, False), (True, True)]


def test_only_the_first_step_is_watched():
    p, _ = programs(recipe(*QUICK), make_mesh(8, 1))
    before = os.readlink("/proc/self/fd/2")
    with p.compiling(True):
        assert os.readlink("/proc/self/fd/2") != before
    with p.compiling(False):
        assert os.readlink("/proc/self/fd/2") == before


def base_of(size):
    """Frozen weights that a loss takes."""
    return {"base": {"w": jnp.linspace(0, 1, size)}}


@functools.cache
def on_frozen_weights():
    """A task whose loss takes frozen weights of any size, and its programs."""
    c, mesh = recipe(*QUICK), make_mesh(**ONE)
    task = make_task(c, mesh)

    def loss(params, frozen, drawn):
        value, metrics = task.loss(params, frozen, drawn)
        return value * frozen["base"]["w"].mean(), metrics

    return training(c, task._replace(loss=loss), mesh)


def test_frozen_weights_are_an_argument_of_the_step():
    """Its text is as long for a thousand times as many: they are no constants of the program."""
    p = on_frozen_weights()
    examples = p.prepare({}, p.put(host_batches()[0]), jnp.int32(0))
    step: Any = p.step
    small, large = (
        step.lower(p.abstract_state, base_of(size), examples).as_text() for size in (100, 100_000)
    )
    assert "tensor<100000xf32>" in large
    assert len(large) < 1.01 * len(small)
    # Others of the same shape are taken by the same program.
    losses = {}
    for times in (1.0, 2.0):
        frozen = jax.tree.map(lambda w, times=times: times * w, base_of(100))
        _, metrics = p.step(p.init(), frozen, examples)
        losses[times] = float(metrics["loss"])
    assert losses[2.0] == pytest.approx(2 * losses[1.0])
    assert step._cache_size() == 1


def test_frozen_weights_are_an_argument_of_what_prepares_a_batch():
    """Of the autoencoder in front of a latent network: a wider one makes no longer a program."""
    lengths, sizes = [], []
    for width in (8, 64):
        section = {"kind": "kl", "path": "none", **SMALL_AUTOENCODER, "base_width": width}
        c = changed(recipe(*QUICK), {"autoencoder": section, "train": {"evaluate_every_steps": 0}})
        p, _ = programs(c, make_mesh(**ONE))
        made = changed(autoencoder(), {"autoencoder": {"base_width": width}})
        frozen = {"autoencoder": jax.eval_shape(make_task(made).init, jax.random.key(0))}
        prepare: Any = p.prepare
        lowered = prepare.lower(frozen, p.put(host_batches()[0]), jnp.int32(0))
        x0 = jax.tree.leaves(lowered.out_info["x0"])[0]
        assert x0.shape == (16, 4, 4, 4)
        lengths.append(len(lowered.as_text()))
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(frozen)))
    assert sizes[1] > 30 * sizes[0]
    assert lengths[1] < 1.05 * lengths[0]
