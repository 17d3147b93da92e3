"""The table for a paper: booktabs, one row for all seeds, and names that run no command."""

import math
import re

import pytest

from ditjax import report
from ditjax.reporting.latex import escaped


@pytest.mark.usefixtures("no_pictures")
def test_seeds_of_a_model_are_one_row_and_a_nan_has_its_own(study, tmp_path):
    study.write_run(tmp_path / "runs", *study.sizes[0], 4, seed=0, fd=10.0)
    study.write_run(tmp_path / "runs", *study.sizes[0], 4, seed=1, fd=12.0)
    study.write_run(tmp_path / "runs", *study.sizes[0], 4, seed=2, fd=math.nan)
    study.write_run(tmp_path / "runs", *study.sizes[1], 4, fd=7.0)
    study.write_plan(
        tmp_path, [("DiT-9x96x3-p1-seed0", {"published": {"values": {"fd_digits": 3}}})]
    )
    summary = report.make_report([tmp_path], tmp_path / "report")
    text = (summary.out_dir / "table.tex").read_text()
    rows = [line.rstrip("\\ ").split(" & ") for line in text.splitlines() if " & " in line]
    assert len({len(row) for row in rows}) == 1
    by_result = {row[6]: row for row in rows}
    assert by_result["11.0 $\\pm$ 1.4"][5] == "2"
    assert by_result["NaN"][5] == "1"
    assert by_result["7.00"][5] == "1"
    assert by_result["not run"][7] == "3.00"
    for words in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}{llrrrrrr}"):
        assert words in text


@pytest.mark.usefixtures("no_pictures")
def test_many_rows_are_a_long_table(study, tmp_path):
    study.write_plan(tmp_path, [(f"cell{i}", {}) for i in range(60)])
    study.write_run(tmp_path / "runs", *study.sizes[0], 4)
    text = report.make_report([tmp_path], tmp_path / "report").out_dir.joinpath("table.tex")
    lines = text.read_text().splitlines()
    assert lines[1] == r"\begin{longtable}{llrrrrr}"
    assert lines[-1] == r"\end{longtable}"
    assert sum(" & " in line for line in lines) == 62


def test_a_name_is_no_command():
    for name in (r"\input{/etc/passwd}", "a%b", "$x$", "a\nb", "\x1b[31m", "#1", "a & b", "~^_"):
        text = escaped(name)
        bare = re.sub(r"\\(text\w+\{\}|[{}$&#%_])|\{-\}", "", text)
        assert not re.search(r"[\\{}$&#%_~^\n\x1b]", bare), text
    assert escaped("DiT_2") == r"DiT\_2"
    assert len(escaped("x" * 999)) < 70
