"""What is trained of a network: the rest keeps its bits, and factors are the merged network."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.errors import UserError
from ditjax.files.assets import unflatten
from ditjax.models.network import Conditions
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.tasks import make_task
from ditjax.tasks.diffusion import denoiser_module
from ditjax.training.program import precise, training
from ditjax.training.transforms import Held, merged_factors, scaled, without_branches
from ditjax.weights.networks import shapes_of

STEPS = 3


def recipe(**adapt):
    words = ("--config=experiments/digits.py:2x32x2/4", "--config.model.unroll=1")
    c = read(load_recipe([*words, "--config.train.batch_size=8", "--config.optim.warmup_steps=0"]))
    return changed(c, {"adapt": {"base": "x", **adapt}})


LORA = {"kind": "lora", "rank": 2, "train": "y_embedder"}


@functools.cache
def base():
    """No weight is zero."""
    rng = np.random.default_rng(0)
    tree: dict[str, Any] = {}
    for path, shape in shapes_of(recipe()).items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = rng.normal(0, 0.2, shape).astype(np.float32)
    return {"params": tree}


def flat(tree):
    return {rules.path_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


@functools.cache
def batch():
    rng = np.random.default_rng(1)
    image = rng.uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32)
    return {"image": image, "label": rng.integers(0, 10, 8).astype(np.int32), "index": None}


def trained(c, mesh):
    """(transform, the frozen base, what is trained before and after some steps, losses)."""
    task = make_task(c, mesh)
    p = training(c, task, mesh)
    frozen = {"base": jax.device_put(base(), rules.state_shardings(base(), mesh, task.rules))}
    state, losses = p.init(base()), []
    before = jax.device_get(state.params)
    for k in range(STEPS):
        with precise(c), p.compiling(k == 0):
            state, metrics = p.step(state, frozen, p.prepare(frozen, p.put(batch()), state.step))
        losses.append(float(metrics["loss"]))
    return task.transform, before, jax.device_get(state.params), losses


@functools.cache
def one_device():
    return trained(recipe(**LORA), make_mesh(1, 1, jax.devices()[:1]))


@functools.cache
def program():
    return jax.jit(denoiser_module(recipe()).apply)


def output(params):
    label = jnp.asarray(batch()["label"])
    t = jnp.arange(8) * 100
    return program()(params, batch()["image"], t, Conditions(label=label))


def test_factors_are_the_base_before_the_first_step():
    transform, before, _, _ = one_device()
    joined = transform.join(base(), before)
    assert all(x.any() != path.endswith("/b") for path, x in flat(before["lora"]).items())
    np.testing.assert_array_equal(output(joined), output(base()))


def test_factors_equal_the_network_that_they_are_merged_into():
    transform, _, after, losses = one_device()
    assert losses[-1] < losses[0]
    factored, merged = output(transform.join(base(), after)), output(transform.merge(base(), after))
    largest = np.abs(merged).max()
    assert np.abs(merged - output(base())).max() > 0.01 * largest
    np.testing.assert_allclose(factored, merged, rtol=0, atol=1e-6 * largest)
    # Only the layers that have factors, and the table that is trained in full.
    same = {
        path
        for path, x in flat(base()).items()
        if (flat(transform.merge(base(), after))[path] == x).all()
    }
    layers = {"attn/qkv", "attn/out", "mlp/in", "mlp/out", "adaln/linear"}
    changed_ones = {f"params/blocks/{layer}/kernel" for layer in layers}
    assert flat(base()).keys() - same == changed_ones | {"params/y_embedder/table"}
    # Scale 0 is the base, to the bit.
    off = merged_factors(base()["params"], scaled(after["lora"], 0.0))
    jax.tree.map(np.testing.assert_array_equal, off, base()["params"])


def test_each_of_q_k_and_v_has_factors_of_its_own():
    _, before, _, _ = one_device()
    assert before["lora"]["blocks"]["attn"]["qkv"]["a"].shape == (2, 3, 32, 2)
    assert before["lora"]["blocks"]["attn"]["qkv"]["b"].shape == (2, 3, 2, 2, 16)
    assert before["lora"]["blocks"]["adaln"]["linear"]["b"].shape == (2, 1, 2, 6, 32)
    # 25 L r D for the five layers of a block, and the table.
    count = sum(x.size for x in jax.tree.leaves(before["lora"]))
    assert count == 25 * 2 * 2 * 32
    a = before["lora"]["blocks"]["mlp"]["out"]["a"]  # U(-1/√D, 1/√D), D = 128
    assert 0.08 < np.abs(a).max() <= 128**-0.5


def test_eight_devices_equal_one():
    *_, expected, losses = one_device()
    *_, found, theirs = trained(recipe(**LORA), make_mesh(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(theirs, losses, rtol=1e-4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-3), found, expected)


def test_some_parameters_of_some_blocks_are_trained_and_no_others():
    c = recipe(kind="partial", train="bias$", blocks=(1, 2))
    transform, before, after, _ = trained(c, make_mesh(1, 1, jax.devices()[:1]))
    np.testing.assert_array_equal(output(transform.join(base(), before)), output(base()))
    assert after["params"]["blocks"]["mlp"]["in"]["bias"].shape == (1, 128)
    joined = flat(transform.join(base(), after))
    for path, leaf in flat(base()).items():
        stays = leaf == joined[path]
        if not path.endswith("bias"):
            assert stays.all(), path
        elif "blocks" in path:
            assert stays[0].all(), path
            assert not stays[1].all(), path
    assert jax.tree.leaves(transform.merge(base(), after))[0].shape == (2, 6, 32)


@pytest.mark.parametrize(
    ("adapt", "words"),
    [
        ({"kind": "partial", "train": "nothing"}, "config.adapt.train is 'nothing', which matches"),
        ({"kind": "partial", "train": "bias", "blocks": (1, 3)}, "the network has 2 blocks"),
        ({"kind": "lora", "targets": "attn"}, "config.adapt.targets is"),
    ],
)
def test_parts_that_do_not_exist_are_refused(adapt, words):
    task = make_task(recipe(**adapt))
    with pytest.raises(UserError, match=words):
        jax.eval_shape(lambda: task.transform.init(base(), jax.random.key(0)))


def test_closing_a_branch_is_closing_its_gate_to_the_bit():
    """Of one block; a branch that is kept keeps its bits, and a value comes out of another."""
    c = recipe()
    inside = make_task(c).inside
    assert inside is not None
    x, t = np.asarray(batch()["image"]), np.full(8, 300)
    conditions = Conditions(label=jnp.asarray(batch()["label"]))
    transform = without_branches(inside.branches, inside.stack)

    def held(branch, block, value=0.0):
        values = np.full((2, 32), value, np.float32)
        return {branch: Held(np.arange(2) != block, values)}

    def read(params):
        return inside.read(params, x, t, conditions, "branches")

    for branch, gate in (("attention", 2), ("mlp", 5)):
        gated = {path: np.array(leaf) for path, leaf in flat(base()["params"]).items()}
        for name in ("kernel", "bias"):
            gated[f"blocks/adaln/linear/{name}"][1, ..., gate, :] = 0
        expected = read({"params": unflatten(gated)})[0]
        closed, taps = read(transform.join(held(branch, 1), base()))
        np.testing.assert_array_equal(closed, expected)
        assert (np.asarray(taps.branches[branch][1]) == 0).all()
        assert (np.asarray(taps.branches[branch][0]) != 0).any()
        value = read(transform.join(held(branch, 1, 0.5), base()))[1].branches[branch]
        np.testing.assert_array_equal(value[1], 0.5)
    same = transform.join(held("mlp", 9), base())
    for path, leaf in flat(base()).items():
        np.testing.assert_array_equal(flat(same)[path], leaf)
