"""Attention in windows and hops: the power sum, its limit, its reach, its cost, its refusals."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.errors import UserError
from ditjax.models import dit
from ditjax.models.attention import Window, attend, diffused_attend, mixing
from ditjax.models.network import Inputs
from ditjax.parallel.mesh import make_mesh
from ditjax.tasks.diffusion import placement

ALPHA = 0.15
LINE, GRID = Window(1, 64, 1), Window(5, 4, 1)
INPUTS = Inputs(shape=(8, 8, 1), out_channels=2, num_classes=10)


run = jax.jit(diffused_attend, static_argnames=("hops", "alpha", "window"))


def operands(tokens, dtype=jnp.float32):
    """q, k and v [2,2,N,8]; logits of about 1."""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((2, 2, tokens, 8)), dtype) for _ in range(3))


def dense(q, k, window=None):
    """A f64[..,N,N] by the definition: the softmax of the logits that the window leaves."""
    q, k = np.float64(q), np.float64(k)
    logits = np.einsum("bhnd,bhmd->bhnm", q, k) / np.sqrt(q.shape[-1])
    if window:
        rows, columns, r = window
        y, x = np.divmod(np.arange(rows * columns), columns)
        near = (abs(y[:, None] - y) <= r) & (abs(x[:, None] - x) <= r)
        logits = np.where(near, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def tokens_of(window):
    return window.rows * window.columns if window else 20


def recipe(**model):
    return changed(read(load_recipe(["--config=digits:2x32x2/1"])), {"model": model})


@pytest.mark.parametrize("radius", [1, 2])
def test_a_window_is_attention_with_a_mask(radius):
    window = GRID._replace(radius=radius)
    q, k, v = operands(20)
    found = jax.jit(lambda q, k, v: mixing(q, k, window)(v))(q, k, v)
    np.testing.assert_allclose(found, dense(q, k, window) @ np.float64(v), atol=1e-6)


@pytest.mark.parametrize("window", [None, GRID], ids=["full", "window"])
@pytest.mark.parametrize("hops", [1, 3])
def test_the_hops_are_the_sum_of_powers(hops, window):
    """Σ_{i<K} α (1-α)^i A^i V + (1-α)^K A^K V, whose rows sum to 1 at every K."""
    q, k, v = operands(20)
    A = dense(q, k, window)
    powers = [np.linalg.matrix_power(A, i) for i in range(hops + 1)]
    shares = [ALPHA * (1 - ALPHA) ** i for i in range(hops)] + [(1 - ALPHA) ** hops]
    total = sum(share * power for share, power in zip(shares, powers, strict=True))
    np.testing.assert_allclose(total.sum(-1), 1, atol=1e-12)
    found = run(q, k, v, hops=hops, alpha=ALPHA, window=window)
    np.testing.assert_allclose(found, total @ np.float64(v), atol=1e-6)


def limit(q, k, v, window):
    """α (I - (1 - α) A)⁻¹ V."""
    A = dense(q, k, window)
    return ALPHA * np.linalg.solve(np.eye(A.shape[-1]) - (1 - ALPHA) * A, np.float64(v))


def test_the_limit_and_its_bound():
    (q, k, v), window = operands(64), LINE
    last = limit(q, k, v, window)
    most = float(np.abs(v).max())
    error = {
        hops: np.abs(run(q, k, v, hops=hops, alpha=ALPHA, window=window) - last).max()
        for hops in (1, 4, 16, 64, 100)
    }
    for hops in (1, 4, 16, 64):
        assert error[hops] <= 2 * (1 - ALPHA) ** hops * most + 1e-6, hops
    assert error[1] > 1e-2
    assert error[100] < 1e-5


def test_its_ends_are_the_values_and_attention():
    q, k, v = operands(20)
    np.testing.assert_array_equal(diffused_attend(q, k, v, hops=0, alpha=ALPHA), v)
    np.testing.assert_array_equal(diffused_attend(q, k, v, hops=3, alpha=1.0), v)
    one = diffused_attend(q, k, v, hops=1, alpha=0.0)
    np.testing.assert_allclose(one, attend(q, k, v), atol=1e-6)


def test_gradients_are_those_of_the_limit():
    q, k, v = operands(64)
    dy = operands(64)[2][::-1]
    y, x = np.arange(64)[:, None], np.arange(64)
    near = jnp.asarray(abs(y - x) <= 1)

    def solved(q, k, v):
        logits = jnp.einsum("bhnd,bhmd->bhnm", q, k) * q.shape[-1] ** -0.5
        A = jax.nn.softmax(jnp.where(near[None, None], logits, -jnp.inf), axis=-1)
        return ALPHA * jnp.linalg.solve(jnp.eye(64)[None, None] - (1 - ALPHA) * A, v)

    ours = functools.partial(diffused_attend, hops=100, alpha=ALPHA, window=LINE)
    found, expected = (jax.jit(lambda f=f: jax.vjp(f, q, k, v)[1](dy))() for f in (ours, solved))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(("radius", "hops"), [(1, 3), (2, 2)])
def test_a_token_reaches_as_far_as_its_hops(radius, hops):
    """Beyond hops·radius rows and columns the gradient is 0 to the bit, and nowhere within."""
    window = Window(9, 8, radius)
    q, k, v = operands(72)
    middle = 4 * 8 + 3

    def output(q, k, v):
        out = diffused_attend(q, k, v, hops=hops, alpha=ALPHA, window=window)
        return out[:, :, middle].sum()

    y, x = np.divmod(np.arange(72), 8)
    near = np.maximum(abs(y - 4), abs(x - 3)) <= hops * radius
    dv = jax.jit(jax.grad(output, 2))(q, k, v)
    np.testing.assert_array_equal(np.asarray(dv != 0).all((0, 1, 3)), near)
    np.testing.assert_array_equal(np.asarray(dv == 0).all((0, 1, 3)), ~near)


def test_bfloat16_hops_in_float32():
    """Of values in bfloat16, the outputs are those of float32, rounded once."""
    low = operands(20, jnp.bfloat16)
    options: Any = {"hops": 8, "alpha": ALPHA, "window": GRID}
    found = run(*low, **options)
    assert found.dtype == jnp.bfloat16
    exact = run(*(each.astype(jnp.float32) for each in low), **options)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_cost_in_closed_form():
    """4ND² + NwD(1 + K) a block, and N²D(1 + K) without a window; no parameters."""

    def attended(**model):
        s = dit.shape(recipe(**model).model, INPUTS)
        assert dit.trainable_parameters(s) == dit.trainable_parameters(whole)
        return dit.forward_macs(s) - dit.forward_macs(whole)

    whole = dit.shape(recipe().model, INPUTS)
    L, N, D = 2, 64, 32
    assert attended(attention_window=1) == L * N * D * (9 * 2 - 2 * N)
    assert attended(attention_window=2, attention_hops=4) == L * N * D * (25 * 5 - 2 * N)
    assert attended(attention_hops=3) == L * N * D * 2 * N
    dots = dit.cost(recipe(attention_window=1, attention_hops=4, remat="dots").model, INPUTS)
    assert dots.training_macs == L * N * D * 9 * 5


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"attention_window": 1, "attention": "flash"}, "attention_window is 1, and .* 'flash'"),
        ({"attention_hops": 2, "attention": "cudnn"}, "attention_hops is 2, and .* 'cudnn'"),
        ({"attention_window": 1, "block": "in_context"}, "1 with block 'in_context'"),
        ({"attention_window": 4}, "81 places cost as much as attention to all 8x8 tokens"),
        ({"attention_alpha": 0.0}, "attention_alpha is 0.0"),
        ({"attention_hops": 2, "kind": "video", "video": "joint"}, "attention_hops is 2, which a"),
    ],
    ids=str,
)
def test_refusals(model, message):
    with pytest.raises(UserError, match=message):
        recipe(**model)


def test_a_mesh_that_splits_tokens_is_refused():
    c = recipe(attention_window=1)
    mesh = make_mesh(data=4, fsdp=1, context=2, devices=jax.devices())
    with pytest.raises(UserError, match=r"context=2: attention in windows .* context=1"):
        placement(c, mesh)
