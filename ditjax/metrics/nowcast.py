"""Scores of forecasts of rain: contingency tables by threshold and lead, CRPS, spread and skill.

Fields are [.., T, H, W], T the lead times. Events are values **at or above** a threshold, as in
SEVIR (Veillette et al. 2020); pysteps counts those above it. Tables are counts i64, so that those
of parts of a data set add up. A score that is undefined is NaN, and is left out of means.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RainField = NDArray[Any]
ScoreArray = NDArray[np.float64]

SEVIR_THRESHOLDS = (16, 74, 133, 160, 181, 219)  # of 255, vertically integrated liquid


class Contingency(NamedTuple):
    """Counts i64[thresholds, T] of pixels: forecast and observed, observed only, forecast only."""

    hits: NDArray[np.int64]
    misses: NDArray[np.int64]
    false_alarms: NDArray[np.int64]

    def plus(self, other: "Contingency") -> "Contingency":
        """The table of both sets of pixels."""
        return Contingency(*(a + b for a, b in zip(self, other, strict=True)))


def contingency(
    forecast: RainField, observed: RainField, thresholds: Sequence[float]
) -> Contingency:
    """Count the pixels of fields [.., T, H, W] of one shape, at each threshold and lead."""
    axes = (*range(forecast.ndim - 3), forecast.ndim - 2, forecast.ndim - 1)
    parts = []
    for threshold in thresholds:
        yes, truth = forecast >= threshold, observed >= threshold
        parts.append([(yes & truth).sum(axes), (~yes & truth).sum(axes), (yes & ~truth).sum(axes)])
    return Contingency(*(np.array(part, np.int64) for part in zip(*parts, strict=True)))


def _ratio(top: ArrayLike, bottom: ArrayLike) -> ScoreArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.asarray(top) / np.asarray(bottom, np.float64)
    return np.where(np.asarray(bottom) == 0, np.nan, found)


def critical_success(c: Contingency) -> ScoreArray:
    """CSI = H / (H + M + F)."""
    return _ratio(c.hits, c.hits + c.misses + c.false_alarms)


def detection(c: Contingency) -> ScoreArray:
    """POD = H / (H + M)."""
    return _ratio(c.hits, c.hits + c.misses)


def false_alarm_ratio(c: Contingency) -> ScoreArray:
    """FAR = F / (H + F)."""
    return _ratio(c.false_alarms, c.hits + c.false_alarms)


def frequency_bias(c: Contingency) -> ScoreArray:
    """(H + F) / (H + M). Earthformer's and PreDiff's "bias" is another: (log2 of this)²."""
    return _ratio(c.hits + c.false_alarms, c.hits + c.misses)


def over_leads(c: Contingency) -> Contingency:
    """The counts of all leads together, i64[thresholds, 1]: SEVIR's mode 0."""
    return Contingency(*(part.sum(1, keepdims=True) for part in c))


def mean_defined(scores: ArrayLike) -> tuple[float, int]:
    """The mean of the scores that are defined, and their number; NaN of none."""
    found = np.asarray(scores, np.float64)
    found = found[~np.isnan(found)]
    return (float(found.mean()) if len(found) else np.nan), len(found)


def max_pooled(field: RainField, size: int) -> RainField:
    """The largest value of each size x size block of [.., H, W]; what is left over is cut off."""
    *lead, H, W = field.shape
    h, w = H // size, W // size
    blocks = field[..., : h * size, : w * size].reshape(*lead, h, size, w, size)
    return np.asarray(blocks.max((-3, -1)))


def crps(members: RainField, observed: RainField, fair: bool = False) -> ScoreArray:
    """Gneiting & Raftery 2007 Eq. 21: E|X - y| - E|X - X'| / 2 of [M, ..] at each point [..].

    The expectations are over M members, the second over all M² pairs, or over those of two
    different members if `fair` (Ferro 2014), which needs two. Exact where members and observation
    are equal; pysteps 1.21.5 leaves an interval out there.
    """
    x = np.sort(members.astype(np.float64), axis=0)
    M = len(x)
    error = np.abs(x - observed.astype(np.float64)).mean(0)
    rank = (2 * np.arange(M) - (M - 1)).reshape(-1, *(1,) * (x.ndim - 1))
    return np.asarray(error - (rank * x).sum(0) / (M * (M - 1) if fair else M * M))


def spread_skill(members: RainField, observed: RainField) -> float:
    """The spread of M members [M, ..] over the error of their mean: 1 for exchangeable ones.

    Fortin et al. 2014 Eq. 15: sqrt((M + 1) / M · mean variance) / RMSE, the variance unbiased.
    """
    x, M = members.astype(np.float64), len(members)
    error = np.square(x.mean(0) - observed).mean()
    spread = (M + 1) / M * x.var(0, ddof=1).mean()
    return float(np.sqrt(spread / error)) if error else np.nan


def contingency_scores(
    forecast: RainField, observed: RainField, thresholds: Sequence[float] = SEVIR_THRESHOLDS
) -> dict[str, float]:
    """Means over thresholds: CSI of all leads together, of the mean of leads, and of blocks.

    `csi` counts pixels of all leads together (SEVIR's mode 0), `csi_leads` is the mean of each
    lead's CSI (mode 2). `csi_4` and `csi_16` are `csi` of the maxima of 4 x 4 and 16 x 16 pixels.
    """
    table = contingency(forecast, observed, thresholds)
    whole = over_leads(table)
    found = {"csi": mean_defined(critical_success(whole))[0]}
    found["csi_leads"] = mean_defined(critical_success(table))[0]
    for size in (4, 16):
        if min(forecast.shape[-2:]) >= size:
            a, b = (max_pooled(each, size) for each in (forecast, observed))
            pooled = over_leads(contingency(a, b, thresholds))
            found[f"csi_{size}"] = mean_defined(critical_success(pooled))[0]
    found["pod"] = mean_defined(detection(whole))[0]
    found["far"] = mean_defined(false_alarm_ratio(whole))[0]
    found["bias"] = mean_defined(frequency_bias(whole))[0]
    for threshold, value in zip(thresholds, critical_success(whole)[:, 0], strict=True):
        found[f"csi_at_{threshold:g}"] = float(value)
    return found
