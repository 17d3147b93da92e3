"""The analysis of a group: held-out prediction, IsoFLOP profiles, claims, separate settings."""

import csv
import json
import math

import numpy as np
import pytest

from ditjax import report
from ditjax.reporting import sampling
from ditjax.reporting.analysis import FRONTIER, frontier_fits
from ditjax.reporting.curves import Logs
from ditjax.reporting.looks import Encoding
from ditjax.reporting.study import names_by_size
from ditjax.runs.results import find_results
from ditjax.scaling.fit import spearman
from ditjax.scaling.joint import JointLaw


def test_the_largest_model_is_predicted(nine):
    (analysis,) = nine.analyses
    found = analysis.extrapolation
    assert found.models_fitted == 8
    largest = max(analysis.runs, key=lambda each: each.result["gflops"])
    assert found.measured == pytest.approx(largest.result["metrics"]["fd_digits"])
    assert found.predicted == pytest.approx(0.2 * largest.result["gflops"] ** -0.5, rel=0.15)
    assert "the law fitted to the 8 smaller models predicts" in nine.text
    saved = json.loads((nine.out_dir / "results.json").read_text())["extrapolations"]
    assert saved[0]["models_fitted"] == 8


def test_the_papers_claims_are_tested_on_the_runs(nine):
    holds = {claim.text: claim.holds for claim in nine.analyses[0].claims}
    assert len(holds) == 5
    assert holds["Gflops predict quality, parameters alone do not."]
    assert holds["adaLN-Zero beats the other blocks."] is None
    assert "undecided: adaLN-Zero" in nine.text


@pytest.mark.usefixtures("no_pictures")
def test_profiles_are_of_evaluations_along_training(study, tmp_path):
    study.write_curves(study.write(tmp_path, seeds=(0, 1)))
    summary = report.make_report([tmp_path], tmp_path / "report")
    iso = summary.analyses[0].isoflop
    assert iso is not None
    assert iso.metric == "fd_digits"
    assert len(iso.curves) == 18
    assert 1 <= len(iso.profiles) <= 5
    for profile in iso.profiles:
        # compute = 3·G·8·step, so the planted curve is known at any budget
        for gflops, y in zip(profile.sizes, profile.metrics, strict=True):
            step = profile.budget / (3 * 8 * gflops)
            assert y == pytest.approx(30 * step**-0.3 * gflops**-0.1, rel=1e-3)
    # Of the planted curves y ∝ G^0.2·C^(-0.3): the smallest is the best at every budget.
    assert all(profile.best_size is None for profile in iso.profiles)
    page = summary.page.read_text()
    assert "No law of the best size" in page
    assert "training loss in training compute: a law needs 3 models, there are 2" in page


@pytest.mark.usefixtures("no_pictures")
def test_profiles_are_of_runs_that_end_at_one_budget(study, tmp_path):
    """Of L = (N/n)^-0.4 + (D/d)^-0.4 the best size is where both terms are equal: N* ∝ C^0.5."""
    n, d, budgets = 1e-5, 1e3, (10.0, 60.0, 360.0)
    for budget in budgets:
        for width in (12, 24, 48, 96, 192, 384):
            folder = study.write_run(tmp_path / f"{budget}", 2, width, 2, 4, fd=1.0)
            (folder / "metrics.jsonl").unlink()
            result = json.loads((folder / "result.json").read_text())
            steps = round(budget / (3 * 8 * result["gflops"]))
            result["train"] |= {"steps": steps, "images": 8 * steps}
            loss = (result["gflops"] / n) ** -0.4 + (8 * steps / d) ** -0.4
            result["metrics"]["fd_digits"] = loss
            result["config"] = {"train": {"steps": steps}}
            result["run"] += f"-gflops_{budget:g}"
            (folder / "result.json").write_text(json.dumps(result))
    iso = report.make_report([tmp_path], tmp_path / "report").analyses[0].isoflop
    assert iso is not None
    assert iso.finished
    assert not iso.curves
    assert [profile.budget for profile in iso.profiles] == pytest.approx(budgets, rel=0.01)
    for profile in iso.profiles:
        assert profile.interval is not None
        assert profile.interval.low < (profile.budget * n / (3 * d)) ** 0.5 < profile.interval.high
    assert iso.optimal is not None
    assert iso.optimal.size.exponent == pytest.approx(0.5, abs=0.05)


def test_the_lowest_loss_for_its_compute_has_the_planted_exponent(study, tmp_path):
    """Of L = N^-0.4 + (D/100)^-0.4, the frontier of many sizes falls as compute^-0.2."""
    rows = [int(10 * 1.25**k) for k in range(24)]
    for width in (12, 24, 48, 96, 192, 384):
        folder = study.write_run(tmp_path, 2, width, 2, 4)
        gflops = json.loads((folder / "result.json").read_text())["gflops"]
        loss = [gflops**-0.4 + (8 * step / 100) ** -0.4 for step in rows]
        lines = [
            {"step": step, "eval/val_loss": y, "eval/protocol_hash": "aaaa"}
            for step, y in zip(rows, loss, strict=True)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, problems = find_results([tmp_path])
    (fit,) = frontier_fits(found, Logs(found, problems))
    assert not problems
    assert (fit.label, fit.x, fit.y) == (FRONTIER, "training Gflops", "val_loss")
    assert fit.models >= 3
    assert fit.law is not None
    assert fit.law.b == pytest.approx(0.2, abs=0.04)
    assert fit.law.b_interval.low < fit.law.b < fit.law.b_interval.high


@pytest.mark.usefixtures("no_pictures")
def test_runs_of_one_model_that_differ_in_more_than_seeds_are_not_averaged(study, tmp_path):
    study.write(tmp_path, seeds=(0, 1))
    for patch in (4, 2, 1):
        study.write_run(
            tmp_path / "slow",
            *study.sizes[0],
            patch,
            fd=500.0,
            config={"optim": {"learning_rate": 0.5}},
        )
    summary = report.make_report([tmp_path / "slow", tmp_path], tmp_path / "report")
    (said,) = (each for each in summary.problems if "differ in optim.learning_rate" in each)
    assert "not averaged" in said
    analysis = summary.analyses[0]
    assert len(analysis.runs) == 15  # the first three of --runs stand for their names
    assert [fit.n for fit in analysis.fits if fit.label.startswith("learning_rate")] == [15, 3]


@pytest.mark.usefixtures("no_pictures")
def test_what_a_sweep_varies_is_no_problem(study, tmp_path):
    """The same results are one beside other folders, and none as cells of one sweep."""
    own = {"optim": {"learning_rate": 0.5}}
    runs = tmp_path / "study" / "runs"
    study.write(runs)
    study.write_run(runs, *study.sizes[0], 4, seed=1, config=own)
    said = report.make_report([runs], tmp_path / "report").problems
    assert any("differ in optim.learning_rate" in each for each in said)
    study.write_plan(tmp_path / "study", [(path.name, {}) for path in sorted(runs.iterdir())])
    said = report.make_report([tmp_path / "study"], tmp_path / "planned").problems
    assert not any("differ in" in each for each in said)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("steps", "mixed"), [(200, False), (100, True)])
def test_other_steps_at_one_cost_are_no_problem(study, tmp_path, steps, mixed):
    """A network of twice the Gflops for half the steps; for a quarter, the fit mixes them."""
    for size, gflops, taken in ((study.sizes[0], 1.0, 400), (study.sizes[1], 2.0, steps)):
        folder = study.write_run(tmp_path, *size, 4, gflops=gflops)
        path = folder / "result.json"
        result = json.loads(path.read_text())
        result["train"] |= {"steps": taken, "images": 8 * taken}
        path.write_text(json.dumps(result))
    problems = report.make_report([tmp_path], tmp_path / "report").problems
    assert any("the fit mixes runs" in each for each in problems) == mixed


@pytest.mark.usefixtures("no_pictures")
def test_validation_loss_agrees_by_rank(study, tmp_path):
    losses, distances = [], []
    for size in study.sizes:
        for patch in (4, 2, 1):
            folder = study.write_run(tmp_path, *size, patch)
            path = folder / "result.json"
            result = json.loads(path.read_text())
            distances.append(result["metrics"]["fd_digits"])
            losses.append(0.1 + 0.01 * (distances[-1] % 7))
            result["metrics"]["val_loss"] = losses[-1]
            path.write_text(json.dumps(result))
    summary = report.make_report([tmp_path], tmp_path / "report")
    analysis = summary.analyses[0]
    assert analysis.agreed == 9
    assert analysis.agreement == pytest.approx(spearman(losses, distances))
    assert "FD-digits against validation loss" in summary.page.read_text()
    laws = [fit for fit in analysis.others if fit.label != FRONTIER]
    assert {fit.y for fit in laws} == {"fd_digits", "val_loss"}


@pytest.mark.usefixtures("no_pictures")
def test_a_law_in_size_and_images_is_fitted_where_the_runs_differ_in_both(study, tmp_path):
    law = JointLaw(e=1.0, a=0.5, alpha=0.4, b=270.0, beta=0.5, n=0)
    for folder in study.write(tmp_path, seeds=range(4)):
        path = folder / "result.json"
        result = json.loads(path.read_text())
        images = 1600 * 4 ** result["train"]["seed"]
        result["train"] |= {"images": images, "steps": images // 8}
        result["metrics"]["fd_digits"] = float(law(result["gflops"], images))
        path.write_text(json.dumps(result))
    summary = report.make_report([tmp_path], tmp_path / "report")
    joint = summary.analyses[0].joint
    assert joint.law is not None
    assert not joint.along_training
    assert joint.law.n == 36
    for name in ("e", "a", "alpha", "b", "beta"):
        assert getattr(joint.law, name) == pytest.approx(getattr(law, name), rel=1e-2)
    assert joint.deviation < 1e-3
    words = "FD-digits ≈ 1.00 + 0.500 · N^-0.400 + 270 · D^-0.500, fitted to 36 results"
    assert words in summary.text
    assert "best size grows as compute^0.556" in summary.page.read_text()
    saved = json.loads((summary.out_dir / "results.json").read_text())["joint"]
    assert saved[0]["law"]["beta"] == joint.law.beta


@pytest.mark.usefixtures("no_pictures")
def test_a_law_in_size_and_images_is_fitted_along_training_or_not_at_all(study, tmp_path):
    folders = study.write(tmp_path)
    same = report.make_report([tmp_path], tmp_path / "report")
    assert "No law in size and images: training loss does not fall with size" in same.text
    for folder in folders:
        (folder / "metrics.jsonl").unlink()
    nothing = report.make_report([tmp_path], tmp_path / "report")
    assert nothing.analyses[0].joint.law is None
    assert "No law in size and images: 1 different numbers of images" in nothing.text
    study.write_curves(folders)
    summary = report.make_report([tmp_path], tmp_path / "report")
    joint = summary.analyses[0].joint
    assert joint.along_training
    assert joint.law is not None
    assert joint.law.n == 9 * 7
    assert "fitted to 63 points along training" in summary.text


@pytest.mark.usefixtures("no_pictures")
def test_the_bound_is_shown_in_bits_per_dim(study, tmp_path):
    for patch, term in ((4, 0.004), (2, 0.003), (1, None)):
        metrics = {"fd_digits": 1.0 * patch} | ({} if term is None else {"val_vlb": term})
        config = {"diffusion": {"timesteps": 1000}}
        study.write_run(tmp_path, *study.sizes[0], patch, metrics=metrics, config=config)
    summary = report.make_report([tmp_path], tmp_path / "report")
    header, *rows = [line.split() for line in summary.text.splitlines()[:4]]
    assert [row[header.index("bits/dim")] for row in rows] == ["4.00", "3.00", "-"]
    assert "L_vlb on held-out images is 3.00 bits/dim for DiT-2x48x2-p2-seed0" in summary.text
    assert "bits/dim" in summary.page.read_text()
    saved = list(csv.DictReader((summary.out_dir / "table.csv").open()))
    assert saved[0]["metrics.val_vlb"] == "0.004"


def a_grid(runs, steps=(5, 10), **settings):
    cells = [
        {
            "run": name,
            "settings": {"steps": str(n), "cfg_scale": 1.0} | settings,
            "protocol": {"steps": str(n), "num_samples": 9} | settings,
            "sampling_gflops": gflops * n,
            "metrics": {"fd_digits": 1 / (gflops * n) if n > 0 else None},
        }
        for name, gflops in runs
        for n in steps
    ]
    return {"schema": 1, "cells": cells}


@pytest.mark.usefixtures("no_pictures")
def test_sampling_compute_is_read_from_the_grid_beside_the_runs(study, tmp_path):
    folders = study.write(tmp_path / "runs")
    runs = [
        (folder.name, json.loads((folder / "result.json").read_text())["gflops"])
        for folder in folders
    ]
    (tmp_path / "fig10").mkdir()
    grid = a_grid([*runs, ("another", 1.0)], steps=(5, 10, 50))
    grid["cells"] += a_grid(runs, steps=(20,), cfg_scale=4.0)["cells"]
    (tmp_path / "fig10" / "grid.json").write_text(json.dumps(grid))
    summary = report.make_report([tmp_path], tmp_path / "report")
    page = summary.page.read_text()
    assert "FD-digits against sampling compute" in page
    assert "More sampling compute does not make up for a small model." in page
    assert "More sampling compute does not make up for a small model." in summary.text
    found = summary.groups[0].runs
    told: list[str] = []
    sampled = sampling.read_sampled([tmp_path], found, "fd_digits", told)
    assert told == [
        "grids: 12 cells left out: 3 of runs without a result here, 9 of other settings than most."
    ]
    assert len(sampled) == 27, "guided cells and foreign runs are not mixed in"
    costs = {one.run.result["run"]: one.gflops / one.run.result["gflops"] for one in sampled}
    assert set(np.round(list(costs.values()))) == {50}
    problems: list[str] = []
    (tmp_path / "fig10" / "grid.json").write_text("[")
    assert sampling.read_sampled([tmp_path], found, "fd_digits", problems) == []
    assert "no whole grid" in problems[0]


def test_sizes_are_in_the_order_of_their_parameters(study, tmp_path):
    """The patches do not matter, although a small model at patch 1 may cost more Gflops."""
    study.write_run(tmp_path, *study.sizes[2], 4)
    study.write_run(tmp_path, *study.sizes[1], 1)
    study.write_run(tmp_path, *study.sizes[0], 2)
    found, _ = find_results([tmp_path])
    sizes = ["2x48x2", "3x72x3", "4x96x3"]
    colours, markers = Encoding(found).keys()
    assert (markers.title, list(markers.values)) == ("size", sizes)
    assert (colours.title, list(colours.values)) == ("patch", ["4", "2", "1"])
    assert names_by_size(found, ("size",)) == sizes


@pytest.mark.usefixtures("no_pictures")
def test_two_models_settle_no_claim(study, tmp_path):
    for patch in (2, 1):
        study.write_run(tmp_path, *study.sizes[0], patch)
    summary = report.make_report([tmp_path], tmp_path / "report")
    assert summary.analyses[0].claims == ()
    assert "holds" not in summary.text


def test_validation_loss_is_not_mentioned_without_one(nine):
    assert math.isnan(nine.analyses[0].agreement)
    assert "alidation loss" not in nine.page.read_text()
