"""The roofline's own arithmetic."""

import pytest

from ditjax.config import read
from ditjax.machines import roofline
from ditjax.models.network import NetworkCost, training_flops
from ditjax.tasks import cost_of


def xl(remat: str) -> NetworkCost:
    return cost_of(read({"model": {"size": "XL", "patch": 2, "remat": remat}}))


def test_the_slowest_resource_bounds_a_step():
    step = roofline.StepTime(compute=3.0, memory=2.0, wires=4.0)
    assert step.overlapped == 4.0
    assert step.sequential == 7.0
    assert roofline.StepTime(compute=1.0, memory=2.0, wires=0.5).sequential == 2.5


def test_flops_of_a_step():
    """Three forwards; full rematerialization a fourth; 'dots' only attention's two products."""
    macs = xl("none").macs
    forward = 2 * macs
    assert training_flops(macs, 10) == 30 * forward
    assert roofline.hardware_flops(xl("none"), 10) == 30 * forward
    assert roofline.hardware_flops(xl("full"), 10) == 40 * forward
    attention = 2 * 2 * 28 * 256 * 256 * 1152  # q k' and its product with v, 28 layers
    assert roofline.hardware_flops(xl("dots"), 10) == 30 * forward + 10 * attention


def test_mfu_at_the_peak_is_one():
    assert roofline.mfu(8e12, seconds=2.0, devices=4, peak=1e12) == 1.0


@pytest.mark.parametrize(("group", "expected"), [(1, 0.0), (16, 5.625), (256, 6 * 255 / 256)])
def test_ideal_fsdp(group, expected):
    assert roofline.fsdp_bytes(1, group) == expected
    assert roofline.fsdp_bytes(1, group, itemsize=4) == 2 * expected


def test_state_and_temporaries_go_to_memory_and_back():
    assert roofline.memory_traffic(3.0, 4.0) == 14.0


@pytest.mark.parametrize(("group", "expected"), [(1, 0.0), (2, 1.0), (16, 1.875)])
def test_a_ring_sends_almost_twice_its_bytes(group, expected):
    assert roofline.all_reduce_bytes(1, group) == expected
