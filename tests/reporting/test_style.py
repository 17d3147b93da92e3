"""Figures: ticks that do not collide, axes that hold their values, and SVG that a page can take."""

import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.text import Annotation, Text

from ditjax.reporting.style import (
    COLOURS,
    FAINT,
    LINE,
    Key,
    Label,
    Look,
    frame,
    new_figure,
    place_labels,
    plain_ticks,
    plot_figure,
    styled,
    svg,
    tick_label,
    ticks,
)
from ditjax.studies.words import short


@pytest.fixture(autouse=True)
def in_style():
    with styled():
        yield


@pytest.fixture
def ax():
    return new_figure(340, 260).add_axes((0.15, 0.15, 0.8, 0.7))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_ticks_lie_inside_and_are_few(ax, seed, log):
    rng = np.random.default_rng(seed)
    low = 10.0 ** rng.uniform(-9, 9)
    values = low * 10.0 ** rng.uniform(0.01, 9, size=5)
    frame(ax, values, values, log_x=log, log_y=log)
    for most in (3, 5, 8):
        found = ticks(ax.xaxis, most)
        assert 1 <= len(found) <= most + 1
        assert found == sorted(set(found))
        assert ax.get_xlim()[0] <= found[0]
        assert found[-1] <= ax.get_xlim()[1]
        assert len({tick_label(value) for value in found}) == len(found)


@pytest.mark.parametrize("seed", range(20))
def test_labels_of_ticks_do_not_touch(ax, seed):
    rng = np.random.default_rng(seed)
    values = 10.0 ** (rng.uniform(-6, 6) + rng.uniform(0.01, 6, size=5))
    frame(ax, values, values, log_y=bool(seed % 2))
    plain_ticks(ax)
    for axis, first, second in ((ax.xaxis, "x0", "x1"), (ax.yaxis, "y0", "y1")):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
        ends = [(getattr(box, first), getattr(box, second)) for box in boxes]
        assert all(end < start for (_, end), (start, _) in pairwise(ends))


SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def test_a_tick_reads_as_its_value():
    for value in (1e-9, 2e-6, 1e-4, 0.001, 0.15, 1.0, 20.0, 5e4, 1e5, 2e6, 1.5e10):
        power = re.fullmatch(r"(?:(\d+\.?\d*)·)?10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", tick_label(value))
        digit, exponent = power.groups() if power else (tick_label(value), "⁰")
        read = float(digit or 1) * 10.0 ** int(exponent.translate(SUPERSCRIPTS))
        assert read == pytest.approx(value, rel=1e-9)
        assert len(tick_label(value)) <= 8
    assert tick_label(1e-4) == "0.0001"
    assert tick_label(1e-5) == "10⁻⁵"
    assert tick_label(2e6) == "2·10⁶"
    assert tick_label(0.15) == "0.15"


def test_an_axis_is_logarithmic_over_a_decade_and_holds_its_values(ax):
    frame(ax, [1.0, 7.0], [1.0, 9.0], log_x=None)
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "log")
    for values in ([3.0], [1.0, 1e6], [float("nan"), 2.0, -1.0, 0.0], []):
        frame(ax, values, values, log_x=None)
        low, high = ax.get_xlim()
        assert low < high
        assert all(low <= value <= high for value in values if value > 0)
    frame(ax, [5.0, 6.0], [5.0, 6.0])
    assert ax.get_ylim()[0] == 0.0  # a distance: its zero means something


def draw(ax):
    frame(ax, [1.0, 10.0], [1.0, 100.0])
    plain_ticks(ax)
    ax.set_xlabel("cost")
    ax.set_title("distance", loc="left")
    ax.plot([1.0, 10.0], [100.0, 1.0], color=COLOURS[1], label="a law")
    for row, x in enumerate((2.0, 3.0, 1e9)):
        (mark,) = ax.plot([x], [5.0], "o", color=COLOURS[row])
        mark.set_gid(f"run-{row}")
    (mark,) = ax.plot([4.0], [5.0], "s", color=FAINT)
    mark.set_gid("published-run-7")


class Read(HTMLParser):
    """Tags with their attributes, and the words of the texts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


def test_an_svg_has_links_and_no_colour_of_its_own():
    markup = svg(plot_figure([draw], 340, 260), "a plot")
    read = Read(markup)
    (root, *marks) = [attributes for tag, attributes in read.tags if tag in ("svg", "g")]
    assert root["aria-label"] == "a plot"
    assert [mark["data-r"] for mark in marks if "data-r" in mark] == ["0", "1", "2", "7"]
    assert [mark["data-r"] for mark in marks if mark.get("class") == "published"] == ["7"]
    assert not re.search("#[0-9a-f]{6}", re.sub(r"\(#\w+\)|href=\"#\w+\"", "", markup))
    for name in ("--bg", "--ink", "--faint", "--grid", "--c0", "--c1"):
        assert f"var({name})" in markup
    assert not {"style", "metadata", "script", "a"} & {tag for tag, _ in read.tags}
    assert "font-family" not in markup
    assert "a law" in read.words
    for group in re.findall(r'<g data-r="[01]">.*?</g></g>', markup):
        (across,) = re.findall(r'<use [^>]* x="([\d.]+)"', group)
        assert 0 < float(across) < 340


def test_two_svgs_share_no_name():
    names = [
        set(re.findall(r' id="(\w+)"', svg(plot_figure([draw], 340, 260), about)))
        for about in ("one", "other")
    ]
    assert names[0]
    assert not names[0] & names[1]
    assert svg(plot_figure([draw], 340, 260), "one") == svg(plot_figure([draw], 340, 260), "one")


def test_words_are_escaped():
    hostile = short("\"'><script>alert(1)</script>&\x1b\u202e$x$")

    def name(ax):
        draw(ax)
        ax.set_xlabel(hostile)
        ax.plot([], [], label=hostile)
        place_labels(ax, [Label(2.0, 5.0, hostile)], [])

    read = Read(svg(plot_figure([name], 740, 260), hostile))
    assert "script" not in {tag for tag, _ in read.tags}
    assert read.tags[0][1]["aria-label"] == hostile
    assert read.words.count(hostile) == 3


def test_a_legend_and_a_key_lie_beside_the_axes():
    key = Key("patch", {"4": Look(COLOURS[0], "o"), "2": Look(COLOURS[1], "o")})
    plain, told = (
        plot_figure([draw, draw], 340, 260, keys=keys, title=title, notes=notes)
        for keys, title, notes in (([], "", []), ([key], "A title", ["A note. " * 30]))
    )
    height = plain.get_size_inches()[1] * 72
    assert height == pytest.approx(2 * (260 + LINE))
    assert told.get_size_inches()[0] > plain.get_size_inches()[0]
    told.draw_without_rendering()
    whole = told.bbox
    boxes = [box for ax in told.axes if (box := ax.get_tightbbox())]
    boxes += [legend.get_window_extent() for legend in told.legends]
    boxes += [text.get_window_extent() for text in told.texts]
    for i, box in enumerate(boxes):
        assert whole.x0 <= box.x0
        assert box.x1 <= whole.x1
        assert whole.y0 <= box.y0
        assert box.y1 <= whole.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_names_do_not_lie_over_one_another(ax):
    frame(ax, [1.0, 10.0], [1.0, 10.0], log_y=False)
    labels = [Label(3.0, 5.0, "DiT-4x96x3/2")] * 20
    hidden = place_labels(ax, labels, [(3.0, 5.0)])
    kept = [text for text in ax.texts if isinstance(text, Annotation)]
    assert 1 <= len(kept) <= 6
    assert hidden == 20 - len(kept)
    boxes = [Text.get_window_extent(text) for text in kept]
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])
