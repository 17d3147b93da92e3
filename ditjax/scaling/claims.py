"""The conclusions of the DiT paper, tested on the points of a study (Peebles & Xie 2023, Sec. 5).

y is a positive metric of which lower is better (FID, FD, a loss). Runs of one model are its seeds.
A model counts with their geometric mean, and the pooled spread of log y determines which
differences between models exceed the noise of seeds (Student's t, 95 %, two-sided). A claim holds
if all differences beyond that noise support it and they are the majority of all. It fails if one
contradicts it. Otherwise there are not enough runs to decide. With one seed each the noise is
unknown, and a claim fails only if most pairs contradict it.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditjax.errors import UserError
from ditjax.scaling.fit import pearson, pearson_interval, spearman
from ditjax.scaling.frontier import crossing, interpolate
from ditjax.scaling.isoflop import ComputeCurve
from ditjax.scaling.points import Vector, positive_points
from ditjax.scaling.spread import Spread, spread, student_quantile

LEVEL = 0.95
Names = Sequence[Any] | NDArray[Any]


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, whether it holds here (None: not enough runs), and the evidence."""

    text: str
    holds: bool | None
    figures: str


class _Mean(NamedTuple):
    """The mean of log y over the runs of a model, and their number."""

    log_y: float
    runs: int


def _needed(noise: Spread, first: _Mean, second: _Mean) -> float:
    """The smallest significant difference between two models; 0 if the noise is unknown."""
    if not noise.freedom:
        return 0.0
    t = student_quantile(LEVEL, noise.freedom)
    return float(t * noise.deviation * np.sqrt(1 / first.runs + 1 / second.runs))


def _noise_words(noise: Spread) -> str:
    if not noise.freedom:
        return "one seed each, so that their spread is unknown"
    return f"seeds of one model spread by {np.expm1(noise.deviation):.1%}"


class _Pair(NamedTuple):
    """Two models of which the claim says that the second is better."""

    worse: str
    better: str
    difference: float  # log y of the second - log y of the first
    needed: float


def bigger_is_better(parameters: ArrayLike, patch: Names, y: ArrayLike) -> Claim:
    """DiT Fig. 6, top: at one patch size, more parameters give a lower y.

    parameters, y f64[n] > 0, patch [n]. A model is a pair of patch and parameters.
    """
    parameters, y = positive_points(parameters, y, at_least=0)
    means, noise = _means(zip(_named(patch, len(y)), parameters.tolist(), strict=True), y)
    pairs = _ordered(means, noise, 1, lambda key: f"{key[1]:.3g} parameters, patch {key[0]}")
    return _claim("Bigger models are better at the same patch size.", pairs, noise)


def smaller_patch_is_better(size: Names, patch: ArrayLike, y: ArrayLike) -> Claim:
    """DiT Fig. 6, bottom: at one size (layers, width, heads), smaller patches give a lower y.

    size [n] are names, patch, y f64[n] > 0. A model is a pair of size and patch.
    """
    patch, y = positive_points(patch, y, at_least=0)
    means, noise = _means(zip(_named(size, len(y)), patch.tolist(), strict=True), y)
    pairs = _ordered(means, noise, -1, lambda key: f"{key[0]}/{key[1]:g}")
    return _claim("Smaller patches are better at the same size.", pairs, noise)


def gflops_not_parameters(
    gflops: ArrayLike, parameters: ArrayLike, size: Names, y: ArrayLike
) -> Claim:
    """DiT Fig. 8: log Gflops and y correlate; at equal parameters, patches still change y.

    gflops, parameters, y f64[n] > 0; size [n] names the models of (nearly) equal parameters. A
    model is a pair of size and Gflops. The claim fails if y does not fall with Gflops (Pearson's r
    of log10 Gflops, Spearman's) or ranks no better by them than by parameters. It holds if y does,
    the 95 % interval of r is below 0, and the cheapest and the most expensive model of every size
    differ by more than the seeds do. It needs at least 4 models, and a size with several.
    """
    text = "Gflops predict quality, parameters alone do not."
    gflops, y = positive_points(gflops, y, at_least=0)
    parameters, y = positive_points(parameters, y, at_least=0)
    keys = list(zip(_named(size, len(y)), gflops.tolist(), strict=True))
    means, noise = _means(keys, y)
    if len(means) < 4:
        return Claim(text, None, f"{len(means)} models: a correlation needs 4.")
    parameters_of = dict(zip(keys, parameters.tolist(), strict=True))
    cost = np.array([key[1] for key in means])
    held = np.array([parameters_of[key] for key in means])
    quality = np.exp([mean.log_y for mean in means.values()])
    if len(set(held.tolist())) < 2 or len(set(quality.tolist())) < 2 or len(set(cost)) < 2:
        return Claim(text, None, "all models have the same Gflops, parameters or quality.")
    r = pearson(np.log10(cost), quality)
    interval = pearson_interval(r, len(means), LEVEL)
    rank, rank_of_parameters = spearman(cost, quality), spearman(held, quality)
    figures = (
        f"{len(means)} models: Pearson of log10 Gflops {r:.3f} ({interval.low:.3f} to"
        f" {interval.high:.3f}), Spearman {rank:.3f}; of parameters Pearson"
        f" {pearson(np.log10(held), quality):.3f}, Spearman {rank_of_parameters:.3f}"
    )
    moved = []
    for name, models in _grouped(means).items():
        cheap, costly = min(models, key=lambda key: key[1]), max(models, key=lambda key: key[1])
        if cheap != costly:
            change = abs(means[costly].log_y - means[cheap].log_y)
            beyond = change > _needed(noise, means[cheap], means[costly])
            moved.append((float(np.exp(change)), str(name), beyond))
    if not moved:
        return Claim(text, None, f"{figures}. No size has several patches.")
    factor, name, _ = max(moved)
    share = f"beyond the seeds' noise for {sum(each[2] for each in moved)} of {len(moved)} sizes, "
    figures += (
        f". At equal parameters quality differs by a factor of up to {factor:.2f} (size {name};"
        f" {share if noise.freedom else ''}{_noise_words(noise)})."
    )
    if r >= 0 or rank >= 0 or abs(rank) <= abs(rank_of_parameters):
        return Claim(text, False, figures)
    settled = interval.high < 0 and all(each[2] for each in moved)
    return Claim(text, True if settled else None, figures)


def larger_models_use_compute_better(
    curves: Iterable[ComputeCurve | tuple[float, ArrayLike, ArrayLike]],
) -> Claim:
    """DiT Fig. 9: at equal training compute, a larger model ends up with the lower y.

    Sizes are forward Gflops. Neighbouring sizes whose curves overlap in compute are compared at the
    end of the overlap, which is as far as the smaller one was trained; `frontier.crossing` gives
    the point where the larger overtakes. Curves of one size are its seeds, averaged where all of
    them have values.
    """
    by_size: dict[float, list[ComputeCurve]] = defaultdict(list)
    for curve in (ComputeCurve(*each) for each in curves):
        by_size[float(curve.size)].append(curve)
    sizes = sorted(by_size)
    averaged = {size: _averaged(by_size[size]) for size in sizes}
    keys, values, met = [], [], {}
    for small, large in pairwise(sizes):
        x, x_large = averaged[small][0], averaged[large][0]
        if not (len(x) and len(x_large)) or min(x[-1], x_large[-1]) <= max(x[0], x_large[0]):
            continue
        end = min(x[-1], x_large[-1])
        met[small, large] = crossing(*averaged[small], *averaged[large])
        for size in (small, large):
            for curve in by_size[size]:
                value = interpolate(curve.compute, curve.metric, end)
                if value is not None:
                    keys.append((small, large, size))
                    values.append(value)
    means, noise = _means(keys, np.array(values))
    pairs, where = [], []
    for (small, large), x_crossed in met.items():
        of_small, of_large = means[small, large, small], means[small, large, large]
        names = (f"{small:.3g} Gflops", f"{large:.3g} Gflops")
        pairs.append(_pair(names, of_small, of_large, noise))
        if x_crossed is not None:
            where.append(f"{large:.3g} overtakes {small:.3g} Gflops at {x_crossed:.2g}")
    claim = _claim("Larger models use training compute better.", pairs, noise)
    if not pairs:
        return Claim(claim.text, None, "no two training curves share a stretch of compute.")
    crossings = "; ".join(where) + " training Gflops" if where else "no curves cross"
    return Claim(claim.text, claim.holds, f"{claim.figures} On the way: {crossings}.")


def adaln_zero_is_best(block: Names, model: Names, y: ArrayLike) -> Claim:
    """DiT Fig. 5: of one model with each of the blocks, adaLN-Zero has the lowest y.

    block, model [n] are names, y f64[n] > 0. Every other block must differ significantly from it,
    so runs of one seed are never enough.
    """
    text, best = "adaLN-Zero beats the other blocks.", "adaln_zero"
    y = np.asarray(y, np.float64)
    y = positive_points(np.ones_like(y), y, at_least=0)[1]
    means, noise = _means(zip(_named(model, len(y)), _named(block, len(y)), strict=True), y)
    pairs = [
        _pair((other, best), means[name, other], means[name, best], noise)
        for name, other in means
        if other != best and (name, best) in means
    ]
    order = sorted(means, key=lambda key: means[key].log_y)
    values = ", ".join(f"{key[1]} {np.exp(means[key].log_y):.4g}" for key in order)
    claim = _claim(text, pairs, noise, all_of_them=True)
    figures = f"{claim.figures} Means: {values}." if pairs else claim.figures
    return Claim(text, claim.holds if noise.freedom else None, figures)


def sampling_does_not_make_up(gflops: ArrayLike, compute: ArrayLike, y: ArrayLike) -> Claim:
    """DiT Fig. 10: a small model with more sampling compute stays behind a larger one with less.

    gflops f64[n] of a model, compute f64[n] of sampling one image with it, y f64[n] > 0. For every
    two models, the best result of the smaller is compared with the best result of the larger within
    the compute that the smaller uses at most.
    """
    gflops, y = positive_points(gflops, y, at_least=0)
    compute, y = positive_points(compute, y, at_least=0)
    means, noise = _means(zip(gflops.tolist(), compute.tolist(), strict=True), y)
    by_model = _grouped(means)
    pairs = []
    for small, large in combinations(sorted(by_model), 2):
        most = max(key[1] for key in by_model[small])
        within = [key for key in by_model[large] if key[1] <= most]
        if within:
            of_small, of_large = (
                min(points, key=lambda key: means[key].log_y)
                for points in (by_model[small], within)
            )
            names = [f"{key[0]:.3g} Gflops at {key[1]:.3g}" for key in (of_small, of_large)]
            pairs.append(_pair(names, means[of_small], means[of_large], noise))
    return _claim("More sampling compute does not make up for a small model.", pairs, noise)


def _claim(text: str, pairs: Sequence[_Pair], noise: Spread, *, all_of_them: bool = False) -> Claim:
    """Decide a claim from pairs of models.

    It fails if a pair contradicts it beyond the noise, or most pairs if the noise is unknown. It
    holds if most pairs, or all of them, agree beyond the noise.
    """
    if not pairs:
        return Claim(text, None, "no two models to compare.")
    agree = sum(pair.difference < -pair.needed for pair in pairs)
    against = [pair for pair in pairs if pair.difference > pair.needed]
    needed = len(pairs) if all_of_them else len(pairs) // 2 + 1
    change = np.expm1(np.median([pair.difference for pair in pairs]))
    figures = (
        f"{agree} of {len(pairs)} pairs agree, {len(against)} contradict,"
        f" {len(pairs) - agree - len(against)} are within the noise; median change {change:+.1%}"
        f" ({_noise_words(noise)})."
    )
    if against:
        worst = max(against, key=lambda pair: pair.difference)
        figures += (
            f" Most against it: {worst.better} is {np.expm1(worst.difference):+.1%} from"
            f" {worst.worse}."
        )
        fails = noise.freedom or len(against) > len(pairs) // 2
        return Claim(text, False if fails else None, figures)
    return Claim(text, True if agree >= needed else None, figures)


def _pair(names: Sequence[str], worse: _Mean, better: _Mean, noise: Spread) -> _Pair:
    difference = better.log_y - worse.log_y
    return _Pair(names[0], names[1], difference, _needed(noise, worse, better))


def _ordered(
    means: Mapping[Any, _Mean], noise: Spread, sign: int, name: Callable[[Any], str]
) -> list[_Pair]:
    """All pairs of models of one group, the one with more (sign 1) or less (-1) as the better."""
    return [
        _pair((name(first), name(second)), means[first], means[second], noise)
        for models in _grouped(means).values()
        for first, second in combinations(sorted(models, key=lambda key: sign * key[1]), 2)
    ]


def _means(keys: Iterable[Hashable], y: Vector) -> tuple[dict[Any, _Mean], Spread]:
    """The mean of log y of each model, in order of first appearance, and the spread of seeds."""
    of_model: dict[Any, list[float]] = defaultdict(list)
    for key, value in zip(keys, y, strict=True):
        of_model[key].append(float(value))
    repeated = any(len(values) > 1 for values in of_model.values())
    noise = spread(of_model.values()) if repeated else Spread(0.0, 0)
    means = {key: _Mean(float(np.mean(np.log(v))), len(v)) for key, v in of_model.items()}
    return means, noise


def _grouped(means: Mapping[Any, _Mean]) -> dict[Any, list[Any]]:
    """Keys grouped by their first part."""
    found: dict[Any, list[Any]] = defaultdict(list)
    for key in means:
        found[key[0]].append(key)
    return found


def _named(names: Names, n: int) -> list[Any]:
    if len(names) != n:
        raise UserError(f"{len(names)} names for {n} runs: expected one name per run.")
    return list(names)


def _averaged(runs: Sequence[ComputeCurve]) -> tuple[Vector, Vector]:
    """The x of any run that all runs cover, and the geometric mean of y there."""
    logs = []
    for run in runs:
        x, y = positive_points(run.compute, run.metric, at_least=1)
        order = np.argsort(x)
        logs.append((np.log(x[order]), np.log(y[order])))
    low, high = max(u[0] for u, _ in logs), min(u[-1] for u, _ in logs)
    knots = np.unique(np.concatenate([u for u, _ in logs]))
    knots = knots[(knots >= low) & (knots <= high)]
    values = np.array([np.interp(knots, u, v) for u, v in logs])
    return np.exp(knots), np.exp(values.mean(axis=0))
