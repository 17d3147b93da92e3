"""What a group of runs says: laws, held-out prediction, IsoFLOP profiles, claims."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ditjax.errors import UserError
from ditjax.reporting.curves import Curve, Logs
from ditjax.reporting.study import (
    Group,
    axes,
    by_settings,
    model_key,
    settings,
    settings_words,
    training_gflops,
    usable,
)
from ditjax.runs.results import Found
from ditjax.scaling import claims
from ditjax.scaling.claims import Claim
from ditjax.scaling.extrapolate import Extrapolation, held_out
from ditjax.scaling.fit import (
    Interval,
    PowerLaw,
    fit_power_law,
    fit_power_law_offset,
    pearson,
    pearson_interval,
    spearman,
)
from ditjax.scaling.isoflop import ComputeOptimal, Profile, compute_optimal, isoflop
from ditjax.scaling.isoflop import Curve as ComputeCurve
from ditjax.studies.words import (
    interval_words,
    law_words,
    metric_name,
    number,
    percent,
    plural,
    short,
)

GFLOPS, PARAMS, TRAINING = "Gflops", "parameters", "training Gflops"
VAL_LOSS, TRAIN_LOSS = "val_loss", "training loss"


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
    x: str = GFLOPS
    y: str = ""


@dataclass(frozen=True)
class IsoFlop:
    """Profiles of `metric` at several budgets of training Gflops, and the law of their minima."""

    metric: str
    curves: tuple[Curve, ...]
    profiles: tuple[Profile, ...]
    optimal: ComputeOptimal | None
    why: str


@dataclass(frozen=True)
class Analysis:
    """One group. `runs` are those with a usable metric and the settings that most of them have.

    `fits`: the metric against Gflops, all of `runs` first, then each seed, then other settings.
    `others`, of `runs`: the metric against parameters and training compute, and the loss.
    `agreement`: Spearman of validation loss and metric over the means of `agreed` models, NaN
    without.
    """

    group: Group
    metric: str
    runs: tuple[Found, ...]
    settings: str
    fits: tuple[Fit, ...]
    others: tuple[Fit, ...]
    extrapolation: Extrapolation | None
    why_no_extrapolation: str
    isoflop: IsoFlop | None
    claims: tuple[Claim, ...]
    agreement: float
    agreed: int


MAX_SETTINGS = 12  # fits of other settings than most have


def analysed(group: Group, metric: str, logs: Logs, problems: list[str]) -> Analysis:
    """All that is computed of one group; what is wrong with its logs is added to `problems`."""
    every = [each for each in group.runs if usable(each, metric)]
    sets = by_settings(every) or [({}, [])]
    (values, runs), others = sets[0], sets[1 : 1 + MAX_SETTINGS]
    seeds = sorted({each.result["train"]["seed"] for each in runs})
    words = settings_words(values)
    fits = [_fit(words or "all runs", runs, GFLOPS, metric)]
    if len(seeds) > 1:
        for seed in seeds:
            own = [each for each in runs if each.result["train"]["seed"] == seed]
            fits.append(_fit(f"seed {seed}", own, GFLOPS, metric))
    fits += [_fit(settings_words(other), own, GFLOPS, metric) for other, own in others]
    extrapolation, why = None, ""
    try:
        extrapolation = held_out(
            _values(runs, GFLOPS),
            _values(runs, metric),
            np.random.default_rng(0),
            groups=[model_key(each) for each in runs],
        )
    except UserError as error:
        why = str(error)
    iso = isoflop_of(runs, metric, logs, problems)
    agreement, agreed = _agreement(runs, metric)
    return Analysis(
        group,
        metric,
        tuple(runs),
        words,
        tuple(fits),
        _others(runs, metric),
        extrapolation,
        why,
        iso,
        tuple(_claims(every, runs, metric, iso)),
        agreement,
        agreed,
    )


BUDGETS = 5


def isoflop_of(
    runs: Sequence[Found], metric: str, logs: Logs, problems: list[str]
) -> IsoFlop | None:
    """Profiles of the metric along training where it was measured, else of a loss.

    None where fewer than 3 models have a curve. The size of a model is its Gflops.
    """
    for key in (metric, VAL_LOSS, TRAIN_LOSS):
        if key == TRAIN_LOSS:
            wanted = {id(each) for each in runs}
            curves = [curve for curve in logs.losses() if id(curve.run) in wanted]
        else:
            curves = logs.evaluations(key, runs, problems)
        if len({model_key(curve.run) for curve in curves}) >= 3:
            break
    else:
        return None
    budgets = _budgets(curves)
    if not budgets:
        return IsoFlop(key, tuple(curves), (), None, "no budget is reached by 3 models")
    profiles = isoflop(_compute_curves(curves), budgets)
    try:
        return IsoFlop(key, tuple(curves), profiles, compute_optimal(profiles), "")
    except UserError as error:
        return IsoFlop(key, tuple(curves), profiles, None, str(error))


def _compute_curves(curves: Sequence[Curve]) -> list[ComputeCurve]:
    return [
        ComputeCurve(curve.run.result["gflops"], curve.gflops, curve.values) for curve in curves
    ]


def _budgets(curves: Sequence[Curve]) -> list[float]:
    """At most BUDGETS, evenly spaced in log compute, where most models have a curve, 3 or more."""
    ends: dict[float, tuple[float, float]] = {}
    for curve in curves:
        size, (low, high) = curve.run.result["gflops"], (curve.gflops[0], curve.gflops[-1])
        old = ends.get(size, (low, high))
        ends[size] = (min(old[0], low), max(old[1], high))
    tried = np.geomspace(
        min(low for low, _ in ends.values()), max(high for _, high in ends.values()), 60
    )
    reached = [sum(low <= budget <= high for low, high in ends.values()) for budget in tried]
    least = max(3, max(reached) / 2)
    kept = [float(budget) for budget, n in zip(tried, reached, strict=True) if n >= least]
    if len(kept) <= BUDGETS:
        return kept
    return [kept[i] for i in np.linspace(0, len(kept) - 1, BUDGETS).round().astype(int)]


def _claims(
    every: Sequence[Found], runs: Sequence[Found], metric: str, iso: IsoFlop | None
) -> list[Claim]:
    """The paper's, but sampling compute's; that of the blocks is of all settings.

    Fewer than 3 models say nothing of any.
    """
    if len({model_key(each) for each in every}) < 3:
        return []
    sizes = [short(each.result["model"]["size"], 18) for each in runs]
    patches = [each.result["model"]["patch"] for each in runs]
    y = _values(runs, metric)
    params, gflops = _values(runs, PARAMS), _values(runs, GFLOPS)
    tried = [
        lambda: claims.bigger_is_better(params, patches, y),
        lambda: claims.smaller_patch_is_better(sizes, patches, y),
        lambda: claims.gflops_not_parameters(gflops, params, sizes, y),
        lambda: claims.larger_models_use_compute_better(_compute_curves(iso.curves) if iso else []),
        lambda: _of_blocks(every, metric),
    ]
    found = []
    for claim in tried:
        try:
            found.append(claim())
        except UserError as error:
            found.append(Claim("A claim could not be tested.", None, str(error)))
    return found


def _of_blocks(every: Sequence[Found], metric: str) -> Claim:
    """Blocks are compared where all else is the same."""
    models = []
    for each in every:
        model = each.result["model"]
        rest = {
            key: value
            for key, value in settings(each, axes(every)).items()
            if key not in ("model.block", "model.name")
        }
        models.append((model["size"], model["patch"], *map(str, rest.values())))
    blocks = [short(each.result["model"]["block"], 18) for each in every]
    return claims.adaln_zero_is_best(blocks, models, _values(every, metric))


def value(each: Found, key: str) -> float:
    """Of a run: one of the abscissae above, the training loss, or a metric; NaN where missing."""
    result = each.result
    if key == GFLOPS:
        return result["gflops"]
    if key == PARAMS:
        return float(result["params"])
    if key == TRAINING:
        return training_gflops(result)
    if key == TRAIN_LOSS:
        return result["train"]["final_loss"]
    return result["metrics"].get(key, math.nan)


def _values(runs: Sequence[Found], key: str) -> np.ndarray:
    return np.array([value(each, key) for each in runs], np.float64)


def loss_of(runs: Sequence[Found]) -> str:
    """The loss that all runs have: on held-out images where there is one, else in training."""
    return VAL_LOSS if runs and all(usable(each, VAL_LOSS) for each in runs) else TRAIN_LOSS


def _others(runs: Sequence[Found], metric: str) -> tuple[Fit, ...]:
    """Where training compute is proportional to Gflops it says nothing of its own."""
    own = {each.result["train"]["images"] for each in runs}
    xs = [GFLOPS, PARAMS, *([TRAINING] if len(own) > 1 else [])]
    loss = loss_of(runs)
    with_loss = [each for each in runs if 0 < value(each, loss) < math.inf]
    fits = [_fit("all runs", runs, x, metric) for x in xs[1:]]
    return (*fits, *(_fit("all runs", with_loss, x, loss) for x in xs if loss != metric))


def _fit(label: str, runs: Sequence[Found], x_key: str, y_key: str) -> Fit:
    """Pearson of log10 x and y, Spearman, both power laws."""
    x, y = _values(runs, x_key), _values(runs, y_key)
    # Seeds of one model share its distance from the law: they are one group to the bootstrap.
    models = [model_key(each) for each in runs]
    n, n_models = len(runs), len(set(models))
    if n_models < 3:
        why = f"a law needs 3 models, there are {n_models}"
        return Fit(label, n, n_models, why=why, x=x_key, y=y_key)
    try:
        r = pearson(np.log10(x), y)
        law = fit_power_law(x, y, np.random.default_rng(0), groups=models)
    except UserError as error:
        return Fit(label, n, n_models, why=str(error), x=x_key, y=y_key)
    offset, why = None, ""
    try:
        offset = fit_power_law_offset(x, y, np.random.default_rng(0), groups=models)
    except UserError as error:
        why = str(error)
    interval, rank = pearson_interval(r, n_models), spearman(x, y)
    return Fit(label, n, n_models, "", r, interval, rank, law, offset, why, x_key, y_key)


def _agreement(runs: Sequence[Found], metric: str) -> tuple[float, int]:
    """Spearman of validation loss and metric over the models' means, and how many models."""
    both = [each for each in runs if usable(each, VAL_LOSS)]
    models = dict.fromkeys(model_key(each) for each in both)
    if metric == VAL_LOSS or len(models) < 3:
        return math.nan, len(models)
    means = [
        [
            np.mean([value(each, key) for each in both if model_key(each) == model])
            for model in models
        ]
        for key in (VAL_LOSS, metric)
    ]
    try:
        return spearman(means[0], means[1]), len(models)
    except UserError:  # all of one value
        return math.nan, len(models)


def conclusion(analysis: Analysis) -> str:
    """One or two sentences: the law, its interval and Pearson, or why there are none."""
    fit, name = analysis.fits[0], metric_name(analysis.metric)
    seeds = len({each.result["train"]["seed"] for each in analysis.runs})
    counted = f"{plural(fit.n, 'run')} of {plural(fit.models, 'model')}"
    if seeds > 1:
        counted += f" with {seeds} seeds"
    if analysis.settings:
        counted += f" ({analysis.settings})"
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


def floor_of(runs: Sequence[Found], metric: str) -> float:
    """The distance of real images to real images, the median over runs; NaN where none has it."""
    found = [each.result["metrics"].get(f"{metric}_floor", math.nan) for each in runs]
    found = [floor for floor in found if math.isfinite(floor)]
    return float(np.median(found)) if found else math.nan


def further(analysis: Analysis) -> list[str]:
    """The held-out prediction and the proxy, a sentence each."""
    words, name = [], metric_name(analysis.metric)
    found = analysis.extrapolation
    if found is not None:
        largest = found.held[-1]
        where = "inside" if largest.inside else "outside of"
        words.append(
            f"Held out: the law of the {found.models_fitted} smaller models foretells"
            f" {number(largest.predicted)} for {short(largest.name[0])}"
            f" ({number(largest.x)} Gflops); measured {number(largest.measured)}, so the prediction"
            f" is off by {percent(largest.error)}, {where} its 95 % interval"
            f" {interval_words(largest.interval)}."
        )
    elif analysis.fits[0].law is not None:
        words.append(f"No held-out prediction: {analysis.why_no_extrapolation}")
    if math.isfinite(analysis.agreement):
        words.append(
            f"Validation loss at fixed (t, ε) ranks the {analysis.agreed} models as {name} does"
            f" with Spearman {number(analysis.agreement)}."
        )
    return words
