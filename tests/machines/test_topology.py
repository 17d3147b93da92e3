"""Names of machines, and the wires that a group of their devices has."""

from typing import NamedTuple

import pytest

from ditjax.errors import UserError
from ditjax.machines import topology
from ditjax.machines.hlo import Collective
from ditjax.machines.topology import SHAPES, parse_topology, wire_seconds


class Device(NamedTuple):
    """What a TPU says of its place, or a GPU of its node."""

    coords: tuple[int, int, int] = (0, 0, 0)
    slice_index: int = 0
    process_index: int = 0


def test_every_listed_name_is_known_and_says_its_size():
    for chip, shapes in SHAPES.items():
        sizes = [parse_topology(f"{chip}:{shape}").chips for shape in shapes]
        assert sizes == sorted(set(sizes)), chip
    assert parse_topology("v5e:16x16").chips == 256
    assert parse_topology("v5p:16x16x24").chips == 6144
    assert parse_topology("v5e:2x2").larger()[0].name == "v5e:2x4"
    assert parse_topology("v5e:16x16").larger() == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e:16x17", "Did you mean '16x16'? Known: v5e:1x1, v5e:2x2"),
        ("v5e-256", "Expected CHIP:SHAPE such as 'v5e:16x16'"),
        ("v5x:2x2", "Did you mean"),
        ("", "with a chip of v4, v5e"),
        ("h100:12", "h100:8, h100:16"),
    ],
)
def test_a_wrong_name_lists_the_known(name, said):
    with pytest.raises(UserError, match="topology") as error:
        parse_topology(name)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_compiler_is_said_with_its_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in (("v5e:2x2", r"jax\[tpu\]"), ("h100:8", r"jax\[cuda12\]")):
        with pytest.raises(UserError, match=package):
            topology.devices(parse_topology(name))


def torus(name):
    shape = (*parse_topology(name).shape, 1)[:3]
    return [
        Device((x, y, z)) for x in range(shape[0]) for y in range(shape[1]) for z in range(shape[2])
    ]


def seconds_of_a_gather(name, placed, group):
    return wire_seconds(Collective("all-gather", 1e9, group, 1), placed, parse_topology(name))


def test_a_ring_uses_both_directions_and_a_line_one():
    placed = torus("v5e:16x16")
    ring = seconds_of_a_gather("v5e:16x16", placed, tuple(range(16)))
    assert ring == pytest.approx(1e9 * 15 / 16 / (2 * 50e9))
    line = seconds_of_a_gather("v5e:8x8", torus("v5e:8x8"), tuple(range(8)))
    assert line == pytest.approx(1e9 * 7 / 8 / 50e9)


def test_a_group_over_both_axes_uses_both_and_a_stride_shares():
    placed = torus("v5e:16x16")
    both = seconds_of_a_gather("v5e:16x16", placed, tuple(range(256)))
    assert both == pytest.approx(1e9 * 255 / 256 / (4 * 50e9))
    every_fourth = seconds_of_a_gather("v5e:16x16", placed, (0, 4, 8, 12))
    assert every_fourth == pytest.approx(1e9 * 3 / 4 / (2 * 50e9 / 4))
    part = seconds_of_a_gather("v5e:16x16", placed, (0, 1, 2, 3))  # no ring: 4 of 16
    assert part == pytest.approx(1e9 * 3 / 4 / 50e9)


def test_three_dimensions_wrap_in_whole_cubes_only():
    assert parse_topology("v5p:4x4x8").wraps == (True, True, True)
    assert parse_topology("v5p:2x4x4").wraps == (False, False, False)


def test_between_slices_the_network_is_the_narrow_way():
    placed = [Device((0, 0, 0), slice_index=i) for i in (0, 1)]
    got = seconds_of_a_gather("v5e:2x2", placed, (0, 1))
    assert got == pytest.approx(1e9 / 2 / 3.125e9)


def test_nodes_of_gpus_send_once_by_all_their_ports():
    placed = [Device(process_index=i // 8) for i in range(16)]
    assert seconds_of_a_gather("h100:16", placed, tuple(range(8))) == pytest.approx(7 / 8 / 450)
    # Each node takes in the other's half, through eight ports; NVLink spreads it faster than that.
    assert seconds_of_a_gather("h100:16", placed, tuple(range(16))) == pytest.approx(
        max(1 / 2 / (8 * 50), 15 / 16 / 450)
    )
    assert seconds_of_a_gather("h100:16", placed, (0, 8)) == pytest.approx(1 / 2 / 50)
