"""What a recipe would cost: closed forms against arithmetic by hand, and their table."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from ditjax.cli import load_recipe
from ditjax.config import Config, changed, migrated, read
from ditjax.errors import UserError
from ditjax.machines import costs, planning, topology
from ditjax.machines.chips import GIB
from ditjax.machines.cost_text import cost_text
from ditjax.tasks import cost_of

ROOT = Path(__file__).parent.parent.parent
V5E = topology.parse_topology("v5e:4x4")


@pytest.fixture(scope="module")
def xl2() -> Config:
    return read(load_recipe(["--config=experiments/imagenet256.py:XL/2"]))


def test_products_bound_the_training_from_below(xl2):
    found = costs.estimate(xl2, V5E)
    # 6 operations a multiply-accumulate, 16 chips of 197e12 a second.
    products = 6e9 * cost_of(xl2).gflops * 256 * 400_000 / (16 * 197e12)
    assert found.best == pytest.approx(products / 3600)
    assert found.chips == 16
    assert found.label == "estimated in closed form, not run"


def seconds(hours: float) -> float:
    """Of a step."""
    return hours * 3600 / 400_000


def test_what_is_not_hidden_is_the_gradients_all_reduce(xl2):
    found = costs.estimate(xl2, V5E)
    # 4 bytes a parameter, 2·15/16 of them, over two directions of 50 GB/s.
    sent = 4 * cost_of(xl2).parameters * 2 * 15 / 16
    assert seconds(found.worst - found.best) == pytest.approx(sent / 100e9)
    assert found.needed == pytest.approx(16 * cost_of(xl2).parameters)
    assert found.hbm == pytest.approx(15.75 * GIB)
    assert found.fits


def test_fsdp_splits_the_state_and_sends_parameters(xl2):
    parameters = cost_of(xl2).parameters
    split = costs.estimate(changed(xl2, {"mesh": {"data": 2, "fsdp": 8}}), V5E)
    assert split.needed == pytest.approx(2 * parameters)
    # bfloat16 parameters twice and gradients once over 8, then a shard's gradients over 2.
    sent = 3 * 2 * parameters * 7 / 8 + 4 * parameters / 8
    assert seconds(split.worst - split.best) == pytest.approx(sent / 100e9)


def test_where_links_bound_the_best_all_of_them_send_the_least(xl2):
    c = changed(xl2, {"train": {"batch_size": 16}, "mesh": {"data": 2, "fsdp": 8}})
    parameters = cost_of(c).parameters
    # Gathered once, scattered once, the shard's gradients all-reduced in bfloat16: four links.
    sent = 2 * 2 * parameters * 7 / 8 + 2 * parameters / 8
    assert seconds(costs.estimate(c, V5E).best) == pytest.approx(sent / 200e9)
    assert seconds(costs.estimate(c, topology.parse_topology("v5p:2x2x4")).best) == pytest.approx(
        sent / 600e9
    )


def test_a_tiny_batch_on_few_chips_is_bound_by_memory(xl2):
    c = changed(xl2, {"model": {"size": "S"}, "train": {"batch_size": 1}, "mesh": {"data": 1}})
    state = 16 * cost_of(c).parameters
    one = costs.estimate(c, topology.parse_topology("v5e:1x1"))
    assert seconds(one.best) == seconds(one.worst) == pytest.approx(2 * state / 819e9)


# What the real train step needs by experiments/results/plan_*.json, compiled for the hardware.
def test_estimates_hold_the_recorded_plans():
    checked = 0
    for file in sorted((ROOT / "experiments" / "results").glob("plan_*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        for plan in found.get("search", [found, found.get("smallest") or {}]):
            if "roofline" not in plan:
                continue
            c = read(migrated(plan["config"]))
            cost = costs.estimate(c, topology.parse_topology(plan["topology"]))
            hours = plan["cost"]["hours"]
            scale = plan["steps"] / c.train.steps
            assert cost.best * scale <= hours["overlapped"] * 1.001, file.name
            # XLA sends more than it must where it rematerializes, less where it can.
            assert 0.75 < cost.worst * scale / hours["sequential"] < 1.5, file.name
            assert cost.chips == plan["chips"]
            checked += 1
    assert checked >= 5


def test_samples_along_training_are_counted(xl2):
    final = costs.sampling_hours(xl2, V5E)
    assert final == pytest.approx(2e9 * cost_of(xl2).gflops * 250 * 50_000 / (16 * 197e12) / 3600)
    along = changed(
        xl2,
        {
            "train": {"evaluate_every_steps": 100_000, "evaluate_num": 10_000},
            "evaluate": {"features": "inception:x"},
        },
    )
    assert costs.sampling_hours(along, V5E) == pytest.approx(final * 90_000 / 50_000)
    guided = changed(xl2, {"sample": {"cfg_scale": 1.5}})
    assert costs.sampling_hours(guided, V5E) == pytest.approx(2 * final)


def test_between_nodes_the_network_is_the_wire(xl2):
    gradients = 2 * cost_of(xl2).parameters
    products = 6e9 * cost_of(xl2).gflops * 256
    two = changed(xl2, {"mesh": {"slices": 2}})
    for c, machine, chips, low, high, peak in (
        (xl2, "h100:8", 8, 450e9, 450e9, 989.4e12),
        (xl2, "h100:16", 16, 400e9, 400e9, 989.4e12),
        (two, "v5e:4x4", 32, 50e9, 50e9, 197e12),
        (two, "v5e:1x1", 2, 3.125e9, 3.125e9, 197e12),
        (two, "v5e:16x16", 512, 200e9, 100e9, 197e12),
    ):
        found = costs.estimate(
            changed(c, {"train": {"batch_size": 512}}), topology.parse_topology(machine)
        )
        assert found.chips == chips
        compute, sent = 2 * products / (chips * peak), gradients * 2 * (chips - 1) / chips
        assert seconds(found.worst) == pytest.approx(
            max(compute, memory(c, machine)) + 2 * sent / high
        )
        assert seconds(found.best) == pytest.approx(max(compute, memory(c, machine), sent / low))


def memory(c: Config, machine: str) -> float:
    """The state, read and written."""
    rate = topology.parse_topology(machine).chip.hbm_gb_s * 1e9
    return 2 * 16 * cost_of(c).parameters / rate


def test_a_mesh_that_does_not_fill_the_slice(xl2):
    with pytest.raises(UserError, match="does not fill 16 device"):
        costs.estimate(changed(xl2, {"mesh": {"data": 3, "fsdp": 3}}), V5E)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_a_plan_without_its_compiler_is_one_line(xl2):
    with pytest.raises(UserError, match="compiled by libtpu, which is not installed"):
        costs.compiled(xl2, V5E)


def test_the_plans_hours_are_taken_as_they_are(xl2, monkeypatch):
    plan = {
        "chips": 16,
        "memory": {"peak_bytes": 20 * GIB, "hbm_bytes": 15 * GIB},
        "cost": {"hours": {"overlapped": 1.0, "sequential": 2.0}},
    }
    monkeypatch.setattr(planning, "make_plan", lambda *_: plan)
    found = costs.compiled(xl2, V5E)
    assert (found.label, found.best, found.worst) == ("compiled, not run", 1.0, 2.0)
    assert not found.fits
    del plan["cost"]  # it does not fit: nothing is known of its time
    assert math.isnan(costs.compiled(xl2, V5E).best)


def test_the_table():
    one = costs.Cost("estimated", 16, 1.0, 1.5, 0.25, 8 * GIB, 15.75 * GIB)
    text = cost_text("v5e:4x4", ["DiT-S-p8", "DiT-XL-p2"], [one, one._replace(needed=20 * GIB)])
    lines = text.splitlines()
    assert lines[0] == "on v5e:4x4, 16 chips (estimated):"
    assert lines[2].split() == [
        "DiT-S-p8",
        "1.00",
        "1.50",
        "0.250",
        "20.0",
        "28.0",
        "8.00",
        "of",
        "15.75",
    ]
    assert "does not fit" in lines[3]
    assert lines[4].split() == ["2", "cells", "2.00", "3.00", "0.500", "40.0", "56.0"]
    assert "not counted" in text
