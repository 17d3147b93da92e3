"""The keys of a process, objective and sampler: what does not go together is one line."""

import numpy as np
import pytest

from ditjax.cli import load_recipe
from ditjax.config import check_used, read
from ditjax.errors import UserError
from ditjax.sampling.draw import sampling_protocol
from ditjax.tasks import make_task, sampling_gflops
from ditjax.tasks.objective import validation_target

FLOW = {"process": "flow", "prediction": "velocity", "loss": "simple", "variance": "none"}
EDM = {**FLOW, "process": "edm", "prediction": "F"}


def recipe(diffusion=FLOW, **sample):
    small = {"sampler": "ddim", "steps": "10", "eta": 0.0, **sample}
    flags = [f"--config.diffusion.{k}={v}" for k, v in diffusion.items()]
    flags += [f"--config.sample.{k}={v}" for k, v in small.items()]
    return read(load_recipe(["--config=experiments/digits.py:1x32x2/4", *flags]))


@pytest.mark.parametrize(
    ("diffusion", "words"),
    [
        ({**FLOW, "loss": "hybrid"}, "no variational bound.*set loss 'simple' and variance 'none'"),
        ({**FLOW, "variance": "fixed_small"}, "set loss 'simple' and variance 'none'"),
        ({**FLOW, "prediction": "v"}, "prediction 'v' with process Flow: expected one of eps, x0"),
        ({**EDM, "prediction": "velocity"}, "with process EDM: expected one of eps, x0, F"),
        ({"prediction": "velocity"}, "with process Discrete: expected one of eps, x0, v"),
        ({"variance": "none", "loss": "simple"}, "variance is 'none' with process 'ddpm'"),
        ({"weighting": "likelihood"}, "which has no derivatives by t"),
        ({**EDM, "sigma_min": 90.0}, "expected a smaller sigma_min"),
        (
            {**FLOW, "timesteps": 500},
            "timesteps has no effect: config.diffusion.process is 'flow'",
        ),
        ({"sigma_max": 20.0}, "sigma_max has no effect: config.diffusion.process is 'ddpm'"),
        ({**FLOW, "process": "rectified"}, "process is 'rectified': expected one of"),
        ({**FLOW, "time_mode": 2.0, "time": "mode"}, "time_mode is 2.0: expected from -1 to 1.75"),
    ],
)
def test_keys_that_do_not_go_together(diffusion, words):
    with pytest.raises(UserError, match=words):
        recipe(diffusion)


@pytest.mark.parametrize(
    ("diffusion", "sample", "words"),
    [
        (FLOW, {"sampler": "ddpm"}, "it needs process 'ddpm' on its own grid"),
        ({}, {"sampler": "heun"}, "has no derivative by t: choose another"),
        ({}, {"sampler": "ddpm", "grid": "karras"}, "it needs process 'ddpm' on its own grid"),
        (FLOW, {"steps": "ddim10"}, "'ddim10' steps on the grid 'uniform': expected a number"),
        (FLOW, {"rho": 5.0}, "rho is 5.0, which only the grid 'karras' reads"),
        (FLOW, {"sampler": "sde", "sde_form": "sbdm"}, "its diffusion is infinite"),
        ({}, {"grid": "karras", "steps": "500"}, "take fewer steps"),
        ({}, {"grid": "uniform", "shift": 3.0}, "expected a process in continuous time"),
        (FLOW, {"grid": "karras", "last_step": 0.1}, "last_step is 0.1, which only the grid"),
        ({}, {"cfg_rule": "zero"}, "it is a rule for velocities"),
        (FLOW, {"cfg_rule": "zero", "zero_steps": 10}, "zero_steps is 10 of 10 steps"),
        (
            FLOW,
            {"sampler": "dopri5", "cfg_scale": 2.0, "cfg_interval": "(0.1, 0.5)"},
            "no step is inside for all",
        ),
        (
            FLOW,
            {"sampler": "dopri5", "cfg_scale": 2.0, "cfg_rule": "apg", "apg_momentum": -0.5},
            "apg_momentum -0.5: it repeats steps that it refuses",
        ),
    ],
)
def test_samplers_that_do_not_go_together(diffusion, sample, words):
    with pytest.raises(UserError, match=words):
        recipe(diffusion, **sample)


@pytest.mark.parametrize(
    ("diffusion", "sample", "given", "by"),
    [
        (FLOW, {}, "diffusion.timesteps", "diffusion.process"),
        (FLOW, {}, "diffusion.schedule", "diffusion.process"),
        ({}, {}, "diffusion.time_scale", "diffusion.process"),
        (FLOW, {}, "diffusion.sigma_max", "diffusion.process"),
        (EDM, {}, "diffusion.t_eps", "diffusion.process"),
        (EDM, {}, "diffusion.time_from_noise", "diffusion.process"),
        (FLOW, {}, "diffusion.weighting_gamma", "diffusion.weighting"),
        ({**FLOW, "weighting": "p2"}, {}, "diffusion.weighting_bias", "diffusion.weighting"),
        (FLOW, {}, "diffusion.time_mean", "diffusion.time"),
        (FLOW, {"sampler": "heun"}, "sample.order", "sample.sampler"),
        (FLOW, {"sampler": "heun"}, "sample.eta", "sample.sampler"),
        (FLOW, {}, "sample.s_churn", "sample.sampler"),
        (FLOW, {}, "sample.rtol", "sample.sampler"),
        (FLOW, {"cfg_scale": 2.0}, "sample.apg_eta", "sample.cfg_rule"),
        (FLOW, {"cfg_scale": 2.0}, "sample.apg_momentum", "sample.cfg_rule"),
    ],
)
def test_a_given_key_without_effect_is_refused(diffusion, sample, given, by):
    """And the same key beside the value that reads it is not."""
    c = recipe(diffusion, **sample)
    with pytest.raises(UserError, match=rf"config.{given} has no effect: config.{by} is"):
        check_used(c, [given])
    everything = recipe({**FLOW, "weighting": "p2", "time": "logit_normal"}, sampler="unipc")
    check_used(everything, ["diffusion.weighting_gamma", "diffusion.time_mean", "sample.order"])


def test_a_protocol_grows_only_by_what_is_not_the_default():
    """Results from before these keys keep their protocol hashes."""

    def protocol(c):
        return sampling_protocol(c, seed=0, labels="uniform", decoder="pixels")

    old = protocol(recipe({}))
    assert set(old) == {
        "labels", "seed", "sampler", "steps", "eta", "cfg_scale", "cfg_channels", "cfg_interval",
        "clip_x0", "weights", "ema_decay", "decoder", "image_size", "sampling_precision",
    }  # fmt: skip
    assert old["eta"] == 0.0
    new = protocol(recipe(FLOW, sampler="unipc", order=3, shift=3.0))
    assert {k: v for k, v in new.items() if k not in old} == {"order": 3, "shift": 3.0}
    assert new["eta"] is None
    guided = protocol(recipe(FLOW, cfg_scale=2.0, cfg_rule="apg"))
    assert {k: v for k, v in guided.items() if k not in old} == {
        "cfg_rule": "apg", "cfg_space": "velocity", "apg_eta": 0.0, "apg_norm": 0.0,
    }  # fmt: skip
    moving = protocol(recipe(FLOW, cfg_scale=2.0, cfg_rule="apg", apg_momentum=-0.5))
    assert moving == {**guided, "apg_momentum": -0.5}


def test_gflops_count_evaluations():
    one = sampling_gflops(recipe(steps="1"))
    assert sampling_gflops(recipe(steps="10")) == pytest.approx(10 * one)
    assert sampling_gflops(recipe(sampler="heun", steps="10")) == pytest.approx(19 * one)
    # The step from pure noise, t = 1, is one of those that are always guided.
    assert sampling_gflops(recipe(steps="10", cfg_scale=2.0)) == pytest.approx(20 * one)
    guided = recipe(sampler="heun", steps="10", cfg_scale=2.0, cfg_interval="(0.0, 0.45)")
    # t = .4, .3, .2 and .1 each end one step and begin another.
    assert sampling_gflops(guided) == pytest.approx((19 + 8) * one)


def test_edms_interval_is_of_the_noises_share():
    """Kynkäänniemi's σ in (.19, 1.61) is σ/(1 + σ) in (.16, .617)."""
    c = recipe(EDM, steps="18", cfg_scale=2.0, cfg_interval="(0.16, 0.617)")
    sampling = make_task(c).sampling
    assert sampling
    assert sampling.timesteps is not None
    sigma = np.exp(sampling.timesteps / 250)
    inside = (sigma >= 0.16 / 0.84) & (sigma < 0.617 / 0.383)
    assert sampling.guided == inside.sum()
    assert 0 < sampling.guided < 18


def test_validation_targets_differ():
    found = {
        validation_target(recipe(d).diffusion) for d in ({}, FLOW, EDM, {**FLOW, "process": "gvp"})
    }
    assert found == {
        "eps, linear, 1000 steps", "velocity, flow", "F, edm 0.002 to 80 of 0.5", "velocity, gvp",
    }  # fmt: skip
