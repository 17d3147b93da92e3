"""Average velocities: exact on a Gaussian, the loss against its formula and against differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.diffusion.losses import LOSSES, Objective
from ditjax.diffusion.meanflow import (
    adaptively_weighted,
    guided_velocity,
    meanflow_target,
    null_weight,
    total_derivative,
)
from ditjax.diffusion.process import Flow
from ditjax.diffusion.samplers import per_sample_noise
from ditjax.diffusion.solvers import SAMPLERS
from ditjax.diffusion.times import Times, draw_intervals, draw_times

OBJECTIVE = Objective(Flow(time_scale=1.0), "velocity", "none")
STD = 0.6  # of the data, in every pixel


def per(value):
    return value[:, None, None, None]


def variance(t):
    return (STD * (1 - t)) ** 2 + t**2


def average(x, t, h=None):
    """x (1 - √(v_r/v_t)) / h for x0 ~ N(0, STD²), v = (1-t)² STD² + t²; finite at h = 0, too."""
    r = t if h is None else t - h
    slope = (t + r) * (1 + STD**2) - 2 * STD**2  # (v_t - v_r) / h
    return x * per(slope / (variance(t) + jnp.sqrt(variance(t) * variance(r))))


def drawn(dtype, batch=64):
    rng = np.random.default_rng(0)
    t = rng.uniform(0, 1, batch)
    r = t * rng.uniform(0, 1, batch)
    r[: batch // 4] = t[: batch // 4]
    x = rng.normal(size=(batch, 2, 2, 1)) * np.sqrt(variance(t)).reshape(-1, 1, 1, 1)
    return tuple(jnp.asarray(each, dtype) for each in (x, t, r))


@pytest.mark.parametrize(("dtype", "within"), [(jnp.float32, 1e-5), (jnp.float64, 1e-13)])
def test_the_average_velocity_of_a_gaussian_is_its_own_target(dtype, within):
    """The identity u = v - (t - r) du/dt, along the true velocity u(x, t, t)."""
    with jax.enable_x64(dtype == jnp.float64):
        x, t, r = drawn(dtype)
        velocity = average(x, t)
        u, derivative = jax.jit(functools.partial(total_derivative, average))(x, t, t - r, velocity)
        assert u.dtype == dtype
        np.testing.assert_allclose(meanflow_target(velocity, derivative, t, r), u, atol=within)
        # A velocity that is not the path's has another.
        _, wrong = total_derivative(average, x, t, t - r, 2 * velocity)
        assert float(jnp.abs(meanflow_target(velocity, wrong, t, r) - u).max()) > 0.1


@pytest.mark.parametrize("times", [[1, 0], [1, 0.7, 0.31, 0], np.linspace(1, 0, 9)])
def test_one_step_is_exact_and_so_are_many(times):
    """The flow of a Gaussian takes x_1 to STD x_1, whose variance is that of the data."""
    with jax.enable_x64(True):
        x_1, _, _ = drawn(jnp.float64)
        noise = per_sample_noise(jax.random.split(jax.random.key(0), 64), (2, 2, 1))
        sampler = SAMPLERS["meanflow"]
        solve = jax.jit(
            lambda x, clip: sampler.solve(
                average, OBJECTIVE, np.asarray(times, np.float64), x, noise, clip_x0=clip
            ),
            static_argnums=1,
        )
        np.testing.assert_allclose(solve(x_1, False), STD * x_1, atol=1e-14)
        np.testing.assert_allclose(solve(x_1, True), jnp.clip(STD * x_1, -1, 1), atol=1e-14)
        assert len(sampler.evaluated(OBJECTIVE.process, np.asarray(times))) == len(times) - 1


# ---- the loss

WEIGHTS = np.random.default_rng(3).normal(size=(5, 2))


def network(weights, x, t, h=None, shift=0.0):
    """A nonlinear one of 2 pixels, t and h; a null label shifts it."""
    h = jnp.zeros_like(t) if h is None else h
    features = jnp.concatenate([x.reshape(-1, 2), jnp.stack([t, h, t * h], axis=1)], axis=1)
    return jnp.tanh(features @ weights + shift).reshape(x.shape)


def loss_of(loss, weights, batch, **options):
    x0, eps, t, r, dropped = batch
    return LOSSES[loss].evaluate(
        OBJECTIVE,
        functools.partial(network, weights),
        x0,
        t,
        eps,
        r=r,
        unconditional=functools.partial(network, weights, shift=0.3),
        dropped=dropped,
        **options,
    )


def batch_of(count=6):
    rng = np.random.default_rng(1)
    t = rng.uniform(0.2, 1, count)
    r = t * rng.uniform(0, 1, count)
    r[0] = t[0]
    arrays = [*rng.normal(size=(2, count, 2, 1, 1)), t, r, np.arange(count) % 3 == 2]
    return [jnp.asarray(each) for each in arrays]


def expected_error(loss, weights, batch, omega, kappa):
    """The error of u as improved MeanFlow writes it: V = u + (t - r) du/dt against the velocity.

    du/dt is a central difference along the path, with r held.
    """
    x0, eps, t, r, dropped = batch
    x_t, v = per(1 - t) * x0 + per(t) * eps, eps - x0
    own, null = (network(weights, x_t, t, None, shift) for shift in (0.0, 0.3))
    guided = omega * v + kappa * own + (1 - omega - kappa) * null
    guided = jnp.where(per(dropped), v, guided)
    along, step = own if loss == "meanflow_v" else guided, 1e-5
    ahead, behind = (network(weights, x_t + s * along, t + s, t + s - r) for s in (step, -step))
    u, derivative = network(weights, x_t, t, t - r), (ahead - behind) / (2 * step)
    return u + per(t - r) * derivative - guided


@pytest.mark.parametrize("loss", ["meanflow", "meanflow_v"])
@pytest.mark.parametrize(
    ("omega", "kappa", "power", "offset"), [(1.0, 0.0, 1.0, 0.01), (0.8, 0.5, 0.5, 0.1)]
)
def test_the_loss_is_its_formula_and_its_target_has_no_gradient(loss, omega, kappa, power, offset):
    options = {
        "target_omega": omega,
        "target_kappa": kappa,
        "adaptive_power": power,
        "adaptive_offset": offset,
    }
    assert set(options) == set(LOSSES[loss].options)
    with jax.enable_x64(True):
        batch, weights = batch_of(), jnp.asarray(WEIGHTS)
        error = expected_error(loss, weights, batch, omega, kappa)
        square = jnp.square(error).sum((1, 2, 3))
        found = jax.jit(functools.partial(loss_of, loss, **options))(weights, batch)
        np.testing.assert_allclose(found["loss"], square / (square + offset) ** power, rtol=1e-7)
        np.testing.assert_allclose(found["mse"], square / 2, rtol=1e-7)

        # Two passes: the weighted error is a constant, and only u moves.
        def second_pass(weights):
            x0, eps, t, r, _ = batch
            u = network(weights, per(1 - t) * x0 + per(t) * eps, t, t - r)
            return (2 * error / per((square + offset) ** power) * u).sum()

        gradient = jax.grad(lambda w: loss_of(loss, w, batch, **options)["loss"].sum())(weights)
        np.testing.assert_allclose(gradient, jax.grad(second_pass)(weights), rtol=1e-6)


def test_a_guided_velocity_is_its_own_fixed_point_at_the_scale():
    """g = ω v + κ g + (1 - ω - κ) u has g = u + ω/(1 - κ) (v - u)."""
    rng = np.random.default_rng(0)
    v, u = (jnp.asarray(each) for each in rng.normal(size=(2, 3, 2, 2, 1)))
    for omega, kappa in ((0.2, 0.92), (1.0, 0.5), (2.0, 0.0)):
        g = u + omega / (1 - kappa) * (v - u)
        np.testing.assert_allclose(guided_velocity(v, g, u, omega, kappa), g, rtol=1e-5)
    # What has no weight is not read.
    nothing = jnp.full_like(v, jnp.nan)
    assert jnp.array_equal(guided_velocity(v, nothing, nothing, 1.0, 0.0), v)
    assert jnp.isfinite(guided_velocity(v, u, nothing, 0.9, 0.1)).all()
    assert null_weight(0.9, 0.1) == null_weight(1.0, 0.0) == 0
    assert null_weight(0.1, 0.2) == pytest.approx(0.7)


def test_an_adaptive_weight_is_a_constant():
    error = jnp.array([0.0, 0.5, 40.0])
    found, gradient = jax.vmap(jax.value_and_grad(lambda e: adaptively_weighted(e, 1.0, 0.01)))(
        error
    )
    np.testing.assert_allclose(found, error / (error + 0.01), rtol=1e-6)
    np.testing.assert_allclose(gradient, 1 / (error + 0.01), rtol=1e-6)
    assert jnp.array_equal(adaptively_weighted(error, 0.0, 0.01), error)


def test_the_further_evaluations_are_those_that_have_a_weight():
    def counted(loss, omega, kappa):
        return LOSSES[loss].evaluations(target_omega=omega, target_kappa=kappa)

    assert [counted("meanflow", *each) for each in ((1, 0), (2, 0), (0.5, 0.5), (1, 0.5))] == [
        0,
        1,
        1,
        2,
    ]
    assert [counted("meanflow_v", *each) for each in ((1, 0), (2, 0), (1, 0.5))] == [1, 2, 2]


def test_intervals_end_before_they_begin_for_their_share():
    times, process = Times("logit_normal", mean=-0.4), OBJECTIVE.process
    key = jax.random.key(0)
    draw = jax.jit(lambda share: draw_intervals(times, process, key, 20_000, share))
    t, r = draw(0.25)
    assert jnp.all(r <= t)
    apart = r < t
    assert float(apart.mean()) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 20_000) ** 0.5)
    # t is the larger and r the smaller of two independent times.
    pair = jax.jit(jax.vmap(lambda k: draw_times(times, process, k, 20_000)))
    pairs = np.sort(pair(jax.random.split(key)), axis=0)
    for found, expected in ((t, pairs[1]), (r[apart], pairs[0])):
        error = 4 * expected.std() * (1 / len(found) + 1 / len(expected)) ** 0.5
        assert abs(float(found.mean()) - float(expected.mean())) < float(error)
    for share, all_apart in ((0.0, False), (1.0, True)):
        t, r = draw(share)
        assert bool((r < t).all()) == bool((r != t).any()) == all_apart
