"""A loss over its learned uncertainty: its minimum, its start, its gradient, its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.diffusion.process import EDM, SCALED, Discrete
from ditjax.diffusion.schedule import make_schedule
from ditjax.diffusion.weighting import uncertain, uncertainty_features
from ditjax.errors import UserError
from ditjax.tasks import cost_of, make_task
from ditjax.training.program import optimizer_of

PROCESSES = {
    "ddpm": Discrete(make_schedule("linear", 1000)),
    "edm": EDM(1.0, 0.5, 0.002, 80.0),
    **{name: make(1000.0, False) for name, make in SCALED.items()},
}
FLOW = {"process": "flow", "prediction": "velocity", "loss": "simple", "variance": "none"}


def recipe(model=None, **diffusion):
    c = read(load_recipe(["--config=digits:1x16x2/4"]))
    sample = {"steps": "10"}
    return changed(c, {"diffusion": {**FLOW, **diffusion}, "model": model or {}, "sample": sample})


@pytest.mark.parametrize("name", PROCESSES)
def test_features_are_finite_to_the_ends_and_tell_levels_apart(name):
    process = PROCESSES[name]
    t = process.from_unit(jnp.linspace(0, 1, 65)[:-1] + 1 / 128)
    ends = process.from_unit(jnp.asarray([0.0, 1.0]))
    found = uncertainty_features(process, jnp.concatenate([t, ends]))
    assert found.shape == (66, 128)
    assert np.isfinite(found).all()
    assert np.square(found).mean() == pytest.approx(1, abs=0.1)
    # A linear layer fits any smooth function of the level.
    wanted = np.sin(6 * np.linspace(0, 1, 64))
    fit, *_ = np.linalg.lstsq(np.float64(found[:64]), wanted, rcond=1e-5)
    np.testing.assert_allclose(found[:64] @ fit, wanted, atol=0.02)


def test_of_edm_they_are_of_its_own_noise_level():
    """√2 cos(2π(f c + φ)) of c_noise = ¼ ln σ, with f and φ read off two levels."""
    process, t = PROCESSES["edm"], jnp.asarray([0.02, 0.5, 9.0])
    f = np.asarray(jax.scipy.special.ndtri((np.arange(128) + 0.5) / 128))
    phase = np.arange(128) * (5**0.5 - 1) / 2
    c = np.asarray(process.c_noise(t))[:, None]
    np.testing.assert_allclose(
        uncertainty_features(process, t), 2**0.5 * np.cos(2 * np.pi * (f * c + phase)), atol=5e-4
    )


def test_its_minimum_is_the_logarithm_of_the_mean_loss():
    losses = jnp.asarray([0.2, 1.0, 3.0])
    best = jnp.log(losses.mean())
    slope = jax.grad(lambda u: uncertain(losses, jnp.full(3, u)).mean())
    assert float(slope(best)) == pytest.approx(0, abs=1e-6)
    assert float(slope(best - 0.1)) < -0.05
    assert float(slope(best + 0.1)) > 0.05


def one_step(uncertainty):
    """((loss, metrics), gradients, times) of a step at random parameters; u is 0."""
    task, rng = make_task(recipe(uncertainty=uncertainty)), np.random.default_rng(0)
    shapes = jax.eval_shape(task.init, jax.random.key(0))["params"]
    own = {name: tree for name, tree in shapes.items() if name != "uncertainty"}
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 4, x.dtype), own)
    if uncertainty:
        params["uncertainty"] = {"kernel": jnp.zeros(128)}
    x0 = jnp.asarray(rng.normal(size=(8, 8, 8, 1)), jnp.float32)
    batch = task.draw({"x0": x0, "label": jnp.arange(8)}, jax.random.key(1))
    step = jax.jit(jax.value_and_grad(lambda p: task.loss({"params": p}, {}, batch), has_aux=True))
    return (*step(params), batch["t"])


@pytest.fixture(scope="module")
def steps():
    return one_step(False), one_step(True)


def test_the_first_step_is_that_of_the_plain_loss(steps):
    """u is 0: loss and gradients of the network are the same."""
    ((loss, plain), gradients, _), ((found, metrics), theirs, _) = steps
    assert found == loss
    assert (metrics["mse"], metrics["log_variance"]) == (plain["mse"], 0)
    assert "log_variance" not in plain
    own = {name: tree for name, tree in theirs.items() if name != "uncertainty"}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), own, gradients
    )


def test_its_gradient_pulls_u_towards_the_loss(steps):
    """∂/∂w of ℓ exp(-u) + u at u = 0 is mean (1 - ℓ) φ: 1's part of it is known exactly."""
    _, ((loss, _), theirs, t) = steps
    found = np.asarray(theirs["uncertainty"]["kernel"])
    phi = np.asarray(uncertainty_features(PROCESSES["flow"], t))
    # One loss for each of 8 examples explains all 128 numbers.
    losses, *_ = np.linalg.lstsq(phi.T / 8, phi.mean(0) - found, rcond=None)
    np.testing.assert_allclose(phi.T @ (1 - losses) / 8, found, atol=1e-5)
    assert losses.mean() == pytest.approx(float(loss), rel=1e-3)
    assert losses.min() > 0


def test_it_is_counted_and_has_a_rate_of_its_own():
    c = recipe(uncertainty=True)
    mup = recipe(
        {"parametrization": "mup", "base_width": 8, "base_head_width": 4}, uncertainty=True
    )
    shapes = jax.eval_shape(make_task(c).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == cost_of(c).parameters
    task = make_task(mup)
    assert task.rates is not None
    assert task.rates("uncertainty/kernel") == 1
    assert task.rates("blocks/mlp/in/kernel") == 0.5
    optimizer_of(mup, task.rates).init(jax.tree.map(jnp.zeros_like, shapes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"diffusion": {"loss": "meanflow", "time_scale": 1.0}},
            "uncertainty with loss 'meanflow'",
        ),
        ({"adapt": {"base": "x", "kind": "lora"}}, "uncertainty with config.adapt.kind 'lora'"),
        ({"adapt": {"base": "x"}}, "uncertainty with config.adapt.base 'x'"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(UserError, match=message):
        changed(recipe(uncertainty=True), changes)
