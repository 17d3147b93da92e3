"""Our solvers against what diffusers and k-diffusion computed (`tests/oracles/solvers.py`)."""

from pathlib import Path

import numpy as np
import pytest

from tests.solver_cases import CASES, our_result

GOLDENS = Path(__file__).parent.parent / "goldens" / "solvers.npz"


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as file:
        return dict(file)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_samples_are_those_of_public_solvers(case, goldens):
    """The same x_T and noise of each step, 25 steps, of the largest value."""
    expected = goldens[case.name]
    assert np.abs(our_result(case) - expected).max() < 5e-6 * np.abs(expected).max()
