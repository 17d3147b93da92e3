"""The arms of a study beside its baseline, paired by seed, and what they cost beside it.

An arm is the runs of one recipe with several seeds. The arms of one model, by size and patch, have
a baseline: the first that the study lists. A model with a single arm is an arm of the first model,
if that one has several. The seeds of two arms share the data's order and the noise, so that much of
what a seed does cancels in their difference. Where the scores of single records are on record
(`runs/results.py`), the arms are paired by record, too: that interval is of other records for the
same trainings, and the seeds' is of other trainings.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ditjax.config import read, voiding
from ditjax.errors import FaultError, UserError
from ditjax.reporting.study import model_of, settings, settings_words, varied_keys
from ditjax.runs import rundir
from ditjax.runs.results import Found, read_record_scores, training_compute
from ditjax.scaling.paired import PairedDifference, paired_difference
from ditjax.studies.words import (
    OF_A_METRIC,
    aligned,
    interval_words,
    metric_name,
    number,
    plural,
    short,
    shortened,
)

_Arm = Mapping[int, Found]  # by seed
_Pair = tuple[_Arm, _Arm, tuple[str, str]]  # an arm, its baseline, and words for (baseline, arm)

TERMINAL_ROWS = 40  # of a terminal; the page and results.json have all


@dataclass(frozen=True)
class PairedRow:
    """A metric of one arm beside the baseline, over the seeds that both have.

    `values` are the means of the two over those seeds, (arm, baseline); `found` is None without a
    common seed. `records` is paired by held-out record, of the means over those seeds, or None
    without such scores. `step_cost` and `training_cost` are Gflops of the arm, of a training step
    and of the whole training, over those of the baseline.
    """

    model: str
    baseline: str
    arm: str
    metric: str
    values: tuple[float, float]
    found: PairedDifference | None
    records: PairedDifference | None
    step_cost: float
    training_cost: float

    @property
    def shown(self) -> dict[str, str]:
        """The row in words, by the titles of its columns."""
        found, by_record = self.found, "-"
        interval = f"none: {plural(found.pairs if found else 0, 'pair')}"
        if found and found.interval:
            interval = _interval(found)
        if self.records:
            by_record = f"{_interval(self.records)} of {self.records.pairs}"
        return {
            "metric": metric_name(self.metric),
            "arm": short(self.arm, 160),
            "arm's": number(self.values[0]),
            "baseline's": number(self.values[1]),
            "difference": number(found.mean) if found else "-",
            "95 %": interval,
            "pairs": str(found.pairs if found else 0),
            "95 %, by record": by_record,
            "Gflops a step": f"x {number(self.step_cost)}",
            "training FLOPs": f"x {number(self.training_cost)}",
        }


def _interval(found: PairedDifference) -> str:
    return interval_words(found.interval) + (" *" if found.settled else "")


def paired_rows(
    runs: Sequence[Found], metric: str, problems: list[str], order: Sequence[str] = ()
) -> tuple[PairedRow, ...]:
    """Compare the arms among runs of one protocol with their baselines: `metric`, then the others.

    order: the runs of the study as it lists them, by default by name. A metric that is the same in
    all arms, such as a score of the data, has no rows. What is wrong with the scores of records is
    added to `problems`.
    """
    place = {name: i for i, name in enumerate(order)}
    runs = sorted(
        runs, key=lambda each: (place.get(each.result["run"], len(place)), each.result["run"])
    )
    keys = varied_keys(runs)
    models: dict[tuple[str, str], dict[str, dict[int, Found]]] = defaultdict(dict)
    for each in runs:
        arm = models[model_of(each)].setdefault(json.dumps(settings(each, keys)), {})
        arm.setdefault(each.result["train"]["seed"], each)
    pairs = _pairs([list(each.values()) for each in models.values()], keys)
    scores = _scores_of_records([side for pair in pairs for side in pair[:2]], problems)
    rows = []
    for name in _metrics(runs, metric):
        of_metric = [_row(arm, baseline, name, labels, scores) for arm, baseline, labels in pairs]
        if any(row.found is None or row.found.mean != 0 for row in of_metric):
            rows += of_metric
    return tuple(rows)


def _pairs(models: Sequence[Sequence[_Arm]], keys: Sequence[str]) -> list[_Pair]:
    """Each arm of the models, the first model first, with its baseline and words for the two."""
    found = [
        (arm, arms[0], labels)
        for arms in models
        for arm, labels in zip(arms[1:], _labels(arms, keys), strict=True)
    ]
    first = models[0] if models else []
    lone = [arms[0] for arms in models[1:] if len(arms) == 1 < len(first)]
    if lone:
        of_first = found[0][2][0]
        for arm, (_, words) in zip(lone, _labels([first[0], *lone], keys), strict=True):
            name = next(iter(arm.values())).result["model"]["name"]
            found.append((arm, first[0], (of_first, ", ".join(filter(None, (name, words))))))
    return found


def _metrics(runs: Sequence[Found], first: str) -> list[str]:
    """The names of the scores of runs, without those of their uncertainty and of real images."""
    names = {name for each in runs for name in each.result["metrics"]}
    rest = {name for name in names if not name.endswith((*OF_A_METRIC, "_floor"))} - {first}
    return [first, *sorted(rest)]


def _row(
    arm: Mapping[int, Found],
    baseline: Mapping[int, Found],
    metric: str,
    labels: tuple[str, str],
    scores: Mapping[Path, Mapping[str, Any]],
) -> PairedRow:
    def values(side: Mapping[int, Found]) -> dict[int, float]:
        found = {seed: each.result["metrics"].get(metric, math.nan) for seed, each in side.items()}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    one, two = values(arm), values(baseline)
    seeds = sorted(one.keys() & two.keys())
    pairs = [one[seed] for seed in seeds], [two[seed] for seed in seeds]
    means = [sum(side) / len(side) if side else math.nan for side in pairs]
    of_records = [
        [scores[side[seed].folder].get(metric) for seed in seeds] for side in (arm, baseline)
    ]
    run, base = next(iter(arm.values())), next(iter(baseline.values()))
    trained = [training_compute(each) for each in (run, base)]
    steps = [each.result["train"]["steps"] for each in (run, base)]
    return PairedRow(
        base.result["model"]["name"],
        *labels,
        metric,
        (means[0], means[1]),
        paired_difference(*pairs) if seeds else None,
        _by_record(*of_records) if seeds else None,
        trained[0] / steps[0] / (trained[1] / steps[1]),
        trained[0] / trained[1],
    )


def _scores_of_records(
    arms: Sequence[Mapping[int, Found]], problems: list[str]
) -> dict[Path, Mapping[str, Any]]:
    """The scores of single records of every run of the arms, by its folder."""
    found: dict[Path, Mapping[str, Any]] = {}
    runs = {each.folder: each.result for arm in arms for each in arm.values()}
    for folder, result in runs.items():
        found[folder] = {}
        try:
            found[folder] = read_record_scores(folder, result["protocol_hash"])
        except (UserError, FaultError) as error:
            problems.append(f"the scores of single records are not compared: {error}")
    return found


def _by_record(one: Sequence[Any], two: Sequence[Any]) -> PairedDifference | None:
    """The difference of the means over seeds, paired by record; None if a run has no scores."""
    every = [*one, *two]
    if any(each is None for each in every) or len({len(each) for each in every}) > 1:
        return None
    means = [np.mean(np.asarray(side, np.float64), axis=0) for side in (one, two)]
    both = np.isfinite(means[0]) & np.isfinite(means[1])
    return paired_difference(means[0][both], means[1][both]) if both.sum() > 1 else None


def _labels(arms: Sequence[Mapping[int, Found]], keys: Sequence[str]) -> list[tuple[str, str]]:
    """Words for (the baseline, the arm) of each arm but the first, by the keys that differ."""
    runs = [next(iter(arm.values())) for arm in arms]
    values = [settings(each, keys) for each in runs]
    apart = [key for key in keys if any(each[key] != values[0][key] for each in values)]
    # What only describes a network follows from keys of the recipe, if any differ.
    recipe = {*dict(rundir.leaves(runs[0].result["config"])), "train.steps", "train.batch_size"}
    apart = [key for key in apart if key in recipe] or apart
    stated = {key: values[0][key] for key in apart if _has_effect(runs[0], key)}
    baseline, labels = settings_words(stated), []
    for each in values[1:]:
        mine = {key: each[key] for key in apart if each[key] != values[0][key]}
        # What all arms but the baseline have in common tells none of them apart.
        own = {k: v for k, v in mine.items() if any(other[k] != v for other in values[1:])}
        labels.append((baseline, settings_words(own or mine)))
    return labels


def _has_effect(run: Found, key: str) -> bool:
    """Whether a key of a run's recipe does anything beside the others; True if it is not known."""
    try:
        return not voiding(read({**run.result["config"], "sweep": {}}), key)
    except UserError:
        return True


def paired_words(rows: Sequence[PairedRow]) -> list[str]:
    """What is compared with what, one line a model."""
    return [
        f"Arms of {short(model)} beside the first that the study lists ({short(baseline, 160)}),"
        " paired by seed: arm - baseline."
        for model, baseline in dict.fromkeys((row.model, row.baseline) for row in rows)
    ]


def paired_text(rows: Sequence[PairedRow]) -> str:
    """A table for a terminal; '' without rows."""
    if not rows:
        return ""
    first = [row for row in rows if row.metric == rows[0].metric]
    shown = rows if len(rows) <= TERMINAL_ROWS else first
    names = shortened((row.arm for row in rows), 80)
    several = len({row.model for row in rows}) > 1
    every = [
        ({"model": short(row.model)} if several else {}) | row.shown | {"arm": names[row.arm]}
        for row in shown
    ]
    # A column that says nothing of any row is left out.
    kept = [title for title in every[0] if {row[title] for row in every} != {"-"}]
    table = [kept, *([row[title] for title in kept] for row in every)]
    words = ("model", "metric", "arm")
    lines = [*paired_words(rows), *aligned(table, [title not in words for title in kept])]
    if len(shown) < len(rows):
        metrics = len({row.metric for row in rows}) - 1
        lines.append(f"{plural(metrics, 'further metric')}: index.html, paired.csv, results.json")
    return "\n".join([*lines, PAIRED_NOTE])


PAIRED_NOTE = (
    "95 %: Student's t over the pairs of seeds, for other trainings; by record, a bootstrap over"
    " held-out records, for the same trainings. * leaves out 0, as one interval in twenty would by"
    " chance. Costs are over the baseline's."
)


def paired_csv_rows(rows: Sequence[PairedRow]) -> list[dict[str, Any]]:
    """Every number at full precision."""
    made = []
    for row in rows:
        found = row.found
        interval = found.interval if found else None
        by_record = row.records.interval if row.records else None
        made.append(
            {
                "model": row.model,
                "metric": row.metric,
                "arm": row.arm,
                "baseline": row.baseline,
                "arm_mean": row.values[0],
                "baseline_mean": row.values[1],
                "difference": found.mean if found else None,
                "low": interval.low if interval else None,
                "high": interval.high if interval else None,
                "pairs": found.pairs if found else 0,
                "records": row.records.pairs if row.records else 0,
                "records_low": by_record.low if by_record else None,
                "records_high": by_record.high if by_record else None,
                "step_cost": row.step_cost,
                "training_cost": row.training_cost,
            }
        )
    return made
