"""The smoothing of the loss curves."""

import numpy as np
import pytest

from ditjax.reporting import figures


def test_smoothing_keeps_a_constant_and_averages_noise():
    steps = np.arange(1.0, 2001.0)
    np.testing.assert_allclose(figures._smooth(steps, np.full(2000, 0.3)), 0.3, rtol=1e-12)
    assert figures._smooth(steps, steps)[599] == pytest.approx(610)  # the mean of 500 to 720
    noisy = 0.3 + np.random.default_rng(0).normal(size=2000) * 0.1
    assert np.std(figures._smooth(steps, noisy)[1000:]) < 0.02
