"""The reader of compiled programs, against programs whose collectives are known beforehand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ditjax.machines import hlo
from ditjax.machines.hlo import Collective, collectives

GOLDENS = Path(__file__).parent.parent / "goldens"


def sharded(shape, *spec):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


def text_of(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_an_all_reduce_of_known_size():
    def total(x):
        return x.sum(0)

    (one,) = collectives(text_of(total, sharded((8, 1000), "fsdp")), 8)
    assert (one.kind, one.payload, one.times) == ("all-reduce", 4000, 1)
    assert one.group == (0, 1, 2, 3)
    assert one.wire_bytes == 2 * 3 / 4 * 4000  # scatter and gather of (g-1)/g each


def scanned():
    """Three layers of y = x W, W [64, 64] split over fsdp and gathered in each."""

    kernels = sharded((3, 64, 64), None, "fsdp", None)
    mesh = kernels.sharding.mesh

    def program(x, kernels):
        def layer(x, kernel):
            kernel = jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, P()))
            return jnp.tanh(x @ kernel), None

        return jax.lax.scan(layer, x, kernels)[0]

    return text_of(program, sharded((16, 64), "data"), kernels)


def test_a_gather_in_a_loop_counts_every_trip():
    text = scanned()
    gathers = [each for each in collectives(text, 8) if each.kind == "all-gather"]
    assert sum(each.times * each.payload for each in gathers) == 3 * 64 * 64 * 4
    assert sum(each.wire_bytes for each in gathers) == 3 * 64 * 64 * 4 * 3 / 4


def test_without_the_backends_word_a_loop_is_as_long_as_its_condition_says():
    text = scanned()
    assert "known_trip_count" in text
    assert collectives(text.replace("known_trip_count", "unknown"), 8) == collectives(text, 8)


def test_a_loop_of_no_known_length_is_refused():
    text = (
        scanned().replace("known_trip_count", "unknown").replace("s32[] constant(3)", "s32[] x()")
    )
    with pytest.raises(ValueError, match="trip count of"):
        collectives(text, 8)


# One layer of the goldens' DiT-2x64x2: qkv, out, and the MLP's two kernels.
LAYER = (64 * 3 * 64, 64 * 64, 64 * 256, 256 * 64)
BF16 = 2


def payloads(found, kind, times):
    """Of the loops' collectives, in elements a call."""
    return sorted(
        n / BF16 for n in (c.payload for c in found if c.kind == kind and c.times == times)
    )


def test_a_tpus_step_gathers_each_kernel_twice_and_scatters_its_gradient():
    """Its asynchronous gathers are chains that repeat them: counting lines gives 34."""
    text = (GOLDENS / "step_tpu.hlo.txt").read_text()
    found = collectives(text, 4)
    in_loops = [c for c in found if c.times == 2]
    gathered = payloads(in_loops, "all-gather", 2)
    assert gathered == sorted([*LAYER, *LAYER, 8 * 6 * 64])  # and adaLN's activations, once
    (scattered,) = [c for c in in_loops if c.kind == "reduce-scatter"]
    assert sorted(scattered.operands) == sorted(LAYER)
    ideal = 2 * BF16 * sum(LAYER) * 3 * 3 / 4  # two layers; 6 (g-1)/g a parameter
    extra = sum(c.wire_bytes for c in in_loops) - ideal
    assert extra == 2 * BF16 * 8 * 6 * 64 * (3 / 4 + 2 * 3 / 4)  # adaLN's gather and all-reduce


def test_a_gpus_step_too():
    found = collectives((GOLDENS / "step_gpu.hlo.txt").read_text(), 8)
    in_loops = [c for c in found if c.times == 2]
    gathers = [c for c in in_loops if c.kind == "all-gather"]
    assert sum(c.payload for c in gathers) / BF16 == 2 * sum(LAYER) + 4 * 6 * 64
    scattered = [c for c in in_loops if c.kind == "reduce-scatter"]
    assert {n for c in scattered for n in c.operands} >= set(LAYER)
    assert {len(c.group) for c in scattered} == {4}
    assert {c.group for c in in_loops if c.kind == "all-gather"} == {(0, 1, 2, 3)}


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("{{0,4},{1,5}}", (0, 4)),
        ("{}", tuple(range(8))),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("mesh['a'=8] {'a':(1)4}", (0, 2, 4, 6)),
    ],
)
def test_groups_of_devices(groups, expected):
    line = f"all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add"
    instruction = hlo._instruction("y", f"f32[4]{{0}} {line}")
    assert hlo._group(instruction, 8) == expected


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("all-gather", 3 / 4),
        ("reduce-scatter", 3 / 4),
        ("all-reduce", 6 / 4),
        ("all-to-all", 3 / 4),
        ("collective-permute", 1),
    ],
)
def test_what_a_ring_sends(kind, share):
    assert Collective(kind, 100.0, (0, 1, 2, 3), times=5).wire_bytes == 500 * share


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[1,64]{1,0:T(8,128)(2,1)S(1)}", 128),
        ("(s32[8]{0}, pred[3]{0}, f8e4m3fn[5]{0})", 32 + 3 + 5),
        ("u4[6]", 3),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert hlo.shape_bytes(shape) == size
