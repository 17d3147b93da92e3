"""Measured values beside published figures, and everything in which their measurements differ.

A row is one metric of one cell, over its seeds. It is compared with the published figure only if
both were measured in the same way. The noise of seeds is taken from our own seeds if there are two,
else from published repeats. What was not run stays "not run".
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

from ditjax.config import completed
from ditjax.data.names import is_latents
from ditjax.reporting.table import csv_of
from ditjax.runs.results import PublishedFigures, Result, is_published
from ditjax.scaling.published import REPEATS
from ditjax.scaling.spread import Spread, noise_band, spread
from ditjax.studies.words import aligned, metric_name, number, plural, short

NOT_STATED = "not stated"  # in a published protocol: a field that the publication does not give
AS_PUBLISHED = "the paper's"  # a recipe whose keys without a field of their own are the paper's
OWN_SEEDS = "our own seeds"
PUBLISHED_SEEDS = "published repeats of B/4 and XL/2, PyTorch beside JAX"

Verdict = Literal[
    "not run", "not measured", "not finite", "not comparable", "noise unknown", "inside", "outside"
]


@dataclass(frozen=True)
class Scored:
    """One metric of one cell. `measured` is the mean over `runs` seeds, None without any.

    The noise of seeds alone would put `measured` between `low` and `high`, which are None if it is
    unknown; `noise` says what it is taken from. `differences` are those of the measurements, in
    words; the first `decisive` of them forbid the comparison.
    """

    cell: str
    metric: str
    published: float
    source: str
    measured: float | None
    runs: int
    low: float | None
    high: float | None
    noise: str
    verdict: Verdict
    differences: tuple[str, ...]
    decisive: int

    @property
    def difference(self) -> float | None:
        """Measured - published, or None where they cannot be compared."""
        if self.measured is None or self.verdict in ("not comparable", "not finite"):
            return None
        return self.measured - self.published


class Field(NamedTuple):
    """A field of a published protocol, and how to read ours from a result (None: not on record).

    Figures that differ in a `decisive` field cannot be compared. `metrics` are those that the field
    affects, () for all.
    """

    ours: Callable[[Result], str | None]
    decisive: bool = True
    metrics: tuple[str, ...] = ()


def _protocol(key: str) -> Callable[[Result], str | None]:
    return lambda result: _text(result["protocol"].get(key))


def _config(section: str, key: str) -> Callable[[Result], str | None]:
    def ours(result: Result) -> str | None:
        group = result["config"].get(section)
        return _text(group.get(key)) if isinstance(group, Mapping) else None

    return ours


def _train(key: str) -> Callable[[Result], str | None]:
    return lambda result: _text(dict(result["train"]).get(key))


def _text(value: Any) -> str | None:
    """A value as a published protocol writes it: 1.0 is '1', 1e-4 is '0.0001'."""
    if value is None:
        return None
    if isinstance(value, float) and not isinstance(value, bool):
        return f"{value:.10g}"
    return value if isinstance(value, str) else str(value)


def _reference(result: Result) -> str | None:
    """The reference by its file's name, since statistics do not state their source."""
    path = _config("evaluate", "reference")(result)
    return PurePath(path).name if path else None


def _data(result: Result) -> str | None:
    """The data set's name; None for latents, which are known only by their folder."""
    name = _config("data", "name")(result)
    return None if name is None or is_latents(name) else name


def _decoder(result: Result) -> str | None:
    """Which of the paper's three decoders it is, by its file's name."""
    if _protocol("decoder")(result) == "pixels":
        return "pixels"
    path = _config("autoencoder", "path")(result) or ""
    if found := re.search(r"ft-(mse|ema)", path.lower()):
        return f"ft-{found[1].upper()}"
    return "original" if "kl-f8" in path.lower() else None


def _precision(result: Result) -> str | None:
    """The precision of training and sampling; float32 products may be rounded by default."""
    dtype, matmul = (_config("model", key)(result) for key in ("dtype", "matmul"))
    if dtype is None:
        return None
    return dtype if dtype != "float32" else f"float32, {matmul or 'default'} products"


# Keys that identify a model, have fields of their own, or do not change what is learned.
_APART = (
    "size",
    "patch",
    "block",
    "dtype",
    "matmul",
    "learning_rate",
    "remat",
    "unroll",
    "attention",
)


def _recipe(result: Result) -> str | None:
    """The remaining keys of network, process and optimizer that are not the paper's."""
    config, said = result["config"], []
    paper = completed({})
    for section in ("model", "diffusion", "optim"):
        group = config.get(section)
        if not isinstance(group, Mapping):
            return None
        said += [
            f"{section}.{key} {_text(group[key])}"
            for key, value in paper[section].items()
            if key not in _APART and group.get(key, value) != value
        ]
    return ", ".join(said) or AS_PUBLISHED


# Every field that a published protocol may name, in the order in which differences are listed.
FIELDS: Mapping[str, Field] = {
    "metric": Field(_protocol("metric")),
    "features": Field(_protocol("features")),
    "reference": Field(_reference),
    "reference_features": Field(_protocol("reference_features"), metrics=("precision", "recall")),
    "data": Field(_data),
    "image_size": Field(_config("data", "image_size")),
    "num_classes": Field(_config("data", "num_classes")),
    "num_samples": Field(_protocol("num_samples")),
    "sampler": Field(_protocol("sampler")),
    "sampling_steps": Field(_protocol("steps")),
    "cfg_scale": Field(_protocol("cfg_scale")),
    "cfg_channels": Field(_protocol("cfg_channels")),
    "weights": Field(_protocol("weights")),
    "ema_decay": Field(_protocol("ema_decay")),
    "steps": Field(_train("steps")),
    "batch_size": Field(_train("batch_size")),
    "learning_rate": Field(_train("learning_rate")),
    "recipe": Field(_recipe),
    "flip": Field(_config("data", "flip")),
    "decoder": Field(_decoder, decisive=False),
    "labels": Field(_protocol("labels"), decisive=False),
    "precision": Field(_precision, decisive=False),
    "seed": Field(_train("seed"), decisive=False),
}
# Fields without effect in some results, where nothing on record is no difference.
_WITHOUT_EFFECT = ("cfg_channels",)


class Difference(NamedTuple):
    """A difference in words, and whether it forbids the comparison."""

    words: str
    decisive: bool


def protocol_differences(
    result: Result, published: PublishedFigures, metric: str
) -> list[Difference]:
    """How the measurements of a result and a published figure differ, decisive differences first.

    A field that the publication does not state, that is not on record here, or that ditjax does not
    know is listed but decides nothing.
    """
    found = []
    protocol = published["protocol"]
    for name in dict.fromkeys((*FIELDS, *protocol)):
        if name not in protocol:
            continue
        theirs, label = protocol[name], name.replace("_", " ")
        if name not in FIELDS:
            found.append(Difference(f"{short(label)}: {short(theirs)}, not compared", False))
            continue
        field = FIELDS[name]
        if field.metrics and metric not in field.metrics:
            continue
        ours = field.ours(result)
        if ours == theirs or (ours is None and name in _WITHOUT_EFFECT):
            continue
        said = "not on record" if ours is None else short(ours, 160)
        if name == "decoder" and ours is None:
            said = f"unknown, SHA-256 {short(_protocol('decoder')(result) or '-', 12)}"
        known = ours is not None and theirs != NOT_STATED
        found.append(
            Difference(f"{label}: ours {said}, published {short(theirs)}", field.decisive and known)
        )
    return sorted(found, key=lambda each: not each.decisive)


class _Wanted(NamedTuple):
    """A cell with published figures, and the results of its seeds so far."""

    name: str
    published: PublishedFigures
    results: list[Result]


def scored_rows(results: Sequence[Result], study: Mapping[str, Any] | None = None) -> list[Scored]:
    """One row for each published figure, in the order of the study's cells.

    `study` is sweep.json, whose cells without a result are "not run". Without it, rows are made of
    the results that carry published figures. The seeds of a cell share a row: they have the same
    overrides apart from the seed, or without a study the same recipe. Results of different
    protocols have rows of their own, named by their hash.
    """
    rows = []
    for cell in _cells(results, study):
        for metric, value in cell.published["values"].items():
            rows.append(_row(cell, metric, float(value)))
    return rows


def _cells(results: Sequence[Result], study: Mapping[str, Any] | None) -> list[_Wanted]:
    cells: dict[str, _Wanted] = {}
    of_run: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        of_run[result["run"]].append(result)
    listed: set[str] = set()
    for each in (study or {}).get("cells", ()):
        name, published = each.get("name"), each.get("published")
        if not isinstance(name, str) or not is_published(published):
            continue
        listed.add(name)
        overrides = each.get("overrides")
        keys = overrides if isinstance(overrides, Mapping) else dict(overrides or ())
        _cell(cells, name, keys, published).results.extend(of_run.get(name, ()))
    for result in results:
        published = result.get("published")
        if result["run"] in listed or not is_published(published):
            continue
        _cell(cells, result["run"], result["config"], published).results.append(result)
    return [each for cell in cells.values() for each in _by_protocol(cell)]


def _by_protocol(cell: _Wanted) -> list[_Wanted]:
    """Split a cell by protocol, since results of different protocols are never averaged."""
    hashes = dict.fromkeys(result["protocol_hash"] for result in cell.results)
    if len(hashes) < 2:
        return [cell]
    return [
        cell._replace(
            name=f"{cell.name} ({found})",
            results=[result for result in cell.results if result["protocol_hash"] == found],
        )
        for found in hashes
    ]


def _cell(cells: dict[str, _Wanted], name: str, keys: Mapping[str, Any], published: Any) -> _Wanted:
    """The cell with these keys apart from the seed, which is added if it is new."""
    recipe = {key: value for key, value in keys.items() if key != "seed"}
    new = _Wanted(re.sub(r"-seed\d+", "", name), published, [])
    return cells.setdefault(json.dumps(recipe, sort_keys=True, default=str), new)


def _row(cell: _Wanted, metric: str, published: float) -> Scored:
    found = [r["metrics"][metric] for r in cell.results if metric in r["metrics"]]
    finite = [value for value in found if math.isfinite(value)]
    apart: dict[Difference, None] = {}
    for result in cell.results:
        apart |= dict.fromkeys(protocol_differences(result, cell.published, metric))
    ordered = sorted(apart, key=lambda each: not each.decisive)
    if len(finite) < len(found):
        words = f"{plural(len(found) - len(finite), 'run')} gave no finite value and is left out"
        ordered.append(Difference(words, False))
    decisive = sum(each.decisive for each in ordered)
    measured = sum(finite) / len(finite) if finite else None
    noise, why = (None, "")
    if measured is not None and not decisive:
        noise, why = _noise(finite, metric, cell.published)
    low: float | None = None
    high: float | None = None
    if noise is not None:
        low, high = noise_band(published, noise, len(finite))
    return Scored(
        cell=cell.name,
        metric=metric,
        published=published,
        source=cell.published["source"],
        measured=measured,
        runs=len(finite),
        low=low,
        high=high,
        noise=why,
        verdict=_verdict(cell, found, measured, decisive, low, high),
        differences=tuple(each.words for each in ordered),
        decisive=decisive,
    )


def _verdict(
    cell: _Wanted,
    found: Sequence[float],
    measured: float | None,
    decisive: int,
    low: float | None,
    high: float | None,
) -> Verdict:
    if not cell.results:
        return "not run"
    if not found:
        return "not measured"
    if measured is None:
        return "not finite"
    if decisive:
        return "not comparable"
    if low is None or high is None:
        return "noise unknown"
    return "inside" if low <= measured <= high else "outside"


def _noise(
    values: Sequence[float], metric: str, published: PublishedFigures
) -> tuple[Spread | None, str]:
    """The spread of a metric over seeds and its source; (None, "") if it is unknown."""
    if len(values) > 1 and min(values) > 0 and len(set(values)) > 1:
        return spread([values]), f"{OWN_SEEDS}, {len(values)}"
    # The published repeats are FID-50K at 400,000 steps without guidance.
    protocol = published["protocol"]
    if (
        metric == "fid"
        and protocol.get("num_samples") == "50000"
        and protocol.get("steps") == "400000"
        and protocol.get("cfg_scale") == "1"
    ):
        return spread(REPEATS.values()), PUBLISHED_SEEDS
    return None, ""


def scored_text(rows: Sequence[Scored]) -> str:
    """A table for a terminal and the differences of the measurements; '' without rows."""
    if not rows:
        return ""
    table = [["cell", "metric", "published", "measured", "difference", "by seeds alone", ""]]
    table += [
        [
            short(row.cell),
            metric_name(row.metric),
            f"{row.published:g}",
            "-" if row.measured is None else number(row.measured, 4),
            "-" if row.difference is None else f"{row.difference:+.3g}",
            "-" if row.low is None else f"{number(row.low)} to {number(row.high)}",
            row.verdict if row.runs < 2 else f"{row.verdict}, {row.runs} seeds",
        ]
        for row in rows
    ]
    sources = ", ".join(dict.fromkeys(short(row.source, 120) for row in rows))
    lines = [
        f"published: figures of others ({sources}); measured: ours.",
        *aligned(table, [False, False, True, True, True, True, False]),
    ]
    for noise in dict.fromkeys(row.noise for row in rows if row.noise):
        lines.append(f"by seeds alone (95 %): {noise}")
    for words, cells in shared(rows).items():
        lines.append(f"  - {words} ({cells})")
    return "\n".join(lines)


def shared(rows: Sequence[Scored]) -> dict[str, str]:
    """Each difference in words -> the cells that have it."""
    ran = [row for row in rows if row.verdict != "not run"]
    of_words: dict[str, dict[str, None]] = {}
    for row in ran:
        for words in row.differences:
            of_words.setdefault(words, {})[row.cell] = None
    every = len({row.cell for row in ran})
    return {
        words: "all" if len(cells) == every else ", ".join(short(cell) for cell in cells)
        for words, cells in of_words.items()
    }


def scored_csv(rows: Sequence[Scored]) -> str:
    """Every row at full precision."""
    return csv_of(
        [
            {
                "cell": row.cell,
                "metric": row.metric,
                "published": row.published,
                "measured": row.measured,
                "difference": row.difference,
                "runs": row.runs,
                "low": row.low,
                "high": row.high,
                "noise": row.noise,
                "verdict": row.verdict,
                "differences": "; ".join(row.differences),
                "source": row.source,
            }
            for row in rows
        ]
    )
