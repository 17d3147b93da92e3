"""The analysis of a group of runs: laws, held-out prediction, IsoFLOP profiles, claims."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditjax.errors import UserError
from ditjax.reporting.arms import (
    MIN_MODELS,
    RankAgreement,
    SlopePair,
    compare_arms,
    rank_agreements,
)
from ditjax.reporting.curves import Logs, TrainingCurve, thinned
from ditjax.reporting.optima import Tuned, tuned_keys
from ditjax.reporting.paired import PairedRow, paired_rows
from ditjax.reporting.study import (
    Group,
    bits_per_dim,
    by_settings,
    described,
    model_key,
    settings,
    settings_words,
    usable,
    varied_keys,
)
from ditjax.runs.results import Found, trained_gflops, training_compute
from ditjax.scaling import claims
from ditjax.scaling.claims import Claim
from ditjax.scaling.extrapolate import Extrapolation, predict_held_out
from ditjax.scaling.fit import (
    Interval,
    PowerLaw,
    fit_power_law,
    fit_power_law_offset,
    pearson,
    pearson_interval,
    spearman,
    spearman_interval,
)
from ditjax.scaling.frontier import frontier
from ditjax.scaling.isoflop import ComputeCurve, ComputeOptimal, Profile, compute_optimal, isoflop
from ditjax.scaling.joint import JointLaw, fit_joint
from ditjax.scaling.published import COMPUTE_EXPONENTS
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
FRONTIER = "best for its compute, along training"
VAL_LOSS, TRAIN_LOSS = "val_loss", "training loss"


@dataclass(frozen=True)
class Fit:
    """The laws of y against x over `n` runs of `models` models, or `why` there are none."""

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
    """Profiles of `metric` at several budgets of training Gflops, and the law of their minima.

    They are of `finished` runs, each of which ends at its budget, or of the `curves` along
    training, which are of `curve_metric`. `why` there is no law, where `optimal` is None.
    """

    metric: str
    finished: bool
    curve_metric: str
    curves: tuple[TrainingCurve, ...]
    profiles: tuple[Profile, ...]
    optimal: ComputeOptimal | None
    why: str


@dataclass(frozen=True)
class Joint:
    """A law of `metric` in forward Gflops and training images at once, or `why` there is none.

    Its points are the runs' results, or where these have too few numbers of images, points along
    training. `deviation` is the root mean square of log(metric / law) over the points.
    """

    metric: str
    along_training: bool
    law: JointLaw | None = None
    deviation: float = math.nan
    why: str = ""


@dataclass(frozen=True)
class Analysis:
    """The analysis of one group.

    `runs` have a usable metric and the settings that most of these have. `fits` are of the metric
    against Gflops: first for all of `runs`, then for each seed, then for other settings. `others`
    are fits for `runs` of the metric against other costs, and of the loss; the last is that of the
    lowest loss for the compute of training. `agreement` is
    Spearman's correlation of validation loss and metric over the means of `agreed` models, or NaN.
    `slopes` compare the arms of the group, `paired` each with its baseline, `ranks` all metrics;
    `tuned` has the best learning rates and batch sizes.
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
    joint: Joint
    claims: tuple[Claim, ...]
    agreement: float
    agreed: int
    slopes: tuple[SlopePair, ...]
    paired: tuple[PairedRow, ...]
    ranks: tuple[RankAgreement, ...]
    tuned: tuple[Tuned, ...]


MAX_SETTINGS = 12  # fits for settings other than those of most runs


def analyse(
    group: Group,
    metric: str,
    logs: Logs,
    problems: list[str],
    tuned: Sequence[str] = (),
    order: Sequence[str] = (),
) -> Analysis:
    """Analyse one group; what is wrong with its logs is added to `problems`.

    `tuned`: keys at whose best values arms are compared (`arms.compare_arms`). `order`: the names
    of the runs as the study lists them.
    """
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
        extrapolation = predict_held_out(
            _values(runs, GFLOPS),
            _values(runs, metric),
            np.random.default_rng(0),
            groups=[model_key(each) for each in runs],
        )
    except UserError as error:
        why = str(error)
    any_length = of_any_length(every, runs)
    iso = isoflop_of(runs, any_length, metric, logs, problems)
    agreement, agreed = _agreement(runs, metric)
    return Analysis(
        group,
        metric,
        tuple(runs),
        words,
        tuple(fits),
        (*_others(runs, metric), *frontier_fits(runs, logs)),
        extrapolation,
        why,
        iso,
        joint_of(any_length, metric, iso),
        tuple(_claims(every, runs, metric, iso)),
        agreement,
        agreed,
        compare_arms(group.runs, metric, tuned),
        paired_rows(group.runs, metric, problems, order),
        rank_agreements(runs),
        tuned_keys(group.runs, metric),
    )


MAX_BUDGETS = 5


def isoflop_of(
    runs: Sequence[Found],
    any_length: Sequence[Found],
    metric: str,
    logs: Logs,
    problems: list[str],
) -> IsoFlop | None:
    """Profiles of the results of `any_length` that end at one budget, or of what `runs` logged.

    That is the metric along training, or a loss if it was not measured there. A run that has ended
    has also ended its schedule, so that results go before curves. None if there is neither for 3
    models. The size of a model is its forward Gflops.
    """
    key, curves = _curves_of((metric, VAL_LOSS, TRAIN_LOSS), runs, logs, problems)
    ended, budgets = _ended(any_length, metric)
    finished = bool(budgets)
    if not finished:
        if not curves:
            return None
        ended, budgets = _compute_curves(curves), _budgets(curves)
    of = (metric if finished else key, finished, key, tuple(curves))
    if not budgets:
        return IsoFlop(*of, (), None, "no budget is reached by 3 models")
    profiles = isoflop(ended, budgets)
    try:
        return IsoFlop(*of, profiles, compute_optimal(profiles), "")
    except UserError as error:
        return IsoFlop(*of, profiles, None, str(error))


SAME_BUDGET = 1.02  # runs end at one budget if their training Gflops are within this factor


def _ended(runs: Sequence[Found], metric: str) -> tuple[list[ComputeCurve], list[float]]:
    """The ends of runs that end at one budget, if 3 models do, as curves; and the budgets."""
    groups: list[list[Found]] = []
    for each in sorted(runs, key=training_compute):
        if groups and training_compute(each) <= SAME_BUDGET * training_compute(groups[-1][0]):
            groups[-1].append(each)
        else:
            groups.append([each])
    curves, budgets = [], []
    for group in groups:
        if len({each.result["gflops"] for each in group}) < MIN_MODELS:
            continue
        budgets.append(statistics.geometric_mean(training_compute(each) for each in group))
        curves += [
            ComputeCurve(
                each.result["gflops"],
                [budgets[-1]],
                [each.result["metrics"][metric]],
                trained_gflops(each.result, 1),
            )
            for each in group
        ]
    return curves, budgets


def _curves_of(
    keys: Sequence[str], runs: Sequence[Found], logs: Logs, problems: list[str]
) -> tuple[str, list[TrainingCurve]]:
    """The first of `keys` of which 3 models have curves along training, with these; or nothing."""
    for key in keys:
        if key == TRAIN_LOSS:
            wanted = {id(each) for each in runs}
            curves = [curve for curve in logs.losses() if id(curve.run) in wanted]
        else:
            curves = logs.evaluations(key, runs, problems)
        if len({model_key(curve.run) for curve in curves}) >= MIN_MODELS:
            return key, curves
    return "", []


def frontier_fits(runs: Sequence[Found], logs: Logs) -> tuple[Fit, ...]:
    """The laws of the lowest loss of any run for its training compute (Kaplan et al. 2020, Sec. 6).

    The frontier begins where 3 models have points. Its points group by model, so it needs 3 models
    on it. Nothing if fewer than 3 models have a curve.
    """
    key, curves = _curves_of((VAL_LOSS, TRAIN_LOSS), runs, logs, [])
    if not curves:
        return ()
    starts: dict[Any, float] = {}
    for curve in curves:
        model = model_key(curve.run)
        starts[model] = min(starts.get(model, math.inf), float(curve.gflops[0]))
    x = np.concatenate([curve.gflops for curve in curves])
    y = np.concatenate([curve.values for curve in curves])
    models = [model_key(curve.run) for curve in curves for _ in curve.steps]
    kept = np.flatnonzero(x >= sorted(starts.values())[MIN_MODELS - 1])
    best = kept[frontier(x[kept], y[kept])]
    return (_fit_points(FRONTIER, x[best], y[best], [models[i] for i in best], TRAINING, key),)


CURVE_POINTS = 8  # of a curve along training in a joint law


def joint_of(runs: Sequence[Found], metric: str, iso: IsoFlop | None) -> Joint:
    """Fit a law in size and images (Hoffmann et al. 2022, Eq. 2); the size is forward Gflops.

    `iso` has the curves along training that serve where the results have too few points.
    """
    seen = [float(each.result["train"]["images"]) for each in runs]
    points = np.array([_values(runs, GFLOPS), seen, _values(runs, metric)])
    along_training = bool(iso and iso.curves and len(set(seen)) < 3)
    if iso and along_training:
        metric = iso.curve_metric
        curves = [thinned(curve, CURVE_POINTS) for curve in iso.curves]
        parts = [
            (
                np.full(len(curve.steps), curve.run.result["gflops"]),
                curve.steps * curve.run.result["train"]["batch_size"],
                curve.values,
            )
            for curve in curves
        ]
        points = np.concatenate(parts, axis=1)
    try:
        law = fit_joint(*points)
    except UserError as error:
        return Joint(metric, along_training, why=str(error))
    size, images, y = points
    for name, term in (("size", law.a * size**-law.alpha), ("images", law.b * images**-law.beta)):
        if np.ptp(term) < 1e-3 * y.mean():
            why = f"{metric_name(metric)} does not fall with {name} at these points."
            return Joint(metric, along_training, why=why)
    deviation = np.sqrt(np.mean(np.log(y / law(size, images)) ** 2))
    return Joint(metric, along_training, law, float(deviation))


def of_any_length(every: Sequence[Found], runs: Sequence[Found]) -> list[Found]:
    """Those of `every` that differ from `runs` in their training steps alone."""
    keys = [key for key in varied_keys(every) if key != "train.steps"]
    return [each for each in every if runs and settings(each, keys) == settings(runs[0], keys)]


def _compute_curves(curves: Sequence[TrainingCurve]) -> list[ComputeCurve]:
    return [
        ComputeCurve(curve.run.result["gflops"], curve.gflops, curve.values) for curve in curves
    ]


def _budgets(curves: Sequence[TrainingCurve]) -> list[float]:
    """Up to MAX_BUDGETS budgets, evenly spaced in log compute.

    Each is reached by at least 3 models, and by half as many as the budget that most reach.
    """
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
    if len(kept) <= MAX_BUDGETS:
        return kept
    return [kept[i] for i in np.linspace(0, len(kept) - 1, MAX_BUDGETS).round().astype(int)]


def _claims(
    every: Sequence[Found], runs: Sequence[Found], metric: str, iso: IsoFlop | None
) -> list[Claim]:
    """Test the paper's claims except the one about sampling compute.

    The comparison of blocks uses runs of every setting. Fewer than 3 models test nothing.
    """
    if len({model_key(each) for each in every}) < 3:
        return []
    y, params, gflops = (_values(runs, key) for key in (metric, PARAMS, GFLOPS))
    sizes = [described(each, "size") for each in runs]
    patches: list[Any] = [each.result["model"].get("patch") for each in runs]
    with_patch = [i for i, patch in enumerate(patches) if type(patch) is int and patch > 0]
    patched, of_size = [patches[i] for i in with_patch], [sizes[i] for i in with_patch]
    tried = [
        lambda: claims.bigger_is_better(params[with_patch], patched, y[with_patch]),
        lambda: claims.smaller_patch_is_better(of_size, patched, y[with_patch]),
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
    """Compare blocks where everything else is the same."""
    every = [each for each in every if "block" in each.result["model"]]
    models, varied = [], varied_keys(every)
    for each in every:
        rest = {
            key: value
            for key, value in settings(each, varied).items()
            if key not in ("model.block", "model.name")
        }
        name = (described(each, "size"), described(each, "patch"))
        models.append((*name, *map(str, rest.values())))
    blocks = [described(each, "block") for each in every]
    return claims.adaln_zero_is_best(blocks, models, _values(every, metric))


def value(each: Found, key: str) -> float:
    """A run's cost (GFLOPS, PARAMS, TRAINING), training loss or metric; NaN if it is missing."""
    result = each.result
    if key == GFLOPS:
        return result["gflops"]
    if key == PARAMS:
        return float(result["params"])
    if key == TRAINING:
        return trained_gflops(result, result["train"]["images"])
    if key == TRAIN_LOSS:
        return result["train"]["final_loss"]
    return result["metrics"].get(key, math.nan)


def _values(runs: Sequence[Found], key: str) -> np.ndarray:
    return np.array([value(each, key) for each in runs], np.float64)


def loss_of(runs: Sequence[Found]) -> str:
    """The loss that all runs have: on held-out images if possible, else in training."""
    return VAL_LOSS if runs and all(usable(each, VAL_LOSS) for each in runs) else TRAIN_LOSS


def _others(runs: Sequence[Found], metric: str) -> tuple[Fit, ...]:
    """Fits against other costs; training compute only where it is not proportional to Gflops."""
    own = {each.result["train"]["images"] for each in runs}
    xs = [GFLOPS, PARAMS, *([TRAINING] if len(own) > 1 else [])]
    loss = loss_of(runs)
    with_loss = [each for each in runs if 0 < value(each, loss) < math.inf]
    fits = [_fit("all runs", runs, x, metric) for x in xs[1:]]
    return (*fits, *(_fit("all runs", with_loss, x, loss) for x in xs if loss != metric))


def _fit(label: str, runs: Sequence[Found], x_key: str, y_key: str) -> Fit:
    """Fit both power laws to runs; the seeds of one model are a group."""
    x, y = _values(runs, x_key), _values(runs, y_key)
    return _fit_points(label, x, y, [model_key(each) for each in runs], x_key, y_key)


def _fit_points(
    label: str, x: np.ndarray, y: np.ndarray, models: Sequence[Any], x_key: str, y_key: str
) -> Fit:
    """Fit both power laws, and compute Pearson of log10 x and y, and Spearman."""
    # Points of one model share its distance from the law, so the bootstrap moves them together.
    n, n_models = len(x), len(set(models))
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
    """Spearman of validation loss and metric over the models' means, and the number of models."""
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
    except UserError:  # all values are equal
        return math.nan, len(models)


def conclusion(analysis: Analysis) -> str:
    """The law, its interval and Pearson, or why there is no law, in one or two sentences."""
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
        trend = f"these runs do not settle whether {name} falls with Gflops"
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
    """The distance of real images to real images: the median over runs, NaN if none has it."""
    found = [each.result["metrics"].get(f"{metric}_floor", math.nan) for each in runs]
    found = [floor for floor in found if math.isfinite(floor)]
    return float(np.median(found)) if found else math.nan


def _joint_words(joint: Joint) -> str:
    law = joint.law
    if law is None:
        return f"No law in size and images: {joint.why}"
    offset = f"{number(law.e)} + " if law.e > 1e-6 * (law.a + law.b) else ""
    points = f"{law.n} points along training" if joint.along_training else f"{law.n} results"
    bias = "; a falling learning rate biases such points" if joint.along_training else ""
    return (
        f"In forward Gflops N and training images D (Hoffmann et al. 2022, Eq. 2):"
        f" {metric_name(joint.metric)} ≈ {offset}{number(law.a)} · N^{number(-law.alpha)}"
        f" + {number(law.b)} · D^{number(-law.beta)}, fitted to {points}, which lie"
        f" {percent(joint.deviation).removeprefix('+')} off it (root mean square{bias}). It has no"
        f" intervals. By it the best size grows as compute^"
        f"{number(law.beta / (law.alpha + law.beta))}."
    )


def _frontier_words(fit: Fit) -> str:
    """The law of the loss in training compute, beside those of others."""
    name = metric_name(fit.y)
    if fit.law is None:
        return f"No law of the {name} in training compute: {fit.why.rstrip('.')}."
    offset = ""
    if fit.offset is not None and fit.offset.c > 0:
        offset = (
            f" With an offset the exponent is {number(fit.offset.b)} above {number(fit.offset.c)}."
        )
    others = "; ".join(f"{number(b)} ({source})" for source, b in COMPUTE_EXPONENTS.items())
    return (
        f"The lowest {name} of any run goes as training compute^(-b), b = {number(fit.law.b)}"
        f" (95 %: {interval_words(fit.law.b_interval)}; {fit.n} points of {fit.models} models along"
        f" training, which a falling learning rate biases).{offset} Recalled exponents of others,"
        f" of other losses and data: {others}."
    )


def _likelihood_words(runs: Sequence[Found]) -> str:
    """The lowest bound of the runs, as a sentence; '' if none has one."""
    known = [(bits, each) for each in runs if (bits := bits_per_dim(each)) is not None]
    if not known:
        return ""
    bits, best = min(known, key=lambda pair: pair[0])
    return (
        f"Likelihood: L_vlb on held-out images is {number(bits)} bits/dim for"
        f" {short(best.result['run'])}, the lowest of {plural(len(known), 'run')}: the number of"
        " diffusion steps times the mean term, without the prior's, which no training changes."
    )


def findings(analysis: Analysis) -> list[str]:
    """Sentences on the held-out prediction, the law in size and images, the proxy, and bits/dim."""
    words, name = [], metric_name(analysis.metric)
    found = analysis.extrapolation
    if found is not None:
        largest = found.held[-1]
        where = "inside" if largest.inside else "outside"
        words.append(
            f"Held out: the law fitted to the {found.models_fitted} smaller models predicts"
            f" {number(largest.predicted)} for {short(largest.name[0])}"
            f" ({number(largest.x)} Gflops); measured {number(largest.measured)}, so the prediction"
            f" is off by {percent(largest.error)}, {where} its 95 % interval"
            f" {interval_words(largest.interval)}."
        )
    elif analysis.fits[0].law is not None:
        words.append(f"No held-out prediction: {analysis.why_no_extrapolation}")
    if analysis.fits[0].law is not None:
        words.append(_joint_words(analysis.joint))
    words += [_frontier_words(fit) for fit in analysis.others if fit.label == FRONTIER]
    if math.isfinite(analysis.agreement):
        interval = spearman_interval(analysis.agreement, analysis.agreed)
        words.append(
            f"Ranks of the {analysis.agreed} models by validation loss at fixed (t, ε) and by"
            f" {name}: Spearman {number(analysis.agreement)} (95 %: {interval_words(interval)})."
        )
    if likelihood := _likelihood_words(analysis.runs):
        words.append(likelihood)
    return words
