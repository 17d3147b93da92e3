"""The algebra of processes, predictions, weightings and times: each identity to a rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ditjax.diffusion import process, weighting
from ditjax.diffusion.losses import Objective, simple_loss
from ditjax.diffusion.process import EDM, GVP, VP, Discrete, Flow, mixture, precondition
from ditjax.diffusion.schedule import make_schedule
from ditjax.diffusion.times import QUANTILES, Times, draw_times, stratified_times
from ditjax.diffusion.weighting import WEIGHTINGS, Weighting, check_weighting, weight
from ditjax.errors import UserError

PROCESSES = {
    "flow": Flow(),
    "flow-from-noise": Flow(1.0, from_noise=True),
    "gvp": GVP(),
    "vp": VP(),
    "edm": EDM(),
    "ddpm": Discrete(make_schedule("linear")),
}
PAIRS = [(name, each) for name, made in PROCESSES.items() for each in made.predictions]
RNG = np.random.default_rng(0)
X0, EPS = RNG.standard_normal((2, 6, 2, 2, 3))


def inner_times(made, n=6):
    """Times f64[n] inside the range, integers for a discrete process."""
    if isinstance(made, Discrete):
        return np.linspace(20, 980, n).round()
    return np.linspace(0.05, 0.95, n) * (20 if isinstance(made, EDM) else 1)


def column(values):
    return np.reshape(values, (-1, 1, 1, 1))


@pytest.mark.parametrize(("name", "prediction"), PAIRS)
def test_the_estimate_of_x0_inverts_the_target(name, prediction):
    """x̂0 = c_skip x + c_out y is x0 for y = a x0 + b ε, in float64."""
    made = PROCESSES[name]
    t = inner_times(made)
    c, p = made.at(t), precondition(made, prediction, t)
    a, b = mixture(made, prediction, c)
    x = column(c.alpha) * X0 + column(c.sigma) * EPS
    y = column(a) * X0 + column(b) * EPS
    np.testing.assert_allclose(column(p.c_skip) * x + column(p.c_out) * y, X0, atol=1e-9)


@pytest.mark.parametrize(("name", "prediction"), PAIRS)
def test_training_uses_the_same_coefficients_as_sampling(name, prediction):
    """`noised` and `target` of traced times are the table's x_t and y."""
    made = PROCESSES[name]
    t = inner_times(made)
    c = made.at(t)
    a, b = mixture(made, prediction, c)
    kind = jnp.int32 if name == "ddpm" else jnp.float32
    args = jnp.asarray(X0, jnp.float32), jnp.asarray(t, kind), jnp.asarray(EPS, jnp.float32)
    noised = column(c.alpha) * X0 + column(c.sigma) * EPS
    np.testing.assert_allclose(made.noised(*args), noised, rtol=1e-5, atol=2e-5)
    wanted = column(a) * X0 + column(b) * EPS
    np.testing.assert_allclose(made.target(*args, prediction), wanted, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(made.c_noise(args[1]), made.c_noise(t), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_times_between_steps(name):
    """`time_of` inverts σ/α between the steps of a discrete process, too, in NumPy and in JAX."""
    made = PROCESSES[name]
    t = inner_times(made) + (0.3 if name == "ddpm" else 0)
    c = made.at(t)
    np.testing.assert_allclose(made.time_of(c.sigma / c.alpha), t, rtol=1e-9)
    traced = jnp.asarray(t, jnp.float32)
    for each, expected in zip(made.at(traced)[:2], c[:2], strict=True):
        np.testing.assert_allclose(each, expected, rtol=2e-5)
    found = made.time_of(jnp.asarray(c.sigma / c.alpha, jnp.float32))
    np.testing.assert_allclose(found, t, rtol=1e-5)
    noise = t if name == "ddpm" else made.c_noise(t)
    np.testing.assert_allclose(made.c_noise(traced), noise, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["flow", "gvp", "vp", "edm"])
def test_derivatives(name):
    """Against central differences."""
    made, h = PROCESSES[name], 1e-6
    t = inner_times(made)
    c, after, before = made.at(t), made.at(t + h), made.at(t - h)
    np.testing.assert_allclose(c.alpha_dot, (after.alpha - before.alpha) / (2 * h), atol=1e-8)
    np.testing.assert_allclose(c.sigma_dot, (after.sigma - before.sigma) / (2 * h), atol=1e-8)


def test_a_time_from_noise_is_the_same_process():
    """The network is given 1 - t and predicts -v; x̂0 and the guided times are the same."""
    theirs, ours = Flow(1.0, from_noise=True), Flow(1.0)
    t = inner_times(ours)
    np.testing.assert_allclose(theirs.c_noise(t), 1 - t)
    np.testing.assert_allclose(theirs.time_of_noise(theirs.c_noise(t)), t)
    a, b = mixture(theirs, "velocity", theirs.at(t)), mixture(ours, "velocity", ours.at(t))
    np.testing.assert_array_equal(a, np.negative(b))
    p, q = (precondition(each, "velocity", t) for each in (theirs, ours))
    np.testing.assert_allclose(p.c_skip, q.c_skip)
    np.testing.assert_allclose(p.c_out, np.negative(q.c_out))


def test_the_ends_are_exact():
    for made in (Flow(), GVP()):
        c = made.at(np.array([0.0, 1.0]))
        np.testing.assert_array_equal(c.alpha, [1, 0])
        np.testing.assert_array_equal(c.sigma, [0, 1])
    assert VP().at(np.array([0.0])).sigma[0] == 0


def test_edms_f_is_minus_v_of_its_vp_form():
    """Salimans & Ho's v on x0/σ_d with α = σ_d/R, σ = σ/R is -F, R² = σ² + σ_d²."""
    edm, sigma = EDM(sigma_data=0.5), np.geomspace(0.002, 80, 9)
    a, b = mixture(edm, "F", edm.at(sigma))
    root = np.sqrt(sigma**2 + 0.25)
    # v = α ε - σ x0/σ_d
    np.testing.assert_allclose(a, (sigma / root) / 0.5, rtol=1e-12)
    np.testing.assert_allclose(b, -0.5 / root, rtol=1e-12)


def test_edms_coefficients_are_table_1():
    edm, sigma, d = EDM(sigma_data=0.5), np.geomspace(0.002, 80, 9), 0.5
    p = precondition(edm, "F", sigma)
    root2 = sigma**2 + d**2
    np.testing.assert_allclose(p.c_skip, d**2 / root2, rtol=1e-12)
    np.testing.assert_allclose(p.c_out, sigma * d / np.sqrt(root2), rtol=1e-12)
    np.testing.assert_allclose(p.c_in, 1 / np.sqrt(root2), rtol=1e-12)
    np.testing.assert_allclose(p.c_noise, 250 * np.log(sigma), rtol=1e-12)


def loss_of(made, prediction, name, x0_error, t):
    """The loss of a network whose estimate of x0 is off by `x0_error`."""
    kind = jnp.int32 if isinstance(made, Discrete) else jnp.float32
    t = jnp.asarray(t, kind)
    c_out = column(np.asarray(precondition(made, prediction, t).c_out))
    wanted = made.target(jnp.asarray(X0, jnp.float32), t, jnp.asarray(EPS, jnp.float32), prediction)
    objective = Objective(made, prediction, "fixed_small", Weighting(name))
    return simple_loss(
        objective,
        lambda x, time: wanted + x0_error / c_out,
        jnp.asarray(X0, jnp.float32),
        t,
        jnp.asarray(EPS, jnp.float32),
    )["loss"]


@pytest.mark.parametrize("weight_name", ["eps", "x0", "velocity"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "velocity"])
def test_a_weighting_by_a_target_is_the_loss_of_that_target(prediction, weight_name):
    """On GVP: the error of x0 gives the loss that a network of the other target would have."""
    made, error = GVP(), RNG.standard_normal(X0.shape) / 10
    t = inner_times(made)
    found = loss_of(made, prediction, weight_name, error, t)
    np.testing.assert_allclose(found, loss_of(made, weight_name, "none", error, t), rtol=1e-4)


def test_edms_weight_is_one_in_f_space():
    t = np.geomspace(0.01, 50, 6)
    found = weight(EDM(), "F", Weighting("edm"), jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(found, 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("min_snr", lambda snr: np.minimum(snr, 5) / snr),
        ("p2", lambda snr: 1 / (1 + snr) ** 5),
        ("sigmoid", lambda snr: 1 / (1 + np.exp(np.log(snr) - 1))),
    ],
)
def test_weights_in_eps_space(name, form):
    """Hang 2023, Choi 2022, Kingma & Gao 2023, as their papers state them for ε."""
    made = PROCESSES["ddpm"]
    t = inner_times(made)
    c = made.at(t)
    found = weight(made, "eps", Weighting(name), jnp.asarray(t, jnp.int32))
    np.testing.assert_allclose(found, form((c.alpha / c.sigma) ** 2), rtol=1e-4)


@pytest.mark.parametrize("name", ["flow", "gvp", "vp", "edm"])
def test_the_likelihoods_weight_is_the_slope_of_the_snr(name):
    made, h = PROCESSES[name], 1e-5
    t = inner_times(made)
    after, before = made.at(t + h), made.at(t - h)
    slope = ((after.alpha / after.sigma) ** 2 - (before.alpha / before.sigma) ** 2) / (2 * h)
    w = WEIGHTINGS["likelihood"](made, made.at(t), Weighting())
    np.testing.assert_allclose(w, -slope / 2, rtol=1e-5)


def test_a_discrete_process_has_no_slope():
    for name in ("velocity", "likelihood"):
        with pytest.raises(UserError, match="no derivatives by t"):
            check_weighting(PROCESSES["ddpm"], name)
    with pytest.raises(UserError, match="expected one of eps, x0, v"):
        process.check_prediction(PROCESSES["ddpm"], "velocity")
    with pytest.raises(UserError, match="expected one of eps, x0, F"):
        process.check_prediction(EDM(), "v")


def test_a_bounded_velocity():
    """JiT: v = (x - x̂0)/max(t, t_eps) on a flow; exact where t >= t_eps."""
    t = np.array([0.01, 0.04, 0.05, 0.5, 1.0])
    p, exact = (precondition(Flow(), "x0", t, t_eps=e) for e in (0.05, 0.0))
    x, x0 = 0.7, -0.3
    implied = (x - (p.c_skip * x + p.c_out * x0)) / t
    np.testing.assert_allclose(implied, (x - x0) / np.maximum(t, 0.05), rtol=1e-12)
    np.testing.assert_array_equal(p.c_out[2:], exact.c_out[2:])
    assert weighting.weight(
        Flow(), "x0", Weighting("velocity", t_eps=0.05), jnp.float32([0.01, 0.1])
    ).tolist() == pytest.approx([400, 100], rel=1e-5)


# ---- times


@pytest.mark.parametrize("name", QUANTILES)
def test_quantiles_rise_from_0_to_1(name):
    """Each is the quantile function of a distribution on (0, 1): monotone, and of finite ends."""
    times = Times(name)
    t = np.asarray(QUANTILES[name](jnp.linspace(0, 1, 1001, dtype=jnp.float32), times))
    assert np.all(np.isfinite(t))
    assert t.min() >= 0
    assert t.max() <= 1
    slope = np.diff(t)
    assert np.all(slope >= -1e-6) or (name == "mode" and np.all(slope <= 1e-6))


def test_densities():
    """Against SciPy and Esser et al. 2024's densities."""
    u = jnp.asarray((np.arange(20_000) + 0.5) / 20_000, jnp.float32)
    t = np.asarray(QUANTILES["logit_normal"](u, Times(mean=-0.4, std=1.2)))
    logit = np.log(t / (1 - t))
    assert stats.kstest(logit, stats.norm(-0.4, 1.2).cdf).statistic < 1e-3
    t = np.sort(np.asarray(QUANTILES["cosmap"](u, Times())))
    grid = np.linspace(0.01, 0.99, 50)
    density = 2 / (np.pi - 2 * np.pi * grid + 2 * np.pi * grid**2)
    found = np.diff(np.searchsorted(t, [grid - 0.01, grid + 0.01]), axis=0)[0] / 20_000 / 0.02
    np.testing.assert_allclose(found, density, rtol=0.01)


def test_edms_lognormal_sigma_is_a_logit_normal_time():
    key = jax.random.key(0)
    times = Times("logit_normal", mean=-1.2, std=1.2)
    sigma = draw_times(times, EDM(sigma_min=1e-9, sigma_max=1e9), key, 4096)
    t = draw_times(times, Flow(), key, 4096)
    np.testing.assert_allclose(sigma, t / (1 - t), rtol=1e-4)
    logs = np.log(np.asarray(sigma))
    assert abs(logs.mean() + 1.2) < 5 * 1.2 / 64
    assert abs(logs.std() - 1.2) < 5 * 1.2 / 90


def test_a_shift_moves_the_logit():
    key = jax.random.key(1)
    plain, moved = (draw_times(Times(shift=s), Flow(), key, 512) for s in (1.0, 3.0))
    logit = [np.log(t / (1 - t)) for t in (np.asarray(plain), np.asarray(moved))]
    np.testing.assert_allclose(logit[1] - logit[0], np.log(3), atol=2e-3)


@pytest.mark.parametrize("name", PROCESSES)
def test_stratified_times_leave_no_part_out(name):
    """One in each 64th of the distribution, in an order that changes with the key."""
    made = PROCESSES[name]
    first, second = (
        np.asarray(draw_times(Times(stratified=True), made, jax.random.key(k), 64)) for k in (0, 1)
    )
    assert not np.array_equal(np.argsort(first), np.argsort(second))
    edges = np.asarray(made.from_unit(jnp.linspace(0, 1, 65)[1:-1]))
    np.testing.assert_array_equal(np.searchsorted(edges, np.sort(first), side="right"), range(64))


def test_ddpms_uniform_times_are_the_papers_draw():
    """The same integers as `sample_timesteps`; and other distributions cover all steps."""
    made, key = PROCESSES["ddpm"], jax.random.key(5)
    np.testing.assert_array_equal(
        draw_times(Times(), made, key, 32), jax.random.randint(key, (32,), 0, 1000, jnp.int32)
    )
    t = np.asarray(draw_times(Times("logit_normal"), made, key, 20_000))
    assert t.dtype == np.int32
    assert 0 <= t.min() < 60
    assert 940 < t.max() <= 999
    assert abs(t.mean() - 499.5) < 10


@pytest.mark.parametrize("name", ["flow", "gvp", "vp", "edm"])
def test_validation_times_are_spread_evenly(name):
    made = PROCESSES[name]
    t = stratified_times(made, np.arange(256), 12345)
    np.testing.assert_array_equal(t[100:120], stratified_times(made, np.arange(100, 120), 12345))
    edges = np.asarray(made.from_unit(np.linspace(0, 1, 257)[1:-1]))
    counts = np.bincount(np.searchsorted(edges, t), minlength=256)
    assert counts.max() <= 2
    assert counts.min() >= 0
    assert np.all(np.isfinite(t))
