"""Arms are found by network and settings, and compared at tuned values; metrics are ranked."""

import json

import numpy as np
import pytest

from ditjax import report
from ditjax.errors import UserError
from ditjax.reporting.arms import compare_arms, rank_agreements
from ditjax.runs.results import find_results

SIZES = ((2, 32, 2), (2, 48, 3), (3, 64, 4), (4, 96, 3))


def write_arm(study, root, process, b, rates, best=1e-2):
    """Runs FD ∝ Gflops^-b at the best rate, and a multiple at others, with two seeds each."""
    for size in SIZES:
        for seed in (0, 1):
            for rate in rates:
                config = {"diffusion": {"process": process}, "optim": {"learning_rate": rate}}
                folder = study.write_run(
                    root / f"{process}-{rate}", *size, 2, seed, config=config, fd=1.0
                )
                path = folder / "result.json"
                result = json.loads(path.read_text())
                noise = np.random.default_rng([size[1], seed, int(1e4 * rate)]).normal()
                worse = 1.0 if rate == best else {"ddpm": 2.0, "flow": 3.0}[process]
                fd = worse * result["gflops"] ** -b * np.exp(0.02 * noise)
                result["metrics"] |= {"fd_digits": fd, "kd_digits": fd**2, "recall_digits": -fd}
                result["run"] += f"-{process}-{rate}"
                path.write_text(json.dumps(result))


@pytest.fixture(scope="module")
def two_arms(study, tmp_path_factory):
    root = tmp_path_factory.mktemp("arms")
    write_arm(study, root, "ddpm", 0.3, (1e-2, 1e-3))
    write_arm(study, root, "flow", 0.6, (1e-2, 1e-3))
    return root


def test_arms_are_compared_at_the_best_value_of_a_tuned_key(two_arms):
    found, _ = find_results([two_arms])
    (pair,) = compare_arms(found, "fd_digits", ["optim.learning_rate"])
    assert pair.models == (4, 4)
    assert pair.found is not None
    assert pair.found.settled
    by_label = dict(zip(pair.labels, pair.found.b, strict=True))
    assert by_label == pytest.approx({"process ddpm": 0.3, "process flow": 0.6}, abs=0.05)
    low, high = pair.found.interval.low, pair.found.interval.high
    assert low <= by_label[pair.labels[0]] - by_label[pair.labels[1]] <= high
    # The worse rate would have changed the two levels by other factors.
    x = pair.found.at
    assert pair.found.ratio == pytest.approx(x ** (pair.found.b[1] - pair.found.b[0]), rel=0.1)


def test_without_a_tuned_key_every_setting_is_an_arm(two_arms):
    found, _ = find_results([two_arms])
    pairs = compare_arms(found, "fd_digits")
    assert len(pairs) == 6
    assert any("learning_rate 0.001" in pair.labels[1] for pair in pairs)
    with pytest.raises(UserError, match=r"--tuned=optim\.rate"):
        compare_arms(found, "fd_digits", ["optim.rate"])


def test_metrics_that_rank_alike_agree(two_arms):
    found, _ = find_results([two_arms / "flow-0.01"])
    agreed = {(each.first, each.second): each for each in rank_agreements(found)}
    ranks = {pair: each.spearman for pair, each in agreed.items()}
    interval = agreed["fd_digits", "kd_digits"].interval
    assert interval.low < 0 < interval.high == 1, "four models that agree do not settle it"
    assert ranks["fd_digits", "kd_digits"] == 1
    assert ranks["fd_digits", "recall_digits"] == -1
    assert not any("floor" in name for pair in ranks for name in pair)


@pytest.mark.usefixtures("no_pictures")
def test_a_report_says_which_arm_gains_more(two_arms, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "sample_cells", lambda *_: (None, ""))
    summary = report.make_report([two_arms], tmp_path, tuned=["optim.learning_rate"])
    assert "process flow gains more from Gflops" in summary.text
    assert "process flow gains more from Gflops" in summary.page.read_text()
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["slopes"][0]["found"]["interval"]["level"] == 0.95
    assert {"fd_digits", "kd_digits"} <= {each["first"] for each in record["ranks"]}
