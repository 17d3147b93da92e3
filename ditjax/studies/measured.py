"""Runs beside measured studies: does a run lie where the seeds of the same recipe lay?

The reference is a file of results: one that ships (`small_scaling`), or the results.json of a
report of your own. So a change of code or machine is checked without a second study: `report
--against` compares finished runs, and `train` each evaluation of a shipped study's recipe.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ditjax import recipes
from ditjax.config import Config, as_tree
from ditjax.errors import UserError, nearest
from ditjax.files.atomic import protocol_hash, read_json
from ditjax.files.store import place
from ditjax.runs import rundir
from ditjax.runs.results import Found
from ditjax.scaling.spread import noise_band, spread
from ditjax.studies.cells import cells
from ditjax.studies.words import metric_name, number, percent, plural, short
from ditjax.tasks import make_task

Values = Mapping[str, Mapping[str, Sequence[float]]]  # model -> metric -> one of each seed


@dataclass(frozen=True)
class SeedBands:
    """A measured study: metrics of its runs by model, each a list over seeds, and its protocol.

    `along` has the evaluations of training by step; their protocol has the hash `along_hash`.
    """

    name: str
    protocol: Mapping[str, Any]
    protocol_hash: str
    steps: Mapping[str, int]
    values: Values
    along: Mapping[int, Values] = field(default_factory=dict)
    along_hash: str = ""


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
    def value_words(self) -> str:
        """The metric and its value."""
        return f"{metric_name(self.metric)} {number(self.measured)}"

    @property
    def range_words(self) -> str:
        return f"{number(self.low)} to {number(self.high)}"

    @property
    def words(self) -> str:
        where = "inside" if self.inside else "OUTSIDE"
        return (
            f"{short(self.run, 60)}: {self.value_words}, {where}"
            f" the band {self.range_words} of {plural(self.seeds, 'seed')}"
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
    steps = {_model(str(run["run"])): int(run["steps"]) for run in runs}
    results: list[dict[str, Any]] = record.get("results") or [{}]
    protocol = record.get("protocol") or results[0].get("protocol", {})
    evaluations = record.get("evaluations", [])
    along_hashes = {each["protocol_hash"] for each in evaluations}
    along: dict[int, Values] = {}
    if len(along_hashes) == 1:
        for step in {int(each["step"]) for each in evaluations}:
            along[step] = _by_model([each for each in evaluations if each["step"] == step])
    return SeedBands(
        text,
        protocol,
        str(hashes.pop()),
        steps,
        _by_model(runs),
        along,
        next(iter(along_hashes), ""),
    )


def _by_model(rows: Sequence[Mapping[str, Any]]) -> Values:
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for metric, value in row.items():
            if isinstance(value, float) and math.isfinite(value) and value > 0:
                values[_model(str(row["run"]))][metric].append(value)
    return values


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
    if not _known(measured.values, metric):
        raise UserError(
            f"--against={measured.name}: it has no two seeds of a model with {metric}: their spread"
            " is unknown."
        )
    found = []
    for each in runs:
        name, model = each.result["run"], _model(each.result["run"])
        value = each.result["metrics"].get(metric, math.nan)
        band = _within(measured.values, model, name, metric, value)
        if band is None:
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
            found.append(band)
    return tuple(found)


def _known(values: Values, metric: str) -> dict[str, Sequence[float]]:
    """The values of a metric by model; {} if no model has two seeds, whose spread is unknown."""
    known = {model: each[metric] for model, each in values.items() if each.get(metric)}
    return known if any(len(seeds) > 1 for seeds in known.values()) else {}


def _within(values: Values, model: str, run: str, metric: str, value: float) -> WithinBand | None:
    """A value beside the seeds of its model, or None; the noise is pooled over all models."""
    known = _known(values, metric)
    if model not in known or not math.isfinite(value):
        return None
    seeds = known[model]
    middle = math.exp(sum(map(math.log, seeds)) / len(seeds))
    low, high = noise_band(middle, spread(known.values()), len(seeds))
    return WithinBand(run, metric, value, low, high, len(seeds))


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


# ---- while training


class BesideSeeds(NamedTuple):
    """The shipped study that has a run's recipe, and the run's model in it."""

    measured: SeedBands
    model: str

    def lines(
        self, step: int, metrics: Mapping[str, float], protocol: Mapping[str, Any]
    ) -> list[str]:
        """Say of an evaluation where it lies; nothing of what the seeds do not have at this step.

        The evaluation is compared with those of the seeds' own training by the same protocol, and
        at the last step with their results.
        """
        known, found = self.measured, []
        for metric, value in metrics.items():
            along = known.along.get(step, {}) if protocol_hash(protocol) == known.along_hash else {}
            band = _within(along, self.model, self.model, metric, value)
            last = step == known.steps[self.model]
            if band is None and last and _same_measure(metric, protocol, known.protocol):
                band = _within(known.values, self.model, self.model, metric, value)
            if band:
                where = "within" if band.inside else "above" if value > band.high else "below"
                found.append(
                    f"step {step}: {band.value_words} is {where} the seeds' band of {known.name}"
                    f" ({band.range_words})"
                )
        return found


def _same_measure(metric: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two protocols give a metric one meaning; samples do not enter a validation loss."""
    if not metric.startswith("val_"):
        return dict(ours) == dict(theirs)
    parts = [
        {k: v for k, v in each.items() if k.startswith("val_") or k in ("seed", "weights")}
        for each in (ours, theirs)
    ]
    return parts[0] == parts[1]


def shipped_beside(c: Config) -> BesideSeeds | None:
    """The shipped study one of whose cells has this recipe, whatever its seed; None without."""
    head = rundir.legal_name(f"{make_task(c).name.replace('/', '-p')}-seed")
    for name in shipped_results():
        recipe = name.replace("_", "/", 1)
        with contextlib.suppress(UserError):  # of results without runs
            measured = read_measured(name)
            if any(model.startswith(_model(head)) for model in measured.steps):
                for cell in cells(recipes.build(recipe)):
                    model = _model(cell.name)
                    if model in measured.steps and _same_recipe(cell.recipe, c):
                        return BesideSeeds(measured, model)
    return None


def _same_recipe(recipe: Mapping[str, Any], c: Config) -> bool:
    apart = rundir.differences(recipe, as_tree(c), also=("train.steps",))
    return all(key == "seed" for key, _, _ in apart)
