"""Samplers on Gaussians, where the score, the reverse chain and the flow are known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.diffusion.samplers import ddim, ddpm, initial_noise, per_sample_noise
from ditjax.diffusion.schedule import make_schedule, respace
from ditjax.errors import UserError

SCHEDULE = make_schedule("linear")
SHAPE = (1, 2, 2)
MEAN = np.array([0.5, -0.3, 0.0, 1.0])
_FACTOR = np.array([[0.6, 0, 0, 0], [0.3, 0.5, 0, 0], [-0.2, 0.1, 0.7, 0], [0.1, -0.4, 0.2, 0.4]])
COVARIANCE = _FACTOR @ _FACTOR.T


def keys_of(seed, batch):
    return jax.random.split(jax.random.key(seed), batch)


def tabled_noise(seed, batch, steps=40):
    """x_T and a noise drawn beforehand, for what does not turn on how noise is drawn."""
    draws = np.random.default_rng(seed).standard_normal((steps + 1, batch, *SHAPE))
    table = jnp.asarray(draws, jnp.float32)
    return table[-1], lambda i: table[i]


def no_noise(i):
    raise AssertionError("a deterministic sampler drew noise")


def exact_score(prediction="eps"):
    """The denoiser of N(MEAN, COVARIANCE) over the flattened sample, from float64 tables."""
    a = SCHEDULE.alphas_bar[:, None, None]
    noised = np.linalg.inv(a * COVARIANCE + (1 - a) * np.eye(4))
    gain = {
        "eps": np.sqrt(1 - a) * noised,
        "x0": np.sqrt(a) * COVARIANCE @ noised,
        "v": np.sqrt(a * (1 - a)) * (np.eye(4) - COVARIANCE) @ noised,
    }[prediction]
    offset = {"eps": 0 * MEAN, "x0": MEAN, "v": -np.sqrt(1 - a[:, 0]) * MEAN}[prediction]
    gains = jnp.asarray(gain, jnp.float32)
    offsets = jnp.asarray(np.broadcast_to(offset, (1000, 4)), jnp.float32)
    centres = jnp.asarray(np.sqrt(a[:, 0]) * MEAN, jnp.float32)

    def denoise(x, t):
        centred = x.reshape(-1, 4) - centres[t]
        out = jnp.einsum("bij,bj->bi", gains[t], centred, precision="highest") + offsets[t]
        return out.reshape(x.shape)

    return denoise


def agrees_with_gaussian(samples, mean, covariance):
    """Each first and second moment within 5 standard errors: 6e-7 each, 1e-5 for 14 at once."""
    samples = np.asarray(samples, np.float64).reshape(len(samples), -1)
    n = len(samples)
    mean_error = (samples.mean(axis=0) - mean) / np.sqrt(np.diag(covariance) / n)
    assert np.abs(mean_error).max() < 5, mean_error
    variances = np.diag(covariance)
    standard_error = np.sqrt((np.outer(variances, variances) + covariance**2) / n)
    covariance_error = (np.cov(samples.T) - covariance) / standard_error
    assert np.abs(covariance_error).max() < 5, covariance_error


@pytest.mark.parametrize(
    ("sampler", "spec"),
    [
        (lambda *args: ddpm(*args, variance="fixed_small"), "250"),
        (lambda *args: ddpm(*args, variance="fixed_large"), "250"),
        (lambda *args: ddim(*args), "250"),
        (lambda *args: ddim(*args, eta=0.5), "250"),
    ],
    ids=["ddpm-small", "ddpm-large", "ddim", "ddim-half"],
)
def test_samples_of_a_full_covariance_gaussian(sampler, spec):
    keys = keys_of(1, 2048)
    samples = jax.jit(
        lambda keys: sampler(
            exact_score(),
            respace(SCHEDULE, spec),
            initial_noise(keys, SHAPE),
            per_sample_noise(keys, SHAPE),
        )
    )(keys)
    agrees_with_gaussian(samples, MEAN, COVARIANCE)


DIAGONAL_MEAN = np.array([0.5, -0.3])
DIAGONAL = np.array([0.1, 0.9])


def test_learned_variance_samples_the_data_in_ten_steps(exact_diagonal):
    schedule = respace(SCHEDULE, "10")
    keys = keys_of(2, 20_000)
    denoise = exact_diagonal(schedule, DIAGONAL_MEAN, DIAGONAL)
    noise = per_sample_noise(keys, (1, 1, 2))
    samples = ddpm(denoise, schedule, initial_noise(keys, (1, 1, 2)), noise)
    agrees_with_gaussian(samples, DIAGONAL_MEAN, np.diag(DIAGONAL))


def exact_law(sampler, steps):
    """Mean and covariance of a sampler with a linear denoiser, from its response to impulses.

    Such a sampler is affine in (x_T, noise): the sample of no noise is the mean, and each unit
    impulse less that is one column of the covariance's factor. No sampling error.
    """
    size = DIAGONAL.size
    impulses = np.zeros((1 + (1 + steps) * size, 1 + steps, 1, 1, size), np.float32)
    for column in range(1, len(impulses)):
        impulses[column, (column - 1) // size, ..., (column - 1) % size] = 1
    by_step = jnp.asarray(np.moveaxis(impulses, 1, 0))
    out = np.asarray(sampler(by_step[0], lambda i: by_step[i + 1]), np.float64).reshape(-1, size)
    factor = (out[1:] - out[0]).T
    return out[0], factor @ factor.T


@pytest.mark.parametrize("steps", [5, 50])
def test_learned_variance_makes_ddpm_exact_at_any_number_of_steps(exact_diagonal, steps):
    schedule = respace(SCHEDULE, str(steps))
    denoise = exact_diagonal(schedule, DIAGONAL_MEAN, DIAGONAL)
    mean, covariance = exact_law(
        lambda x_T, noise: ddpm(denoise, schedule, x_T, noise, variance="learned_range"), steps
    )
    # What is missing is known: no noise at the last step, where Var[x0 | x_0] < β_0 = 1e-4; and x_T
    # starts from mean 0 where q's is √ᾱ_T MEAN, .0064 of it, most of which is contracted away.
    np.testing.assert_allclose(mean, DIAGONAL_MEAN, atol=1e-3)
    np.testing.assert_allclose(covariance, np.diag(DIAGONAL), atol=1.5e-4)
    # The fixed variances are off by far more at so few steps, each to its own side.
    for variance, side in [("fixed_small", -1), ("fixed_large", 1)]:
        _, other = exact_law(
            lambda x_T, noise, variance=variance: ddpm(
                denoise, schedule, x_T, noise, variance=variance
            ),
            steps,
        )
        assert np.all(side * np.diag(other - covariance) > 1e-3)


def probability_flow(x_T):
    """The exact solution at ᾱ = 1: whiten under q(x_T), colour under the data, in one basis."""
    a = SCHEDULE.alphas_bar[-1]
    eigenvalues, basis = np.linalg.eigh(COVARIANCE)
    scale = np.sqrt(eigenvalues / (a * eigenvalues + 1 - a))
    return MEAN + ((x_T - np.sqrt(a) * MEAN) @ basis * scale) @ basis.T


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_ddim_converges_to_the_probability_flow_at_first_order(prediction):
    x_T, _ = tabled_noise(3, 64)
    exact = probability_flow(np.asarray(x_T, np.float64).reshape(-1, 4))
    steps = np.array([20, 40, 80, 160])
    errors = []
    for count in steps:
        schedule = respace(SCHEDULE, str(count))
        x0 = ddim(exact_score(prediction), schedule, x_T, no_noise, prediction=prediction)
        errors.append(np.sqrt(np.mean((np.asarray(x0).reshape(-1, 4) - exact) ** 2)))
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 0.9 < order < 1.1, (order, errors)
    assert errors[-1] < 0.03  # where the data spread .5 to .8


def crooked(x, t):
    """No Gaussian's denoiser: what holds for it does not hang on linearity."""
    out = (
        jnp.tanh(2 * x)
        + jnp.sin(x[..., ::-1]) * jnp.cos(t.astype(jnp.float32))[:, None, None, None]
    )
    return jnp.concatenate([out, jnp.cos(5 * x)], axis=-1)


@pytest.mark.parametrize("clip_x0", [False, True])
def test_ddim_at_eta_one_is_ddpm_with_the_small_variance(clip_x0):
    """√(1-ᾱ_{t-1}-β̃_t) = √α_t (1-ᾱ_{t-1}) / √(1-ᾱ_t): the same mean, hence the same sample."""
    schedule = respace(SCHEDULE, "25")
    start, noise = tabled_noise(4, 8)
    one = ddim(crooked, schedule, start, noise, eta=1.0, clip_x0=clip_x0)
    other = ddpm(crooked, schedule, start, noise, variance="fixed_small", clip_x0=clip_x0)
    np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)
    half = ddim(crooked, schedule, start, noise, eta=0.5, clip_x0=clip_x0)
    assert jnp.abs(one - half).max() > 0.05


def test_samples_are_the_releases(release):
    """Ten steps, clipped, of DiT's PyTorch release (ed81ce2) with the same network and noise."""
    schedule = respace(SCHEDULE, "10")
    out = ddpm(release.denoise, schedule, release.eps, release.noise, clip_x0=True)
    np.testing.assert_allclose(
        out[0, 0, 0], [0.13008766, -0.57984400, -0.27104533, -0.18776365], atol=1e-4
    )
    np.testing.assert_allclose(jnp.std(out, ddof=1), 0.4724049, atol=1e-4)
    out = ddim(release.denoise, schedule, release.eps, release.noise, eta=0.6, clip_x0=True)
    np.testing.assert_allclose(out[0, 0, 0], [0.99644125, -0.22022703, 1.0, -0.75094670], atol=1e-4)


def test_every_prediction_samples_the_same():
    schedule = respace(SCHEDULE, "20")
    start, noise = tabled_noise(5, 4)
    for sampler in (
        lambda p: ddim(exact_score(p), schedule, start, noise, eta=0.3, prediction=p),
        lambda p: ddpm(
            exact_score(p), schedule, start, noise, prediction=p, variance="fixed_large"
        ),
    ):
        by_eps = sampler("eps")
        for prediction in ("x0", "v"):
            np.testing.assert_allclose(sampler(prediction), by_eps, atol=2e-4)


@pytest.mark.parametrize(
    "sampler",
    [ddpm, lambda *args: ddim(*args, eta=1.0)],
    ids=["ddpm", "ddim"],
)
def test_the_last_step_adds_no_noise_and_those_before_do(sampler):
    schedule = respace(SCHEDULE, "6")
    start, _ = tabled_noise(6, 2)

    @jax.jit
    def sample(loud):
        return sampler(
            crooked, schedule, start, lambda i: jnp.where(i == loud, jnp.ones_like(start), 0)
        )

    silent = sample(-1)
    np.testing.assert_array_equal(sample(5), silent)
    for loud in range(5):
        assert jnp.abs(sample(loud) - silent).max() > 1e-4


@pytest.mark.parametrize(
    "sampler", [ddpm, lambda *args: ddim(*args, eta=0.7)], ids=["ddpm", "ddim"]
)
def test_a_sample_hangs_on_its_key_alone(sampler):
    """Not on its batch's size, order or company."""
    schedule = respace(SCHEDULE, "8")

    @jax.jit
    def sample(keys):
        start, noise = initial_noise(keys, SHAPE), per_sample_noise(keys, SHAPE)
        return sampler(crooked, schedule, start, noise)

    keys = keys_of(7, 9)
    whole = sample(keys)
    assert len(np.unique(np.asarray(whole)[:, 0, 0, 0])) == 9
    order = jnp.array([4, 0, 8, 1, 1, 3, 2, 7, 6])
    np.testing.assert_allclose(sample(keys[order]), whole[order], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sample(keys[5:6]), whole[5:6], rtol=1e-4, atol=1e-5)


def test_noise_is_the_same_bits_in_any_batch_and_on_any_devices():
    keys = keys_of(8, 16)
    whole = per_sample_noise(keys, SHAPE)(jnp.int32(3))
    np.testing.assert_array_equal(per_sample_noise(keys[9:11], SHAPE)(jnp.int32(3)), whole[9:11])
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(keys, jax.NamedSharding(mesh, jax.P("data")))
    for draw in (
        lambda k: per_sample_noise(k, SHAPE)(jnp.int32(3)),
        lambda k: initial_noise(k, SHAPE),
    ):
        sharded = jax.jit(draw)(spread)
        assert len(sharded.sharding.device_set) == 8
        np.testing.assert_array_equal(sharded, draw(keys))


def test_noise_is_standard_normal_and_every_draw_is_fresh():
    keys = keys_of(9, 4000)
    noise = per_sample_noise(keys, SHAPE)
    draws = [initial_noise(keys, SHAPE)] + [noise(jnp.int32(i)) for i in range(3)]
    together = np.stack([np.asarray(draw)[:, 0, 0, 0] for draw in draws], axis=1)
    agrees_with_gaussian(together, np.zeros(4), np.eye(4))
    within = np.asarray(draws[1]).reshape(-1, 4)
    agrees_with_gaussian(within, np.zeros(4), np.eye(4))


@pytest.mark.parametrize("sampler", [ddpm, ddim])
def test_sampling_is_one_scan_with_one_trace_of_the_network(sampler):
    traces = []

    def denoise(x, t):
        traces.append(x.shape)
        return crooked(x, t)

    def sample(keys):
        start, noise = initial_noise(keys, SHAPE), per_sample_noise(keys, SHAPE)
        return sampler(denoise, SCHEDULE, start, noise)

    jaxpr = jax.make_jaxpr(sample)(keys_of(10, 2))
    assert traces == [(2, *SHAPE)]
    assert [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"] == [1000]


def test_bad_eta_and_bad_keys():
    start = jnp.zeros((2, *SHAPE))
    for eta in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="expected 0"):
            ddim(crooked, SCHEDULE, start, no_noise, eta=eta)
    with pytest.raises(UserError, match="needs a network with 4 output channels"):
        ddpm(lambda x, t: x, SCHEDULE, start, no_noise)
    bad = [
        jax.random.key(0),
        jax.random.PRNGKey(0),
        jnp.zeros(3),
        jax.random.split(jax.random.key(0, impl="rbg"), 2),
    ]
    for keys in bad:
        for draw in (initial_noise, per_sample_noise):
            with pytest.raises(UserError, match="one threefry key per sample"):
                draw(keys, SHAPE)
