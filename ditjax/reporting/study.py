"""Which runs belong together, the laws fitted to them, and what those say.

Results of different protocols never share a fit. What is wrong with a result is added to
`problems`; a run with something wrong is never silently averaged in or dropped.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditjax.errors import UserError
from ditjax.io.results import Found
from ditjax.reporting.words import interval_words, law_words, metric_name, number, plural, short
from ditjax.scaling.fit import (
    Interval,
    PowerLaw,
    fit_power_law,
    fit_power_law_offset,
    pearson,
    pearson_interval,
    spearman,
)


@dataclass(frozen=True)
class Fit:
    """The laws of one set of runs, or `why` there are none. `models` < `n` with several seeds."""

    label: str
    n: int
    models: int
    why: str = ""
    pearson: float = math.nan
    pearson_interval: Interval | None = None
    spearman: float = math.nan
    law: PowerLaw | None = None
    offset: PowerLaw | None = None
    why_no_offset: str = ""


@dataclass(frozen=True)
class Group:
    """All runs of one protocol, by Gflops, and their fits: all runs first, then each seed."""

    protocol_hash: str
    protocol: dict[str, Any]
    runs: tuple[Found, ...]
    fits: tuple[Fit, ...]


def without_duplicates(found: list[Found], problems: list[str]) -> list[Found]:
    """One run for each (name, protocol): the first in the order of --runs."""
    first: dict[tuple[str, str], Found] = {}
    for each in found:
        key = (each.result["run"], each.result["protocol_hash"])
        kept = first.setdefault(key, each)
        if kept is not each:
            same = "the same result" if kept.result == each.result else "another result"
            problems.append(
                f"run {short(key[0])!r} is there twice: {each.folder} holds {same} and is left"
                f" out, {kept.folder} is used."
            )
    return list(first.values())


def group_by_protocol(found: list[Found], metric: str, problems: list[str]) -> tuple[Group, ...]:
    """Groups by protocol hash, the largest first."""
    by_hash: dict[str, list[Found]] = defaultdict(list)
    for each in found:
        by_hash[each.result["protocol_hash"]].append(each)
    if len(by_hash) > 1:
        counts = ", ".join(f"{key} ({len(runs)} runs)" for key, runs in by_hash.items())
        apart = differences([runs[0].result["protocol"] for runs in by_hash.values()])
        problems.append(
            f"{len(by_hash)} protocols among the results: {counts}. They differ in"
            f" {apart or 'nothing that is on record'}. Each has its own curve and its own fit; they"
            " are not comparable."
        )
    if not any(metric in each.result["metrics"] for each in found):
        names = sorted({name for each in found for name in each.result["metrics"]})
        problems.append(f"no result holds the metric {metric!r}; found: {', '.join(names) or '-'}.")
    groups = []
    for key, runs in sorted(by_hash.items(), key=lambda item: -len(item[1])):
        runs.sort(key=lambda each: (each.result["gflops"], each.result["run"]))
        fields = {json.dumps(each.result["protocol"], sort_keys=True) for each in runs}
        if len(fields) > 1:
            problems.append(f"protocol {key}: {len(fields)} different protocols carry this hash.")
        steps = sorted({each.result["train"]["steps"] for each in runs})
        if len(steps) > 1:
            shown = ", ".join(map(str, steps[:6])) + (", ..." if len(steps) > 6 else "")
            problems.append(f"protocol {key}: the fit mixes runs of {shown} training steps.")
        fits = _fits(runs, metric, problems)
        groups.append(Group(key, runs[0].result["protocol"], tuple(runs), fits))
    return tuple(groups)


def differences(protocols: Sequence[Mapping[str, Any]]) -> str:
    """'steps (ddim25, ddim50), seed (0, 1)': the keys in which protocols differ."""
    words = []
    for key in dict.fromkeys(key for protocol in protocols for key in protocol):
        values = dict.fromkeys(
            json.dumps(protocol[key]) if key in protocol else "not on record"
            for protocol in protocols
        )
        if len(values) > 1:
            shown = [short(value.strip('"'), 16) for value in values]
            more = ", ..." if len(shown) > 4 else ""
            words.append(f"{short(key)} ({', '.join(shown[:4])}{more})")
    return ", ".join(words)


def _fits(runs: list[Found], metric: str, problems: list[str]) -> tuple[Fit, ...]:
    """All runs, then each seed's where there are several. Unusable values are named."""
    usable = []
    for each in runs:
        value = each.result["metrics"].get(metric)
        if value is None or not math.isfinite(value) or value <= 0:
            problems.append(
                f"run {short(each.result['run'])!r}: {metric} is"
                f" {'missing' if value is None else value}; left out of the fit"
                f" ({each.folder})."
            )
        else:
            usable.append(each)
    seeds = sorted({each.result["train"]["seed"] for each in usable})
    fits = [_fit("all runs", usable, metric)]
    if len(seeds) > 1:
        for seed in seeds:
            own = [each for each in usable if each.result["train"]["seed"] == seed]
            fits.append(_fit(f"seed {seed}", own, metric))
    return tuple(fits)


def _fit(label: str, runs: list[Found], metric: str) -> Fit:
    """Pearson of log10 Gflops and the metric, Spearman, both power laws."""
    x = np.array([each.result["gflops"] for each in runs])
    y = np.array([each.result["metrics"][metric] for each in runs])
    # Seeds of one model share its distance from the law: they are one group to the bootstrap.
    models = [_model_key(each) for each in runs]
    n_models = len(set(models))
    if n_models < 3:
        return Fit(label, len(runs), n_models, why=f"a law needs 3 models, there are {n_models}")
    try:
        r = pearson(np.log10(x), y)
        law = fit_power_law(x, y, np.random.default_rng(0), groups=models)
    except UserError as error:
        return Fit(label, len(runs), n_models, why=str(error))
    offset, why = None, ""
    try:
        offset = fit_power_law_offset(x, y, np.random.default_rng(0), groups=models)
    except UserError as error:
        why = str(error)
    interval = pearson_interval(r, n_models)
    rank = spearman(x, y)
    return Fit(label, len(runs), n_models, "", r, interval, rank, law, offset, why)


def _model_key(each: Found) -> tuple[str, str, float]:
    model = each.result["model"]
    return (model["name"], model["block"], each.result["gflops"])


def conclusion(group: Group, metric: str) -> str:
    """One or two sentences: the law, its interval and Pearson, or why there are none."""
    fit, name = group.fits[0], metric_name(metric)
    seeds = len({each.result["train"]["seed"] for each in group.runs})
    counted = f"{plural(fit.n, 'run')} of {plural(fit.models, 'model')}"
    if seeds > 1:
        counted += f" with {seeds} seeds"
    if fit.law is None:
        return f"{counted}. No law is fitted: {fit.why.rstrip('.')}."
    law, interval = fit.law, fit.law.b_interval
    if interval.low > 0:
        trend = f"{name} falls as Gflops grow"
    elif interval.high < 0:
        trend = f"{name} grows with Gflops"
    else:
        trend = f"whether {name} falls with Gflops, these runs do not settle"
    offset = ""
    if fit.offset is not None and fit.offset.c > 0:
        offset = (
            f" With an offset: {law_words(fit.offset, name)}; exponent"
            f" {interval_words(fit.offset.b_interval)}; R² {number(fit.offset.r2)}."
        )
    return (
        f"{counted}: {trend}. {law_words(law, name)}; 95 % interval of the exponent b in"
        f" Gflops^(-b): {interval_words(interval)}; R² of the logs {number(law.r2)}. Pearson of"
        f" log10 Gflops and {name}: {number(fit.pearson)} (95 % interval"
        f" {interval_words(fit.pearson_interval)}); Spearman {number(fit.spearman)}.{offset}"
    )
