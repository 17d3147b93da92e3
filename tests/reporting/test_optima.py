"""The best rate and batch size of each model of a study, their exponents, and what is refused."""

import numpy as np
import pytest

from ditjax import report
from ditjax.reporting.optima import BATCH_KEY, RATE_KEY, tuned_keys
from ditjax.runs.results import Found
from tests.runs.test_results import a_result

SIZES = (("2x32x2", 0.001), ("3x64x2", 0.03), ("4x96x3", 1.0))
RATES = 1e-3 * 2.0 ** np.arange(7)
BATCHES = (4, 8, 16, 32, 64)


def a_run(size, gflops, rate, batch, fd, seed=0, images=64_000):
    """A run of equal images, whatever its batch size."""
    result = a_result(run=f"{size}-{rate:.4g}-{batch}-{seed}", gflops=gflops)
    result["model"] = {"name": f"DiT-{size}/2", "size": size, "patch": 2, "block": "adaln_zero"}
    result["train"] |= {
        "steps": images // batch,
        "batch_size": batch,
        "images": images,
        "learning_rate": rate,
        "seed": seed,
    }
    result["config"] = {
        "optim": {"learning_rate": rate},
        "train": {"batch_size": batch, "steps": images // batch},
        "seed": seed,
    }
    result["metrics"] = {"fd_digits": fd}
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The best rate falls as Gflops^-0.1 and rises as batch^0.5; the best batch is 16."""
    rng, folder, found = np.random.default_rng(0), tmp_path_factory.mktemp("runs"), []
    for size, gflops in SIZES:
        for batch in BATCHES:
            best = 4e-3 * gflops**-0.1 * (batch / 16) ** 0.5
            for rate in RATES:
                off = 0.1 * np.log(rate / best) ** 2 + 0.05 * np.log(batch / 16) ** 2
                fd = 10 * np.exp(off + 0.005 * rng.normal())
                found.append(Found(folder, a_run(size, gflops, float(rate), batch, float(fd))))
    return found


@pytest.fixture(scope="module")
def found(runs):
    return tuned_keys(runs, "fd_digits")


def test_a_rate_has_its_law_in_size_and_in_batch_size(found):
    tuned = [each for each in found if each.key == RATE_KEY]
    by_size = {each.where: each for each in tuned if each.x == "Gflops"}
    assert by_size.keys() == {f"batch_size {batch}" for batch in BATCHES}
    law = by_size["batch_size 16"].law
    assert law is not None
    assert law.exponent == pytest.approx(-0.1, abs=0.02)
    assert "It goes as Gflops^-0." in by_size["batch_size 16"].words
    along = {each.where: each.law for each in tuned if each.x == "batch size"}
    assert along.keys() == {f"DiT-{size}/2" for size, _ in SIZES}
    assert along["DiT-3x64x2/2"].exponent == pytest.approx(0.5, abs=0.1)


def test_a_batch_size_is_best_at_each_models_best_rate(runs, found):
    """With equal images, steps follow from it; at one rate the best batch would be another."""
    (tuned,) = [each for each in found if each.key == BATCH_KEY]
    assert tuned.where == ""
    assert [best.minimum.x for best in tuned.bests] == pytest.approx([16] * 3, rel=0.15)
    assert tuned.law.exponent == pytest.approx(0, abs=0.05)
    at_one_rate = [each for each in runs if each.result["train"]["learning_rate"] == RATES[3]]
    (other,) = tuned_keys(at_one_rate, "fd_digits")
    without, best = other.bests[0].minimum, tuned.bests[0].minimum
    assert without is not None
    assert best is not None
    assert abs(without.x - 16) > abs(best.x - 16)


def test_what_shows_no_minimum_is_said_and_counts_for_no_law(runs):
    slow = [
        each
        for each in runs
        if each.result["train"]["batch_size"] == 16
        and each.result["train"]["learning_rate"]
        < (0.003 if each.result["gflops"] < 0.01 else 0.02)
    ]
    (tuned,) = tuned_keys(slow, "fd_digits")
    assert "2 values were tried: a minimum needs 5" in tuned.words
    assert "No law against Gflops: it needs minima at 3, there are 2" in tuned.words
    assert tuned_keys(slow[:1], "fd_digits") == ()


@pytest.mark.usefixtures("no_pictures")
def test_the_report_prints_them(study, tmp_path, capsys):
    for size in study.sizes[:1]:
        for k, rate in enumerate((1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)):
            config = {"optim": {"learning_rate": rate}}
            fd = 10 + 5.0 * (k - 2.2) ** 2
            name = f"DiT-r{k}"
            study.write_run(tmp_path / name, *size, 2, config=config, fd=fd, run=name)
    assert report.main([f"--runs={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert "Best learning rate, with 95 % intervals: DiT-2x48x2/2: 0.00" in text
    assert "Best learning rate, with 95 %" in (tmp_path / "report" / "index.html").read_text()
