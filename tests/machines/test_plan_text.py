"""A plan in words."""

import pytest

from ditjax.machines import planning
from ditjax.machines.chips import GIB
from ditjax.machines.plan_text import format_plan, format_search, memory_words
from ditjax.models.network import NetworkCost


def plan(**changes):
    made = {
        "label": "compiled, not run",
        "versions": {"jax": "1.2", "libtpu": "3"},
        "topology": "v5e:4x4",
        "slices": 1,
        "chips": 16,
        "mesh": {"data": 1, "fsdp": 16},
        "model": "DiT-S/2",
        "parameters": 33_000_000,
        "tokens": 256,
        "batch_size": 64,
        "microbatches": 1,
        "dtype": "bfloat16",
        "remat": "none",
        "steps": 3600,
        "compile_seconds": 12.3,
        "memory": {
            "fits": True,
            "state_only": False,
            "peak_bytes": 4 * GIB,
            "hbm_bytes": 16 * GIB,
            "over_bytes": 0.0,
            "state_bytes": GIB,
            "frozen_bytes": 0.0,
            "frozen_unknown": "",
        },
        "collectives": [
            {
                "type": "all-gather",
                "axes": ["fsdp"],
                "group": 16,
                "calls": 7,
                "wire_bytes": 2.5e9,
                "seconds": 0.25,
            },
            {
                "type": "all-reduce",
                "axes": ["data", "fsdp"],
                "group": 16,
                "calls": 1,
                "wire_bytes": 4.0,
                "seconds": 1e-9,
            },
        ],
        "wire_bytes": 2.5e9,
        "wire_bytes_a_parameter": 75.8,
        "ideal_fsdp_bytes_a_parameter": 5.625,
        "gradients_by_reduce_scatter": 0.75,
        "roofline": {
            "peak_flops_a_device": 197e12,
            "compute_seconds": 0.5,
            "memory_seconds": 0.1,
            "wire_seconds": 0.25,
            "step_seconds": {"overlapped": 0.5, "sequential": 0.75},
            "images_a_second": {"overlapped": 128.0, "sequential": 85.3},
            "mfu": {"overlapped": 0.9, "sequential": 0.6},
        },
        "cost": {
            "hours": {"overlapped": 0.5, "sequential": 0.75},
            "chip_hours": {"overlapped": 8.0, "sequential": 12.0},
        },
    }
    return made | changes


def test_the_price_that_was_given():
    cost = {**plan()["cost"], "price_a_chip_hour": 3.5}
    line = "28.0 to 42.0 at 3.5 a chip-hour, the price that was given"
    assert line in format_plan(plan(cost=cost)).splitlines()
    assert "price" not in format_plan(plan())


def test_the_whole_plan():
    text = format_plan(plan())
    for words in (
        "DiT-S/2: 33.0M parameters, 256 tokens; batch 64, bfloat16, remat none",
        "v5e:4x4: 16 chips, 16.00 GiB a device; mesh fsdp=16",
        "compiled, not run (12 s): jax 1.2, libtpu 3",
        "fits: 4.00 of 16.00 GiB a device (25%), of which the state is 1.00",
        "a device sends 2.50 GB a step, 75.80 bytes a parameter; ideal FSDP in bfloat16, 6(g-1)/g",
        "75% by reduce-scatter",
        "500.0 ms a step  128 images/s  MFU at most 90%",
        "750.0 ms a step  85.3 images/s  MFU at most 60%",
        "3,600 steps on 16 chips: 0.500 h at best, 0.750 h with nothing hidden: 8.00 to 12.0",
        "assumed:",
    ):
        assert words in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("all-gather")]
    assert row == ["all-gather", "fsdp", "16", "7", "2500.0", "250.00"]
    assert "data+fsdp" not in text, "a few bytes are no row of the table"


def test_what_a_reward_draws():
    """By its closed form; a plan without a reward has no such line."""
    cost = NetworkCost("x", 1, macs=10**9, training_macs=100 * 10**9, passes=400.0, drawn=100.0)
    text = format_plan(plan(rollout=planning._rollout(cost, 64)))
    words = "rollout: 100 of 500 forward passes an example draw what the reward is given"
    assert f"{words}: 1.28e+13 FLOPs a step, 20% of its products" in text
    assert "rollout" not in format_plan(plan())


def test_what_is_too_large():
    memory = plan()["memory"] | {"fits": False, "peak_bytes": 20 * GIB, "over_bytes": 4 * GIB}
    large = plan(memory=memory)
    assert "does not fit: 20.00 of 16.00 GiB a device, over by 4.00 GiB" in memory_words(large)
    state = plan(memory=memory | {"state_only": True})
    assert "the state alone" in memory_words(state)
    for key in ("roofline", "collectives", "cost"):
        del large[key]
    assert format_plan(large).endswith(memory_words(large))
    assert format_search([plan(), large], []).splitlines()[2].endswith("does not fit")


def test_frozen_weights_are_counted_or_said_not_to_be():
    memory = plan()["memory"] | {"frozen_bytes": GIB / 2}
    assert memory_words(plan(memory=memory)) == (
        "fits: 4.00 of 16.00 GiB a device (25%), of which the state is 1.00 and frozen weights 0.50"
    )
    unknown = plan()["memory"] | {"frozen_unknown": "t5 is missing."}
    assert memory_words(plan(memory=unknown)).endswith("not counted: t5 is missing.")


@pytest.mark.parametrize("skipped", [[], ["mesh fsdp=5: why"]])
def test_a_search(skipped):
    text = format_search([plan()], skipped)
    assert text.splitlines()[1].split() == [
        "1",
        "fsdp=16",
        "none",
        "64",
        "4.00",
        "500.0",
        "750.0",
        "85.3",
        "60%",
        "2.50",
    ]
    assert ("not compiled (1):" in text) == bool(skipped)
