"""What is read of a DiT is what it computed; what is put into it is what comes out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.models import unet
from ditjax.models.attention import attention_weights
from ditjax.models.dit import NETWORK, DiTKeys
from ditjax.models.embed import Placement
from ditjax.models.network import Conditions, Inputs

INPUTS = Inputs(shape=(8, 8, 2), out_channels=4, num_classes=5)
MODERN = {"norm": "rms", "mlp": "swiglu", "qk_norm": True, "rope": True}
MUP = {"parametrization": "mup", "base_width": 8, "base_head_width": 4}
KINDS: dict[str, dict[str, Any]] = {
    "adaln_zero": {},
    "cross_attention": {"block": "cross_attention"},
    "in_context": {"block": "in_context"},
    "modern": {**MODERN, **MUP},
    "window": {"attention_window": 1, "rope": True, **MUP},
    "hops": {"block": "in_context", "attention_hops": 3, "qk_norm": True, **MUP},
}
SEAM: Any = NETWORK.inspection
L, N, D, HEADS = 2, 16, 16, 2


@functools.cache
def network(kind: str) -> Any:
    """(keys, variables, x, t, conditions); no parameter is zero."""
    k = DiTKeys(size=f"{L}x{D}x{HEADS}", patch=2, **KINDS[kind])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *INPUTS.shape)).astype(np.float32)
    t, conditions = np.array([3, 500]), Conditions(label=jnp.array([1, 4]))
    shapes = jax.eval_shape(NETWORK.module(k, INPUTS).init, jax.random.key(0), x, t, conditions)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes
    )
    return k, variables, x, t, conditions


@functools.cache
def read(kind: str) -> Any:
    k, *args = network(kind)
    return SEAM.read(k, INPUTS)(*args, "tokens", "branches", "attention")


def test_reading_changes_nothing():
    k, *args = network("adaln_zero")
    plain = NETWORK.module(k, INPUTS).apply(*args)
    np.testing.assert_array_equal(read("adaln_zero")[0], plain)


def test_a_product_with_the_heads_first_is_read_alike():
    k, *args = network("adaln_zero")
    _, taps = SEAM.read(k, INPUTS, Placement(heads_first=True))(*args, "attention")
    np.testing.assert_array_equal(taps.attention, read("adaln_zero")[1].attention)


@pytest.mark.parametrize("kind", KINDS)
def test_the_lens_on_the_last_block_is_the_network_to_the_bit(kind):
    k, variables, _, t, conditions = network(kind)
    out, taps = read(kind)
    assert taps.tokens.shape == (L, 2, N, D)
    lens = SEAM.lens(k, INPUTS)
    np.testing.assert_array_equal(lens(variables, taps.tokens[-1], t, conditions), out)
    if kind == "adaln_zero":
        assert np.abs(lens(variables, taps.tokens[0], t, conditions) - out).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_attention_make_the_branch(kind):
    """a v W + b of the maps is what the block's attention yields; rows sum to 1."""
    k, variables, *args = network(kind)
    taps = read(kind)[1]
    M = N + 2 * (k.block == "in_context")
    assert taps.attention.shape == (L, 2, HEADS, M, M)
    np.testing.assert_allclose(taps.attention.sum(-1), 1, atol=1e-6)
    p = variables["params"]["blocks"]["attn"]
    v = _values(k, variables, args)  # [L,B,M,H,d]
    mixed = np.einsum("lbhnm,lbmhd->lbnhd", taps.attention, v).reshape(L, 2, M, D)
    branch = np.einsum("lbnd,lde->lbne", mixed, p["out"]["kernel"])
    branch = branch + np.asarray(p["out"]["bias"])[:, None, None]
    np.testing.assert_allclose(branch[:, :, :N], taps.branches["attention"], rtol=1e-5, atol=1e-5)


def _values(k: DiTKeys, variables: Any, args: Any) -> np.ndarray:
    module: Any = NETWORK.module(k, INPUTS)
    _, state = module.apply(
        variables,
        *args,
        capture_intermediates=lambda each, method: each.name == "qkv",
        mutable=["intermediates"],
    )
    return np.asarray(state["intermediates"]["blocks"]["attn"]["qkv"]["__call__"][0])[:, :, :, 2]


def test_weights_of_attention():
    q, k = (jax.random.normal(jax.random.key(i), (2, 5, 4)) for i in range(2))
    logits = 0.5 * np.einsum("hnd,hmd->hnm", q, k) / 2
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(attention_weights(q, k, 0.5), expected, rtol=1e-5)


def test_a_patched_block_gives_the_donors_result_to_the_bit():
    """Another image with the same time and label: all that a later block knows is in the tokens."""
    k, variables, x, t, _ = network("adaln_zero")
    t, conditions = np.array([500, 500]), Conditions(label=jnp.array([1, 1]))
    out, taps = SEAM.read(k, INPUTS)(variables, x, t, conditions, "tokens")
    donor = taps.tokens[:, ::-1]
    patch = SEAM.patch(k, INPUTS)
    mask = np.zeros((L, 1, N), bool)
    unpatched = patch(variables, x, t, conditions, mask, donor)
    np.testing.assert_array_equal(unpatched, out)
    mask[0] = True
    patched = patch(variables, x, t, conditions, mask, donor)
    np.testing.assert_array_equal(patched, out[::-1])
    mask[0, :, 1:] = False  # a single token
    single = patch(variables, x, t, conditions, mask, donor)
    assert 0 < np.abs(single - out).max() < np.abs(patched - out).max()


def test_tokens_of_conditions_are_not_patched():
    """in_context has them in the sequence: the patched run keeps its own."""
    k, variables, x, t, _ = network("in_context")
    t, conditions = np.array([500, 500]), Conditions(label=jnp.array([1, 2]))
    out, taps = SEAM.read(k, INPUTS)(variables, x, t, conditions, "tokens")
    patch = SEAM.patch(k, INPUTS)
    mask = np.array([[[True]], [[False]]]) & np.ones((1, 1, N), bool)
    own = patch(variables, x, t, conditions, mask, taps.tokens)
    np.testing.assert_array_equal(own, out)
    others = patch(variables, x, t, conditions, mask, taps.tokens[:, ::-1])
    assert np.abs(others - out[::-1]).max() > 1e-3  # the label is its own


def test_branches_are_layers_of_a_block():
    for kind in KINDS:
        k, variables, *_ = network(kind)
        for layer in SEAM.branches(k).values():
            node = variables["params"]["blocks"]
            for part in layer.split("/"):
                node = node[part]
            assert node["bias"].shape == (L, D)
    assert set(SEAM.branches(network("cross_attention")[0])) == {
        "attention",
        "cross-attention",
        "mlp",
    }


def test_a_u_net_has_no_stack_of_blocks():
    assert unet.NETWORK.inspection is None
