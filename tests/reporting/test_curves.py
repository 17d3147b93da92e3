"""Curves along training: smoothing, compute, and evaluations of another protocol."""

import json

import numpy as np
import pytest

from ditjax.reporting.curves import Logs, smooth, thinned
from ditjax.runs.results import find_results


def test_smoothing_keeps_a_constant_and_averages_noise():
    steps = np.arange(1.0, 2001.0)
    np.testing.assert_allclose(smooth(steps, np.full(2000, 0.3)), 0.3, rtol=1e-12)
    assert smooth(steps, steps)[599] == pytest.approx(610)  # the mean of 500 to 720
    noisy = 0.3 + np.random.default_rng(0).normal(size=2000) * 0.1
    assert np.std(smooth(steps, noisy)[1000:]) < 0.02


def test_evaluations_of_another_protocol_are_left_out_and_named(study, tmp_path):
    folders = study.write(tmp_path)
    for folder, protocol in zip(folders, "aaaaaaabb", strict=True):
        lines = [
            {
                "step": step,
                "loss": 1.0,
                "eval/fd_digits": 100.0 / step,
                "eval/protocol_hash": protocol,
            }
            for step in (10, 20, 40)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, problems = find_results([tmp_path])
    curves = Logs(found, problems).evaluations("fd_digits", found, problems)
    assert len(curves) == 7
    (said,) = problems
    assert "2 protocols (a, b): 6 of other ones than a are not drawn" in said
    first = curves[0]
    np.testing.assert_allclose(first.values, [10.0, 5.0, 2.5])
    # 3 forward passes an image, 8 images a step
    np.testing.assert_allclose(
        first.gflops, 3 * 8 * first.run.result["gflops"] * np.array([10, 20, 40])
    )
    assert [c.run.result["gflops"] for c in curves] == sorted(
        c.run.result["gflops"] for c in curves
    )


def test_thinning_keeps_both_ends(study, tmp_path):
    study.write_run(tmp_path, *study.sizes[0], 1)
    found, problems = find_results([tmp_path])
    (curve,) = Logs(found, problems).losses()
    thin = thinned(curve, 10)
    assert len(thin.steps) <= 10
    assert (thin.steps[0], thin.steps[-1]) == (1.0, 49.0)
    assert thinned(curve, 49) is curve
