"""DDPM and DDIM beside diffusers' schedulers: same network, same noise, snapshots on the way.

The golden file is made by tests/oracles/make_goldens.py; tests/oracles/test_samplers.py compares
every step, with more options, where diffusers is installed.
"""

from pathlib import Path

import numpy as np
import pytest

from ditjax.diffusion.schedule import make_schedule
from tests.trajectories import CASES, errors, ours, snapshots


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent.parent / "goldens" / "samplers.npz") as file:
        return dict(file)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_snapshots_are_diffusers(case, golden):
    """1e-4 of the largest value; what there is comes from diffusers' float32 tables."""
    x, timesteps = ours(case)
    np.testing.assert_array_equal(timesteps, golden[f"{case.name}-timesteps"])
    assert x[-1].std() > 0.5, "the samples died out"
    assert errors(snapshots(x), golden[case.name]).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "theirs", "rtol"),
    # The last cosine β is .999: 1 - β in float32 is only good to 6e-5.
    [("linear", "linear", 1e-6), ("cosine", "squaredcos_cap_v2", 3e-5)],
)
def test_alphas_bar_are_diffusers(name, theirs, rtol, golden):
    expected = golden[f"alphas_bar-{theirs}"]
    np.testing.assert_allclose(make_schedule(name).alphas_bar, expected, rtol=rtol)
