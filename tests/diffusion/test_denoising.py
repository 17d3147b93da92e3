"""Denoising against closed forms: Gaussian and two-point data, windows, and the noise's size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.diffusion.denoising import (
    estimate_noise,
    in_windows,
    noise_range,
    posterior_mean,
    residual_noise,
)
from ditjax.diffusion.losses import Objective
from ditjax.diffusion.process import EDM, GVP, VP, Discrete, Flow, precondition
from ditjax.diffusion.schedule import make_schedule
from ditjax.diffusion.times import Times, draw_times, stratified_times

PROCESSES = {
    "flow": Flow(),
    "flow-from-noise": Flow(1.0, from_noise=True),
    "gvp": GVP(),
    "vp": VP(),
    "edm": EDM(),
    "ddpm": Discrete(make_schedule("linear")),
    "cosine": Discrete(make_schedule("cosine")),
}
PAIRS = [(name, each) for name, made in PROCESSES.items() for each in made.predictions]
SIGMA = np.array([0.03, 0.137, 0.6, 2.5])  # between the steps of a discrete process


def column(values):
    return np.reshape(values, (-1, 1, 1, 1))


def denoiser(made, prediction, mean):
    """The network whose x̂0 is mean(x, α, σ), in any prediction, between steps, too."""

    def denoise(x_in, timesteps):
        t = timesteps if isinstance(made, Discrete) else made.time_of_noise(timesteps)
        c, p = made.at(t), precondition(made, prediction, t)
        x = x_in / p.c_in.reshape(-1, 1, 1, 1)
        alpha, sigma, skip, out = (
            each.reshape(-1, 1, 1, 1) for each in (c.alpha, c.sigma, p.c_skip, p.c_out)
        )
        predicted = (mean(x, alpha, sigma) - skip * x) / out
        return jnp.concatenate([predicted, 7 * x], -1)  # a variance, which is not read

    return denoise


@pytest.mark.parametrize(("name", "prediction"), PAIRS)
def test_gaussian_data(name, prediction):
    """x̂0 = Σ (Σ + σ² I)⁻¹ y, of every process and prediction."""
    made, rng = PROCESSES[name], np.random.default_rng(0)
    root = rng.standard_normal((6, 6))
    covariance = root @ root.T / 6
    y = rng.standard_normal((4, 2, 3, 1))

    def mean(x, alpha, sigma):
        noisy = alpha[..., 0] ** 2 * covariance[None] + sigma[..., 0] ** 2 * np.eye(6)[None]
        solved = jax.vmap(jnp.linalg.solve)(noisy, x.reshape(4, 6))
        return alpha * (solved @ covariance).reshape(x.shape)

    with jax.enable_x64(True):
        denoise, objective = denoiser(made, prediction, mean), Objective(made, prediction)
        found = posterior_mean(denoise, objective, jnp.asarray(y), jnp.asarray(SIGMA))
    wiener = [covariance @ np.linalg.inv(covariance + s**2 * np.eye(6)) for s in SIGMA]
    expected = [w @ each.ravel() for w, each in zip(wiener, y, strict=True)]
    np.testing.assert_allclose(np.reshape(found, (4, 6)), expected, atol=1e-6)


@pytest.mark.parametrize("name", PROCESSES)
def test_two_points(name):
    """Of x0 = ±1 it is tanh(y/σ²), in float32."""
    made = PROCESSES[name]
    y = np.random.default_rng(1).standard_normal((4, 1, 5, 2))
    objective = Objective(made, "x0" if name != "edm" else "F")
    denoise = denoiser(made, objective.prediction, lambda x, a, s: jnp.tanh(a * x / s**2))
    found = posterior_mean(
        denoise, objective, jnp.asarray(y, jnp.float32), jnp.asarray(SIGMA, jnp.float32)
    )
    np.testing.assert_allclose(found, np.tanh(y / column(SIGMA) ** 2), atol=2e-5)


def test_the_range_of_noise():
    """Of the linear schedule in bytes: 1.3 to 20,000; a flow has no end."""
    low, high = noise_range(PROCESSES["ddpm"])
    assert 127.5 * low == pytest.approx(1.275, rel=1e-3)
    assert high == pytest.approx(157.4, rel=1e-3)
    assert noise_range(EDM()) == pytest.approx((0.002, 80.0))
    assert noise_range(Flow()) == (0.0, np.inf)


@pytest.mark.parametrize("shape", [(8, 8), (9, 21), (16, 12)])
def test_windows_cover_an_image(shape):
    """What is done alike in all windows is done to the image."""
    image = jnp.asarray(np.random.default_rng(2).standard_normal((2, *shape, 3)), jnp.float32)
    np.testing.assert_allclose(in_windows(lambda x: 3 * x - 1, image, 8), 3 * image - 1, atol=1e-5)


def test_windows_overlap_by_half_with_hann_weights():
    """Windows of 8 on 17 columns start at 0, 4, 8 and 9; each is filled with its own mean."""
    image = np.random.default_rng(2).standard_normal((2, 8, 17, 1)).astype(np.float32)

    def filled(x):
        return jnp.broadcast_to(x.mean((1, 2), keepdims=True), x.shape)

    found = in_windows(filled, jnp.asarray(image), 8)[:, 3, :, 0]
    hann = np.sin(np.pi * (np.arange(8) + 0.5) / 8) ** 2
    total, weights = np.zeros((2, 17)), np.zeros(17)
    for j in (0, 4, 8, 9):
        total[:, j : j + 8] += hann * image[:, :, j : j + 8].mean((1, 2))
        weights[j : j + 8] += hann
    np.testing.assert_allclose(found, total / weights, atol=1e-5)


def noisy_image(shape):
    """A slope, a corner and noise of 12."""
    rng = np.random.default_rng(4)
    image = np.add.outer(3.0 * np.arange(shape[0]), np.arange(shape[1]))[..., None]
    image = image + 40 * (image > image.mean())
    return image + 12 * rng.standard_normal(shape)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((11, 14, 3), 11.551548313315552),
        ((8, 8, 1), 13.936762742545081),
        ((5, 32, 1), 11.062040665353749),
    ],
)
def test_the_noise_of_an_image_is_scikit_images(shape, expected):
    """Its 0.26.0 (`tests/oracles/test_denoising.py`)."""
    np.testing.assert_allclose(estimate_noise(noisy_image(shape)), expected, rtol=1e-9)


def test_the_noise_of_an_image():
    """Within the spread of a median of 4,096 numbers; a smooth image adds nothing."""
    rng = np.random.default_rng(3)
    smooth = 100 + np.add.outer(np.arange(128.0), 2 * np.arange(128.0))[..., None]
    assert estimate_noise(smooth) < 1e-9
    assert estimate_noise(np.zeros((8, 8, 1))) == 0
    noisy = smooth + np.array([5.0, 15.0]) * rng.standard_normal((128, 128, 2))
    assert estimate_noise(noisy) == pytest.approx(10, rel=0.05)


def test_the_noise_of_what_is_removed():
    """On Gaussian data it solves mean σ²(λ + σ_n²)/(λ + σ²)² = 1: less than σ_n, if λ is not 0."""
    n, noise = 4096, 0.3
    for flat in (1.0, 0.5):  # the share of directions without data
        spread = np.where(np.arange(n) < flat * n, 0.0, 2.0)
        rng = np.random.default_rng(0)
        y = rng.standard_normal(n) * np.sqrt(spread + noise**2)

        def mean(image, sigma, spread=spread):
            kept = spread[None] / (spread[None] + sigma[:, None] ** 2)
            return image * kept.reshape(image.shape)

        image = jnp.asarray(np.stack([y, 3 * y]).reshape(2, 64, 64, 1), jnp.float32)
        found = np.asarray(residual_noise(mean, image, 0.01, 80.0))
        sigma = np.geomspace(0.02, 1, 2000)[:, None]
        share = (sigma**2 * (spread + noise**2) / (spread + sigma**2) ** 2).mean(1)
        expected = float(sigma[np.flatnonzero(share > 1)[-1], 0])
        assert found[0] == pytest.approx(expected, rel=0.03)
    assert found[0] < noise
    assert found[1] > found[0]


def test_times_below_a_share():
    """Training and validation draw none above, and the range of noise ends there."""
    for made, last in ((PROCESSES["ddpm"], 113), (PROCESSES["flow"], 0.114)):
        drawn = np.asarray(draw_times(Times(most=0.114), made, jax.random.key(0), 2000))
        held = stratified_times(made, np.arange(2000), 7, 0.114)
        assert last * 0.9 < drawn.max() <= last
        assert last * 0.9 < held.max() <= last
        assert held.dtype == drawn.dtype
    low, high = noise_range(PROCESSES["ddpm"], 0.114)
    assert 127.5 * low == pytest.approx(1.275, rel=1e-3)
    assert 45 < 127.5 * high < 55
