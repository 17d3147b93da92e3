"""The published figures of the DiT paper through our own analysis.

    python -m tests.scaling.paper

FID-50K of Table 4 (12 models at 400K steps) and of XL/2 trained longer (2,352K and 7M steps), all
*published*: correlations, laws, the largest model predicted from the smaller, and where XL/2
overtakes XL/4 in training compute (Fig. 9: near 10¹⁰ Gflops). Of XL/4's curve one point is
published, at 400K steps, so the last needs an assumption, and the answers by several are printed.
All take XL/2's law in steps below its first point, too, down to 133K steps. One law in size and
images does not come of these figures: the images differ for one model only, and β has no bound.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import optimize

from ditjax.scaling.extrapolate import Extrapolation, predict_held_out
from ditjax.scaling.fit import (
    fit_power_law,
    fit_power_law_offset,
    pearson,
    pearson_interval,
    spearman,
    spearman_interval,
)
from ditjax.scaling.frontier import crossing, frontier
from ditjax.scaling.joint import JointLaw, fit_joint
from ditjax.scaling.published import TABLE4_GFLOPS
from experiments.paper import published

BATCH = 256
# DiT Table 4, and "longer training" of XL/2 in Tables 2 and 4: FID-50K by steps, no guidance.
LONGER_XL2 = {400_000: 19.47, 2_352_000: 10.67, 7_000_000: 9.62}
FID_OF = {f"DiT-{size}/{patch}": fid for (size, patch), fid in published.MODELS.items()}
NAMES = tuple(TABLE4_GFLOPS)
GFLOPS = np.array(list(TABLE4_GFLOPS.values()))
FID = np.array([FID_OF[name] for name in NAMES])


class Overtaking(NamedTuple):
    """Where XL/2's curve goes below XL/4's, in training Gflops, None: nowhere; under what."""

    assumption: str
    compute: float | None


def training_gflops(model: str, steps: np.ndarray) -> np.ndarray:
    """DiT Fig. 9: 3 x forward Gflops x batch x steps."""
    return 3 * TABLE4_GFLOPS[model] * BATCH * steps


def law_of_steps() -> tuple[float, float, float]:
    """(c, a, b) of FID = c + a·(steps/400K)^(-b), through XL/2's three published points."""
    steps = np.array(list(LONGER_XL2)) / 400_000
    fid = np.array(list(LONGER_XL2.values()))

    def miss(b: float) -> float:
        """How far the third point is from the law through the first two."""
        a = (fid[0] - fid[1]) / (1 - steps[1] ** -b)
        return float(fid[0] - a + a * steps[2] ** -b - fid[2])

    b = float(optimize.brentq(miss, 0.1, 5.0))
    a = float((fid[0] - fid[1]) / (1 - steps[1] ** -b))
    return float(fid[0]) - a, a, b


def overtakings() -> list[Overtaking]:
    """Fig. 9's crossing of XL/4 and XL/2 from the published figures, by assumption."""
    c, a, b = law_of_steps()
    gap = FID_OF["DiT-XL/4"] - FID_OF["DiT-XL/2"]
    steps = np.geomspace(20_000, 7_000_000, 2000)

    def met(of_4: Callable, of_2: Callable) -> float | None:
        return crossing(
            training_gflops("DiT-XL/4", steps),
            of_4(steps),
            training_gflops("DiT-XL/2", steps),
            of_2(steps),
        )

    def xl2(steps: np.ndarray) -> np.ndarray:
        return c + a * (steps / 400_000) ** -b

    ratio = FID_OF["DiT-XL/4"] / FID_OF["DiT-XL/2"]
    learnt = (FID_OF["DiT-XL/4"] - c) / a
    return [
        Overtaking(
            "XL/4 learns as XL/2 does in steps, above it by what it is at 400K (E + A(N) + B(D))",
            met(lambda s: xl2(s) + gap, xl2),
        ),
        Overtaking(
            "XL/4 does not improve after 400K steps (the earliest, given XL/2's law)",
            met(lambda s: np.full_like(s, FID_OF["DiT-XL/4"]), xl2),
        ),
        Overtaking(
            "XL/4 is at every step the same factor above XL/2 as at 400K",
            met(lambda s: xl2(s) * ratio, xl2),
        ),
        Overtaking(
            "XL/4 falls to the same c as XL/2 in the end, above it by a factor of what is left",
            met(lambda s: c + (xl2(s) - c) * learnt, xl2),
        ),
    ]


def joint_law() -> JointLaw:
    """FID = E + A·N^(-α) + B·D^(-β) of all 14 points."""
    steps = np.array([*([400_000] * len(NAMES)), *list(LONGER_XL2)[1:]])
    size = np.array([*GFLOPS, *[TABLE4_GFLOPS["DiT-XL/2"]] * 2])
    return fit_joint(size, steps * BATCH, [*FID, *list(LONGER_XL2.values())[1:]])


def predicted(hold: int, *, offset: bool) -> Extrapolation:
    """XL/2 (the last of those held out) from the smaller models of Table 4 by Gflops."""
    rng = np.random.default_rng(0)
    return predict_held_out(GFLOPS, FID, rng, groups=NAMES, hold=hold, offset=offset)


def main() -> None:
    logs = np.log10(GFLOPS)
    r, rank = pearson(logs, FID), spearman(GFLOPS, FID)
    low_r, low_rank = pearson_interval(r, len(FID)), spearman_interval(rank, len(FID))
    print(f"published, {len(FID)} models, FID-50K at 400K steps")
    print(f"Pearson of log10 Gflops {r:.3f} ({low_r.low:.3f} to {low_r.high:.3f})")
    print(f"Spearman {rank:.3f} ({low_rank.low:.3f} to {low_rank.high:.3f})")
    for fit in (fit_power_law, fit_power_law_offset):
        law = fit(GFLOPS, FID, np.random.default_rng(0))
        print(
            f"FID = {law.c:.2f} + {law.a:.1f} Gflops^-{law.b:.3f}, exponent"
            f" {law.b_interval.low:.3f} to {law.b_interval.high:.3f}, R2 {law.r2:.3f}"
        )
    print("frontier:", ", ".join(NAMES[i] for i in frontier(GFLOPS, FID)))
    for hold in (3, 1):
        for offset in (False, True):
            told = predicted(hold, offset=offset)
            print(
                f"{'c + ' if offset else ''}a x^-b on the {told.models_fitted} smaller: XL/2"
                f" {told.predicted:.2f} ({told.interval.low:.2f} to {told.interval.high:.2f}),"
                f" published {told.measured:.2f}: error {told.error:+.1%}"
            )
    c, a, b = law_of_steps()
    print(f"XL/2 in steps: FID = {c:.2f} + {a:.2f} (steps/400K)^-{b:.3f}")
    joint = joint_law()
    print(f"one law in size and images: alpha {joint.alpha:.2f}, beta {joint.beta:.1f}, no bound")
    for each in overtakings():
        where = "nowhere" if each.compute is None else f"{each.compute:.3g} training Gflops"
        print(f"XL/2 overtakes XL/4 at {where}: {each.assumption}")


if __name__ == "__main__":
    main()
