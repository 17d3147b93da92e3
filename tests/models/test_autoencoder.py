"""The KL autoencoder: layout of the published weights, geometry, the posterior's closed forms."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ditjax.errors import UserError
from ditjax.models.autoencoder import (
    AttentionBlock,
    AutoencoderConfig,
    AutoencoderKL,
    Downsample,
    Moments,
    Upsample,
    kl_to_standard_normal,
    sample_posterior,
)

SMALL = AutoencoderConfig(base_width=8, multipliers=(1, 2), res_blocks=1, groups=4)


def shapes(config: AutoencoderConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter, without allocating any."""
    net = AutoencoderKL(config)
    side = config.downsample
    x = jnp.zeros((1, side, side, config.image_channels))
    tree = jax.eval_shape(net.init, jax.random.key(0), x, jax.random.key(1))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}


@pytest.fixture(scope="module")
def small():
    """A network with every scale and bias at work, two images, jitted encode and decode."""
    net, rng = AutoencoderKL(SMALL), np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(-1, 1, (2, 8, 12, 3)), jnp.float32)
    tree = jax.eval_shape(net.init, jax.random.key(0), x, jax.random.key(1))

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            noise /= math.sqrt(math.prod(leaf.shape[:-1]))
        else:
            noise = (path[-1].key == "scale") + 0.1 * noise
        return jnp.asarray(noise, jnp.float32)

    variables = jax.tree_util.tree_map_with_path(draw, tree)
    encode = jax.jit(lambda variables, x: net.apply(variables, x, method="encode"))
    decode = jax.jit(lambda variables, z: net.apply(variables, z, method="decode"))
    return net, variables, x, encode, decode


def test_stable_diffusion_has_its_published_parameter_count():
    assert sum(math.prod(shape) for shape in shapes(AutoencoderConfig()).values()) == 83_653_863


def test_stable_diffusion_paths_and_shapes_are_those_of_the_published_file():
    """Keys and shapes as in sd-vae-ft-mse, by the rule in the module's docstring."""

    def torch_name(path: str) -> str:
        name = ".".join(re.sub(r"_(\d+)$", r".\1", key) for key in path.split("/"))
        return re.sub(r"\.(kernel|scale)$", ".weight", name)

    ours = {torch_name(path): shape for path, shape in shapes(AutoencoderConfig()).items()}
    assert len(ours) == 248
    published = {
        "encoder.conv_in.weight": (3, 3, 3, 128),
        "encoder.down_blocks.0.resnets.1.norm2.bias": (128,),
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (1, 1, 128, 256),
        "encoder.down_blocks.2.downsamplers.0.conv.weight": (3, 3, 512, 512),
        "encoder.down_blocks.3.resnets.1.conv2.weight": (3, 3, 512, 512),
        "encoder.mid_block.attentions.0.group_norm.weight": (512,),
        "encoder.mid_block.attentions.0.to_q.weight": (512, 512),
        "encoder.mid_block.attentions.0.to_out.0.bias": (512,),
        "encoder.conv_norm_out.weight": (512,),
        "encoder.conv_out.weight": (3, 3, 512, 8),
        "quant_conv.weight": (1, 1, 8, 8),
        "post_quant_conv.weight": (1, 1, 4, 4),
        "decoder.conv_in.weight": (3, 3, 4, 512),
        "decoder.mid_block.resnets.1.conv1.weight": (3, 3, 512, 512),
        "decoder.up_blocks.0.resnets.2.conv1.weight": (3, 3, 512, 512),
        "decoder.up_blocks.2.resnets.0.conv_shortcut.weight": (1, 1, 512, 256),
        "decoder.up_blocks.2.upsamplers.0.conv.weight": (3, 3, 256, 256),
        "decoder.up_blocks.3.resnets.0.conv1.weight": (3, 3, 256, 128),
        "decoder.conv_norm_out.bias": (128,),
        "decoder.conv_out.weight": (3, 3, 128, 3),
    }
    assert {key: ours.get(key) for key in published} == published
    absent = (
        "encoder.down_blocks.3.downsamplers.0.conv.weight",
        "decoder.up_blocks.3.upsamplers.0.conv.weight",
        "decoder.up_blocks.1.resnets.0.conv_shortcut.weight",
    )
    assert not set(absent) & set(ours)


@pytest.mark.parametrize(("multipliers", "factor"), [((1,), 1), ((1, 2), 2), ((1, 2, 2), 4)])
def test_latent_and_image_sides_are_in_the_ratio_of_the_levels(multipliers, factor):
    config = dataclasses.replace(SMALL, multipliers=multipliers)
    net = AutoencoderKL(config)
    x = jnp.zeros((3, 16, 8, 3))
    assert config.downsample == factor
    (y, moments), _ = jax.eval_shape(net.init_with_output, jax.random.key(0), x, jax.random.key(1))
    assert moments.mean.shape == moments.log_variance.shape == (3, 16 // factor, 8 // factor, 4)
    assert y.shape == x.shape
    assert {leaf.dtype for leaf in (y, *moments)} == {jnp.dtype("float32")}


def test_downsampling_pads_after_the_last_row_and_column_only():
    """With a kernel of one tap at its top left corner, the output is every second pixel."""
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    taps = {corner: jnp.zeros((3, 3, 1, 1)).at[corner].set(1.0) for corner in ((0, 0), (2, 2))}
    net: Any = Downsample()
    out = {
        corner: net.apply({"params": {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}}, x)
        for corner, kernel in taps.items()
    }
    np.testing.assert_array_equal(out[0, 0][0, :, :, 0], [[0, 2], [8, 10]])
    np.testing.assert_array_equal(out[2, 2][0, :, :, 0], [[10, 0], [0, 0]])


def test_upsampling_repeats_each_pixel_before_the_convolution():
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    net: Any = Upsample()
    out = net.apply({"params": {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}}, x)
    expected = [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    np.testing.assert_array_equal(out[0, :, :, 0], expected)


def test_attention_is_softmax_of_scaled_products_over_all_pixels():
    """Against a float64 NumPy loop over the query pixels."""
    net: Any = AttentionBlock(groups=2)
    C = 4
    x = np.random.default_rng(0).normal(size=(1, 2, 3, C)).astype(np.float32)
    rng = np.random.default_rng(4)
    params = jax.tree.map(
        lambda p: np.asarray(p) + (0.3 * rng.normal(size=p.shape)).astype(np.float32),
        jax.jit(net.init)(jax.random.key(3), x)["params"],
    )
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    grouped = x.astype(np.float64).reshape(6, 2, 2)
    centred = grouped - grouped.mean(axis=(0, 2), keepdims=True)
    h = centred / np.sqrt((centred**2).mean(axis=(0, 2), keepdims=True) + 1e-6)
    h = h.reshape(6, C) * p["group_norm"]["scale"] + p["group_norm"]["bias"]
    q, k, v = (h @ p[name]["kernel"] + p[name]["bias"] for name in ("to_q", "to_k", "to_v"))
    out = np.zeros((6, C))
    for i in range(6):
        weight = np.exp(q[i] @ k.T / 2.0)  # sqrt(C) = 2
        out[i] = weight @ v / weight.sum()
    out = out @ p["to_out_0"]["kernel"] + p["to_out_0"]["bias"] + x.reshape(6, C)
    ours = jax.jit(net.apply)({"params": params}, x).reshape(6, C)
    np.testing.assert_allclose(ours, out, atol=2e-5)


def test_group_norm_survives_a_large_common_offset(small):
    """E[x^2] - E[x]^2 would lose the deviation beside an offset of 1000."""
    _, variables, *_ = small
    params = variables["params"]["decoder"]["mid_block"]["attentions_0"]
    block: Any = jax.jit(AttentionBlock(groups=SMALL.groups).apply)
    x = np.random.default_rng(5).normal(size=(1, 4, 4, 16)).astype(np.float32)
    near = block({"params": params}, x) - x
    far = block({"params": params}, x + 1000) - (x + 1000)
    np.testing.assert_allclose(far, near, atol=2e-3)


def test_every_parameter_receives_a_gradient(small):
    """Except the bias of to_k: a constant added to one query's logits leaves softmax as it is."""
    net, variables, x, _, _ = small

    def loss(variables):
        y, moments = net.apply(variables, x, jax.random.key(1))
        return jnp.mean((y - x) ** 2) + 1e-3 * jnp.mean(kl_to_standard_normal(moments))

    gradient = jax.jit(jax.grad(loss))(variables)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        assert "'to_k']['bias'" in name or float(jnp.abs(leaf).max()) > 0.0, name


def test_call_decodes_a_draw_from_the_encoded_posterior(small):
    net, variables, x, encode, decode = small
    call = jax.jit(net.apply)
    y, moments = call(variables, x, jax.random.key(7))
    encoded = encode(variables, x)
    z = sample_posterior(encoded, jax.random.normal(jax.random.key(7), encoded.mean.shape))
    np.testing.assert_allclose(moments.mean, encoded.mean, atol=1e-5)
    np.testing.assert_allclose(y, decode(variables, z), atol=1e-4)
    other, _ = call(variables, x, jax.random.key(8))
    assert float(jnp.abs(other - y).max()) > 1e-3


def test_images_do_not_see_their_batch(small):
    _, variables, x, encode, _ = small
    both = encode(variables, x).mean
    beside_another = encode(variables, x.at[0].set(1.0)).mean
    np.testing.assert_allclose(both[1], beside_another[1], atol=1e-5)
    assert float(jnp.abs(both[0] - beside_another[0]).max()) > 1e-2


def test_log_variance_is_clipped_at_minus_30_and_20(small):
    _, variables, x, encode, _ = small
    for bias, expected in ((-1000.0, -30.0), (1000.0, 20.0)):
        params = jax.tree.map(lambda leaf: leaf, variables)
        params["params"]["quant_conv"]["bias"] = jnp.full((8,), bias)
        moments = encode(params, x)
        np.testing.assert_array_equal(moments.log_variance, expected)
        assert float(jnp.abs(moments.mean).min()) > 500.0


def test_bfloat16_computes_near_float32_and_returns_float32(small):
    _, variables, x, encode, _ = small
    coarse: Any = AutoencoderKL(SMALL, dtype=jnp.bfloat16)
    assert all(
        leaf.dtype == jnp.float32
        for leaf in jax.tree.leaves(
            jax.eval_shape(coarse.init, jax.random.key(0), x, jax.random.key(1))
        )
    )
    fine = encode(variables, x).mean
    rough = jax.jit(lambda v, x: coarse.apply(v, x, method="encode"))(variables, x).mean
    assert rough.dtype == jnp.float32
    relative = float(jnp.linalg.norm(rough - fine) / jnp.linalg.norm(fine))
    assert 1e-5 < relative < 0.05


def test_kl_is_the_closed_form_in_nats_summed_over_a_latent():
    """KL(N(m, s^2) || N(0, 1)) = -log s + (s^2 + m^2 - 1) / 2; zero for the standard normal."""
    zeros = jnp.zeros((3, 2, 2, 4))
    np.testing.assert_array_equal(kl_to_standard_normal(Moments(zeros, zeros)), np.zeros(3))
    m, s = np.array([0.5, -1.0, 2.0]), np.array([0.3, 1.0, 2.0])
    moments = Moments(
        jnp.asarray(np.broadcast_to(m[:, None, None, None], zeros.shape), jnp.float32),
        jnp.asarray(np.broadcast_to(2 * np.log(s)[:, None, None, None], zeros.shape), jnp.float32),
    )
    expected = 16 * (-np.log(s) + (s**2 + m**2 - 1) / 2)
    np.testing.assert_allclose(kl_to_standard_normal(moments), expected, rtol=1e-5)


def test_posterior_samples_have_the_posterior_mean_and_deviation():
    """100,000 draws of each of 2 latents: 6 standard errors (2 in 10^9 by chance)."""
    n, mean, deviation = 100_000, np.array([-1.0, 3.0]), np.array([0.1, 2.0])
    shape = (n, 1, 1, 2)
    moments = Moments(
        jnp.broadcast_to(jnp.asarray(mean, jnp.float32)[None, None, None, :], shape),
        jnp.broadcast_to(
            jnp.asarray(2 * np.log(deviation), jnp.float32)[None, None, None, :], shape
        ),
    )
    z = sample_posterior(moments, jax.random.normal(jax.random.key(0), shape))[:, 0, 0, :]
    assert (np.abs(z.mean(axis=0) - mean) < 6 * deviation / math.sqrt(n)).all()
    assert (np.abs(z.std(axis=0) - deviation) < 6 * deviation / math.sqrt(2 * n)).all()


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (1, 9, 8, 3), "divisible by 2"),
        ("encode", (1, 8, 0, 3), "divisible by 2"),
        ("encode", (1, 8, 8, 1), "channels last"),
        ("encode", (8, 8, 3), "channels last"),
        ("decode", (1, 4, 4, 3), "channels last"),
    ],
)
def test_wrong_shapes_are_refused(small, method, shape, message):
    net, variables, *_ = small
    with pytest.raises(UserError, match=message):
        net.apply(variables, jnp.zeros(shape), method=method)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, "not divisible by 3 groups"),
        ({"multipliers": ()}, "empty"),
        ({"multipliers": (1, 0)}, "at least 1"),
        ({"res_blocks": 0}, "at least 1"),
        ({"latent_channels": 2.5}, "whole numbers"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **change)


def test_a_config_read_from_a_list_is_hashable_and_equal():
    config = dataclasses.replace(SMALL, multipliers=[1, 2])  # type: ignore[arg-type]
    assert config == SMALL
    assert hash(config) == hash(SMALL)
    assert isinstance(AutoencoderKL(config), nn.Module)
