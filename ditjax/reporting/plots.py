"""The linked plots of a group: the metric against cost, along training, IsoFLOP, the proxy."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from ditjax.reporting.analysis import (
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
from ditjax.reporting.curves import Curve, Logs, thinned
from ditjax.reporting.looks import Encoding
from ditjax.reporting.sampling import Sampled
from ditjax.reporting.study import (
    Absent,
    axes,
    families,
    model_key,
    published_of,
    settings,
    settings_words,
    usable,
)
from ditjax.reporting.svg import Axis, Looks, Plot, Taken, axis, cross_glyph, glyph, label, stroke
from ditjax.runs.results import Found
from ditjax.scaling.fit import PowerLaw
from ditjax.scaling.frontier import frontier
from ditjax.studies.words import interval_words, metric_name, number, short

MAX_NAMED = 24  # models whose names stand beside their spots
MAX_CURVE = 120  # points of a curve in the page
MAX_AXES = 3  # settings that have a plot of their own
_TITLES = {
    GFLOPS: "Gflops of one forward pass",
    PARAMS: "parameters",
    TRAINING: "Gflops of training",
}


@dataclass(frozen=True)
class Panel:
    """A plot: `svg` and, where there is room for more, `wide`. `legend`: (markup, words)."""

    title: str
    svg: str
    caption: str
    wide: str = ""
    legend: list[tuple[str, str]] = field(default_factory=list)


def panels(
    analysis: Analysis,
    logs: Logs,
    rows: Mapping[int, int],
    looks: Encoding,
    sampled: Sequence[Sampled],
    absent: Sequence[Absent],
) -> list[Panel]:
    """Every plot that the group has points for. `rows`: id of a run -> its row in the table.

    `absent` are cells without a result, whose published figures are shown.
    """
    draw = _Drawing(analysis, rows, looks, absent)
    made = [draw.cost(GFLOPS), draw.cost(PARAMS)]
    images = {each.result["train"]["images"] for each in analysis.runs}
    if len(images) > 1:
        made.append(draw.cost(TRAINING))
    for metric in dict.fromkeys((analysis.metric, VAL_LOSS)):
        if curves := logs.evaluations(metric, analysis.group.runs, []):
            made.append(draw.training(curves, metric))
    wanted = {id(each) for each in analysis.group.runs}
    losses = [curve for curve in logs.losses() if id(curve.run) in wanted]
    if losses:
        made.append(draw.losses(losses))
    if analysis.isoflop and analysis.isoflop.profiles:
        made.append(draw.isoflop(analysis.isoflop))
    if analysis.agreed and analysis.metric != VAL_LOSS:
        made.append(draw.proxy())
    if sampled:
        made.append(draw.sampling(sampled))
    return [*made, *draw.settings()]


def _parameters(n: float) -> str:
    """50K, 1.5M."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:g}{suffix}"
    return f"{n:g}"


def _law(law: PowerLaw) -> str:
    offset = f"{number(law.c)} + " if law.c else ""
    return f"{offset}{number(law.a)} · x^{number(-law.b)}"


def _fit_words(fit: Fit | None, name: str) -> str:
    if fit is None:
        return ""
    if fit.law is None:
        return f"No law: {fit.why.rstrip('.')}."
    return (
        f"Pearson of log₁₀ and {name}: {number(fit.pearson)}; exponent {number(fit.law.b)}"
        f" (95 % {interval_words(fit.law.b_interval)})."
    )


class _Drawing:
    """What all plots of a group share."""

    def __init__(
        self,
        analysis: Analysis,
        rows: Mapping[int, int],
        looks: Encoding,
        absent: Sequence[Absent],
    ) -> None:
        self.absent = absent
        self.analysis = analysis
        self.metric = analysis.metric
        self.name = metric_name(analysis.metric)
        self.looks = looks
        self._rows = rows
        self.usable = [each for each in analysis.group.runs if usable(each, self.metric)]

    def row(self, each: Found) -> int | None:
        return self._rows.get(id(each))

    def published(self, key: str) -> list[tuple[float, float, Found | None]]:
        """(x, published figure, the run or None for a cell without one)."""
        found: list[tuple[float, float, Found | None]] = [
            (value(each, key), published_of(each)[self.metric], each)
            for each in self.analysis.group.runs
            if self.metric in published_of(each)
        ]
        for cell in self.absent:
            x = {GFLOPS: cell.gflops, PARAMS: cell.params}.get(key)
            if x and self.metric in cell.published:
                found.append((float(x), cell.published[self.metric], None))
        return found

    def cost(self, key: str) -> Panel:
        """The metric against a cost: runs, seeds' spread, published figures, laws, prediction."""
        fits = (self.analysis.fits[0], *self.analysis.others)
        fit = next((one for one in fits if (one.x, one.y) == (key, self.metric)), None)
        main = key == GFLOPS
        held = (
            self.analysis.extrapolation.held[-1] if main and self.analysis.extrapolation else None
        )
        published = self.published(key)
        x_values = [value(each, key) for each in self.analysis.group.runs]
        y_values = [value(each, self.metric) for each in self.usable]
        y_values += [y for _, y, _ in published] + ([held.predicted] if held else [])
        xs = axis(
            _TITLES[key],
            [*x_values, *(x for x, _, _ in published)],
            log=True,
            show=_parameters if key == PARAMS else label,
        )
        ys = axis(f"{self.name} (lower is better)", y_values)
        floor = floor_of(self.usable, self.metric)
        if 0 < floor < ys.low:
            ys = Axis(ys.title, floor / 1.15, ys.high, True)

        def draw(width: int, height: int) -> str:
            plot = Plot(xs, ys, f"{self.name} against {_TITLES[key]}", width, height)
            if not y_values:
                plot.note(f"no run has {self.name}")
            plot.level(floor, f"real against real: {number(floor)}")
            self._laws(plot, fit)
            self._spreads(plot, key)
            for x, y, each in published:
                self._published(plot, x, y, each)
            for each in self.usable:
                x, y = value(each, key), value(each, self.metric)
                plot.spot(x, y, self.looks.of(each), self.row(each))
            if held:
                plot.bar(held.x, held.interval.low, held.interval.high, "foretold")
                plot.cross(held.x, held.predicted, "foretold")
            if main and width > 600:
                self._names(plot, key)
            return plot.markup()

        legend = []
        if fit and fit.law:
            legend.append((stroke("law"), _law(fit.law)))
            if fit.offset and fit.offset.c > 0:
                legend.append((stroke("law offset"), _law(fit.offset)))
        if held:
            legend.append((cross_glyph("foretold"), "foretold by the smaller models, with 95 %"))
        if published:
            legend.append((glyph(Looks(0, 0), "hollow plain"), "published"))
        wide = draw(900, 400) if main else ""
        caption = _fit_words(fit, self.name)
        return Panel(f"{self.name} against {key}", draw(440, 330), caption, wide, legend)

    def _spreads(self, plot: Plot, key: str) -> None:
        for family in families(self.usable, self.metric):
            if len(family.runs) > 1:
                first = family.runs[0]
                colour = self.looks.of(first).colour
                plot.bar(value(first, key), family.low, family.high, "spread", colour=colour)

    def _published(self, plot: Plot, x: float, y: float, each: Found | None) -> None:
        if each is None:
            plot.spot(x, y, Looks(0, 0), None, "hollow plain")
            return
        measured = value(each, self.metric)
        if math.isfinite(measured):
            plot.line([x, x], [y, measured], "apart", self.row(each))
        plot.spot(x, y, self.looks.of(each), self.row(each), "hollow")

    def _laws(self, plot: Plot, fit: Fit | None) -> None:
        if fit is None or fit.law is None:
            return
        at = np.geomspace(plot.x.low, plot.x.high, 90)
        plot.line(at, fit.law(at), "law")
        if fit.offset is not None and fit.offset.c > 0:
            plot.line(at, fit.offset(at), "law offset")

    def _names(self, plot: Plot, key: str) -> None:
        """One name a model, where few enough are drawn."""
        first: dict[tuple[str, str, float], Found] = {}
        for each in self.usable:
            first.setdefault(model_key(each), each)
        if len(first) > MAX_NAMED:
            return
        taken = Taken()
        for each in self.usable:
            across, down = plot.at(value(each, key), value(each, self.metric))
            taken.take((across - 5, down - 5, across + 5, down + 5))
        for each in first.values():
            words = short(each.result["model"]["name"].removeprefix("DiT-"), 24)
            plot.name(value(each, key), value(each, self.metric), words, taken)

    def training(self, curves: Sequence[Curve], metric: str) -> Panel:
        """The metric against training compute, the frontier of all curves."""
        name = metric_name(metric)
        plot = self._curves(curves, lambda curve: curve.gflops, "Gflops of training", name)
        x = np.concatenate([curve.gflops for curve in curves])
        y = np.concatenate([curve.values for curve in curves])
        best = frontier(x, y)
        if len(best) > 1:
            plot.line(x[best], y[best], "frontier")
        return Panel(
            f"{name} along training",
            plot.markup(),
            "One line a run. Training costs 3 forward passes an image.",
            legend=[(stroke("frontier"), "best for its compute")] if len(best) > 1 else [],
        )

    def losses(self, curves: Sequence[Curve]) -> Panel:
        plot = self._curves(curves, lambda curve: curve.steps, "training steps", "training loss")
        return Panel(
            "Training loss",
            plot.markup(),
            "Each point is the mean over the steps from s / 1.2 to 1.2 s.",
        )

    def _curves(
        self,
        curves: Sequence[Curve],
        x_of: Callable[[Curve], np.ndarray],
        x_title: str,
        y_title: str,
    ) -> Plot:
        thin = [thinned(curve, MAX_CURVE) for curve in curves]
        xs = axis(x_title, [float(x) for curve in thin for x in x_of(curve)], log=True)
        ys = axis(y_title, [float(y) for curve in thin for y in curve.values], log=True)
        plot = Plot(xs, ys, f"{y_title} against {x_title}, one line a run")
        kind = "curve many" if len(thin) > 30 else "curve"
        for curve in thin:
            looks = self.looks.of(curve.run)
            plot.line(x_of(curve), curve.values, kind, self.row(curve.run), looks.colour)
        for curve in thin:
            looks = self.looks.of(curve.run)
            end = float(x_of(curve)[-1]), float(curve.values[-1])
            plot.spot(*end, looks, self.row(curve.run), "small")
        return plot

    def isoflop(self, iso: IsoFlop) -> Panel:
        """Each budget's models, parabola and minimum."""
        name = metric_name(iso.metric)
        drawn = [profile for profile in iso.profiles if len(profile.sizes) > 1]
        xs = axis(_TITLES[GFLOPS], [size for each in drawn for size in each.sizes], log=True)
        ys = axis(name, [y for each in drawn for y in each.metrics], log=True)
        plot = Plot(xs, ys, f"{name} of each model at {len(drawn)} budgets of training compute")
        legend = []
        for i, profile in enumerate(drawn):
            plot.line(profile.sizes, profile.metrics, "iso faint", colour=i)
            if profile.parabola and profile.best_size:
                middle = math.exp(float(np.mean(np.log(profile.sizes))))
                at = np.geomspace(profile.sizes[0], profile.sizes[-1], 40)
                p0, p1, p2 = profile.parabola
                u = np.log(at / middle)
                plot.line(at, np.exp(p0 + p1 * u + p2 * u**2), "iso", colour=i)
            for size, y in zip(profile.sizes, profile.metrics, strict=True):
                plot.spot(size, y, Looks(i, 0), None, "small")
            if profile.best_size and profile.best_metric:
                plot.cross(profile.best_size, profile.best_metric, "best")
            found = f"{number(profile.best_size)} Gflops" if profile.best_size else "no minimum"
            words = f"{label(float(f'{profile.budget:.2g}'))} training Gflops: {found}"
            legend.append((glyph(Looks(i, 0)), words))
        if any(profile.best_size for profile in drawn):
            legend.append((cross_glyph("best"), "a parabola's minimum: the best size"))
        caption = "All seeds of a model are one point."
        if iso.optimal:
            best = iso.optimal.size
            caption += (
                f" Best size ∝ compute^{number(best.exponent)} (95 %"
                f" {interval_words(best.interval)}); images ∝"
                f" compute^{number(iso.optimal.images.exponent)}."
            )
        elif iso.why:
            caption += f" No law of the best size: {short(iso.why, 160)}"
        return Panel(f"IsoFLOP profiles of {name}", plot.markup(), caption, legend=legend)

    def proxy(self) -> Panel:
        runs = [each for each in self.usable if usable(each, VAL_LOSS)]
        xs = axis("validation loss", [value(each, VAL_LOSS) for each in runs], log=True)
        ys = axis(self.name, [value(each, self.metric) for each in runs])
        plot = Plot(xs, ys, f"{self.name} against validation loss")
        for each in runs:
            plot.spot(
                value(each, VAL_LOSS), value(each, self.metric), self.looks.of(each), self.row(each)
            )
        agreement = ""
        if math.isfinite(self.analysis.agreement):
            agreement = (
                f"Spearman {number(self.analysis.agreement)} over {self.analysis.agreed} models. "
            )
        caption = f"{agreement}The loss is at fixed (t, ε) on images that were not trained on."
        return Panel(f"{self.name} against validation loss", plot.markup(), caption)

    def sampling(self, sampled: Sequence[Sampled]) -> Panel:
        title = "Gflops of sampling one image"
        xs = axis(title, [one.gflops for one in sampled], log=True)
        ys = axis(self.name, [one.value for one in sampled])
        plot = Plot(xs, ys, f"{self.name} against {title}, one line a run")
        for first, second in pairwise(sampled):
            if first.run is second.run:
                plot.line(
                    [first.gflops, second.gflops],
                    [first.value, second.value],
                    "curve",
                    self.row(first.run),
                    self.looks.of(first.run).colour,
                )
        for one in sampled:
            plot.spot(one.gflops, one.value, self.looks.of(one.run), self.row(one.run), "small")
        return Panel(
            f"{self.name} against sampling compute",
            plot.markup(),
            "One line a run, along its sampling steps; the protocol is that of the grid.",
        )

    def settings(self) -> list[Panel]:
        """The metric against each setting that is a number and takes 3 values or more."""
        made: list[Panel] = []
        varied = axes(self.usable)
        for key in varied:
            points = [(each, settings(each, [key])[key]) for each in self.usable]
            numeric = [
                (each, float(x))
                for each, x in points
                if isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < 1e300
            ]
            if len({x for _, x in numeric}) < 3 or len(made) == MAX_AXES:
                continue
            made.append(self._setting(key, numeric, [one for one in varied if one != key]))
        return made

    def _setting(
        self, key: str, points: Sequence[tuple[Found, float]], others: Sequence[str]
    ) -> Panel:
        name = key.rpartition(".")[2].replace("_", " ")
        xs = axis(name, [x for _, x in points], log=True)
        ys = axis(self.name, [value(each, self.metric) for each, _ in points])
        plot = Plot(xs, ys, f"{self.name} against {name}, one line a model and seed")
        lines: dict[tuple[object, ...], list[tuple[float, float, Found]]] = {}
        for each, x in points:
            same = (
                each.result["model"]["size"],
                each.result["model"]["patch"],
                each.result["train"]["seed"],
                settings_words(settings(each, others)),
            )
            lines.setdefault(same, []).append((x, value(each, self.metric), each))
        for line in lines.values():
            line.sort(key=lambda point: point[:2])
            looks = self.looks.of(line[0][2])
            xs_of, ys_of = [x for x, _, _ in line], [y for _, y, _ in line]
            plot.line(xs_of, ys_of, "curve", colour=looks.colour)
        for each, x in points:
            plot.spot(x, value(each, self.metric), self.looks.of(each), self.row(each), "small")
        return Panel(
            f"{self.name} against {short(name, 30)}",
            plot.markup(),
            "One line a model and seed, all else the same.",
        )
