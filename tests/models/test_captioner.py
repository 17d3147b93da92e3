"""The captioner: NumPy's forward pass, what sees what, its cache, and the captions it writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.models.captioner import (
    Captioner,
    CaptionerConfig,
    CaptionerKeys,
    captioner_config,
    captioner_cost,
    draw_captions,
)
from ditjax.models.text import Layers
from ditjax.models.tokens import Picking, empty_cache
from tests.models.test_tokens import dense, norm
from tests.seeded import seeded_params
from tests.text_encoders import relative

N, T, V, F, END = 4, 5, 9, 6, 1
SIZES = CaptionerConfig(Layers(2, 12, 2, 48, "gelu_tanh", 1e-5, openai_init=True), V, END, T, N, F)
GREEDY = Picking(top_k=1)
apply = Captioner(SIZES).apply
whole = jax.jit(apply)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(3, N, F)).astype(np.float32)
    return jnp.asarray(states), jnp.asarray(rng.integers(0, V, (3, T)), jnp.int32)


@pytest.fixture(scope="module")
def params(inputs):
    states, ids = inputs
    return seeded_params(Captioner(SIZES).init, states, ids[:, :-1])


def by_hand(tree, states, ids):
    """The logits of one sequence, in float64: states see all states, a token what is before it."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree["params"])
    image = dense(states, p["states"]) + p["places"]
    x = np.concatenate([image, p["words"][ids] + p["positions"][: len(ids)]])
    at = np.arange(len(x))
    seen = (at[None] <= at[:, None]) | ((at[:, None] < N) & (at[None] < N))
    for layer in range(SIZES.layers.depth):
        block = jax.tree.map(lambda leaf, n=layer: leaf[n], p["blocks"])
        q, k, v = np.moveaxis(dense(norm(x, block["norm1"]), block["attn"]["qkv"]), 1, 0)
        logits = np.einsum("nhd,mhd->hnm", q, k) / np.sqrt(q.shape[-1])
        weights = np.exp(np.where(seen, logits, -np.inf) - logits.max())
        weights /= weights.sum(-1, keepdims=True)
        x = x + dense(
            np.einsum("hnm,mhd->nhd", weights, v).reshape(len(x), -1), block["attn"]["out"]
        )
        h = dense(norm(x, block["norm2"]), block["mlp"]["in"])
        h = h * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + dense(h, block["mlp"]["out"])
    return dense(norm(x, p["norm_final"])[N - 1 :], p["head"])


def test_numpy_computes_the_same(params, inputs):
    states, ids = inputs
    out = whole(params, states, ids[:, :-1])
    assert out.shape == (3, T, V)
    for b in range(3):
        expected = by_hand(params, np.asarray(states[b]), np.asarray(ids[b, :-1]))
        assert relative(out[b], expected) < 5e-6


def test_no_token_depends_on_what_comes_later_and_all_on_every_state(params, inputs):
    states, ids = (each[:1] for each in inputs)
    ids = ids[:, :-1]
    changed = jnp.tile(ids, (T - 1, 1)).at[jnp.arange(T - 1), jnp.arange(T - 1)].add(1) % V
    out = np.asarray(whole(params, jnp.tile(states, (T, 1, 1)), jnp.concatenate([ids, changed])))
    for i in range(T - 1):
        np.testing.assert_array_equal(out[1 + i, : i + 1], out[0, : i + 1])
        assert np.abs(out[1 + i, i + 1 :] - out[0, i + 1 :]).min(0).max() > 0
    other = jnp.tile(states, (N, 1, 1)).at[jnp.arange(N), jnp.arange(N)].add(1.0)
    seen = np.asarray(whole(params, other, jnp.tile(ids, (N, 1))))
    assert np.all(np.abs(seen - out[:1]).max(-1) > 1e-4)


def test_with_the_cache_it_computes_the_same(params, inputs):
    states, ids = inputs
    expected = whole(params, states, ids[:, :-1])
    cache, found = empty_cache(SIZES, 3), []
    for n in range(T):
        given = (states, ids[:, :0]) if n == 0 else (None, ids[:, n - 1 : n])
        out, state = apply({**params, "cache": cache}, *given, mutable=["cache"])
        cache = state["cache"]
        found.append(out[:, -1])
    assert relative(np.stack(found, 1), expected) < 1e-5


def test_captions_are_the_likeliest_tokens_up_to_an_end(params, inputs):
    """Of a head that favours the end, a caption is cut there; the rest is padding."""
    states, _ = inputs
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = np.asarray(draw_captions(apply, SIZES, params, states, keys, GREEDY, pad=7))
    for b in range(3):
        ids, expected = np.zeros((1, 0), np.int32), []
        for n in range(T):
            token = int(np.argmax(whole(params, states[b : b + 1], jnp.asarray(ids))[0, -1]))
            token = END if n == T - 1 and END not in expected else token
            expected.append(7 if END in expected else token)
            ids = np.append(ids, [[token]], axis=1).astype(np.int32)
        assert drawn[b].tolist() == expected
    bias = params["params"]["head"]["bias"] + 100.0 * (np.arange(V) == END)
    head = {**params["params"]["head"], "bias": bias}
    ending = {"params": {**params["params"], "head": head}}
    at_once = draw_captions(apply, SIZES, ending, states, keys, GREEDY, pad=7)
    np.testing.assert_array_equal(at_once, [[END, 7, 7, 7, 7]] * 3)


def test_a_caption_follows_from_its_image_and_key_alone(params, inputs):
    states, _ = inputs
    keys = jax.random.split(jax.random.key(1), 3)
    how = Picking(temperature=2.0)
    drawn = draw_captions(apply, SIZES, params, states, keys, how, pad=7)
    turned = draw_captions(apply, SIZES, params, states[::-1], keys[::-1], how, pad=7)
    np.testing.assert_array_equal(turned[::-1], drawn)
    assert np.any(draw_captions(apply, SIZES, params, states, keys[::-1], how, pad=7) != drawn)


def test_the_cost_in_closed_form(inputs):
    k = CaptionerKeys(size="2x12x2", vocabulary=V, end=END)
    c = captioner_config(k, T, N, F)
    assert c == SIZES
    tree = jax.eval_shape(Captioner(c).init, jax.random.key(0), inputs[0], inputs[1][:, :-1])
    cost = captioner_cost(k, c)
    assert cost.parameters == sum(leaf.size for leaf in jax.tree.leaves(tree))
    D, S = 12, N + T - 1
    assert cost.macs == 2 * S * (12 * D**2 + 2 * S * D) + D * (N * F + T * V)
