"""The same numbers in the terminal's columns, the CSV and the JSON."""

import csv
import json

import pytest

from ditjax import report


def test_csv_and_json_hold_every_number_at_full_precision(nine):
    rows = list(csv.DictReader((nine.out_dir / "table.csv").open()))
    merged = json.loads((nine.out_dir / "results.json").read_text())
    assert len(rows) == len(merged["results"]) == 9
    for row, each in zip(rows, merged["results"], strict=True):
        assert float(row["gflops"]) == each["gflops"]
        assert float(row["metrics.fd_digits"]) == each["metrics"]["fd_digits"]
    assert merged["fits"][0]["law"]["b"] == nine.analyses[0].fits[0].law.b


def test_terminal_columns_are_aligned(nine):
    lines = (nine.out_dir / "table.txt").read_text().splitlines()[:10]
    header = lines[0]
    for title in ("params", "Gflops", "FD-digits", "seed"):
        end = header.index(title) + len(title)
        for line in lines[1:]:
            assert line[end - 1] != " "
            assert line[end : end + 1] in ("", " ")
    assert "e-" not in "".join(lines)


@pytest.mark.usefixtures("no_pictures")
def test_the_uncertainty_of_a_metric_is_in_the_csv_only(study, tmp_path):
    metrics = {"fd_digits": 9.0, "fd_digits_low": 8.0, "fd_digits_inf": 7.0, "kid_deviation": 0.1}
    study.write_run(tmp_path, 2, 48, 2, 4, metrics=metrics)
    summary = report.make_report([tmp_path], tmp_path / "report")
    header = summary.text.splitlines()[0]
    assert "FD-digits∞" in header
    assert "low" not in header
    assert "deviation" not in header
    (row,) = csv.DictReader((summary.out_dir / "table.csv").open())
    assert row["metrics.fd_digits_low"] == "8.0"


@pytest.mark.usefixtures("no_pictures")
def test_what_all_runs_agree_in_is_said_once_in_a_terminal(study, tmp_path):
    """Such as the score of persistence. The fitted metric and all columns of the CSV stay."""
    for seed, csi in ((0, 0.25), (1, 0.5)):
        metrics = {"fd_digits": 9.0, "csi": csi, "persistence_csi": 0.375}
        study.write_run(tmp_path, 2, 48, 2, 4, seed=seed, metrics=metrics)
    summary = report.make_report([tmp_path], tmp_path / "report")
    header, *lines = summary.text.splitlines()
    assert "FD-digits" in header
    assert " csi" in header
    assert "persistence" not in header
    assert "The same in all runs: persistence csi 0.375." in lines
    rows = csv.DictReader((summary.out_dir / "table.csv").open())
    assert {row["metrics.persistence_csi"] for row in rows} == {"0.375"}


@pytest.mark.usefixtures("no_pictures")
def test_a_spreadsheet_takes_no_name_for_a_formula(study, tmp_path):
    metrics = {"fd_digits": 9.0, "kid": -0.25}
    model = {"name": "-", "size": "@SUM(A1)", "depth": 1, "width": 2, "heads": 1, "patch": 1}
    model |= {"block": " +1\x1b[31m", "tokens": 64}
    command = '=HYPERLINK("http://x")'
    study.write_run(tmp_path, 2, 48, 2, 4, metrics=metrics, run=command, model=model)
    summary = report.make_report([tmp_path], tmp_path / "report")
    (row,) = csv.DictReader((summary.out_dir / "table.csv").open())
    assert row["run"] == f"'{command}"
    assert row["model.size"] == "'@SUM(A1)"
    assert row["model.block"] == "' +1?[31m"
    assert row["model.name"] == "-"
    assert float(row["metrics.kid"]) == -0.25
