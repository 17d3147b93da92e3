"""Runs are put beside the seeds of a measured study: one that ships, or a report's own."""

import json

import numpy as np
import pytest

from ditjax import recipes
from ditjax.config import as_tree, changed, read
from ditjax.errors import UserError
from ditjax.runs.results import Found
from ditjax.studies import measured as measured_studies
from ditjax.studies.measured import (
    BesideSeeds,
    compare_with,
    read_measured,
    shipped_beside,
    shipped_results,
)
from tests.runs.test_results import a_result


def test_a_shipped_study_holds_its_own_runs_and_not_one_that_is_twice_as_bad(tmp_path):
    measured = read_measured("small_scaling")
    record = json.loads(shipped_results()["small_scaling"].read_text())
    runs = []
    for row in record["runs"]:
        result = a_result(run=row["run"], protocol_hash=measured.protocol_hash)
        result["train"] |= {"steps": row["steps"]}
        result["metrics"] = {"fd_digits": row["fd_digits"]}
        runs.append(Found(tmp_path, result))
    problems: list[str] = []
    beside = compare_with(measured, runs, "fd_digits", problems)
    assert len(beside) == len(runs)
    assert not problems
    assert np.mean([each.inside for each in beside]) >= 0.9
    for each in runs:
        each.result["metrics"]["fd_digits"] *= 2
    beside = compare_with(measured, runs, "fd_digits", problems)
    assert not any(each.inside for each in beside)
    assert "OUTSIDE" in beside[0].words


def test_another_protocol_or_length_is_named_and_not_compared(tmp_path):
    measured = read_measured("small_scaling")
    name = "DiT-2x32x2-p4-seed7"
    other = a_result(run=name)
    short = a_result(run=name, protocol_hash=measured.protocol_hash)
    problems: list[str] = []
    runs = [Found(tmp_path, other), Found(tmp_path, short)]
    assert compare_with(measured, runs, "fd_digits", problems) == ()
    assert "its protocol is" in problems[0]
    assert "2000 steps, not 4000" in problems[1]


def test_a_recipe_is_beside_the_shipped_study_that_trained_it():
    """Whatever its seed and how often it is evaluated, and not if it learns anything else."""
    tree = recipes.build("small/scaling:2x32x2/4")
    c = changed(read(tree | {"sweep": {}}), {"seed": 7, "train": {"evaluate_every_steps": 50}})
    found = shipped_beside(c)
    assert found is not None
    assert (found.measured.name, found.model) == ("small_scaling", "DiT-2x32x2-p4")
    assert shipped_beside(changed(c, {"optim": {"learning_rate": 1e-3}})) is None
    assert not measured_studies._same_recipe(as_tree(c), changed(c, {"train": {"steps": 2000}}))
    assert shipped_beside(changed(c, {"model": {"size": "2x40x2"}})) is None


def test_an_evaluation_lies_within_above_or_below_the_band():
    measured = read_measured("small_scaling")
    beside, protocol = BesideSeeds(measured, "DiT-2x32x2-p4"), dict(measured.protocol)
    fewer = protocol | {"num_samples": 250}  # as in training: another distance, the same loss
    seeds = measured.values["DiT-2x32x2-p4"]["val_loss"]
    for factor, where in ((1, "within"), (2, "above"), (0.5, "below")):
        (line,) = beside.lines(4000, {"val_loss": seeds[0] * factor, "fd_digits": 1.0}, fewer)
        assert f"is {where} the seeds' band of small_scaling (" in line
    assert line.startswith("step 4000: validation loss ")
    assert len(beside.lines(4000, {"val_loss": 0.1, "fd_digits": 1.0}, protocol)) == 2
    assert not beside.lines(3500, {"val_loss": 0.1}, fewer)
    assert not beside.lines(4000, {"val_loss": 0.1}, fewer | {"val_loss_num": 10})
    assert not beside.lines(4000, {"val_loss": float("nan")}, fewer)


def test_what_is_no_reference_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected one of small_blocks"):
        read_measured("small_scalin")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="0 runs of 0 protocols"):
        read_measured(str(tmp_path / "x.json"))
