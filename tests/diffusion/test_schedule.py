"""Schedules against the published goldens and against Bayes' rule on Gaussians in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.diffusion.schedule import (
    Schedule,
    cosine_betas,
    extract,
    linear_betas,
    make_schedule,
    respace,
    space_timesteps,
)
from ditjax.errors import UserError


def test_linear_goldens_of_the_release():
    alphas_bar = make_schedule("linear").alphas_bar
    assert alphas_bar.dtype == np.float64
    np.testing.assert_allclose(
        alphas_bar[[0, 499, 999]], [0.9999, 0.0785872, 4.03583e-5], rtol=1e-6
    )


def test_linear_keeps_its_total_noise_at_any_length():
    np.testing.assert_allclose(linear_betas(100)[[0, -1]], [1e-3, 0.2], rtol=1e-12)
    np.testing.assert_allclose(linear_betas(4000)[[0, -1]], [2.5e-5, 5e-3], rtol=1e-12)


def test_cosine_is_the_published_curve_until_the_clip():
    betas = cosine_betas(1000)
    assert betas[-1] == 0.999
    t = np.arange(1, 999)
    curve = np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    start = np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[t - 1], curve / start, rtol=1e-10)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_alphas_bar_by_logs(name):
    schedule = make_schedule(name)
    by_logs = np.exp(np.cumsum(np.log1p(-schedule.betas)))
    np.testing.assert_allclose(schedule.alphas_bar, by_logs, rtol=1e-11)
    np.testing.assert_array_equal(schedule.alphas_bar_prev[1:], schedule.alphas_bar[:-1])
    assert schedule.alphas_bar_prev[0] == 1


@pytest.mark.parametrize("spec", ["1000", "250", "10,15,20"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_posterior_is_bayes_rule(name, spec):
    s = respace(make_schedule(name), spec)
    beta, before = s.betas[1:], s.alphas_bar[:-1]
    # Prior N(√ᾱ_{t-1} x0, 1-ᾱ_{t-1}) times likelihood N(x_t; √(1-β) x_{t-1}, β): precisions add.
    precision = 1 / (1 - before) + (1 - beta) / beta
    np.testing.assert_allclose(s.posterior_variance[1:], 1 / precision, rtol=1e-9)
    np.testing.assert_allclose(
        s.posterior_mean_x0[1:], np.sqrt(before) / (1 - before) / precision, rtol=1e-9
    )
    np.testing.assert_allclose(
        s.posterior_mean_x_t[1:], np.sqrt(1 - beta) / beta / precision, rtol=1e-9
    )
    np.testing.assert_allclose(
        s.posterior_log_variance_clipped[1:], -np.log(precision), rtol=1e-9, atol=1e-9
    )


def test_first_step_is_deterministic_and_its_log_variance_is_the_second():
    s = make_schedule("linear")
    assert s.posterior_variance[0] == 0
    np.testing.assert_allclose([s.posterior_mean_x0[0], s.posterior_mean_x_t[0]], [1, 0])
    second = np.log(1e-4 * s.betas[1] / (1 - s.alphas_bar[1]))
    for table in (s.posterior_log_variance_clipped, s.log_betas_clipped):
        np.testing.assert_allclose(table[0], second, rtol=1e-12)
    np.testing.assert_allclose(np.exp(s.log_betas_clipped[1:]), s.betas[1:], rtol=1e-12)
    np.testing.assert_allclose(np.exp(s.log_betas), s.betas, rtol=1e-12)


def test_a_single_step_has_finite_tables():
    s = Schedule(np.array([0.9]), np.array([0]), 1)
    np.testing.assert_allclose(s.posterior_log_variance_clipped, np.log([0.9]))


def test_250_steps_are_the_published_ones():
    steps = space_timesteps(1000, "250")
    assert steps.dtype == np.int64
    assert steps[:3].tolist() == [0, 4, 8]
    assert steps[-4:].tolist() == [987, 991, 995, 999]
    assert (len(steps), steps.sum()) == (250, 124875)
    # The release's for "21": the stride is summed, where 10 · 49.95 would round to 500.
    assert space_timesteps(1000, "21")[9:12].tolist() == [450, 499, 549]


@pytest.mark.parametrize(
    ("num", "spec", "steps"),
    [
        (16, "7", [0, 2, 5, 8, 10, 12, 15]),  # strides of 2.5: halves go to the even neighbour
        (10, "1,2,3", [0, 4, 6, 7, 8, 9]),  # sections of 4, 3, 3: the first takes the remainder
        (9, "3, 1", [0, 2, 4, 5]),
        (12, "ddim4", [0, 3, 6, 9]),
        (10, "ddim4", [0, 3, 6, 9]),
        (10, "ddim2", [0, 5]),  # 6, 7, 8 and 9 give two as well
        (10, "10", list(range(10))),
        (10, "1", [0]),
    ],
)
def test_spacing_by_hand(num, spec, steps):
    assert space_timesteps(num, spec).tolist() == steps


def test_section_counts_are_kept_in_each_section():
    steps = space_timesteps(1000, "10,15,20")
    assert np.histogram(steps, [0, 334, 667, 1000])[0].tolist() == [10, 15, 20]
    assert np.all(np.diff(steps) > 0)
    assert steps[[9, 10, 24, 25, 44]].tolist() == [333, 334, 666, 667, 999]
    assert space_timesteps(1000, "ddim50").tolist() == list(range(0, 1000, 20))


@pytest.mark.parametrize(
    ("spec", "remedy"),
    [
        ("", "'250'"),
        ("fast", "'ddim50'"),
        ("-5", "at least 1"),
        ("10,,20", "'10,15,20'"),
        ("2.5", "number of steps"),
        ("0", "at least 1"),
        ("1001", "at most 1000"),
        ("10,400,10", "section 2, which has 333"),
        ("ddim", "'ddim50'"),
        ("ddim0", "'ddim50'"),
        ("ddim300", "ddim250, ddim334"),
        (",".join(["1"] * 1001), "fewer sections"),
    ],
)
def test_bad_specs_name_the_remedy(spec, remedy):
    with pytest.raises(UserError) as error:
        space_timesteps(1000, spec)
    assert repr(spec) in str(error.value)
    assert remedy in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_respacing_keeps_alphas_bar_of_the_retained(name):
    full = make_schedule(name)
    short = respace(full, "250")
    assert (len(short), short.num_train_timesteps) == (250, 1000)
    np.testing.assert_allclose(short.alphas_bar, full.alphas_bar[short.timesteps], rtol=1e-12)
    if name == "linear":
        np.testing.assert_allclose(short.betas[249], 0.0775193, rtol=1e-6)


def test_respacing_twice_keeps_original_timesteps():
    twice = respace(respace(make_schedule("linear"), "ddim100"), "ddim50")
    assert twice.timesteps.tolist() == list(range(0, 1000, 20))


def test_extract_gathers_and_never_reads_past_the_table():
    t = jnp.array([2, 0, 3], jnp.int32)
    values = extract(np.array([1.0, 2.0, 3.0]), t, 4)
    assert values.shape == (3, 1, 1, 1)
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values.ravel(), [3.0, 1.0, np.nan])


def test_equal_schedules_compile_once_and_others_apart():
    traces = []

    def last(schedule):
        traces.append(len(schedule))
        return jnp.float32(schedule.alphas_bar[-1])

    jitted = jax.jit(last, static_argnums=0)
    one, same = make_schedule("linear"), make_schedule("linear")
    assert hash(one) == hash(same)
    assert jitted(one) == jitted(same)
    assert traces == [1000]
    # The last ᾱ agrees; the rest of the chain does not.
    jitted(respace(make_schedule("linear"), "250"))
    assert traces == [1000, 250]
    assert make_schedule("linear") != make_schedule("cosine")


def test_tables_are_read_only_and_apart_from_the_callers():
    betas = np.array([0.1, 0.2])
    s = Schedule(betas, np.arange(2), 2)
    betas[0] = 0.5
    assert s.betas[0] == 0.1
    for table in (s.betas, s.timesteps, s.alphas_bar, s.posterior_variance):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0


@pytest.mark.parametrize(
    ("betas", "timesteps", "what"),
    [
        ([], [], "betas"),
        ([0.0, 0.1], [0, 1], "betas"),
        ([0.1, 1.0], [0, 1], "betas"),
        ([0.1, np.nan], [0, 1], "betas"),
        ([0.1, 0.2], [0], "timesteps"),
        ([0.1, 0.2], [1, 1], "timesteps"),
        ([0.1, 0.2], [-1, 1], "timesteps"),
        ([0.1, 0.2], [0, 2], "timesteps"),
    ],
)
def test_impossible_schedules_are_refused(betas, timesteps, what):
    with pytest.raises(UserError, match=what):
        Schedule(np.array(betas), np.array(timesteps), 2)


def test_unknown_and_impossible_names():
    with pytest.raises(UserError, match="Did you mean 'cosine'"):
        make_schedule("cosin")
    with pytest.raises(UserError, match="at least 21"):
        make_schedule("linear", 20)
    with pytest.raises(UserError, match="at least 1"):
        make_schedule("cosine", 0)
    assert len(make_schedule("linear", 21)) == 21
    assert len(make_schedule("cosine", 1)) == 1
