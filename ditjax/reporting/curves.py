"""Curves along training, from metrics.jsonl: losses and evaluations against steps and compute."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditjax.errors import UserError
from ditjax.runs.results import METRICS_FILE, Found, read_metrics, trained_gflops
from ditjax.studies.words import short

MAX_POINTS = 400  # of a curve; more cannot be seen
EVALUATION = "eval/"
PROTOCOL = "eval/protocol_hash"
LOSS_KEY = "loss"


@dataclass(frozen=True)
class TrainingCurve:
    """A quantity along the training of a run.

    steps f64[n] > 0, rising; gflops f64[n] of training up to each; values f64[n] > 0.
    """

    run: Found
    steps: NDArray[np.float64]
    gflops: NDArray[np.float64]
    values: NDArray[np.float64]


class Logs:
    """The metrics.jsonl files of a study's runs, each read once."""

    def __init__(self, runs: Sequence[Found], problems: list[str]) -> None:
        """Read the logs; a damaged one, or a loss that is not finite, is added to `problems`."""
        self._lines: dict[int, list[dict[str, Any]]] = {}
        self._runs = list(runs)
        for index, each in enumerate(self._runs):
            path = each.folder / METRICS_FILE
            if not path.exists():
                continue
            try:
                lines = read_metrics(path)
            except UserError as error:
                problems.append(str(error))
                continue
            self._lines[index] = lines
            losses = [line[LOSS_KEY] for line in lines if _is_number(line.get(LOSS_KEY))]
            bad = sum(not math.isfinite(value) for value in losses)
            if bad:
                problems.append(
                    f"run {short(each.result['run'])!r}: {bad} logged losses are not finite."
                )

    def losses(self) -> list[TrainingCurve]:
        """The smoothed training losses of the runs that logged any."""
        return [
            TrainingCurve(curve.run, curve.steps, curve.gflops, smooth(curve.steps, curve.values))
            for curve in self._curves(LOSS_KEY, 2)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """Every evaluation along training: its run, step, protocol hash and metrics."""
        return [
            {"run": self._runs[index].result["run"], "step": line["step"]}
            | {
                key.removeprefix(EVALUATION): line[key]
                for key in line
                if key.startswith(EVALUATION)
            }
            for index, lines in self._lines.items()
            for line in lines
            if PROTOCOL in line
        ]

    def evaluations(
        self, metric: str, runs: Sequence[Found], problems: list[str]
    ) -> list[TrainingCurve]:
        """The metric along training, for those of `runs` that were evaluated at least twice.

        Evaluations of any protocol but the most frequent one are left out, which is added to
        `problems`.
        """
        wanted = {id(each) for each in runs}
        indices = [i for i, each in enumerate(self._runs) if id(each) in wanted]
        hashes = Counter(
            str(line.get(PROTOCOL))
            for i in indices
            for line in self._lines.get(i, ())
            if EVALUATION + metric in line
        )
        if not hashes:
            return []
        kept = hashes.most_common(1)[0][0]
        if len(hashes) > 1:
            left_out = sum(hashes.values()) - hashes[kept]
            problems.append(
                f"evaluations along training are of {len(hashes)} protocols"
                f" ({', '.join(short(key, 16) for key in hashes)}): {left_out} of other ones than"
                f" {short(kept, 16)} are not drawn."
            )
        return [
            curve
            for curve in self._curves(EVALUATION + metric, 2, protocol=kept)
            if id(curve.run) in wanted
        ]

    def _curves(self, key: str, at_least: int, protocol: str | None = None) -> list[TrainingCurve]:
        curves = []
        for index, lines in self._lines.items():
            each = self._runs[index]
            points = [
                (line["step"], line[key])
                for line in lines
                if _is_number(line.get(key))
                and (protocol is None or str(line.get(PROTOCOL)) == protocol)
            ]
            table = np.array(points, np.float64).reshape(-1, 2)
            steps, values = table[:, 0], table[:, 1]
            keep = np.isfinite(values) & (values > 0) & (steps > 0)
            if keep.sum() < at_least:
                continue
            batch = each.result["train"]["batch_size"]
            compute = trained_gflops(each.result, batch * steps[keep])
            curves.append(TrainingCurve(each, steps[keep], compute, values[keep]))
        return sorted(curves, key=lambda curve: curve.run.result["gflops"])


def thinned(curve: TrainingCurve, most: int = MAX_POINTS) -> TrainingCurve:
    """At most `most` points, evenly spaced on a logarithmic axis, including both ends."""
    n = len(curve.steps)
    if n <= most:
        return curve
    at = np.unique(np.geomspace(1, n, most).round().astype(int) - 1)
    return TrainingCurve(curve.run, curve.steps[at], curve.gflops[at], curve.values[at])


def smooth(steps: NDArray[np.float64], loss: NDArray[np.float64]) -> NDArray[np.float64]:
    """s_i = mean of l_j over the steps from steps_i / 1.2 to 1.2 · steps_i.

    The window has the same width everywhere on a logarithmic axis, so that the steep fall at the
    start is not smeared.
    """
    total = np.concatenate([[0.0], np.cumsum(loss)])
    first = np.searchsorted(steps, steps / 1.2)
    last = np.searchsorted(steps, steps * 1.2, side="right")
    return np.asarray((total[last] - total[first]) / (last - first))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
