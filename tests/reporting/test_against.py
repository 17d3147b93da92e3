"""Runs are put beside the seeds of a measured study: one that ships, or a report's own."""

import json

import numpy as np
import pytest

from ditjax import report
from ditjax.errors import UserError
from ditjax.reporting.against import compare_with, read_measured, shipped_results
from ditjax.runs.results import Found, find_results
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


@pytest.mark.usefixtures("no_pictures")
def test_a_report_serves_as_the_reference_of_the_next(study, tmp_path, capsys):
    study.write(tmp_path / "a", seeds=(0, 1))
    report.main([f"--runs={tmp_path / 'a'}"])
    reference = tmp_path / "a" / "report" / "results.json"
    assert len(find_results([tmp_path / "a"])[0]) == 18
    study.write_run(tmp_path / "b", *study.sizes[0], 4, 5)
    study.write_run(tmp_path / "b", *study.sizes[1], 4, 5, fd=500.0)
    capsys.readouterr()
    assert report.main([f"--runs={tmp_path / 'b'}", f"--against={reference}"]) == 0
    text = capsys.readouterr().out
    assert "1 of 2 runs are within the noise" in text
    assert "500, OUTSIDE" in text


def test_what_is_no_reference_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected one of small_blocks"):
        read_measured("small_scalin")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="0 runs of 0 protocols"):
        read_measured(str(tmp_path / "x.json"))
