"""The recipes of ImageNet are the paper's: its twelve models, its training, its protocol."""

import importlib
import math
import re
from pathlib import Path

import pytest

from ditjax import cli
from ditjax.config import Config, read
from ditjax.errors import UserError
from ditjax.models.dit import PAPER_PATCHES, PAPER_SIZES, parse_size
from ditjax.scaling.published import TABLE4_GFLOPS
from ditjax.tasks import cost_of
from ditjax.weights.arguments import sit_arguments
from experiments.paper import published

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
TWELVE = [f"{size}/{patch}" for size in PAPER_SIZES for patch in PAPER_PATCHES]


def recipe(name: str, arg: str = "") -> Config:
    """A recipe as the commands read it."""
    path = EXPERIMENTS / f"{name}.py"
    return read(cli.load_recipe([f"--config={path}{arg and ':'}{arg}"]))


@pytest.mark.parametrize("model", TWELVE)
def test_the_twelve_models_have_the_published_gflops(model):
    c = recipe("imagenet256", model)
    size, patch = model.split("/")
    assert (parse_size(c.model.size), c.model.patch) == (PAPER_SIZES[size], int(patch))
    assert cost_of(c).gflops == pytest.approx(TABLE4_GFLOPS[f"DiT-{model}"], abs=0.02)


# Peebles & Xie 2023: XL/2 at 512 px has 524.6 Gflops, and no other weights than at 256 px.
def test_xl_2_of_512_pixels_has_the_published_gflops():
    c = recipe("imagenet512", "XL/2")
    assert cost_of(c).gflops == pytest.approx(524.6, abs=0.05)
    assert cost_of(c).parameters == cost_of(recipe("imagenet256", "XL/2")).parameters


@pytest.mark.parametrize(
    ("name", "latent", "steps"), [("imagenet256", 32, 400_000), ("imagenet512", 64, 3_000_000)]
)
def test_training_is_the_papers(name, latent, steps):
    c = recipe(name, "XL/2")
    assert (c.input_size, c.input_channels) == (latent, 4)
    assert (c.train.steps, c.train.batch_size, c.train.ema_decay) == (steps, 256, 0.9999)
    assert (c.optim.learning_rate, c.optim.schedule, c.optim.warmup_steps) == (1e-4, "constant", 0)
    assert (c.optim.weight_decay, c.optim.clip_norm) == (0, 0)
    assert (c.optim.b1, c.optim.b2) == (0.9, 0.999)
    assert (c.data.num_classes, c.data.flip, c.model.label_dropout) == (1000, True, 0.1)
    assert (c.model.block, c.diffusion.loss, c.diffusion.schedule) == (
        "adaln_zero",
        "hybrid",
        "linear",
    )
    assert c.autoencoder.scale == 0.18215


@pytest.mark.parametrize("name", ["imagenet256", "imagenet512"])
def test_samples_are_drawn_by_the_papers_protocol(name):
    c = recipe(name)
    assert (c.sample.sampler, c.sample.steps, c.sample.cfg_scale) == ("ddpm", "250", 1.0)
    assert (c.sample.weights, c.sample.cfg_channels, c.sample.clip_x0) == ("ema", "three", False)
    assert (c.evaluate.num_samples, c.evaluate.labels) == (50_000, "uniform")


def test_compute_is_bfloat16_and_the_default_model_xl_2():
    for name in ("imagenet256", "imagenet512"):
        c = recipe(name)
        assert (c.model.dtype, c.model.size, c.model.patch) == ("bfloat16", "XL", 2)


def test_the_sweep_is_the_twelve():
    grid = dict(recipe("imagenet256").sweep.grid)
    assert [f"{s}/{p}" for s in grid["model.size"] for p in grid["model.patch"]] == TWELVE


@pytest.mark.parametrize("name", ["imagenet256", "imagenet512"])
@pytest.mark.parametrize("arg", ["XL/3", "XL", "XXL/2", "2", "XL/", "XL/2/2"])
def test_another_model_is_one_line(name, arg):
    with pytest.raises(UserError) as error:
        recipe(name, arg)
    assert f"'{arg}' is none of the paper's twelve models: expected SIZE/PATCH" in str(error.value)
    assert "Traceback" not in str(error.value)


def test_the_published_figures_of_the_header_are_those_on_record():
    header = importlib.import_module("experiments.imagenet256").__doc__ or ""
    said = re.findall(r"(XL|S|B|L)/2\s+([\d.]+\d)[,.]", header)
    assert [size for size, _ in said] == list(PAPER_SIZES)
    assert all(float(fid) == published.MODELS[size, 2] for size, fid in said)


# 6 operations a multiply-accumulate of the forward pass; 8 H100s at half of 989e12 a second.
@pytest.mark.parametrize(("name", "steps"), [("imagenet256", 400_000), ("imagenet512", 3_000_000)])
def test_the_hours_of_the_header_follow_from_the_counts(name, steps):
    c = recipe(name, "XL/2")
    operations = 6e9 * cost_of(c).gflops * c.train.batch_size * steps
    header = " ".join((importlib.import_module(f"experiments.{name}").__doc__ or "").split())
    said = re.search(r"so (?:400,000 steps are )?([\d.e]+) floating-point operations", header)
    hours = re.search(r"(\d+) hours of 8 H100s at half", header)
    assert said
    assert hours
    assert float(said[1]) == pytest.approx(operations, rel=0.02)
    assert float(hours[1]) == pytest.approx(operations / (4 * 989e12) / 3600, rel=0.03)


def test_sit_is_what_its_own_script_trains():
    """The weights go out to SiT's code, and its sampler is SiT's."""
    c = recipe("imagenet256_sit")
    assert sit_arguments(c) == {"path_type": "Linear", "prediction": "velocity"}
    assert c.diffusion.variance == "unused"
    assert (c.sample.sampler, c.sample.steps, c.sample.last_step) == ("sde", "250", 0.04)
    assert (c.sample.sde_form, c.sample.sde_last, c.sample.cfg_channels) == (
        "sigma",
        "mean",
        "three",
    )
    assert (c.train.steps, c.train.batch_size) == (7_000_000, 256)
    assert cost_of(c).gflops == cost_of(recipe("imagenet256")).gflops


def test_edms_times_are_edm2s_for_latents_of_unit_deviation():
    """ln σ ~ N(-.4, 1) and σ in (.002, 80) at a deviation of .5."""
    d = recipe("imagenet256_edm").diffusion
    scale = d.sigma_data / 0.5
    assert d.time_mean == pytest.approx(-0.4 + math.log(scale), abs=1e-3)
    assert (d.sigma_min, d.sigma_max) == pytest.approx((0.002 * scale, 80 * scale))
    assert (d.time, d.time_std, d.weighting) == ("logit_normal", 1.0, "none")
