"""Quality against the Gflops of sampling, a marker a cell of a grid: the DiT paper's figure 10."""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ditjax.reporting.grid import Outcome, conditions, front, shown, varying, what_varies
from ditjax.reporting.style import COLOURS, LIGHT, MARKERS, Theme, left_title, plain_ticks, png
from ditjax.studies.words import metric_name, plural, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

MAX_LEGEND = 24
MAX_BARS = 60  # intervals of more cells would hide them
MAX_LABELLED = 80  # of more cells the front alone is labelled
MAX_LEADERS = 40  # of more cells no label stands off its marker
CROWD = 6  # more cells of one abscissa, a sweep of guidance scales, get columns of labels
LINE = 10.5  # points from one label of a column to the next
CAPTION_COLUMNS = 148

# Which axis is told by colour, which by marker, which by a label: the last that varies.
_ORDER = ("run", "sampler", "cfg_channels", "weights", "cfg_interval", "eta", "cfg_scale", "steps")


class _Looks(NamedTuple):
    """The axes that colour and marker ('' for none), labels and lines stand for."""

    colour: str
    marker: str
    labels: list[str]
    line: bool


def pareto_png(
    outcomes: Sequence[Outcome], metric: str, protocol: Mapping[str, Any], reference: str
) -> bytes:
    """The PNG: one marker a cell, 95 % intervals where known, the Pareto front as a step line.

    Cells that differ only in their steps are joined. Labels that would overlap are left out.
    """
    return png(lambda theme: _draw(outcomes, metric, protocol, reference, theme), LIGHT)


def _of(each: Outcome, axis: str) -> str:
    return short(each.run, 30) if axis == "run" else shown(each.settings.get(axis))


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
    outcomes: Sequence[Outcome],
    metric: str,
    protocol: Mapping[str, Any],
    reference: str,
    theme: Theme,
) -> "Figure":
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    name, looks = metric_name(metric), _looks(outcomes)
    drawn = [each for each in outcomes if math.isfinite(each.metrics.get(metric, math.nan))]
    colour_of = _palette(outcomes, looks.colour, COLOURS)
    # Beyond the six colours the markers tell colours of the same name apart.
    marker_axis = looks.marker or looks.colour
    marker_of = _palette(outcomes, marker_axis, MARKERS)
    figure, ax = plt.subplots(figsize=(9.6, 6.0), layout="constrained")
    ax.set_xscale("log")
    ax.set_xlabel("Gflops of sampling one image (multiply-accumulates / 10⁹ of all evaluations)")
    ax.set_ylabel(f"{name} (lower is better)")
    ax.grid(True, which="major", lw=0.7)
    figure.suptitle(
        f"{name} against sampling compute", x=0.01, ha="left", fontsize=13, fontweight="bold"
    )
    if not drawn:
        ax.text(0.5, 0.5, f"no cell has {name}", transform=ax.transAxes, ha="center")
        return figure
    on_front = [drawn[i] for i in front(drawn, metric)]
    _limits(ax, drawn, metric)
    if looks.line:
        _lines(ax, drawn, metric, lambda each: colour_of[_of(each, looks.colour)])
    for each in drawn:
        colour = colour_of[_of(each, looks.colour)]
        low, high = _interval(each, metric)
        if len(drawn) <= MAX_BARS and low < high:
            ax.plot([each.gflops] * 2, [low, high], color=colour, lw=1, alpha=0.55, zorder=2)
        ax.plot(
            each.gflops,
            each.metrics[metric],
            marker_of[_of(each, marker_axis)],
            color=colour,
            markersize=7 if len(drawn) <= 20 else 5.5,
            markeredgecolor=theme.ink if each in on_front else theme.background,
            markeredgewidth=1.3 if each in on_front else 0.6,
            zorder=5 if each in on_front else 4,
        )
    _staircase(ax, on_front, metric, theme)
    entries = [Line2D([], [], color=theme.ink, lw=1.2, ls=":", label="Pareto front")]
    for axis, palette in ((looks.colour, colour_of), (looks.marker, marker_of)):
        for value, look in palette.items() if axis else ():
            colour, marker = (look, "o") if axis == looks.colour else (theme.faint, look)
            if axis == looks.colour and not looks.marker:
                marker = marker_of[value]
            label = value if axis == "run" else f"{axis} {value}" if value != "-" else f"no {axis}"
            entries.append(Line2D([], [], ls="", marker=marker, ms=6, color=colour, label=label))
    if len(entries) > MAX_LEGEND:
        more = f"and {len(entries) - MAX_LEGEND} more"
        entries = [*entries[:MAX_LEGEND], Line2D([], [], ls="", label=more)]
    legend = ax.legend(
        handles=entries, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, fontsize=8.5
    )
    left_title(legend)
    words = [conditions(outcomes, protocol, reference), what_varies(outcomes, varying(outcomes))]
    if looks.labels:
        some = " of the front" if len(drawn) > MAX_LABELLED else ""
        words.append(f"Labels{some}: {', '.join(looks.labels)}.")
    if any(_interval(each, metric)[0] < _interval(each, metric)[1] for each in drawn):
        bars = "Bars: 95 % intervals over the samples."
        words.append(bars if len(drawn) <= MAX_BARS else "Intervals are in the table.")
    if len(drawn) < len(outcomes):
        words.append(f"{plural(len(outcomes) - len(drawn), 'cell')} without {name} not drawn.")
    # Room for one line more than is known yet.
    room = len(textwrap.wrap(" ".join(words), CAPTION_COLUMNS)) + 1
    height = 0.0285 * room + 0.01
    figure.set_layout_engine("constrained", rect=(0, height, 1, 1 - height))
    hidden = _label(ax, drawn, on_front, metric, looks, theme) if looks.labels else 0
    if hidden:
        words.append(f"{plural(hidden, 'label')} that would overlap left out: the table has all.")
    caption = "\n".join(textwrap.wrap(" ".join(words), CAPTION_COLUMNS))
    figure.text(0.012, 0.012, caption, fontsize=8.5, color=theme.faint, va="bottom")
    return figure


def _palette(outcomes: Sequence[Outcome], axis: str, looks: Sequence[str]) -> dict[str, str]:
    """Value of an axis -> colour or marker, in order; again from the first after the last."""
    values = dict.fromkeys(_of(each, axis) for each in outcomes)
    return dict(zip(values, itertools.cycle(looks), strict=False))


def _interval(each: Outcome, metric: str) -> tuple[float, float]:
    value = each.metrics[metric]
    ends = (each.metrics.get(f"{metric}_{end}", math.nan) for end in ("low", "high"))
    low, high = (end if math.isfinite(end) else value for end in ends)
    return low, high


def _limits(ax: "Axes", drawn: Sequence[Outcome], metric: str) -> None:
    x = [each.gflops for each in drawn]
    y = [each.metrics[metric] for each in drawn]
    bars = [end for each in drawn for end in _interval(each, metric)]
    spread = max((max(x) / min(x)) ** 0.06, 1.25)
    ax.set_xlim(min(x) / spread, max(x) * spread**1.5)  # labels stand to the right
    if min(y) > 0 and max(y) / min(y) >= 2:
        ax.set_yscale("log")
        low = min([end for end in bars if end > min(y) / 3], default=min(y))
        ax.set_ylim(low / 1.2, max(bars) * 1.25)
    else:
        span = (max(bars) - min(bars)) or abs(max(bars)) or 1.0
        ax.set_ylim(max(min(bars) - 0.08 * span, min(0.0, min(bars))), max(bars) + 0.1 * span)
    plain_ticks(ax)


def _lines(ax: "Axes", drawn: Sequence[Outcome], metric: str, colour_of: Any) -> None:
    """Joins cells that differ only in their steps."""
    series: dict[Any, list[Outcome]] = {}
    for each in drawn:
        rest = tuple(shown(v) for axis, v in each.settings.items() if axis != "steps")
        series.setdefault((each.run, rest), []).append(each)
    for cells in series.values():
        cells.sort(key=lambda each: each.gflops)
        ax.plot(
            [each.gflops for each in cells],
            [each.metrics[metric] for each in cells],
            color=colour_of(cells[0]),
            lw=1.1,
            alpha=0.6,
            zorder=3,
        )


def _staircase(ax: "Axes", on_front: Sequence[Outcome], metric: str, theme: Theme) -> None:
    """The border of what some cell attains: as good for as few Gflops."""
    x = [each.gflops for each in on_front]
    y = [each.metrics[metric] for each in on_front]
    right, top = ax.get_xlim()[1], ax.get_ylim()[1]
    ax.step(
        [x[0], *x, right], [top, *y, y[-1]], where="post", color=theme.ink, lw=1.2, ls=":", zorder=3
    )


def _label(
    ax: "Axes",
    drawn: Sequence[Outcome],
    on_front: Sequence[Outcome],
    metric: str,
    looks: _Looks,
    theme: Theme,
) -> int:
    """A label beside each marker where it covers no marker and no other label; how many did not.

    The best cell and the front come first.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure = ax.figure
    figure.draw_without_rendering()  # type: ignore[union-attr]
    points = figure.dpi / 72
    at = {each.name: ax.transData.transform((each.gflops, each.metrics[metric])) for each in drawn}
    taken = [
        Bbox.from_extents(x - 4 * points, y - 4 * points, x + 4 * points, y + 4 * points)
        for x, y in at.values()
    ]
    inside, hidden = ax.get_window_extent(), 0
    order = list(reversed(on_front))
    if len(drawn) <= MAX_LABELLED:
        order += [each for each in drawn if each not in on_front]
    columns = _columns(order, at, looks, inside, points)
    best, order = order[0], sorted(order, key=lambda each: each.name not in columns)
    places = [*_BESIDE, *(_APART if len(drawn) <= MAX_LEADERS else ())]
    for each in order:
        words = " · ".join(value for axis in looks.labels if (value := _of(each, axis)) != "-")
        for dx, dy, ha, va in [columns[each.name]] if each.name in columns else places:
            text = ax.annotate(
                words,
                (each.gflops, each.metrics[metric]),
                (dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=8,
                color=theme.ink,
                zorder=6,
                fontweight="bold" if each is best else None,
                path_effects=[withStroke(linewidth=2, foreground=theme.background)],
                arrowprops={"arrowstyle": "-", "color": theme.faint, "lw": 0.5}
                if abs(dx) > 8
                else None,
            )
            text.set_in_layout(False)
            text.get_window_extent()  # puts it in its place
            box = Text.get_window_extent(text)  # without the line to its marker
            if _within(box, inside) and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
        else:
            hidden += 1
    return hidden


_Place = tuple[float, float, Literal["left", "center", "right"], Literal["top", "center", "bottom"]]


def _columns(
    cells: Sequence[Outcome], at: Mapping[str, Any], looks: _Looks, inside: "Bbox", points: float
) -> dict[str, _Place]:
    """Name -> place of the label, for cells that crowd on one abscissa.

    One colour's labels stand on the right, the next one's on the left, a line apart, in the frame
    and as near to their markers as that allows: least squares under an order and bounds, by pooling
    and clipping (Barlow et al. 1972).
    """
    crowds: dict[int, list[Outcome]] = {}
    for each in cells:
        crowds.setdefault(round(at[each.name][0]), []).append(each)
    found: dict[str, _Place] = {}
    for crowd in crowds.values():
        if len(crowd) <= CROWD:
            continue
        colours = list(dict.fromkeys(_of(each, looks.colour) for each in crowd))
        for side in (0, 1):
            column = [each for each in crowd if colours.index(_of(each, looks.colour)) % 2 == side]
            column.sort(key=lambda each: at[each.name][1])
            y = [at[each.name][1] / points for each in column]
            pools: list[list[float]] = []
            for i, height in enumerate(y):
                pools.append([height - i * LINE])
                while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
                    pools[-2:] = [pools[-2] + pools[-1]]
            low = inside.y0 / points + LINE
            high = max(low, inside.y1 / points - LINE * len(column))
            shifted = [min(max(_mean(pool), low), high) for pool in pools for _ in pool]
            for i, (each, mean) in enumerate(zip(column, shifted, strict=True)):
                dy = mean + i * LINE - y[i]
                found[each.name] = (
                    (-30, dy, "right", "center") if side else (30, dy, "left", "center")
                )
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# Offsets in points, and how the label is aligned there.
_BESIDE: tuple[_Place, ...] = (
    (5, 4, "left", "bottom"),
    (6, 0, "left", "center"),
    (5, -4, "left", "top"),
    (0, 6, "center", "bottom"),
    (0, -6, "center", "top"),
    (-6, 0, "right", "center"),
    (-5, 5, "right", "bottom"),
    (-5, -5, "right", "top"),
)
_LEVELS = (0, 10, -10, 20, -20, 30, -30, 40, -40)
_APART: tuple[_Place, ...] = tuple(
    place
    for dy in _LEVELS
    for dx in (34, 64)
    for place in ((dx, dy, "left", "center"), (-dx, dy, "right", "center"))
)


def _within(box: "Bbox", frame: "Bbox") -> bool:
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
