"""The Gaussians against float64 re-derivations: Bayes' rule, quadrature, and inverses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.diffusion.gaussian import (
    DISCRETE_PREDICTIONS,
    Variance,
    discretized_gaussian_log_likelihood,
    eps_from_v,
    eps_from_x0,
    learned_range_log_variance,
    normal_kl,
    p_mean_variance,
    predict,
    q_posterior,
    q_sample,
    split_channels,
    target,
    v_from_x0_eps,
    x0_from_eps,
    x0_from_v,
)
from ditjax.diffusion.schedule import make_schedule, respace
from ditjax.errors import UserError

SCHEDULE = make_schedule("linear")
T = np.array([0, 1, 37, 500, 998, 999], np.int32)
SHAPE = (len(T), 2, 2, 3)


def draw(seed):
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def column(table):
    """A float64 table at T, as [B,1,1,1]."""
    return table[T][:, None, None, None]


X0, EPS = 0.5 * draw(0), draw(1)
ALPHAS_BAR = column(np.exp(np.cumsum(np.log1p(-SCHEDULE.betas))))
X_T = (np.sqrt(ALPHAS_BAR) * X0 + np.sqrt(1 - ALPHAS_BAR) * EPS).astype(np.float32)
V = (np.sqrt(ALPHAS_BAR) * EPS - np.sqrt(1 - ALPHAS_BAR) * X0).astype(np.float32)
# Capitals are NumPy, for what is expected; the same in lower case is what functions are given.
x0, eps, x_t, v, t = (jnp.asarray(array) for array in (X0, EPS, X_T, V, T))
# float32's rounding of x_t comes back multiplied by 1/√ᾱ_t in x0, and 1/√(1-ᾱ_t) in eps.
X0_ERROR = 1e-6 / np.sqrt(ALPHAS_BAR)
EPS_ERROR = 1e-6 / np.sqrt(1 - ALPHAS_BAR)


def within(actual, expected, error):
    np.testing.assert_array_less(np.abs(np.asarray(actual, np.float64) - expected) / error, 1)


def test_q_sample_and_v_are_their_equations():
    np.testing.assert_allclose(q_sample(SCHEDULE, x0, t, eps), X_T, atol=1e-6)
    np.testing.assert_allclose(v_from_x0_eps(SCHEDULE, x0, t, eps), V, atol=1e-6)


def test_round_trips_between_eps_x0_and_v():
    within(x0_from_eps(SCHEDULE, x_t, t, eps), X0, X0_ERROR)
    within(eps_from_x0(SCHEDULE, x_t, t, x0), EPS, EPS_ERROR)
    # v is a rotation of (x0, eps): its inverse loses nothing at any t.
    within(x0_from_v(SCHEDULE, x_t, t, v), X0, 2e-6)
    within(eps_from_v(SCHEDULE, x_t, t, v), EPS, 2e-6)


def test_targets_are_what_each_prediction_is_inverted_from():
    cases: dict[str, np.ndarray] = {"eps": EPS, "x0": X0, "v": V}
    for prediction, expected in cases.items():
        np.testing.assert_allclose(
            target(SCHEDULE, x0, t, eps, prediction), expected, atol=1e-6, err_msg=prediction
        )
    with pytest.raises(UserError, match="Did you mean 'eps'"):
        target(SCHEDULE, x0, t, eps, "epsilon")


def test_q_posterior_is_bayes_rule():
    mean, log_variance = q_posterior(SCHEDULE, x0, x_t, t)
    later = T > 0
    beta = column(SCHEDULE.betas)[later]
    before = column(np.append(1, SCHEDULE.alphas_bar[:-1]))[later]
    precision = 1 / (1 - before) + (1 - beta) / beta
    expected = (
        np.sqrt(before) * X0[later] / (1 - before) + np.sqrt(1 - beta) * X_T[later] / beta
    ) / precision
    np.testing.assert_allclose(mean[later], expected, atol=2e-6)
    np.testing.assert_allclose(log_variance[later], -np.log(precision), atol=1e-5)
    np.testing.assert_allclose(mean[~later], X0[~later], atol=1e-6)


@pytest.mark.parametrize("prediction", DISCRETE_PREDICTIONS)
def test_p_mean_is_ddpm_eq_11_whatever_the_network_predicts(prediction):
    out = {"eps": eps, "x0": x0, "v": v}[prediction]
    p = p_mean_variance(SCHEDULE, out, x_t, t, prediction=prediction, variance="fixed_small")
    beta = column(SCHEDULE.betas)
    expected = (X_T - beta / np.sqrt(1 - ALPHAS_BAR) * EPS) / np.sqrt(1 - beta)
    np.testing.assert_allclose(p.mean, expected, atol=5e-6)
    within(p.x0, X0, 2 * X0_ERROR)
    within(p.eps, EPS, 2 * EPS_ERROR)


def test_variances_are_beta_tilde_beta_and_between():
    beta = SCHEDULE.betas[T]
    tilde = beta * (1 - np.append(1, SCHEDULE.alphas_bar)[T]) / (1 - SCHEDULE.alphas_bar[T])
    tilde[0] = tilde[1]
    fixed: dict[Variance, np.ndarray] = {
        "fixed_small": tilde,
        "fixed_large": np.where(T > 0, beta, tilde),
    }
    with_v = jnp.concatenate([eps, jnp.asarray(draw(2))], axis=-1)
    for variance, expected in fixed.items():
        for out in (eps, with_v):  # variance channels are ignored
            p = p_mean_variance(SCHEDULE, out, x_t, t, prediction="eps", variance=variance)
            assert p.log_variance.shape == SHAPE
            np.testing.assert_allclose(p.log_variance[:, 0, 0, 0], np.log(expected), atol=1e-5)
    for end, expected in [(-1, tilde), (1, beta), (0, np.sqrt(beta * tilde))]:
        log_variance = learned_range_log_variance(SCHEDULE, jnp.full(SHAPE, end, jnp.float32), t)
        np.testing.assert_allclose(log_variance[:, 1, 1, 2], np.log(expected), atol=1e-5)
    p = p_mean_variance(SCHEDULE, with_v, x_t, t, prediction="eps", variance="learned_range")
    fraction = (draw(2) + 1) / 2
    expected = (
        fraction * np.log(column(SCHEDULE.betas))
        + (1 - fraction) * np.log(tilde)[:, None, None, None]
    )
    np.testing.assert_allclose(p.log_variance, expected, atol=1e-5)


@pytest.mark.parametrize("prediction", DISCRETE_PREDICTIONS)
def test_clipping_bounds_x0_and_keeps_eps_and_mean_consistent(prediction):
    out = jnp.asarray(4 * draw(3))
    p = p_mean_variance(
        SCHEDULE, out, x_t, t, prediction=prediction, variance="fixed_small", clip_x0=True
    )
    raw = p_mean_variance(SCHEDULE, out, x_t, t, prediction=prediction, variance="fixed_small")
    assert jnp.abs(raw.x0).max() > 1
    np.testing.assert_array_equal(p.x0, jnp.clip(raw.x0, -1, 1))
    back = np.sqrt(ALPHAS_BAR) * np.asarray(p.x0) + np.sqrt(1 - ALPHAS_BAR) * np.asarray(p.eps)
    np.testing.assert_allclose(back, X_T, atol=1e-5)
    np.testing.assert_array_equal(p.mean, q_posterior(SCHEDULE, p.x0, x_t, t)[0])


def test_kl_is_the_integral():
    cases = np.array([[0, 0, 0, 0], [0.3, -1, 0.1, -0.5], [-2, 1, 1, 0.2], [0, -3, 0, 0]])
    z = np.linspace(-40, 40, 200_001)
    for m1, l1, m2, l2 in cases:
        log_p = -0.5 * ((z - m1) ** 2 * np.exp(-l1) + l1 + np.log(2 * np.pi))
        log_q = -0.5 * ((z - m2) ** 2 * np.exp(-l2) + l2 + np.log(2 * np.pi))
        expected = np.trapezoid(np.exp(log_p) * (log_p - log_q), z)
        kl = normal_kl(*(jnp.float32(value) for value in (m1, l1, m2, l2)))
        np.testing.assert_allclose(kl, expected, rtol=1e-5, atol=1e-7)


def test_kl_of_nearly_equal_gaussians_keeps_its_digits():
    gap = np.array([-1e-3, 2e-3, -3e-3], np.float32)
    zero = jnp.zeros(3)
    series = np.float64(gap) ** 2 / 4 + np.float64(gap) ** 3 / 12
    np.testing.assert_allclose(normal_kl(zero, jnp.asarray(gap), zero, zero), series, rtol=1e-3)


def test_discretized_likelihood_sums_to_one_over_the_256_pixels():
    pixels = jnp.linspace(-1, 1, 256, dtype=jnp.float32)
    for mean, scale in [(0.0, 0.05), (0.97, 0.3), (-1.2, 2.0)]:
        log_mass = discretized_gaussian_log_likelihood(
            pixels, jnp.float32(mean), jnp.log(jnp.float32(scale))
        )
        np.testing.assert_allclose(jnp.exp(log_mass).sum(), 1, atol=1e-5)


def test_discretized_likelihood_is_the_mass_of_the_bin():
    def cdf(z):
        return 0.5 * math.erfc(-z / math.sqrt(2))

    mean, scale = 0.1, 0.02
    for x in (-1.0, -0.9995, 0.08, 0.1, 0.137, 0.9995):
        for m in (mean, x):
            above, below = cdf((x + 1 / 255 - m) / scale), cdf((x - 1 / 255 - m) / scale)
            mass = above if x < -0.999 else 1 - below if x > 0.999 else above - below
            log_mass = discretized_gaussian_log_likelihood(
                jnp.float32(x), jnp.float32(m), jnp.log(jnp.float32(scale))
            )
            np.testing.assert_allclose(jnp.exp(log_mass), mass, atol=7e-4)


def test_discretized_likelihood_far_out_is_floored_with_a_finite_gradient():
    def log_mass(mean):
        return discretized_gaussian_log_likelihood(jnp.float32(0), mean, jnp.float32(-5))

    for mean in (1.0, -50.0, 1e4):
        value, gradient = jax.value_and_grad(log_mass)(jnp.float32(mean))
        np.testing.assert_allclose(value, math.log(1e-12), rtol=1e-6)
        assert gradient == 0


def test_network_is_fed_the_original_timestep_and_its_output_is_float32():
    short = respace(SCHEDULE, "10,15,20")
    index = jnp.array([0, 10, 44], jnp.int32)
    x = jnp.zeros((3, 1, 1, 1))

    def denoise(x, timesteps):
        assert timesteps.dtype == jnp.int32
        return timesteps.astype(jnp.bfloat16)[:, None, None, None]

    out = predict(denoise, short, x, index)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out.ravel(), jnp.array([0, 334, 999]).astype(jnp.bfloat16))


def test_channels_and_names_that_do_not_fit():
    predicted, variance_channels = split_channels(jnp.arange(8.0), 4)
    assert predicted.tolist() == [0, 1, 2, 3]
    assert variance_channels is not None
    assert variance_channels.tolist() == [4, 5, 6, 7]
    assert split_channels(jnp.arange(4.0), 4)[1] is None
    with pytest.raises(UserError, match="gives 5 channels for an input of 4"):
        split_channels(jnp.arange(5.0), 4)

    def p(prediction, variance):
        return p_mean_variance(SCHEDULE, eps, x_t, t, prediction=prediction, variance=variance)

    with pytest.raises(UserError, match="needs a network with 6 output channels"):
        p("eps", "learned_range")
    with pytest.raises(UserError, match="Did you mean 'fixed_small'"):
        p("eps", "fixed_smal")
    with pytest.raises(UserError, match="prediction 'velocity' is unknown"):
        p("velocity", "fixed_small")
