"""Text encoders beside transformers' on random weights, and what holds for any weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.models.text import TextEncoder, relative_buckets
from ditjax.weights.text import load_text_encoder
from tests.text_encoders import golden, relative, with_config, write_folder

NAMES = ("bert", "clip_text", "clip_gelu", "t5", "t5_gated")


@pytest.fixture(scope="module")
def found():
    return {name: golden(name) for name in NAMES}


@pytest.fixture(scope="module")
def loaded(found, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return {name: load_text_encoder(write_folder(folder / name, found[name])) for name in NAMES}


@functools.partial(jax.jit, static_argnums=0)
def _apply(config, params, ids, mask):
    return TextEncoder(config).apply({"params": params}, ids, mask)


def encode(encoder, ids, mask):
    ids = jnp.asarray(ids, jnp.int32)
    return _apply(encoder.config, encoder.params, ids, jnp.asarray(mask, bool))


@pytest.mark.parametrize("name", NAMES)
def test_transformers_computes_the_same(found, loaded, name):
    g = found[name]
    ours = encode(loaded[name], g["ids"], g["mask"])
    live = g["mask"].astype(bool)
    assert relative(np.asarray(ours.tokens)[live], g["out/tokens"][live]) < 5e-6
    if "out/pooled" in g:
        assert relative(ours.pooled, g["out/pooled"]) < 5e-6
    else:
        tokens, mask = np.asarray(ours.tokens), g["mask"][..., None]
        np.testing.assert_allclose(ours.pooled, (tokens * mask).sum(1) / mask.sum(1), rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "t5", "clip_gelu"])
def test_what_is_padding_changes_nothing(found, loaded, name):
    g = found[name]
    live = g["mask"].astype(bool)
    before = encode(loaded[name], g["ids"], live)
    garbage = np.where(live, g["ids"], 7)
    after = encode(loaded[name], garbage, live)
    assert np.abs(np.asarray(after.tokens) - before.tokens)[live].max() <= 1e-6
    if name != "clip_gelu":  # which pools at the largest id
        np.testing.assert_allclose(after.pooled, before.pooled, atol=1e-6)
    # A seen token does change the others.
    seen = encode(loaded[name], garbage, np.ones_like(live))
    if name != "clip_gelu":
        assert np.abs(np.asarray(seen.tokens) - before.tokens)[live].max() > 1e-3


def test_clip_is_causal_and_rows_are_independent(found, loaded):
    g = found["clip_text"]
    ids, mask = g["ids"], np.ones_like(g["mask"])
    whole = np.asarray(encode(loaded["clip_text"], ids, mask).tokens)
    later = ids.copy()
    later[:, 6:] = 5
    changed = np.asarray(encode(loaded["clip_text"], later, mask).tokens)
    np.testing.assert_allclose(changed[:, :6], whole[:, :6], atol=1e-6)
    assert np.abs(changed[:, 6:] - whole[:, 6:]).max() > 1e-2
    turned = np.asarray(encode(loaded["clip_text"], ids[::-1], mask).tokens)
    np.testing.assert_allclose(turned[::-1], whole, atol=1e-6)


def test_relative_buckets_are_the_papers():
    """32 buckets: 8 distances of one bucket each on either side, the last for 128 and more."""
    found = relative_buckets(200, 32, 128)
    assert found[50, 50] == 0
    assert [found[50, 50 - d] for d in (1, 7, 8, 16, 32, 64, 90)][:3] == [1, 7, 8]
    assert [found[50, 50 + d] for d in (1, 7, 8, 127, 149)] == [17, 23, 24, 31, 31]
    assert found.max() == 31


def test_names_with_the_prefixes_of_other_versions(found, tmp_path):
    """transformers 4 saves a text tower as text_model.*; a BERT with a head as bert.*."""
    for name, prefix in (("clip_text", "text_model."), ("bert", "bert.")):
        folder = write_folder(tmp_path / name, found[name], lambda n, p=prefix: p + n)
        g, encoder = found[name], load_text_encoder(folder)
        ours = encode(encoder, g["ids"], g["mask"]).tokens
        live = g["mask"].astype(bool)
        assert relative(np.asarray(ours)[live], g["out/tokens"][live]) < 5e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2': expected one of bert, clip"),
        ({"hidden_act": "mish"}, "hidden_act='mish': expected one of gelu"),
        ({"num_attention_heads": 5}, "num_attention_heads=5, which does not divide the width 12"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps='small': expected a value such as 1e-12"),
        ({"position_embedding_type": "relative_key"}, "positions are 'relative_key'"),
    ],
)
def test_a_folder_that_is_none_is_one_line(found, tmp_path, changes, message):
    folder = write_folder(tmp_path / "x", with_config(found["bert"], **changes))
    with pytest.raises(UserError) as error:
        load_text_encoder(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_tensor_is_named(found, tmp_path):
    less = {k: v for k, v in found["bert"].items() if "layer.1.output.dense.bias" not in k}
    with pytest.raises(UserError, match=r"1 missing: encoder.layer.1.output.dense.bias"):
        load_text_encoder(write_folder(tmp_path / "x", less))


def test_weights_that_are_not_finite_are_named(found, tmp_path):
    name = "tensor/embeddings.LayerNorm.bias"
    bad = {**found["bert"], name: np.full_like(found["bert"][name], np.nan)}
    with pytest.raises(UserError, match="with NaN or infinities in norm/bias"):
        load_text_encoder(write_folder(tmp_path / "x", bad))
