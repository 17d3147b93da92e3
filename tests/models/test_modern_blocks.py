"""RoPE, QK-norm, SwiGLU and RMSNorm: each against its formula, with its cost, on meshes."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.errors import UserError
from ditjax.models import dit, mup
from ditjax.models.attention import HeadNorm, rms_norm, rotary_table, rotated
from ditjax.models.blocks import SwiGLU
from ditjax.models.network import Conditions, Inputs
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.tasks import make_task

ALL = {"norm": "rms", "mlp": "swiglu", "qk_norm": True, "rope": True}
INPUTS = Inputs(shape=(8, 8, 1), out_channels=2, num_classes=10)
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def recipe(**model):
    c = read(load_recipe(["--config=digits:2x32x2/2"]))
    return changed(c, {"model": model, "train": {"batch_size": 8}, "sample": {"batch_size": 8}})


def shapes(c):
    return jax.eval_shape(make_task(c).init, jax.random.key(0))


def test_rms_norm():
    x = normal(2, 3, 8)
    expected = np.asarray(x) / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(rms_norm(x), expected, rtol=1e-6)


def test_swiglu():
    """silu(x W_g + b_g) (x W_u + b_u) W_o + b_o."""
    x, layer = normal(2, 5, 12), SwiGLU(ratio=1.5)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), layer.init(jax.random.key(0), x))
    p = params["params"]
    W, b = p["gate_up"]["kernel"], p["gate_up"]["bias"]
    assert W.shape == (12, 2, 18)
    gate, up = (x @ W[:, k] + b[k][None, None] for k in range(2))
    expected = (gate / (1 + jnp.exp(-gate)) * up) @ p["out"]["kernel"] + p["out"]["bias"][
        None, None
    ]
    found: Any = layer.apply(params, x)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_head_norm():
    x, layer = normal(2, 3, 4, 8), HeadNorm()
    scale = normal(8)
    found: Any = layer.apply({"params": {"scale": scale}}, x)
    rms = np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found, np.asarray(x) / rms * np.asarray(scale), rtol=1e-5)


def test_rope_turns_pairs_as_complex_numbers():
    rows, columns, d = 3, 5, 8
    x = normal(2, 2, 15, d)
    pairs = np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])
    y, z = np.divmod(np.arange(15), columns)
    omega = np.array([1, 1e4**-0.5])
    angles = np.concatenate([y[:, None] * omega, z[:, None] * omega], 1)
    turned = pairs * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(rotated(x, rows, columns), expected, atol=1e-5)


def test_rope_sees_offsets_alone():
    """The same query and key give the same logit wherever they are, if their offset is the same."""
    q, k = (jnp.broadcast_to(normal(8), (1, 1, 20, 8)) for _ in range(2))
    logits = jnp.einsum("bhnd,bhmd->bhnm", rotated(q, 4, 5), rotated(k, 4, 5))[0, 0]
    grid = np.asarray(logits).reshape(4, 5, 4, 5)
    for dy, dx in itertools.product(range(3), range(4)):
        same = [grid[y, x, y + dy, x + dx] for y in range(4 - dy) for x in range(5 - dx)]
        np.testing.assert_allclose(same, same[0], atol=2e-5)
    assert np.std(grid[0, 0]) > 0.1


def test_tokens_without_a_position_are_not_turned():
    x = normal(1, 2, 8, 8)  # six patches, then a timestep and a label
    found = rotated(x, 2, 3)
    np.testing.assert_array_equal(found[:, :, 6:], x[:, :, 6:])
    assert not np.array_equal(found[:, :, 5], x[:, :, 5])
    cos, sin = rotary_table(2, 3, 8, 8)
    assert np.all(cos[6:] == 1)
    assert np.all(sin[6:] == 0)


@pytest.mark.parametrize("block", ["adaln_zero", "adaln", "cross_attention", "in_context"])
@pytest.mark.parametrize("changes", [{}, *({k: v} for k, v in ALL.items()), ALL], ids=str)
def test_parameters_are_those_of_the_closed_form(block, changes):
    if changes.get("norm") and block in ("cross_attention", "in_context"):
        pytest.skip("its norms have an affine")
    c = recipe(block=block, mlp_ratio=2.0, **changes)
    leaves = jax.tree.leaves(shapes(c))
    s = dit.shape(c.model, INPUTS)
    assert sum(leaf.size for leaf in leaves) == dit.trainable_parameters(s)


def test_gflops_of_swiglu_and_qk_norm():
    """Three products instead of two; and two more norms a block."""

    def macs(**model):
        return dit.forward_macs(dit.shape(recipe(**model).model, INPUTS))

    L, D, N = 2, 32, 16
    assert macs(mlp="swiglu", mlp_ratio=2.0) - macs(mlp_ratio=2.0) == L * N * D * 2 * D
    assert macs(qk_norm=True) - macs() == L * 2 * N * D
    assert macs(rope=True, norm="rms") == macs()
    # The usual 8/3: as many products' elements as GELU's 4.
    assert macs(mlp="swiglu", mlp_ratio=2.625) == macs(mlp_ratio=3.9375)


def test_every_parameter_has_one_kind():
    """μP's table knows the new ones: kernels are hidden, scales vectors."""
    found = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(shapes(recipe(**ALL))):
        name = rules.path_of(path)
        found[name] = mup.kind_of(name, dit.KINDS)
    of = {name.partition("blocks/")[2]: kind for name, kind in found.items()}
    assert of["mlp/gate_up/kernel"] == "hidden"
    assert of["attn/q_norm/scale"] == of["attn/k_norm/scale"] == "vector"


@pytest.mark.parametrize(
    ("sizes", "model"),
    [
        ({"data": 1, "fsdp": 2, "tensor": 2, "context": 2}, ALL),
        ({"data": 2, "fsdp": 4}, ALL),
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"attention_window": 1, "attention_hops": 2}),
    ],
    ids=["all-axes", "fsdp", "windows"],
)
def test_gradients_on_a_mesh_are_those_of_one_device(sizes, model):
    c = recipe(unroll=1, **model)
    key = jax.random.key(0)
    params = jax.tree.map(lambda x: 0.1 * normal(*x.shape), shapes(c))
    batch = {"x0": normal(8, 8, 8, 1), "label": jnp.arange(8, dtype=jnp.int32)}

    def gradients(mesh):
        task = make_task(c, mesh)

        def loss(params, batch):
            return task.loss(params, {}, task.draw(batch, key))[0]

        placed = jax.device_put(params, rules.state_shardings(params, mesh, dit.RULES))
        return jax.jit(jax.value_and_grad(loss), in_shardings=(None, rules.batch_sharding(mesh)))(
            placed, batch
        )

    value, expected = gradients(make_mesh(1, 1, jax.devices()[:1]))
    found, grads = gradients(make_mesh(devices=jax.devices(), **sizes))
    np.testing.assert_allclose(found, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1e-3, float(jnp.abs(b).max())) + 1e-7)


def test_each_key_changes_the_output():
    """None is a switch that is wired to nothing."""
    x, t = normal(2, 8, 8, 1), jnp.asarray([3, 700], jnp.int32)
    label = Conditions(label=jnp.asarray([1, 2], jnp.int32))

    def output(**model):
        c = recipe(**model)
        network = dit.module(c.model, INPUTS)
        rng = np.random.default_rng(3)
        params = jax.tree.map(
            lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.1, jnp.float32),
            shapes(c),
        )
        return np.asarray(network.apply(params, x, t, label))

    plain = output()
    for key, value in ALL.items():
        assert np.abs(output(**{key: value}) - plain).max() > 1e-3, key


def test_keys_that_do_not_go_together():
    with pytest.raises(UserError, match="norm is 'rms' with block 'in_context'"):
        recipe(norm="rms", block="in_context")
    with pytest.raises(UserError, match="rope with heads of width 6: expected a multiple of 4"):
        recipe(size="2x24x4", rope=True)
