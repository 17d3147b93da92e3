"""The adaptive solver against SciPy, and likelihoods that are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.integrate import solve_ivp

from ditjax.diffusion.adaptive import dopri5
from ditjax.diffusion.likelihood import density_bits_per_dim, log_density
from ditjax.diffusion.losses import Objective
from ditjax.diffusion.process import EDM, GVP, VP, Discrete, Flow, mixture
from ditjax.diffusion.schedule import make_schedule
from ditjax.diffusion.solvers import SAMPLERS, velocity_of
from ditjax.errors import UserError

PROCESSES = {
    "flow": (Flow(), "velocity"),
    "gvp": (GVP(), "velocity"),
    "vp": (VP(), "v"),
    "edm": (EDM(), "F"),
    "flow-x0": (Flow(), "x0"),
    "flow-from-noise": (Flow(from_noise=True), "velocity"),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def perfect(made, prediction, weights, means, variance):
    """The perfect network of Σ w_k N(m_k, s²) over samples [B,2,1,1], at each sample's own time."""
    weights, means = (np.asarray(each, np.float64) for each in (weights, means))

    def denoise(x, noise):
        t = made.time_of_noise(noise)
        c = made.at(t)
        a, b = (jnp.reshape(each, (-1, 1, 1, 1)) for each in mixture(made, prediction, c))
        alpha, sigma = (jnp.reshape(each, (-1, 1, 1, 1)) for each in (c.alpha, c.sigma))
        x = x / jnp.reshape(made.c_in(t) + 0 * t, (-1, 1, 1, 1))
        total = alpha**2 * variance + sigma**2
        apart = x[..., None] - alpha[..., None] * jnp.asarray(means).reshape(1, 2, 1, 1, -1)
        logs = jnp.log(jnp.asarray(weights)).reshape(1, -1) - (
            jnp.square(apart).sum((1, 2, 3)) / total.reshape(-1, 1) / 2
        )
        share = jax.nn.softmax(logs).reshape(-1, 1, 1, 1, len(weights))
        centres = jnp.asarray(means).reshape(1, 2, 1, 1, -1)
        gain = alpha[..., None] * variance / total[..., None]
        x0 = (share * (centres + gain * apart)).sum(-1)
        eps = (x - alpha * x0) / jnp.where(sigma == 0, 1, sigma)
        exact = jnp.where(sigma == 0, 0, eps)
        return a * x0 + b * exact

    return denoise


@pytest.mark.parametrize("name", PROCESSES)
def test_the_likelihood_of_a_gaussian(name):
    """N(m, s²): ∂v/∂x is a number, so that one probe gives the trace exactly; 1e-4 a dimension."""
    made, prediction = PROCESSES[name]
    # VP and EDM end short of pure noise, where a mean other than 0 is not quite gone.
    mean = np.array([[0.3], [-0.5]]) * (name not in ("vp", "edm"))
    variance = 0.49
    x0 = np.random.default_rng(0).normal(0, 0.9, (5, 2, 1, 1))
    found = jax.jit(
        lambda x: log_density(
            Objective(made, prediction, "none"),
            perfect(made, prediction, [1.0], mean, variance),
            x,
            jnp.ones_like(x),
            rtol=1e-6,
            atol=1e-6,
        )
    )(jnp.asarray(x0))
    exact = stats.norm(mean[:, 0], variance**0.5).logpdf(x0[..., 0, 0]).sum(1)
    # At t = 1e-4, where a prediction of x0 must stop, the data are already that much wider.
    atol = 4e-4 if name == "flow-x0" else 2e-4
    np.testing.assert_allclose(found.log_density, exact, atol=atol)
    assert np.all(np.asarray(found.evaluations) < 600)


def test_the_likelihood_of_a_mixture():
    """Two modes in two dimensions: .01 nats on average over 128 points.

    Each point has the probes (1, 1) and (1, -1), whose mean is the trace itself.
    """
    made, prediction = Flow(), "velocity"
    means, variance = np.array([[-0.6, 0.7], [0.4, -0.3]]), 0.25
    rng = np.random.default_rng(1)
    x0 = means.T[rng.integers(0, 2, 128)] + 0.5 * rng.standard_normal((128, 2))
    probe = np.repeat([[1.0, 1.0], [1.0, -1.0]], 128, axis=0)
    found = jax.jit(
        lambda x, z: log_density(
            Objective(made, prediction, "none"),
            perfect(made, prediction, [0.5, 0.5], means, variance),
            x,
            z,
        )
    )(jnp.asarray(np.tile(x0, (2, 1))[..., None, None]), jnp.asarray(probe[..., None, None]))
    density = sum(0.5 * stats.multivariate_normal(mean, variance).pdf(x0) for mean in means.T)
    error = np.asarray(found.log_density).reshape(2, 128) - np.log(density)
    assert abs(error.mean()) < 0.01
    assert np.abs(error.mean(axis=0)).max() < 0.01
    assert error.std() > 0.05, "one probe alone is an estimate"


def test_bits_per_dim():
    assert float(density_bits_per_dim(jnp.float64(0.0), 64, 2 / 255)) == pytest.approx(
        np.log2(127.5)
    )
    assert float(density_bits_per_dim(jnp.float64(-np.log(2) * 64), 64, 1.0)) == pytest.approx(1)


def test_ddpm_has_no_likelihood():
    made = Discrete(make_schedule("linear"))
    x = jnp.zeros((1, 2, 1, 1))
    with pytest.raises(UserError, match="no flow in continuous time"):
        log_density(Objective(made), lambda x, t: x, x, x)


# ---- the solver


def oscillator(t, state):
    """Each sample with its own frequency, forced."""
    y, w = state[..., :2], jnp.arange(1, 5, dtype=state.dtype)[:, None]
    return jnp.stack([w[:, 0] * y[:, 1], -w[:, 0] * y[:, 0] + jnp.cos(t)], -1)


@pytest.mark.parametrize(("start", "end"), [(0.0, 3.0), (3.0, 0.0)])
@pytest.mark.parametrize("rtol", [1e-4, 1e-7])
def test_dopri5_is_as_exact_as_asked(start, end, rtol):
    """Within 10 tolerances of SciPy's DOP853 at 1e-12, forwards and backwards."""
    y = np.random.default_rng(0).normal(size=(4, 2))
    found = jax.jit(
        lambda y: dopri5(oscillator, y, start, end, rtol=rtol, atol=rtol, first_step=0.3)
    )(jnp.asarray(y))
    assert np.all(found.arrived)
    for k in range(4):
        w = k + 1
        exact = solve_ivp(
            lambda t, y, w=w: [w * y[1], -w * y[0] + np.cos(t)],
            (start, end),
            y[k],
            "DOP853",
            rtol=1e-12,
            atol=1e-12,
        ).y[:, -1]
        assert np.abs(found.state[k] - exact).max() < 10 * rtol * max(1, np.abs(exact).max())
    # Faster ones take more steps.
    assert np.all(np.diff(found.evaluations) >= 0)
    assert found.evaluations[3] > found.evaluations[0]


def test_a_sample_does_not_depend_on_its_batch():
    """Bit for bit: alone, and beside samples of other stiffness."""
    y = jnp.asarray(np.random.default_rng(2).normal(size=(4, 2)))
    rate = jnp.asarray([1.0, 30.0, 0.1, 300.0])

    def run(y, rate):
        return dopri5(lambda t, y: -rate[:, None] * y, y, 0.0, 1.0)

    whole = jax.jit(run)(y, rate)
    for k in range(4):
        alone = jax.jit(run)(y[k : k + 1], rate[k : k + 1])
        np.testing.assert_array_equal(alone.state[0], whole.state[k])
        assert alone.evaluations[0] == whole.evaluations[k]


def test_steps_that_do_not_suffice_are_not_finite():
    y = jnp.asarray([[1.0, 1.0]])
    found = dopri5(lambda t, y: -50 * y, y, 0.0, 1.0, rtol=1e-9, atol=1e-9, max_steps=5)
    assert not found.arrived[0]
    assert np.all(np.isnan(found.state))


@pytest.mark.parametrize("name", ["flow", "gvp", "vp", "edm"])
def test_the_adaptive_sampler_is_many_steps_of_another(name):
    made, prediction = PROCESSES[name]
    denoise = perfect(made, prediction, [0.5, 0.5], [[-0.6, 0.7], [0.4, -0.3]], 0.25)
    x = jnp.asarray(made.prior_std * np.random.default_rng(0).normal(size=(8, 2, 1, 1)))
    first = made.first_time(prediction)

    def solved(sampler, times, **options):
        return SAMPLERS[sampler].solve(
            denoise, Objective(made, prediction, "none"), times, x, lambda i: x, clip_x0=False,
            **options,
        )  # fmt: skip

    found = solved("dopri5", np.array([first, 0.0]), rtol=1e-6)
    times = np.linspace(first**0.25, (made.low or 1e-4) ** 0.25, 2001) ** 4
    np.testing.assert_allclose(found, solved("dpmpp_2m", times), atol=2e-3)


def test_velocities_of_all_predictions_agree():
    """The perfect network's, whatever it predicts."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 1, 1)))
    t = jnp.linspace(0.1, 0.9, 6)
    found = [
        velocity_of(
            Objective(GVP(), prediction, "none"),
            perfect(GVP(), prediction, [0.5, 0.5], [[-0.6, 0.7], [0.4, -0.3]], 0.25),
            t,
            x,
        )
        for prediction in GVP.predictions
    ]
    for each in found[1:]:
        np.testing.assert_allclose(each, found[0], atol=1e-10)
