"""Cuboid attention is Earthformer's, and the network of it is what its closed form says."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.files.assets import unflatten
from ditjax.models import cuboid
from ditjax.models.blocks import layer_norm
from ditjax.models.network import Conditions, Inputs
from tests import rain
from tests.seeded import seeded_state

GOLDENS = Path(__file__).parent.parent / "goldens" / "nowcast.npz"
INPUTS = Inputs((2, 16, 16, 1), 1, 1, given=3, past=3)
KEYS = cuboid.CuboidKeys(
    kind="cuboid",
    units=16,
    heads=2,
    depths=(1, 2),
    stem_factors=(2,),
    stem_widths=(8,),
    label_dropout=0.0,
)
C, H = rain.WIDTH, rain.HEADS

# Theirs, parts of one leaf of ours, and how many products it holds.
SELF = {"qkv": (("qkv",), 3), "out": (("proj",), 0)}
SHARED = {**SELF, "global_qkv": (("global_qkv",), 3), "global_out": (("global_proj",), 0)}
SEPARATE = {
    **SELF,
    "token_q": (("l2g_q_net",), 1),
    "global_kv": (("l2g_global_kv_net",), 2),
    "global_q": (("g2l_global_q_net",), 1),
    "token_kv": (("g2l_k_net", "g2l_v_net"), 2),
    "global_qkv": (("g2g_global_qkv_net",), 3),
    "global_out": (("global_proj",), 0),
}
CROSS = {"q": (("q_proj",), 1), "kv": (("kv_proj",), 2), "out": (("proj",), 0)}
ROWS = {"qkv": 3, "global_qkv": 3, "l2g_global_kv_net": 2, "g2g_global_qkv_net": 3, "kv_proj": 2}


def weights(case, names):
    """(our parameters, the scale and bias of their norms) of the seeded weights."""
    shapes: dict[str, tuple[int, ...]] = {"norm.weight": (C,), "norm.bias": (C,)}
    shapes |= {"global_vec_norm.weight": (C,), "global_vec_norm.bias": (C,)}
    for theirs, _ in names.values():
        for name in theirs:
            rows = C * ROWS.get(name, 1)
            shapes |= {f"{name}.weight": (rows, C), f"{name}.bias": (rows,)}
    table = int(np.prod([2 * b - 1 for b in case.cuboid]))
    if not case.memory:
        shapes["relative_position_bias_table"] = (table, H)
    state = rain.cuboid_weights(shapes)
    params: dict[str, Any] = {}
    if not case.memory:
        params["bias_table"] = state["relative_position_bias_table"]
    for ours, (theirs, count) in names.items():
        kernel = np.concatenate([state[f"{name}.weight"] for name in theirs]).T
        bias = np.concatenate([state[f"{name}.bias"] for name in theirs])
        split: tuple[int, ...] = (count, H, C // H) if count else (C,)
        if ours == "q":  # of the cross-attention, which has no axis of one
            split = split[1:]
        params[ours] = {"kernel": kernel.reshape(C, *split), "bias": bias.reshape(split)}
    return {"params": params}, state


def normed(x, state, name):
    return np.asarray(layer_norm(x, 1e-5)) * state[f"{name}.weight"] + state[f"{name}.bias"]


@pytest.mark.parametrize("name", rain.CUBOIDS)
def test_layers_are_earthformers(name):
    """Local, dilated, shifted, padded, axial, with global vectors, and across: 1e-5."""
    case = rain.CUBOIDS[name]
    x, extra = rain.cuboid_inputs(case)
    golden = np.load(GOLDENS)
    if case.memory:
        params, state = weights(case, CROSS)
        apply = jax.jit(cuboid.PlaceAttention(H).apply)
        outputs = [apply(params, normed(x, state, "norm"), jnp.asarray(extra))]
    else:
        names = SEPARATE if case.separate else SHARED if case.globals else SELF
        params, state = weights(case, names)
        layer = cuboid.CuboidAttention(H, case.cuboid, case.shift, case.strategy, case.separate)
        g = normed(extra, state, "global_vec_norm") if case.globals else None
        found = jax.jit(layer.apply)(params, normed(x, state, "norm"), g)
        outputs = [each for each in found if each is not None]
    assert len(outputs) == 1 + bool(case.globals)
    for i, found in enumerate(outputs):
        wanted = golden[f"{name}/{i}"]
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_cuboids_are_a_permutation():
    x = np.arange(2 * 4 * 6 * 6 * 3).reshape(2, 4, 6, 6, 3)
    for strategy in ("lll", "ddd", "ldl"):
        pieces = cuboid.into_cuboids(x, (2, 3, 2), strategy)
        assert pieces.shape == (2, 12, 12, 3)
        np.testing.assert_array_equal(
            cuboid.from_cuboids(pieces, (4, 6, 6), (2, 3, 2), strategy), x
        )


def test_global_vectors_do_not_see_padding():
    """Whatever the cuboids are: with one for all frames, and with smaller ones that are padded."""
    x = np.random.default_rng(0).standard_normal((1, 3, 4, 4, C)).astype(np.float32)
    g = np.random.default_rng(1).standard_normal((1, 2, C)).astype(np.float32)
    found = []
    for size, shift in (((3, 4, 4), (0, 0, 0)), ((2, 3, 3), (1, 1, 1))):
        params, _ = weights(rain.CuboidCase((3, 4, 4), size), SEPARATE)
        apply = jax.jit(cuboid.CuboidAttention(H, size, shift).apply)
        found.append(apply(params, x, g)[1])
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def example(inputs):
    frames = inputs.shape[0] + inputs.past
    channels = jnp.ones((2, frames, *inputs.shape[1:3], inputs.given))
    label = jnp.zeros(2, jnp.int32)
    return jnp.ones((2, *inputs.shape)), label, Conditions(label, channels=channels)


@functools.cache
def network():
    net = cuboid.module(KEYS, INPUTS)
    tree = jax.eval_shape(net.init, jax.random.key(0), *example(INPUTS))["params"]
    shapes = {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return jax.jit(net.apply), {"params": unflatten(seeded_state(shapes, 2))}


def test_the_future_depends_on_all_that_is_given():
    """On the past, on x, on the time; and output frames are those of x."""
    apply, params = network()
    x, t, conditions = example(INPUTS)
    found = apply(params, x, t, conditions)
    assert found.shape == (2, 2, 16, 16, 1)
    past = conditions._replace(channels=conditions.channels.at[:, 0].set(3.0))
    for other in (
        apply(params, x.at[:, 1].set(2.0), t, conditions),
        apply(params, x, t + 500, conditions),
        apply(params, x, t, past),
    ):
        assert np.abs(other - found).max() > 1e-4


@pytest.mark.parametrize("kind", ["axial", "shifted"])
def test_xla_counts_the_multiplications_of_the_formula(kind):
    """XLA's flops are 2 MACs each, and softmaxes and activations beside them."""
    k = cuboid.CuboidKeys(
        kind="cuboid",
        units=128,
        heads=2,
        depths=(1, 1),
        cuboids=kind,
        window=(3, 4, 4),
        global_vectors=4,
        stem_factors=(2,),
        stem_widths=(32,),
        label_dropout=0.0,
    )
    net, args = cuboid.module(k, INPUTS), example(INPUTS)
    params = jax.eval_shape(net.init, jax.random.key(0), *args)
    cost: Any = jax.jit(net.apply).lower(params, *args).cost_analysis()
    # Of a convolution at the rim, XLA counts the pixels that are there alone.
    assert cost["flops"] == pytest.approx(2 * 2 * cuboid.cuboid_macs(k, INPUTS), rel=0.025)


def test_bad_keys_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"an input of 18x18, and .* expected multiples of 4"):
        cuboid.check(KEYS, INPUTS._replace(shape=(2, 18, 18, 1)))
    with pytest.raises(UserError, match=r"'cuboid', a network of clips, and config.data.frames"):
        cuboid.check(KEYS, INPUTS._replace(shape=(16, 16, 1)))
