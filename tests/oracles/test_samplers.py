"""Our samplers beside diffusers', step by step, and where the two differ on purpose."""

import numpy as np
import pytest

from ditjax.diffusion.schedule import make_schedule, space_timesteps
from tests.oracles.samplers import alphas_bar, scheduler, trajectory
from tests.trajectories import CASES, Case, errors, ours

MORE = (
    Case("ddpm", "1000", variance="fixed_large"),
    Case("ddpm", "1000", "v"),
    Case("ddpm", "20"),
    Case("ddpm", "ddim250"),
    Case("ddpm", "250", "v"),
    Case("ddpm", "250", "x0", variance="fixed_large"),
    Case("ddpm", "250", clip_x0=True),
    Case("ddim", "ddim1000", eta=1.0),
    Case("ddim", "ddim10"),
    Case("ddim", "ddim250", "v", eta=0.5),
    Case("ddim", "ddim100", "x0", eta=1.0),
    Case("ddim", "ddim50", clip_x0=True),
    Case("ddim", "ddim50", "v", eta=0.5, clip_x0=True),
)


@pytest.mark.parametrize("double", [False, True], ids=["float32-tables", "float64-tables"])
@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda case: case.name)
def test_every_step_is_diffusers(case, double):
    """diffusers keeps ᾱ in float32: at small t, 1 - ᾱ_t/ᾱ_{t-1} has three digits left.

    Given float64 tables it agrees to 5e-6 where it agreed to 7e-5.
    """
    x, timesteps = ours(case)
    expected, expected_timesteps = trajectory(case, scheduler(case, double))
    np.testing.assert_array_equal(timesteps, expected_timesteps)
    assert x[-1].std() > 0.5, "the samples died out"
    assert errors(x, expected).max() < (1e-5 if double else 1e-4)


@pytest.mark.parametrize(
    ("name", "theirs", "rtol"),
    # The last cosine β is .999: 1 - β in float32 is only good to 6e-5.
    [("linear", "linear", 1e-6), ("cosine", "squaredcos_cap_v2", 3e-5)],
)
def test_schedules(name, theirs, rtol):
    np.testing.assert_allclose(make_schedule(name).alphas_bar, alphas_bar(theirs), rtol=rtol)


def test_difference_ddim_steps_back_by_a_whole_stride():
    """Off 'leading', diffusers' DDIM goes to ᾱ at t - T//S, though the next t may be another."""
    case = Case("ddim", "250")
    x, timesteps = ours(case)
    expected, expected_timesteps = trajectory(case, scheduler(case, double=True))
    np.testing.assert_array_equal(timesteps, expected_timesteps)
    uneven = np.flatnonzero(np.diff(timesteps) != -4)
    error = errors(x, expected)
    assert error[: uneven[0] + 1].max() < 3e-6
    assert error[-1] > 1e-3


def test_difference_the_last_alpha_may_be_kept_below_one():
    """set_alpha_to_one=False, Stable Diffusion's, stands still at t = 0; DDIM's ᾱ ends at 1."""
    case = Case("ddim", "ddim50")
    expected, _ = trajectory(case, scheduler(case, set_alpha_to_one=False))
    error = errors(ours(case)[0], expected)
    assert error[:-1].max() < 3e-6
    assert error[-1] > 1e-4
    np.testing.assert_allclose(expected[-1], expected[-2], atol=1e-6)


def test_difference_ddim_clips_x0_and_keeps_eps():
    """clip_sample alone clips x0 and not the ε that goes with it; the release takes ε from x0."""
    case = Case("ddim", "ddim50", clip_x0=True)
    expected, _ = trajectory(case, scheduler(case, double=True), rederive_eps=False)
    assert errors(ours(case)[0], expected)[-1] > 1e-2


def test_difference_odd_numbers_of_steps_round_halves_otherwise():
    """The release sums its stride, so a half may end on either side; diffusers rounds it to even.

    An even number of steps has no halves.
    """
    differ = []
    for steps in range(2, 1001):
        case = Case("ddpm", str(steps))
        retained = space_timesteps(1000, case.spec)
        theirs = scheduler(case).timesteps.numpy()[::-1]
        at = np.flatnonzero(retained != theirs)
        exact = at * 999 / (steps - 1)
        np.testing.assert_allclose(exact % 1, 0.5, atol=1e-9)
        np.testing.assert_array_equal(np.abs(retained - theirs)[at], 1)
        differ += [steps] * bool(at.size)
    assert len(differ) == 278
    assert not any(steps % 2 == 0 for steps in differ)


def test_difference_learned_range_needs_the_channels_that_dit_pipeline_drops():
    """DiTPipeline splits the variance off before step(): its scheduler has to have a fixed one."""
    case = Case("ddpm", "250")
    dropping = case._replace(variance="fixed_small")
    with pytest.raises(TypeError):
        trajectory(dropping, scheduler(case))
