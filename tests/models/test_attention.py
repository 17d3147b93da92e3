"""Our softmax divides late and has a gradient of its own: the numbers are the textbook's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.models.attention import SelfAttention, attend
from ditjax.models.embed import ANYWHERE, Placement


def textbook(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bhnd,bhmd->bhnm", q, k) * q.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("bhnm,bhmd->bhnd", weights, v)


def operands(scale, dtype=jnp.float32):
    """q [2,3,5,8], k and v [2,3,7,8], and a cotangent; logits of about scale²."""
    rng = np.random.default_rng(0)
    shapes = ((5, scale), (7, scale), (7, 1.0), (5, 1.0))
    return tuple(jnp.asarray(rng.normal(size=(2, 3, n, 8)) * s, dtype) for n, s in shapes)


def output_and_gradients(f, q, k, v, dy):
    out, back = jax.vjp(f, q, k, v)
    return out, *back(dy)


@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
def test_output_and_gradients(scale):
    found = output_and_gradients(attend, *operands(scale))
    expected = output_and_gradients(textbook, *operands(scale))
    # The last bit of a logit moves its weight in proportion to the logit.
    atol = 2e-6 * (1 + scale**2)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=atol * float(np.abs(b).max()))


def test_logits_beyond_the_exponential_s_range():
    """exp(1,000) is infinite: the largest logit is taken out first, and the weights are 0 and 1."""
    q, k, v, dy = operands(60.0)
    logits = np.einsum("bhnd,bhmd->bhnm", q, k) * 8**-0.5
    assert logits.max() > 1000
    out, dq, dk, dv = output_and_gradients(attend, q, k, v, dy)
    expected = np.take_along_axis(np.asarray(v), logits.argmax(-1)[..., None], axis=2)
    np.testing.assert_allclose(out, expected, atol=1e-3)
    assert all(np.isfinite(x).all() for x in (dq, dk, dv))
    # One weight is 1 to the last bit: nothing pulls at the logits, and not by a rounding either.
    assert float(np.median(np.abs(dq))) == 0


def test_bfloat16_stays_and_has_a_float32_softmax():
    values = operands(1.0, jnp.bfloat16)
    exact = output_and_gradients(textbook, *(x.astype(jnp.float32) for x in values))
    for ours, true in zip(output_and_gradients(attend, *values), exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        error = np.asarray(ours, np.float32) - true
        assert float(np.linalg.norm(error) / np.linalg.norm(true)) < 6e-3


@pytest.mark.parametrize(
    "place",
    [
        Placement(heads_first=True),
        Placement(heads_first=True, merge_rows=False, merge_columns=False),
    ],
    ids=["merged", "split"],
)
@pytest.mark.parametrize("shape", [(2, 6, 8), (2, 3, 6, 8)], ids=["tokens", "groups"])
def test_a_product_with_the_heads_first_is_the_same_attention(place, shape):
    """The same parameters, output and gradients, with an adapter on the product of qkv."""
    layers = [SelfAttention(heads=2, place=each) for each in (ANYWHERE, place)]
    rng = np.random.default_rng(0)
    draw = lambda *size: jnp.asarray(rng.normal(size=size), jnp.float32)  # noqa: E731
    x, dy = draw(*shape), draw(*shape)
    shapes = [jax.eval_shape(each.init, jax.random.key(0), x)["params"] for each in layers]
    assert shapes[0] == shapes[1]
    values = {
        "params": jax.tree.map(lambda leaf: draw(*leaf.shape), shapes[0]),
        "lora": {"qkv": {"a": draw(3, 8, 2), "b": draw(3, 2, 2, 4)}},
    }
    expected, found = (
        jax.jit(lambda v, x, each=each: jax.vjp(each.apply, v, x)[1](dy))(values, x)
        for each in layers
    )
    outputs: list[Any] = [each.apply(values, x) for each in layers]
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * float(np.abs(b).max())),
        found,
        expected,
    )
