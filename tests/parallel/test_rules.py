"""The mesh fills the devices, and the table of rules puts every large leaf where it says."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from ditjax.cli import load_recipe
from ditjax.config import read
from ditjax.errors import UserError
from ditjax.models.dit import RULES
from ditjax.parallel import rules
from ditjax.parallel.mesh import MESH_AXES, make_mesh
from ditjax.tasks import make_task
from ditjax.tasks.diffusion import placement
from ditjax.training.program import optimizer_of
from ditjax.training.step import init_state
from tests.parallel import sharding


def recipe(*overrides):
    return read(load_recipe(["--config=experiments/digits.py", *overrides]))


def test_shapes():
    def shape(*sizes, **named):
        return tuple(make_mesh(*sizes, **named).shape[axis] for axis in MESH_AXES)

    assert MESH_AXES == ("data", "fsdp", "context", "tensor")
    assert shape(-1, 1) == (8, 1, 1, 1)
    assert shape(2, -1) == (2, 4, 1, 1)
    assert shape(1, 1, jax.devices()[:1]) == (1, 1, 1, 1)
    assert shape(1, 2, tensor=2, context=2) == (1, 2, 2, 2)
    assert shape(-1, 2, tensor=2) == (2, 2, 1, 2)
    assert shape(1, 1, context=-1) == (1, 1, 8, 1)
    assert shape(-1, 2, slices=2) == (4, 2, 1, 1)


def ids(mesh):
    return [[device.id for device in row] for row in mesh.devices.reshape(len(mesh.devices), -1)]


def test_neighbours_speak_most():
    """The last axis is the next device; the first strides over all others."""
    assert make_mesh(2, 1, tensor=4).devices[0, 0, 0].tolist() == jax.devices()[:4]
    assert ids(make_mesh(2, 1, tensor=2, context=2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def fake(index, process, slice_index, platform):
    return SimpleNamespace(
        id=index,
        process_index=process,
        slice_index=slice_index,
        platform=platform,
        device_kind=platform,
        coords=None,
    )


def test_only_data_crosses_slices(monkeypatch):
    """A row of `data` is of one slice, in whatever order the devices come."""
    # Two GPU hosts, whose devices come mixed; and two TPU slices whose numbers go down.
    hosts = [fake(i, i % 2, None, "gpu") for i in range(8)]
    slices = [fake(i, 0, 1 - i // 4, "tpu") for i in range(8)]
    monkeypatch.setattr(
        "ditjax.parallel.mesh.Mesh", lambda devices, *_, **__: SimpleNamespace(devices=devices)
    )
    monkeypatch.setattr(
        "ditjax.parallel.mesh.mesh_utils.create_device_mesh",
        lambda shape, devices, **_: np.array(devices, object).reshape(shape),
    )
    rows = make_mesh(-1, 2, hosts, slices=2).devices.reshape(4, 2)
    assert [[d.process_index for d in row] for row in rows] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    rows = make_mesh(2, 2, slices, slices=2).devices.reshape(4, 2)
    assert [[d.slice_index for d in row] for row in rows] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(UserError, match=r"slices=1, but the 8 .* to 2 slice.*mesh.slices=2"):
        make_mesh(8, 1, slices)
    with pytest.raises(UserError, match=r"slices=4 does not divide 8 .* 2 process.*: .* 1, 2\."):
        make_mesh(2, 1, hosts, slices=4)


@pytest.mark.parametrize(
    ("sizes", "named", "message"),
    [
        (
            (1, 1),
            {"tensor": 3},
            r"data=1, fsdp=1, tensor=3 does not fill 8 device\(s\): .*2, 4, 8;",
        ),
        ((-1, 1), {"context": 16}, r"context=16 does not fill 8"),
        (
            (8, 1),
            {"slices": 2},
            r"fsdp=1 does not fill 4 device\(s\) of each of 2 slices: .*1, 2, 4;",
        ),
        (
            (1, 1),
            {"slices": 3},
            r"slices=3 does not divide 8 device.*: expected one of 1, 2, 4, 8\.",
        ),
        ((-1, 1), {"tensor": -1}, r"data and tensor are both -1"),
        ((-1, -1), {"tensor": -1}, r"data and fsdp and tensor are all -1"),
    ],
)
def test_a_mesh_of_more_axes_that_cannot_be(sizes, named, message):
    with pytest.raises(UserError, match=message):
        make_mesh(*sizes, **named)


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
    task = make_task(c)
    tx = optimizer_of(c, task.rates)
    state = jax.eval_shape(lambda: init_state(task.init(jax.random.key(0)), tx))
    shardings = rules.state_shardings(state, mesh, task.rules)
    whole = split = 0
    for leaf, placed in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        shard = placed.shard_shape(leaf.shape)
        size, part = leaf.size, int(jnp.prod(jnp.array(shard))) if shard else 1
        assert part in (size, size // 4)
        whole, split = whole + (part == size) * size, split + (part < size) * size
    assert whole / (whole + split) < 0.02


def test_parameter_average_and_moments_share_their_rule():
    mesh = make_mesh(1, 8)
    for prefix in ("params/params", "ema/params", "opt_state/0/mu/params"):
        spec = rules.spec_of(f"{prefix}/blocks/attn/qkv/kernel", (2, 64, 3, 2, 32), mesh, RULES)
        assert spec == P(None, "fsdp", None, "tensor", None)
    assert rules.spec_of("params/params/blocks/attn/out/bias", (2, 64), mesh, RULES) == P()


def test_the_recorded_tables_of_large_models():
    """tests/goldens/sharding.txt; `python -m tests.parallel.sharding` makes it again."""
    assert sharding.text() == sharding.FILE.read_text(encoding="utf-8")


def test_a_networks_rules_are_plain_tuples():
    """Its file names mesh axes and imports nothing of JAX's: these make the recorded tables."""
    assert make_task(recipe()).rules == RULES
    for pattern, axes in RULES:
        assert type(pattern) is str
        assert type(axes) is tuple
        assert set(axes) <= {None, *MESH_AXES}


@pytest.mark.parametrize("block", ["adaln_zero", "adaln", "cross_attention", "in_context"])
def test_tensor_splits_a_pair_by_columns_then_rows(block):
    """Each device of `tensor` has whole heads and hidden units, and what belongs to them."""
    c = recipe("--config.model.size=4x128x4", f"--config.model.block={block}")
    mesh = AbstractMesh((1, 1, 1, 4), MESH_AXES)
    params = jax.eval_shape(make_task(c).init, jax.random.key(0))["params"]
    shardings = rules.state_shardings(params, mesh, RULES)
    share = jax.tree.map(lambda leaf, s: s.shard_shape(leaf.shape)[1:], params, shardings)["blocks"]
    assert share["attn"]["qkv"] == {"kernel": (128, 3, 1, 32), "bias": (3, 1, 32)}
    assert share["attn"]["out"] == {"kernel": (32, 128), "bias": (128,)}
    assert share["mlp"]["in"] == {"kernel": (128, 128), "bias": (128,)}
    assert share["mlp"]["out"] == {"kernel": (128, 128), "bias": (128,)}
    if block == "cross_attention":
        assert share["cross"]["q"] == {"kernel": (128, 1, 32), "bias": (1, 32)}
        assert share["cross"]["kv"] == {"kernel": (128, 2, 1, 32), "bias": (2, 1, 32)}
    if block == "adaln_zero":
        assert share["adaln"]["linear"] == {"kernel": (128, 6, 32), "bias": (6, 32)}


def test_a_parameter_without_a_rule_is_not_left_whole():
    def check(sizes, table):
        rules.check_split(params, AbstractMesh(sizes, MESH_AXES), table)

    c = recipe("--config.model.size=6x128x4")
    params = jax.eval_shape(make_task(c).init, jax.random.key(0))
    check((1, 8, 1, 1), RULES)
    kept = tuple(rule for rule in RULES if "mlp" not in rule[0])
    message = (
        r"fsdp=4, tensor=2 leaves [45]\d\.\d% of 1,8\d\d,\d\d\d parameters whole .*at most 2%"
        r".*: .*params/blocks/mlp/(in|out)/kernel \(6, .*fsdp=1, tensor=1"
    )
    with pytest.raises(UserError, match=message):
        check((1, 4, 1, 2), kept)
    check((8, 1, 1, 1), kept)


def test_tokens_and_heads_that_the_mesh_does_not_divide():
    mesh = make_mesh(1, 1, tensor=4, context=2)
    placement(recipe("--config.model.size=2x64x4", "--config.model.patch=2"), mesh)
    with pytest.raises(UserError, match=r"tensor=4 does not divide the model's 2 heads: .* 1, 2\."):
        placement(recipe("--config.model.size=2x64x2", "--config.model.patch=2"), mesh)
    with pytest.raises(UserError, match=r"context=2 does not divide the model's 1 tokens: .* 1\."):
        placement(recipe("--config.model.patch=8"), mesh)
    # 16 tokens, 18 in the blocks: 8 divides the first, 2 both.
    in_context = recipe("--config.model.patch=2", "--config.model.block=in_context")
    with pytest.raises(UserError, match=r"16 tokens and with 2 of conditioning: .* 1, 2\."):
        placement(in_context, make_mesh(1, 1, context=8))


def test_an_activation_that_the_mesh_does_not_divide():
    place = rules.activation_placement(make_mesh(4, 1, context=2))
    with pytest.raises(UserError, match=r"context=2 does not divide tokens \(8, 15, 4\) along 15"):
        jax.eval_shape(lambda x: place("tokens", x), jnp.zeros((8, 15, 4)))


def test_an_autoencoder_trains_over_data_alone():
    c = read(load_recipe(["--config=experiments/digits_latent.py:autoencoder"]))
    make_task(c, make_mesh(8, 1))
    with pytest.raises(UserError, match=r"fsdp=2: the autoencoder .*data alone; legal: fsdp=1"):
        make_task(c, make_mesh(4, 2))


def test_an_axis_that_does_not_divide():
    with pytest.raises(UserError, match=r"fsdp=8 does not divide .*mlp/in/kernel .*along 36: .*12"):
        rules.spec_of("params/blocks/mlp/in/kernel", (2, 36, 144), make_mesh(1, 8), RULES)


def test_a_batch_that_the_devices_do_not_divide():
    with pytest.raises(UserError, match=r"batch_size is 12: .* data x fsdp = 8; .*: 16"):
        rules.check_batch(12, make_mesh(-1, 1), "config.train.batch_size")
    rules.check_batch(16, make_mesh(-1, 1), "config.train.batch_size")
    rules.check_batch(4, make_mesh(2, 2, tensor=2), "config.train.batch_size")
