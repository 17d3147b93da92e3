"""Our solvers beside diffusers' and k-diffusion's, on the same noise and denoiser."""

import numpy as np
import pytest

from tests.oracles.solvers import theirs
from tests.solver_cases import CASES, our_result


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_samples_are_theirs(case):
    """Their states are float32: agreement to a few roundings after 25 steps."""
    expected = theirs(case)
    assert expected.std() > 0.5, "the samples died out"
    error = np.abs(our_result(case) - expected).max() / np.abs(expected).max()
    assert error < 5e-6
