"""The grid: its cells, running them in processes, taking up again, and what fails."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ditjax import sweep, train
from ditjax.cli import load_recipe
from ditjax.errors import StoppedError, UserError
from ditjax.io.lease import Lease
from ditjax.io.results import find_results, read_result, write_result
from ditjax.parallel import stopping
from tests.commands.conftest import TINY
from tests.io.test_results import a_result
from tests.test_masking import SECRETS

ONE = "--config.sweep.grid=(('model.patch',(4,)),)"
GRID = "--config.sweep.grid=(('model.size',('1x32x2',)),('model.patch',(4,8)),('seed',(0,1)))"


def test_cells_of_the_demo():
    cells = sweep.cells(load_recipe(["--config=experiments/digits.py"]).to_dict())
    assert len(cells) == 9
    assert cells[0].name == "DiT-2x32x2-p4-seed0"
    assert cells[-1].name == "DiT-4x96x3-p1-seed0"
    assert cells[-1].config.model.patch == 1
    assert cells[0].work < cells[-1].work


def test_other_axes_are_in_the_name():
    grid = "--config.sweep.grid=(('optim.learning_rate',(1e-3,2e-3)),)"
    cells = sweep.cells(load_recipe([*TINY, grid]).to_dict())
    assert [c.name for c in cells] == [
        "DiT-1x32x2-p4-seed0-learning_rate_0.001",
        "DiT-1x32x2-p4-seed0-learning_rate_0.002",
    ]
    assert [c.config.optim.learning_rate for c in cells] == [1e-3, 2e-3]


def test_a_grid_that_cannot_run(tmp_path):
    for words, match in (
        (["--config.sweep.grid=()"], "is empty"),
        (["--config.sweep.grid=(('model.patch',(4,3)),)"], r"cell 1 .*patch is 3"),
        ([GRID, "--index=4"], "cells 0 to 3"),
        ([GRID, "--jobs=0"], "at least 1"),
    ):
        with pytest.raises(UserError, match=match):
            sweep.main([*TINY, f"--workdir={tmp_path / 'study'}", *words])
    assert not (tmp_path / "study").exists()


def test_dry_run_lists_and_writes_nothing(tmp_path, capsys):
    assert sweep.main([*TINY, GRID, f"--workdir={tmp_path / 's'}", "--dry_run"]) == 0
    table = capsys.readouterr().out
    assert table.count("DiT-1x32x2-p") == 4
    assert not (tmp_path / "s").exists()


CELL = """
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.2)
    pathlib.Path(sys.argv[2]).write_text("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("trains", flush=True)
time.sleep(float(sys.argv[1]))
"""


def test_a_sweep_that_is_told_to_stop_tells_its_cells_and_waits_for_them(tmp_path, monkeypatch):
    saved = [tmp_path / "0", tmp_path / "1"]

    def start(cell, workdir, argv, cpus):
        command = [sys.executable, "-S", "-c", CELL, "60", str(saved[cell.number])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout
        process.stdout.readline()
        if cell.number == waiting[-1].number:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return sweep._Running(cell, process, cpus)

    waiting = sweep.cells(load_recipe([*TINY, GRID]).to_dict())[:2]
    waiting.sort(key=lambda cell: -cell.work)
    monkeypatch.setattr(sweep, "_start", start)
    with pytest.raises(StoppedError, match="stopped by SIGTERM") as stopped, stopping.raised():
        sweep.run_grid(waiting, tmp_path, [], 2)
    assert stopped.value.status == 143
    assert [path.read_text() for path in saved] == ["saved", "saved"]


def test_a_cell_that_was_stopped_is_not_done(tmp_path, monkeypatch, capfd):
    def start(cell, workdir, argv, cpus):
        process = subprocess.Popen([sys.executable, "-S", "-c", ""])
        return sweep._Running(cell, process, cpus)

    cells = sweep.cells(load_recipe([*TINY, GRID]).to_dict())[:1]
    monkeypatch.setattr(sweep, "_start", start)
    assert sweep.run_grid(cells, tmp_path, [], 1) == cells
    assert f"{cells[0].name} stopped before its end" in capfd.readouterr().err


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_study_from_end_to_end(tmp_path, capfd, monkeypatch):
    grid = "--config.sweep.grid=(('model.size',('1x32x2',)),('model.patch',(2,4,8)))"
    words = [*TINY, grid, f"--workdir={tmp_path}", "--config.evaluate.guided_scale=0.0"]
    # Of an autoencoder that pixels do not need: any text.
    words += [f"--config.autoencoder.path=s3://me:{SECRETS[0]}@host/{SECRETS[1]}"]
    monkeypatch.setenv("CANARY_TOKEN", SECRETS[2])
    broken = tmp_path / "runs" / "DiT-1x32x2-p2-seed0"
    broken.mkdir(parents=True)
    recipe = sweep.cells(load_recipe([w for w in words if "--workdir" not in w]).to_dict())[
        0
    ].recipe
    recipe["autoencoder"]["path"] = "elsewhere"
    (broken / "config.json").write_text(json.dumps(recipe))
    (broken / "metrics.jsonl").write_text('{"step": 5}\n')
    assert sweep.main([*words, "--jobs=2"]) == 1
    said = capfd.readouterr().err
    assert "DiT-1x32x2-p2-seed0 FAILED (status 2): error: " in said
    assert "this command says 's3://***@host/***'" in said
    results, problems = find_results([tmp_path / "runs"])
    assert len(results) == 2
    finished, damaged = (found.folder for found in results)
    before, first = contents(finished), read_result(damaged)

    (broken / "config.json").unlink()
    whole = (damaged / "result.json").read_bytes()
    (damaged / "result.json").write_bytes(whole[: len(whole) // 2])
    assert sweep.main([*words, "--jobs=2"]) == 0
    out = capfd.readouterr().out
    assert out.count("DiT-1x32x2-p") >= 3
    results, problems = find_results([tmp_path / "runs"])
    assert (len(results), problems) == (3, [])
    assert contents(finished) == before, "a finished cell was touched"
    again = read_result(damaged)
    assert again["metrics"] == first["metrics"]
    assert {**again["train"], "seconds": 0} == {**first["train"], "seconds": 0}
    for path, data in contents(tmp_path).items():
        for secret in SECRETS:
            assert secret.encode() not in data, path
    assert not list(tmp_path.rglob("*lease*"))
    result = read_result(broken)
    assert result["model"]["tokens"] == 16
    assert result["train"]["steps"] == 20
    assert result["sample"]["steps"] == 3
    assert result["environment"]["command"].startswith("python -m ditjax.sweep --config=")
    for name in ("index.html", "table.csv", "gflops_vs_fid.png", "samples_by_model.png"):
        assert (tmp_path / "report" / name).stat().st_size > 100


def test_a_study_is_one_sweeps_and_a_cell_one_process(tmp_path):
    words = [*TINY, GRID, f"--workdir={tmp_path}"]
    name = "DiT-1x32x2-p4-seed0"
    held = Lease(tmp_path / sweep.LEASE, "the study")
    with pytest.raises(UserError, match=f"{tmp_path} is in use by process {os.getpid()} on"):
        sweep.main(words)
    held.release()
    held = Lease(tmp_path / "runs" / name / ".lease", "the cell")
    with pytest.raises(UserError, match=f"{name} is in use by process {os.getpid()} on"):
        sweep.main([*words, "--index=0"])
    with pytest.raises(UserError, match=f"{name} is in use by process {os.getpid()} on"):
        train.main([*TINY, f"--workdir={tmp_path / 'runs' / name}"])
    held.release()
    assert list(tmp_path.rglob("*")) == []


def test_the_result_of_another_recipe_is_no_result(tmp_path):
    (cell,) = sweep.cells(load_recipe([*TINY, ONE]).to_dict())
    folder = tmp_path / "runs" / cell.name
    write_result(folder, a_result(config=cell.recipe))
    sweep.run_cell(cell, tmp_path)
    assert os.listdir(folder) == ["result.json"]
    (other,) = sweep.cells(load_recipe([*TINY, ONE, "--config.optim.learning_rate=1.0"]).to_dict())
    with pytest.raises(UserError, match=r"learning_rate=0\.005, this command says 1\.0"):
        sweep.run_cell(other, tmp_path)


ORPHAN = """
import time
from ditjax import sweep
sweep._end_with_the_sweep()
print("here", flush=True)
time.sleep(60)
"""


def test_a_cell_ends_with_the_sweep_that_started_it():
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHAN], cwd=Path(__file__).parent.parent.parent, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout
        assert process.stdout.readline() == "here\n"
        assert process.poll() is None
        _, said = process.communicate(timeout=30)  # closes its input
    finally:
        process.kill()
    assert process.returncode == -signal.SIGTERM
    assert said == "the sweep that started this cell is gone: it ends\n"
