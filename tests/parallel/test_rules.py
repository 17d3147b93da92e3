"""The mesh fills the devices, and the table of rules puts every large leaf where it says."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from ditjax import build
from ditjax.cli import load_recipe
from ditjax.config import read
from ditjax.errors import UserError
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.training.step import init_state


def recipe(*overrides):
    return read(load_recipe(["--config=experiments/digits.py", *overrides]).to_dict())


def test_shapes():
    assert dict(make_mesh(-1, 1).shape) == {"data": 8, "fsdp": 1}
    assert dict(make_mesh(2, -1).shape) == {"data": 2, "fsdp": 4}
    assert dict(make_mesh(1, 1, jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1}


@pytest.mark.parametrize("sizes", [(3, 1), (2, 2), (16, 1), (3, -1), (16, -1)])
def test_a_mesh_that_does_not_fill_the_devices(sizes):
    with pytest.raises(UserError, match=r"8 device\(s\).*1, 2, 4, 8"):
        make_mesh(*sizes)


def test_two_free_axes():
    with pytest.raises(UserError, match="data and fsdp are both -1"):
        make_mesh(-1, -1)


@pytest.mark.parametrize("block", ["adaln_zero", "adaln", "cross_attention", "in_context"])
def test_nearly_all_of_the_state_is_sharded_by_fsdp(block):
    c = recipe("--config.model.size=4x128x4", f"--config.model.block={block}")
    mesh = make_mesh(2, 4)
    trainee, tx = build.trainee(c), build.optimizer(c)
    state = jax.eval_shape(lambda: init_state(trainee.init(jax.random.key(0)), tx))
    whole = split = 0
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(rules.state_shardings(state, mesh)), strict=True
    ):
        shard = sharding.shard_shape(leaf.shape)
        size, part = leaf.size, int(jnp.prod(jnp.array(shard))) if shard else 1
        assert part in (size, size // 4)
        whole, split = whole + (part == size) * size, split + (part < size) * size
    assert whole / (whole + split) < 0.02


def test_parameter_average_and_moments_share_their_rule():
    mesh = make_mesh(1, 8)
    for prefix in ("params/params", "ema/params", "opt_state/0/mu/params"):
        spec = rules.spec_of(f"{prefix}/blocks/attn/qkv/kernel", (2, 64, 3, 2, 32), mesh)
        assert spec == P(None, "fsdp", None, None, None)
    assert rules.spec_of("params/params/blocks/attn/qkv/bias", (2, 3, 2, 32), mesh) == P()


def test_an_axis_that_does_not_divide():
    with pytest.raises(UserError, match=r"fsdp=8 does not divide .*mlp/in/kernel .*along 36: .*12"):
        rules.spec_of("params/blocks/mlp/in/kernel", (2, 36, 144), make_mesh(1, 8))


def test_a_batch_that_the_devices_do_not_divide():
    with pytest.raises(UserError, match=r"batch_size is 12: .* 8 devices; .*: 16"):
        rules.check_batch(12, make_mesh(-1, 1), "config.train.batch_size")
    rules.check_batch(16, make_mesh(-1, 1), "config.train.batch_size")
