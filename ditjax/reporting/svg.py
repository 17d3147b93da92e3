"""Plots as inline SVG: scales, ticks and marks. Pure: numbers in, markup out, every text escaped.

Colours, fonts and widths are the page's (page.css.jinja), so a plot is light or dark with it. What
belongs to a run carries `data-r`, the number of its row in the table: page.js.jinja links them.
"""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ditjax.files.masking import visible

COLOURS = 6  # classes c0 to c5
# Paths about (0, 0), told apart without colour; the radius is 4 to 5 units.
MARKERS = (
    "M-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0-8.4 0Z",
    "M-3.8-3.8h7.6v7.6h-7.6Z",
    "M0-5L4.8 3.6H-4.8Z",
    "M0-5.2L5 0L0 5.2L-5 0Z",
    "M0 5L4.8-3.6H-4.8Z",
    "M-1.7-5h3.4v3.3H5v3.4H1.7V5h-3.4V1.7H-5v-3.4h3.3Z",
    "M-4.5-2L0-5L4.5-2L2.8 4H-2.8Z",
    "M0-5.6L1.6-1.8L5.3-1.7L2.4.8L3.4 4.5L0 2.4L-3.4 4.5L-2.4.8L-5.3-1.7L-1.6-1.8Z",
)
CROSS = "M-4.5-4.5L4.5 4.5M-4.5 4.5L4.5-4.5"
_CHARACTER = 6.6  # width of a character of 12 units, on the wide side
_DIGITS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def label(value: float) -> str:
    """0.0001, 0.15, 20, 5000, and from 10⁵ and below 10⁻⁴ as powers: 2·10⁶."""
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    if -5 < power < 5:
        return f"{value:.9f}".rstrip("0").rstrip(".")
    digit = f"{value / 10.0**power:.3g}"
    ten = "10" + str(power).translate(_DIGITS)
    return ten if digit == "1" else f"{digit}·{ten}"


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, linear or logarithmic, the ends of the frame; `show` words a tick."""

    title: str
    low: float
    high: float
    log: bool
    show: Callable[[float], str] = label

    def place(self, value: float) -> float:
        """0 at low, 1 at high."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def holds(self, value: float) -> bool:
        return math.isfinite(value) and self.low <= value <= self.high


def axis(
    title: str,
    values: Iterable[float],
    *,
    log: bool | None = None,
    show: Callable[[float], str] = label,
) -> Axis:
    """An axis that holds the values with some room; logarithmic over a decade where `log` is None.

    A linear axis begins at 0, since its values are distances and losses. Values that are not
    positive and finite are passed over; without any it runs from 0.1 to 10.
    """
    kept = [float(value) for value in values if math.isfinite(value) and value > 0]
    low, high = (min(kept), max(kept)) if kept else (0.1, 10.0)
    if log is None:
        log = high / low >= 8
    if not log:
        return Axis(title, 0.0, high * 1.08, False, show)
    room = max((high / low) ** 0.06, 1.12)
    return Axis(title, low / room, high * room, True, show)


def ticks(of: Axis, most: int) -> list[tuple[float, str]]:
    """(value, label), at most `most` of them: 1, 2, 5 and decades, or even steps."""
    found = _logarithmic(of, most) if of.log else []
    # A short piece of a logarithmic axis is almost even.
    if not of.log or (len(found) < 3 and of.high < 10 * of.low):
        step = _even_step((of.high - of.low) / most)
        first = math.ceil(of.low / step - 1e-9)
        last = math.floor(of.high / step + 1e-9)
        found = [i * step for i in range(first, last + 1)]
    return [(value, of.show(value)) for value in found]


def _logarithmic(of: Axis, most: int) -> list[float]:
    low, high = math.floor(math.log10(of.low)), math.ceil(math.log10(of.high))
    found: list[float] = []
    for within in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [
            float(f"{digit}e{power}")
            for power in range(low, high + 1)
            for digit in within
            if of.holds(float(f"{digit}e{power}"))
        ]
        if len(found) <= most:
            return found
    every = -(-len(found) // most)
    return [value for value in found if round(math.log10(value)) % every == 0]


def _even_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is `least` or more."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least * (1 - 1e-9))


class Looks(NamedTuple):
    """Colour and marker of a run, as indices."""

    colour: int
    marker: int


@dataclass
class Plot:
    """Marks gathered one after another; `markup` makes the <svg>. Later ones lie above."""

    x: Axis
    y: Axis
    about: str  # what is drawn, for those who do not see it
    width: int = 440
    height: int = 330
    _marks: list[str] = field(default_factory=list)

    LEFT, RIGHT, TOP, BOTTOM = 50, 12, 26, 44

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Data -> units of the viewBox."""
        across = self.LEFT + self.x.place(x) * (self.width - self.LEFT - self.RIGHT)
        down = self.height - self.BOTTOM - self.y.place(y) * (self.height - self.TOP - self.BOTTOM)
        return across, down

    def spot(
        self, x: float, y: float, looks: Looks, row: int | None = None, kind: str = ""
    ) -> None:
        """A marker of a run; outside of the axes there is none. `kind`: more classes."""
        if not (self.x.holds(x) and self.y.holds(y)):
            return
        across, down = self.at(x, y)
        shape = MARKERS[looks.marker % len(MARKERS)]
        size = " scale(.7)" if kind == "small" else ""
        self._marks.append(
            f'<path class="s c{looks.colour % COLOURS}{_more(kind)}"{_row(row)}'
            f' transform="translate({across:.1f} {down:.1f}){size}" d="{shape}"/>'
        )

    def cross(self, x: float, y: float, kind: str = "") -> None:
        """A place that no run stands for, such as a prediction."""
        if self.x.holds(x) and self.y.holds(y):
            across, down = self.at(x, y)
            self._marks.append(
                f'<path class="cross{_more(kind)}" d="{CROSS}"'
                f' transform="translate({across:.1f} {down:.1f})"/>'
            )

    def line(
        self,
        xs: Iterable[float],
        ys: Iterable[float],
        kind: str,
        row: int | None = None,
        colour: int | None = None,
    ) -> None:
        """Straight pieces through the points inside of the axes; at least two are needed."""
        places = [
            "{:.1f},{:.1f}".format(*self.at(x, y))
            for x, y in zip(xs, ys, strict=True)
            if self.x.holds(x) and self.y.holds(y)
        ]
        if len(places) < 2:
            return
        shade = "" if colour is None else f" c{colour % COLOURS}"
        self._marks.append(
            f'<polyline class="{kind}{shade}"{_row(row)} points="{" ".join(places)}"/>'
        )

    def bar(self, x: float, low: float, high: float, kind: str, colour: int | None = None) -> None:
        """A vertical stroke from low to high, cut off at the frame."""
        low, high = max(low, self.y.low), min(high, self.y.high)
        if self.x.holds(x) and low < high:
            self.line([x, x], [low, high], kind, colour=colour)

    def level(self, y: float, words: str) -> None:
        """A horizontal line across the frame, with words above its left end."""
        if not self.y.holds(y):
            return
        self.line([self.x.low, self.x.high], [y, y], "level")
        across, down = self.at(self.x.low, y)
        self._marks.append(_text(across + 4, down - 4, words, "note"))

    def note(self, words: str) -> None:
        """In the middle, where there is nothing to draw."""
        self._marks.append(_text(self.width / 2, self.height / 2, words, "note", "middle"))

    def name(self, x: float, y: float, words: str, taken: "Taken") -> None:
        """Words beside a spot, where no others are; none where there is no room."""
        if not (self.x.holds(x) and self.y.holds(y)):
            return
        across, down = self.at(x, y)
        wide = _CHARACTER * 0.92 * len(words)
        for left, base, anchor in (
            (across + 8, down + 4, "start"),
            (across - 8 - wide, down + 4, "end"),
            (across - wide / 2, down - 9, "middle"),
            (across - wide / 2, down + 17, "middle"),
        ):
            box = (left, base - 10, left + wide, base + 3)
            inside = left > self.LEFT + 2 and left + wide < self.width - 2
            if inside and base - 10 > self.TOP and taken.take(box):
                place = {"start": left, "end": left + wide, "middle": left + wide / 2}[anchor]
                self._marks.append(_text(place, base, words, "name", anchor))
                return

    def markup(self) -> str:
        """The <svg>: frame, grid and ticks below, the marks above."""
        parts = [
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" tabindex="0"'
            f' aria-label="{_escaped(self.about)}" data-x="{_of(self.x)}" data-y="{_of(self.y)}"'
            f' data-frame="{self.LEFT},{self.TOP},{self.width - self.RIGHT},'
            f'{self.height - self.BOTTOM}">'
        ]
        left, bottom = self.at(self.x.low, self.y.low)
        right, top = self.at(self.x.high, self.y.high)
        wide = (right - left) / 62
        for value, words in _apart(self.x, ticks(self.x, int(wide)), right - left):
            across, _ = self.at(value, self.y.low)
            parts.append(f'<path class="grid" d="M{across:.1f} {top:.1f}V{bottom:.1f}"/>')
            parts.append(_text(across, bottom + 16, words, "tick", "middle"))
        for value, words in ticks(self.y, max(3, int((bottom - top) / 42))):
            _, down = self.at(self.x.low, value)
            parts.append(f'<path class="grid" d="M{left:.1f} {down:.1f}H{right:.1f}"/>')
            parts.append(_text(left - 6, down + 4, words, "tick", "end"))
        parts.append(f'<path class="frame" d="M{left:.1f} {bottom:.1f}H{right:.1f}"/>')
        parts.append(_text(right, self.height - 8, self.x.title, "axis", "end"))
        parts.append(_text(4, 14, self.y.title, "axis"))
        return "".join([*parts, *self._marks, "</svg>"])


class Taken:
    """Boxes (left, top, right, bottom) that words already have."""

    def __init__(self) -> None:
        self._boxes: list[tuple[float, float, float, float]] = []

    def take(self, box: tuple[float, float, float, float]) -> bool:
        """False, and nothing taken, where it would lie over another."""
        left, top, right, bottom = box
        for its_left, its_top, its_right, its_bottom in self._boxes:
            if its_left < right and left < its_right and its_top < bottom and top < its_bottom:
                return False
        self._boxes.append(box)
        return True


def glyph(looks: Looks, kind: str = "") -> str:
    """A marker alone, for a legend."""
    shape = MARKERS[looks.marker % len(MARKERS)]
    return (
        '<svg class="glyph" viewBox="-7 -7 14 14" aria-hidden="true">'
        f'<path class="s c{looks.colour % COLOURS}{_more(kind)}" d="{shape}"/></svg>'
    )


def cross_glyph(kind: str) -> str:
    """A cross alone, for a legend."""
    return (
        '<svg class="glyph" viewBox="-7 -7 14 14" aria-hidden="true">'
        f'<path class="cross {kind}" d="{CROSS}"/></svg>'
    )


def stroke(kind: str, colour: int | None = None) -> str:
    """A piece of line alone, for a legend."""
    shade = "" if colour is None else f" c{colour % COLOURS}"
    return (
        '<svg class="glyph wide" viewBox="0 -7 26 14" aria-hidden="true">'
        f'<polyline class="{kind}{shade}" points="1,0 25,0"/></svg>'
    )


def _apart(of: Axis, found: Sequence[tuple[float, str]], length: float) -> list[tuple[float, str]]:
    """Those ticks whose words do not touch, from the left."""
    kept, end = [], -math.inf
    for value, words in found:
        middle, half = of.place(value) * length, len(words) * _CHARACTER / 2
        if middle - half >= end + 4:
            kept.append((value, words))
            end = middle + half
    return kept


def _of(of: Axis) -> str:
    """An axis as the page's script reads it."""
    return _escaped(f"{of.low!r} {of.high!r} {int(of.log)} {of.title}")


def _row(row: int | None) -> str:
    return "" if row is None else f' data-r="{row}"'


def _more(kind: str) -> str:
    return f" {kind}" if kind else ""


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    side = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{side}>{_escaped(words)}</text>'


def _escaped(text: str) -> str:
    """For an element's text or a quoted attribute."""
    return html.escape(visible(text), quote=True)
