"""The suite of bench: the best batch of each size, and what does not fit."""

import jax
import pytest

from ditjax import config
from ditjax.errors import UserError
from ditjax.machines import suite

RATES = {("S", 64): 10.0, ("S", 128): 30.0, ("S", 256): 20.0, ("B", 64): 5.0}


def measure(c, full):
    rate = RATES.get((c.model.size, c.train.batch_size))
    if rate is None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    return {
        "model": f"DiT-{c.model.size}",
        "batch_size": c.train.batch_size,
        "full": full,
        "images_per_second": {"median": rate},
        "peak_bytes": 1,
        "peak_bytes_of": "a device",
    }


def test_each_size_is_measured_in_full_at_its_best_batch(monkeypatch, capsys):
    monkeypatch.setattr(suite, "inception_speed", lambda c: {})
    monkeypatch.setattr(suite, "attention_errors", dict)
    found = suite.run_suite(config.read({}), measure, ["S", "B"], [256, 128, 64])["models"]
    assert [(each["model"], each["batch_size"], each["full"]) for each in found] == [
        ("DiT-S", 128, True),
        ("DiT-B", 64, True),
    ]
    assert found[1]["tried"] == [
        {"batch_size": 64, "images_per_second": 5.0},
        {"batch_size": 128, "images_per_second": None},
    ]
    assert "peak_bytes" not in found[0]
    assert "DiT-B, batch 128: does not fit" in capsys.readouterr().err


def test_a_size_that_fits_with_no_batch_is_one_line():
    with pytest.raises(UserError, match="--suite: DiT-L does not fit with a batch of 64: give"):
        suite.run_suite(config.read({}), measure, ["L"], [64])
