"""The runs of a study in groups: runs of one protocol, seeds of one recipe, cells of the plan.

Results of different protocols never share a group. Whatever is wrong with a result is added to
`problems`, so that no faulty run is silently averaged in or dropped.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ditjax.config import SHIPPED_FEATURES, fixed_keys, is_free, migrated, schema_of
from ditjax.errors import FaultError
from ditjax.files.atomic import load_json
from ditjax.files.store import place
from ditjax.runs import rundir
from ditjax.runs.results import (
    METRICS_FILE,
    RESULT_FILE,
    Found,
    Result,
    is_plausible,
    training_compute,
)
from ditjax.runs.rundir import RUNS, STUDY_FILE, leaves
from ditjax.studies.words import metric_name, number, plural, short

NOT_RUN, UNFINISHED, UNREADABLE = "not run", "not finished", "unreadable"
# The default metric is the first that a result has.
METRICS_BY_RANK = ("fid", *(f"fd_{name}" for name in SHIPPED_FEATURES))


@dataclass(frozen=True)
class Group:
    """All runs of one protocol, sorted by Gflops.

    Or of the protocols of a sweep's arms that may share a group: their hashes, separated by commas,
    and what their protocols have in common.
    """

    protocol_hash: str
    protocol: dict[str, Any]
    runs: tuple[Found, ...]


@dataclass(frozen=True)
class Family:
    """Runs that differ only in their seed: the metric's mean, standard deviation and range.

    Every member has a usable metric. The deviation of a single run is NaN.
    """

    runs: tuple[Found, ...]
    mean: float
    deviation: float
    low: float
    high: float


@dataclass(frozen=True)
class Absent:
    """A cell of sweep.json without a result, and its state."""

    name: str
    model: str
    params: int | None
    gflops: float | None
    published: dict[str, float]
    state: str


@dataclass(frozen=True)
class StudyPlan:
    """The plan of a study in sweep.json: its title, all its cells, and those without a result."""

    title: str
    cells: tuple[dict[str, Any], ...]
    absent: tuple[Absent, ...]


def described(each: Found, key: str) -> str:
    """A value of a result's `model` in a few characters; '-' if the network does not state it.

    The size of a network that states none is its name.
    """
    model = each.result["model"]
    found = model.get(key, model["name"] if key == "size" else None)
    return "-" if found is None else short(str(found), 18)


def described_by(each: Found, keys: Sequence[str]) -> str:
    """Several values of a result's `model`, without those that the network does not state."""
    words = [described(each, key) for key in keys]
    return " ".join(word for word in words if word != "-") or "-"


def names_by_size(runs: Sequence[Found], keys: Sequence[str]) -> list[str]:
    """The different `described_by` of runs, by the most parameters and Gflops of each."""
    largest: dict[str, tuple[float, float]] = {}
    for each in runs:
        words, cost = described_by(each, keys), (each.result["params"], each.result["gflops"])
        largest[words] = max(largest.get(words, (0.0, 0.0)), cost)
    return sorted(largest, key=lambda words: (largest[words], words))


def by_patch(patch: str) -> tuple[float, str]:
    """Sort key of described patch sizes: the largest first, and what is no number last."""
    size = float(patch) if patch.replace(".", "", 1).isdecimal() else -math.inf
    return (-size, patch)


def default_metric(found: Sequence[Found]) -> str:
    """FID if a result has it, else the distance on shipped features, else FD-digits."""
    names = {name for each in found for name in each.result["metrics"]}
    return next((name for name in METRICS_BY_RANK if name in names), METRICS_BY_RANK[1])


def usable(each: Found, metric: str) -> bool:
    """Whether the metric is a positive number, so that a law or a mean may use it."""
    value = each.result["metrics"].get(metric, math.nan)
    return math.isfinite(value) and value > 0


def bits_per_dim(each: Found) -> float | None:
    """The bound L_vlb on held-out images in bits/dim, without the prior term L_T.

    The sum over the steps of the diffusion (Nichol & Dhariwal 2021, Eq. 4) is their number times
    the mean term, which is `val_vlb`. None if the result lacks one of the two.
    """
    diffusion = each.result["config"].get("diffusion")
    steps = diffusion.get("timesteps") if isinstance(diffusion, Mapping) else None
    term = each.result["metrics"].get("val_vlb")
    return steps * term if type(steps) is int and term is not None else None


def published_values(record: Any) -> dict[str, float]:
    """{metric: value} of a `published` record; {} without a record, or if it holds no numbers."""
    values = record.get("values", record) if isinstance(record, dict) else {}
    return {
        name: float(value)
        for name, value in (values if isinstance(values, dict) else {}).items()
        if isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) < 1e300
        and math.isfinite(value)
    }


def published_figures(each: Found) -> dict[str, float]:
    """The figures published for this run, as its result.json holds them."""
    record: Mapping[str, Any] = each.result
    return published_values(record.get("published"))


def without_duplicates(found: list[Found], problems: list[str]) -> list[Found]:
    """Keep one run for each (name, protocol): the first in the order of --runs.

    This joins directories of one study from several machines or labs: a cell with its recipe is one
    run wherever it was trained. Another recipe under the same name is reported as a problem and
    never averaged in.
    """
    first: dict[tuple[str, str], Found] = {}
    for each in found:
        key = (each.result["run"], each.result["protocol_hash"])
        kept = first.setdefault(key, each)
        if kept is not each:
            problems.append(
                f"run {short(key[0])!r} is there twice: {each.folder} holds"
                f" {_compared(kept, each)} and is left out, {kept.folder} is used."
            )
    return list(first.values())


def without_implausible(found: list[Found], problems: list[str]) -> list[Found]:
    """Replace metrics that no measurement gives, such as 1e308, by NaN: each is a problem."""
    kept = []
    for each in found:
        metrics = dict(each.result["metrics"])
        for name, value in metrics.items():
            if not math.isnan(value) and not is_plausible(value):
                problems.append(
                    f"{each.folder}: metrics.{short(name)} is {value:g}, which no measurement"
                    " gives: it is left out."
                )
                metrics[name] = math.nan
        kept.append(each._replace(result={**each.result, "metrics": metrics}))
    return kept


def _compared(kept: Found, other: Found) -> str:
    """How a second result of one name and protocol differs from the first, in words."""
    if kept.result == other.result:
        return "the same result"
    ours, theirs = (each.result["config"] for each in (kept, other))
    apart = [
        f"{short(key)} {short(str(after))}, not {short(str(before))}"
        # A training resumed for more steps is one run with two results.
        for key, before, after in rundir.differences(ours, theirs, also=("train.steps",))
    ]
    if apart:
        more = ", ..." if len(apart) > 4 else ""
        return f"another recipe ({', '.join(apart[:4])}{more})"
    return "another result of the same recipe"


def group_by_protocol(found: list[Found], metric: str, problems: list[str]) -> tuple[Group, ...]:
    """Group runs by protocol, the largest group first; a problem for each that is another.

    Arms of one sweep that differ in what their networks read of a text share a group.
    """
    by_hash: dict[str, list[Found]] = defaultdict(list)
    for each in found:
        by_hash[each.result["protocol_hash"]].append(each)
    for key, runs in by_hash.items():
        fields = {json.dumps(each.result["protocol"], sort_keys=True) for each in runs}
        if len(fields) > 1:
            problems.append(f"protocol {key}: {len(fields)} different protocols carry this hash.")
    joined = _arms_joined(by_hash)
    if len(joined) > 1:
        counts = ", ".join(f"{key} ({plural(len(runs), 'run')})" for key, runs in joined.items())
        apart = varied_words([runs[0].result["protocol"] for runs in joined.values()])
        problems.append(
            f"{len(joined)} protocols among the results: {counts}. They differ in"
            f" {apart or 'nothing that is on record'}. Each has its own curve and its own fit; they"
            " cannot be compared."
        )
    if not any(metric in each.result["metrics"] for each in found):
        names = sorted({name for each in found for name in each.result["metrics"]})
        problems.append(f"no result has the metric {metric!r}; found: {', '.join(names) or '-'}.")
    groups = []
    for key, runs in sorted(joined.items(), key=lambda item: -len(item[1])):
        runs.sort(key=lambda each: (each.result["gflops"], each.result["run"]))
        steps = sorted({each.result["train"]["steps"] for each in runs})
        if len(steps) > 1 and not _of_one_cost(runs):
            shown = ", ".join(map(str, steps[:6])) + (", ..." if len(steps) > 6 else "")
            problems.append(f"protocol {key}: the fit mixes runs of {shown} training steps.")
        varied = varied_keys(runs)
        if varied and set(varied) != {"train.steps"} and not _of_one_study(runs):
            apart = varied_words([settings(each, varied) for each in runs])
            problems.append(
                f"protocol {key}: runs differ in {apart}; they are not averaged, and each setting"
                " has its own fit."
            )
        _note_unusable(runs, metric, problems)
        protocol = runs[0].result["protocol"]
        groups.append(Group(key, protocol if key in by_hash else _unread(protocol), tuple(runs)))
    return tuple(groups)


def _unread(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """A protocol without what the network reads of a text, which is a key of its recipe."""
    found = {name: value for name, value in protocol.items() if name != "text_encoder"}
    if "text" in found:
        own = ("tokenizer", "tokens", "features")
        found["text"] = {name: x for name, x in found["text"].items() if name not in own}
    return found


def _arms_joined(by_hash: Mapping[str, list[Found]]) -> dict[str, list[Found]]:
    """Join the runs of protocols that differ as `_unread` allows, if all are of one sweep."""
    alike: dict[str, list[str]] = defaultdict(list)
    for key, runs in by_hash.items():
        alike[json.dumps(_unread(runs[0].result["protocol"]), sort_keys=True)].append(key)
    joined: dict[str, list[Found]] = {}
    for keys in alike.values():
        every = [each for key in keys for each in by_hash[key]]
        if len(keys) > 1 and _of_one_study(every):
            joined[", ".join(keys)] = every
        else:
            joined.update({key: by_hash[key] for key in keys})
    return joined


def _study_of(each: Found) -> Path | None:
    """The folder of the sweep whose cell a run is, by where it lies."""
    return each.folder.parent.parent if each.folder.parent.name == RUNS else None


def _of_one_study(runs: Sequence[Found]) -> bool:
    """Whether all are cells of one sweep, whose recipe says in what they differ."""
    root, *others = {_study_of(each) for each in runs}
    return root is not None and not others and (root / STUDY_FILE).is_file()


def _of_one_cost(runs: Sequence[Found]) -> bool:
    """Whether all were trained for the same Gflops, to a step, so that steps must differ."""
    costs = [training_compute(each) for each in runs]
    step = max(cost / each.result["train"]["steps"] for cost, each in zip(costs, runs, strict=True))
    return max(costs) - min(costs) <= step


def _note_unusable(runs: Sequence[Found], metric: str, problems: list[str]) -> None:
    for each in runs:
        name = short(each.result["run"])
        if not usable(each, metric):
            value = each.result["metrics"].get(metric)
            problems.append(
                f"run {name!r}: {metric} is {'missing' if value is None else value}; left out of"
                f" every fit and mean ({each.folder})."
            )
        elif not math.isfinite(each.result["train"]["final_loss"]):
            problems.append(
                f"run {name!r}: its training loss ended as {each.result['train']['final_loss']},"
                f" its {metric_name(metric)} is {number(each.result['metrics'][metric])}: inspect"
                f" {each.folder}."
            )


def varied_words(protocols: Sequence[Mapping[str, Any]]) -> str:
    """The keys in which protocols differ: 'steps (ddim25, ddim50), text.tokens (12, 16)'."""
    words = []
    every = [dict(leaves(protocol)) for protocol in protocols]
    for key in dict.fromkeys(key for flat in every for key in flat):
        values = dict.fromkeys(
            json.dumps(flat[key]) if key in flat else "not on record" for flat in every
        )
        if len(values) > 1:
            shown = [short(value.strip('"'), 16) for value in values]
            more = ", ..." if len(shown) > 4 else ""
            words.append(f"{short(key)} ({', '.join(shown[:4])}{more})")
    return ", ".join(words)


def model_key(each: Found) -> tuple[str, str, float]:
    """What the seeds of one model share; a bootstrap moves them together."""
    model = each.result["model"]
    return (model["name"], str(model.get("block")), each.result["gflops"])


def model_of(each: Found) -> tuple[str, str]:
    """The size, or the name, and the patch of a run's network, within which settings differ."""
    model = each.result["model"]
    return str(model.get("size", model["name"])), str(model.get("patch"))


def varied_keys(runs: Sequence[Found]) -> list[str]:
    """Keys of the recipe, except the seed, in which runs of one size and patch differ.

    And `model.kind`, if there are several networks: each has laws of its own.
    """
    by_model: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for each in runs:
        by_model[model_of(each)].append(_recipe(each.result))
    kinds = {recipe.get("model.kind") for recipes in by_model.values() for recipe in recipes}
    varied: dict[str, None] = {"model.kind": None} if len(kinds) > 1 else {}
    for recipes in by_model.values():
        for key in dict.fromkeys(key for recipe in recipes for key in recipe):
            if len({json.dumps(recipe.get(key)) for recipe in recipes}) > 1:
                varied[key] = None
    # result.json holds parts of the recipe twice; the key of the config is the one that was set.
    twice = {"train.learning_rate": "optim.learning_rate", "model.tokens": "data.image_size"}
    return [key for key in varied if twice.get(key) not in varied]


def settings(each: Found, keys: Sequence[str]) -> dict[str, Any]:
    """A run's values for some keys of its recipe."""
    recipe = _recipe(each.result)
    return {key: recipe.get(key) for key in keys}


def settings_words(values: Mapping[str, Any]) -> str:
    """Settings as words: 'block adaln, learning_rate 0.001'."""
    return ", ".join(
        f"{short(key.rpartition('.')[2], 24)} {short(str(value), 24)}"
        for key, value in values.items()
    )


def by_settings(runs: Sequence[Found]) -> list[tuple[dict[str, Any], list[Found]]]:
    """Sets of runs with the same settings, so of other models or seeds only, the largest first."""
    keys = varied_keys(runs)
    gathered: dict[str, list[Found]] = defaultdict(list)
    for each in runs:
        gathered[json.dumps(settings(each, keys), sort_keys=True)].append(each)
    sets = sorted(gathered.values(), key=lambda members: -len(members))
    return [(settings(members[0], keys), members) for members in sets]


def families(runs: Sequence[Found], metric: str) -> list[Family]:
    """Group the runs with a usable metric by recipe, over seeds, in order of first appearance."""
    gathered: dict[str, list[Found]] = defaultdict(list)
    for each in runs:
        if usable(each, metric):
            gathered[json.dumps(_recipe(each.result), sort_keys=True)].append(each)
    found = []
    for members in gathered.values():
        values = np.array([each.result["metrics"][metric] for each in members])
        deviation = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        ends = float(values.min()), float(values.max())
        found.append(Family(tuple(members), float(values.mean()), deviation, *ends))
    return found


def _recipe(result: Result) -> dict[str, Any]:
    """Everything that a run learns from except its seed, flat: 'model.size' -> value."""
    flat = {f"model.{key}": value for key, value in result["model"].items()}
    flat |= {
        f"train.{key}": result["train"][key] for key in ("steps", "batch_size", "learning_rate")
    }
    config = migrated(result["config"])
    schema, fixed = schema_of(config), fixed_keys(config)
    return flat | {
        key: value
        for key, value in rundir.leaves(config)
        if key != "seed" and (key in fixed or not is_free(schema, key))
    }


def read_plan(
    folders: Sequence[str | Path], found: Sequence[Found], problems: list[str]
) -> StudyPlan | None:
    """Read the sweep.json files of the folders and of the studies that the results belong to.

    None if there is none. Cells of one name are one cell. A file that cannot be read or is not the
    plan of a study is added to `problems`.
    """
    roots = [place(folder) for folder in folders]
    roots += [root for each in found if (root := _study_of(each))]
    studies = {}
    for root in roots:
        path = (root / STUDY_FILE).resolve()
        if path in studies or not path.is_file():
            continue
        try:
            studies[path] = _checked_study(load_json(path))
        except (FaultError, OSError, ValueError) as error:
            problems.append(f"{path} is no list of a study's cells ({error}): it is ignored.")
    if not studies:
        return None
    done = {each.result["run"] for each in found}
    absent: dict[str, Absent] = {}
    cells: dict[str, dict[str, Any]] = {}
    for path, study in studies.items():
        for cell in study["cells"]:
            cells.setdefault(cell["name"], cell)
            if cell["name"] not in done:
                absent.setdefault(cell["name"], _absent(cell, path.parent / RUNS))
    title = next((study["title"] for study in studies.values() if study["title"]), "")
    return StudyPlan(title, tuple(cells.values()), tuple(absent.values()))


def _checked_study(value: Any) -> dict[str, Any]:
    """The title and the cells, each with a name. Raises ValueError for anything else."""
    if not isinstance(value, dict) or not isinstance(value.get("cells"), list):
        raise ValueError("expected an object with 'cells'")
    for cell in value["cells"]:
        if not isinstance(cell, dict) or not isinstance(cell.get("name"), str):
            raise ValueError("expected cells that are objects with a 'name'")
    title = value.get("title")
    return {"title": title if isinstance(title, str) else "", "cells": value["cells"]}


def _absent(cell: Mapping[str, Any], runs: Path) -> Absent:
    folder = runs / cell["name"].replace("/", "_")
    state = NOT_RUN
    if (folder / RESULT_FILE).exists():
        state = UNREADABLE
    elif (folder / METRICS_FILE).exists():
        state = UNFINISHED
    params, gflops = _positive(cell.get("params")), _positive(cell.get("gflops"))
    model = cell.get("model")
    return Absent(
        cell["name"],
        model if isinstance(model, str) else "",
        None if params is None else int(params),
        gflops,
        published_values(cell.get("published")),
        state,
    )


def _positive(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 < value < 1e300 else None
