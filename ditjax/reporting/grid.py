"""The cells of an evaluation grid: their table, their CSV and the Pareto front."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ditjax.files.durations import duration
from ditjax.reporting.table import csv_of
from ditjax.studies.words import OF_A_METRIC, aligned, metric_name, number, short, shortened

BEST, FRONT = "*", "+"

# The table shows a metric's value and the distance's interval; all other numbers are in the CSV.
_CSV_ONLY = (*OF_A_METRIC, "_floor")


class Outcome(NamedTuple):
    """One cell. `settings`: axis -> value, None for an axis without effect on this cell.

    `gflops` are multiply-accumulates / 1e9 of all the network's evaluations for one sample.
    """

    name: str
    run: str
    step: int
    params_sha256: str
    settings: dict[str, Any]
    protocol_hash: str
    gflops: float
    metrics: dict[str, float]
    seconds: float


def setting_text(value: Any) -> str:
    """A setting as its flag takes it: 1.5, 0.1:0.7, 10+15+20; '-' if it has no effect."""
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return ":".join(setting_text(each) for each in value)
    if isinstance(value, float):
        brief = f"{value:g}"
        return brief if float(brief) == value else repr(value)
    return str(value).replace(",", "+")


def varying(outcomes: Sequence[Outcome]) -> list[str]:
    """The axes with several values among the cells on which they have an effect, in order."""
    return [axis for axis, values in _values(outcomes).items() if len(values) > 1]


def _values(outcomes: Sequence[Outcome]) -> dict[str, list[str]]:
    """Axis -> its values as text."""
    found: dict[str, dict[str, None]] = {}
    for each in outcomes:
        for axis, value in each.settings.items():
            values = found.setdefault(axis, {})
            if value is not None:
                values[setting_text(value)] = None
    return {axis: list(values) for axis, values in found.items()}


def front(outcomes: Sequence[Outcome], metric: str) -> list[int]:
    """Indices of the Pareto front, by Gflops.

    No other cell has a lower distance for as many Gflops or fewer. Cells whose distance is not
    finite are not on the front.
    """
    found, best = [], math.inf
    values = [each.metrics.get(metric, math.nan) for each in outcomes]
    finite = [i for i, value in enumerate(values) if math.isfinite(value)]
    for i in sorted(finite, key=lambda i: (outcomes[i].gflops, values[i])):
        if values[i] < best:
            found.append(i)
            best = values[i]
    return found


def grid_text(
    outcomes: Sequence[Outcome], metric: str, protocol: Mapping[str, Any], reference: str
) -> str:
    """Aligned columns, a row a cell in the given order, and what all cells share."""
    name, varied = metric_name(metric), varying(outcomes)
    on_front = front(outcomes, metric)
    best = on_front[-1] if on_front else None
    metrics = dict.fromkeys(key for each in outcomes for key in each.metrics)
    others = [key for key in metrics if key != metric and not key.endswith(_CSV_ONLY)]
    intervals = f"{metric}_low" in metrics
    several = len({each.run for each in outcomes}) > 1
    titles = ["", *(["run"] if several else []), *varied, "Gflops", name]
    titles += [*(["95 %"] if intervals else []), *map(metric_name, others), "drawn in"]
    rows, names = [titles], shortened(each.run for each in outcomes)
    for i, each in enumerate(outcomes):
        mark = (BEST if i == best else " ") + (FRONT if i in on_front else " ")
        row = [mark, *([names[each.run]] if several else [])]
        row += [setting_text(each.settings.get(axis)) for axis in varied]
        row += [number(each.gflops), number(each.metrics.get(metric))]
        if intervals:
            low, high = (each.metrics.get(f"{metric}_{end}") for end in ("low", "high"))
            row.append("-" if low is None else f"{number(low)} to {number(high)}")
        row += [number(each.metrics.get(key)) for key in others]
        rows.append([*row, duration(each.seconds)])
    left = 2 if several else 1  # columns of words: the marks and the runs
    lines = [
        conditions(outcomes, protocol, reference),
        "",
        *aligned(rows, [k >= left for k in range(len(titles))]),
        "",
        f"{BEST} lowest {name}; {FRONT} no cell has a lower one for as many Gflops or fewer"
        " (multiply-accumulates / 10⁹ of the DiT for one sample; guided, both halves count; without"
        " the decoder).",
        what_varies(outcomes, varied),
    ]
    return "\n".join(lines)


def conditions(outcomes: Sequence[Outcome], protocol: Mapping[str, Any], reference: str) -> str:
    """What all cells share, on one line."""
    fixed = [f"{axis} {one[0]}" for axis, one in _values(outcomes).items() if len(one) == 1]
    runs = {each.run: each.step for each in outcomes}
    whose = f"{len(runs)} runs"
    if len(runs) == 1:
        whose = f"{short(outcomes[0].run)} at step {outcomes[0].step}"
    return (
        f"{whose}: {protocol['metric']} of {protocol['num_samples']:,} samples to"
        f" {short(reference)}; {protocol['labels']} labels, seed {protocol['seed']};"
        f" {', '.join(fixed)}."
    )


def what_varies(outcomes: Sequence[Outcome], varied: Sequence[str]) -> str:
    """How the cells' protocols differ, in one sentence."""
    several = len({each.run for each in outcomes}) > 1
    words = [*(["the run"] if several else []), *varied]
    if not words:
        return "One cell: nothing varies."
    return (
        f"Cells differ in {', '.join(words)}, and in nothing else of their protocol: noise, labels,"
        " features and reference are the same."
    )


def grid_csv(outcomes: Sequence[Outcome]) -> str:
    """Every number at full precision, one row a cell."""
    rows = []
    for each in outcomes:
        row = each._asdict()
        settings, metrics = row.pop("settings"), row.pop("metrics")
        seconds = row.pop("seconds")
        row |= {f"settings.{axis}": setting_text(value) for axis, value in settings.items()}
        row |= {f"metrics.{key}": value for key, value in metrics.items()}
        rows.append(row | {"seconds": seconds})
    return csv_of(rows)
