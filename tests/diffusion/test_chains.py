"""Chains as Gaussians: the exact gradient of a scalar one, and the parts of the objectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ditjax.diffusion import chains
from ditjax.diffusion.gaussian import normal_kl
from ditjax.diffusion.losses import Objective
from ditjax.diffusion.process import Flow
from ditjax.diffusion.samplers import ddim_steps, ddpm_steps, walk
from ditjax.diffusion.schedule import make_schedule, respace
from ditjax.diffusion.solvers import general_ddim_steps
from ditjax.errors import UserError

SCHEDULE = respace(make_schedule("linear", 1000), "10")
SHAPE = (4, 2, 3, 1)


def affine(theta):
    return lambda x, t: theta[0] * x + theta[1]


def scalar_steps(theta, x_T):
    """DDPM with a network x̂0 = kx + b."""
    return ddpm_steps(affine(theta), SCHEDULE, x_T, prediction="x0", variance="fixed_small")


# ---- the scalar chain


def exact_objective(k, b):
    """E[-(x0 - 1)²] by recursion of the two moments, in float64."""
    mean, variance = 0.0, 1.0
    sigma = np.exp(0.5 * SCHEDULE.posterior_log_variance_clipped)
    for t in reversed(range(len(SCHEDULE))):
        of_x0, of_x = SCHEDULE.posterior_mean_x0[t], SCHEDULE.posterior_mean_x_t[t]
        slope = of_x0 * k + of_x
        mean, variance = slope * mean + of_x0 * b, slope**2 * variance + sigma[t] ** 2
    return -((mean - 1) ** 2 + variance)


@jax.jit
def estimates(keys):
    """DDPO's gradient by (k, b) of batches of chains, with and without the last step -> f32[n,2,2].

    One batch of 15,000 chains for each key.
    """
    theta, n = jnp.array([0.5, 0.1], jnp.float32), len(SCHEDULE)

    def one(key):
        of_x, of_noise = jax.random.split(key)
        x_T = jax.random.normal(of_x, (15_000, 1, 1, 1), jnp.float32)

        def noise(i):
            return jax.random.normal(jax.random.fold_in(of_noise, i), x_T.shape, jnp.float32)

        found = chains.draw_chains(scalar_steps(theta, x_T), x_T, noise)
        reward = -jnp.square(found.x[:, -1] - 1).reshape(-1)
        advantage = reward - reward.mean()
        sigma = jnp.asarray(chains.deviations(scalar_steps(theta, x_T)), jnp.float32)

        def surrogates(theta):
            steps, x = scalar_steps(theta, x_T), found.x.swapaxes(0, 1)

            def each(x, x_next, old, row, sigma):
                ratio = chains.log_ratio(x_next, chains.step_mean(steps, x, row), old, sigma, "sum")
                return -chains.clipped_surrogate(ratio, advantage, 0.1).mean()

            along = (x[:-1], x[1:], found.mean.swapaxes(0, 1), steps.rows, sigma)
            _, terms = jax.lax.scan(lambda c, step: (c, each(*step)), None, along)
            return jnp.stack([terms.sum(), terms[: n - 1].sum()])

        return jax.jacrev(surrogates)(theta)

    return jax.lax.map(one, keys)


def test_ddpo_is_the_gradient_of_the_expected_reward():
    h = 1e-5
    exact = [
        (exact_objective(0.5 + h, 0.1) - exact_objective(0.5 - h, 0.1)) / (2 * h),
        (exact_objective(0.5, 0.1 + h) - exact_objective(0.5, 0.1 - h)) / (2 * h),
    ]
    np.testing.assert_allclose(exact_objective(0.5, 0.1), -0.690860, atol=1e-6)
    np.testing.assert_allclose(exact, (0.159986, 3.000171), atol=1e-6)
    found = np.asarray(estimates(jax.random.split(jax.random.key(0), 20)), np.float64)
    mean, error = found.mean(axis=0), found.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert (error < 0.12).all()
    assert (np.abs(mean[0] - exact) < 3.5 * error[0]).all()
    # Without the last step's own score, of which the reward is most, it is another gradient.
    assert (np.abs(mean[1] - (-0.015345, 1.367743)) < 3.5 * error[1]).all()
    assert mean[1, 1] < exact[1] - 10 * error[1, 1]


# ---- the steps


def denoise(x, t):
    level = t.astype(jnp.float32)[:, None, None, None] / 1000
    return jnp.tanh(x) * (1 + level)


def made(name, x_T):
    if name == "flow":
        objective = Objective(Flow(), "velocity", "none")
        times = np.linspace(1, 0, 7)
        return general_ddim_steps(denoise, objective, times, x_T, clip_x0=True, eta=0.7)
    if name == "ddim":
        return ddim_steps(denoise, SCHEDULE, x_T, eta=1.0)
    return ddpm_steps(denoise, SCHEDULE, x_T, variance=name)


@pytest.mark.parametrize("name", ["fixed_small", "fixed_large", "ddim", "flow"])
def test_chains_are_the_samplers_steps_but_for_the_last_noise(name):
    table = jnp.asarray(np.random.default_rng(0).standard_normal((11, *SHAPE)), jnp.float32)
    x_T, noise = table[-1], lambda i: table[i]
    steps = made(name, x_T)
    found = jax.jit(lambda: chains.draw_chains(steps, x_T, noise))()
    np.testing.assert_allclose(found.mean[:, -1], walk(steps, x_T, noise), rtol=1e-5, atol=1e-5)
    sigma = chains.deviations(steps).astype(np.float32)
    n = len(sigma)
    assert found.x.shape == (SHAPE[0], n + 1, *SHAPE[1:])
    np.testing.assert_array_equal(found.x[:, 0], x_T)
    spread = sigma.reshape(1, n, 1, 1, 1) * np.swapaxes(table[:n], 0, 1)
    np.testing.assert_allclose(found.x[:, 1:] - found.mean, spread, atol=1e-5)
    assert sigma[-1] == sigma[-2]
    if name == "fixed_small":  # the variance of DDPM's decoder
        decoder = np.exp(0.5 * SCHEDULE.posterior_log_variance_clipped[0])
        np.testing.assert_allclose(sigma[-1], decoder, rtol=1e-6)


def test_steps_without_a_noise_of_their_own_are_refused():
    x = jnp.zeros(SHAPE)
    learned = ddpm_steps(denoise, SCHEDULE, x, variance="learned_range")
    small = ddpm_steps(denoise, SCHEDULE, x, variance="fixed_small")
    for steps in (learned, ddim_steps(denoise, SCHEDULE, x), small._replace(memory=(x,))):
        with pytest.raises(UserError, match="without a memory of those before"):
            chains.deviations(steps)


# ---- the objectives

RNG = np.random.default_rng(1)
X, MEAN, OLD = (jnp.asarray(RNG.standard_normal(SHAPE), jnp.float32) for _ in range(3))


def test_the_log_ratio_is_that_of_two_normals():
    x, mean, old = (np.asarray(each, np.float64) for each in (X, MEAN, OLD))
    expected = stats.norm.logpdf(x, mean, 0.7) - stats.norm.logpdf(x, old, 0.7)
    found = chains.log_ratio(X, MEAN, OLD, jnp.float32(0.7), "sum")
    np.testing.assert_allclose(found, expected.reshape(4, -1).sum(1), rtol=1e-5)
    mean_of = chains.log_ratio(X, MEAN, OLD, jnp.float32(0.7), "mean")
    np.testing.assert_allclose(mean_of, found / 6, rtol=1e-6)
    # A shift of 1e-6 at σ = .01 and 784 dimensions: two sums would differ by rounding alone.
    z = jnp.ones((1, 28, 28, 1), jnp.float32)
    shift = jnp.float32(2**-20)
    found = chains.log_ratio(z * 0.01, z * shift, 0 * z, jnp.float32(0.01), "sum")
    s = float(shift)
    np.testing.assert_allclose(found, 784 * (0.01**2 - (0.01 - s) ** 2) / (2 * 0.01**2), rtol=1e-4)


def test_where_the_weights_are_those_that_drew_it_is_the_score_function():
    advantage = jnp.array([1.0, -2.0, 0.5, 3.0], jnp.float32)
    sigma = jnp.float32(0.3)

    def clipped(mean):
        return chains.clipped_surrogate(
            chains.log_ratio(X, mean, MEAN, sigma, "mean"), advantage, 1e-4
        ).sum()

    def score(mean):
        log_p = -jnp.square(X - mean).reshape(4, -1).mean(1) / (2 * sigma**2)
        return -(advantage * log_p).sum()

    np.testing.assert_allclose(jax.grad(clipped)(MEAN), jax.grad(score)(MEAN), rtol=1e-5)


def test_a_ratio_beyond_the_clip_moves_nothing_further():
    slope = jax.grad(lambda r, a: chains.clipped_surrogate(r, a, 0.1).sum())
    log_ratio = jnp.log(jnp.array([1.2, 1.2, 0.8, 0.8, 1.05], jnp.float32))
    advantage = jnp.array([1.0, -1.0, 1.0, -1.0, 1.0], jnp.float32)
    found = np.asarray(slope(log_ratio, advantage))
    np.testing.assert_array_equal(found == 0, [True, False, False, True, False])
    np.testing.assert_allclose(found[[1, 2, 4]], [1.2, -0.8, -1.05], rtol=1e-5)


def test_the_penalty_is_the_divergence_of_two_normals():
    log_variance = jnp.full(SHAPE, 2 * np.log(0.4), jnp.float32)
    expected = normal_kl(MEAN, log_variance, OLD, log_variance).reshape(4, -1)
    for reduction in ("mean", "sum"):
        found = chains.step_divergence(MEAN, OLD, jnp.float32(0.4), reduction)
        np.testing.assert_allclose(found, getattr(expected, reduction)(1), rtol=1e-5)


def test_advantages_are_of_each_group():
    reward = jnp.array([1.0, 3.0, 10.0, 10.0, 0.0, 100.0], jnp.float32)
    found = chains.advantages(reward, 2, 5.0)
    np.testing.assert_allclose(found, [-1, 1, 0, 0, -1, 1], atol=1e-5)
    assert float(jnp.abs(chains.advantages(reward, 6, 0.5)).max()) == 0.5


def test_the_loss_of_preferences_by_hand():
    one = jnp.ones(1, jnp.float32)
    same = chains.preference_loss(0.3 * one, 0.4 * one, 0.3 * one, 0.4 * one, 5000.0)
    np.testing.assert_allclose(same, np.log(2), rtol=1e-6)
    # The preferred error fell by 2e-4, the other's rose by 1e-4.
    found = chains.preference_loss(0.2998 * one, 0.4001 * one, 0.3 * one, 0.4 * one, 5000.0)
    np.testing.assert_allclose(found, np.log1p(np.exp(-0.75)), rtol=1e-3)
