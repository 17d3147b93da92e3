"""The plots of a group: its metric against cost and along training, IsoFLOP profiles, the proxy."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from ditjax.reporting import style
from ditjax.reporting.analysis import (
    FRONTIER,
    GFLOPS,
    PARAMS,
    TRAINING,
    VAL_LOSS,
    Analysis,
    Fit,
    IsoFlop,
    floor_of,
    value,
)
from ditjax.reporting.curves import Logs, TrainingCurve, thinned
from ditjax.reporting.looks import Encoding
from ditjax.reporting.paired import PairedRow
from ditjax.reporting.sampling import Sampled
from ditjax.reporting.study import (
    Absent,
    described,
    families,
    model_key,
    published_figures,
    settings,
    settings_words,
    usable,
    varied_keys,
)
from ditjax.reporting.style import ACCENT, BACKGROUND, FAINT, INK
from ditjax.runs.results import Found
from ditjax.scaling.frontier import frontier
from ditjax.scaling.isoflop import Profile
from ditjax.studies.words import interval_words, metric_name, number, short, shortened

MAX_NAMED = 24  # models with their names beside their markers
MAX_CURVE = 120  # points of a curve in a plot
MAX_AXES = 3  # settings that have a plot of their own
MAX_PAIRED = 6  # metrics whose paired differences have a plot
NARROW, WIDE = (340.0, 260.0), (720.0, 330.0)  # points
_TITLES = {
    GFLOPS: "Gflops of one forward pass",
    PARAMS: "parameters",
    TRAINING: "Gflops of training",
}


class Plot(NamedTuple):
    """What draws a plot on axes, and the words around it."""

    title: str
    caption: str
    draw: Callable[[Axes], None]

    def svg(self, protocol: str, *, wide: bool = False) -> str:
        """The plot as an <svg> for a page; `wide` for where there is room."""
        size, columns = (WIDE, 3) if wide else (NARROW, 1)
        about = f"{self.title}, protocol {protocol}{', wide' if wide else ''}"
        with style.styled():
            return style.svg(style.plot_figure([self.draw], *size, columns=columns), about)


class GroupPlots:
    """The plots of one group of runs.

    `rows`: id of a run -> its row in the page's table. `absent` are cells without a result, whose
    published figures are shown.
    """

    def __init__(
        self,
        analysis: Analysis,
        looks: Encoding,
        rows: Mapping[int, int] | None = None,
        absent: Sequence[Absent] = (),
    ) -> None:
        self.analysis, self.looks, self.absent = analysis, looks, absent
        self.metric, self.name = analysis.metric, metric_name(analysis.metric)
        self.usable = [each for each in analysis.group.runs if usable(each, self.metric)]
        self._rows = rows or {}

    def every(self, logs: Logs, sampled: Sequence[Sampled]) -> list[Plot]:
        """Every plot that the group has points for."""
        analysis, runs = self.analysis, self.analysis.group.runs
        made = [self.cost(GFLOPS), self.cost(PARAMS)]
        if len({each.result["train"]["images"] for each in analysis.runs}) > 1:
            made.append(self.cost(TRAINING))
        for metric in dict.fromkeys((self.metric, VAL_LOSS)):
            if curves := logs.evaluations(metric, runs, []):
                made.append(self.training(curves, metric))
        wanted = {id(each) for each in runs}
        if losses := [curve for curve in logs.losses() if id(curve.run) in wanted]:
            made.append(self.losses(losses))
        if analysis.isoflop and analysis.isoflop.profiles:
            made.append(self.isoflop(analysis.isoflop))
        if analysis.agreed and self.metric != VAL_LOSS:
            made.append(self.proxy())
        if sampled:
            made.append(self.sampling(sampled))
        return [*made, *self.paired(), *self.settings()]

    # ---- the metric against a cost

    def cost(self, key: str, *, named: bool = False) -> Plot:
        """The metric against a cost: runs, seeds' spread, published figures, laws, prediction."""
        fits = (self.analysis.fits[0], *self.analysis.others)
        fit = next((one for one in fits if (one.x, one.y) == (key, self.metric)), None)

        def draw(ax: Axes) -> None:
            self._draw_cost(ax, key, fit)
            if named:
                self._draw_names(ax, key)

        return Plot(f"{self.name} against {_TITLES[key]}", _fit_words(fit, self.name), draw)

    def _draw_cost(self, ax: Axes, key: str, fit: Fit | None) -> None:
        found = self.analysis.extrapolation
        held = found.held[-1] if key == GFLOPS and found else None
        published, floor = self._published(key), floor_of(self.usable, self.metric)
        x = [value(each, key) for each in self.analysis.group.runs]
        y = [value(each, self.metric) for each in self.usable] + ([held.predicted] if held else [])
        x, y = x + [one for one, _, _ in published], y + [one for _, one, _ in published]
        titles = _TITLES[key], f"{self.name} (lower is better)"
        style.frame(ax, x, y, *titles)
        if 0 < floor < ax.get_ylim()[0]:
            style.frame(ax, x, [*y, floor], *titles, log_y=True)
        if key == PARAMS:
            ax.xaxis.set_major_formatter(_parameters)
        if not y:
            words = f"no run has {self.name}"
            ax.text(0.5, 0.5, words, transform=ax.transAxes, ha="center", color=FAINT)
        if ax.get_ylim()[0] <= floor <= ax.get_ylim()[1]:
            _draw_level(ax, floor, f"real against real: {number(floor)}")
        _draw_laws(ax, fit)
        for family in families(self.usable, self.metric):
            if len(family.runs) > 1:
                at, look = value(family.runs[0], key), self.looks.of(family.runs[0])
                ax.plot([at] * 2, [family.low, family.high], color=look.colour, lw=4.5, alpha=0.3)
        for one, figure, each in published:
            if each and math.isfinite(measured := value(each, self.metric)):
                (line,) = ax.plot([one] * 2, [figure, measured], ":", color=FAINT, lw=1)
                line.set_gid(self._gid(each))
            self._mark(ax, one, figure, each, published=True)
        if published:
            ax.plot([], [], "o", color=BACKGROUND, mec=FAINT, mew=1.4, ms=7, label="published")
        for each in self.usable:
            self._mark(ax, value(each, key), value(each, self.metric), each)
        if held:
            ends = [held.interval.low, held.interval.high]
            ax.plot([held.x] * 2, ends, color=ACCENT, lw=1.4, zorder=5)
            words = "predicted by the smaller models, with 95 %"
            _draw_cross(ax, held.x, held.predicted, ACCENT, words)

    def _published(self, key: str) -> list[tuple[float, float, Found | None]]:
        """(x, published figure, the run or None for a cell without one)."""
        found: list[tuple[float, float, Found | None]] = [
            (value(each, key), published_figures(each)[self.metric], each)
            for each in self.analysis.group.runs
            if self.metric in published_figures(each)
        ]
        for cell in self.absent:
            x = {GFLOPS: cell.gflops, PARAMS: cell.params}.get(key)
            if x and self.metric in cell.published:
                found.append((float(x), cell.published[self.metric], None))
        return found

    def _draw_names(self, ax: Axes, key: str) -> None:
        """One name a model, where few enough are drawn."""
        first: dict[tuple[str, str, float], Found] = {}
        for each in self.usable:
            first.setdefault(model_key(each), each)
        if len(first) > MAX_NAMED:
            return
        labels = [
            style.Label(
                value(each, key),
                value(each, self.metric),
                short(each.result["model"]["name"].removeprefix("DiT-"), 24),
            )
            for each in first.values()
        ]
        markers = [(value(each, key), value(each, self.metric)) for each in self.usable]
        style.place_labels(ax, labels, markers, FAINT)

    # ---- along training

    def training(self, curves: Sequence[TrainingCurve], metric: str) -> Plot:
        """The metric against training compute, the frontier of all curves."""
        name = metric_name(metric)

        def draw(ax: Axes) -> None:
            self._draw_curves(ax, curves, lambda curve: curve.gflops, _TITLES[TRAINING], name)
            x = np.concatenate([curve.gflops for curve in curves])
            y = np.concatenate([curve.values for curve in curves])
            best, words = frontier(x, y), "best for its compute"
            if len(best) > 1:
                ax.plot(x[best], y[best], color=INK, lw=5, alpha=0.2, zorder=1.5, label=words)
            _draw_laws(ax, law)

        others = self.analysis.others
        law = next((fit for fit in others if (fit.label, fit.y) == (FRONTIER, metric)), None)
        caption = (
            f"One line a run. Training costs 3 forward passes an image. {_fit_words(law, name)}"
        )
        title = f"{name[:1].upper()}{name[1:]} along training, against {_TITLES[TRAINING]}"
        return Plot(title, caption, draw)

    def losses(self, curves: Sequence[TrainingCurve]) -> Plot:
        """The smoothed training loss against steps."""

        def draw(ax: Axes) -> None:
            self._draw_curves(ax, curves, lambda curve: curve.steps, "training steps", "loss")

        caption = "Each point is the mean over the steps from s / 1.2 to 1.2 s."
        return Plot("Smoothed training loss against training steps", caption, draw)

    def _draw_curves(
        self,
        ax: Axes,
        curves: Sequence[TrainingCurve],
        x_of: Callable[[TrainingCurve], np.ndarray],
        x_title: str,
        y_title: str,
    ) -> None:
        thin = [thinned(curve, MAX_CURVE) for curve in curves]
        x = np.concatenate([x_of(curve) for curve in thin])
        y = np.concatenate([curve.values for curve in thin])
        style.frame(ax, x.tolist(), y.tolist(), x_title, y_title, log_y=True)
        for curve in thin:
            self._line(ax, x_of(curve), curve.values, curve.run, many=len(thin) > 30)
            self._mark(ax, float(x_of(curve)[-1]), float(curve.values[-1]), curve.run, small=True)

    def isoflop(self, iso: IsoFlop) -> Plot:
        """Each budget's models, parabola and minimum."""
        name = metric_name(iso.metric)
        drawn = [profile for profile in iso.profiles if len(profile.sizes) > 1]

        def draw(ax: Axes) -> None:
            x = [size for each in drawn for size in each.sizes]
            y = [y for each in drawn for y in each.metrics]
            style.frame(ax, x, y, _TITLES[GFLOPS], name, log_y=True)
            for i, profile in enumerate(drawn):
                _draw_profile(ax, profile, style.COLOURS[i % len(style.COLOURS)])
            if any(profile.best_size for profile in drawn):
                _draw_cross(ax, math.nan, math.nan, INK, "a parabola's minimum: the best size")

        caption = "All seeds of a model are one point."
        if iso.finished:
            caption += " Each run ends at its budget."
        if iso.optimal:
            best = iso.optimal.size
            caption += (
                f" Best size ∝ compute^{number(best.exponent)} (95 %"
                f" {interval_words(best.interval)}); images ∝"
                f" compute^{number(iso.optimal.images.exponent)}."
            )
        elif iso.why:
            caption += f" No law of the best size: {short(iso.why, 160)}"
        return Plot(f"IsoFLOP profiles: {name} of each model at a budget", caption, draw)

    # ---- the metric against other quantities

    def proxy(self) -> Plot:
        """The metric against the validation loss."""
        runs = [each for each in self.usable if usable(each, VAL_LOSS)]
        caption = "The loss is at fixed (t, ε) on images that were not trained on."
        if math.isfinite(self.analysis.agreement):
            spearman = number(self.analysis.agreement)
            caption = f"Spearman {spearman} over {self.analysis.agreed} models. {caption}"
        points = [(value(each, VAL_LOSS), value(each, self.metric), each) for each in runs]
        return self._scatter("validation loss", caption, points)

    def sampling(self, sampled: Sequence[Sampled]) -> Plot:
        """The metric against the compute of sampling, one line a run along its steps."""
        points = [(one.gflops, one.value, one.run) for one in sampled]
        lines: dict[object, list[tuple[float, float, Found]]] = defaultdict(list)
        for point in points:
            lines[id(point[2])].append(point)
        caption = "One line a run, along its sampling steps; the protocol is that of the grid."
        return self._scatter(
            "sampling compute, Gflops an image", caption, points, [*lines.values()]
        )

    def paired(self) -> list[Plot]:
        """Each arm's difference from its baseline, a plot a metric."""
        by_metric: dict[str, list[PairedRow]] = defaultdict(list)
        for row in self.analysis.paired:
            if row.found:
                by_metric[row.metric].append(row)
        models = {row.model for row in self.analysis.paired}
        caption = "Bars: 95 % over the pairs of seeds; a point without one has a single pair."
        made = []
        for metric, rows in list(by_metric.items())[:MAX_PAIRED]:
            labels = [f"{row.model}: {row.arm}" if len(models) > 1 else row.arm for row in rows]
            names = shortened(labels, 80)
            draw = functools.partial(
                _draw_paired, rows=rows, labels=[names[label] for label in labels]
            )
            title = f"{metric_name(metric)}: arm - baseline, paired by seed"
            made.append(Plot(title, caption, draw))
        return made

    def settings(self) -> list[Plot]:
        """The metric against each setting that is a number and takes 3 values or more."""
        made: list[Plot] = []
        varied = varied_keys(self.usable)
        for key in varied:
            others = [one for one in varied if one != key]
            lines: dict[object, list[tuple[float, float, Found]]] = defaultdict(list)
            for each in self.usable:
                x = settings(each, [key])[key]
                if isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < 1e300:
                    model = [described(each, name) for name in ("size", "patch")]
                    rest = settings_words(settings(each, others))
                    same = (*model, each.result["train"]["seed"], rest)
                    lines[same].append((float(x), value(each, self.metric), each))
            points = [point for line in lines.values() for point in line]
            if len({x for x, _, _ in points}) > 2 and len(made) < MAX_AXES:
                name = short(key.rpartition(".")[2].replace("_", " "), 30)
                caption = "One line a model and seed, all else the same."
                made.append(self._scatter(name, caption, points, [*lines.values()]))
        return made

    def _scatter(
        self,
        x_title: str,
        caption: str,
        points: Sequence[tuple[float, float, Found]],
        lines: Sequence[Sequence[tuple[float, float, Found]]] = (),
    ) -> Plot:
        """The metric against another quantity: (x, y, run), some joined by lines."""

        def draw(ax: Axes) -> None:
            x, y = [x for x, _, _ in points], [y for _, y, _ in points]
            style.frame(ax, x, y, x_title, self.name)
            for line in lines:
                for (x1, y1, run), (x2, y2, _) in pairwise(sorted(line, key=lambda each: each[:2])):
                    self._line(ax, [x1, x2], [y1, y2], run)
            for x1, y1, run in points:
                self._mark(ax, x1, y1, run, small=bool(lines))

        return Plot(f"{self.name} against {x_title}", caption, draw)

    # ---- marks

    def _mark(
        self,
        ax: Axes,
        x: float,
        y: float,
        each: Found | None,
        *,
        small: bool = False,
        published: bool = False,
    ) -> None:
        """A run's marker; a published figure has a hollow one, and may be of no run."""
        look = self.looks.of(each) if each else style.Look(FAINT, "o")
        fill, edge, width = look.colour, BACKGROUND, 0.7
        if published:
            fill, edge, width = BACKGROUND, look.colour, 1.4
        size = 5 if small else 7
        (mark,) = ax.plot([x], [y], look.marker, color=fill, mec=edge, mew=width, ms=size, zorder=4)
        mark.set_gid("-".join(filter(None, ["published" if published else "", self._gid(each)])))

    def _line(
        self,
        ax: Axes,
        x: Sequence[float] | np.ndarray,
        y: Sequence[float] | np.ndarray,
        each: Found,
        *,
        many: bool = False,
    ) -> None:
        """A line of a run, thinner where there are many."""
        width, alpha = (0.7, 0.55) if many else (1.3, 0.8)
        (line,) = ax.plot(x, y, color=self.looks.of(each).colour, lw=width, alpha=alpha)
        line.set_gid(self._gid(each))

    def _gid(self, each: Found | None) -> str:
        """What links a mark to the row of its run; '' for none."""
        row = self._rows.get(id(each))
        return "" if row is None else f"run-{row}"


def _parameters(n: float, _: float | None = None) -> str:
    """50K, 1.5M."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:g}{suffix}"
    return f"{n:g}"


def _fit_words(fit: Fit | None, name: str) -> str:
    if fit is None:
        return ""
    if fit.law is None:
        return f"No law: {fit.why.rstrip('.')}."
    return (
        f"Pearson of log₁₀ {fit.x} and {name}: {number(fit.pearson)}; exponent"
        f" {number(fit.law.b)} (95 % {interval_words(fit.law.b_interval)})."
    )


def _draw_laws(ax: Axes, fit: Fit | None) -> None:
    """The laws of a fit across the axes, those with an offset fainter."""
    laws = [(fit.law, "--", INK), (fit.offset, ":", FAINT)] if fit else []
    at = np.geomspace(*ax.get_xlim(), 90)
    for law, dashes, colour in laws:
        if law and (law.c > 0 or dashes == "--"):
            offset = f"{number(law.c)} + " if law.c else ""
            words = f"{offset}{number(law.a)} · x^{number(-law.b)}"
            ax.plot(at, law(at), dashes, color=colour, lw=1.3, label=words)


def _draw_level(ax: Axes, y: float, words: str) -> None:
    """A horizontal line with words above its left end."""
    ax.axhline(y, color=FAINT, lw=1, zorder=1)
    place, data = (0.01, y), ("axes fraction", "data")
    ax.annotate(words, place, (0, 3), data, textcoords="offset points", color=FAINT, fontsize=8.5)


def _draw_cross(ax: Axes, x: float, y: float, colour: str, label: str | None = None) -> None:
    """A place without a run, such as a prediction."""
    ax.plot([x], [y], "x", color=colour, ms=7, mew=1.6, zorder=5, label=label)


def _draw_paired(ax: Axes, rows: Sequence[PairedRow], labels: Sequence[str]) -> None:
    """Differences and their intervals around a line at 0, the first row on top."""
    ax.axvline(0, color=FAINT, lw=1)
    for place, (row, label) in enumerate(zip(rows, labels, strict=True)):
        assert row.found
        colour, ends = (ACCENT if row.found.settled else INK), row.found.interval
        if ends:
            ax.plot([ends.low, ends.high], [-place, -place], color=colour, lw=1.4)
        ax.plot([row.found.mean], [-place], "o", color=colour, ms=5)
        ax.annotate(
            label,
            (0.01, -place),
            (0, 4),
            ("axes fraction", "data"),
            textcoords="offset points",
            fontsize=8,
            color=FAINT,
        )
    ax.set_ylim(0.4 - len(rows), 0.9)
    ax.margins(x=0.05)
    style.plain_ticks(ax)
    ax.set_yticks([])
    ax.set_xlabel(f"{metric_name(rows[0].metric)}, arm - baseline", loc="right")


def _draw_profile(ax: Axes, profile: Profile, colour: str) -> None:
    """The models at one budget, and the parabola where it has a minimum."""
    found = f"{number(profile.best_size)} Gflops" if profile.best_size else "no minimum"
    words = f"{style.tick_label(float(f'{profile.budget:.2g}'))} training Gflops: {found}"
    x, y = profile.sizes, profile.metrics
    ax.plot(x, y, "o:", color=colour, mec=BACKGROUND, mew=0.7, ms=5, lw=0.8, label=words)
    if profile.parabola and profile.best_size and profile.best_metric:
        at = np.geomspace(x[0], x[-1], 40)
        u = np.log(at) - np.mean(np.log(x))
        p0, p1, p2 = profile.parabola
        ax.plot(at, np.exp(p0 + p1 * u + p2 * u**2), color=colour, lw=1.4)
        _draw_cross(ax, profile.best_size, profile.best_metric, INK)
