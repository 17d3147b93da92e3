"""Quality against the Gflops of sampling, a marker a cell of a grid: the DiT paper's figure 10."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ditjax.reporting import style
from ditjax.reporting.grid import Outcome, conditions, front, setting_text, varying, what_varies
from ditjax.reporting.style import (
    BACKGROUND,
    COLOURS,
    FAINT,
    INK,
    MARKERS,
    Key,
    Label,
    LabelPlace,
    Look,
)
from ditjax.studies.words import metric_name, plural, shortened

WIDTH, HEIGHT = 660.0, 420.0  # points
MAX_BARS = 60  # the intervals of more cells would hide the cells
MAX_LABELLED = 80  # of more cells only the front is labelled
MAX_LEADERS = 40  # of more cells no label is far from its marker
CROWD = 6  # more cells of one abscissa, a sweep of guidance scales, get columns of labels
LABEL_LINE = 10.5  # points from one label of a column to the next

# The axes in the order in which colour, marker and labels stand for them; the last that varies is
# always a label.
_ORDER = ("run", "sampler", "cfg_channels", "weights", "cfg_interval", "eta", "cfg_scale", "steps")


class _Looks(NamedTuple):
    """The axes that the colour and the marker stand for ('' for none), and those of the labels."""

    colour: str
    marker: str
    labels: list[str]
    line: bool  # whether cells that differ in their steps are joined


def pareto_png(
    outcomes: Sequence[Outcome], metric: str, protocol: Mapping[str, Any], reference: str
) -> bytes:
    """Draw the grid as a PNG: one marker a cell, 95 % intervals where known, the Pareto front.

    Cells that differ only in their steps are joined. Labels that would overlap are left out.
    """
    names = shortened((each.run for each in outcomes), 30)
    outcomes = [each._replace(run=names[each.run]) for each in outcomes]
    with style.styled():
        return style.png(_draw(outcomes, metric, protocol, reference))


def _of(each: Outcome, axis: str) -> str:
    return each.run if axis == "run" else setting_text(each.settings.get(axis))


def _looks(outcomes: Sequence[Outcome]) -> _Looks:
    several = len({each.run for each in outcomes}) > 1
    varied = [*(["run"] if several else []), *varying(outcomes)]
    varied.sort(key=lambda axis: _ORDER.index(axis) if axis in _ORDER else 1)
    if not varied:
        return _Looks("", "", [], False)
    others, labels = varied[:-1], varied[-1:]
    if varied == ["run"]:
        others, labels = varied, []
    fits = [axis for axis in others if len({_of(each, axis) for each in outcomes}) <= len(MARKERS)]
    colour = others[0] if others else ""
    marker = next((axis for axis in fits if axis != colour), "")
    labels = [axis for axis in others if axis not in (colour, marker)] + labels
    return _Looks(colour, marker, labels, "steps" in varied)


def _draw(
    outcomes: Sequence[Outcome], metric: str, protocol: Mapping[str, Any], reference: str
) -> Figure:
    name, looks = metric_name(metric), _looks(outcomes)
    drawn = [each for each in outcomes if math.isfinite(each.metrics.get(metric, math.nan))]
    look_of, keys = _encoded(outcomes, looks)
    notes = [conditions(outcomes, protocol, reference), what_varies(outcomes, varying(outcomes))]

    def draw(ax: Axes) -> None:
        ax.set_xscale("log")
        ax.set_xlabel(
            "Gflops of sampling one image (multiply-accumulates / 10⁹ of all evaluations)",
            loc="right",
        )
        ax.set_title(f"{name} (lower is better)", loc="left")
        if drawn:
            _draw_cells(ax, drawn, metric, look_of, looks, notes)
        else:
            ax.text(0.5, 0.5, f"no cell has {name}", transform=ax.transAxes, ha="center")
        if len(drawn) < len(outcomes):
            notes.append(f"{plural(len(outcomes) - len(drawn), 'cell')} without {name} not drawn.")

    title = f"{name} against sampling compute"
    return style.plot_figure([draw], WIDTH, HEIGHT, title=title, notes=notes, keys=keys)


def _encoded(outcomes: Sequence[Outcome], looks: _Looks) -> tuple[dict[str, Look], list[Key]]:
    """Name of a cell -> its look, and what colours and markers stand for."""
    # Beyond the six colours the markers tell values of one colour apart.
    colours = _palette(outcomes, looks.colour, COLOURS)
    markers = _palette(outcomes, looks.marker or looks.colour, list(MARKERS))
    of_cell = {
        each.name: Look(
            colours[_of(each, looks.colour)], markers[_of(each, looks.marker or looks.colour)]
        )
        for each in outcomes
    }
    keys = []
    if looks.colour:
        shapes = dict.fromkeys(colours, "o") if looks.marker else markers
        keys.append(
            Key(looks.colour, {value: Look(colours[value], shapes[value]) for value in colours})
        )
    if looks.marker:
        keys.append(Key(looks.marker, {value: Look(FAINT, markers[value]) for value in markers}))
    return of_cell, keys


def _palette(outcomes: Sequence[Outcome], axis: str, looks: Sequence[str]) -> dict[str, str]:
    """Value of an axis -> colour or marker, in order, starting again after the last."""
    values = dict.fromkeys(_of(each, axis) for each in outcomes)
    return dict(zip(values, itertools.cycle(looks), strict=False))


def _draw_cells(
    ax: Axes,
    drawn: Sequence[Outcome],
    metric: str,
    look_of: Mapping[str, Look],
    looks: _Looks,
    notes: list[str],
) -> None:
    """Everything inside the axes; what a reader must know of it is added to `notes`."""
    on_front = [drawn[i] for i in front(drawn, metric)]
    _set_limits(ax, drawn, metric)
    if looks.line:
        _draw_lines(ax, drawn, metric, look_of)
    for each in drawn:
        look = look_of[each.name]
        low, high = _interval(each, metric)
        if len(drawn) <= MAX_BARS and low < high:
            ax.plot([each.gflops] * 2, [low, high], color=look.colour, lw=1, alpha=0.55, zorder=2)
        ax.plot(
            each.gflops,
            each.metrics[metric],
            look.marker,
            color=look.colour,
            markersize=7 if len(drawn) <= 20 else 5.5,
            markeredgecolor=INK if each in on_front else BACKGROUND,
            markeredgewidth=1.3 if each in on_front else 0.6,
            zorder=5 if each in on_front else 4,
        )
    _draw_staircase(ax, on_front, metric)
    if looks.labels:
        some = " of the front" if len(drawn) > MAX_LABELLED else ""
        notes.append(f"Labels{some}: {', '.join(looks.labels)}.")
    if any(_interval(each, metric)[0] < _interval(each, metric)[1] for each in drawn):
        bars = "Bars: 95 % intervals over the samples."
        notes.append(bars if len(drawn) <= MAX_BARS else "Intervals are in the table.")
    if looks.labels and (hidden := _draw_labels(ax, drawn, on_front, metric, looks)):
        left_out = plural(hidden, "label")
        notes.append(f"{left_out} that would overlap left out: the table has all.")


def _interval(each: Outcome, metric: str) -> tuple[float, float]:
    value = each.metrics[metric]
    ends = (each.metrics.get(f"{metric}_{end}", math.nan) for end in ("low", "high"))
    low, high = (end if math.isfinite(end) else value for end in ends)
    return low, high


def _set_limits(ax: Axes, drawn: Sequence[Outcome], metric: str) -> None:
    x = [each.gflops for each in drawn]
    y = [each.metrics[metric] for each in drawn]
    bars = [end for each in drawn for end in _interval(each, metric)]
    spread = max((max(x) / min(x)) ** 0.06, 1.25)
    ax.set_xlim(min(x) / spread, max(x) * spread**1.5)  # labels are to the right
    low, high = min(bars), max(bars)
    if min(y) > 0 and max(y) / min(y) >= 2:
        ax.set_yscale("log")
        ax.set_ylim(min([end for end in bars if end > min(y) / 3]) / 1.2, high * 1.25)
    else:
        span = (high - low) or abs(high) or 1.0
        ax.set_ylim(max(low - 0.08 * span, min(0.0, low)), high + 0.1 * span)
    style.plain_ticks(ax)


def _draw_lines(
    ax: Axes, drawn: Sequence[Outcome], metric: str, look_of: Mapping[str, Look]
) -> None:
    """Join cells that differ only in their steps."""
    series: dict[Any, list[Outcome]] = {}
    for each in drawn:
        rest = tuple(setting_text(v) for axis, v in each.settings.items() if axis != "steps")
        series.setdefault((each.run, rest), []).append(each)
    for cells in series.values():
        cells.sort(key=lambda each: each.gflops)
        ax.plot(
            [each.gflops for each in cells],
            [each.metrics[metric] for each in cells],
            color=look_of[cells[0].name].colour,
            lw=1.1,
            alpha=0.6,
            zorder=3,
        )


def _draw_staircase(ax: Axes, on_front: Sequence[Outcome], metric: str) -> None:
    """The border of what some cell attains: as good a value for as few Gflops."""
    x = [each.gflops for each in on_front]
    y = [each.metrics[metric] for each in on_front]
    x, y = [x[0], *x, ax.get_xlim()[1]], [ax.get_ylim()[1], *y, y[-1]]
    ax.step(x, y, where="post", color=INK, lw=1.2, ls=":", zorder=3, label="Pareto front")


# ---- labels

_LEVELS = (0, 10, -10, 20, -20, 30, -30, 40, -40)
_APART = tuple(
    place
    for dy in _LEVELS
    for dx in (34, 64)
    for place in (LabelPlace(dx, dy, "left", "center"), LabelPlace(-dx, dy, "right", "center"))
)


def _draw_labels(
    ax: Axes, drawn: Sequence[Outcome], on_front: Sequence[Outcome], metric: str, looks: _Looks
) -> int:
    """Label the cells, the best and the front first; return how many labels found no room."""
    point = ax.figure.dpi / style.POINT
    at = {
        each.name: ax.transData.transform((each.gflops, each.metrics[metric])) / point
        for each in drawn
    }
    order = list(reversed(on_front))
    if len(drawn) <= MAX_LABELLED:
        order += [each for each in drawn if each not in on_front]
    frame = ax.get_window_extent()
    columns = _columns(order, at, looks, frame.y0 / point, frame.y1 / point)
    places = [*style.BESIDE, *(_APART if len(drawn) <= MAX_LEADERS else ())]
    labels = [
        Label(
            each.gflops,
            each.metrics[metric],
            " · ".join(value for axis in looks.labels if (value := _of(each, axis)) != "-"),
            [columns[each.name]] if each.name in columns else places,
            "bold" if each is order[0] else "normal",
        )
        for each in sorted(order, key=lambda each: each.name not in columns)
    ]
    return style.place_labels(ax, labels, [(each.gflops, each.metrics[metric]) for each in drawn])


def _columns(
    cells: Sequence[Outcome], at: Mapping[str, Any], looks: _Looks, low: float, high: float
) -> dict[str, LabelPlace]:
    """Name -> place of the label, for cells that crowd on one abscissa.

    `at` are the cells' places and `low`, `high` the ends of the frame, in points. The labels of one
    colour are in a column on the right, those of the next on the left, a line apart, inside the
    frame and as near to their markers as that allows: least squares under an order and bounds, by
    pooling and clipping (Barlow et al. 1972).
    """
    crowds: dict[int, list[Outcome]] = {}
    for each in cells:
        crowds.setdefault(round(at[each.name][0]), []).append(each)
    found: dict[str, LabelPlace] = {}
    for crowd in crowds.values():
        if len(crowd) <= CROWD:
            continue
        colours = list(dict.fromkeys(_of(each, looks.colour) for each in crowd))
        for side in (0, 1):
            column = [each for each in crowd if colours.index(_of(each, looks.colour)) % 2 == side]
            column.sort(key=lambda each: at[each.name][1])
            y = [at[each.name][1] for each in column]
            pools: list[list[float]] = []
            for i, height in enumerate(y):
                pools.append([height - i * LABEL_LINE])
                while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
                    pools[-2:] = [pools[-2] + pools[-1]]
            lowest = low + LABEL_LINE
            highest = max(lowest, high - LABEL_LINE * len(column))
            shifted = [min(max(_mean(pool), lowest), highest) for pool in pools for _ in pool]
            for i, (each, mean) in enumerate(zip(column, shifted, strict=True)):
                dy = mean + i * LABEL_LINE - y[i]
                found[each.name] = (
                    LabelPlace(-30, dy, "right", "center")
                    if side
                    else LabelPlace(30, dy, "left", "center")
                )
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
