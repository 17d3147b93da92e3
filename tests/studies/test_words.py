"""How numbers read."""

import math

import pytest

from ditjax.studies.words import number


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.00026, "0.000260"),
        (118.64, "119"),
        (0.999951, "1.00"),
        (1.414, "1.41"),
        (12345.0, "12345"),
        (-0.9298, "-0.930"),
        (0.0, "0"),
        (math.nan, "NaN"),
        (math.inf, "∞"),
        (None, "-"),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(value, shown):
    assert number(value) == shown
