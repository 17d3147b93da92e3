"""Durations as a clock shows them, and in a table's few characters."""

import math

import pytest

from ditjax.files.durations import clock, duration


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0:00"), (65, "1:05"), (3725, "1:02:05"), (59.7, "1:00")]
)
def test_a_clock(seconds, words):
    assert clock(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.05, "0.050 s"),
        (0.5, "0.50 s"),
        (9.0, "9.0 s"),
        (9.96, "10 s"),
        (99.6, "100 s"),
        (120, "2 min"),
        (5999, "100 min"),
        (7560, "2.1 h"),
        (math.nan, "-"),
        (math.inf, "-"),
    ],
)
def test_a_rough_duration(seconds, words):
    assert duration(seconds) == words
