"""Runs beside measured studies: does a run lie where the seeds of the same recipe lay?

The reference is a file of results: one that ships (`small_scaling`), or the results.json of a
report of your own. So a change of code or machine is checked without a second study.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditjax import recipes
from ditjax.errors import UserError, nearest
from ditjax.files.atomic import read_json
from ditjax.files.store import place
from ditjax.runs.results import Found
from ditjax.scaling.spread import noise_band, spread
from ditjax.studies.words import metric_name, number, percent, plural, short


@dataclass(frozen=True)
class SeedBands:
    """A measured study: metrics of its runs by model, each a list over seeds, and its protocol."""

    name: str
    protocol_hash: str
    steps: Mapping[str, int]
    values: Mapping[str, Mapping[str, Sequence[float]]]  # model -> metric -> one of each seed


@dataclass(frozen=True)
class WithinBand:
    """A run's metric, and the band in which the reference's seeds say that it would lie (95 %)."""

    run: str
    metric: str
    measured: float
    low: float
    high: float
    seeds: int

    @property
    def inside(self) -> bool:
        return self.low <= self.measured <= self.high

    @property
    def words(self) -> str:
        where = "inside" if self.inside else "OUTSIDE"
        return (
            f"{short(self.run, 60)}: {metric_name(self.metric)} {number(self.measured)}, {where}"
            f" the band {number(self.low)} to {number(self.high)} of {plural(self.seeds, 'seed')}"
        )


def shipped_results() -> dict[str, Path]:
    """The measured studies that ship and have runs of several seeds, by name."""
    folder = Path(recipes.__path__[0]) / "results"
    return {path.stem: path for path in sorted(folder.glob("small_*.json"))}


def read_measured(text: str) -> SeedBands:
    """Read a shipped study by its name, or a results.json. Raises UserError."""
    known = shipped_results()
    path = known.get(text, place(text))
    if not path.is_file():
        raise UserError(
            f"--against={text}: expected one of {', '.join(known)}, or the results.json of a"
            f" report.{nearest(text, known)}"
        )
    record = read_json(path)
    runs = record.get("runs") or [_flat(each) for each in record.get("results", [])]
    hashes = {each.get("protocol_hash") for each in record.get("fits", [])}
    if not runs or len(hashes) != 1:
        raise UserError(
            f"--against={text}: {path} has {plural(len(runs), 'run')} of"
            f" {plural(len(hashes), 'protocol')}: expected runs of one protocol."
        )
    steps: dict[str, int] = {}
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        model = _model(str(run["run"]))
        steps[model] = int(run["steps"])
        for metric, value in run.items():
            if isinstance(value, float) and math.isfinite(value) and value > 0:
                values[model][metric].append(value)
    return SeedBands(text, str(hashes.pop()), steps, values)


def _flat(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result as a row of a shipped study."""
    return {"run": result["run"], "steps": result["train"]["steps"], **result["metrics"]}


def _model(run: str) -> str:
    """The name of a cell without its seed."""
    head, found, tail = run.partition("-seed")
    return head + tail.lstrip("0123456789") if found else run


def compare_with(
    measured: SeedBands, runs: Sequence[Found], metric: str, problems: list[str]
) -> tuple[WithinBand, ...]:
    """Put the runs that the reference has, too, beside the bands of its seeds.

    The noise is pooled over its models. Runs of another protocol or length are named in
    `problems` and not compared. Raises UserError if the reference has no model of two seeds.
    """
    known = {model: each[metric] for model, each in measured.values.items() if each.get(metric)}
    if not any(len(seeds) > 1 for seeds in known.values()):
        raise UserError(
            f"--against={measured.name}: it has no two seeds of a model with {metric}: their spread"
            " is unknown."
        )
    noise, found = spread(known.values()), []
    for each in runs:
        name, model = each.result["run"], _model(each.result["run"])
        value = each.result["metrics"].get(metric, math.nan)
        if model not in known or not math.isfinite(value):
            continue
        if each.result["protocol_hash"] != measured.protocol_hash:
            problems.append(
                f"run {short(name)!r} is not compared with {measured.name}: its protocol is"
                f" {each.result['protocol_hash']}, not {measured.protocol_hash}."
            )
        elif each.result["train"]["steps"] != measured.steps[model]:
            problems.append(
                f"run {short(name)!r} is not compared with {measured.name}: it has"
                f" {each.result['train']['steps']} steps, not {measured.steps[model]}."
            )
        else:
            seeds = known[model]
            middle = math.exp(sum(map(math.log, seeds)) / len(seeds))
            low, high = noise_band(middle, noise, len(seeds))
            found.append(WithinBand(name, metric, value, low, high, len(seeds)))
    return tuple(found)


def against_words(name: str, beside: Sequence[WithinBand]) -> str:
    """The comparison for a terminal."""
    if not beside:
        return f"Against {name}: no run to compare; names, protocol and steps must be the same."
    held = sum(each.inside for each in beside)
    return "\n".join(
        [
            f"Against {name}: {held} of {plural(len(beside), 'run')} are within the noise of its"
            f" seeds ({percent(held / len(beside)).removeprefix('+')}; 95 % expected)",
            *(f"  {each.words}" for each in beside),
        ]
    )
