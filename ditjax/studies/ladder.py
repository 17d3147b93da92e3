"""The next rung of a study: a larger model, and its score predicted before it is trained.

A law that was fitted after the fact explains; one that names a number beforehand can be wrong. A
rung is planned from the results that are there, its prediction is written to a file of its own,
and then it is trained. Nothing changes the file afterwards: the outcome is the rung's result.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ditjax
from ditjax.config import Config, as_tree, changed, network_module, read
from ditjax.errors import FaultError, UserError
from ditjax.files.atomic import load_json, read_json, recordable, write_json
from ditjax.files.store import place
from ditjax.models.network import training_gflops
from ditjax.runs import rundir
from ditjax.runs.results import Found, training_compute
from ditjax.scaling.extrapolate import Forecast, forecast, power_at
from ditjax.scaling.frontier import frontier
from ditjax.scaling.spread import share_band
from ditjax.studies.cells import Cell
from ditjax.studies.words import metric_name, number, percent, plural, short
from ditjax.tasks import cost_of, make_task

REGISTERED = "predictions"  # the folder of a study's registered predictions
PREDICTION_SCHEMA = 1
_FACTORS = tuple(1.25 ** (k / 45) for k in range(-45, 46))  # of the estimated size


@dataclass(frozen=True)
class Rung:
    """A run that is to come, its prediction, and how both follow from the runs of the study."""

    cell: Cell
    metric: str
    protocol_hash: str
    budget: float
    prediction: Forecast
    runs: tuple[str, ...]
    rate: str

    @property
    def words(self) -> str:
        """The rung and its prediction in one sentence."""
        law, c = self.prediction, self.cell.config
        return (
            f"{self.cell.model}, {c.train.steps:,} steps at rate {c.optim.learning_rate:.3g}"
            f" ({self.rate}), {law.x:.4g} training Gflops: {self.metric} {law.predicted:.4g}"
            f" (95 %: {law.interval.low:.4g} to {law.interval.high:.4g}), by the law of"
            f" {law.models} models."
        )


def next_rung(runs: Sequence[Found], metric: str, budget: float) -> Rung:
    """Plan the run that follows those of a study at `budget` training Gflops.

    The runs have one protocol and a usable metric. If all saw as many images, the law is that of
    all models, and the rung sees as many, too. Otherwise it is that of the frontier, and images
    grow along it as a power of compute. The largest model is made deeper and wider alike. Its rate
    carries over with μP; without, it falls as one over the width, which is μP's rule for Adam.
    Raises UserError for a budget that is no larger than what was run, fewer than 3 models, and a
    network that has no larger ones.
    """
    path = _path(runs, metric)
    compute = [training_compute(each) for each in path]
    if budget <= max(compute):
        raise UserError(
            f"--ladder={budget:g}: the study has a run of {max(compute):.4g} training Gflops"
            " already; the next rung costs more."
        )
    seen = power_at(compute, [each.result["train"]["images"] for each in path], budget)
    largest = max(path, key=lambda each: (each.result["gflops"], -each.result["train"]["seed"]))
    c, rate = _config(largest, budget, seen)
    cost = cost_of(c)
    planned = training_gflops(cost.gflops, c.train.steps * c.train.batch_size, cost.passes)
    if planned <= max(compute) * (1 + 1e-9):
        raise UserError(
            f"--ladder={budget:g}: the nearest of the network's sizes is {cost.name}, of"
            f" {planned:.4g} training Gflops; the study has a run of {max(compute):.4g}: give more."
        )
    prediction = forecast(
        compute,
        [each.result["metrics"][metric] for each in path],
        planned,
        0,
        groups=[(each.result["model"]["name"], each.result["train"]["images"]) for each in path],
    )
    name = f"{make_task(c).name.replace('/', '-p')}-seed{c.seed}-rung_{budget:g}"
    cell = Cell(0, rundir.legal_name(name.replace("+", "")), as_tree(c), c)
    names = tuple(each.result["run"] for each in path)
    return Rung(cell, metric, largest.result["protocol_hash"], budget, prediction, names, rate)


def _path(runs: Sequence[Found], metric: str) -> list[Found]:
    """The runs that the law is of: all, or of those that saw other numbers of images the frontier.

    Seeds of a run on the frontier are there, too.
    """
    if len({each.result["train"]["images"] for each in runs}) < 2:
        return list(runs)
    keys = [(each.result["model"]["name"], each.result["train"]["images"]) for each in runs]
    cells = list(dict.fromkeys(keys))
    values: dict[Any, list[float]] = {cell: [] for cell in cells}
    for each, key in zip(runs, keys, strict=True):
        values[key].append(each.result["metrics"][metric])
    y = [statistics.geometric_mean(values[cell]) for cell in cells]
    compute = [training_compute(runs[keys.index(cell)]) for cell in cells]
    kept = {cells[i] for i in frontier(compute, y)}
    return [each for each, key in zip(runs, keys, strict=True) if key in kept]


def _config(largest: Found, budget: float, images: float) -> tuple[Config, str]:
    """The recipe of a run that is `largest`, grown to a budget, and where its rate comes from."""
    c = read({**largest.result["config"], "sweep": {}})
    grown = network_module(c.model.kind).NETWORK.grown
    if grown is None:
        raise UserError(
            f"config.model.kind is {c.model.kind!r}: this network does not say how it grows; a"
            " ladder needs one that does, such as dit."
        )
    steps = max(1, round(images / c.train.batch_size))
    passes = cost_of(c).passes
    wanted = budget / (passes * steps * c.train.batch_size)
    start = (wanted / cost_of(c).gflops) ** (1 / 3)
    tried: dict[Any, tuple[float, float]] = {}
    for factor in _FACTORS:
        keys, wider = grown(c.model, start * factor)
        if keys not in tried:
            gflops = cost_of(dataclasses.replace(c, model=keys)).gflops
            tried[keys] = abs(math.log(gflops / wanted)), wider
    model = min(tried, key=lambda keys: tried[keys][0])
    wider = tried[model][1]
    rate, words = c.optim.learning_rate, "as the largest: μP carries it over"
    if getattr(c.model, "parametrization", "standard") != "mup":
        rate, words = rate / wider, f"of the largest, over {wider:.3g} times its width"
    tree = {"model": dataclasses.asdict(model), "train": {"steps": steps}}
    return changed(c, {**tree, "optim": {"learning_rate": rate}}), words


def register(workdir: Path, rung: Rung, machine: dict[str, Any] | None) -> Path:
    """Write a rung's prediction, before it is trained; one that is there already is kept.

    `machine` is what a plan says of its cost. Raises UserError if another one has its name.
    """
    path = workdir / REGISTERED / f"{rung.cell.name}.json"
    if path.exists():
        found = read_json(path)
        if found.get("recipe") != recordable(rung.cell.recipe):
            raise UserError(f"{path} predicts another run of this name: move it away.")
        return path
    law = rung.prediction
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "schema": PREDICTION_SCHEMA,
        "run": rung.cell.name,
        "registered": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "ditjax": ditjax.__version__,
        "metric": rung.metric,
        "protocol_hash": rung.protocol_hash,
        "budget": rung.budget,
        "training_gflops": law.x,
        "predicted": law.predicted,
        "interval": dataclasses.asdict(law.interval),
        "law": {"a": law.a, "b": law.b, "c": law.c, "models": law.models},
        "runs": list(rung.runs),
        "rate": rung.rate,
        "machine": machine,
        "recipe": rung.cell.recipe,
    }
    return write_json(path, record)


@dataclass(frozen=True)
class ScoredPrediction:
    """A registered prediction, and what was measured: NaN if the run has no such result yet."""

    run: str
    metric: str
    registered: str
    predicted: float
    low: float
    high: float
    measured: float = math.nan
    why: str = ""

    @property
    def words(self) -> str:
        """The prediction and its outcome on one line."""
        interval = f"{number(self.predicted)} ({number(self.low)} to {number(self.high)})"
        outcome = f"not scored: {self.why}"
        if self.inside is not None:
            where = "inside" if self.inside else "outside"
            outcome = f"measured {number(self.measured)}, {where}"
        return (
            f"{short(self.run, 80)}: {metric_name(self.metric)} {interval}, registered"
            f" {self.registered}; {outcome}"
        )

    @property
    def inside(self) -> bool | None:
        """Whether the interval holds the outcome; None if there is none."""
        return None if math.isnan(self.measured) else self.low <= self.measured <= self.high


def read_predictions(
    folders: Sequence[str | Path], runs: Sequence[Found], problems: list[str]
) -> tuple[ScoredPrediction, ...]:
    """Read the predictions registered below `folders` and score them by the results `runs`.

    An outcome counts only under the protocol that was predicted. What cannot be read is added to
    `problems`.
    """
    by_name = {each.result["run"]: each.result for each in runs}
    found = []
    for path in [path for folder in folders for path in _registered(folder)]:
        try:
            prediction, protocol = _read(path)
        except (FaultError, OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{path} is no registered prediction ({error}): it is ignored.")
            continue
        result = by_name.get(prediction.run)
        if result is None:
            prediction = dataclasses.replace(prediction, why="not run")
        elif result["protocol_hash"] != protocol:
            prediction = dataclasses.replace(prediction, why="measured by another protocol")
        else:
            measured = result["metrics"].get(prediction.metric, math.nan)
            prediction = dataclasses.replace(prediction, measured=measured)
        found.append(prediction)
    return tuple(found)


def _registered(folder: str | Path) -> list[Path]:
    return sorted(place(folder).glob(f"{REGISTERED}/*.json"))


def _read(path: Path) -> tuple[ScoredPrediction, str]:
    """The prediction in a file, without its outcome, and its protocol's hash."""
    record = load_json(path)
    low, high = record["interval"]["low"], record["interval"]["high"]
    prediction = ScoredPrediction(
        str(record["run"]),
        str(record["metric"]),
        str(record["registered"]),
        float(record["predicted"]),
        -math.inf if low is None else float(low),
        math.inf if high is None else float(high),
    )
    return prediction, str(record["protocol_hash"])


def reliability(predictions: Sequence[ScoredPrediction]) -> str:
    """How many of the predictions with an outcome hold, in one sentence; '' without any."""
    scored = [each for each in predictions if each.inside is not None]
    if not scored:
        return ""
    held = sum(bool(each.inside) for each in scored)
    low, high = share_band(held, len(scored))
    off = statistics.median(abs(math.log(each.measured / each.predicted)) for each in scored)
    return (
        f"{held} of {plural(len(scored), 'registered prediction')} held in their 95 % intervals"
        f" (a share of {low:.2f} to {high:.2f}, 95 %); the median error is"
        f" {percent(math.expm1(off)).removeprefix('+')}."
    )
