"""The next rung is larger, predicted by the law, registered before it is trained, and scored."""

import dataclasses
import json
import math

import numpy as np
import pytest

from ditjax import report, sweep
from ditjax.cli import load_recipe
from ditjax.errors import UserError
from ditjax.models.network import training_gflops
from ditjax.runs.results import Found, write_result
from ditjax.scaling.extrapolate import forecast
from ditjax.scaling.spread import share_band
from ditjax.studies.cells import cells
from ditjax.studies.ladder import ScoredPrediction, next_rung, register, reliability
from ditjax.tasks import cost_of
from tests.commands.conftest import TINY
from tests.runs.test_results import a_result
from tests.scaling.planted import study

SIZES = "--config.sweep.grid=(('model.size',('1x32x2','2x32x2','2x48x3','3x64x4','4x64x4')),)"


def planted(cell, *, factor=1.0):
    """A result of FD = 0.2·C^(-0.5) in training Gflops C, with the cell's recipe."""
    c = cell.config
    y = 0.2 * cell.training_gflops**-0.5 * factor
    result = a_result(run=cell.name, config=cell.recipe, gflops=cell.gflops, params=cell.params)
    result["model"] = {"name": cell.model}
    result["train"] |= {"steps": c.train.steps, "images": c.train.steps * c.train.batch_size}
    result["metrics"] = {"fd_digits": y}
    return result


@pytest.fixture(scope="module")
def five():
    return cells(load_recipe([*TINY, SIZES]))


def runs_of(study, path, noise=0.0):
    rng = np.random.default_rng(3)
    return [Found(path, planted(cell, factor=math.exp(noise * rng.normal()))) for cell in study]


def test_a_rung_of_as_many_images_grows_the_largest_model(five, tmp_path):
    runs = runs_of(five, tmp_path, noise=0.02)
    largest = max(cell.training_gflops for cell in five)
    rung = next_rung(runs, "fd_digits", 3 * largest)
    c = rung.cell.config
    assert c.train.steps == five[0].config.train.steps
    assert rung.cell.training_gflops == pytest.approx(3 * largest, rel=0.1)
    assert rung.prediction.x == pytest.approx(rung.cell.training_gflops)
    assert rung.prediction.predicted == pytest.approx(0.2 * rung.prediction.x**-0.5, rel=0.1)
    assert rung.prediction.interval.low < rung.prediction.predicted < rung.prediction.interval.high
    depth, width, _ = map(int, c.model.size.split("x"))
    assert depth > 4
    assert width > 64
    # Without μP the rate falls with the width; with it, it carries over.
    before = five[-1].config.optim.learning_rate
    assert c.optim.learning_rate == pytest.approx(before * 64 / width)
    keys = {"parametrization": "mup", "base_width": 32, "base_head_width": 16}
    for each in runs:
        each.result["config"]["model"] = {**each.result["config"]["model"], **keys}
    assert next_rung(runs, "fd_digits", 3 * largest).cell.config.optim.learning_rate == before


def test_where_images_differ_the_rung_follows_the_frontier(five, tmp_path):
    """Of models whose images grow as C^(1/2) and a dear one that is worse."""
    runs = runs_of(five, tmp_path)
    gflops = np.array([each.result["gflops"] for each in runs])
    for each, images in zip(runs, 1e3 * gflops / gflops[0], strict=True):
        each.result["train"]["images"] = round(images)
        compute = training_gflops(each.result["gflops"], each.result["train"]["images"])
        each.result["metrics"]["fd_digits"] = compute**-0.25
    wasted = planted(five[0])
    wasted["train"]["images"] = 10**6
    wasted["run"] += "-longer"
    wasted["metrics"]["fd_digits"] = 9.0
    budget = 4 * training_gflops(gflops[-1], runs[-1].result["train"]["images"])
    rung = next_rung([*runs, Found(tmp_path, wasted)], "fd_digits", budget)
    assert wasted["run"] not in rung.runs
    seen = rung.cell.config.train.steps * rung.cell.config.train.batch_size
    assert seen == pytest.approx(2e3 * gflops[-1] / gflops[0], rel=0.02)
    assert cost_of(rung.cell.config).gflops == pytest.approx(2 * gflops[-1], rel=0.1)
    assert rung.prediction.predicted == pytest.approx(rung.prediction.x**-0.25, rel=1e-3)


def test_the_prediction_holds_in_90_of_100_planted_studies():
    """Of laws without an offset; `tests/scaling/coverage.py` has both, on held-out models."""
    rng, held, trials = np.random.default_rng(5), 0, 100
    for _ in range(trials):
        x, y, model = study(rng, seeds=2, models=8)
        prediction = forecast(x, y, 0.5, rng, groups=model, offset=False, resamples=200)
        of_model, of_seeds = rng.normal(size=2) * 0.1
        truth = 0.05 * 0.5**-0.5 * math.exp(of_model + 0.5 * of_seeds / 2**0.5)
        held += prediction.interval.low <= truth <= prediction.interval.high
    assert held >= 0.9 * trials


@pytest.mark.usefixtures("small_report")
def test_the_prediction_is_registered_before_training_and_scored_after(
    five, tmp_path, monkeypatch, capsys
):
    for cell, each in zip(five, runs_of(five, tmp_path, noise=0.02), strict=True):
        write_result(tmp_path / "runs" / cell.name, each.result)
    budget = 3 * max(cell.training_gflops for cell in five)
    words = [*TINY, SIZES, f"--workdir={tmp_path}", f"--ladder={budget:g}"]
    assert sweep.main([*words, "--dry_run", "--topology=v5e:2x2"]) == 0
    assert "hours" in capsys.readouterr().out
    assert not (tmp_path / "predictions").exists()
    seen = []

    def train(cell, workdir):
        (path,) = (workdir / "predictions").glob("*.json")
        seen.append(path.read_bytes())
        write_result(workdir / "runs" / cell.name, planted(cell))

    monkeypatch.setattr(sweep, "run_cell", train)
    assert sweep.main(words) == 0
    text = capsys.readouterr().out
    assert "1 of 1 registered prediction held" in text
    record = json.loads(seen[0])
    assert record["metric"] == "fd_digits"
    assert record["interval"]["low"] < record["predicted"] < record["interval"]["high"]
    assert len(record["runs"]) == 5
    (path,) = (tmp_path / "predictions").glob("*.json")
    assert path.read_bytes() == seen[0], "the outcome changes nothing in the file"
    saved = json.loads((tmp_path / "report" / "results.json").read_text())["predictions"]
    assert saved[0]["inside"] is True
    assert "Registered predictions" in (tmp_path / "report" / "index.html").read_text()


@pytest.fixture
def small_report(monkeypatch):
    monkeypatch.setattr(report, "pictures", lambda *_: {})
    monkeypatch.setattr(report, "sample_cells", lambda *_: (None, ""))


def test_a_registered_prediction_is_never_written_again(five, tmp_path):
    """Whatever the study has learned since."""
    first, second = (
        next_rung(runs_of(five, tmp_path, noise), "fd_digits", 1e3) for noise in (0.0, 0.1)
    )
    assert first.prediction.predicted != second.prediction.predicted
    path = register(tmp_path, first, None)
    kept = path.read_bytes()
    assert register(tmp_path, second, None) == path
    assert path.read_bytes() == kept
    other = dataclasses.replace(
        first, cell=first.cell._replace(recipe={**first.cell.recipe, "seed": 9})
    )
    with pytest.raises(UserError, match="predicts another run of this name"):
        register(tmp_path, other, None)


def test_mistakes_end_before_anything_is_written(five, tmp_path):
    runs = runs_of(five, tmp_path)
    with pytest.raises(UserError, match="the next rung costs more"):
        next_rung(runs, "fd_digits", 1e-6)
    largest = max(cell.training_gflops for cell in five)
    with pytest.raises(UserError, match=r"the nearest of the network's sizes is DiT-4x64x4/4, of"):
        next_rung(runs, "fd_digits", 1.001 * largest)  # its outcome is known: nothing to predict
    with pytest.raises(UserError, match="2 models: a law that predicts needs 3"):
        next_rung(runs[:2], "fd_digits", 1e9)
    words = [*TINY, SIZES, f"--workdir={tmp_path / 'none'}"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="run the study first"):
        sweep.main([*words, "--ladder=1e3"])
    with pytest.raises(UserError, match="leave --failed out"):
        sweep.main([*words, "--ladder=1e3", "--failed"])
    assert not list((tmp_path / "none").iterdir())


def test_reliability_is_a_share_with_its_interval():
    predictions = [ScoredPrediction("a", "fid", "", 10.0, 8.0, 12.0, x) for x in (9.0, 11.0, 20.0)]
    predictions.append(ScoredPrediction("b", "fid", "", 10.0, 8.0, 12.0, why="not run"))
    assert reliability(predictions).startswith("2 of 3 registered predictions held")
    assert "not run" in predictions[-1].words
    assert reliability(predictions[3:]) == ""
    low, high = share_band(2, 3)
    assert (low, high) == pytest.approx((0.0943, 0.9916), abs=1e-4)
    assert share_band(0, 4)[0] == 0
    assert share_band(4, 4)[1] == 1
