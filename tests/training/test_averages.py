"""Averages of the weights: shares by their integrals, widths made of others, skipped updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.parallel.mesh import make_mesh
from ditjax.tasks import make_task
from ditjax.training.averages import (
    Averages,
    coefficients,
    exponent_of,
    inner_product,
    no_averages,
    share_of_newest,
    updated_averages,
)
from ditjax.training.program import abstract_state
from ditjax.training.step import init_state, make_step


def shares(std, n):
    """The shares of θ_1 .. θ_n in the average of a width: integrals of its profile, f64[n]."""
    return np.diff((np.arange(n + 1) / n) ** (exponent_of(std) + 1))


def test_exponents_of_widths():
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent_of(0.10) == pytest.approx(6.94, abs=0.005)
    for std in (0.025, 0.05, 0.13, 0.25):
        g = exponent_of(std)
        assert np.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3))) == pytest.approx(std, rel=1e-10)
        k = np.arange(1, 20_001) - 0.5
        weights = shares(std, 20_000)
        mean = weights @ k
        assert np.sqrt(weights @ (k - mean) ** 2) / 20_000 == pytest.approx(std, rel=1e-4)


def test_an_average_holds_each_update_by_the_integral_of_its_profile():
    """θ_k is the k-th unit vector, so that the average is the vector of the shares."""
    n, names = 30, ("power:0.05", "power:0.2", "ema:0.9")

    @jax.jit
    def trained():
        start = no_averages(jnp.full(n, 7.0), names)  # the initial weights leave no trace
        return jax.lax.scan(lambda a, p: (updated_averages(a, p), None), start, jnp.eye(n))[0]

    averages = trained()
    assert int(averages.updates) == n
    for std in (0.05, 0.2):
        found = averages.trees[f"power:{std}"]
        np.testing.assert_allclose(found, shares(std, n), rtol=2e-5, atol=1e-6)
    ema = 7 * 0.9**n + 0.1 * 0.9 ** np.arange(n - 1, -1, -1)
    np.testing.assert_allclose(averages.trees["ema:0.9"], ema, rtol=1e-5)


def test_a_late_share_has_all_its_digits():
    """float32 keeps 1e-3 of 1 - β where β is rounded first."""
    n = 400_000
    found = float(share_of_newest("power:0.1", jnp.int32(n)))
    exact = -np.expm1((exponent_of(0.1) + 1) * np.log1p(-1 / n))
    assert found == pytest.approx(exact, rel=1e-6)


def test_inner_products_by_quadrature():
    t = (np.arange(200_000) + 0.5) / 200_000
    for (ta, ga), (tb, gb) in (((1.0, 2.5), (0.6, 7.0)), ((0.6, 2.5), (1.0, 7.0))):
        a, b = ((g + 1) * t**g / end ** (g + 1) * (t <= end) for end, g in ((ta, ga), (tb, gb)))
        assert inner_product(ta, ga, tb, gb) == pytest.approx(np.mean(a * b), rel=1e-4)


def stored(count, n, stds=(0.05, 0.1)):
    times = [n * (k + 1) // count for k in range(count)]
    return np.repeat(times, len(stds)), np.tile(stds, count)


def test_a_stored_average_is_made_of_itself():
    times, stds = stored(16, 1600)
    for i in range(len(times)):
        x, error = coefficients(times, stds, times[i], stds[i])
        np.testing.assert_allclose(x, np.eye(len(times))[i], atol=1e-12)
        assert error < 1e-6


# The bar, 3e-4, at the widths between those that are kept; wider and narrower ones as measured.
@pytest.mark.parametrize(("std", "most"), [(0.075, 3e-4), (0.13, 3e-4), (0.2, 4e-3), (0.03, 3e-3)])
def test_an_average_of_another_width_is_made_of_16_snapshots(std, most):
    """Of a random walk of 1,600 updates, against the average that is kept from the start."""
    n = 1600
    walk = np.cumsum(np.random.default_rng(0).normal(size=(n, 256)), 0)

    def kept(width, end):
        return shares(width, end) @ walk[:end]

    def missed(count):
        times, stds = stored(count, n)
        x, _ = coefficients(times, stds, n, std)
        assert x.sum() == pytest.approx(1, abs=1e-12)
        made = x @ [kept(width, end) for end, width in zip(times, stds, strict=True)]
        return np.linalg.norm(made - kept(std, n)) / np.linalg.norm(kept(std, n))

    assert missed(16) <= most < missed(8)


def test_the_error_of_the_profile_shrinks_with_snapshots():
    sets = [stored(count, 960) for count in (8, 16, 32)]
    errors = [coefficients(times, stds, 960, 0.25)[1] for times, stds in sets]
    assert errors[0] > 0.1 > errors[1] > 2 * errors[2]


def test_a_skipped_update_leaves_averages_and_their_count():
    tx = optax.sgd(0.1)

    def loss(params, frozen, drawn):
        return jnp.sum(params["w"] * drawn["x"]), {}

    step = jax.jit(make_step(lambda batch, key: batch, loss, tx, 0.9, jax.random.key(0)))
    state = init_state({"w": jnp.ones(2)}, tx, ("power:0.1", "ema:0.5"))
    walk = []
    for x in (1.0, np.nan, 2.0, np.nan, np.nan, 3.0):
        before = state.averages
        state, metrics = step(state, {}, {"x": jnp.full(2, x)})
        if metrics["skipped"]:
            jax.tree.map(np.testing.assert_array_equal, state.averages, before)
        else:
            walk.append(np.asarray(state.params["w"], np.float64))
    assert (int(state.step), int(state.averages.updates)) == (6, 3)
    expected = shares(0.1, 3) @ walk
    np.testing.assert_allclose(state.averages.trees["power:0.1"]["w"], expected, rtol=1e-5)


@functools.cache
def recipe():
    c = read(load_recipe(["--config=digits:1x32x2/4"]))
    averages = {"average_stds": (0.05,), "average_every_steps": 100, "ema_decays": (0.9,)}
    return changed(c, {"train": averages})


def test_averages_are_sharded_as_the_parameters_and_the_same():
    mesh = make_mesh(1, 2, tensor=2, devices=jax.devices()[:4])
    state = abstract_state(recipe(), make_task(recipe(), mesh), mesh)
    assert set(state.averages.trees) == {"power:0.05", "ema:0.9"}
    where = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    assert any(not s.is_fully_replicated for s in jax.tree.leaves(where))
    for tree in state.averages.trees.values():
        assert jax.tree.map(lambda leaf: leaf.sharding, tree) == where
    # The numbers, of one block's products: an average is the same wherever its parts lie.
    part = {"kernel": state.params["params"]["blocks"]["attn"]["qkv"]["kernel"]}
    assert not part["kernel"].sharding.is_fully_replicated
    rng = np.random.default_rng(0)
    start, now = (
        {"kernel": rng.normal(size=part["kernel"].shape).astype(np.float32)} for _ in range(2)
    )
    update = jax.jit(updated_averages)
    averages = Averages(jnp.int32(5), dict.fromkeys(state.averages.trees, start))
    where = jax.tree.map(lambda _: part["kernel"].sharding, averages.trees)
    split = averages._replace(trees=jax.device_put(averages.trees, where))
    jax.tree.map(np.testing.assert_array_equal, update(averages, now), update(split, now))


def test_without_averages_the_state_has_no_leaf_for_them():
    params = {"w": jnp.ones(2)}
    assert init_state(params, optax.sgd(0.1)).averages == ()
    assert updated_averages((), params) == ()
