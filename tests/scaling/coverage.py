"""How often 95 % intervals hold the truth: planted laws, fitted again and again.

    python -m tests.scaling.coverage [--trials=1000] [--resamples=400] [--rows=1,5]

One row a kind of study: the share of trials in which the interval of the exponent held the planted
one, and that of the prediction for the largest model, fitted without it, held its measured value;
medians of the exponent's interval width over the exponent and of the prediction's error. The last
rows are the exponent of the compute-optimal size from IsoFLOP profiles.
"""

import argparse
import time
from itertools import product
from typing import Any

import numpy as np

from ditjax.scaling.extrapolate import predict_held_out
from ditjax.scaling.fit import fit_power_law, fit_power_law_offset
from ditjax.scaling.isoflop import compute_optimal, isoflop
from tests.scaling.planted import LAW, budgets, curves, study

EXPONENT = 0.5


def of_law(
    trials: int, seed: int = 0, *, offset: bool, resamples: int = 400, **kind: Any
) -> dict[str, float]:
    """Shares of trials in which the intervals held the truth, and medians of what they cost."""
    rng = np.random.default_rng(seed)
    fit = fit_power_law_offset if offset else fit_power_law
    held, predicted, width, error = [], [], [], []
    for _ in range(trials):
        x, y, model = study(rng, b=EXPONENT, **kind)
        interval = fit(x, y, rng, groups=model, resamples=resamples).b_interval
        held.append(interval.low <= EXPONENT <= interval.high)
        width.append((interval.high - interval.low) / EXPONENT)
        told = predict_held_out(x, y, rng, groups=model, offset=offset, resamples=resamples).held[
            -1
        ]
        predicted.append(told.inside)
        error.append(abs(told.error))
    return {
        "exponent": float(np.mean(held)),
        "prediction": float(np.mean(predicted)),
        "width": float(np.median(width)),
        "error": float(np.median(error)),
    }


def of_isoflop(trials: int, seed: int = 0, **kind: Any) -> dict[str, float]:
    """The same of N*(C) = k·C^a, a = β/(α+β)."""
    rng = np.random.default_rng(seed)
    truth = LAW.beta / (LAW.alpha + LAW.beta)
    held, width, error, minima = [], [], [], []
    for _ in range(trials):
        profiles = isoflop(curves(rng, **kind), budgets())
        minima.append(sum(profile.best_size is not None for profile in profiles))
        if minima[-1] < 2:
            continue
        growth = compute_optimal(profiles).size
        held.append(growth.interval.low <= truth <= growth.interval.high)
        width.append((growth.interval.high - growth.interval.low) / truth)
        error.append(abs(growth.exponent / truth - 1))
    return {
        "exponent": float(np.mean(held)),
        "width": float(np.median(width)),
        "error": float(np.median(error)),
        "minima": float(np.mean(minima)),
    }


def kinds() -> list[tuple[str, dict[str, Any]]]:
    """Every kind of study: (what it is called, arguments of `of_law`)."""
    found = []
    for c, models, seeds, noise in product(
        (0.0, 0.3), (9, 12, 24), (1, 2, 3), ("even", "small end")
    ):
        sigma = 0.06 if c else 0.1
        words = f"{'c + ' if c else ''}a·x^-b, {models} models, {seeds} seeds, {noise} noise"
        kind = {"c": c, "models": models, "seeds": seeds, "noise": noise, "sigma": sigma}
        found.append((words, {**kind, "offset": bool(c)}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=400)
    parser.add_argument("--rows", default="", help="numbers of rows; all when not given")
    args = parser.parse_args()
    chosen = {int(row) for row in args.rows.split(",") if row}
    rows: list[tuple[str, dict[str, Any]]] = kinds()
    rows += [
        (f"IsoFLOP, {m} models, {s} seeds", {"models": m, "seeds": s, "sigma": 0.01})
        for m, s in product((6, 12), (1, 2))
    ]
    print(f"{'':>2} {'study':<56} exponent prediction  width  error  seconds")
    for number, (words, kind) in enumerate(rows, 1):
        if chosen and number not in chosen:
            continue
        began = time.perf_counter()
        if "offset" in kind:
            found = of_law(args.trials, number, resamples=args.resamples, **kind)
        else:
            found = of_isoflop(args.trials, number, **kind)
        seconds = time.perf_counter() - began
        prediction = f"{found['prediction']:10.1%}" if "prediction" in found else " " * 10
        print(
            f"{number:>2} {words:<56} {found['exponent']:8.1%} {prediction} {found['width']:6.2f}"
            f" {found['error']:6.1%} {seconds:8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
