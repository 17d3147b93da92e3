"""The transformer over text and codes: NumPy's forward pass, causality, patterns, cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.models.attention import MASKED
from ditjax.models.text import Layers, until_end
from ditjax.models.tokens import (
    CodeTransformer,
    Picking,
    TokensConfig,
    TokensKeys,
    code_bias,
    draw_codes,
    empty_cache,
    filtered_logits,
    layer_patterns,
    tokens_config,
    tokens_cost,
)
from tests.text_encoders import relative

T, GRID, K, V = 5, 3, 7, 11
LAYERS = Layers(4, 12, 2, 48, "gelu_tanh", 1e-5, openai_init=True)
SIZES = {kind: TokensConfig(LAYERS, V, 1, T, K, GRID, kind, 3) for kind in ("full", "sparse")}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    text = rng.integers(2, V, (2, T)).astype(np.int32)
    text[0, 4], text[1, 2:] = 1, 1  # ends; the rest of the second is padding
    return jnp.asarray(text), jnp.asarray(rng.integers(0, K, (2, GRID**2)), jnp.int32)


@functools.cache
def apply(kind):
    return jax.jit(CodeTransformer(SIZES[kind]).apply)


@pytest.fixture(scope="module")
def params(inputs):
    """The same for both patterns, every leaf drawn, so that none hides a mistake."""
    text, codes = inputs
    init = CodeTransformer(SIZES["full"]).init
    tree = jax.eval_shape(init, jax.random.key(0), text, codes[:, :-1])
    rng = np.random.default_rng(1)

    def drawn(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        scale = jax.tree_util.keystr(path).endswith("['scale']")
        return 1 + 0.1 * noise if scale else 0.5 * noise

    return jax.tree_util.tree_map_with_path(drawn, tree)


# ---- a forward pass in NumPy


def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def dense(x, p):
    return np.tensordot(x, p["kernel"], 1) + p["bias"]


def by_hand(tree, c, text, codes):
    """Logits of one sequence, in float64, with the masks written out as sentences."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree["params"])
    ended = np.cumsum(text == 1) - (text == 1) > 0
    words = np.where(ended[:, None], p["padding"], p["words"][text]) + p["positions"]
    at = np.arange(len(codes))
    image = p["codes"][codes] + p["rows"][at // GRID] + p["columns"][at % GRID]
    x = np.concatenate([words, image])
    kinds, which = layer_patterns(c)
    for layer in range(c.layers.depth):
        block = jax.tree.map(lambda leaf, n=layer: leaf[n], p["blocks"])
        q, k, v = np.moveaxis(dense(norm(x, block["norm1"]), block["attn"]["qkv"]), 1, 0)
        seen = np.array(
            [[sees(kinds[which[layer]], i, j) for j in range(len(x))] for i in range(len(x))]
        )
        logits = np.einsum("nhd,mhd->hnm", q, k) / np.sqrt(q.shape[-1])
        weights = np.exp(np.where(seen, logits, -np.inf) - logits.max())
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("hnm,mhd->nhd", weights, v).reshape(len(x), -1)
        x = x + dense(y, block["attn"]["out"])
        h = dense(norm(x, block["norm2"]), block["mlp"]["in"])
        h = h * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + dense(h, block["mlp"]["out"])
    x = norm(x, p["norm_final"])
    return dense(x[: T - 1], p["text_head"]), dense(x[T - 1 :], p["image_head"])


def sees(kind, i, j):
    """Whether place i of the sequence sees place j."""
    if j > i or j < T:
        return j <= i
    back, rows = i - j, (i - T) // GRID - (j - T) // GRID
    return {
        "full": True,
        "row": back <= GRID,
        "column": (i - T) % GRID == (j - T) % GRID,
        "convolution": back in {r * GRID + c for r in (0, 1) for c in (-1, 0, 1)},
    }[kind] and rows >= 0


@pytest.mark.parametrize("kind", ["full", "sparse"])
def test_numpy_computes_the_same(kind, params, inputs):
    text, codes = inputs
    out = apply(kind)(params, text, codes[:, :-1])
    assert out.text.shape == (2, T - 1, V)
    assert out.codes.shape == (2, GRID**2, K)
    for b in range(2):
        of_text, of_codes = by_hand(
            params, SIZES[kind], np.asarray(text[b]), np.asarray(codes[b, :-1])
        )
        assert relative(out.text[b], of_text) < 5e-6
        assert relative(out.codes[b], of_codes) < 5e-6


def test_no_logit_depends_on_what_comes_later(params, inputs):
    """Exactly: every token replaced in turn leaves what is predicted before it to the bit."""
    kind = "full"
    text, codes = (each[:1] for each in inputs)
    changed_text = jnp.tile(text, (T, 1)).at[jnp.arange(T), jnp.arange(T)].add(1)
    n = GRID**2 - 1
    changed = jnp.tile(codes[:, :-1], (n, 1)).at[jnp.arange(n), jnp.arange(n)].add(1) % K
    texts = jnp.concatenate([jnp.tile(text, (n + 1, 1)), changed_text])
    whole = jnp.concatenate([codes[:, :-1], changed, jnp.tile(codes[:, :-1], (T, 1))])
    out = apply(kind)(params, texts, whole)
    found = [np.asarray(each) for each in out]
    for i in range(n):  # code i is seen by the logits of codes i + 1 on
        np.testing.assert_array_equal(found[0][1 + i], found[0][0])
        np.testing.assert_array_equal(found[1][1 + i, : i + 1], found[1][0, : i + 1])
        assert np.any(found[1][1 + i, i + 1] != found[1][0, i + 1])
    for i in range(T):  # text i is seen by the logits of text i + 1 on, and by all codes
        np.testing.assert_array_equal(found[0][1 + n + i, :i], found[0][0, :i])
        assert np.all((found[1][1 + n + i] != found[1][0]).any(-1))


def test_what_a_sparse_layer_sees():
    """Figure 11 of the paper, on its grid of 4 x 4 with 6 text tokens."""
    c = TokensConfig(LAYERS, V, 1, 6, K, 4, "sparse", 3)

    def seen(kind, code):
        row = code_bias(kind, c)[0, 0, 6 + code]
        assert np.all(row[:6] == 0)
        return list(np.flatnonzero(row[6:] > MASKED))

    assert seen("row", 9) == [5, 6, 7, 8, 9]
    assert seen("column", 9) == [1, 5, 9]
    assert seen("convolution", 9) == [4, 5, 6, 8, 9]
    assert seen("full", 3) == [0, 1, 2, 3]


def test_the_patterns_of_layers():
    c = SIZES["sparse"]._replace(layers=LAYERS._replace(depth=8))
    names, which = layer_patterns(c)
    assert [names[i] for i in which] == [
        *("row", "column", "row", "row", "row", "column", "row", "convolution")
    ]


# ---- the cache


def test_cached_and_uncached_logits_are_equal(params, inputs):
    """Every step of the cache beside the whole pass: within 1e-5 of the largest value."""
    kind = "sparse"
    text, codes = inputs
    whole = apply(kind)(params, text, codes[:, :-1]).codes
    step = jax.jit(functools.partial(CodeTransformer(SIZES[kind]).apply, mutable=["cache"]))
    cache = empty_cache(SIZES[kind], 2)
    out, state = step({**params, "cache": cache}, text, jnp.zeros((2, 0), jnp.int32))
    assert np.all(np.asarray(cache["blocks"]["attn"]["position"]) == 0)  # an argument, not a state
    parts = [out.codes]
    for i in range(GRID**2 - 1):
        out, state = step({**params, **state}, None, codes[:, i : i + 1])
        parts.append(out.codes)
    assert relative(jnp.concatenate(parts, axis=1), np.asarray(whole)) < 1e-5


def test_codes_are_drawn_from_the_logits(params, inputs):
    """Of a cold network each code is the likeliest; image b follows from keys[b] alone."""
    text, _ = inputs
    keys = jax.random.split(jax.random.key(3), 2)

    @jax.jit
    def draw(text, keys, temperature):
        of = CodeTransformer(SIZES["sparse"]).apply, SIZES["sparse"], params
        return draw_codes(*of, text, keys, Picking(temperature))

    codes = draw(text, keys, 1e-4)
    assert codes.shape == (2, GRID**2)
    logits = apply("sparse")(params, text, codes[:, :-1]).codes
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), codes)
    warm = draw(text, keys, 1.0)
    np.testing.assert_array_equal(draw(text[::-1], keys[::-1], 1.0)[::-1], warm)
    assert np.any(draw(text, keys[::-1], 1.0) != warm)


def test_what_can_be_drawn():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))

    def left(**how):
        return list(np.flatnonzero(np.asarray(filtered_logits(logits, Picking(**how)))[0] > MASKED))

    assert left() == [0, 1, 2, 3]
    assert left(top_k=2) == [1, 3]
    assert left(top_p=0.65) == [1, 3]
    assert left(top_p=0.75) == [1, 2, 3]
    assert left(top_p=1e-6) == [1]
    np.testing.assert_allclose(filtered_logits(logits, Picking(temperature=2.0)), logits / 2)


def test_a_text_is_live_up_to_its_first_end():
    ids = jnp.array([[5, 1, 1, 1], [5, 6, 7, 1]])
    np.testing.assert_array_equal(until_end(ids, 1), [[1, 1, 0, 0], [1, 1, 1, 1]])


def test_the_cost_counts_every_parameter(params):
    k = TokensKeys(size="4x12x2", vocabulary=V, codes=K, grid=GRID, kernel=3)
    c = tokens_config(k, T)
    assert c == SIZES["full"]
    assert tokens_cost(k, c).parameters == sum(x.size for x in jax.tree.leaves(params))


def test_the_default_is_the_network_of_twelve_billion():
    k = TokensKeys()
    assert tokens_cost(k, tokens_config(k, 256)).parameters == 12_292_833_024
