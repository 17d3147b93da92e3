"""A study of published cells: what it would cost, and their figures in its results."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from ditjax import sweep
from ditjax.cli import load_recipe
from ditjax.errors import UserError
from ditjax.evaluation.evaluator import Evaluated
from ditjax.machines import planning
from ditjax.reporting.scored import scored_rows
from ditjax.runs.results import read_result, write_result
from ditjax.studies import cells as studies
from tests.commands.conftest import TINY
from tests.runs.test_results import a_result

TABLE_4 = "--config=experiments/paper/table4.py"
FIGURES = (
    "--config.sweep.grid=(('model.patch',(4,8)),)",
    "--config.sweep.published=(((('model.patch',4),),'fd_digits',5.0),)",
    "--config.sweep.published_protocol=(('image_size','8'),('num_classes','10'))",
    "--config.sweep.published_source=a_book",
)


def test_a_dry_run_tells_hours_of_every_cell_and_in_all(tmp_path, capsys):
    words = [TABLE_4, f"--workdir={tmp_path / 's'}", "--dry_run"]
    assert sweep.main(words) == 0
    told = capsys.readouterr().out
    assert "on v5e:4x4, 16 chips (estimated in closed form, not run):" in told
    rows = [line.split() for line in told.partition("chips (")[2].splitlines()]
    cells = [row for row in rows if row and row[0].startswith("DiT-")]
    assert sweep.main([*words, "--models=S/8,B/4"]) == 0
    some = capsys.readouterr().out
    assert "2 cells to run" in some or "2 cells, 2 to run" in some
    assert next(line for line in some.splitlines() if line.startswith("2 cells  "))
    (total,) = [row for row in rows if row[:2] == ["12", "cells"]]
    assert len(cells) == 12
    for column in (1, 2, 3, 4):
        each = [float(row[column]) for row in cells]
        assert float(total[column + 1]) == pytest.approx(sum(each), rel=0.02)
    assert not (tmp_path / "s").exists()
    assert sweep.main([*words, "--topology=h100:8"]) == 0
    assert "on h100:8, 8 chips" in capsys.readouterr().out


def test_without_a_topology_no_cost_is_told(tmp_path, capsys):
    words = [*TINY, FIGURES[0], f"--workdir={tmp_path / 's'}", "--dry_run"]
    assert sweep.main(words) == 0
    assert "chip" not in capsys.readouterr().out
    assert sweep.main([*words, "--topology=v5e:2x2"]) == 0
    assert "on v5e:2x2, 4 chips" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--topology=v5e:4x4"], "add --dry_run"),
        (["--plan"], "add --dry_run"),
        (["--plan", "--dry_run"], "name it with --topology"),
        (["--dry_run", "--topology=v5:4x4"], "unknown chip"),
        (["--dry_run", "--topology=v5e:3x3"], "v5e has no shape"),
    ],
)
def test_costs_that_cannot_be_told(tmp_path, words, match):
    with pytest.raises(UserError, match=match):
        sweep.main([*TINY, FIGURES[0], f"--workdir={tmp_path / 's'}", *words])


def test_a_plan_is_made_of_each_cell(tmp_path, capsys, monkeypatch):
    made = []

    def plan(c, topology, steps, cache):
        made.append((c.model.size, c.model.patch, topology.name, steps))
        return {
            "chips": 16,
            "memory": {"peak_bytes": 1.0, "hbm_bytes": 2.0},
            "cost": {"hours": {"overlapped": 1.0, "sequential": 2.0}},
        }

    monkeypatch.setattr(planning, "make_plan", plan)
    grid = "--config.sweep.grid=(('model.patch',(8,4)),)"
    words = [f"{TABLE_4}:S/8", grid, f"--workdir={tmp_path / 's'}", "--dry_run", "--plan"]
    assert sweep.main(words) == 0
    assert made == [("S", 8, "v5e:4x4", 400_000), ("S", 4, "v5e:4x4", 400_000)]
    assert "16 chips (compiled, not run):" in capsys.readouterr().out


def test_the_figures_of_a_cell_are_in_its_result(tmp_path, monkeypatch):
    made, other = studies.cells(load_recipe([*TINY, *FIGURES]))
    assert other.published is None
    trained = SimpleNamespace(step=20, params={}, seconds=1.0, loss=0.5)
    scores = Evaluated({"fd_digits": 4.0}, {"metric": "FD-digits"}, "digits", 1.0)
    monkeypatch.setattr(sweep, "train", lambda *_: trained)
    monkeypatch.setattr(sweep, "model_record", lambda *_: {})
    monkeypatch.setattr(sweep, "Evaluator", lambda *_: SimpleNamespace(of_run=lambda *_: scores))
    sweep.run_cell(made, tmp_path)
    sweep.run_cell(other, tmp_path)
    found = read_result(tmp_path / "runs" / made.name)
    assert found["published"] == {
        "values": {"fd_digits": 5.0},
        "protocol": {"image_size": "8", "num_classes": "10"},
        "source": "a_book",
    }
    assert "published" not in read_result(tmp_path / "runs" / other.name)
    assert not found["config"]["sweep"]["published"], "a cell's recipe is one run's"


def test_the_studys_record_lists_figures_of_cells_that_were_not_run():
    recipe = load_recipe([*TINY, *FIGURES])
    listed = json.loads(json.dumps(studies.study_record(recipe, studies.cells(recipe), "typed")))
    four, eight = scored_rows([], listed), listed["cells"][1]["published"]
    assert eight is None
    assert [(row.cell, row.published, row.verdict) for row in four] == [
        ("DiT-1x32x2-p4", 5.0, "not run")
    ]


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"values": {"fid": "1"}, "protocol": {}, "source": ""},
        {"values": {"fid": np.inf}, "protocol": {}, "source": ""},
        {"values": {"fid": 0.0}, "protocol": {}, "source": ""},
        {"values": {"fid": -2.0}, "protocol": {}, "source": ""},
        {"values": {}, "protocol": {"a": 1}, "source": ""},
        {"values": {}, "protocol": {}},
        [],
    ],
)
def test_damaged_figures_are_no_result(tmp_path, told):
    with pytest.raises(UserError, match="published is"):
        write_result(tmp_path, a_result(published=told))
