"""Guidance: its algebra, its channel rules, and what it does to a Gaussian's score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.diffusion.gaussian import Stateful, eps_from_v, eps_from_x0, q_sample
from ditjax.diffusion.guidance import (
    classifier_free,
    guide,
    guide_along,
    projected,
    projected_along,
    rescaled,
    within,
    zero_above,
    zero_star,
)
from ditjax.diffusion.process import Flow, per_sample, precondition
from ditjax.diffusion.schedule import make_schedule
from ditjax.errors import UserError

X = jax.random.normal(jax.random.key(0), (3, 2, 2, 4))
T = jnp.array([0, 400, 999], jnp.int32)


def pair(x, t):
    """Four channels of prediction and four of variance, all of them apart in c and u."""
    x = x + t.astype(jnp.float32)[:, None, None, None] / 1000
    conditional = jnp.concatenate([jnp.sin(x), jnp.cos(x)], axis=-1)
    return conditional, jnp.concatenate([x * x, x - 2], axis=-1)


C, U = (np.asarray(out, np.float64) for out in pair(X, T))


@pytest.mark.parametrize(("channels", "guided"), [("all", 4), ("three", 3)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 4.0])
def test_guided_channels_are_extrapolated_and_the_rest_conditional(channels, guided, scale):
    out = guide(pair, scale, channels=channels, x_channels=4)(X, T)
    assert out.shape == C.shape
    expected = (1 - scale) * U[..., :guided] + scale * C[..., :guided]
    np.testing.assert_allclose(out[..., :guided], expected, atol=1e-5)
    np.testing.assert_array_equal(out[..., guided:], C.astype(np.float32)[..., guided:])


def test_scale_zero_is_unconditional_and_one_conditional():
    zero, one = (guide(pair, s, channels="all", x_channels=4)(X, T)[..., :4] for s in (0, 1))
    np.testing.assert_array_equal(zero, U.astype(np.float32)[..., :4])
    np.testing.assert_allclose(one, C[..., :4], atol=1e-6)


def test_a_scale_for_each_sample():
    scales = jnp.array([0.0, 1.0, 3.5])
    out = jax.jit(lambda s: guide(pair, s, channels="all", x_channels=4)(X, T))(scales)
    for b, scale in enumerate([0.0, 1.0, 3.5]):
        alone = guide(pair, scale, channels="all", x_channels=4)(X, T)
        np.testing.assert_allclose(out[b], alone[b], atol=1e-6)


def test_default_guides_all_channels_and_serves_networks_without_variance():
    def plain(x, t):
        conditional, unconditional = pair(x, t)
        return conditional[..., :4], unconditional[..., :4]

    out = guide(plain, 2.0, x_channels=4)(X, T)
    np.testing.assert_allclose(out, 2 * C[..., :4] - U[..., :4], atol=1e-5)


def test_guiding_x0_or_v_is_guiding_eps():
    schedule = make_schedule("linear")
    t = jnp.array([50, 400, 700], jnp.int32)
    conditional, unconditional = (jnp.split(out, 2, axis=-1)[0] for out in pair(X, t))
    for to_eps in (eps_from_x0, eps_from_v):
        guided = guide(lambda x, t: (conditional, unconditional), 2.5, x_channels=4)(X, t)
        as_eps = [to_eps(schedule, X, t, out) for out in (conditional, unconditional)]
        eps = as_eps[1] + 2.5 * (as_eps[0] - as_eps[1])
        np.testing.assert_allclose(to_eps(schedule, X, t, guided), eps, rtol=1e-4, atol=1e-4)


def test_guidance_sharpens_a_gaussian_class_to_the_product_of_powers():
    """p(x|c)^s p(x)^(1-s) of unit Gaussians at means m and 0 is the unit Gaussian at s·m."""
    schedule = make_schedule("linear")
    t = jnp.array([50, 400, 700], jnp.int32)
    x_t = q_sample(schedule, X, t, X[..., ::-1])

    def eps_of(mean):
        a = schedule.alphas_bar[np.asarray(t)][:, None, None, None]
        return jnp.asarray(np.sqrt(1 - a) * (np.asarray(x_t) - np.sqrt(a) * mean), jnp.float32)

    guided = guide(lambda x, t: (eps_of(0.5), eps_of(0.0)), 3.0, x_channels=4)(x_t, t)
    np.testing.assert_allclose(guided, eps_of(1.5), atol=1e-5)


def steps_of(t):
    return jnp.full((3,), t, jnp.int32)


def exact_pair(x, t):
    """Small integers: float32 arithmetic on them is exact, however XLA orders it."""
    n = jnp.rint(4 * x) + t.astype(jnp.float32)[:, None, None, None]
    return jnp.concatenate([2 * n, n], axis=-1), jnp.concatenate([-n, 3 * n], axis=-1)


def conditional(x, t):
    return exact_pair(x, t)[0]


GUIDED = guide(exact_pair, 4.0, channels="three", x_channels=4)


@pytest.mark.parametrize(
    ("t", "inside"), [(199, False), (200, True), (201, True), (699, True), (700, False)]
)
def test_guidance_is_on_from_low_to_below_high(t, inside):
    """Kynkäänniemi et al. Eq. 4, half-open: low itself is guided, high is not."""
    denoise = jax.jit(lambda low, high: within(GUIDED, conditional, low, high)(X, steps_of(t)))
    expected = (GUIDED if inside else conditional)(X, steps_of(t))
    np.testing.assert_array_equal(denoise(jnp.float32(200), jnp.float32(700)), expected)
    assert (GUIDED(X, steps_of(t)) != conditional(X, steps_of(t))).any()


def test_an_interval_of_all_timesteps_is_plain_guidance():
    for t in (0, 500, 999):
        out = within(GUIDED, conditional, 0, 1000)(X, steps_of(t))
        np.testing.assert_array_equal(out, GUIDED(X, steps_of(t)))


def test_the_unconditional_half_is_computed_inside_alone():
    computed = []

    def counted(x, t):
        jax.debug.callback(lambda t: computed.append(int(t)), t[0])
        return exact_pair(x, t)

    guided = guide(counted, 4.0, x_channels=4)

    @jax.jit
    def sample(low, high):
        def step(x, t):
            return within(guided, conditional, low, high)(x, jnp.full((3,), t))[..., :4], None

        return jax.lax.scan(step, X, jnp.arange(900, -1, -100))[0]

    jax.block_until_ready(sample(200.0, 700.0))
    jax.effects_barrier()
    assert sorted(computed) == [200, 300, 400, 500, 600]


def test_what_cannot_be_guided():
    with pytest.raises(UserError, match="Did you mean 'three'"):
        guide(pair, 1.5, channels="tree", x_channels=4)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least 3; use 'all'"):
        guide(pair, 1.5, channels="three", x_channels=1)
    with pytest.raises(UserError, match="at least 9 channels"):
        guide(pair, 1.5, channels="all", x_channels=9)(X, T)
    with pytest.raises(UserError, match="two equal shapes"):
        guide(lambda x, t: (x, x[:1]), 1.5, x_channels=4)(X, T)


# ---- other rules, on a flow whose network predicts in one space or another

RNG = np.random.default_rng(8)
X0C, X0U, XT = (jnp.asarray(RNG.standard_normal((3, 2, 2, 4)), jnp.float32) for _ in range(3))
TIMES = jnp.asarray([200.0, 500.0, 900.0])


def coefficients(prediction):
    def of(timesteps):
        p = precondition(Flow(), prediction, timesteps / 1000)
        return tuple(per_sample(each, 4) for each in (p.c_in, p.c_skip, p.c_out))

    return of


def in_space(prediction, x0):
    """The network's output whose estimate is x0."""
    _, skip, out = coefficients(prediction)(TIMES)
    return (x0 - skip * XT) / out


def estimate(prediction, rule, scale=3.0):
    """x̂0 of the guided prediction."""

    def of_two(x, t):
        return in_space(prediction, X0C), in_space(prediction, X0U)

    guided = guide(of_two, scale, x_channels=4, rule=rule(prediction))(XT, TIMES)
    _, skip, out = coefficients(prediction)(TIMES)
    return np.asarray(skip * XT + out * guided)


def flat(x):
    return np.asarray(x, np.float64).reshape(len(x), -1)


def test_only_cfg_and_apg_are_the_same_in_every_space():
    """What a protocol must record: the space of the others."""
    rules = {
        "cfg": lambda prediction: classifier_free,
        "apg": lambda prediction: projected(0.3, 2.0, coefficients(prediction)),
        "rescale": lambda prediction: rescaled(0.7),
        "zero": lambda prediction: zero_star,
    }
    apart = {
        name: np.abs(estimate("velocity", rule) - estimate("x0", rule)).max()
        for name, rule in rules.items()
    }
    assert apart["cfg"] < 1e-5
    assert apart["apg"] < 1e-5
    assert apart["rescale"] > 0.05
    assert apart["zero"] > 0.05


@pytest.mark.parametrize(("eta", "norm"), [(0.0, 0.0), (1.0, 0.0), (0.3, 1.5)])
def test_apg_drops_what_is_parallel(eta, norm):
    found = estimate("velocity", lambda p: projected(eta, norm, coefficients(p)))
    c, change = flat(X0C), flat(X0C) - flat(X0U)
    if norm:
        length = np.linalg.norm(change, axis=1, keepdims=True)
        change = change * np.minimum(1, norm / length)
    unit = c / np.linalg.norm(c, axis=1, keepdims=True)
    parallel = (change * unit).sum(1, keepdims=True) * unit
    expected = c + 2.0 * (change - parallel + eta * parallel)
    np.testing.assert_allclose(flat(found), expected, atol=2e-5)


def test_momentum_adds_the_change_of_the_evaluations_before():
    """MomentumBuffer of diffusers: the change is Δ + β (the last change), then as without."""
    beta, pairs = -0.5, [(X0C, X0U), (X0U, X0C * 2), (X0C + X0U, X0U)]
    plain = projected(0.3, 1.5, coefficients("velocity"))
    rule = projected_along(beta, 0.3, 1.5, coefficients("velocity"))
    memory, total, s = jnp.zeros_like(XT), jnp.zeros_like(XT), jnp.float32(3.0)
    for good, bad in pairs:
        c = in_space("velocity", good)
        found, memory = rule(c, in_space("velocity", bad), s, XT, TIMES, memory)
        total = good - bad + beta * total
        expected = plain(c, in_space("velocity", good - total), s, XT, TIMES)
        np.testing.assert_allclose(memory, total, atol=2e-5)
        np.testing.assert_allclose(found, expected, atol=5e-5)


def test_momentum_rests_outside_the_interval():
    """And guides three of four channels, whose memory has three."""
    rule = projected_along(
        -0.5, 1.0, 0.0, lambda t: (jnp.float32(1), jnp.float32(0), jnp.float32(1))
    )
    guided = guide_along(exact_pair, 3.0, channels="three", x_channels=4, rule=rule)
    inside = within(guided, conditional, 200, 700)
    assert isinstance(inside, Stateful)
    memory = guided.start(X)
    assert memory.shape == X[..., :3].shape
    out, changed = inside.step(X, steps_of(300), memory)
    c, u = (np.asarray(each)[..., :3] for each in exact_pair(X, steps_of(300)))
    np.testing.assert_allclose(changed, c - u)
    np.testing.assert_allclose(out[..., :3], 3 * c - 2 * u, rtol=1e-6)
    out, after = inside.step(X, steps_of(800), changed)
    np.testing.assert_array_equal(out, conditional(X, steps_of(800)))
    np.testing.assert_array_equal(after, changed)
    _, after = inside.step(X, steps_of(300), changed)
    np.testing.assert_allclose(after, 0.5 * np.asarray(changed))
    with pytest.raises(UserError, match=r"set config\.sample\.apg_momentum to 0"):
        guided(X, steps_of(300))


def test_rescale_keeps_the_conditional_deviation():
    found = estimate("velocity", lambda p: rescaled(1.0))
    out = in_space("velocity", jnp.asarray(found))
    wanted = in_space("velocity", X0C)
    np.testing.assert_allclose(flat(out).std(1), flat(wanted).std(1), rtol=1e-4)


def test_zero_star_scales_the_unconditional_velocity_onto_the_conditional():
    found = in_space("velocity", jnp.asarray(estimate("velocity", lambda p: zero_star)))
    c, u = flat(in_space("velocity", X0C)), flat(in_space("velocity", X0U))
    share = (c * u).sum(1, keepdims=True) / (u * u).sum(1, keepdims=True)
    np.testing.assert_allclose(flat(found), share * u + 3 * (c - share * u), atol=2e-4)


def test_scale_1_is_conditional_in_every_rule_but_zero_star():
    for rule in (classifier_free, rescaled(0.7), projected(0.3, 2.0, coefficients("velocity"))):
        found = estimate("velocity", lambda p, rule=rule: rule, scale=1.0)
        np.testing.assert_allclose(found, X0C, atol=1e-5)


def test_no_motion_above_a_time():
    moved = zero_above(lambda x, t: x + 1, 0.5, lambda t: t / 1000)(XT, TIMES)
    np.testing.assert_array_equal(moved[2], 0)
    np.testing.assert_array_equal(moved[:2], (XT + 1)[:2])
