"""The bench command: figures that agree with one another, and one line for what is wrong."""

import functools
import json
import sys

import pytest

from ditjax import bench
from ditjax.errors import UserError
from tests.commands.conftest import TINY


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(bench, "BLOCK_SECONDS", 0.02)
    monkeypatch.setattr(bench, "SIDES", {"cpu": (64, 128), "other": ()})


def test_the_figures_agree(tmp_path, capsys):
    out = tmp_path / "bench.json"
    words = ["--steps=3", "--rounds=1", "--sample", f"--out={out}"]
    assert bench.main([*TINY, *words]) == 0
    found = json.loads(out.read_text())
    step, B = found["step_seconds"], 16
    assert 0 < step["low"] == step["median"] == step["high"]  # of one round
    assert found["images_per_second"]["median"] == pytest.approx(B / step["median"])
    # Three forward passes of two operations a multiply-accumulate, over 8 devices.
    assert found["step_flops"] == pytest.approx(6 * found["gflops"] * 1e9 * B)
    attained = found["attained_flops_a_device"]["median"]
    assert attained == pytest.approx(found["step_flops"] / step["median"] / 8)
    assert found["of_ceiling"]["median"] == pytest.approx(
        attained / found["ceiling_flops"]["median"]
    )
    assert found["peak_flops"] is None
    assert found["mfu"] is None
    assert found["ceiling_side"] in (64, 128)
    assert found["compile_seconds"] < found["first_step_seconds"]
    assert found["peak_bytes"] > 10 * 2**20
    assert found["input"]["images_per_second"]["median"] > 0
    assert found["input"]["host_seconds"]["median"] > 0
    assert found["sampling"]["batch_size"] == 40
    assert found["environment"]["devices"] == 8
    assert "ditjax.bench" in found["environment"]["command"]
    assert str(tmp_path) not in found["environment"]["command"]  # what is kept and shown elsewhere
    text = capsys.readouterr().out
    for word in ("DiT-1x32x2/4", "of the ceiling", "between steps", "50 guided DDIM steps"):
        assert word in text


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--rounds=0"], "--steps=0 --rounds=0: expected"),
        (["--against=tensorflow"], "invalid choice: 'tensorflow'"),
        (["--against=torch", "--config.model.block=adaln"], r"block is 'adaln', .* 'adaln_zero'"),
        (["--against=torch", "--sample"], r"num_classes is 10, .* leave --sample out"),
        (["--against=torch", "--torch_python=/nowhere"], "--torch_python=/nowhere: No such file"),
    ],
)
def test_mistakes(words, match):
    with pytest.raises(UserError, match=match) as error:
        bench.main([*TINY, *words])
    assert "\n" not in str(error.value)


def test_an_interpreter_without_pytorch(tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import no_such_torch'\n")
    python.chmod(0o755)
    with pytest.raises(UserError, match=r"No module named 'no_such_torch' in .* install tests/or"):
        bench.main([*TINY, "--against=torch", f"--torch_python={python}"])


def test_the_peer_is_asked_in_turns(monkeypatch):
    """Ours and theirs in every round, in either order, and the ratio of the same round."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    told = []

    def side(name):
        told.append(name)
        return float(len(told))

    found = bench.alternate({name: functools.partial(side, name) for name in "ab"}, 3)
    assert told == ["a", "b", *"abbaab"]  # the first round is not counted
    assert found == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}


def test_quartiles():
    assert bench.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == {"low": 2.0, "median": 3.0, "high": 4.0}
