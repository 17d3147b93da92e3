"""The step against its equations, written out by hand for a one-parameter model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ditjax.training import optim
from ditjax.training.optim import learning_rate_schedule, make_optimizer, spike_limit
from ditjax.training.step import ema_update, init_state, make_step, microbatches


def adam(rate=0.1, **kwargs):
    kwargs = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 0.0, **kwargs}
    return make_optimizer(optax.constant_schedule(rate), **kwargs)


def draw(batch, key):
    return {**batch, "noise": jax.random.normal(key, batch["x"].shape)}


def loss_fn(params, frozen, drawn):
    loss = jnp.square(params["w"] - drawn["x"]).mean()
    return loss, {"noise": drawn["noise"][0]}


def run(tx, steps, decay=0.9):
    step = jax.jit(make_step(draw, loss_fn, tx, decay, jax.random.key(7)))
    state = init_state({"w": jnp.array([1.0, -2.0])}, tx)
    history = []
    for i in range(steps):
        batch = {"x": jnp.array([0.5 * i, 1.0])}
        state, metrics = step(state, {}, batch)
        history.append(metrics)
    return state, history


def test_adam_and_average_by_hand():
    w, ema = np.array([1.0, -2.0]), np.array([1.0, -2.0])
    m, v = np.zeros(2), np.zeros(2)
    losses, norms = [], []
    for i in range(5):
        x = np.array([0.5 * i, 1.0])
        losses.append(np.mean((w - x) ** 2))
        g = (w - x) * 2 / 2
        norms.append(np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        m_hat, v_hat = m / (1 - 0.9 ** (i + 1)), v / (1 - 0.999 ** (i + 1))
        w = w - 0.1 * m_hat / (np.sqrt(v_hat) + 1e-8)
        ema = 0.9 * ema + 0.1 * w  # the updated weights: not off by one step
    state, history = run(adam(), 5)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
    np.testing.assert_allclose(state.ema["w"], ema, rtol=1e-5)
    np.testing.assert_allclose([h["loss"] for h in history], losses, rtol=1e-5)
    np.testing.assert_allclose([h["grad_norm"] for h in history], norms, rtol=1e-5)
    assert int(state.step) == 5


def test_the_key_is_folded_with_the_step():
    _, history = run(adam(), 3)
    draws = [float(h["noise"]) for h in history]
    expected = [
        float(jax.random.normal(jax.random.fold_in(jax.random.key(7), i), (2,))[0])
        for i in range(3)
    ]
    np.testing.assert_allclose(draws, expected, rtol=1e-6)


def test_parts_share_out_each_run_of_rows():
    """Whatever the devices, a run of B/devices rows has as many in each part."""
    parts = microbatches({"x": jnp.arange(12)}, 3)["x"]
    assert parts.shape == (3, 4)
    for devices in (2, 4):
        for held in np.split(np.arange(12), devices):
            assert all(np.isin(held, part).sum() == len(held) / 3 for part in np.asarray(parts))


def test_weight_decay_is_decoupled_and_off_by_default():
    params = {"w": jnp.array([2.0])}
    gradient = {"w": jnp.array([0.0])}
    for decay in (0.0, 0.5):
        tx = adam(weight_decay=decay)
        updates, _ = tx.update(gradient, tx.init(params), params)
        np.testing.assert_allclose(updates["w"], [-0.1 * decay * 2.0], atol=1e-9)


def test_clipping_to_a_global_norm():
    tx = adam(clip_norm=1.0)
    params = {"w": jnp.array([3.0, 4.0])}
    _, state = tx.update({"w": jnp.array([30.0, 40.0])}, tx.init(params), params)
    first = optax.tree.get(state, "mu")["w"]
    np.testing.assert_allclose(first, [0.06, 0.08], rtol=1e-5)


def test_schedules():
    warm = learning_rate_schedule(1.0, "constant", 10, 100)
    np.testing.assert_allclose([warm(0), warm(5), warm(10), warm(99)], [0, 0.5, 1, 1], atol=1e-6)
    cosine = learning_rate_schedule(2.0, "cosine", 10, 110)
    np.testing.assert_allclose([cosine(10), cosine(60), cosine(110)], [2, 1, 0], atol=1e-6)
    assert learning_rate_schedule(1e-4, "constant", 0, 100)(0) == pytest.approx(1e-4)


def test_a_restarted_schedule_is_the_first_one_and_then_a_whole_second_one():
    first = learning_rate_schedule(2.0, "cosine", 5, 25)
    second = learning_rate_schedule(2.0, "cosine", 5, 45)
    both = learning_rate_schedule(2.0, "cosine", 5, 70, restarts=(25,))
    assert [float(both(k)) for k in range(25)] == [float(first(k)) for k in range(25)]
    assert [float(both(25 + k)) for k in range(46)] == [float(second(k)) for k in range(46)]
    thrice = learning_rate_schedule(2.0, "cosine", 5, 95, restarts=(25, 70))
    assert [float(thrice(k)) for k in range(70)] == [float(both(k)) for k in range(70)]
    assert [float(thrice(70 + k)) for k in range(25)] == [float(first(k)) for k in range(25)]


def test_ema_of_the_average_itself():
    same = ema_update({"a": jnp.ones(3)}, {"a": jnp.ones(3)}, 0.9999)
    np.testing.assert_allclose(same["a"], 1.0, rtol=1e-6)


# Of a batch {"x", "root"}: the loss is mean (w - x)² + sqrt(root + w_0 - w_0'), w_0' a constant.
KINDS = {
    "good": (1.0, 1.0),
    "loss nan": (np.nan, 1.0),
    "loss inf": (np.inf, 1.0),
    "gradient inf": (1.0, 0.0),  # 1 / 2 sqrt(0), of a loss that is finite
}


def rooted(params, frozen, drawn):
    w = params["w"]
    root = drawn["root"] + w[0] - jax.lax.stop_gradient(w[0])
    loss = jnp.square(w - drawn["x"]).mean() + jnp.sqrt(root)
    return loss, {"noise": drawn["noise"][0]}


def unguarded(tx, decay):
    """The update as its equations have it, of a batch that is good."""

    def step(state, batch, key):
        drawn = draw(batch, jax.random.fold_in(key, state.step))
        grads = jax.grad(lambda params: rooted(params, {}, drawn)[0])(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return params, ema_update(state.ema, params, decay), opt_state

    return step


@functools.cache
def guarded_and_not():
    tx = adam(clip_norm=5.0, weight_decay=0.1)
    guarded = jax.jit(make_step(draw, rooted, tx, 0.9, jax.random.key(7)))
    return tx, guarded, jax.jit(unguarded(tx, 0.9))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=12))
@example(list(KINDS))
def test_a_bad_step_changes_the_step_alone(kinds):
    """theta_k+1 = theta_k, to the bit, where loss or gradient is not finite; else the update."""
    tx, guarded, plain = guarded_and_not()
    state, key = init_state({"w": jnp.array([1.0, -2.0])}, tx), jax.random.key(7)
    for k, kind in enumerate(kinds):
        x, root = KINDS[kind]
        batch = {"x": jnp.array([0.5 * k, x]), "root": jnp.float32(root)}
        expected = plain(state, batch, key) if kind == "good" else state[1:]
        state, metrics = guarded(state, {}, batch)
        assert bool(metrics["skipped"]) == (kind != "good"), metrics
        assert int(state.step) == k + 1
        # Noise goes on with the step, not with the update.
        noise = jax.random.normal(jax.random.fold_in(key, k), (2,))[0]
        np.testing.assert_allclose(metrics["noise"], noise, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(state[1:]), jax.tree.leaves(expected), strict=True):
            if kind == "good":
                np.testing.assert_allclose(a, b, rtol=1e-5)
            else:
                np.testing.assert_array_equal(a, b)
    counts = [int(count) for _, count in optax.tree.get_all_with_path(state.opt_state, "count")]
    assert counts == [kinds.count("good")] * 2, "Adam and the schedule count updates"


def test_the_running_norm_is_a_mean_of_the_norms_before(monkeypatch):
    """m_n / (1 - β^n) by hand: weights β^(n-i) (1 - β) / (1 - β^n), which sum to 1."""
    monkeypatch.setattr(optim, "FIRST_NORMS", 3)
    tx = adam(spike_factor=2.0, clip_norm=1.0)
    params = {"w": jnp.array([0.0, 0.0])}
    state = tx.init(params)
    norms = [5.0, 10.0, 2.5, 7.5]
    for n, norm in enumerate(norms):
        limit = float(spike_limit(state, 2.0))
        if n < 3:
            assert limit == np.inf
        else:
            weights = 0.99 ** np.arange(n - 1, -1, -1)
            expected = 2.0 * np.average(norms[:n], weights=weights)
            assert limit == pytest.approx(expected, rel=1e-5)
        # Before clipping: (3, 4) / 5 has norm 1.
        _, state = tx.update({"w": jnp.array([3.0, 4.0]) * norm / 5}, state, params)


def test_a_spike_is_skipped_and_not_averaged(monkeypatch):
    monkeypatch.setattr(optim, "FIRST_NORMS", 5)
    tx = adam(rate=1e-3, spike_factor=4.0)
    limit = functools.partial(spike_limit, factor=4.0)
    step = jax.jit(make_step(draw, loss_fn, tx, 0.9, jax.random.key(7), limit=limit))
    state = init_state({"w": jnp.array([1.0, -2.0])}, tx)

    def take(state, x):
        return step(state, {}, {"x": jnp.array([x, x])})

    # The gradient's norm goes by x. The third comes before there is a mean to speak of.
    skipped = []
    for x in (10.0, 10.0, 1000.0, 10.0, 10.0, 700.0, 1300.0, 1300.0, 10.0):
        before = jax.device_get(state)
        state, metrics = take(state, x)
        skipped.append(bool(metrics["skipped"]))
        if skipped[-1]:
            for a, b in zip(jax.tree.leaves(before[1:]), jax.tree.leaves(state[1:]), strict=True):
                np.testing.assert_array_equal(a, b)
    # Of x: the limit is 4 · 208 = 832, then 4 · 290 = 1160; with 1300 averaged it would be 1737.
    assert skipped == [False] * 6 + [True, True, False]


def test_without_a_spike_factor_the_state_has_nothing_more():
    params = {"w": jnp.array([1.0])}
    state = init_state(params, adam())
    assert not [
        leaf
        for leaf in jax.tree.leaves(state.opt_state)
        if leaf.shape == () and leaf.dtype == jnp.float32
    ]
    more = init_state(params, adam(spike_factor=2.0)).opt_state
    assert len(jax.tree.leaves(more)) == len(jax.tree.leaves(state.opt_state)) + 2
