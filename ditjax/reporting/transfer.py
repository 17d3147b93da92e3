"""Loss against learning rate, a curve a width: whether a small network's rate serves a wide one."""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ditjax.reporting import style
from ditjax.reporting.style import Look
from ditjax.scaling.optimum import Optimum, drift, lowest
from ditjax.studies.words import metric_name, number, plural

HIGHEST = 2.5  # times the lowest loss; curves above leave the axes


@dataclass(frozen=True)
class RateRun:
    """One run of the figure. A run that diverged has a `value` that is not finite."""

    parametrization: str
    width: int
    learning_rate: float
    seed: int
    value: float


@dataclass(frozen=True)
class RateCurve:
    """The runs of one width: values f64[rates, seeds], NaN for not run, and each seed's optimum."""

    parametrization: str
    width: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    values: np.ndarray
    optima: tuple[Optimum, ...]

    @property
    def best(self) -> float:
        """The geometric mean of the seeds' best learning rates; NaN if none is known."""
        return math.exp(np.mean(np.log([o.x for o in self.optima]))) if self.optima else math.nan

    @property
    def at_edge(self) -> bool:
        """Whether a seed is best at the lowest or highest rate, so that its best may lie beyond."""
        return any(o.edge for o in self.optima)


def rate_curves(runs: Sequence[RateRun]) -> list[RateCurve]:
    """One curve for each parametrization and width; 'standard' comes first."""
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
        found.append(RateCurve(key[1], key[2], tuple(rates), tuple(seeds), values, optima))
    return found


def conclusions(found: Sequence[RateCurve]) -> list[str]:
    """One sentence for each parametrization."""
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
            "; some lie at an edge of the rates tried, so that the best may lie beyond"
            if any(curve.at_edge for curve in mine)
            else ""
        )
        lines.append(
            f"{name}: the best learning rate goes as width^{exponent:.2f}, from {number(bests[0])}"
            f" at {mine[0].width} to {number(bests[-1])} at {mine[-1].width}{edge}."
        )
    return lines


def transfer_text(found: Sequence[RateCurve], metric: str) -> str:
    """A table for a terminal: a line a width, the mean over seeds at each rate, the best rates."""
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
        lines.append("* at an edge of the rates tried: the best may lie beyond.")
    return "\n".join([*lines, *conclusions(found)])


def transfer_record(found: Sequence[RateCurve]) -> dict[str, Any]:
    """The curves and conclusions as JSON."""
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


def transfer_png(found: Sequence[RateCurve], metric: str, caption: str) -> bytes:
    """The figure as a PNG: a plot a parametrization, a colour a width, seeds' range as a band."""
    with style.styled():
        return style.png(_draw(found, metric, caption))


def _draw(found: Sequence[RateCurve], metric: str, caption: str) -> Figure:
    widths = sorted({curve.width for curve in found})
    colours, markers = itertools.cycle(style.COLOURS), itertools.cycle(style.MARKERS)
    looks = {width: Look(next(colours), next(markers)) for width in widths}
    values = np.concatenate([curve.values[np.isfinite(curve.values)] for curve in found])
    low = values.min() if len(values) else 1.0
    high = min(values.max() if len(values) else 2.0, HIGHEST * low)
    rates = [rate for curve in found for rate in curve.rates]
    y_title = f"{metric_name(metric)} (lower is better)"

    def draw(name: str, ax: Axes) -> None:
        base = " at the base width" if name == "mup" else ""
        style.frame(ax, rates, [], f"learning rate{base}", f"{name}: {y_title}", log_y=True)
        ax.set_ylim(low / 1.03, high * 1.03)
        style.plain_ticks(ax)
        for curve in (each for each in found if each.parametrization == name):
            _draw_curve(ax, curve, looks[curve.width], 10 * high)

    names = dict.fromkeys(curve.parametrization for curve in found)
    return style.plot_figure(
        [functools.partial(draw, name) for name in names],
        540,
        300,
        title="Best learning rate by width",
        notes=[f"{caption} Bands: the range of the seeds. Ticks: each seed's best rate."],
        keys=[style.Key("width", {str(width): look for width, look in looks.items()})],
    )


def _draw_curve(ax: Axes, curve: RateCurve, look: Look, beyond: float) -> None:
    """A curve and its band. Runs that diverged are at `beyond`: the line leaves the axes."""
    values = np.where(np.isfinite(curve.values), curve.values, beyond)
    mean = np.exp(np.log(values).mean(1))
    ax.fill_between(curve.rates, values.min(1), values.max(1), color=look.colour, alpha=0.18, lw=0)
    ax.plot(curve.rates, mean, marker=look.marker, ms=5, color=look.colour, lw=1.4)
    for optimum in curve.optima:
        ax.axvline(optimum.x, 0, 0.05, color=look.colour, lw=1.6)


def summary_of_seeds(found: Sequence[RateCurve]) -> str:
    """What was run: '3 widths, 7 learning rates, 2 seeds'."""
    widths = {curve.width for curve in found}
    rates = {rate for curve in found for rate in curve.rates}
    seeds = {seed for curve in found for seed in curve.seeds}
    return (
        f"{plural(len(widths), 'width')}, {plural(len(rates), 'learning rate')},"
        f" {plural(len(seeds), 'seed')}"
    )
