"""DiT against its specification: counts, initialisation, layout."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from ditjax.errors import UserError
from ditjax.models.blocks import BLOCKS, BlockConfig, Conditioning, layer_norm
from ditjax.models.dit import (
    PAPER_PATCHES,
    PAPER_SIZES,
    DiT,
    FinalLayer,
    Shape,
    Size,
    forward_macs,
    paper_shape,
    trainable_parameters,
)
from ditjax.models.embed import (
    drop_labels,
    patchify,
    sincos_position_embedding,
    timestep_frequencies,
    unpatchify,
)
from ditjax.models.network import Conditions

SMALL = Size(3, 32, 2)
BLOCK_NAMES = tuple(BLOCKS)


def network(size: Size = SMALL, patch: int = 2, **kwargs: Any) -> DiT:
    kwargs = {"out_channels": 8, "num_classes": 10, **kwargs}
    return DiT(size.depth, size.width, size.heads, patch, **kwargs)


def inputs(batch: int = 2, side: int = 8, channels: int = 4, seed: int = 0) -> Any:
    x = np.random.default_rng(seed).normal(size=(batch, side, side, channels))
    labels = np.arange(batch, dtype=np.int32)
    return x.astype(np.float32), labels * 331 % 1000, Conditions(label=jnp.asarray(labels % 10))


def random_params(model: DiT, args: Any, seed: int = 1) -> Any:
    """Every leaf noise, so that zero initialisation hides nothing. NumPy's: nothing is compiled."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), shapes)


def shape_of(size: Size, patch: int, side: int = 8, **kwargs: Any) -> Shape:
    return Shape(size, patch, side, in_channels=4, out_channels=8, num_classes=10, **kwargs)


@pytest.mark.parametrize("patch", PAPER_PATCHES)
@pytest.mark.parametrize("name", PAPER_SIZES)
def test_parameters_of_the_paper_models(name, patch):
    size = PAPER_SIZES[name]
    model = network(size, patch, num_classes=1000)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs(1, 32))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == trainable_parameters(paper_shape(size, patch))


@pytest.mark.parametrize("null_label", [True, False])
@pytest.mark.parametrize("block", BLOCK_NAMES)
def test_parameters_of_the_other_blocks(block, null_label):
    model = network(block=block, null_label=null_label)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs())
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == trainable_parameters(shape_of(SMALL, 2, block=block, null_label=null_label))


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_xla_counts_the_gflops_of_the_formula(name):
    """Unrolled forward: XLA's flops are 2 MACs each within 2 % (a scanned body is counted once)."""
    size = PAPER_SIZES[name]
    model = network(size, 4, num_classes=1000, unroll=size.depth)
    args = inputs(1, 32)
    params = jax.eval_shape(model.init, jax.random.key(0), *args)
    cost: Any = jax.jit(model.apply).lower(params, *args).cost_analysis()
    assert cost["flops"] == pytest.approx(2 * forward_macs(paper_shape(size, 4)), rel=0.02)


@pytest.mark.parametrize("block", BLOCK_NAMES)
def test_xla_counts_every_block(block):
    size = Size(2, 256, 4)
    model = network(size, 2, block=block, unroll=size.depth)
    args = inputs(1, 32)
    params = jax.eval_shape(model.init, jax.random.key(0), *args)
    cost: Any = jax.jit(model.apply).lower(params, *args).cost_analysis()
    assert cost["flops"] == pytest.approx(
        2 * forward_macs(shape_of(size, 2, 32, block=block)), rel=0.02
    )


@pytest.mark.parametrize("block", BLOCK_NAMES)
def test_output_at_init_is_exactly_zero(block):
    model = network(block=block)
    args = inputs()
    params = jax.jit(model.init)(jax.random.key(0), *args)
    out = jax.jit(model.apply)(params, *args)
    assert out.shape == (2, 8, 8, 8)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0.0)


@pytest.mark.parametrize("block", BLOCK_NAMES)
def test_only_adaln_zero_blocks_are_the_identity_at_init(block):
    x = jax.random.normal(jax.random.key(0), (2, 5, 32))
    cond = Conditioning(x[:, 0], x[:, 1:3])
    module = BLOCKS[block](BlockConfig(heads=2, mlp_ratio=4.0))
    out = jax.jit(module.apply)(jax.jit(module.init)(jax.random.key(1), x, cond), x, cond)
    assert bool((out == x).all()) == (block == "adaln_zero")


@pytest.mark.parametrize("block", BLOCK_NAMES)
def test_every_parameter_and_input_reaches_the_output(block):
    model = network(block=block)
    x, t, y = inputs()
    params = random_params(model, (x, t, y))

    @jax.jit
    def run(params: Any, x: Any, t: Any, y: Any) -> Any:
        def loss(params: Any, x: Any) -> Any:
            out: Any = model.apply(params, x, t, y)
            return jnp.square(out).mean(), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (grads, grad_x), out = run(params, x, t, y)
    for path, grad in flatten_dict(grads, sep="/").items():
        assert np.abs(grad).max() > 0, path
    assert (np.abs(grad_x).max(axis=(1, 2, 3)) > 0).all()
    assert np.abs(out - run(params, x, t + 100, y)[1]).max() > 1e-3
    other = Conditions(label=y.label + 1)
    assert np.abs(out - run(params, x, t, other)[1]).max() > 1e-3


@functools.cache
def value_and_grad(**change: Any) -> Any:
    """Of the small network: (a loss, its gradient)."""
    args = inputs()
    params = random_params(network(), args)
    model: Any = network(**change)
    return jax.jit(jax.value_and_grad(lambda p: jnp.square(model.apply(p, *args)).mean()))(params)


@pytest.mark.parametrize(
    "change", [{"unroll": 2}, {"unroll": 3}, {"remat": "full"}, {"remat": "dots"}]
)
def test_unrolling_and_remat_change_nothing(change):
    expected, expected_grad = value_and_grad()
    value, grad = value_and_grad(**change)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(expected_grad))
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(expected_grad), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)


def test_remat_saves_memory():
    size = Size(8, 64, 2)
    x, t, y = inputs(16, 16)

    def temporaries(remat: str) -> int:
        model: Any = network(size, 1, remat=remat)
        params = jax.eval_shape(model.init, jax.random.key(0), x, t, y)
        grad = jax.grad(lambda p: jnp.square(model.apply(p, x, t, y)).mean())
        analysis: Any = jax.jit(grad).lower(params).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    none, dots, full = (temporaries(remat) for remat in ("none", "dots", "full"))
    assert full < dots < none


def test_initialisation_is_the_specified_one():
    size = Size(2, 384, 6)
    model = network(size, 2, num_classes=1000)
    args = inputs(1, 32)
    params = flatten_dict(jax.jit(model.init)(jax.random.key(0), *args)["params"], sep="/")
    D = size.width

    def bound(fan_in: int, fan_out: int) -> float:
        return (6 / (fan_in + fan_out)) ** 0.5

    uniform = {
        "x_embedder/kernel": bound(16, D),
        "blocks/attn/qkv/kernel": bound(D, 3 * D),
        "blocks/attn/out/kernel": bound(D, D),
        "blocks/mlp/in/kernel": bound(D, 4 * D),
        "blocks/mlp/out/kernel": bound(4 * D, D),
    }
    normal = ("t_embedder/in/kernel", "t_embedder/out/kernel", "y_embedder/table")
    for path, value in params.items():
        if path in uniform:
            assert np.abs(value).max() <= uniform[path], path
            assert np.abs(value).max() > 0.97 * uniform[path], path
            assert np.std(value) == pytest.approx(uniform[path] / 3**0.5, rel=0.03), path
        elif path in normal:
            assert np.std(value) == pytest.approx(0.02, rel=0.03), path
        else:
            np.testing.assert_array_equal(value, 0.0, err_msg=path)
    assert params["blocks/attn/qkv/kernel"].shape == (2, D, 3, 6, D // 6)
    first, second = params["blocks/mlp/in/kernel"]
    assert np.abs(first - second).max() > 0.01, "the blocks share their random numbers"


def test_patchify_layout():
    """Row-major patches, and (row, column, channel) inside one: element by element."""
    B, H, W, C, p = 2, 6, 4, 3, 2
    x = np.arange(B * H * W * C, dtype=np.float32).reshape(B, H, W, C)
    tokens = np.asarray(patchify(jnp.asarray(x), p))
    for n in range((H // p) * (W // p)):
        i, j = divmod(n, W // p)
        patch = x[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
        np.testing.assert_array_equal(tokens[:, n], patch.reshape(B, -1))
    np.testing.assert_array_equal(unpatchify(jnp.asarray(tokens), p, H, W), x)


def test_patchify_and_linear_are_a_strided_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    kernel = jax.random.normal(jax.random.key(1), (2, 2, 3, 5))
    conv = jax.lax.conv_general_dilated(
        x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(
        patchify(x, 2) @ kernel.reshape(-1, 5), conv.reshape(2, 16, 5), atol=1e-5
    )


def test_position_embedding_column_first():
    width, rows, columns = 16, 3, 5
    table = sincos_position_embedding(width, rows, columns)
    for row in range(rows):
        for column in range(columns):
            expected = []
            for position in (column, row):
                angles = [position * 10000.0 ** (-i / 4) for i in range(4)]
                expected += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
            np.testing.assert_allclose(table[row * columns + column], expected, atol=1e-7)


def test_timestep_frequencies_cosine_first():
    t = np.array([0, 1, 17, 999])
    omega = np.exp(-np.log(10000.0) * np.arange(128) / 128)
    angle = t[:, None] * omega[None]
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    np.testing.assert_allclose(timestep_frequencies(jnp.asarray(t)), expected, atol=2e-4)


def test_timestep_frequencies_of_diffusers():
    """One frequency fewer in the exponent's denominator: the last one is then exactly 1e-4."""
    t = np.array([0, 1, 17, 999])
    omega = 10000.0 ** (-np.arange(128) / 127)
    assert omega[-1] == pytest.approx(1e-4)
    angle = t[:, None] * omega[None]
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    ours = timestep_frequencies(jnp.asarray(t), shift=1)
    np.testing.assert_allclose(ours, expected, atol=2e-4)
    assert np.abs(timestep_frequencies(jnp.asarray(t)) - expected).max() > 0.5


def test_the_network_embeds_timesteps_as_asked():
    args = inputs()
    params = random_params(network(), args)
    _, t, _ = args
    embedded = []
    for shift in (0, 1):
        model: Any = network(frequency_shift=shift)
        kept = functools.partial(model.apply, capture_intermediates=True, mutable=["intermediates"])
        run = jax.jit(lambda *args, kept=kept: kept(*args)[1]["intermediates"]["t_embedder"])
        (emb,) = run(params, *args)["__call__"]
        p = params["params"]["t_embedder"]
        h = timestep_frequencies(t, shift=shift) @ p["in"]["kernel"] + p["in"]["bias"][None]
        expected = jax.nn.silu(h) @ p["out"]["kernel"] + p["out"]["bias"][None]
        np.testing.assert_allclose(emb, expected, rtol=1e-4, atol=1e-3)
        embedded.append(emb)
    assert np.abs(embedded[0] - embedded[1]).max() > 0.1


@pytest.mark.parametrize("block", BLOCK_NAMES)
def test_norm2_eps_is_of_the_norm_before_the_mlp_alone(block):
    """With an epsilon far above the variance that norm gives about 0: the MLP sees its shift."""
    args = inputs()
    model = network(block=block, norm2_eps=1e20)
    params = random_params(network(block=block), args)

    def spy(call: Any, inputs: Any, kwargs: Any, context: Any) -> Any:
        if context.module.name in ("attn", "mlp") and context.method_name == "__call__":
            context.module.sow("intermediates", "spread", token_spread(inputs[0]))
        return call(*inputs, **kwargs)

    with nn.intercept_methods(spy):
        run = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
        sown = run(params, *args)[1]["intermediates"]["blocks"]
    (attn,), (mlp,) = sown["attn"]["spread"], sown["mlp"]["spread"]  # f32[depth] each
    assert mlp.max() < 1e-3
    assert attn.min() > 0.01


def token_spread(x: jax.Array) -> jax.Array:
    """How much the tokens differ: a norm that gives 0 leaves them all the same."""
    return jnp.abs(x - x[:, :1]).max()


def test_layer_norm_has_no_fast_variance():
    """A large mean: E[x²] - E[x]² loses all digits in float32, the mean of squares does not."""
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    shifted = x + np.float32(4096)
    x64 = shifted.astype(np.float64)
    expected = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer_norm(jnp.asarray(shifted)), expected, atol=2e-3)


def test_labels_are_dropped_at_the_rate():
    y = jnp.arange(20000) % 10
    dropped = drop_labels(jax.random.key(0), y, 0.1, 10)
    rate = float((dropped == 10).mean())
    assert abs(rate - 0.1) < 4 * (0.1 * 0.9 / 20000) ** 0.5
    np.testing.assert_array_equal(dropped[dropped != 10], y[dropped != 10])
    np.testing.assert_array_equal(drop_labels(jax.random.key(0), y, 0.0, 10), y)


def test_bfloat16_compute_keeps_float32_state_and_output():
    args = inputs()
    model = network(dtype=jnp.bfloat16)
    params = random_params(model, args)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    out = jax.jit(model.apply)(params, *args)
    expected = jax.jit(network().apply)(params, *args)
    assert out.dtype == jnp.float32
    error = float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))
    assert 1e-3 < error < 0.1


def test_a_size_that_patches_do_not_divide_is_refused():
    model = network(patch=3)
    with pytest.raises(UserError, match=r"8x8 .* patches of 3"):
        jax.eval_shape(functools.partial(model.init, jax.random.key(0)), *inputs())


def add(h: jax.Array, residual: jax.Array) -> jax.Array:
    return h + residual


def per_block(block: str, seed: int = 2) -> Any:
    """Something for each of the small network's three blocks, of the shape of its tokens."""
    tokens = 16 + (2 if block == "in_context" else 0)
    drawn = np.random.default_rng(seed).normal(size=(SMALL.depth, 2, tokens, SMALL.width))
    return drawn.astype(np.float32)


@pytest.mark.parametrize("block", BLOCK_NAMES)
def test_residuals_after_blocks(block):
    """Of zeros they change no bit; of any one block they change the output."""
    args = inputs()
    plain, hooked = network(block=block), network(block=block, hook=add)
    params, given = random_params(plain, args), per_block(block)
    with jax.disable_jit():  # one operation after another: fused ones round otherwise
        expected = plain.apply(params, *args)
        np.testing.assert_array_equal(hooked.apply(params, *args, 0 * given), expected)
    run = jax.jit(hooked.apply)
    for chosen in range(SMALL.depth):
        one = given * (np.arange(SMALL.depth) == chosen)[:, None, None, None].astype(np.float32)
        assert np.abs(run(params, *args, one) - expected).max() > 1e-3


@pytest.mark.parametrize("unroll", [1, 3])
@pytest.mark.parametrize("block", BLOCK_NAMES)
def test_a_hook_has_what_is_after_its_block(block, unroll):
    """With tokens patched in after each block, the next one is a function of them alone."""
    args = inputs()
    model = network(block=block, unroll=unroll, hook=lambda h, given: given)
    params = random_params(network(block=block), args)
    given = per_block(block)
    kept = functools.partial(model.apply, capture_intermediates=True, mutable=["intermediates"])
    _, captured = jax.jit(kept)(params, *args, given)
    seen, p = captured["intermediates"], params["params"]
    t_emb, y_emb = (seen[name]["__call__"][0] for name in ("t_embedder", "y_embedder"))
    cond = Conditioning(t_emb + y_emb, jnp.stack([t_emb, y_emb], axis=1))
    one = jax.jit(BLOCKS[block](BlockConfig(SMALL.heads, 4.0)).apply)
    (after,) = seen["blocks"]["__call__"]
    for k in range(1, SMALL.depth):
        weights = jax.tree.map(lambda leaf, k=k: leaf[k], p["blocks"])
        expected = one({"params": weights}, given[k - 1], cond)
        np.testing.assert_allclose(after[k], expected, rtol=1e-4, atol=1e-4)
    final = FinalLayer(2**2 * 8, block)
    expected = jax.jit(final.apply)({"params": p["final_layer"]}, given[-1][:, :16], cond.vector)
    np.testing.assert_allclose(seen["final_layer"]["__call__"][0], expected, rtol=1e-4, atol=1e-4)


def test_a_hook_that_is_not_there_costs_nothing():
    """The program is that of a hook which does nothing, and its scan runs over weights alone."""
    args = inputs()
    params = jax.eval_shape(network().init, jax.random.key(0), *args)
    plain = jax.make_jaxpr(network().apply)(params, *args)
    assert str(jax.make_jaxpr(network().apply)(params, *args, None)) == str(plain)
    nothing = network(hook=lambda h, given: h)
    assert str(jax.make_jaxpr(nothing.apply)(params, *args)) == str(plain)
    (scan,) = (each for each in plain.eqns if each.primitive.name == "scan")
    # The body sees what is scanned over without its leading axis.
    inside = scan.params["jaxpr"].in_avals
    over = [a for a, b in zip(scan.invars, inside, strict=True) if a.aval.ndim == b.ndim + 1]
    assert len(over) == len(jax.tree.leaves(params["params"]["blocks"]))


@pytest.mark.parametrize("door", [door for door in Conditions._fields if door != "label"])
def test_a_condition_without_a_door_is_refused(door):
    """What a network is given it never drops in silence."""
    x, t, labels = inputs()
    given = Conditions(label=labels.label, **{door: jnp.zeros((2, 4))})
    with pytest.raises(ValueError, match=rf"takes no {door}: expected only \('label',\)"):
        jax.eval_shape(network().init, jax.random.key(0), x, t, given)
    with pytest.raises(ValueError, match=f"takes no {door}"):
        jax.eval_shape(network().init, jax.random.key(0), x, t, given._replace(label=None))


def test_a_label_is_always_given():
    x, t, _ = inputs()
    with pytest.raises(ValueError, match="use the null label"):
        jax.eval_shape(network().init, jax.random.key(0), x, t, Conditions())
