"""Loss against learning rate, a curve a width: whether one small search serves wide networks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ditjax.reporting.style import COLOURS, LIGHT, MARKERS, Theme, left_title, plain_ticks, png
from ditjax.scaling.optimum import Optimum, drift, lowest
from ditjax.studies.words import metric_name, number, plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HIGHEST = 2.5  # times the lowest loss: what is above is drawn at the frame


@dataclass(frozen=True)
class Run:
    """What a figure needs of a run; a `value` that is not finite is a run that diverged."""

    parametrization: str
    width: int
    learning_rate: float
    seed: int
    value: float


@dataclass(frozen=True)
class Curve:
    """The runs of a width: values f64[rates, seeds] (NaN: not run), and where each seed is best."""

    parametrization: str
    width: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    values: np.ndarray
    optima: tuple[Optimum, ...]

    @property
    def best(self) -> float:
        """The geometric mean of the seeds' best learning rates; NaN where none is known."""
        return math.exp(np.mean(np.log([o.x for o in self.optima]))) if self.optima else math.nan

    @property
    def at_edge(self) -> bool:
        """Whether a seed is best at the lowest or highest rate: it may be better beyond."""
        return any(o.edge for o in self.optima)


def curves(runs: Sequence[Run]) -> list[Curve]:
    """By parametrization, then width; 'standard' comes first."""
    found = []
    for key in sorted(
        {(run.parametrization != "standard", run.parametrization, run.width) for run in runs}
    ):
        mine = [run for run in runs if (run.parametrization, run.width) == key[1:]]
        rates = sorted({run.learning_rate for run in mine})
        seeds = sorted({run.seed for run in mine})
        values = np.full((len(rates), len(seeds)), np.nan)
        for run in mine:
            values[rates.index(run.learning_rate), seeds.index(run.seed)] = run.value
        each = (lowest(np.array(rates), column) for column in values.T)
        optima = tuple(optimum for optimum in each if optimum is not None)
        found.append(Curve(key[1], key[2], tuple(rates), tuple(seeds), values, optima))
    return found


def conclusions(found: Sequence[Curve]) -> list[str]:
    """A sentence for each parametrization."""
    lines = []
    for name in dict.fromkeys(curve.parametrization for curve in found):
        mine = [curve for curve in found if curve.parametrization == name and curve.optima]
        widths = np.array([curve.width for curve in mine for _ in curve.optima], float)
        rates = np.array([optimum.x for curve in mine for optimum in curve.optima])
        exponent = drift(widths, rates)
        if math.isnan(exponent):
            lines.append(f"{name}: one width, nothing to compare.")
            continue
        bests = [curve.best for curve in mine]
        edge = (
            "; some at an edge of what was tried: it may lie beyond"
            if any(curve.at_edge for curve in mine)
            else ""
        )
        lines.append(
            f"{name}: the best learning rate goes as width^{exponent:.2f}, from {number(bests[0])}"
            f" at {mine[0].width} to {number(bests[-1])} at {mine[-1].width}{edge}."
        )
    return lines


def table(found: Sequence[Curve], metric: str) -> str:
    """The terminal's: a line a width, the mean over seeds at each rate, the best rate by seed."""
    rates = sorted({rate for curve in found for rate in curve.rates})
    lines = [
        f"{metric_name(metric)}, mean of the seeds, by learning rate",
        f"{'':<16}" + "".join(f"{number(rate):>9}" for rate in rates) + "   best",
    ]
    for curve in found:
        cells = []
        for rate in rates:
            row = curve.values[curve.rates.index(rate)] if rate in curve.rates else np.empty(0)
            cells.append(number(float(row.mean())) if len(row) else "-")
        ends = [number(o.x) + ("*" if o.edge else "") for o in curve.optima]
        lines.append(
            f"{curve.parametrization:<9} {curve.width:>6}"
            + "".join(f"{c:>9}" for c in cells)
            + f"   {', '.join(ends) or '-'}"
        )
    if any(curve.at_edge for curve in found):
        lines.append("* at an edge of what was tried: it may be better beyond.")
    return "\n".join([*lines, *conclusions(found)])


def record(found: Sequence[Curve]) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "curves": [
            {
                "parametrization": curve.parametrization,
                "width": curve.width,
                "learning_rates": curve.rates,
                "seeds": curve.seeds,
                "values": curve.values.tolist(),
                "best_by_seed": [o.x for o in curve.optima],
                "at_edge": [o.edge for o in curve.optima],
            }
            for curve in found
        ],
        "conclusions": conclusions(found),
    }


def transfer_png(found: Sequence[Curve], metric: str, caption: str) -> bytes:
    """The PNG: a panel a parametrization, a colour a width, the seeds' range as a band."""
    return png(lambda theme: _draw(found, metric, caption, theme), LIGHT)


def _draw(found: Sequence[Curve], metric: str, caption: str, theme: Theme) -> "Figure":
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(curve.parametrization for curve in found))
    widths = sorted({curve.width for curve in found})
    looks = {w: (COLOURS[i % 6], MARKERS[i % len(MARKERS)]) for i, w in enumerate(widths)}
    figure, panels = plt.subplots(
        1,
        len(names),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
        figsize=(4.6 * len(names) + 1, 4.6),
    )
    finite = np.concatenate([c.values[np.isfinite(c.values)] for c in found])
    low = finite.min() if len(finite) else 1.0
    high = min(finite.max() if len(finite) else 2.0, HIGHEST * low)
    for ax, name in zip(panels[0], names, strict=True):
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(low / 1.03, high * 1.03)
        ax.set_title(name, fontsize=11)
        ax.grid(True, which="major", lw=0.7)
        ax.set_xlabel("learning rate at the base width" if name == "mup" else "learning rate")
        for curve in (each for each in found if each.parametrization == name):
            colour, marker = looks[curve.width]
            # What diverged or left the frame shows as a line that leaves it.
            values = np.where(np.isfinite(curve.values), curve.values, 10 * high)
            mean = np.exp(np.log(values).mean(1))
            ax.fill_between(
                curve.rates, values.min(1), values.max(1), color=colour, alpha=0.18, lw=0
            )
            ax.plot(
                curve.rates, mean, marker=marker, ms=5, color=colour, lw=1.4, label=str(curve.width)
            )
            for optimum in curve.optima:
                ax.axvline(optimum.x, 0, 0.05, color=colour, lw=1.6)
        plain_ticks(ax)
    panels[0][0].set_ylabel(f"{metric_name(metric)} (lower is better)")
    legend = panels[0][-1].legend(
        title="width", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, fontsize=9
    )
    left_title(legend)
    figure.suptitle(
        "Best learning rate by width", x=0.01, ha="left", fontsize=13, fontweight="bold"
    )
    figure.supxlabel(
        f"{caption} Bands: the range of the seeds. Ticks at the foot: each seed's best rate.",
        x=0.01,
        ha="left",
        fontsize=8.5,
        color=theme.faint,
    )
    return figure


def summary_of_seeds(found: Sequence[Curve]) -> str:
    """'3 widths, 7 learning rates, 2 seeds'."""
    widths = {curve.width for curve in found}
    rates = {rate for curve in found for rate in curve.rates}
    seeds = {seed for curve in found for seed in curve.seeds}
    return (
        f"{plural(len(widths), 'width')}, {plural(len(rates), 'learning rate')},"
        f" {plural(len(seeds), 'seed')}"
    )
