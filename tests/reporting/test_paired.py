"""Arms are compared with the first that the study lists, over the seeds that both have."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest

from ditjax import report
from ditjax.reporting.paired import paired_rows, paired_text
from ditjax.runs.results import find_results, write_record_scores

ARMS = {"none": (0.0, 3), "frozen": (-2.0, 3), "mapper": (0.5, 1)}  # shift, seeds


def write_arms(study, root):
    """Three arms at one size: seeds differ far more than arms do."""
    names = []
    for mode, (shift, seeds) in ARMS.items():
        for seed in range(seeds):
            rng = np.random.default_rng([seed, len(mode)])
            fd = 50 + 10 * seed + shift + 0.1 * rng.standard_normal()
            # Without layers the path has no effect, and the baseline is not named by it.
            lm = {"mode": mode, "path": "" if mode == "none" else "layers"}
            config = {"lm": lm, "optim": {"learning_rate": 1e-3}}
            folder = study.write_run(root / mode, *study.sizes[0], 2, seed, fd=fd, config=config)
            path = folder / "result.json"
            result = json.loads(path.read_text())
            result["run"] += f"-{mode}"
            result["metrics"] |= {"csi": 0.3 + 0.01 * seed - shift / 100, "persistence_csi": 0.2}
            result["model"] |= {"lm_frozen": len(mode)}  # it follows from lm.mode
            if mode == "frozen":
                result["gflops"] *= 2
                result["train"] |= {"steps": 100, "images": 800}
            path.write_text(json.dumps(result))
            hard = 10 * np.random.default_rng(9).standard_normal(50)  # of each record, for all arms
            csi = hard - shift + rng.standard_normal(50)
            csi[0] = np.nan
            scores = {"csi": csi} if mode != "mapper" else {}
            write_record_scores(folder, scores, result["protocol_hash"])
            names.append(result["run"])
    study.write_plan(root, [(name, {}) for name in names])
    return names


@pytest.fixture(scope="module")
def arms(study, tmp_path_factory):
    root = tmp_path_factory.mktemp("paired")
    return root, write_arms(study, root)


def test_a_model_with_one_arm_is_an_arm_of_the_first_model(arms, study, tmp_path):
    """As in a study at equal cost whose last arm is deeper; a model with arms keeps its own."""
    root, order = arms
    config = {"lm": {"mode": "none", "path": ""}, "optim": {"learning_rate": 1e-3}}
    for seed in range(2):
        study.write_run(tmp_path, *study.sizes[1], 2, seed, fd=40 + 10 * seed, config=config)
    found, _ = find_results([root, tmp_path])
    rows = [row for row in paired_rows(found, "fd_digits", [], order) if row.metric == "fd_digits"]
    assert [row.arm for row in rows][-1].startswith(f"DiT-{'x'.join(map(str, study.sizes[1]))}/2")
    assert len(rows) == 3
    assert len({(row.model, row.baseline) for row in rows}) == 1
    assert rows[-1].found is not None
    assert rows[-1].found.pairs == 2
    assert rows[-1].found.mean == pytest.approx(-10, abs=0.5)
    assert not any(line.startswith("model") for line in paired_text(rows).split("\n"))
    alone, _ = find_results([tmp_path])
    assert not paired_rows(alone, "fd_digits", [])


def test_rows_pair_seeds_and_state_costs(arms):
    root, order = arms
    found, _ = find_results([root])
    rows = {(row.metric, row.arm): row for row in paired_rows(found, "fd_digits", [], order)}
    frozen = rows["fd_digits", "steps 100, mode frozen"]
    assert frozen.baseline == "steps 200, mode none"
    assert frozen.found is not None
    assert frozen.found.pairs == 3
    assert frozen.found.settled  # and not by the spread of the seeds
    assert frozen.found.interval is not None
    assert frozen.found.interval.low < -2 < frozen.found.interval.high
    assert (frozen.step_cost, frozen.training_cost) == pytest.approx((2, 1))
    mapper = rows["fd_digits", "mode mapper"]
    assert mapper.found is not None
    assert (mapper.found.pairs, mapper.found.interval) == (1, None)
    assert mapper.shown["95 %"] == "none: 1 pair"
    # Records differ far more than arms do, too; without scores of them there is no interval.
    by_record = rows["csi", "steps 100, mode frozen"].records
    assert by_record is not None
    assert by_record.pairs == 49
    assert by_record.interval is not None
    assert by_record.interval.low < 2 < by_record.interval.high
    assert by_record.interval.high - by_record.interval.low < 1
    assert mapper.records is None
    assert rows["csi", "mode mapper"].records is None
    # Neither the floor nor what is the same in all arms has a row.
    assert {metric for metric, _ in rows} == {"fd_digits", "csi"}


def test_damaged_scores_of_records_and_others_are_problems_and_no_interval(arms, tmp_path):
    root = tmp_path / "study"
    shutil.copytree(arms[0], root)
    found, _ = find_results([root])
    by_name = {each.result["run"]: each.folder for each in found}
    folder = by_name[arms[1][0]]
    write_record_scores(folder, {"csi": np.zeros(50)}, "abc")
    (by_name[arms[1][-2]] / "records.npz").write_bytes(b"PK damaged")
    problems: list[str] = []
    rows = paired_rows(found, "csi", problems, arms[1])
    assert all(row.records is None for row in rows)
    assert len(problems) == 2
    assert sum("is of protocol 'abc'" in each for each in problems) == 1
    assert all("records.npz" in each for each in problems)


def test_rows_of_several_models_say_which(arms, tmp_path):
    root, order = arms
    found, _ = find_results([root])
    rows = paired_rows(found, "fd_digits", [], order)
    other = [dataclasses.replace(row, model="DiT-9x9x9/2") for row in rows]
    _, _, titles, first, *_ = paired_text([*rows[:1], *other[:1]]).split("\n")
    assert titles.split()[:3] == ["model", "metric", "arm"]
    assert first.startswith(rows[0].model)


def test_without_a_plan_the_first_by_name_is_the_baseline(arms):
    found, _ = find_results([arms[0]])
    baselines = {row.baseline for row in paired_rows(found, "csi", [])}
    assert baselines == {"steps 100, mode frozen, path layers"}


def test_models_without_arms_have_no_rows(study, tmp_path):
    study.write(tmp_path, seeds=(0, 1))
    found, _ = find_results([tmp_path])
    assert paired_rows(found, "fd_digits", []) == ()


def test_a_report_has_the_table_the_plot_and_the_file(arms, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "sample_cells", lambda *_: (None, ""))
    summary = report.make_report([arms[0]], tmp_path)
    assert "beside the first that the study lists (steps 200, mode none)" in summary.text
    page = summary.page.read_text()
    assert "Arms beside the baseline" in page
    assert "95 %, by record" in summary.text
    assert "FD-digits: arm - baseline, paired by seed" in page
    assert "mode frozen" in page
    assert (tmp_path / "paired.png").stat().st_size > 5000
    rows = list(csv.DictReader((tmp_path / "paired.csv").open()))
    assert {row["pairs"] for row in rows if row["arm"] == "mode mapper"} == {"1"}
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["paired"][0]["found"]["interval"]["level"] == 0.95
