"""The step against its equations, written out by hand for a one-parameter model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ditjax.training.optim import learning_rate_schedule, make_optimizer
from ditjax.training.step import ema_update, init_state, make_step, microbatches


def adam(rate=0.1, **kwargs):
    kwargs = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 0.0, **kwargs}
    return make_optimizer(optax.constant_schedule(rate), **kwargs)


def draw(batch, key):
    return {**batch, "noise": jax.random.normal(key, batch["x"].shape)}


def loss_fn(params, drawn):
    loss = jnp.square(params["w"] - drawn["x"]).mean()
    return loss, {"noise": drawn["noise"][0]}


def run(tx, steps, decay=0.9):
    step = jax.jit(make_step(draw, loss_fn, tx, decay))
    state = init_state({"w": jnp.array([1.0, -2.0])}, tx)
    history = []
    for i in range(steps):
        batch = {"x": jnp.array([0.5 * i, 1.0])}
        state, metrics = step(state, batch, jax.random.key(7))
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


def test_ema_of_the_average_itself():
    same = ema_update({"a": jnp.ones(3)}, {"a": jnp.ones(3)}, 0.9999)
    np.testing.assert_allclose(same["a"], 1.0, rtol=1e-6)
