"""Groups, their laws, and faulty results that are reported and kept out of them."""

import json
import math

import pytest

from ditjax import report
from ditjax.files.atomic import protocol_hash
from ditjax.reporting.study import families, read_plan, varied_keys, varied_words
from ditjax.runs.results import find_results


def test_the_planted_law_is_reported(nine, read_page):
    (analysis,) = nine.analyses
    (fit,) = analysis.fits
    assert (fit.n, fit.models) == (9, 9)
    assert fit.law.b_interval.low <= 0.5 <= fit.law.b_interval.high
    assert fit.law.b == pytest.approx(0.5, abs=0.1)
    text = " ".join(read_page(nine.page.read_text()).words)
    for words in (nine.text.splitlines()[0].split()[0], f"{fit.law.b:.3f}", f"{fit.pearson:.3f}"):
        assert words in text
    assert "it is not FID" in text
    assert "experiments/digits.py" in text


@pytest.mark.usefixtures("no_pictures")
def test_seeds_have_their_own_fits(study, tmp_path):
    study.write(tmp_path, seeds=(0, 1))
    summary = report.make_report([tmp_path], tmp_path / "report")
    labels = [(fit.label, fit.n, fit.models) for fit in summary.analyses[0].fits]
    assert labels == [("all runs", 18, 9), ("seed 0", 9, 9), ("seed 1", 9, 9)]
    assert all(fit.law is not None and fit.law.groups == 9 for fit in summary.analyses[0].fits)
    assert "2 seeds" in summary.text


def test_protocols_never_share_a_fit(study, tmp_path, read_page):
    study.write(tmp_path / "one")
    other = study.protocol | {"num": 50000}
    folders = study.write(tmp_path / "two", protocol=other, protocol_hash=protocol_hash(other))
    summary = report.make_report([tmp_path], tmp_path / "report")
    assert sorted(each.fits[0].n for each in summary.analyses) == [9, 9]
    assert len({group.protocol_hash for group in summary.groups}) == 2
    (said,) = (problem for problem in summary.problems if "2 protocols among" in problem)
    assert "They differ in num (100, 50000). Each has its own curve" in said
    assert not any("twice" in problem for problem in summary.problems)
    page = " ".join(read_page(summary.page.read_text()).words)
    assert protocol_hash(other) in page
    assert "50000" in page
    assert folders


@pytest.mark.usefixtures("no_pictures")
def test_arms_of_one_sweep_may_read_texts_in_other_ways(study, tmp_path):
    """They share a group and are compared; runs of no sweep, or by another rule, are not."""

    def write(root, **rule):
        for features in ("tokens", "vector"):
            text = {"tokens": 12, "features": features}
            protocol = study.protocol | {"text": text, "text_encoder": features[0] * 64}
            protocol |= rule if features == "vector" else {}
            for patch in (2, 1):
                study.write_run(
                    root / "runs" / features,
                    *study.sizes[0],
                    patch,
                    fd=50 * patch + (features == "vector"),
                    protocol=protocol,
                    protocol_hash=protocol_hash(protocol),
                    config={"text": text},
                )
        # The runs of a sweep lie side by side.
        for folder in sorted((root / "runs").glob("*/*")):
            folder.rename(root / "runs" / f"{folder.name}-{folder.parent.name}")

    write(tmp_path / "none")
    assert len(report.make_report([tmp_path / "none"], tmp_path / "0").groups) == 2
    write(tmp_path / "one")
    study.write_plan(tmp_path / "one", [])
    summary = report.make_report([tmp_path / "one"], tmp_path / "1")
    (group,) = summary.groups
    assert len(group.runs) == 4
    assert len(group.protocol_hash.split(", ")) == 2
    assert group.protocol["text"] == {}
    assert "text_encoder" not in group.protocol
    assert not any("protocol" in problem for problem in summary.problems)
    assert {row.arm for row in summary.analyses[0].paired} == {"features vector"}
    write(tmp_path / "two", sampler="heun")
    study.write_plan(tmp_path / "two", [])
    assert len(report.make_report([tmp_path / "two"], tmp_path / "2").groups) == 2


def test_what_protocols_differ_in():
    a = {"steps": "ddim25", "seed": 0, "decoder": "f" * 64, "same": 1}
    b = {"steps": "250", "seed": 0, "decoder": "e" * 64, "same": 1, "eta": None}
    assert varied_words([a, b]) == (
        f"steps (ddim25, 250), decoder ({'f' * 13}..., {'e' * 13}...), eta (not on record, null)"
    )
    assert varied_words([a, a]) == ""
    text = [{"text": {"sha256": "f" * 64, "features": each}} for each in ("tokens", "pooled")]
    assert varied_words(text) == "text.features (tokens, pooled)"
    many = varied_words([{"seed": seed} for seed in range(9)])
    assert many == "seed (0, 1, 2, 3, ...)"


def test_directories_of_one_study_join(study, tmp_path):
    """A cell and its recipe are one run, on whichever machine or in whichever lab it ran."""
    rate = {"seed": 0, "optim": {"learning_rate": 1.0}, "mesh": {"data": 1}, "train": {"steps": 9}}
    for lab in ("a", "b"):
        study.write_run(tmp_path / lab, *study.sizes[0], 4, config=rate)  # the same, by both
        study.write_run(tmp_path / lab, *study.sizes[1], 4, seed=ord(lab), config=rate)  # its own
    there = {**rate, "mesh": {"data": 4}}
    study.write_run(tmp_path / "b", *study.sizes[0], 2, fd=5.0, config=there)
    study.write_run(tmp_path / "a", *study.sizes[0], 2, fd=4.0, config=rate)
    for key, value in (("optim", {"learning_rate": 2.0}), ("train", {"steps": 8})):
        root = tmp_path / "b" / key
        study.write_run(root, *study.sizes[0], 4, fd=99.0, config={**rate, key: value})
    summary = report.make_report([tmp_path / "a", tmp_path / "b"], tmp_path / "report")
    (group,) = summary.groups
    assert len(group.runs) == 4
    assert all(each.result["metrics"]["fd_digits"] != 99 for each in group.runs)
    assert {each.result["train"]["seed"] for each in group.runs} == {0, ord("a"), ord("b")}
    said = [problem for problem in summary.problems if "twice" in problem]
    for words in (
        "a/DiT-2x48x2-p4-seed0 is used",
        "holds the same result and",
        "holds another result of the same recipe and",
        "recipe (optim.learning_rate 2.0, not 1.0)",
        "another recipe (train.steps 8, not 9) and is left out",
    ):
        assert any(words in problem for problem in said), words
    assert len(said) == 4


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
    assert summary.analyses[0].fits[0].n == 9
    assert len(summary.groups[0].runs) == 12
    assert "NaN" in summary.text
    assert json.loads((tmp_path / "report" / "results.json").read_text())["problems"]


@pytest.mark.usefixtures("no_pictures")
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


def test_two_runs_give_a_table_and_the_reason_for_no_law(study, tmp_path):
    for patch in (2, 1):
        study.write_run(tmp_path, *study.sizes[0], patch)
    summary = report.make_report([tmp_path], tmp_path / "report")
    assert summary.analyses[0].fits[0].law is None
    assert "a law needs 3 models, there are 2" in summary.text
    assert "a law needs 3 models, there are 2" in summary.page.read_text()


@pytest.mark.usefixtures("no_pictures")
def test_cells_of_several_studies_join_and_a_broken_list_is_named(study, tmp_path):
    names = [study.write_run(tmp_path / "a" / "runs", *study.sizes[0], p).name for p in (1, 2)]
    study.write_plan(tmp_path / "a", [(name, {}) for name in (*names, "elsewhere", "nowhere")])
    study.write_run(tmp_path / "b" / "runs", *study.sizes[0], 4)
    study.write_plan(tmp_path / "b", [("elsewhere", {}), (names[0], {})], title="Another")
    for name, text in (("c", "{"), ("d", '{"cells": 3}'), ("e", '{"cells": [{"name": 3}]}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sweep.json").write_text(text)
    folders = [tmp_path / name for name in "abcde"]
    found, problems = find_results(folders)
    plan = read_plan(folders, found, problems)
    assert plan is not None
    assert plan.title == "A study"
    assert [cell["name"] for cell in plan.cells] == [*names, "elsewhere", "nowhere"]
    assert [cell.name for cell in plan.absent] == ["elsewhere", "nowhere"]
    assert sum("is no list of a study's cells" in problem for problem in problems) == 3
    assert read_plan([tmp_path / "nothing"], [], []) is None


def test_seeds_are_gathered_and_nothing_else(study, tmp_path):
    for seed, fd in ((0, 10.0), (1, 12.0), (2, math.nan), (3, math.inf)):
        study.write_run(tmp_path, *study.sizes[0], 4, seed=seed, fd=fd, config={"seed": seed})
    study.write_run(
        tmp_path / "other",
        *study.sizes[0],
        4,
        seed=9,
        fd=99.0,
        config={"optim": {"learning_rate": 7}},
    )
    study.write_run(tmp_path, *study.sizes[1], 4, fd=7.0)
    found, _ = find_results([tmp_path])
    means = {family.mean: family for family in families(found, "fd_digits")}
    assert sorted(means) == [7.0, 11.0, 99.0]
    pair = means[11.0]
    assert len(pair.runs) == 2
    assert pair.deviation == pytest.approx(math.sqrt(2))
    assert (pair.low, pair.high) == (10.0, 12.0)
    assert math.isnan(means[7.0].deviation)
    assert varied_keys(found) == ["optim.learning_rate"]


@pytest.mark.usefixtures("no_pictures")
def test_the_metric_is_fid_where_there_is_one(study, tmp_path):
    study.write_run(tmp_path, *study.sizes[0], 4)
    assert report.make_report([tmp_path], tmp_path / "r").analyses[0].metric == "fd_digits"
    study.write_run(tmp_path, *study.sizes[0], 2, metrics={"fid": 9.0})
    assert report.make_report([tmp_path], tmp_path / "r").analyses[0].metric == "fid"
    asked = report.make_report([tmp_path], tmp_path / "r", metric="accuracy")
    assert asked.analyses[0].metric == "accuracy"
