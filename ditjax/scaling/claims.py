"""What the DiT paper concludes, as tests on the points of a study (Peebles & Xie 2023, Sec. 5).

y is a metric of which less is better (FID, FD, a loss), positive. Runs of one model are its seeds:
a model counts with the geometric mean of them, and their pooled spread of log y says which
differences between models are more than the seeds' noise (Student's t, 95 %, two-sided). A claim
holds where the differences beyond that noise all go its way and are most of all; it fails where
one goes the other way; otherwise there are not enough runs to tell. Of one seed each the noise is
unknown: then it takes most pairs against a claim to fail it.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ditjax.errors import UserError
from ditjax.scaling.fit import pearson, pearson_interval, spearman
from ditjax.scaling.frontier import crossing, interpolate
from ditjax.scaling.isoflop import Curve
from ditjax.scaling.points import Vector, positive_points
from ditjax.scaling.spread import Spread, spread

LEVEL = 0.95
Names = Sequence[Any] | NDArray[Any]


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper's, whether it holds here (None: not enough runs), and the figures."""

    text: str
    holds: bool | None
    figures: str


class _Mean(NamedTuple):
    """Of a model's runs: the mean of log y, and how many they are."""

    log_y: float
    runs: int


def _needed(noise: Spread, first: _Mean, second: _Mean) -> float:
    """By how much the means of two models must differ to be told apart; 0: nothing is known."""
    if not noise.freedom:
        return 0.0
    t = stats.t.ppf(0.5 + LEVEL / 2, noise.freedom)
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

    parameters, y f64[n] > 0, patch [n]; a model is a pair of patch and parameters.
    """
    parameters, y = positive_points(parameters, y, at_least=0)
    keys = list(zip(_named(patch, len(y)), parameters.tolist(), strict=True))
    means, noise = _means(keys, y)
    pairs = []
    for models in _by(means, 0).values():
        for first, second in combinations(sorted(models, key=lambda key: key[1]), 2):
            names = [f"{key[1]:.3g} parameters, patch {key[0]}" for key in (first, second)]
            pairs.append(_pair(names, means[first], means[second], noise))
    return _claim("Bigger models are better at the same patch size.", pairs, noise)


def smaller_patch_is_better(size: Names, patch: ArrayLike, y: ArrayLike) -> Claim:
    """DiT Fig. 6, bottom: at one size (layers, width, heads), smaller patches give a lower y.

    size [n] names, patch, y f64[n] > 0; a model is a pair of size and patch.
    """
    patch, y = positive_points(patch, y, at_least=0)
    keys = list(zip(_named(size, len(y)), patch.tolist(), strict=True))
    means, noise = _means(keys, y)
    pairs = []
    for models in _by(means, 0).values():
        for first, second in combinations(sorted(models, key=lambda key: -key[1]), 2):
            names = [f"{key[0]}/{key[1]:g}" for key in (first, second)]
            pairs.append(_pair(names, means[first], means[second], noise))
    return _claim("Smaller patches are better at the same size.", pairs, noise)


def gflops_not_parameters(
    gflops: ArrayLike, parameters: ArrayLike, size: Names, y: ArrayLike
) -> Claim:
    """DiT Fig. 8: log Gflops and y correlate; at equal parameters, patches still change y.

    gflops, parameters, y f64[n] > 0; size [n] names the models of (nearly) equal parameters, a
    model is a pair of size and Gflops. Fails where y does not fall with Gflops (Pearson's r of
    log10 Gflops, Spearman's) or ranks no better by them than by parameters; holds where it does,
    the 95 % interval of r lies below 0, and the cheapest and the dearest model of every size differ
    by more than the seeds do. At least 4 models, and a size with several.
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
    for name, models in _by(means, 0).items():
        cheap, dear = min(models, key=lambda key: key[1]), max(models, key=lambda key: key[1])
        if cheap != dear:
            change = abs(means[dear].log_y - means[cheap].log_y)
            beyond = change > _needed(noise, means[cheap], means[dear])
            moved.append((float(np.exp(change)), str(name), beyond))
    if not moved:
        return Claim(text, None, f"{figures}. No size has several patches.")
    factor, name, _ = max(moved)
    told = f"beyond the seeds' noise for {sum(each[2] for each in moved)} of {len(moved)} sizes, "
    figures += (
        f". At equal parameters quality differs by a factor of up to {factor:.2f} (size {name};"
        f" {told if noise.freedom else ''}{_noise_words(noise)})."
    )
    if r >= 0 or rank >= 0 or abs(rank) <= abs(rank_of_parameters):
        return Claim(text, False, figures)
    settled = interval.high < 0 and all(each[2] for each in moved)
    return Claim(text, True if settled else None, figures)


def larger_models_use_compute_better(
    curves: Iterable[Curve | tuple[float, ArrayLike, ArrayLike]],
) -> Claim:
    """DiT Fig. 9: at equal training compute, a larger model ends up with the lower y.

    The sizes are forward Gflops. Neighbouring sizes whose curves share a stretch of compute are
    compared where it ends, which is as far as the smaller one was trained; where the larger
    overtakes is `frontier.crossing`. Curves of one size are its seeds, averaged where all of them
    have values.
    """
    by_size: dict[float, list[Curve]] = defaultdict(list)
    for curve in (Curve(*each) for each in curves):
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
    told = "; ".join(where) + " training Gflops" if where else "no curves cross"
    return Claim(claim.text, claim.holds, f"{claim.figures} On the way: {told}.")


def adaln_zero_is_best(
    block: Names, model: Names, y: ArrayLike, *, best: str = "adaln_zero"
) -> Claim:
    """DiT Fig. 5: of one model with each of the blocks, adaLN-Zero has the lowest y.

    block, model [n] names, y f64[n] > 0. Every block must be told from it, so that with one seed
    there are not enough runs.
    """
    text = "adaLN-Zero beats the other blocks."
    y = np.asarray(y, np.float64)
    y = positive_points(np.ones_like(y), y, at_least=0)[1]
    keys = list(zip(_named(model, len(y)), _named(block, len(y)), strict=True))
    means, noise = _means(keys, y)
    pairs = []
    for name, blocks in _by(means, 0).items():
        for other in blocks:
            if other[1] != best and (name, best) in means:
                pair = _pair((other[1], best), means[other], means[name, best], noise)
                pairs.append(pair)
    order = sorted(means, key=lambda key: means[key].log_y)
    values = ", ".join(f"{key[1]} {np.exp(means[key].log_y):.4g}" for key in order)
    claim = _claim(text, pairs, noise, all_of_them=True)
    figures = f"{claim.figures} Means: {values}." if pairs else claim.figures
    return Claim(text, claim.holds if noise.freedom else None, figures)


def sampling_does_not_make_up(gflops: ArrayLike, compute: ArrayLike, y: ArrayLike) -> Claim:
    """DiT Fig. 10: a small model with more sampling compute stays behind a larger one with less.

    gflops f64[n] of a model, compute f64[n] of sampling one image with it, y f64[n] > 0. For every
    two models, the best that the smaller reaches is compared with the best of the larger for no
    more compute than the smaller's most.
    """
    gflops, y = positive_points(gflops, y, at_least=0)
    compute, y = positive_points(compute, y, at_least=0)
    means, noise = _means(list(zip(gflops.tolist(), compute.tolist(), strict=True)), y)
    by_model = _by(means, 0)
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
    """Fails with a pair against it (most, where no noise is known); holds with most pairs (or all)
    for it, beyond the noise."""
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


def _means(keys: Sequence[Hashable], y: Vector) -> tuple[dict[Any, _Mean], Spread]:
    """Each model's mean of log y, in order of first appearance, and the spread of seeds."""
    of_model: dict[Any, list[float]] = defaultdict(list)
    for key, value in zip(keys, y, strict=True):
        of_model[key].append(float(value))
    repeated = any(len(values) > 1 for values in of_model.values())
    noise = spread(of_model.values()) if repeated else Spread(0.0, 0)
    means = {key: _Mean(float(np.mean(np.log(v))), len(v)) for key, v in of_model.items()}
    return means, noise


def _by(means: Mapping[Any, _Mean], index: int) -> dict[Any, list[Any]]:
    """Keys by one of their parts."""
    found: dict[Any, list[Any]] = defaultdict(list)
    for key in means:
        found[key[index]].append(key)
    return found


def _named(names: Names, n: int) -> list[Any]:
    if len(names) != n:
        raise UserError(f"{len(names)} names for {n} runs: expected one for each run.")
    return list(names)


def _averaged(runs: Sequence[Curve]) -> tuple[Vector, Vector]:
    """x and the geometric mean of y, at every x of any run that all of them cover."""
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
