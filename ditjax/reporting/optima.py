"""The best learning rate and batch size of each model, and how they change with its size."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditjax.errors import UserError
from ditjax.reporting.arms import at_best
from ditjax.reporting.study import model_key, settings, settings_words, usable, varied_keys
from ditjax.runs.results import Found, trained_gflops
from ditjax.scaling.optimum import Minimum, OptimumLaw, fit_minimum, fit_optimum_law
from ditjax.studies.words import interval_words, number, short

RATE_KEY, BATCH_KEY, _STEPS = "optim.learning_rate", "train.batch_size", "train.steps"
_AXES = {RATE_KEY: "learning rate", BATCH_KEY: "batch size"}


@dataclass(frozen=True)
class Best:
    """The best value of a key for the model `name` at `x`, or `why` none is known."""

    name: str
    x: float
    minimum: Minimum | None = None
    why: str = ""

    @property
    def words(self) -> str:
        if self.minimum is None:
            return f"{self.name}: {self.why.rstrip('.')}"
        return f"{self.name}: {number(self.minimum.x)} ({interval_words(self.minimum.interval)})"


@dataclass(frozen=True)
class Tuned:
    """The best values of `key` along `x`, and their law, or `why` there is none.

    `where` are the settings that all runs behind them share, in words.
    """

    key: str
    where: str
    x: str
    bests: tuple[Best, ...]
    law: OptimumLaw | None = None
    why: str = ""

    @property
    def words(self) -> str:
        """Every best value with its 95 % interval, and the exponent, in one sentence or two."""
        head = f"Best {_AXES[self.key]}{f' ({self.where})' if self.where else ''}"
        listed = f"{head}, with 95 % intervals: {'; '.join(each.words for each in self.bests)}."
        if self.law is None:
            return f"{listed} No law against {self.x}: {self.why.rstrip('.')}."
        return (
            f"{listed} It goes as {self.x}^{number(self.law.exponent)} (95 %:"
            f" {interval_words(self.law.interval)}) over {self.law.n} minima."
        )


def tuned_keys(runs: Sequence[Found], metric: str) -> tuple[Tuned, ...]:
    """The best values of the learning rate and of the batch size, of those that a study varies.

    Runs share all other settings. Where both vary, the rate has its minima for each batch size, and
    the batch size those at each model's best rate. Training steps may follow from the batch size.
    """
    every = [each for each in runs if usable(each, metric)]
    varied = varied_keys(every)
    found: list[Tuned] = []
    for key in (key for key in _AXES if key in varied):
        drop = {key, RATE_KEY} if key == BATCH_KEY else {key}
        if BATCH_KEY in varied and _equal_images(every):
            drop.add(_STEPS)
        sets: dict[str, list[Found]] = defaultdict(list)
        for each in every:
            others = settings(each, [other for other in varied if other not in drop])
            sets[json.dumps(others, sort_keys=True)].append(each)
        parts = [(json.loads(text), _at_best_rate(own, key, metric)) for text, own in sets.items()]
        minima = [(others, _minima(own, key, metric)) for others, own in parts]
        shown = [(others, bests) for others, bests in minima if bests]
        found += [_against_size(key, others, bests) for others, bests in shown]
        if key == RATE_KEY and BATCH_KEY in varied:
            found += _against_batch(shown)
    return tuple(found)


def _equal_images(runs: Sequence[Found]) -> bool:
    """Whether all runs saw one number of images, up to the rounding of steps."""
    images = [each.result["train"]["images"] for each in runs]
    return max(images) <= 1.02 * min(images)


def _at_best_rate(runs: Sequence[Found], key: str, metric: str) -> list[Found]:
    """Of runs over batch sizes, each model's at its best rate for that size; else all."""
    if key != BATCH_KEY:
        return list(runs)
    by_size: dict[Any, list[Found]] = defaultdict(list)
    for each in runs:
        by_size[settings(each, [BATCH_KEY])[BATCH_KEY]].append(each)
    return [kept for own in by_size.values() for kept in at_best(own, metric, (RATE_KEY,))]


def _minima(runs: Sequence[Found], key: str, metric: str) -> list[tuple[Found, Best]]:
    """The best value of each model that has several, by cost, with one run of it."""
    models: dict[Any, list[Found]] = defaultdict(list)
    for each in runs:
        models[model_key(each)].append(each)
    images = {each.result["train"]["images"] for each in runs}
    found = []
    for own in sorted(models.values(), key=lambda own: own[0].result["gflops"]):
        first = own[0].result
        x = first["gflops"] if len(images) == 1 else trained_gflops(first, first["train"]["images"])
        name = short(first["model"]["name"])
        values = [float(settings(each, [key])[key]) for each in own]
        if len(set(values)) == 1:
            continue
        try:
            y = [each.result["metrics"][metric] for each in own]
            best = Best(name, x, fit_minimum(values, y, np.random.default_rng(0)))
        except UserError as error:
            best = Best(name, x, why=str(error))
        found.append((own[0], best))
    return found


def _against_size(
    key: str, others: Mapping[str, Any], minima: Sequence[tuple[Found, Best]]
) -> Tuned:
    images = {each.result["train"]["images"] for each, _ in minima}
    x = "Gflops" if len(images) == 1 else "training Gflops"
    return _tuned(key, settings_words(others), x, [best for _, best in minima])


def _against_batch(sets: Sequence[tuple[Mapping[str, Any], Sequence[Any]]]) -> list[Tuned]:
    """The best rate of each model along the batch sizes."""
    models: dict[Any, list[Best]] = defaultdict(list)
    names: dict[Any, str] = {}
    for others, minima in sets:
        rest = {key: value for key, value in others.items() if key not in (BATCH_KEY, _STEPS)}
        for each, best in minima:
            at = (model_key(each), json.dumps(rest, sort_keys=True))
            names[at] = ", ".join(filter(None, (best.name, settings_words(rest))))
            size = float(others[BATCH_KEY])
            models[at].append(Best(f"at {number(size)}", size, best.minimum, best.why))
    return [_tuned(RATE_KEY, names[at], _AXES[BATCH_KEY], bests) for at, bests in models.items()]


def _tuned(key: str, where: str, x: str, bests: Sequence[Best]) -> Tuned:
    known = [(each.x, each.minimum) for each in bests if each.minimum is not None]
    if len({at for at, _ in known}) < 3:
        why = f"it needs minima at 3, there are {len(known)}"
        return Tuned(key, where, x, tuple(bests), why=why)
    sizes, minima = zip(*known, strict=True)
    law = fit_optimum_law(sizes, minima, np.random.default_rng(0))
    return Tuned(key, where, x, tuple(bests), law)
