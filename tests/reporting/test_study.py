"""Grouping, the laws of each group, and what is named and kept out of them."""

import json
import math

import pytest

from ditjax import report
from ditjax.io.results import protocol_hash
from ditjax.reporting.study import differences


def test_the_planted_law_is_reported(nine, read_page):
    (group,) = nine.groups
    (fit,) = group.fits
    assert (fit.n, fit.models) == (9, 9)
    assert fit.law.b_interval.low <= 0.5 <= fit.law.b_interval.high
    assert fit.law.b == pytest.approx(0.5, abs=0.1)
    text = " ".join(read_page(nine.page.read_text()).words)
    for words in (nine.text.splitlines()[0].split()[0], f"{fit.law.b:.3f}", f"{fit.pearson:.3f}"):
        assert words in text
    assert "it is not FID" in text
    assert "experiments/digits.py" in text


def test_seeds_have_their_own_fits(study, tmp_path):
    study.write(tmp_path, seeds=(0, 1))
    summary = report.make_report([tmp_path], tmp_path / "report")
    labels = [(fit.label, fit.n, fit.models) for fit in summary.groups[0].fits]
    assert labels == [("all runs", 18, 9), ("seed 0", 9, 9), ("seed 1", 9, 9)]
    assert all(fit.law is not None and fit.law.groups == 9 for fit in summary.groups[0].fits)
    assert "2 seeds" in summary.text


def test_protocols_never_share_a_fit(study, tmp_path, read_page):
    study.write(tmp_path / "one")
    other = study.protocol | {"num": 50000}
    folders = study.write(tmp_path / "two", protocol=other, protocol_hash=protocol_hash(other))
    summary = report.make_report([tmp_path], tmp_path / "report")
    assert sorted(group.fits[0].n for group in summary.groups) == [9, 9]
    assert len({group.protocol_hash for group in summary.groups}) == 2
    (said,) = (problem for problem in summary.problems if "2 protocols among" in problem)
    assert "They differ in num (100, 50000). Each has its own curve" in said
    assert not any("twice" in problem for problem in summary.problems)
    page = " ".join(read_page(summary.page.read_text()).words)
    assert protocol_hash(other) in page
    assert "50000" in page
    assert folders


def test_what_protocols_differ_in():
    a = {"steps": "ddim25", "seed": 0, "decoder": "f" * 64, "same": 1}
    b = {"steps": "250", "seed": 0, "decoder": "e" * 64, "same": 1, "eta": None}
    assert differences([a, b]) == (
        f"steps (ddim25, 250), decoder ({'f' * 13}..., {'e' * 13}...), eta (not on record, null)"
    )
    assert differences([a, a]) == ""
    many = differences([{"seed": seed} for seed in range(9)])
    assert many == "seed (0, 1, 2, 3, ...)"


def test_what_is_wrong_is_named_and_kept_out_of_the_fit(study, tmp_path, read_page):
    study.write(tmp_path)
    study.write_run(tmp_path / "copy", *study.sizes[0], 4, fd=99.0)
    study.write_run(tmp_path, 5, 96, 3, 1, fd=math.nan)
    study.write_run(tmp_path, 6, 96, 3, 1, fd=-1.0)
    study.write_run(tmp_path, 7, 96, 3, 1, metrics={"accuracy": 0.5})
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "result.json").write_text('{"schema": 1, "ru')
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "metrics.jsonl").write_text("")
    (tmp_path / "DiT-2x48x2-p2-seed0" / "metrics.jsonl").write_text('{"loss": 1}\n{"step": 1}\n')
    (tmp_path / "DiT-2x48x2-p1-seed0" / "samples.npz").write_bytes(b"PK")
    summary = report.make_report([tmp_path], tmp_path / "report")
    page = " ".join(read_page(summary.page.read_text()).words)
    for words in (
        "is there twice",
        "'DiT-5x96x3-p1-seed0': fd_digits is nan",
        "'DiT-6x96x3-p1-seed0': fd_digits is -1.0",
        "'DiT-7x96x3-p1-seed0': fd_digits is missing",
        "half/result.json is not whole JSON",
        "stopped has no result.json",
        "metrics.jsonl line 1 is damaged",
        "samples.npz is not a whole npz",
    ):
        assert sum(words in problem for problem in summary.problems) == 1, words
        assert words in page
        assert words in summary.text
    assert summary.groups[0].fits[0].n == 9
    assert len(summary.groups[0].runs) == 12
    assert "NaN" in summary.text
    assert json.loads((tmp_path / "report" / "results.json").read_text())["problems"]


def test_one_hash_for_two_protocols_and_mixed_steps_are_named(study, tmp_path):
    folders = study.write(tmp_path)
    path = folders[0] / "result.json"
    changed = json.loads(path.read_text())
    changed["protocol"]["num"] = 7
    changed["train"]["steps"] = 400
    path.write_text(json.dumps(changed))
    summary = report.make_report([tmp_path], tmp_path / "report")
    assert any("2 different protocols carry this hash" in each for each in summary.problems)
    assert any("mixes runs of 200, 400 training steps" in each for each in summary.problems)


def test_two_runs_give_a_table_and_say_why_there_is_no_law(study, tmp_path):
    for patch in (2, 1):
        study.write_run(tmp_path, *study.sizes[0], patch)
    summary = report.make_report([tmp_path], tmp_path / "report")
    assert summary.groups[0].fits[0].law is None
    assert "a law needs 3 models, there are 2" in summary.text
    assert "a law needs 3 models, there are 2" in summary.page.read_text()
