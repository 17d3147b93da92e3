"""Scores of drawn forecasts beside the truth, and features of clips of rain."""

from collections.abc import Sequence

import numpy as np

from ditjax.evaluation.advection import advection, persistence
from ditjax.metrics.nowcast import contingency_scores, crps, spread_skill
from ditjax.metrics.restoration import SSIM_SIDE, ssim

_BANDS = 8  # of spatial frequency
_BASELINES = ("csi", "csi_leads", "csi_4", "csi_16")


class NowcastScores:
    """Scores of forecasts u8[N,F,H,W,C] that are added in order; sample i is of record i % `count`.

    The samples of one record are the members of its ensemble. CSI and the like are of single
    members, `mean_*` of the mean of a record's members; with several, `crps`, `crps_fair` and
    `spread_skill` are of the ensemble, else `crps` is the mean absolute error. `mae` and `ssim` are
    of single members, too. `persistence_*` and `advection_*` are of forecasts without learning from
    the same past (`evaluation/advection.py`). Pixels count from 0 to 255, edges included.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._drawn: list[np.ndarray] = []
        self._true: list[np.ndarray] = []
        self._past: list[np.ndarray] = []

    def add(self, samples: np.ndarray, records: np.ndarray, past: int) -> None:
        """Add samples and the records that they are forecasts of, u8[B,F,H,W,C]."""
        seen = sum(map(len, self._drawn))
        new = max(0, min(len(samples), self._count - seen))  # records that are seen first
        grey = [each.astype(np.float32).mean(-1) for each in (samples, records)]
        self._drawn.append(np.rint(grey[0][:, past:]).astype(np.uint8))
        self._true.append(np.rint(grey[1][:new, past:]).astype(np.uint8))
        self._past.append(np.rint(grey[1][:new, :past]).astype(np.uint8))

    def records(self) -> dict[str, np.ndarray]:
        """The scores f64[N] of each record that are means over them."""
        drawn, true = (np.concatenate(x) for x in (self._drawn, self._true))
        members = len(drawn) // len(true)
        ensemble = drawn[: members * len(true)].reshape(members, *true.shape)
        error = np.abs(ensemble.astype(np.float64) - true).mean((0, 2, 3, 4))
        if members == 1:
            return {"mae": error}
        return {"mae": error, "crps": crps(ensemble, true).mean((1, 2, 3))}

    def means(self) -> dict[str, float]:
        """Every score; one that is undefined is left out."""
        drawn, true, past = (np.concatenate(x) for x in (self._drawn, self._true, self._past))
        of = np.arange(len(drawn)) % len(true)
        leads = true.shape[1]
        found = contingency_scores(drawn, true[of])
        error = np.abs(drawn.astype(np.float64) - true[of])
        found["mae"] = found["crps"] = float(error.mean())
        if min(true.shape[2:]) >= SSIM_SIDE:
            a, b = (x.reshape(-1, *x.shape[2:], 1) for x in (drawn, true[of]))
            found["ssim"] = float(ssim(a, b, 255.0).mean())
        if (members := len(drawn) // len(true)) > 1:
            ensemble = drawn[: members * len(true)].reshape(members, *true.shape)
            found |= _ensemble_scores(ensemble, true)
        for name, forecast in (
            ("persistence", persistence(past, leads)),
            ("advection", advection(past, leads)),
        ):
            scores = contingency_scores(forecast, true)
            found |= {f"{name}_{key}": scores[key] for key in _BASELINES if key in scores}
            found[f"{name}_mae"] = float(np.abs(forecast.astype(np.float64) - true).mean())
        return {name: value for name, value in found.items() if not np.isnan(value)}


def _ensemble_scores(members: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Of members u8[M,N,T,H,W] and the truth u8[N,T,H,W]."""
    mean = members.astype(np.float64).mean(0)
    scores = contingency_scores(mean, true)
    return {
        **{f"mean_{key}": scores[key] for key in _BASELINES if key in scores},
        "mean_mae": float(np.abs(mean - true).mean()),
        "crps": float(crps(members, true).mean()),
        "crps_fair": float(crps(members, true, fair=True).mean()),
        "spread_skill": spread_skill(members, true),
        "members": float(len(members)),
    }


def rain_features(clips: np.ndarray) -> np.ndarray:
    """Features f32[B,29] of clips u8[B,F,H,W,C] by which FD-rain compares sets of them.

    Of each clip the means and deviations over frames of: the mean, the shares at or above 16, 74,
    133 and 219, and the logarithm of the power in 8 bands of spatial frequency, which blurring
    lowers; then the mean change between frames, and its largest. They are no network's.
    """
    x = clips.astype(np.float64).mean(-1)
    shares = [(x >= threshold).mean((2, 3)) for threshold in (16, 74, 133, 219)]
    each = np.stack([x.mean((2, 3)) / 255, *shares, *_bands(x)], axis=-1)  # [B,F,13]
    change = np.abs(np.diff(x, axis=1)).mean((2, 3)) / 255
    parts = [each.mean(1), each.std(1), change.mean(1, keepdims=True)]
    parts += [change.max(1, keepdims=True), (x.max((1, 2, 3)) / 255)[:, None]]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _bands(x: np.ndarray) -> Sequence[np.ndarray]:
    """log10 of the power of fields [B,F,H,W] in bands of radial frequency: 8 of [B,F]."""
    H, W = x.shape[2:]
    power = np.abs(np.fft.fft2(x / 255)) ** 2 / (H * W)
    radius = np.hypot(np.fft.fftfreq(H)[:, None], np.fft.fftfreq(W)[None])
    which = np.minimum((radius * 2 * _BANDS).astype(int), _BANDS - 1)
    which[0, 0] = -1  # the mean is a feature of its own
    return [np.log10(power[:, :, which == band].mean(-1) + 1e-6) for band in range(_BANDS)]
