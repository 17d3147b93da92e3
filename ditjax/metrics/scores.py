"""Scores of a sample set from its features: Inception Score and KID; F1 of masks.

Everything is computed in float64 NumPy on the host. KID is a small difference of large sums: in
float32 it could not tell good models apart. Features keep their type, and one block at a time is
converted to float64.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditjax.errors import UserError

FeatureArray = NDArray[np.floating[Any]]
Indices = NDArray[np.int64]


class ScoreSums(NamedTuple):
    """The sums over each of S splits of samples that the Inception Score is computed from.

    `samples` i64[S]; `marginal` f64[S,C], the sum of p(y|x); `negentropy` f64[S], the sum of
    sum_y p(y|x) log p(y|x).
    """

    samples: Indices
    marginal: NDArray[np.float64]
    negentropy: NDArray[np.float64]


def log_softmax(logits: ArrayLike) -> NDArray[np.float64]:
    """log p(y|x) of logits f[n,C] -> f64[n,C], whatever the offset of the logits.

    Raises UserError unless logits are a finite [n,C] array.
    """
    x = _checked(logits, "logits").astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def adm_splits(count: int, size: int = 5000) -> Indices:
    """The split of each sample in ADM's evaluator, i64[count]: consecutive splits of `size`.

    If size does not divide count, the last split is smaller and has the same weight as the others.
    """
    if size < 1:
        raise UserError(f"splits of {size} samples: expected at least 1.")
    return np.arange(count) // size


def no_scores(splits: int, classes: int) -> ScoreSums:
    """The sums of no samples, to start `update_scores` with."""
    return ScoreSums(
        np.zeros(splits, np.int64), np.zeros((splits, classes)), np.zeros(splits, np.float64)
    )


def update_scores(sums: ScoreSums, log_p: NDArray[np.float64], split: ArrayLike) -> ScoreSums:
    """Add a batch to the sums: log_p f64[n,C] in splits i[n], n may be 0.

    Raises UserError for another number of classes, or a split out of range.
    """
    split = np.asarray(split)
    splits, classes = sums.marginal.shape
    if log_p.shape != (len(split), classes):
        raise UserError(
            f"log-probabilities of shape {log_p.shape} for {len(split)} samples: expected"
            f" [{len(split)}, {classes}]."
        )
    if split.size and not 0 <= split.min() <= split.max() < splits:
        raise UserError(f"splits {split.min()} to {split.max()}: expected 0 to {splits - 1}.")
    p = np.exp(log_p)
    marginal, negentropy = sums.marginal.copy(), sums.negentropy.copy()
    for s in np.unique(split):
        marginal[s] += p[split == s].sum(axis=0)
    np.add.at(negentropy, split, _p_log_p(p, log_p))
    return ScoreSums(sums.samples + np.bincount(split, minlength=splits), marginal, negentropy)


def inception_score(sums: ScoreSums) -> tuple[float, float]:
    """Salimans et al. 2016: exp E_x KL(p(y|x) || p(y)), its mean over splits and their deviation.

    p(y) is the mean of a split. Few samples make p(y) too peaked and the score too low, so compare
    scores of equal splits only. E KL = mean of sum p log p - sum of p(y) log p(y), hence ScoreSums.
    ADM prints the mean only, computes in float32, and returns NaN for an exact zero in p. The
    deviation is torch-fidelity's: that of the splits, not the standard error of the mean.
    Raises UserError if a split is empty.
    """
    scores = split_scores(sums)
    return float(scores.mean()), float(scores.std())


def split_scores(sums: ScoreSums) -> NDArray[np.float64]:
    """The Inception Score of each split, f64[S], from 1 to the class count."""
    if sums.samples.size == 0 or sums.samples.min() < 1:
        raise UserError("a split of the Inception Score has no sample: use fewer splits.")
    marginal = sums.marginal / sums.samples[:, None]
    with np.errstate(divide="ignore"):
        log_marginal = np.log(marginal)
    return np.exp(sums.negentropy / sums.samples - _p_log_p(marginal, log_marginal))


def _p_log_p(p: NDArray[np.float64], log_p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row sums of p log p, with 0 log 0 = 0."""
    return (p * np.where(p > 0, log_p, 0.0)).sum(axis=-1)


def random_subsets(
    count_x: int, count_y: int, subsets: int, size: int, seed: int
) -> Iterator[tuple[Indices, Indices]]:
    """Pairs of indices i64[size] without repeats, for `kid`; pair i depends on (seed, i) alone."""
    for i in range(subsets):
        rng = np.random.default_rng([seed, i])
        yield (
            rng.choice(count_x, size, replace=False),
            rng.choice(count_y, size, replace=False),
        )


def kid(
    x: FeatureArray, y: FeatureArray, subsets: Iterable[tuple[ArrayLike, ArrayLike]]
) -> tuple[float, float]:
    """Bińkowski et al. 2018: mean and deviation of `polynomial_mmd2` over pairs of subsets.

    x f[n,d], y f[m,d]. 100 pairs of 1,000 are customary: random_subsets(n, m, 100, 1000, seed).
    The deviation is that of one pair, not of the mean. Raises UserError for features that differ in
    dimensions or are not finite, an index out of range, no pairs, or a pair of fewer than 2.
    """
    x, y = check_pair(x, y)
    values = []
    for in_x, in_y in subsets:
        try:
            values.append(polynomial_mmd2(x[np.asarray(in_x)], y[np.asarray(in_y)]))
        except IndexError as error:
            raise UserError(f"KID of {len(x)} and {len(y)} features: {error}.") from error
    if not values:
        raise UserError("KID of no subsets: expected at least one pair.")
    return float(np.mean(values)), float(np.std(values))


def polynomial_mmd2(x: FeatureArray, y: FeatureArray) -> float:
    """Gretton et al. 2012, Eq. 3: unbiased MMD^2 of x f[n,d] and y f[m,d], k = (x.y / d + 1)^3.

    It is the mean over i != j of k(x_i, x_j), plus that of k(y_i, y_j), minus twice the mean of
    k(x_i, y_j). Its expectation is 0 for equal distributions, so it may be negative.
    Raises UserError for fewer than 2 rows in either.
    """
    x, y = check_pair(x, y)
    if min(len(x), len(y)) < 2:
        raise UserError(f"KID of {len(x)} and {len(y)} features: expected at least 2 in each set.")
    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    across = float(_kernel(x64, y64).mean())
    return _off_diagonal_mean(x64) + _off_diagonal_mean(y64) - 2 * across


def kid_influence(
    x: FeatureArray, y: FeatureArray, subset: tuple[ArrayLike, ArrayLike], block: int = 2000
) -> NDArray[np.float64]:
    """The influence of each of x f[n,d] on the MMD^2 of x and y f[m,d], f64[n], of mean 0.

    psi(x_i) = 2 E k(x_i, x) - 2 E k(x_i, y), where the means are over a pair of subsets as `kid`
    takes them, without x_i itself. A bootstrap of it is the interval of KID over samples, to first
    order; of equal distributions it is 0 and the interval too narrow.
    """
    x, y = check_pair(x, y)
    in_x, in_y = (np.asarray(each) for each in subset)
    others, theirs = x[in_x].astype(np.float64), y[in_y].astype(np.float64)
    own = np.isin(np.arange(len(x)), in_x)
    psi = np.empty(len(x))
    for start in range(0, len(x), block):
        at = slice(start, start + block)
        rows = x[at].astype(np.float64)
        itself = np.where(own[at], ((rows**2).sum(axis=1) / x.shape[1] + 1) ** 3, 0.0)
        among = (_kernel(rows, others).sum(axis=1) - itself) / (len(others) - own[at])
        psi[at] = 2 * (among - _kernel(rows, theirs).mean(axis=1))
    return psi - psi.mean()


def _kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    k = x @ y.T / x.shape[1] + 1
    return k * k * k


def _off_diagonal_mean(x: NDArray[np.float64]) -> float:
    n, k = len(x), _kernel(x, x)
    return float((k.sum() - np.trace(k)) / (n * (n - 1)))


def mask_f1(found: NDArray[np.bool_], expected: NDArray[np.bool_]) -> NDArray[np.float64]:
    """F1 of the true pixels of each image, 2 TP / (2 TP + FP + FN): bool[N,..] -> f64[N].

    1 if neither has any.
    """
    axes = tuple(range(1, found.ndim))
    both = (found & expected).sum(axes).astype(np.float64)
    total = found.sum(axes) + expected.sum(axes)
    return np.where(total == 0, 1.0, 2 * both / np.maximum(total, 1))


def check_pair(x: FeatureArray, y: FeatureArray) -> tuple[FeatureArray, FeatureArray]:
    """Two sets f[n,d] and f[m,d] as floats. Raises UserError unless they are that, and finite."""
    x, y = _checked(x, "features"), _checked(y, "features")
    if x.shape[1] != y.shape[1]:
        raise UserError(
            f"features of {x.shape[1]} and {y.shape[1]} dimensions: both sets must come from the"
            " same layer of the same network."
        )
    return x, y


def _checked(values: ArrayLike, name: str) -> FeatureArray:
    array = np.asarray(values)
    if array.ndim != 2 or array.shape[1] == 0:
        raise UserError(f"{name} of shape {array.shape}: expected [samples, dimensions].")
    if array.dtype.kind != "f":
        array = array.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if bad.size:
        raise UserError(
            f"{bad.size} of {len(array)} rows of {name} are not finite (first: row {bad[0]}): the"
            " images or the network diverged; inspect those samples before scoring."
        )
    return array
