"""The look of every figure: colours and markers, plain axes, labels that do not overlap, PNG, SVG.

Figures are drawn once, in the light colours below. In an SVG each of them becomes a CSS variable,
so that the page's style sheet makes a plot light or dark.
"""

import contextlib
import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.rcsetup import cycler
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

BACKGROUND, INK, FAINT, GRID = "#ffffff", "#1b1f24", "#59636e", "#e4e7eb"
ACCENT = "#9a3412"  # predictions
# Okabe & Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
# Matplotlib's markers, and how they read in a line of text.
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}
POINT = 72.0  # points per inch; one is also a unit of an SVG's viewBox

# The variables of page.css.jinja.
_VARIABLES = {
    BACKGROUND: "--bg",
    INK: "--ink",
    FAINT: "--faint",
    GRID: "--grid",
    ACCENT: "--mark",
    **{colour: f"--c{i}" for i, colour in enumerate(COLOURS)},
}


class Look(NamedTuple):
    """A colour and a matplotlib marker."""

    colour: str
    marker: str


class Key(NamedTuple):
    """What the colours or the markers of a plot stand for: the look of each value."""

    title: str
    values: dict[str, Look]


_STYLE: Any = {
    "figure.facecolor": BACKGROUND,
    "axes.facecolor": BACKGROUND,
    "savefig.facecolor": BACKGROUND,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "grid.color": GRID,
    "axes.grid": True,
    "axes.grid.which": "major",
    "grid.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.prop_cycle": cycler(color=COLOURS),
    "font.size": 10,
    "legend.frameon": False,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0,
    "legend.fontsize": 9,
    "legend.title_fontsize": 9,
    "text.parse_math": False,  # a run's name may hold a dollar sign
    "svg.fonttype": "none",
    "path.simplify": False,  # the page's script reads the points
}


def variable(colour: str) -> str:
    """A colour of a figure as the page's style sheet names it."""
    return f"var({_VARIABLES[colour]})"


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Matplotlib in this style. A figure is drawn and saved inside."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # names of any script
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in points."""
    figure = Figure(figsize=(width / POINT, height / POINT))
    FigureCanvasAgg(figure)
    return figure


LEFT, RIGHT, TOP, BOTTOM = 42.0, 10.0, 22.0, 40.0  # points around the axes of a plot
LINE = 15.0  # points from one entry of a legend to the next
MAX_KEY = 16  # values of a key in a figure


def plot_figure(
    draws: Sequence[Callable[[Axes], None]],
    width: float,
    height: float,
    *,
    columns: int = 1,
    title: str = "",
    notes: Sequence[str] = (),
    keys: Sequence[Key] = (),
) -> Figure:
    """Plots one below the other, each `width` x `height` points with what is around its axes.

    Each of `draws` draws on one of the axes; whatever it gives a label is listed below, in as many
    columns. The keys are to the right of the plots, the title above them, the notes below.
    """
    names = [words for key in keys for words in (key.title, *key.values)]
    whole = width + (44 + 6 * max(map(len, names)) if keys else 0)
    figure, tops, listed = new_figure(whole, height), [], []
    total = 26.0 if title else 0.0
    for draw in draws:
        ax = figure.add_axes((0, 0, 1, 1))
        _put(figure, ax, height - TOP, width, height)
        draw(ax)
        tops.append(total + TOP)
        listed.append(ax.get_legend_handles_labels())
        total += height + LINE * -(-len(listed[-1][0]) // columns)
    lines = [line for note in notes for line in textwrap.wrap(note, int((width - LEFT) / 4.6))]
    total += 12.5 * len(lines) + 6 * bool(lines)
    total = max(total, sum(LINE * (min(len(key.values), MAX_KEY) + 2) for key in keys) + TOP)
    figure.set_size_inches(whole / POINT, total / POINT)
    for ax, top, (handles, labels) in zip(figure.axes, tops, listed, strict=True):
        _put(figure, ax, total - top, width, height)
        below = (LEFT / whole, 1 - (top - TOP + height) / total)
        figure.legend(handles, labels, loc="upper left", bbox_to_anchor=below, ncols=columns)
    figure.text(LEFT / whole, 1 - 6 / total, title, fontsize=13, fontweight="bold", va="top")
    foot = "\n".join(lines)
    figure.text(LEFT / whole, 4 / total, foot, fontsize=8.5, color=FAINT, va="bottom")
    beside = total - tops[0]
    for key in keys:
        _add_key(figure, key, (width + 8) / whole, beside / total)
        beside -= LINE * (min(len(key.values), MAX_KEY) + 2)
    return figure


def _put(figure: Figure, ax: Axes, top: float, width: float, height: float) -> None:
    """Put the top of axes so many points above the foot of the figure."""
    whole, total = figure.get_size_inches() * POINT
    inner, high = width - LEFT - RIGHT, height - TOP - BOTTOM
    ax.set_position((LEFT / whole, (top - high) / total, inner / whole, high / total))


def _add_key(figure: Figure, key: Key, x: float, y: float) -> None:
    """A legend of looks whose upper left corner is at (x, y) of the figure."""
    shown = list(key.values.items())[:MAX_KEY]
    handles = [
        Line2D([], [], ls="", marker=look.marker, ms=7, color=look.colour, label=words)
        for words, look in shown
    ]
    if len(shown) < len(key.values):
        handles.append(Line2D([], [], ls="", label=f"and {len(key.values) - len(shown)} more"))
    figure.legend(
        handles=handles,
        title=key.title,
        alignment="left",
        loc="upper left",
        bbox_to_anchor=(x, y),
    )


def png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure, about: str) -> str:
    """The figure as an <svg> to put into a page.

    `about` describes it to those who do not see it, and must differ between the SVGs of a page.
    A line with the gid "run-3" becomes a group with data-r="3", "published-run-3" one of the class
    `published` too.
    """
    for text in figure.findobj(Text):
        text.set_path_effects([])  # else they would be outlines, and not text
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": about}):  # names that no other SVG has
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=empty)
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        _simplify(element)
    root.remove(root[0])  # a style sheet that would hold for the whole page
    view = root.attrib["viewBox"]
    root.attrib = {"viewBox": view, "role": "img", "tabindex": "0", "aria-label": about}
    return ElementTree.tostring(root, encoding="unicode")


def _simplify(element: ElementTree.Element) -> None:
    """Keeps of an element what a page needs, its colours as variables."""
    element.tag = element.tag.rpartition("}")[2]
    element.tail = None
    kept: dict[str, str] = {}
    for name, value in element.attrib.items():
        name = name.rpartition("}")[2]
        if name == "id" and element.tag == "g":
            if found := re.fullmatch(r"(published-)?run-(\d+)|published", value):
                kept |= {"class": "published"} if value.startswith("published") else {}
                kept |= {"data-r": found[2]} if found[2] else {}
            continue
        if name == "style":
            value = re.sub(r"font-family: [^;]*;? ?", "", value)
            value = re.sub(r"#[0-9a-f]{6}", lambda found: variable(found[0]), value)
        elif name in ("d", "x", "y"):
            value = re.sub(r"(\.\d\d)\d+", r"\1", value).replace(" \n", "")
        elif name == "transform" and value.startswith("rotate(-0 "):
            continue
        kept[name] = value
    element.attrib = kept


# ---- axes

_DIGITS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def tick_label(value: float, _: float | None = None) -> str:
    """0.0001, 0.15, 20, 5000, and from 10⁵ and below 10⁻⁴ as powers: 2·10⁶."""
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    if -5 < power < 5:
        return f"{value:.9f}".rstrip("0").rstrip(".")
    digit = f"{value / 10.0**power:.3g}"
    ten = "10" + str(power).translate(_DIGITS)
    return ten if digit == "1" else f"{digit}·{ten}"


def frame(
    ax: Axes,
    x: Iterable[float],
    y: Iterable[float],
    x_title: str = "",
    y_title: str = "",
    *,
    log_x: bool | None = True,
    log_y: bool | None = None,
) -> None:
    """Make axes hold the values x and y with some room, with plain ticks and their titles.

    Where `log` is None, an axis is logarithmic if its values span a decade. A linear axis begins at
    0, since its values are distances and losses. Values that are not positive and finite are
    ignored; without any an axis runs from 0.1 to 10.
    """
    low, high, scale = _limits(x, log_x)
    ax.set_xscale(scale)
    ax.set_xlim(low, high)
    low, high, scale = _limits(y, log_y)
    ax.set_yscale(scale)
    ax.set_ylim(low, high)
    ax.set_xlabel(x_title, loc="right")
    ax.set_title(y_title, loc="left")
    plain_ticks(ax)


def _limits(values: Iterable[float], log: bool | None) -> tuple[float, float, str]:
    kept = [float(value) for value in values if math.isfinite(value) and value > 0]
    low, high = (min(kept), max(kept)) if kept else (0.1, 10.0)
    if high / low < 8 if log is None else not log:
        return 0.0, high * 1.08, "linear"
    room = max((high / low) ** 0.06, 1.12)
    return low / room, high * room, "log"


def plain_ticks(ax: Axes) -> None:
    """Label a few ticks of each axis that do not touch: 1, 2, 5 and decades, or even steps."""
    box = ax.get_window_extent()
    for axis, length, room in ((ax.xaxis, box.width, 52.0), (ax.yaxis, box.height, 34.0)):
        most = max(3, int(length / ax.figure.dpi * POINT / room))
        axis.set_major_locator(FixedLocator(ticks(axis, most)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(tick_label))


def ticks(axis: Axis, most: int) -> list[float]:
    """At most `most` places of ticks inside the view, or one more."""
    low, high = axis.get_view_interval()

    def inside(found: Iterable[float]) -> list[float]:
        return [float(value) for value in found if low <= value <= high]

    if axis.get_scale() == "log":
        found = inside(LogLocator(numticks=most).tick_values(low, high))  # decades
        for digits in ((1, 3), (1, 2, 5), (1, 2, 3, 5), (1, 1.5, 2, 3, 4, 5, 7)):
            finer = inside(LogLocator(subs=digits, numticks=999).tick_values(low, high))
            found = finer if len(finer) <= most else found
        # A short piece of a logarithmic axis is almost even.
        if len(found) > 2 or high >= 10 * low:
            return found
    return inside(MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(low, high))


# ---- labels


class LabelPlace(NamedTuple):
    """Where a label may be: its offset from the point, in points, and how it is aligned there."""

    dx: float
    dy: float
    ha: Literal["left", "center", "right"]
    va: Literal["top", "center", "bottom"]


BESIDE = (
    LabelPlace(5, 4, "left", "bottom"),
    LabelPlace(6, 0, "left", "center"),
    LabelPlace(5, -4, "left", "top"),
    LabelPlace(0, 6, "center", "bottom"),
    LabelPlace(0, -6, "center", "top"),
    LabelPlace(-6, 0, "right", "center"),
    LabelPlace(-5, 5, "right", "bottom"),
    LabelPlace(-5, -5, "right", "top"),
)


class Label(NamedTuple):
    """Words for the point (x, y), and where they may be, the best place first."""

    x: float
    y: float
    words: str
    places: Sequence[LabelPlace] = BESIDE
    weight: Literal["normal", "bold"] = "normal"


def place_labels(
    ax: Axes, labels: Sequence[Label], markers: Sequence[tuple[float, float]], colour: str = INK
) -> int:
    """Write each label at the first of its places that is free; return how many have none.

    A place is free inside the axes and off the markers at `markers` and the labels before it. A
    label that is far from its point has a thin line to it. The axes' limits must be final.
    """
    point = ax.figure.dpi / POINT
    inside = ax.get_window_extent()
    taken = [
        Bbox.from_extents(x - 4 * point, y - 4 * point, x + 4 * point, y + 4 * point)
        for x, y in ax.transData.transform(np.reshape(markers, (-1, 2)))
    ]
    hidden = 0
    for label in labels:
        for place in label.places:
            text = ax.annotate(
                label.words,
                (label.x, label.y),
                (place.dx, place.dy),
                textcoords="offset points",
                ha=place.ha,
                va=place.va,
                fontsize=8,
                fontweight=label.weight,
                color=colour,
                zorder=6,
                path_effects=[withStroke(linewidth=2, foreground=BACKGROUND)],
                arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 0.5}
                if abs(place.dx) > 8
                else None,
            )
            text.set_in_layout(False)
            text.get_window_extent()  # puts it in its place
            box = Text.get_window_extent(text)  # without the line to its point
            if _within(box, inside) and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
        else:
            hidden += 1
    return hidden


def _within(box: Bbox, frame: Bbox) -> bool:
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
