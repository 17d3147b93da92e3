"""The arms of a study, any two compared by their laws; and the ranks that metrics agree on.

An arm is a set of runs with the same network and settings, of several models: a block, a process, a
U-Net beside a DiT. A key may be tuned: then each model of an arm counts at its own best value.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ditjax.errors import UserError
from ditjax.reporting.study import model_key, settings, settings_words, usable, varied_keys
from ditjax.runs.results import Found, training_compute
from ditjax.scaling.fit import Interval, spearman, spearman_interval
from ditjax.scaling.slopes import Arm, SlopeDifference, compare_slopes
from ditjax.studies.words import OF_A_METRIC, interval_words, metric_name, number, plural

KIND = "model.kind"
MAX_ARMS = 8  # that are compared, those of the most runs first
MIN_MODELS = 3  # of an arm


@dataclass(frozen=True)
class SlopePair:
    """Two arms, the number of models of each, and what was found, or `why` nothing was."""

    labels: tuple[str, str]
    models: tuple[int, int]
    x: str
    found: SlopeDifference | None = None
    why: str = ""

    @property
    def words(self) -> str:
        """Exponents, the interval of their difference, and the verdict, in one sentence."""
        first, second = self.labels
        head = f"{first} ({plural(self.models[0], 'model')}) against {second} ({self.models[1]})"
        if self.found is None:
            return f"{head}: not compared, {self.why}"
        found = self.found
        verdict = "their exponents do not differ beyond their interval"
        if found.settled:
            verdict = f"{first if found.difference > 0 else second} gains more from {self.x}"
        return (
            f"{head}: exponents {number(found.b[0])} and {number(found.b[1])}, difference"
            f" {number(found.difference)} (95 %: {interval_words(found.interval)}); at"
            f" {number(found.at)} {self.x} the first has {number(found.ratio)} times the metric of"
            f" the second ({interval_words(found.ratio_interval)}): {verdict}."
        )


def compare_arms(
    runs: Sequence[Found], metric: str, tuned: Sequence[str] = ()
) -> tuple[SlopePair, ...]:
    """Compare every two arms among runs of one protocol; of fewer than two arms nothing.

    `tuned` are keys of the recipe that make no arms: each model of an arm counts at the values
    whose geometric mean over the seeds is the lowest. Raises UserError for a key that no run has.
    """
    every = [each for each in runs if usable(each, metric)]
    for key in tuned:
        if every and all(settings(each, [key])[key] is None for each in every):
            raise UserError(f"--tuned={key}: no result has this key; name one as recipes do.")
    keys = [KIND, *(key for key in varied_keys(every) if key not in (KIND, *tuned))]
    arms: dict[str, list[Found]] = defaultdict(list)
    for each in every:
        arms[json.dumps(settings(each, keys), sort_keys=True)].append(each)
    best = [at_best(members, metric, tuned) for members in arms.values()]
    best = [arm for arm in best if len({model_key(each) for each in arm}) >= MIN_MODELS]
    best = sorted(best, key=lambda arm: -len(arm))[:MAX_ARMS]
    apart = [key for key in keys if len({str(settings(arm[0], [key])) for arm in best}) > 1]
    images = {each.result["train"]["images"] for arm in best for each in arm}
    x = "training Gflops" if len(images) > 1 else "Gflops"
    return tuple(_compared(one, two, apart, metric, x) for one, two in combinations(best, 2))


def at_best(arm: Sequence[Found], metric: str, tuned: Sequence[str]) -> list[Found]:
    """The runs of each model at the values of the tuned keys that are best for it."""
    tried: dict[Any, dict[str, list[Found]]] = defaultdict(lambda: defaultdict(list))
    for each in arm:
        tried[model_key(each)][json.dumps(settings(each, tuned))].append(each)

    def score(runs: Sequence[Found]) -> float:
        return float(np.mean([math.log(each.result["metrics"][metric]) for each in runs]))

    return [each for values in tried.values() for each in min(values.values(), key=score)]


def _compared(
    one: Sequence[Found], two: Sequence[Found], apart: Sequence[str], metric: str, x: str
) -> SlopePair:
    def arm(runs: Sequence[Found]) -> Arm:
        cost = [each.result["gflops"] if x == "Gflops" else training_compute(each) for each in runs]
        y = [each.result["metrics"][metric] for each in runs]
        return Arm(cost, y, [model_key(each) for each in runs])

    names = (settings_words(settings(one[0], apart)), settings_words(settings(two[0], apart)))
    models = (len({model_key(each) for each in one}), len({model_key(each) for each in two}))
    try:
        found = compare_slopes(arm(one), arm(two), np.random.default_rng(0))
    except UserError as error:
        return SlopePair(names, models, x, why=str(error))
    return SlopePair(names, models, x, found)


@dataclass(frozen=True)
class RankAgreement:
    """Spearman's correlation of two metrics over the means of `models` models, and its interval."""

    first: str
    second: str
    spearman: float
    models: int
    interval: Interval

    @property
    def names(self) -> tuple[str, str]:
        return metric_name(self.first), metric_name(self.second)


def rank_agreements(runs: Sequence[Found]) -> tuple[RankAgreement, ...]:
    """How any two metrics rank the models that have both; of 3 models at least.

    A metric of which more is better, such as precision, agrees with FID at -1.
    """
    names = [
        name
        for name in dict.fromkeys(name for each in runs for name in each.result["metrics"])
        if not name.endswith((*OF_A_METRIC, "_floor"))
    ]
    found = []
    for first, second in combinations(names, 2):
        means: dict[Any, list[tuple[float, float]]] = defaultdict(list)
        for each in runs:
            x, y = (each.result["metrics"].get(name, math.nan) for name in (first, second))
            if math.isfinite(x) and math.isfinite(y):
                means[model_key(each)].append((x, y))
        if len(means) < MIN_MODELS:
            continue
        mean = np.array([np.mean(values, axis=0) for values in means.values()])
        if np.ptp(mean, axis=0).all():
            rank = spearman(mean[:, 0], mean[:, 1])
            interval = spearman_interval(rank, len(means))
            found.append(RankAgreement(first, second, rank, len(means), interval))
    return tuple(found)
