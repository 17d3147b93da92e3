"""What a sample costs, against counts by hand."""

import pytest

from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.tasks import cost_of, sampling_gflops


def gflops(**sample):
    c = read(load_recipe(["--config=experiments/digits.py:2x32x2/2"]))
    c = changed(c, {"sample": sample})
    return sampling_gflops(c) / cost_of(c).gflops


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_step_is_one_forward_pass_and_a_guided_one_two(sampler):
    assert gflops(sampler=sampler, steps="250", cfg_scale=1.0) == pytest.approx(250)
    assert gflops(sampler=sampler, steps="250", cfg_scale=4.0) == pytest.approx(500)
    assert gflops(sampler=sampler, steps="10,15,20", cfg_scale=0.0) == pytest.approx(90)


@pytest.mark.parametrize(
    ("interval", "twice"),
    [
        ((0.0, 1.0), 10),
        ((0.3, 0.7), 4),  # of 0, 100, ..., 900: 300 to 600
        ((0.3, 0.7001), 5),
        ((0.3001, 0.7), 3),
        ((0.95, 1.0), 0),
    ],
)
def test_in_an_interval_the_steps_inside_cost_two(interval, twice):
    """'ddim10' retains 0, 100, ..., 900; guided at low <= t < high."""
    count = gflops(sampler="ddim", steps="ddim10", cfg_scale=2.0, cfg_interval=interval)
    assert count == pytest.approx(10 + twice)


def test_an_interval_without_guidance_costs_nothing():
    assert gflops(steps="ddim10", cfg_scale=1.0, cfg_interval=(0.3, 0.7)) == pytest.approx(10)
