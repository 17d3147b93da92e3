"""Solvers where the flow, the reverse chain and the score are known exactly, in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.diffusion import grids, solvers
from ditjax.diffusion.gaussian import Stateful
from ditjax.diffusion.losses import Objective
from ditjax.diffusion.process import EDM, GVP, VP, Discrete, Flow, mixture
from ditjax.diffusion.samplers import initial_noise, per_sample_noise
from ditjax.diffusion.schedule import make_schedule
from ditjax.diffusion.solvers import SAMPLERS
from ditjax.errors import UserError

PROCESSES = {
    "flow": (Flow(), "velocity"),
    "gvp": (GVP(), "velocity"),
    "vp": (VP(), "eps"),
    "edm": (EDM(sigma_max=20.0), "F"),
    "ddpm": (Discrete(make_schedule("linear")), "eps"),
}
CONTINUOUS = ("flow", "gvp", "vp", "edm")
WEIGHTS, CENTRES, WIDTHS = np.array([[0.3, 0.5, 0.2], [-1.0, 0.4, 1.2], [0.2, 0.3, 0.15]])


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def perfect(made, prediction, weights=WEIGHTS, centres=CENTRES, widths=WIDTHS):
    """The perfect network of a one-dimensional mixture of Gaussians, at any of a process's times.

    A batch is at one time, whose coefficients come from the same float64 code as the solver's.
    """

    def time_of(noise):
        if isinstance(made, EDM):
            return jnp.exp(4 * noise / made.time_scale)
        return noise if isinstance(made, Discrete) else noise / made.time_scale

    bar = made.schedule.alphas_bar if isinstance(made, Discrete) else None

    def denoise(x, noise):
        w, m, s = (
            jnp.asarray(each, x.dtype).reshape(1, 1, 1, 1, -1)
            for each in (weights, centres, widths)
        )
        t = time_of(noise[0])
        if bar is None:
            c, x = made.at(t), x / made.c_in(t)
            alpha, sigma = c.alpha, c.sigma
            a, b = mixture(made, prediction, c)
        else:
            tables = np.sqrt(bar), np.sqrt(1 - bar)
            alpha, sigma = (jnp.asarray(table, x.dtype)[t] for table in tables)
            a, b = 0.0, 1.0
        variance = alpha**2 * s**2 + sigma**2
        apart = x[..., None] - alpha * m
        share = jax.nn.softmax(jnp.log(w) - apart**2 / variance / 2 - jnp.log(variance) / 2)
        x0 = (share * (m + alpha * s**2 / variance * apart)).sum(-1)
        return a * x0 + b * (x - alpha * x0) / sigma

    return denoise


def solved(name, made, prediction, times, x, noise=None, denoise=None, **options):
    run = jax.jit(
        lambda x: SAMPLERS[name].solve(
            denoise or perfect(made, prediction),
            Objective(made, prediction, "fixed_small"),
            times,
            x,
            noise or (lambda i: jnp.zeros_like(x)),
            clip_x0=False,
            **options,
        )
    )
    return np.asarray(run(x))


def start(made, batch=64):
    x = np.random.default_rng(0).standard_normal((batch, 1, 1, 1))
    return jnp.asarray(made.prior_std * x)


def even_times(made, n):
    """n steps whose ends are away from both ends, where orders degrade."""
    if isinstance(made, EDM):
        return np.linspace(20**0.5, 0.05**0.5, n + 1) ** 2
    return np.linspace(0.98, 0.05, n + 1)


@pytest.mark.parametrize("name", ["flow", "ddpm"])
def test_ddim_draws_again_what_it_was_inverted_from(name):
    """In 250 steps, and nearer the more often a step is corrected."""
    made, prediction = PROCESSES[name]
    network = perfect(made, prediction)
    x = start(made, 16).astype(jnp.float32 if name == "ddpm" else jnp.float64)
    objective = Objective(made, prediction, "fixed_small")

    times = grids.grid_times(made, "250", prediction=prediction)

    @jax.jit
    def away():
        """x0, and how far from it are those drawn of the noise that was found."""

        def draw(x):
            given = network, objective, times, x, lambda i: jnp.zeros_like(x)
            return SAMPLERS["ddim"].solve(*given, clip_x0=False)

        x0 = draw(x)
        found = (
            solvers.ddim_invert(network, objective, times, x0, iterations=n) for n in (1, 2, 3)
        )
        return x0, [jnp.abs(draw(each) - x0).max() for each in found]

    x0, (one, two, three) = away()
    assert np.abs(x0).max() > 1
    assert one < 0.03
    assert two < 0.2 * one
    assert three < 0.2 * two


ORDERS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("ddim", 1, {}),
    ("euler", 1, {}),
    ("heun", 2, {}),
    ("edm", 2, {}),
    ("dpmpp_2m", 2, {}),
    ("dpmpp_2s", 2, {}),
    ("unipc", 3, {"order": 2}),
    ("unipc", 4, {"order": 3}),
)


@functools.cache
def exact_solution(process):
    """4,000 steps of order 3."""
    made, prediction = PROCESSES[process]
    return solved("unipc", made, prediction, even_times(made, 4000), start(made), order=2)


@pytest.mark.parametrize(("name", "order", "options"), ORDERS)
@pytest.mark.parametrize("process", ["flow", "gvp", "vp"])
def test_the_error_falls_with_the_solvers_order(process, name, order, options):
    """From 64 to 128 steps on a mixture."""
    made, prediction = PROCESSES[process]
    x, exact = start(made), exact_solution(process)
    errors = [
        np.sqrt(
            np.mean(
                (solved(name, made, prediction, even_times(made, n), x, **options) - exact) ** 2
            )
        )
        for n in (64, 128)
    ]
    assert errors[1] < 0.02
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.4


def test_euler_on_a_flow_is_ddim():
    made, prediction = PROCESSES["flow"]
    times = grids.grid_times(made, "10", prediction=prediction)
    found = [solved(name, made, prediction, times, start(made)) for name in ("euler", "ddim")]
    np.testing.assert_allclose(found[0], found[1], atol=1e-12)


@pytest.mark.parametrize("process", CONTINUOUS)
def test_ddim_of_a_gaussian_is_its_closed_form(process):
    """x0 ~ N(0, s²): a step multiplies by (αA s² + σS)/(α²s² + σ²), to 1e-12."""
    made, prediction = PROCESSES[process]
    s2 = 0.7**2
    gaussian = perfect(made, prediction, np.ones(1), np.zeros(1), np.sqrt([s2]))
    times = even_times(made, 12)
    c = made.at(times)
    a, s, A, S = c.alpha[:-1], c.sigma[:-1], c.alpha[1:], c.sigma[1:]
    factor = np.prod((a * A * s2 + s * S) / (a**2 * s2 + s**2))
    x = start(made)
    found = solved("ddim", made, prediction, times, x, denoise=gaussian)
    np.testing.assert_allclose(found, factor * np.asarray(x), rtol=1e-11)


# What takes adaptive steps is in test_likelihood.py.
FIXED = [name for name, each in SAMPLERS.items() if not (each.adaptive or each.interval)]


FEW = [*((process, 2) for process in PROCESSES), ("flow", 1), ("flow", 5), ("gvp", 1), ("edm", 1)]


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize(("process", "n"), FEW)
def test_both_ends_are_finite(process, name, n):
    """From pure noise to the data, at very few steps.

    The samples are about as wide as the data, too, but for explicit rules over so long a step.
    """
    made, prediction = PROCESSES[process]
    sampler = SAMPLERS[name]
    if isinstance(made, Discrete) != sampler.discrete and (sampler.discrete or sampler.derivatives):
        pytest.skip("this sampler is not for this process")
    times = grids.grid_times(made, str(n), prediction=prediction)
    x = start(made).astype(jnp.float32)
    noise = per_sample_noise(
        jax.random.split(jax.random.key(0, impl="threefry2x32"), 64), (1, 1, 1)
    )
    found = solved(name, made, prediction, times, x, noise)
    assert np.all(np.isfinite(found))
    assert np.abs(found).max() < 8 or name in ("heun", "edm", "sde", "sde_heun")


@pytest.mark.parametrize("process", ["flow", "gvp", "vp", "edm", "ddpm"])
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m_sde", "sde", "sde_heun"])
def test_the_variance_of_stochastic_samples(process, name):
    """On N(0, s²) the state stays Gaussian: 2^16 samples within 4 standard errors.

    Its variance obeys x ← (k + m g) x + w z with x̂0 = g x, whose coefficients are the solver's.
    """
    made, prediction = PROCESSES[process]
    if name.startswith("sde") and process == "ddpm":
        pytest.skip("the SDE needs derivatives")
    every: dict[str, dict[str, Any]] = {
        "ddim": {"eta": 1.0},
        "sde": {"sde_form": "constant"},
        "sde_heun": {"sde_form": "constant", "sde_norm": 0.5},
    }
    options = every.get(name, {})
    s2, n = 0.7**2, 12
    gaussian = perfect(made, prediction, np.ones(1), np.zeros(1), np.sqrt([s2]))
    times = grids.grid_times(made, str(n), prediction=prediction)
    expected = recursion(name, made, times, s2, options)
    keys = jax.random.split(jax.random.key(7, impl="threefry2x32"), 2**16)
    x = made.prior_std * initial_noise(keys, (1, 1, 1))
    found = solved(
        name, made, prediction, times, x, per_sample_noise(keys, (1, 1, 1)), gaussian, **options
    )
    assert abs(found.var() / expected - 1) < 4 * np.sqrt(2 / 2**16)


def recursion(name, made, times, s2, options):
    """The variance of x0, stated from the papers' own formulas and not from the solver's tables."""
    variance = made.prior_std**2
    c = made.at(times)
    # Of x, of x with the multistep solver's last estimate, and of that estimate.
    x_x, x_d, d_d = variance, 0.0, 0.0
    h_before = None
    for i in range(len(times) - 1):
        a, s, A, S = c.alpha[i], c.sigma[i], c.alpha[i + 1], c.sigma[i + 1]
        gain = a * s2 / (a**2 * s2 + s**2)  # x̂0 = gain x
        if name == "ddim":
            decay = a * S / (A * s)
            spread = S * np.sqrt(1 - decay**2)
            eps = (1 - a * gain) / s
            x_x = (A * gain + np.sqrt(S**2 - spread**2) * eps) ** 2 * x_x + spread**2
        elif name == "sde":
            dt = times[i] - times[i + 1]
            velocity = c.alpha_dot[i] * gain + c.sigma_dot[i] * (1 - a * gain) / s
            score = -(1 - a * gain) / s**2
            w = 2.0
            last = i == len(times) - 2
            x_x = (1 - dt * (velocity - w / 2 * score)) ** 2 * x_x + (0 if last else w * dt)
        elif name == "sde_heun":
            # SiT: x̂ = x + √(w dt) z, then Heun's method on the drift from x̂.
            dt = times[i] - times[i + 1]
            first = sde_rate(c, s2, i, 1.0)
            if i == len(times) - 2:
                x_x = (1 - dt * first) ** 2 * x_x
            else:
                second = sde_rate(c, s2, i + 1, 1.0)
                mean = (first + second * (1 - dt * first)) / 2
                x_x = (1 - dt * mean) ** 2 * (x_x + 1.0 * dt)
        else:
            decay = a * S / (A * s)
            with np.errstate(divide="ignore"):
                h = -np.log(decay)
            r = h / h_before / 2 if h_before and np.isfinite(h_before) and np.isfinite(h) else 0.0
            h_before = h
            keep, move = S / s * decay, A * (1 - decay**2)
            # x' = p x + q d with d the last estimate, a Gaussian correlated with x.
            p, q = keep + move * (1 + r) * gain, -move * r
            spread = S * np.sqrt(1 - decay**2)
            new_x = p**2 * x_x + 2 * p * q * x_d + q**2 * d_d + spread**2
            new_xd = gain * (p * x_x + q * x_d)
            x_x, x_d, d_d = new_x, new_xd, gain**2 * x_x
    return x_x


def sde_rate(c, s2, i, w):
    """The drift of the SDE over x, for x0 ~ N(0, s²): velocity - ½w score."""
    a, s = c.alpha[i], c.sigma[i]
    gain = a * s2 / (a**2 * s2 + s**2)
    velocity = c.alpha_dot[i] * gain + c.sigma_dot[i] * (1 - a * gain) / s
    return velocity + w / 2 * (1 - a * gain) / s**2


@pytest.mark.parametrize("process", ["flow", "gvp", "vp"])
def test_sde_heun_has_weak_order_1_and_order_2_without_noise(process):
    """From 100 to 400 steps: with w = 1 the variance's error falls by 4, with w = 0 by 16."""
    made, prediction = PROCESSES[process]
    s2 = 0.7**2

    def error(n, norm):
        times = np.linspace(0.98, 0.02, n + 1)
        c = made.at(times)
        objective = Objective(made, prediction, "none")
        steps, last = solvers.sde_heun(objective, times, sde_form="constant", sde_norm=norm)
        assert steps.churn is not None
        gain = c.alpha * s2 / (c.alpha**2 * s2 + c.sigma**2)
        variance = c.alpha[0] ** 2 * s2 + c.sigma[0] ** 2
        for i, (inner, outer, churn) in enumerate(
            zip(steps.inner, steps.outer, steps.churn, strict=True)
        ):
            y = inner[0] + inner[1] * gain[i]
            factor = outer[0] + outer[1] * y + outer[2] * gain[i] + outer[3] * gain[i + 1] * y
            variance = factor**2 * (variance + churn[1] ** 2)
        # The last step is Euler's; its own error is left out.
        exact = c.alpha[-2] ** 2 * s2 + c.sigma[-2] ** 2
        assert len(last.keep) == 1
        return abs(variance / exact - 1)

    assert 3 < error(100, 0.5) / error(400, 0.5) < 5
    assert 12 < error(100, 1e-20) / error(400, 1e-20) < 20


@pytest.mark.parametrize("process", CONTINUOUS)
def test_euler_maruyama_has_weak_order_1(process):
    """The relative error of the variance of x0 falls by 4 from 100 to 400 steps."""
    made, _ = PROCESSES[process]
    if process == "edm":
        pytest.skip("its karras grid is not even, so the error is no power of the steps")
    s2 = 0.7**2
    errors = []
    for n in (100, 400):
        times = np.linspace(0.98, 0.02, n + 1)
        c = made.at(times)
        variance = c.alpha[0] ** 2 * s2 + c.sigma[0] ** 2
        for i in range(n):
            gain = c.alpha[i] * s2 / (c.alpha[i] ** 2 * s2 + c.sigma[i] ** 2)
            g, g0 = solvers._field(made, times[i : i + 1])
            half = 0.5 / c.sigma[i] ** 2
            dt = times[i + 1] - times[i]
            factor = 1 + dt * (g[0] + half) + dt * (g0[0] - c.alpha[i] * half) * gain
            variance = factor**2 * variance - dt
        exact = c.alpha[-1] ** 2 * s2 + c.sigma[-1] ** 2
        errors.append(abs(variance / exact - 1))
    assert 3 < errors[0] / errors[1] < 5


def test_edms_churn_raises_the_noise_and_returns():
    """With churn a sample depends on its noise; without, not; both have the data's variance."""
    made, prediction = PROCESSES["edm"]
    s2 = 0.7**2
    gaussian = perfect(made, prediction, np.ones(1), np.zeros(1), np.sqrt([s2]))
    times = grids.grid_times(made, "40", prediction=prediction)
    keys = jax.random.split(jax.random.key(1, impl="threefry2x32"), 2**14)
    noise = per_sample_noise(keys, (1, 1, 1))
    x = made.prior_std * initial_noise(keys, (1, 1, 1))
    plain = solved("edm", made, prediction, times, x, noise, gaussian)
    churned = solved("edm", made, prediction, times, x, noise, gaussian, s_churn=20.0)
    assert np.corrcoef(plain.ravel(), churned.ravel())[0, 1] < 0.9
    for found in (plain, churned):
        assert abs(found.var() / s2 - 1) < 5 * np.sqrt(2 / 2**14) + 0.01


def test_evaluations_are_counted():
    made, prediction = PROCESSES["flow"]
    times = grids.grid_times(made, "6", prediction=prediction)
    counts = {name: len(SAMPLERS[name].evaluated(made, times)) for name in FIXED}
    assert counts == {
        "ddpm": 6, "ddim": 6, "euler": 6, "heun": 11, "edm": 11, "dpmpp_2m": 6, "dpmpp_2s": 11,
        "dpmpp_2m_sde": 6, "unipc": 6, "sde": 6, "sde_heun": 11, "regression": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("discrete", [False, True])
def test_the_network_is_evaluated_at_the_stated_times(name, discrete):
    """Each time that the network sees, in order: what the sampling's Gflops and guidance count.

    And a memory goes from each evaluation to the next.
    """
    sampler = SAMPLERS[name]
    if name not in ("ddpm", "ddim") if discrete else sampler.discrete:
        pytest.skip("the code of the other process")
    made, prediction = PROCESSES["ddpm" if discrete else "flow"]
    times = grids.grid_times(made, "5", prediction=prediction)
    seen = []

    def step(x, t, memory):
        jax.debug.callback(lambda t, m: seen.append((float(t[0]), int(m))), t, memory, ordered=True)
        return 0 * x, memory + 1

    denoise = Stateful(lambda x: jnp.zeros((), jnp.int32), step)
    x = start(made).astype(jnp.float32)
    solved(name, made, prediction, times, x, lambda i: 0 * x, denoise)
    jax.effects_barrier()
    expected = np.asarray(made.c_noise(sampler.evaluated(made, times)))
    np.testing.assert_allclose([t for t, _ in seen], expected)
    assert [memory for _, memory in seen] == list(range(len(expected)))


# ---- grids


def test_grids():
    edm = EDM()
    found = grids.grid_times(edm, "18", prediction="F")
    i = np.arange(18)
    karras = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(found, np.append(karras, 0), rtol=1e-12)
    np.testing.assert_allclose(
        grids.grid_times(Flow(), "4", prediction="velocity"), [1, 0.75, 0.5, 0.25, 0]
    )
    # A prediction of ε alone says nothing of x0 at α = 0.
    assert grids.grid_times(Flow(), "4", prediction="eps")[0] == 0.999
    even = grids.grid_times(VP(), "6", prediction="v", grid="logsnr")
    c = VP().at(even[:-1])
    steps = np.diff(np.log(c.alpha / c.sigma))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)


def test_a_shift_moves_the_grid():
    plain, moved = (
        grids.grid_times(Flow(), "5", prediction="velocity", shift=s) for s in (1.0, 3.0)
    )
    np.testing.assert_allclose(moved, 3 * plain / (1 + 2 * plain))
    assert (moved[0], moved[-1]) == (1, 0)


def test_the_last_step_has_its_own_length():
    found = grids.grid_times(Flow(), "5", prediction="velocity", last_step=0.04)
    np.testing.assert_allclose(found, [1, 0.76, 0.52, 0.28, 0.04, 0])


def test_a_discrete_process_keeps_its_respacing_and_rounds_other_grids():
    made = Discrete(make_schedule("linear"))
    np.testing.assert_array_equal(
        grids.grid_times(made, "ddim4", prediction="eps"), [750, 500, 250, 0, -1]
    )
    rounded = grids.grid_times(made, "10", prediction="eps", grid="karras")
    np.testing.assert_array_equal(rounded, np.rint(rounded))
    assert (rounded[0], rounded[-2], rounded[-1]) == (999, 0, -1)
    with pytest.raises(UserError, match="take fewer steps"):
        grids.grid_times(made, "500", prediction="eps", grid="karras")
    with pytest.raises(UserError, match="expected a process in continuous time"):
        grids.grid_times(made, "10", prediction="eps", grid="uniform", shift=2.0)


@pytest.mark.parametrize("steps", ["0", "-1", "ddim50", "10,15", "1e3", "x", "9999999"])
def test_steps_that_are_no_number(steps):
    with pytest.raises(UserError, match="expected a number from 1 to 100000"):
        grids.grid_times(Flow(), steps, prediction="velocity")


def test_an_infinite_diffusion_is_refused():
    made, prediction = PROCESSES["flow"]
    times = grids.grid_times(made, "5", prediction=prediction)
    with pytest.raises(UserError, match="'sbdm' from time 1"):
        solved("sde", made, prediction, times, start(made), sde_form="sbdm")
