"""A run along its training, from metrics.jsonl: loss and evaluations against steps and compute."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditjax.errors import UserError
from ditjax.models.cost import training_gflops
from ditjax.runs.results import METRICS_FILE, Found, read_metrics
from ditjax.studies.words import short

MAX_POINTS = 400  # of a curve: more are not seen
EVALUATION = "eval/"
PROTOCOL = "eval/protocol_hash"
LOSS = "loss"


@dataclass(frozen=True)
class Curve:
    """steps f64[n] > 0, rising; `gflops` f64[n] of training up to there; values f64[n] > 0."""

    run: Found
    steps: NDArray[np.float64]
    gflops: NDArray[np.float64]
    values: NDArray[np.float64]


class Logs:
    """The metrics.jsonl of a study's runs, each read once."""

    def __init__(self, runs: Sequence[Found], problems: list[str]) -> None:
        """Reads them; one that is damaged, or logged a loss that is none, is a problem."""
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
            losses = [line[LOSS] for line in lines if _is_number(line.get(LOSS))]
            bad = sum(not math.isfinite(value) for value in losses)
            if bad:
                problems.append(
                    f"run {short(each.result['run'])!r}: {bad} logged losses not finite."
                )

    def losses(self) -> list[Curve]:
        """Training losses, smoothed, of the runs that logged any."""
        return [
            Curve(curve.run, curve.steps, curve.gflops, smooth(curve.steps, curve.values))
            for curve in self._curves(LOSS, 2)
        ]

    def evaluations(self, metric: str, runs: Sequence[Found], problems: list[str]) -> list[Curve]:
        """The metric along training of those of `runs` that were scored twice or more.

        Evaluations of another protocol than most are left out, and named.
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

    def _curves(self, key: str, at_least: int, protocol: str | None = None) -> list[Curve]:
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
            compute = training_gflops(each.result["gflops"], batch * steps[keep])
            curves.append(Curve(each, steps[keep], compute, values[keep]))
        return sorted(curves, key=lambda curve: curve.run.result["gflops"])


def thinned(curve: Curve, most: int = MAX_POINTS) -> Curve:
    """At most `most` points, evenly spaced on a logarithmic axis, both ends among them."""
    n = len(curve.steps)
    if n <= most:
        return curve
    at = np.unique(np.geomspace(1, n, most).round().astype(int) - 1)
    return Curve(curve.run, curve.steps[at], curve.gflops[at], curve.values[at])


def smooth(steps: NDArray[np.float64], loss: NDArray[np.float64]) -> NDArray[np.float64]:
    """s_i = mean of l_j over the steps from steps_i / 1.2 to 1.2 · steps_i.

    The window is as wide at each place of a logarithmic axis, so the first fall is not smeared.
    """
    total = np.concatenate([[0.0], np.cumsum(loss)])
    first = np.searchsorted(steps, steps / 1.2)
    last = np.searchsorted(steps, steps * 1.2, side="right")
    return np.asarray((total[last] - total[first]) / (last - first))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
