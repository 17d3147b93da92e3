"""A DiT of texts: counts, its identity at first, its mask, one device and eight, clear errors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.files.assets import unflatten
from ditjax.models import text_dit
from ditjax.models.blocks import BlockConfig
from ditjax.models.embed import Placement
from ditjax.models.mup import kind_of
from ditjax.models.network import Conditions, Context, Inputs
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.weights.networks import initial_shapes
from tests.seeded import seeded_state

B, M, C = 4, 6, 10
INPUTS = Inputs((8, 8, 3), out_channels=3, num_classes=1, context=Context(M, C))
WITH_ALL = (
    {"size_condition": 64, "qk_norm": True, "size": "2x24x2", "vector_tokens": 3},
    INPUTS._replace(vector=5),
)


def keys(**changes: Any) -> text_dit.TextDiTKeys:
    return text_dit.TextDiTKeys(**{"size": "2x32x2", "patch": 2, **changes})


def example(inputs: Inputs = INPUTS, batch: int = B) -> Any:
    """x, t, and conditions of which row 0 has one live token, and the last row all."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, *inputs.shape)), jnp.float32)
    context = jnp.asarray(rng.standard_normal((batch, *inputs.context)), jnp.float32)
    mask = jnp.arange(M)[None] < jnp.asarray([1, 3, 5, M])[:batch, None]
    vector = jnp.ones((batch, inputs.vector)) if inputs.vector else None
    t = jnp.asarray([0, 17, 500, 999], jnp.int32)[:batch]
    return x, t, Conditions(vector=vector, context=context, context_mask=mask)


def shapes(k: text_dit.TextDiTKeys, inputs: Inputs = INPUTS) -> dict[str, tuple[int, ...]]:
    args = example(inputs, 1)
    return initial_shapes(lambda key: text_dit.module(k, inputs).init(key, *args))


@functools.cache
def network() -> tuple[Any, Any]:
    """The jitted network, and parameters none of which is zero."""
    params = {"params": unflatten(seeded_state(shapes(keys()), 1))}
    return jax.jit(text_dit.module(keys(), INPUTS).apply), params


@pytest.mark.parametrize(("changes", "inputs"), [({}, INPUTS), WITH_ALL])
def test_the_cost_counts_every_parameter(changes, inputs):
    k = keys(**changes)
    found = shapes(k, inputs)
    assert text_dit.cost(k, inputs).parameters == sum(map(np.prod, found.values()))
    for path in found:
        kind_of(path, text_dit.TEXT_KINDS)  # raises unless one kind matches


def test_the_cost_counts_every_product():
    k, wide = keys(size="2x192x2", vector_tokens=9), INPUTS._replace(context=Context(M, 40))
    wide = wide._replace(vector=60)
    args = example(wide)
    module = text_dit.module(k, wide)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))
    found: Any = jax.jit(module.clone(unroll=2).apply).lower(params, *args).cost_analysis()
    expected = text_dit.text_macs(k, wide)
    assert found["flops"] == pytest.approx(2 * B * expected, rel=0.06)


def test_a_block_is_the_identity_at_first():
    x = example()[0].reshape(B, 6, 32)
    cond: Any = text_dit.TextConditioning(jnp.zeros((B, 6, 32)), jnp.ones((B, M, 32)), None)
    block = text_dit.TextBlock(BlockConfig(heads=2, mlp_ratio=2.0))
    params = jax.jit(block.init)(jax.random.key(0), x, cond)
    np.testing.assert_array_equal(block.apply(params, x, cond), x)


def test_what_is_masked_changes_nothing():
    """Garbage in padded rows; and the rows are the samples' own."""
    apply, params = network()
    x, t, given = example()
    found = apply(params, x, t, given)
    garbage = jnp.where(given.context_mask[:, :, None], given.context, 1e3)
    other = apply(params, x, t, given._replace(context=garbage))
    np.testing.assert_allclose(other, found, atol=1e-6)
    order = np.array([2, 0, 3, 1])
    mixed = jax.tree.map(lambda each: each[order], (x, t, given))
    np.testing.assert_allclose(apply(params, *mixed), found[order], atol=2e-6)
    # And what is not masked counts: the live tokens of row 1 alone.
    live = given.context.at[1, 0].add(1.0)
    changed = np.abs(apply(params, x, t, given._replace(context=live)) - found)
    rows = changed.reshape(B, -1).max(1)
    assert rows[1] > 1e-3
    assert rows[[0, 2, 3]].max() == 0


def test_a_vector_is_seen_in_the_time_and_in_tokens():
    """By each way alone; without both it is not. The tokens of no vector are the bias."""
    k, inputs = keys(vector_tokens=2), INPUTS._replace(vector=5)
    x, t, given = example(inputs)
    apply = jax.jit(text_dit.module(k, inputs).apply)
    leaves = unflatten(seeded_state(shapes(k, inputs), 1))

    def seen(*off: str) -> float:
        params = {name: dict(leaves[name]) for name in ("vector", "vector_tokens")}
        for name in off:
            params[name]["kernel"] = np.zeros_like(params[name]["kernel"])
        found = [
            apply({"params": {**leaves, **params}}, x, t, given._replace(vector=each))
            for each in (given.vector, 2 * given.vector)
        ]
        return float(np.abs(found[1] - found[0]).max())

    assert seen("vector") > 1e-3
    assert seen("vector_tokens") > 1e-3
    assert seen("vector", "vector_tokens") == 0


def test_eight_devices_are_one():
    apply, params = network()
    mesh = make_mesh(2, 2, tensor=2)
    x, t, given = example()
    expected = apply(params, x, t, given)
    place = Placement(rules.activation_placement(mesh), merge_columns=False)
    module = text_dit.module(keys(), INPUTS, place)
    split = jax.device_put(params, rules.state_shardings(params, mesh, text_dit.TEXT_RULES))
    rows = jax.tree.map(lambda a: jax.device_put(a, rules.batch_sharding(mesh)), (x, t, given))
    np.testing.assert_allclose(jax.jit(module.apply)(split, *rows), expected, atol=2e-5)
    large = keys(size="2x512x4")
    rules.check_split(
        jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
            unflatten(shapes(large)),
            is_leaf=lambda s: isinstance(s, tuple),
        ),
        mesh,
        text_dit.TEXT_RULES,
    )


def test_what_the_network_lacks_is_one_line():
    for changes, message in (
        ({"block": "in_context"}, "block is 'in_context', which a DiT of texts"),
        ({"mlp": "swiglu"}, "leave it at 'gelu'"),
        ({"size_condition": 64}, "expected a multiple of 3"),
        ({"patch": 3}, "does not divide the 8x8 input"),
        ({"vector_tokens": 4}, "vector_tokens is 4, and this network is given no vector"),
    ):
        with pytest.raises(UserError, match=message):
            text_dit.check(keys(**changes), INPUTS)
    x, t, given = example()
    for wrong, message in (
        (Conditions(label=t), "takes no label"),
        (given._replace(vector=jnp.ones((B, 5))), "takes no vector"),
        (Conditions(), "needs a context"),
    ):
        with pytest.raises(ValueError, match=message):
            text_dit.module(keys(), INPUTS).apply({}, x, t, wrong)


# ---- inspection


@pytest.mark.parametrize(("changes", "inputs"), [({}, INPUTS), WITH_ALL])
def test_what_is_read_is_what_it_computed(changes, inputs):
    """The prediction to the bit, by the lens, too; the maps of words make the branch."""
    k, (x, t, conditions) = keys(**changes), example(inputs)
    seam: Any = text_dit.NETWORK.inspection
    variables = {"params": unflatten(seeded_state(shapes(k, inputs), 1))}
    out = text_dit.module(k, inputs).apply(variables, x, t, conditions)
    seen, taps = seam.read(k, inputs)(
        variables, x, t, conditions, "tokens", "crossed", "branches", "attention"
    )
    np.testing.assert_array_equal(seen, out)
    lens = seam.lens(k, inputs)
    np.testing.assert_array_equal(lens(variables, taps.tokens[-1], t, conditions), out)
    assert np.abs(lens(variables, taps.tokens[0], t, conditions) - out).max() > 1e-3
    V, N, weights = k.vector_tokens, 16, np.asarray(taps.crossed)
    assert weights.shape == (2, B, 2, N, V + M)
    assert np.asarray(taps.attention).shape == (2, B, 2, N, N)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    unseen = ~np.asarray(conditions.context_mask)
    assert not np.moveaxis(weights[..., V:], -1, 2)[:, unseen].any()
    kv, cross = captured(k, inputs, variables, x, t, conditions), variables["params"]["blocks"]
    mixed = np.einsum("lbhnm,lbmhd->lbnhd", weights, kv[:, :, :, 1])
    branch = np.einsum(
        "lbnd,lde->lbne", mixed.reshape(*mixed.shape[:3], -1), cross["cross"]["out"]["kernel"]
    )
    branch = branch + np.asarray(cross["cross"]["out"]["bias"])[:, None, None]
    np.testing.assert_allclose(taps.branches["cross-attention"], branch, rtol=1e-5, atol=1e-5)
    assert set(taps.branches) == set(seam.branches(k))


def captured(k: Any, inputs: Inputs, variables: Any, *args: Any) -> np.ndarray:
    """Keys and values of the texts in each block, [L,B,K,2,H,d]."""
    module: Any = text_dit.module(k, inputs)
    _, state = module.apply(
        variables,
        *args,
        capture_intermediates=lambda each, method: each.name == "kv",
        mutable=["intermediates"],
    )
    return np.asarray(state["intermediates"]["blocks"]["cross"]["kv"]["__call__"][0])


def test_a_patch_of_all_tokens_is_the_donors_prediction():
    """With the same time and text, all that a later block knows is in the tokens."""
    seam: Any = text_dit.NETWORK.inspection
    x, t, conditions = example(batch=2)
    t = jnp.asarray([500, 500])
    conditions = jax.tree.map(lambda each: jnp.stack([each[0], each[0]]), conditions)
    _, params = network()
    out, taps = seam.read(keys(), INPUTS)(params, x, t, conditions, "tokens")
    mask = np.zeros((2, 1, 16), bool)
    mask[0] = True
    patched = seam.patch(keys(), INPUTS)(params, x, t, conditions, mask, taps.tokens[:, ::-1])
    np.testing.assert_array_equal(patched, out[::-1])
    assert np.abs(patched - out).max() > 1e-3
