"""FID's Inception: its resize in closed form, its quirks one by one, and the golden file."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ditjax.errors import UserError
from ditjax.models.inception import (
    INPUT_SIDE,
    Conv,
    FIDInception,
    InceptionA,
    InceptionC,
    InceptionE,
    _average_pool,
    _max_neighbour,
    _max_pool,
    _without_padding,
    preprocess,
)
from tests.seeded import seeded_images, seeded_state

GOLDENS = Path(__file__).parent.parent / "goldens" / "inception.npz"


def torch_layout(tree: Mapping[str, Any], path: str = "") -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state dict that a tree of our parameters stands for."""
    layout: dict[str, tuple[int, ...]] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            layout |= torch_layout(value, f"{path}{name}.")
            continue
        order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[len(value.shape)]
        leaf = "weight" if name in ("kernel", "scale") else name
        layout[path + leaf] = tuple(value.shape[axis] for axis in order)
    return layout


def from_torch(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The rule of ditjax/models/inception.py, read from PyTorch's names to our variables."""
    params: dict[str, Any] = {}
    for name, value in state.items():
        *modules, leaf = name.split(".")
        if leaf == "weight":
            leaf = "kernel" if value.ndim > 1 else "scale"
        node = params
        for module in modules:
            node = node.setdefault(module, {})
        order = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim]
        node[leaf] = value.transpose(order)
    return {"params": params}


def shapes(module: Any, *inputs: Any) -> dict[str, tuple[int, ...]]:
    return torch_layout(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])


@pytest.fixture(scope="module")
def layout():
    return shapes(FIDInception(), jax.ShapeDtypeStruct((1, INPUT_SIDE, INPUT_SIDE, 3), jnp.float32))


def relative(ours: Any, theirs: np.ndarray) -> float:
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


# --- The resize and the scale


def ramp(H: int, W: int) -> np.ndarray:
    """A picture whose channels are the row, the column and a constant."""
    rows, columns = np.mgrid[:H, :W]
    return np.stack([rows, columns, np.full_like(rows, 255)], axis=-1).astype(np.uint8)[None]


@pytest.mark.parametrize(("H", "W"), [(32, 32), (256, 200), (7, 251)])
def test_resize_reads_the_position_that_its_convention_says(H, W):
    # Interpolation is exact on a ramp: each output pixel is the position that it reads.
    def positions(size: int, offset: float) -> np.ndarray:
        return np.clip((np.arange(INPUT_SIDE) + offset) * size / INPUT_SIDE - offset, 0, size - 1)

    tf1 = np.asarray(preprocess(jnp.asarray(ramp(H, W))))[0] * 128 + 128
    np.testing.assert_allclose(tf1[:, 5, 0], positions(H, 0.0), atol=1e-4)
    np.testing.assert_allclose(tf1[5, :, 1], positions(W, 0.0), atol=1e-4)
    torch = (np.asarray(preprocess(jnp.asarray(ramp(H, W)), "pytorch-fid"))[0] + 1) * 127.5
    np.testing.assert_allclose(torch[:, 5, 0], positions(H, 0.5), atol=1e-4)
    np.testing.assert_allclose(torch[5, :, 1], positions(W, 0.5), atol=1e-4)


def test_twice_the_side_drops_every_other_pixel_or_averages_pairs():
    images = seeded_images((1, 2 * INPUT_SIDE, 2 * INPUT_SIDE, 3), 3)
    tf1 = np.asarray(preprocess(jnp.asarray(images))) * 128 + 128
    np.testing.assert_array_equal(tf1, images[:, ::2, ::2])
    torch = (np.asarray(preprocess(jnp.asarray(images), "pytorch-fid")) + 1) * 127.5
    pairs = images.reshape(1, INPUT_SIDE, 2, INPUT_SIDE, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(torch, pairs, atol=1e-4)


def test_black_and_white():
    images = np.zeros((2, 40, 30, 3), np.uint8)
    images[1] = 255
    tf1 = np.asarray(preprocess(jnp.asarray(images)))
    assert tf1.shape == (2, INPUT_SIDE, INPUT_SIDE, 3)
    assert tf1.dtype == np.float32
    assert set(tf1[0].flat) == {-1.0}
    assert set(tf1[1].flat) == {127 / 128}
    torch = np.asarray(preprocess(jnp.asarray(images), "pytorch-fid"))
    assert set(torch[0].flat) == {-1.0}
    assert set(torch[1].flat) == {1.0}


def test_preprocess_refuses_what_is_not_uint8_images():
    with pytest.raises(UserError, match=r"float32.*uint8"):
        preprocess(jnp.zeros((1, 8, 8, 3)))
    for shape in [(8, 8, 3), (1, 3, 8, 8), (1, 0, 8, 3)]:
        with pytest.raises(UserError, match=r"\[batch, height, width, 3\]"):
            preprocess(jnp.zeros(shape, jnp.uint8))
    with pytest.raises(UserError, match=r"'pytorch_fid'.*Did you mean 'pytorch-fid'"):
        preprocess(jnp.zeros((1, 8, 8, 3), jnp.uint8), "pytorch_fid")  # type: ignore[arg-type]


# --- The layers: written for the CPU backend's sake, the same as flax's


@pytest.mark.parametrize(
    ("kernel", "stride", "same"),
    [
        ((1, 1), 1, True),
        ((1, 1), 2, True),
        ((3, 3), 1, True),
        ((1, 7), 1, True),
        ((7, 1), 1, True),
        ((3, 3), 1, False),
        ((3, 3), 2, False),
    ],
)
@pytest.mark.parametrize(("H", "W"), [(11, 8), (8, 9)])
def test_convolutions_are_flaxs(kernel, stride, same, H, W):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, H, W, 5)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((*kernel, 5, 6)), jnp.float32)
    variables = {"params": {"kernel": weights}}
    flaxs = nn.Conv(
        6, kernel, stride, "SAME" if same else "VALID", use_bias=False, precision="highest"
    )
    ours = Conv(6, kernel, stride, same, jax.lax.Precision.HIGHEST)
    theirs = np.asarray(flaxs.apply(variables, x))
    np.testing.assert_allclose(np.asarray(ours.apply(variables, x)), theirs, rtol=0, atol=2e-5)


def test_only_the_cpu_gets_padding_that_it_drops_again():
    x = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 4, 4), jnp.float32)
    traced = jax.jit(functools.partial(_without_padding, stride=2, precision=None)).trace(x, kernel)
    for platform, pad in [("cpu", "[[0, 1], [0, 0]]"), ("cuda", "[[0, 0], [0, 0]]")]:
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert re.findall(r"pad = (\[\[.*?\]\])", program) == [pad]


@pytest.mark.parametrize(
    ("ours", "flaxs"),
    [
        (_max_pool, functools.partial(nn.max_pool, strides=(2, 2))),
        (_max_neighbour, functools.partial(nn.max_pool, padding="SAME")),
        (_average_pool, functools.partial(nn.avg_pool, padding="SAME", count_include_pad=False)),
    ],
)
@pytest.mark.parametrize(("H", "W"), [(7, 8), (8, 5)])
def test_pools_are_flaxs(ours, flaxs, H, W):
    # Below zero throughout, where a border of zeros would be the maximum.
    x = -jnp.asarray(np.random.default_rng(0).uniform(1, 2, (2, H, W, 3)), jnp.float32)
    np.testing.assert_allclose(ours(x), flaxs(x, window_shape=(3, 3)), rtol=1e-6)


# --- The network


def test_layout_is_the_published_one(layout):
    # 94 units of five tensors, and the logits.
    assert len(layout) == 94 * 5 + 2
    units = {name.rpartition(".conv.")[0] for name in layout if ".conv." in name}
    assert len(units) == 94
    for unit in units:
        ours = {name.removeprefix(f"{unit}.") for name in layout if name.startswith(f"{unit}.")}
        norm = {f"bn.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")}
        assert ours == {"conv.weight", *norm}
    # From the release's own network.
    assert layout["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert layout["Mixed_6c.branch7x7dbl_3.conv.weight"] == (160, 160, 1, 7)
    assert layout["Mixed_7c.branch3x3_2b.conv.weight"] == (384, 384, 3, 1)
    assert layout["Mixed_7c.branch_pool.bn.running_var"] == (192,)
    assert layout["fc.weight"] == (1008, 2048)
    assert layout["fc.bias"] == (1008,)


@pytest.mark.parametrize(
    ("block", "pool_width"),
    [(InceptionA(32), 32), (InceptionC(8), 192), (InceptionE(_average_pool), 192)],
)
def test_average_pools_leave_padding_out(block, pool_width):
    # A constant picture has constant averages, at its border too, unless zeros are counted.
    x = jnp.full((1, 5, 6, 4), 1.5)
    state = seeded_state(shapes(block, x), 0, 2.0)
    pooled = np.asarray(block.apply(from_torch(state), x))[0, ..., -pool_width:]
    assert np.max(pooled) > 0.1
    np.testing.assert_allclose(pooled, np.broadcast_to(pooled[2, 2], pooled.shape), atol=1e-6)


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as file:
        return dict(file)


@pytest.fixture(scope="module")
def outputs(layout, goldens):
    """Our outputs for the golden file's images, one image a device: (label, Features of one)."""
    labels = sorted({key.rpartition("_")[0] for key in goldens if key != "versions"})
    prepared = []
    for label in labels:
        convention, _, size = label.partition("_")
        H, W = map(int, size.split("x"))
        images = jnp.asarray(seeded_images((1, H, W, 3), H))
        prepared.append(preprocess(images, convention))
    variables = from_torch(seeded_state(layout, 0, 2**0.5))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    by_image = jax.NamedSharding(mesh, jax.P("data"))
    x = jax.device_put(jnp.concatenate(prepared), by_image)
    variables = jax.device_put(variables, jax.NamedSharding(mesh, jax.P()))
    features = jax.jit(FIDInception().apply, out_shardings=by_image)(variables, x)
    return {
        label: jax.tree.map(lambda a, i=i: np.asarray(a)[i], features)
        for i, label in enumerate(labels)
    }, np.asarray(variables["params"]["fc"]["bias"])


# The oracles' own thinning: tests/oracles/inception.py.
STRIDES = {"pool": 4, "spatial": 5, "logits": 1}


def test_features_are_those_of_torch_fidelity_and_pytorch_fid(goldens, outputs):
    features, _ = outputs
    compared = 0
    for key, theirs in goldens.items():
        if key == "versions":
            continue
        label, _, name = key.rpartition("_")
        ours = getattr(features[label], name)[:: STRIDES[name]]
        assert ours.shape == theirs.shape
        assert relative(ours, theirs) <= 1e-4, key
        # Live activations, or the comparison would be of zeros.
        assert np.mean(theirs != 0) > 0.2
        assert 0.1 < np.max(np.abs(theirs)) < 1e4
        compared += 1
    assert compared == 5 * 3 + 3 * 2


def test_the_two_conventions_differ_by_more_than_rounding(outputs):
    features, _ = outputs
    tf1, torch = features["tf1_256x256"], features["pytorch-fid_256x256"]
    assert relative(tf1.pool, torch.pool) > 1e-3
    assert relative(tf1.spatial, torch.spatial) > 1e-2


def test_unbiased_logits_lack_the_bias(outputs):
    features, bias = outputs
    assert np.std(bias) > 0.05
    for each in features.values():
        np.testing.assert_allclose(each.logits - each.logits_unbiased, bias, atol=1e-5)


def test_network_refuses_another_shape():
    for shape in [(1, 256, 256, 3), (INPUT_SIDE, INPUT_SIDE, 3), (1, INPUT_SIDE, INPUT_SIDE, 1)]:
        with pytest.raises(UserError, match="preprocess"):
            FIDInception().init(jax.random.key(0), jnp.zeros(shape))


def test_products_are_full_float32_unless_said_otherwise():
    x = jax.ShapeDtypeStruct((1, INPUT_SIDE, INPUT_SIDE, 3), jnp.float32)

    def precisions(module: FIDInception) -> set[str]:
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        program = jax.jit(module.apply).lower(variables, x).as_text()
        products = re.findall(r"stablehlo\.(?:convolution|dot_general)\b.*", program)
        assert len(products) == 95
        return {name for line in products for name in re.findall(r"HIGHEST|HIGH|DEFAULT", line)}

    assert precisions(FIDInception()) == {"HIGHEST"}
    assert precisions(FIDInception(precision=None)) == {"DEFAULT"}
