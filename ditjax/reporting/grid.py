"""An evaluation grid's cells as a table and a CSV, and those on the Pareto front."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ditjax.reporting.table import csv_of
from ditjax.studies.words import OF_A_METRIC, aligned, duration, metric_name, number, short

BEST, FRONT = "*", "+"

# Of a metric's numbers the table shows the value and the distance's interval; the CSV has all.
_CSV_ONLY = (*OF_A_METRIC, "_floor")


class Outcome(NamedTuple):
    """One cell. `settings`: axis -> value, None where it has no effect on this cell.

    `gflops`: multiply-accumulates / 1e9 of the DiT for one sample, all of its evaluations.
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


def shown(value: Any) -> str:
    """A setting as its flag takes it: 1.5, 0.1:0.7, 10+15+20; '-' for one without effect."""
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return ":".join(shown(each) for each in value)
    if isinstance(value, float):
        brief = f"{value:g}"
        return brief if float(brief) == value else repr(value)
    return str(value).replace(",", "+")


def varying(outcomes: Sequence[Outcome]) -> list[str]:
    """The axes that take several values among the cells that they have an effect on, in order."""
    return [axis for axis, values in _values(outcomes).items() if len(values) > 1]


def _values(outcomes: Sequence[Outcome]) -> dict[str, list[str]]:
    """Axis -> its values, as shown."""
    found: dict[str, dict[str, None]] = {}
    for each in outcomes:
        for axis, value in each.settings.items():
            values = found.setdefault(axis, {})
            if value is not None:
                values[shown(value)] = None
    return {axis: list(values) for axis, values in found.items()}


def front(outcomes: Sequence[Outcome], metric: str) -> list[int]:
    """Pareto: the cells that none other beats in distance for as many Gflops or fewer, by Gflops.

    Indices; a cell whose distance is not finite is on no front.
    """
    found, best = [], math.inf
    values = [each.metrics.get(metric, math.nan) for each in outcomes]
    finite = [i for i, value in enumerate(values) if math.isfinite(value)]
    for i in sorted(finite, key=lambda i: (outcomes[i].gflops, values[i])):
        if values[i] < best:
            found.append(i)
            best = values[i]
    return found


def terminal_text(
    outcomes: Sequence[Outcome], metric: str, protocol: Mapping[str, Any], reference: str
) -> str:
    """Aligned columns, a row a cell in the order given, and what all of them share."""
    name, varied = metric_name(metric), varying(outcomes)
    on_front = front(outcomes, metric)
    best = on_front[-1] if on_front else None
    metrics = dict.fromkeys(key for each in outcomes for key in each.metrics)
    others = [key for key in metrics if key != metric and not key.endswith(_CSV_ONLY)]
    intervals = f"{metric}_low" in metrics
    several = len({each.run for each in outcomes}) > 1
    titles = ["", *(["run"] if several else []), *varied, "Gflops", name]
    titles += [*(["95 %"] if intervals else []), *map(metric_name, others), "drawn in"]
    rows = [titles]
    for i, each in enumerate(outcomes):
        mark = (BEST if i == best else " ") + (FRONT if i in on_front else " ")
        row = [mark, *([short(each.run)] if several else [])]
        row += [shown(each.settings.get(axis)) for axis in varied]
        row += [number(each.gflops), number(each.metrics.get(metric))]
        if intervals:
            low, high = (each.metrics.get(f"{metric}_{end}") for end in ("low", "high"))
            row.append("-" if low is None else f"{number(low)} to {number(high)}")
        row += [number(each.metrics.get(key)) for key in others]
        rows.append([*row, duration(each.seconds)])
    left = 2 if several else 1  # marks and runs are words
    lines = [
        conditions(outcomes, protocol, reference),
        "",
        *aligned(rows, [k >= left for k in range(len(titles))]),
        "",
        f"{BEST} lowest {name}; {FRONT} no cell has a lower one for as many Gflops or fewer (of one"
        " sample: the DiT's multiply-accumulates / 10⁹, both halves where guided; no decoder).",
        what_varies(outcomes, varied),
    ]
    return "\n".join(lines)


def conditions(outcomes: Sequence[Outcome], protocol: Mapping[str, Any], reference: str) -> str:
    """One line of what all cells share."""
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
    """One sentence on how the cells' protocols differ."""
    several = len({each.run for each in outcomes}) > 1
    words = [*(["the run"] if several else []), *varied]
    if not words:
        return "One cell: nothing varies."
    return (
        f"Cells differ in {', '.join(words)}, and in nothing else of their protocol: the same"
        " noise, labels, features and reference."
    )


def csv_text(outcomes: Sequence[Outcome]) -> str:
    """Every number of every cell at full precision, one row a cell."""
    rows = []
    for each in outcomes:
        row = each._asdict()
        settings, metrics = row.pop("settings"), row.pop("metrics")
        seconds = row.pop("seconds")
        row |= {f"settings.{axis}": shown(value) for axis, value in settings.items()}
        row |= {f"metrics.{key}": value for key, value in metrics.items()}
        rows.append(row | {"seconds": seconds})
    return csv_of(rows)
