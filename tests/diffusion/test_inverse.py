"""Editing on a Gaussian whose chains are affine: their exact moments, by recursion in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.diffusion import inverse, process
from ditjax.diffusion.gaussian import Stateful
from ditjax.diffusion.inverse import METHODS, known_means, known_pixels, repaint_moves
from ditjax.diffusion.losses import Objective
from ditjax.diffusion.process import Discrete, precondition
from ditjax.diffusion.samplers import walk
from ditjax.diffusion.schedule import make_schedule
from ditjax.diffusion.solvers import SAMPLERS
from ditjax.errors import UserError

COVARIANCE = np.array([[1.0, 0.9], [0.9, 1.0]])  # of a known and an unknown coordinate
PROJECT = np.diag([1.0, 0.0])
VALUE = 0.8  # of the known one


def steps_of(made, times, variance):
    """keep, move, spread of ancestral steps (DDIM with eta 1) between times, f64[n] each."""
    c = made.at(times)
    alpha, sigma, A, S = c.alpha[:-1], c.sigma[:-1], c.alpha[1:], c.sigma[1:]
    spread = S * np.sqrt(1 - (alpha * S / (A * sigma)) ** 2)
    keep = np.sqrt(S**2 - spread**2) / sigma
    move = A - alpha * keep
    if variance == "ddim":
        spread, keep = 0 * spread, S / sigma
        move = A - alpha * keep
    if variance == "fixed_large":
        spread = np.append(np.exp(0.5 * made.schedule.log_betas[:0:-1]), 0.0)
    return keep, move, spread


def estimate_of(kind, alpha, sigma):
    """x̂0 = G x + g y of the perfect denoiser, changed by a method -> G f64[2,2], g f64[2]."""
    G = alpha * COVARIANCE @ np.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * np.eye(2))
    if kind == "ddnm":
        return G - PROJECT @ G, np.array([1.0, 0.0])
    r2 = sigma**2 / (alpha**2 + sigma**2)
    if kind == "exact":  # r² is Var[x0 | x] of the known coordinate
        r2 = (COVARIANCE - alpha * G @ COVARIANCE)[0, 0]
    if kind in ("pigdm", "exact") and alpha > 0:
        pull = sigma**2 / alpha / r2 * G.T @ PROJECT
        return G - pull @ G, pull[:, 0]
    return G, np.zeros(2)


def moments(kind, made, times, *, variance="fixed_small", jump=0, resample=1):
    """The slope of E[x_2] in y, and Var[x_2], of the chain's end."""
    c = made.at(times)
    keep, move, spread = steps_of(made, times, variance)
    mean, cov, known = np.zeros(2), made.prior_std**2 * np.eye(2), np.array([1.0, 0.0])
    n = len(times) - 1
    estimates = [estimate_of(kind, c.alpha[i], c.sigma[i]) for i in range(n)]
    for i, down in repaint_moves(n, jump or n, resample):
        if not down:
            ratio = c.alpha[i] / c.alpha[i + 1]
            mean = ratio * mean
            cov = ratio**2 * cov + (c.sigma[i] ** 2 - (ratio * c.sigma[i + 1]) ** 2) * np.eye(2)
            continue
        G, g = estimates[i]
        T = keep[i] * np.eye(2) + move[i] * G
        mean, cov = T @ mean + move[i] * g, T @ cov @ T.T + spread[i] ** 2 * np.eye(2)
        if kind == "replace":
            mean = mean - PROJECT @ mean + c.alpha[i + 1] * known
            other = np.eye(2) - PROJECT
            cov = other @ cov @ other + c.sigma[i + 1] ** 2 * PROJECT
    return mean[1], cov[1, 1]


DDPM = Discrete(make_schedule("linear", 250))
ALL = np.append(np.arange(249.0, -1, -1), -1.0)


@pytest.mark.parametrize(
    ("kind", "resample", "small", "large"),
    [
        ("exact", 1, (0.9000, 0.1782), (0.9000, 0.1929)),
        ("replace", 1, (0.6221, 0.3003), (0.6221, 0.3177)),
        ("replace", 5, (0.8505, 0.1890), (0.8505, 0.2120)),
        ("replace", 20, (0.8859, 0.1696), (0.8859, 0.1972)),
        ("pigdm", 1, (0.8532, 0.2024), (0.8532, 0.2177)),
        ("ddnm", 1, (0.6220, 0.3464), (0.6220, 0.3648)),
    ],
)
def test_the_recursion_has_the_moments_that_are_documented(kind, resample, small, large):
    """In docs/editing.md; the posterior has .9 and .19. RePaint does not converge to it."""
    for variance, wanted in (("fixed_small", small), ("fixed_large", large)):
        found = moments(kind, DDPM, ALL, variance=variance, jump=10, resample=resample)
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def denoiser(objective):
    """The perfect denoiser of the Gaussian, in the prediction of an objective."""

    def denoise(x_in, timesteps):
        made = objective.process
        t = made.time_of_noise(timesteps)
        c, p = made.at(t), precondition(made, objective.prediction, t)
        alpha, sigma, c_in, c_skip, c_out = (
            each[:, None] for each in (c.alpha, c.sigma, p.c_in, p.c_skip, p.c_out)
        )
        x = x_in.reshape(-1, 2) / c_in
        # The eigenvalues are 1.9 and .1, of the sum and the difference of the coordinates.
        total, apart = (x + x[:, ::-1]) / 2, (x - x[:, ::-1]) / 2
        x0 = 1.9 * alpha / (1.9 * alpha**2 + sigma**2) * total
        x0 = x0 + 0.1 * alpha / (0.1 * alpha**2 + sigma**2) * apart
        return ((x0 - c_skip * x) / c_out).reshape(x_in.shape)

    return denoise


def affine(method, objective, times, sampler, options, **settings):
    """The chain's end as a function of its noise: x f64[2] without any, and its responses f64[k,2].

    The chain is affine, so that E[x] is the first, and Cov[x] the sum of the second's squares.
    """
    moves = repaint_moves(len(times) - 1, **settings) if "jump" in settings else times[1:]
    rows = 1 + 2 * (1 + 2 * len(moves))  # none, x_T, and at most two streams of each move
    shape, chosen = (rows, 1, 2, 1), METHODS[method]

    def noise(i):
        """1 in one coordinate of row 3 + 2i or 4 + 2i."""
        hot = jnp.arange(rows)[:, None] == 3 + 2 * i + jnp.arange(2)[None]
        return hot.astype(jnp.float32).reshape(shape)

    @jax.jit
    def run():
        known = jnp.asarray([1.0, 0.0], jnp.float32).reshape(1, 1, 2, 1)
        measured = known_pixels(jnp.full(shape, VALUE, jnp.float32), known)
        x_T, denoise = objective.process.prior_std * noise(-1), denoiser(objective)
        if chosen.wrap:
            denoise = chosen.wrap(denoise, objective, measured, **settings)
            solve = SAMPLERS[sampler].solve
            return solve(denoise, objective, times, x_T, noise, clip_x0=False, **options)
        make_steps = SAMPLERS[sampler].steps
        assert make_steps is not None
        assert chosen.chain is not None
        steps = make_steps(denoise, objective, times, x_T, clip_x0=False, **options)
        return walk(chosen.chain(steps, objective, times, measured, **settings), x_T, noise)

    x = np.asarray(run(), np.float64).reshape(rows, 2)
    return x[0], x[1:] - x[0]


FLOW = (process.Flow(), np.linspace(1, 0, 26))
EDM = (process.EDM(sigma_max=20.0), np.append(np.geomspace(20, 0.02, 25), 0.0))
SMALL = (Discrete(make_schedule("linear", 40)), np.append(np.arange(39.0, -1, -1), -1.0))
ETA = {"eta": 1.0}
CASES: dict[str, Any] = {
    "repaint": ("repaint", SMALL, "eps", "ddpm", {}, {"jump": 5, "resample": 3}),
    "repaint, ddim": ("repaint", SMALL, "v", "ddim", ETA, {"jump": 5, "resample": 3}),
    "repaint, flow": ("repaint", FLOW, "velocity", "ddim", ETA, {"jump": 4, "resample": 3}),
    "replace, edm": ("replace", EDM, "F", "ddim", ETA, {}),
    "ddnm": ("ddnm", SMALL, "eps", "ddpm", {}, {}),
    "ddnm, edm": ("ddnm", EDM, "F", "ddim", ETA, {}),
    "ddnm, flow, ddim": ("ddnm", FLOW, "velocity", "ddim", {"eta": 0.0}, {}),
    "pigdm": ("pigdm", SMALL, "x0", "ddpm", {}, {}),
    "pigdm, flow": ("pigdm", FLOW, "velocity", "ddim", ETA, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_chain_has_the_moments_of_the_recursion(case):
    method, (made, times), prediction, sampler, options, settings = CASES[case]
    objective = Objective(made, prediction, "fixed_small")
    mean, responses = affine(method, objective, times, sampler, options, **settings)
    slope, variance = moments(
        "replace" if method == "repaint" else method,
        made,
        times,
        variance="ddim" if options.get("eta") == 0.0 else "fixed_small",
        **settings,
    )
    np.testing.assert_allclose(mean[1], slope * VALUE, rtol=1e-4)
    np.testing.assert_allclose((responses[:, 1] ** 2).sum(), variance, rtol=1e-4)
    if method != "pigdm":  # the measurement is met exactly
        np.testing.assert_allclose(mean[0], VALUE, atol=1e-5)
        np.testing.assert_allclose(responses[:, 0], 0, atol=1e-5)


def test_moves_are_those_of_repaint():
    """2,410 evaluations with the paper's settings; each move undoes or takes the next step."""
    moves = repaint_moves(250, 10, 10)
    assert moves[:, 1].sum() == 2410
    assert repaint_moves(50, 5, 3).shape == (230, 2)
    levels = 250 - moves[:, 0] - moves[:, 1]  # where each move ends
    assert levels[-1] == 0
    starts = 250 - moves[:, 0] - 1 + moves[:, 1]
    np.testing.assert_array_equal(starts[1:], levels[:-1])
    np.testing.assert_array_equal(repaint_moves(4, 4, 9), [[0, 1], [1, 1], [2, 1], [3, 1]])


@pytest.mark.parametrize("method", METHODS)
def test_a_memory_goes_from_each_evaluation_to_the_next(method):
    """The momentum of guidance passes through an edit, also over steps that are undone."""
    objective, times = Objective(process.Flow(), "velocity", "none"), np.linspace(1, 0, 6)
    x = jnp.ones((1, 1, 2, 1))
    measured = known_pixels(x, jnp.asarray([1.0, 0.0]).reshape(1, 1, 2, 1))
    chosen: Any = METHODS[method]
    settings = {"jump": 2, "resample": 3} if method == "repaint" else {}
    counting = Stateful(
        lambda x: jnp.int32(0), lambda x, t, count: (denoiser(objective)(x, t), count + 1)
    )
    network = chosen.wrap(counting, objective, measured) if chosen.wrap else counting
    make_steps = SAMPLERS["ddim"].steps
    assert make_steps is not None
    steps = make_steps(network, objective, times, x, clip_x0=False, eta=1.0)
    if chosen.chain:
        steps = chosen.chain(steps, objective, times, measured, **settings)

    def move(carry, row):
        return steps.step(carry[0], carry[1], row, lambda i: x)[:2], None

    start = (x, steps.memory)
    (_, memory), _ = jax.jit(lambda rows: jax.lax.scan(move, start, rows))(steps.rows)
    expected = repaint_moves(5, 2, 3)[:, 1].sum() if settings else 5
    assert jax.tree.leaves(memory) == [expected]
    assert expected == (13 if settings else 5)


def test_dps_steps_down_the_distance():
    """On one coordinate the gradient of ‖y - x̂0‖ is ± a row of G."""
    made, times = FLOW
    objective = Objective(made, "velocity", "none")
    mean, _ = affine("dps", objective, times, "ddim", {"eta": 0.0}, strength=0.3)
    c, (keep, move, _) = made.at(times), steps_of(made, times, "ddim")
    x = np.zeros(2)
    for i in range(len(times) - 1):
        G, _ = estimate_of("dps", c.alpha[i], c.sigma[i])
        gradient = np.sign((G @ x)[0] - VALUE) * G[0]
        x = keep[i] * x + move[i] * G @ x - 0.3 * gradient
    np.testing.assert_allclose(mean, x, atol=2e-4)
    assert abs(x[0] - VALUE) < 0.1


def test_means_of_pixels_are_a_measurement():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 4, 6, 3)), jnp.float32)
    low = x.reshape(2, 2, 2, 3, 2, 3).mean((2, 4))
    measured = known_means(low, 2)
    projected = measured.project(x)
    np.testing.assert_allclose(projected, measured.image, atol=1e-6)
    np.testing.assert_allclose(measured.project(projected), projected, atol=1e-6)
    wrong = low - 1.0
    distance = jnp.linalg.norm((wrong - low).ravel())
    found = jnp.linalg.norm(known_means(wrong, 2).residual(x).ravel()) * measured.gram**0.5
    np.testing.assert_allclose(found, distance, rtol=1e-5)


def test_other_channels_of_the_output_stay():
    """A learned variance passes through a wrapper as it is."""
    objective = Objective(SMALL[0], "eps")
    x, t = jnp.ones((2, 1, 2, 1)), jnp.array([3, 3])
    measured = known_pixels(jnp.zeros_like(x), jnp.ones_like(x))

    def denoise(x, t):
        return jnp.concatenate([0.5 * x, 7 * x], -1)

    for name in ("ddnm", "pigdm"):
        wrap = METHODS[name].wrap
        assert wrap is not None
        out = wrap(denoise, objective, measured)(x, t)
        np.testing.assert_array_equal(out[..., 1:], 7 * x)
        assert float(jnp.abs(out[..., :1] - 0.5 * x).max()) > 0.1


def test_jumps_that_no_level_is_left_for():
    with pytest.raises(UserError, match=r"edit\.jump is 10 and the sampler takes 10 steps"):
        inverse.check_repaint(10, jump=10, resample=2)
    inverse.check_repaint(10, jump=10, resample=1)
