"""The grid: its cells, running them in processes, taking up again, and what fails."""

import json

import pytest

from ditjax import sweep
from ditjax.cli import load_recipe
from ditjax.errors import UserError
from ditjax.io.results import find_results, read_result
from tests.commands.conftest import TINY

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


def test_a_study_from_end_to_end(tmp_path, capfd):
    grid = "--config.sweep.grid=(('model.size',('1x32x2',)),('model.patch',(2,4,8)))"
    words = [*TINY, grid, f"--workdir={tmp_path}", "--config.evaluate.guided_scale=0.0"]
    broken = tmp_path / "runs" / "DiT-1x32x2-p2-seed0"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text(json.dumps({"seed": 5}))
    assert sweep.main([*words, "--jobs=2"]) == 1
    said = capfd.readouterr().err
    assert "DiT-1x32x2-p2-seed0 FAILED (status 2): error: " in said
    results, problems = find_results([tmp_path / "runs"])
    assert len(results) == 2
    made = {found.folder: (found.folder / "result.json").stat().st_mtime_ns for found in results}

    (broken / "config.json").unlink()
    assert sweep.main([*words, "--jobs=2"]) == 0
    out = capfd.readouterr().out
    assert out.count("DiT-1x32x2-p") >= 3
    results, problems = find_results([tmp_path / "runs"])
    assert (len(results), problems) == (3, [])
    for folder, when in made.items():
        assert (folder / "result.json").stat().st_mtime_ns == when, "a finished cell ran again"
    result = read_result(broken)
    assert result["model"]["tokens"] == 16
    assert result["train"]["steps"] == 20
    assert result["sample"]["steps"] == 3
    assert result["environment"]["command"].startswith("python -m ditjax.sweep --config=")
    for name in ("index.html", "table.csv", "gflops_vs_fid.png", "samples_by_model.png"):
        assert (tmp_path / "report" / name).stat().st_size > 100
