"""The bench command: figures that agree with one another, and one line for what is wrong."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from flax import linen as nn

from ditjax import bench
from ditjax.errors import UserError
from ditjax.machines import suite
from ditjax.machines.chips import COMPILER_FLAGS
from tests.commands.conftest import TINY, TOY


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(bench, "BLOCK_SECONDS", 0.02)
    monkeypatch.setattr(bench, "SIDES", {"cpu": (64, 128), "other": ()})


def test_the_figures_agree(tmp_path, capsys):
    out = tmp_path / "bench.json"
    words = ["--steps=3", "--rounds=1", "--sample", f"--out={out}"]
    assert bench.main([*TOY, *words]) == 0
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
    assert found["host_products_flops"]["NumPy"] > 0
    text = capsys.readouterr().out
    for word in (
        "Conv-8",
        "of the ceiling",
        "others' products",
        "NumPy",
        "between steps",
        "50 guided DDIM steps",
    ):
        assert word in text


class Thin(nn.Module):
    """Inception's place in the suite: it compiles for a minute."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x.mean((1, 2)))


def test_the_suite(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "FIDInception", Thin)
    monkeypatch.setattr(suite, "TOKENS", 16)
    out = tmp_path / "suite.json"
    words = ["--suite", "--sizes=1x32x2", "--batches=16", "--steps=1", "--rounds=1"]
    assert bench.main([*TINY, *words, f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    (model,) = found["models"]
    assert model["model"] == "DiT-1x32x2/4"
    assert [each["batch_size"] for each in model["tried"]] == [16]
    assert model["of_ceiling"]["median"] > 0
    assert found["features"]["images_per_second"] > 0
    assert 0 < found["attention"]["plain"]["forward"] < 0.02  # of bfloat16
    assert 0 < found["attention"]["plain"]["gradient"] < 0.02
    assert found["attention"]["cudnn"] == "not run: it is for gpu"
    assert found["environment"]["xla_flags"].startswith("--xla")
    text = capsys.readouterr().out
    for word in ("DiT-1x32x2/4     16", "Inception features:", "attention plain, bfloat16 against"):
        assert word in text


def test_flags_are_compared_in_processes_of_their_own(tmp_path, capsys, monkeypatch):
    seconds = iter([2.0, 1.0, 1.5, 3.0])
    ran = []

    def run(words, env, **_):
        ran.append((words, env["XLA_FLAGS"]))
        figures = {"model": "DiT", "batch_size": 8, "step_seconds": {"median": next(seconds)}}
        Path(words[-1].removeprefix("--out=")).write_text(json.dumps(figures))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    monkeypatch.setattr(subprocess, "run", run)
    out = tmp_path / "flags.json"
    assert bench.main([*TINY, "--flags=gpu", "--rounds=2", "--out", str(out)]) == 0
    tuned = f"--xla_a=1 {COMPILER_FLAGS['gpu'].flags}"
    assert [flags for _, flags in ran] == ["--xla_a=1", tuned, tuned, "--xla_a=1"]
    assert ran[0][0][1:-1] == ["-m", "ditjax.bench", *TINY, "--rounds=2"]
    found = json.loads(out.read_text())
    assert found["ratio"] == {"low": 2.0, "median": 2.0, "high": 2.0}
    assert found["source"] == COMPILER_FLAGS["gpu"].source
    said = capsys.readouterr().out
    assert "2 and 3 s a step without, 1 and 1.5 with: 2 (quartiles 2 to 2) times as fast" in said
    failed = subprocess.CompletedProcess([], 1, stderr="F: Unknown flag\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="--flags: the run without them failed: F: Unknown flag"):
        bench.main([*TINY, "--flags=--xla_b=1"])


def test_products_of_others_are_measured(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 5e9\n")
    python.chmod(0o755)
    found = bench.host_products(str(python))
    assert found["PyTorch"] == 5e9
    assert found["NumPy"] > 1e6
    assert bench.host_products("/nowhere").keys() == {"NumPy"}


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--suite", "--batches=x"], "--batches=x: expected sizes"),
        (["--sizes=S"], "--sizes: no effect without --suite"),
        (["--suite", "--flags=gpu"], "exclude each other"),
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
