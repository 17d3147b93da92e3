"""Peaks are of the products that a recipe asks for, and of a device, not of a chip."""

import pytest

from ditjax.machines.chips import RATES, peak_flops
from ditjax.machines.topology import CHIPS


def test_peaks_by_precision():
    assert peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert peak_flops("TPU v5 lite", "float32") == 197e12  # one pass of bfloat16
    assert peak_flops("TPU v5 lite", "float32", "float32") == pytest.approx(197e12 / 6)
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16", "float32") == pytest.approx(989.4e12)
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") == pytest.approx(494.7e12)  # TF32
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32", "float32") == pytest.approx(66.9e12)


def test_a_device_may_be_half_a_chip():
    assert peak_flops("TPU7x", "bfloat16") == 2307e12 / 2
    assert CHIPS["tpu7x"].device_hbm_bytes == 189.5 * 2**30 / 2


def test_no_rate_is_made_up():
    assert peak_flops("cpu", "float32") is None


def test_what_can_be_planned_for_has_rates():
    assert set(CHIPS) <= set(RATES)
    kinds = [kind for rates in RATES.values() for kind in rates.kinds]
    assert len(kinds) == len(set(kinds))
    for rates in RATES.values():
        assert rates.bfloat16 >= rates.float32 > rates.exact
