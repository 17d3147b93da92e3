"""Losses against the release's numbers, closed forms, and the one bound that is tight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.diffusion.losses import (
    Objective,
    hybrid_loss,
    simple_loss,
    vlb_bits_per_dim,
    vlb_loss,
)
from ditjax.diffusion.process import Discrete
from ditjax.diffusion.schedule import Schedule, make_schedule, respace
from ditjax.diffusion.times import sample_timesteps, stratified_timesteps
from ditjax.errors import UserError

SCHEDULE = make_schedule("linear")


def jitted(function, denoise, schedule, *args, prediction="eps", variance=None, **options):
    """function(objective, denoise, ...), compiled whole: op by op takes ten times as long here."""
    objective = Objective(Discrete(schedule), prediction, variance or "learned_range")
    return jax.jit(lambda *args: function(objective, denoise, *args, **options))(*args)


def test_hybrid_loss_is_the_releases(release):
    loss = jitted(hybrid_loss, release.denoise, SCHEDULE, release.x0, release.t, release.eps)
    mse = [0.76508105, 0.73905617, 0.68755388, 0.59688604, 0.91858387, 1.51080441]
    vlb = [2.22466326, 2.16953921, 0.44962475, 0.01436581, 0.00730606, 0.02224204]
    np.testing.assert_allclose(loss["mse"], mse, rtol=2e-6)
    np.testing.assert_allclose(loss["vlb"], vlb, rtol=2e-5)
    np.testing.assert_allclose(loss["loss"], np.add(mse, vlb), rtol=2e-5)


def test_bits_per_dim_are_the_releases(release):
    schedule = respace(SCHEDULE, "10")
    vlb = jitted(
        vlb_bits_per_dim, release.denoise, schedule, release.x0, noise=release.noise, clip_x0=True
    )
    expected = [75.235703, 19.359436, 82.777657, 74.870232, 27.348763, 127.123497]
    np.testing.assert_allclose(vlb.total, expected, rtol=1e-4)


def test_hybrid_trains_the_mean_by_mse_alone_and_the_variance_by_vlb_alone(release):
    x0, t, eps = release.x0, release.t, release.eps
    out = 0.3 * jnp.concatenate([eps, x0], axis=-1)

    def gradient(loss, part):
        def total(out):
            return loss(Objective(Discrete(SCHEDULE)), lambda x, t: out, x0, t, eps)[part].sum()

        return jnp.split(jax.jit(jax.grad(total))(out), 2, axis=-1)

    vlb_to_mean, vlb_to_variance = gradient(hybrid_loss, "vlb")
    mse_to_mean, mse_to_variance = gradient(hybrid_loss, "mse")
    assert jnp.all(vlb_to_mean == 0)
    assert jnp.all(mse_to_variance == 0)
    assert jnp.all(jnp.any(vlb_to_variance != 0, axis=(1, 2, 3)))
    np.testing.assert_allclose(mse_to_mean, 2 * (out[..., :4] - eps) / 16, rtol=1e-4, atol=1e-7)
    both = gradient(hybrid_loss, "loss")
    np.testing.assert_allclose(both[0], mse_to_mean, rtol=1e-6)
    np.testing.assert_allclose(both[1], vlb_to_variance, rtol=1e-6)
    # Without the stop_gradient the bound does train the mean.
    assert jnp.all(jnp.any(gradient(vlb_loss, "vlb")[0] != 0, axis=(1, 2, 3)))


def test_vlb_weight_scales_the_second_term_only(release):
    args = (release.denoise, SCHEDULE, release.x0, release.t, release.eps)
    loss = jitted(hybrid_loss, *args, vlb_weight=0.25)
    np.testing.assert_allclose(loss["loss"], loss["mse"] + 0.25 * loss["vlb"], rtol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_simple_loss_is_the_squared_error_of_what_is_predicted(release, prediction):
    x0, t, eps = release.x0, release.t, release.eps
    a = SCHEDULE.alphas_bar[np.asarray(t)][:, None, None, None]
    truth = {"eps": eps, "x0": x0, "v": np.sqrt(a) * eps - np.sqrt(1 - a) * x0}[prediction]
    error = jnp.asarray(np.linspace(0.1, 0.6, 6), jnp.float32)

    def denoise(x, timesteps):
        return jnp.asarray(truth, jnp.float32) + error[:, None, None, None]

    def with_variance(x, timesteps):
        return jnp.concatenate([denoise(x, timesteps), 99 * x], axis=-1)

    for network in (denoise, with_variance):
        loss = jitted(simple_loss, network, SCHEDULE, x0, t, eps, prediction=prediction)
        assert set(loss) == {"loss", "mse"}
        for part in loss.values():
            np.testing.assert_allclose(part, error**2, rtol=1e-5)


def test_vlb_of_an_x0_error_is_half_the_step_in_snr():
    """VDM Eq. 13: with the posterior's own variance, L_t = ½ (SNR(t-1) - SNR(t)) ‖x0 - x̂0‖²."""
    t = jnp.array([1, 2, 100, 999], jnp.int32)
    x0 = jnp.full((4, 2, 2, 3), 0.25)
    error = 0.125
    loss = jitted(
        vlb_loss,
        lambda x, timesteps: x0 + error,
        SCHEDULE,
        x0,
        t,
        jnp.ones_like(x0),
        prediction="x0",
        variance="fixed_small",
    )
    snr = SCHEDULE.alphas_bar / (1 - SCHEDULE.alphas_bar)
    expected = 0.5 * (snr[np.asarray(t) - 1] - snr[np.asarray(t)]) * error**2 / np.log(2)
    np.testing.assert_allclose(loss["vlb"], expected, rtol=1e-4, atol=2e-10)
    np.testing.assert_array_equal(loss["loss"], loss["vlb"])
    np.testing.assert_allclose(loss["mse"], error**2, rtol=1e-6)


MEAN = np.array([0.1, -0.05, 0.0])
VARIANCE = np.array([0.02, 0.04, 0.06])


def draws(batch, steps):
    rng = np.random.default_rng(0)
    x0 = MEAN + np.sqrt(VARIANCE) * rng.standard_normal((batch, 2, 2, 3))
    table = jnp.asarray(rng.standard_normal((steps, batch, 2, 2, 3)), jnp.float32)
    return jnp.asarray(x0, jnp.float32), lambda i: table[i]


@pytest.mark.parametrize("spec", ["5", "40"])
def test_bound_is_tight_for_an_exact_reverse_chain(exact_diagonal, spec):
    """Where p(x_{t-1}|x_t) is q's own, the bound's mean over noise is -log p(x0): at any S."""
    schedule = respace(SCHEDULE, spec)
    batch = 4096
    x0, noise = draws(batch, len(schedule))
    denoise = exact_diagonal(schedule, MEAN, VARIANCE)
    vlb = jitted(vlb_bits_per_dim, denoise, schedule, x0, noise=noise)
    log_p = -0.5 * ((np.asarray(x0) - MEAN) ** 2 / VARIANCE + np.log(2 * np.pi * VARIANCE))
    exact = -(log_p + np.log(2 / 255)).mean(axis=(1, 2, 3)) / np.log(2)  # bins are 2/255 wide
    gap = np.asarray(vlb.total, np.float64) - exact
    # Five standard errors (two-sided 6e-7), and .002 for the tanh form of Φ and the finite bin.
    assert abs(gap.mean()) < 5 * gap.std() / np.sqrt(batch) + 0.002
    assert gap.std() / np.sqrt(batch) < 0.01
    # Each KL term, in closed form: the exact variance over the posterior's.
    for t in (1, len(schedule) // 2, len(schedule) - 1):
        a, before = schedule.alphas_bar[t], schedule.alphas_bar[t - 1]
        marginal = before * VARIANCE + 1 - before
        reverse = 1 / (1 / marginal + (a / before) / (1 - a / before))
        expected = 0.5 * np.log2(reverse / schedule.posterior_variance[t]).mean()
        terms = np.asarray(vlb.terms[t], np.float64)
        error = 5 * terms.std() / np.sqrt(batch)
        assert abs(terms.mean() - expected) < error + 1e-5
    np.testing.assert_allclose(vlb.total, vlb.prior + vlb.terms.sum(axis=0), rtol=1e-5)


def test_any_other_variance_is_a_looser_bound(exact_diagonal):
    schedule = respace(SCHEDULE, "20")
    x0, noise = draws(512, 20)
    denoise = exact_diagonal(schedule, MEAN, VARIANCE)

    def total(variance):
        vlb = jitted(vlb_bits_per_dim, denoise, schedule, x0, noise=noise, variance=variance)
        return float(vlb.total.mean())

    assert total("learned_range") + 0.05 < min(total("fixed_small"), total("fixed_large"))


def test_prior_term_is_the_kl_at_the_last_step():
    schedule = Schedule(np.array([0.1, 0.3]), np.arange(2), 2)
    x0 = jnp.linspace(-1, 1, 12).reshape(2, 2, 3, 1)
    vlb = jitted(
        vlb_bits_per_dim, lambda x, t: x, schedule, x0, noise=lambda i: x0, variance="fixed_small"
    )
    a = 0.9 * 0.7
    kl = 0.5 * (a * np.asarray(x0, np.float64) ** 2 + (1 - a) - 1 - np.log(1 - a))
    np.testing.assert_allclose(vlb.prior, kl.mean(axis=(1, 2, 3)) / np.log(2), rtol=1e-5)
    np.testing.assert_allclose(vlb.total - vlb.terms.sum(axis=0), vlb.prior, rtol=1e-4)


def test_training_terms_sum_to_the_bound(release):
    schedule = respace(SCHEDULE, "6")
    x0, noise = release.x0, release.noise
    vlb = jitted(vlb_bits_per_dim, release.denoise, schedule, x0, noise=noise)
    for loss in (vlb_loss, hybrid_loss):
        at = jax.jit(
            lambda t, eps, loss=loss: loss(
                Objective(Discrete(schedule)), release.denoise, x0, t, eps
            )["vlb"]
        )
        for i in range(6):
            term = at(jnp.full(6, i, jnp.int32), noise(jnp.int32(i)))
            np.testing.assert_allclose(vlb.terms[i], term, rtol=1e-5)


def test_bound_is_one_scan_with_one_trace_of_the_network(release):
    traces = []

    def denoise(x, t):
        traces.append(x.shape)
        return release.denoise(x, t)

    jaxpr = jax.make_jaxpr(
        lambda x0: vlb_bits_per_dim(Objective(Discrete(SCHEDULE)), denoise, x0, release.noise).total
    )(release.x0)
    assert len(traces) == 1
    assert [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"] == [1000]


def test_timesteps_are_uniform():
    t = np.asarray(sample_timesteps(jax.random.key(3), 50_000, 50))
    assert t.dtype == np.int32
    counts = np.bincount(t, minlength=50)
    assert len(counts) == 50
    # Chi-square with 49 degrees of freedom: 113 is exceeded with probability 1e-6.
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 113


def test_stratified_timesteps_leave_no_part_out():
    """Any 2^k pairs in a row from a multiple of 2^k on: one in each of 2^k parts of the circle."""
    np.testing.assert_array_equal(
        stratified_timesteps(np.arange(5), 1000, 0), [0, 500, 250, 750, 125]
    )
    np.testing.assert_array_equal(
        stratified_timesteps(np.arange(5), 1000, 2**31), [500, 0, 750, 250, 625]
    )
    for shift in (0, 1, 0x9E3779B9, 2**32 - 1):
        fine = stratified_timesteps(np.arange(256), 2**20, shift).astype(np.int64)
        turned = (fine - (shift >> 12)) % 2**20
        for k in range(9):
            for start in range(0, 256, 2**k):
                part = np.sort(turned[start : start + 2**k] + 1) // (2**20 >> k)
                assert len(np.unique(part)) == 2**k, (shift, k, start)
        t = stratified_timesteps(np.arange(1024), 1000, shift)
        np.testing.assert_array_equal(np.unique(t), np.arange(1000))
        np.testing.assert_array_equal(
            t[700:703], stratified_timesteps(np.arange(700, 703), 1000, shift)
        )


def test_losses_refuse_what_cannot_be_trained(release):
    args = (release.x0, release.t, release.eps)
    with pytest.raises(UserError, match="expected 'learned_range'"):
        hybrid_loss(Objective(Discrete(SCHEDULE), variance="fixed_small"), release.denoise, *args)
    for loss in (hybrid_loss, vlb_loss):
        with pytest.raises(UserError, match="8 output channels"):
            loss(Objective(Discrete(SCHEDULE)), lambda x, t: x, *args)
    with pytest.raises(UserError, match="gives 3 channels"):
        simple_loss(Objective(Discrete(SCHEDULE)), lambda x, t: x[..., :3], *args)
