"""Plots as SVG: scales, ticks that do not collide, marks inside of the frame, escaped words."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from ditjax.reporting import svg
from ditjax.reporting.svg import Looks, Plot, Taken, axis, label, ticks


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_ticks_lie_inside_and_are_few(seed, log):
    rng = np.random.default_rng(seed)
    low = 10.0 ** rng.uniform(-9, 9)
    of = axis("x", low * 10.0 ** rng.uniform(0.01, 9, size=5), log=log)
    for most in (3, 5, 8):
        found = ticks(of, most)
        values = [value for value, _ in found]
        assert 1 <= len(found) <= most + 1
        assert values == sorted(set(values))
        assert all(0 <= of.place(value) <= 1 for value in values)
        assert len({words for _, words in found}) == len(found)


SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def test_a_tick_reads_as_its_value():
    for value in (1e-9, 2e-6, 1e-4, 0.001, 0.15, 1.0, 20.0, 5e4, 1e5, 2e6, 1.5e10):
        power = re.fullmatch(r"(?:(\d+\.?\d*)·)?10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", label(value))
        digit, exponent = power.groups() if power else (label(value), "⁰")
        read = float(digit or 1) * 10.0 ** int(exponent.translate(SUPERSCRIPTS))
        assert read == pytest.approx(value, rel=1e-9)
        assert len(label(value)) <= 8
    assert label(1e-4) == "0.0001"
    assert label(1e-5) == "10⁻⁵"
    assert label(2e6) == "2·10⁶"
    assert label(0.15) == "0.15"


def test_an_axis_is_logarithmic_over_a_decade_and_holds_its_values():
    assert not axis("x", [1.0, 7.0]).log
    assert axis("x", [1.0, 9.0]).log
    for values in ([3.0], [1.0, 1e6], [float("nan"), 2.0, -1.0, 0.0], []):
        of = axis("x", values)
        assert of.low < of.high
        assert all(of.holds(value) for value in values if value > 0)
    assert axis("x", [5.0, 6.0]).low == 0.0  # a distance: its zero means something
    plot = Plot(axis("x", np.array([1.0, 9.0])), axis("y", np.array([1.0, 2.0])), "a plot")
    assert "np." not in plot.markup()


def coordinates(markup, kind):
    return re.findall(rf'class="{kind}[^"]*"[^>]*points="([^"]*)"', markup)


def test_what_lies_outside_of_the_frame_is_not_drawn():
    plot = Plot(axis("x", [1.0, 10.0]), axis("y", [1.0, 100.0]), "a plot")
    plot.spot(1e9, 5.0, Looks(0, 0), 3)
    plot.spot(float("nan"), 5.0, Looks(0, 0), 4)
    plot.cross(1.0, -1.0)
    plot.line([1.0, 5.0, 1e9], [2.0, 3.0, 4.0], "law")
    plot.bar(5.0, 0.0, 1e12, "spread")
    plot.level(1e12, "floor")
    markup = plot.markup()
    assert "data-r" not in markup
    assert "floor" not in markup
    (law,) = coordinates(markup, "law")
    assert len(law.split()) == 2
    (bar,) = coordinates(markup, "spread")
    tops = [float(place.split(",")[1]) for place in bar.split()]
    assert min(tops) == pytest.approx(plot.TOP, abs=0.1)
    assert max(tops) == pytest.approx(plot.height - plot.BOTTOM, abs=0.1)


def test_up_is_more():
    plot = Plot(axis("x", [1.0, 10.0]), axis("y", [1.0, 2.0]), "a plot")
    (left, low), (right, high) = plot.at(1.0, 1.0), plot.at(10.0, 2.0)
    assert left < right
    assert low > high
    assert plot.at(plot.x.low, plot.y.low) == (plot.LEFT, plot.height - plot.BOTTOM)


class Read(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= dict(attributes)

    def handle_data(self, data):
        self.words.append(data)


def test_words_are_escaped():
    hostile = "\"'><script>alert(1)</script>&\x1b\u202e"
    plot = Plot(axis(hostile, [1.0]), axis(hostile, [1.0]), hostile)
    plot.level(1.0, hostile)
    plot.note(hostile)
    plot.name(1.0, 0.5, hostile, Taken())
    read = Read(plot.markup())
    assert set(read.tags) <= {"svg", "path", "text", "polyline"}
    seen = "\"'><script>alert(1)</script>&??"
    assert read.attributes["aria-label"] == seen
    assert read.words.count(seen) == 5  # two axes, a level, a note, a name
    assert "\x1b" not in plot.markup()


def test_names_do_not_lie_over_one_another():
    plot = Plot(axis("x", [1.0, 10.0]), axis("y", [1.0, 10.0], log=False), "a plot")
    taken = Taken()
    for _ in range(20):
        plot.name(3.0, 5.0, "DiT-4x96x3/2", taken)
    assert 1 <= plot.markup().count("DiT-4x96x3/2") <= 4
    assert taken.take((-9.0, -9.0, -8.0, -8.0))
    assert not taken.take((-8.5, -8.5, -7.0, -7.0))


def test_a_glyph_and_a_stroke_are_drawings_of_their_own():
    for markup in (svg.glyph(Looks(1, 2)), svg.stroke("law"), svg.cross_glyph("best")):
        assert Read(markup).tags[0] == "svg"
        assert 'aria-hidden="true"' in markup
