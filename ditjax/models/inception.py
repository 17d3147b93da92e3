"""The Inception network of FID: Szegedy et al. 2015 (arXiv 1512.00567), frozen on 2015-12-05.

Every published FID, sFID and Inception Score is computed from this network's activations. It is not
the Inception-v3 of model libraries: its weights are different, it has 1,008 logits, and

- the average pools of blocks A, C and the first E leave padding out of the mean
  (count_include_pad=False);
- the last E block pools by maximum;
- BatchNorm's epsilon is 1e-3, its statistics frozen;
- inside the graph images are resized to 299x299 by TensorFlow 1's bilinear rule (`preprocess`).

Parameter paths follow the state dict that pytorch-fid and torch-fidelity read, one to one:

    Mixed_5b/branch1x1/conv/kernel  <->  Mixed_5b.branch1x1.conv.weight
    Mixed_5b/branch1x1/bn/scale     <->  Mixed_5b.branch1x1.bn.weight

- '/' becomes '.'; every '_' stays;
- `kernel` and a norm's `scale` become `weight`; `bias`, `running_mean` and `running_var` stay;
- a convolution kernel [kh, kw, in, out] is transposed to [out, in, kh, kw] and `fc`'s [in, out] to
  [out, in].

A state dict may also hold `*.bn.num_batches_tracked`, which inference does not read.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ditjax.errors import UserError, nearest

INPUT_SIDE = 299
NUM_LOGITS = 1008
# ADM's evaluator keeps 7 channels of the 17x17 map: about as many numbers as pool_3 has.
SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = 17 * 17 * SPATIAL_CHANNELS

_BN_EPSILON = 1e-3

Convention = Literal["tf1", "pytorch-fid"]


class InceptionFeatures(NamedTuple):
    """The activations that the metrics are computed from.

    pool f32[B,2048]            pool_3: FID, precision and recall
    spatial f32[B,2023]         sFID: 17 x 17 x 7, row-major, channels fastest
    logits f32[B,1008]          softmax/logits
    logits_unbiased f32[B,1008] the same without fc's bias: the Inception Score of ADM's evaluator
                                and of torch-fidelity is computed from these
    """

    pool: jax.Array
    spatial: jax.Array
    logits: jax.Array
    logits_unbiased: jax.Array


def preprocess(images: jax.Array, convention: Convention = "tf1") -> jax.Array:
    """Resize and scale images as the graph does: u8[B,H,W,3] -> x f32[B,299,299,3].

    Two conventions are in use, and FIDs made with different ones differ:

    - "tf1" (the graph itself, and so ADM's evaluator; torch-fidelity): output pixel i reads input
      position i * H/299, with pixel corners aligned at the top left; then (x - 128) / 128, so white
      is 127/128.
    - "pytorch-fid": output pixel i reads (i + 1/2) * H/299 - 1/2, pixel centres aligned; values
      are x / 255 and then 2x - 1, so white is 1.

    Both interpolate between two neighbours along each axis at any scale, without antialiasing. At
    299x299 neither resizes, and only the scale differs.
    Raises UserError for another dtype, shape or convention.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape or images.dtype != jnp.uint8:
        raise UserError(
            f"images of type {images.dtype} and shape {tuple(images.shape)}: Inception expects"
            " uint8 [batch, height, width, 3] in 0..255; scale, round and stack them first."
        )
    if convention not in get_args(Convention):
        known = get_args(Convention)
        raise UserError(
            f"convention {convention!r} is unknown: expected one of {', '.join(known)}."
            f"{nearest(str(convention), known)}"
        )
    position = _corner_positions if convention == "tf1" else _centre_positions
    x = images.astype(jnp.float32)
    x = _interpolate(x, position(x.shape[2]), axis=2)
    x = _interpolate(x, position(x.shape[1]), axis=1)
    return (x - 128.0) / 128.0 if convention == "tf1" else 2.0 * (x / 255.0) - 1.0


def _corner_positions(size: int) -> np.ndarray:
    # In float32, as TensorFlow computes them: rounding next to a whole number changes the pixels.
    return np.arange(INPUT_SIDE, dtype=np.float32) * np.float32(size / INPUT_SIDE)


def _centre_positions(size: int) -> np.ndarray:
    centres = (np.arange(INPUT_SIDE, dtype=np.float32) + np.float32(0.5)) * np.float32(
        size / INPUT_SIDE
    )
    return np.maximum(centres - np.float32(0.5), np.float32(0.0))


def _interpolate(x: jax.Array, positions: np.ndarray, axis: int) -> jax.Array:
    """x[p] + (x[p + 1] - x[p]) * fraction along an axis; the last pixel is repeated at the end."""
    last = x.shape[axis] - 1
    low = np.minimum(positions.astype(np.int32), last)
    fraction = positions - low.astype(np.float32)
    fraction = fraction.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    before = jnp.take(x, low, axis=axis)
    after = jnp.take(x, np.minimum(low + 1, last), axis=axis)
    return before + (after - before) * fraction


class FrozenBatchNorm(nn.Module):
    """(x - running_mean) / sqrt(running_var + 1e-3) * scale + bias: f32[...,C] -> same."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        scale = self.param("scale", ones, shape)
        bias = self.param("bias", zeros, shape)
        mean = self.param("running_mean", zeros, shape)
        variance = self.param("running_var", ones, shape)
        # One multiply and add per activation.
        slope = scale * jax.lax.rsqrt(variance + _BN_EPSILON)
        shift = bias - mean * slope
        row = (1,) * (x.ndim - 1) + shape
        return x * slope.reshape(row) + shift.reshape(row)


def _without_padding(
    x: jax.Array, kernel: jax.Array, stride: int, precision: jax.lax.Precision | None
) -> jax.Array:
    """Convolution without padding: f32[B,H,W,C], f32[kh,kw,C,width] -> f32[B,h,w,width].

    XLA's CPU backend runs the 149x149 one four times faster with a row of zeros below the image.
    """
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolve(x, kernel, padding="VALID")

    def row_below(x: jax.Array, kernel: jax.Array) -> jax.Array:
        height = (x.shape[1] - kernel.shape[0]) // stride + 1
        return convolve(x, kernel, padding=((0, 1), (0, 0)))[:, :height]

    return jax.lax.platform_dependent(x, kernel, cpu=row_below, default=plain)


class Conv(nn.Module):
    """Convolution without bias, zero-padded if `same`: f32[B,H,W,C] -> f32[B,h,w,width]."""

    width: int
    kernel: tuple[int, int]
    stride: int = 1
    same: bool = True
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.kernel, x.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        if self.kernel == (1, 1) and self.stride == 1:
            # Twice as fast: XLA's CPU backend does not recognise a matrix product here.
            return jnp.dot(x, kernel[0, 0], precision=self.precision)
        if not self.same:
            return _without_padding(x, kernel, self.stride, self.precision)
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            padding=[(k // 2, k // 2) for k in self.kernel],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=self.precision,
        )


class ConvNormRelu(nn.Module):
    """relu(bn(conv(x))), no bias in the convolution: f32[B,H,W,C] -> f32[B,h,w,width]."""

    width: int
    kernel: tuple[int, int]
    stride: int = 1
    same: bool = True
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = Conv(self.width, self.kernel, self.stride, self.same, self.precision, name="conv")
        return nn.relu(FrozenBatchNorm(name="bn")(conv(x)))


def _threes(x: jax.Array, axis: int, stride: int = 1) -> list[jax.Array]:
    """The first, second and third of every three neighbours along an axis."""
    ends = range(x.shape[axis] - 2, x.shape[axis] + 1)
    return [jax.lax.slice_in_dim(x, i, end, stride, axis) for i, end in enumerate(ends)]


def _max_pool(x: jax.Array) -> jax.Array:
    """3x3 maximum at stride 2: f32[B,H,W,C] -> f32[B,(H-1)//2,(W-1)//2,C]."""
    for axis in (1, 2):
        x = functools.reduce(jnp.maximum, _threes(x, axis, 2))
    return x


def _border(x: jax.Array, value: float) -> jax.Array:
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=value)


def _average_pool(x: jax.Array) -> jax.Array:
    """Mean over the 3x3 neighbours inside the image, at stride 1: f32[B,H,W,C] -> same."""

    def total(x: jax.Array) -> jax.Array:
        x = _border(x, 0.0)
        for axis in (1, 2):
            x = functools.reduce(jnp.add, _threes(x, axis))
        return x

    return total(x) / total(jnp.ones_like(x, shape=(1, *x.shape[1:3], 1)))


def _max_neighbour(x: jax.Array) -> jax.Array:
    """Maximum of the 3x3 neighbours at stride 1: f32[B,H,W,C] -> same."""
    x = _border(x, -jnp.inf)
    for axis in (1, 2):
        x = functools.reduce(jnp.maximum, _threes(x, axis))
    return x


class InceptionA(nn.Module):
    """Szegedy et al. 2015 Fig. 5, 35x35, with a 5x5: f32[B,H,W,C] -> f32[B,H,W,224+pool_width]."""

    pool_width: int
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        unit = functools.partial(ConvNormRelu, precision=self.precision)
        one = unit(64, (1, 1), name="branch1x1")(x)
        five = unit(48, (1, 1), name="branch5x5_1")(x)
        five = unit(64, (5, 5), name="branch5x5_2")(five)
        double = unit(64, (1, 1), name="branch3x3dbl_1")(x)
        double = unit(96, (3, 3), name="branch3x3dbl_2")(double)
        double = unit(96, (3, 3), name="branch3x3dbl_3")(double)
        pool = unit(self.pool_width, (1, 1), name="branch_pool")(_average_pool(x))
        return jnp.concatenate([one, five, double, pool], axis=-1)


class InceptionB(nn.Module):
    """Szegedy et al. 2015 Fig. 10, 35x35 to 17x17: f32[B,H,W,C] -> f32[B,h,w,480+C]."""

    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        unit = functools.partial(ConvNormRelu, precision=self.precision)
        three = unit(384, (3, 3), stride=2, same=False, name="branch3x3")(x)
        double = unit(64, (1, 1), name="branch3x3dbl_1")(x)
        double = unit(96, (3, 3), name="branch3x3dbl_2")(double)
        double = unit(96, (3, 3), stride=2, same=False, name="branch3x3dbl_3")(double)
        return jnp.concatenate([three, double, _max_pool(x)], axis=-1)


class InceptionC(nn.Module):
    """Szegedy et al. 2015 Fig. 6, n = 7, 17x17: f32[B,H,W,C] -> f32[B,H,W,768]."""

    inner_width: int
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        unit = functools.partial(ConvNormRelu, precision=self.precision)
        inner = self.inner_width
        one = unit(192, (1, 1), name="branch1x1")(x)
        seven = unit(inner, (1, 1), name="branch7x7_1")(x)
        seven = unit(inner, (1, 7), name="branch7x7_2")(seven)
        seven = unit(192, (7, 1), name="branch7x7_3")(seven)
        double = unit(inner, (1, 1), name="branch7x7dbl_1")(x)
        double = unit(inner, (7, 1), name="branch7x7dbl_2")(double)
        double = unit(inner, (1, 7), name="branch7x7dbl_3")(double)
        double = unit(inner, (7, 1), name="branch7x7dbl_4")(double)
        double = unit(192, (1, 7), name="branch7x7dbl_5")(double)
        pool = unit(192, (1, 1), name="branch_pool")(_average_pool(x))
        return jnp.concatenate([one, seven, double, pool], axis=-1)


class InceptionD(nn.Module):
    """The reduction from 17x17 to 8x8: f32[B,H,W,C] -> f32[B,h,w,512+C]."""

    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        unit = functools.partial(ConvNormRelu, precision=self.precision)
        three = unit(192, (1, 1), name="branch3x3_1")(x)
        three = unit(320, (3, 3), stride=2, same=False, name="branch3x3_2")(three)
        seven = unit(192, (1, 1), name="branch7x7x3_1")(x)
        seven = unit(192, (1, 7), name="branch7x7x3_2")(seven)
        seven = unit(192, (7, 1), name="branch7x7x3_3")(seven)
        seven = unit(192, (3, 3), stride=2, same=False, name="branch7x7x3_4")(seven)
        return jnp.concatenate([three, seven, _max_pool(x)], axis=-1)


class InceptionE(nn.Module):
    """Szegedy et al. 2015 Fig. 7 at 8x8, with split branches: f32[B,H,W,C] -> f32[B,H,W,2048]."""

    pool: Callable[[jax.Array], jax.Array]
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        unit = functools.partial(ConvNormRelu, precision=self.precision)
        one = unit(320, (1, 1), name="branch1x1")(x)
        three = unit(384, (1, 1), name="branch3x3_1")(x)
        three_a = unit(384, (1, 3), name="branch3x3_2a")(three)
        three_b = unit(384, (3, 1), name="branch3x3_2b")(three)
        double = unit(448, (1, 1), name="branch3x3dbl_1")(x)
        double = unit(384, (3, 3), name="branch3x3dbl_2")(double)
        double_a = unit(384, (1, 3), name="branch3x3dbl_3a")(double)
        double_b = unit(384, (3, 1), name="branch3x3dbl_3b")(double)
        pool = unit(192, (1, 1), name="branch_pool")(self.pool(x))
        return jnp.concatenate([one, three_a, three_b, double_a, double_b, pool], axis=-1)


class BiasApart(nn.Module):
    """A dense layer that returns its bias separately: f32[B,C] -> f32[B,width], f32[1,width]."""

    width: int
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.width))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.width,))
        return jnp.dot(x, kernel, precision=self.precision), bias[None]


class FIDInception(nn.Module):
    """Szegedy et al. 2015 Table 1, frozen: x f32[B,299,299,3] of `preprocess` -> InceptionFeatures.

    The map of sFID is the tensor mixed_6/conv:0 (FID_SPATIAL_NAME of ADM's evaluator): the 1x1
    branch of Mixed_6d after its ReLU. Each unit of that graph consists of the nodes conv2d_params,
    Conv2D, batchnorm, CheckNumerics, control_dependency and finally its bare name, so the bare name
    is the ReLU; and torch-fidelity's weight converter maps mixed_6/conv to Mixed_6d.branch1x1, as
    mixed is Mixed_5b. The branch comes first in the block's output. Ports that use Mixed_6e, or the
    convolution before its norm, compute a different number.

    `precision` is used by every convolution and product. HIGHEST keeps float32 where hardware would
    otherwise use fewer bits, which changes an FID; None uses `jax_default_matmul_precision`.
    Raises UserError for another image shape.
    """

    precision: jax.lax.Precision | None = jax.lax.Precision.HIGHEST

    @nn.compact
    def __call__(self, x: jax.Array) -> InceptionFeatures:
        if x.ndim != 4 or x.shape[1:] != (INPUT_SIDE, INPUT_SIDE, 3):
            raise UserError(
                f"array of shape {tuple(x.shape)}: Inception expects"
                f" [batch, {INPUT_SIDE}, {INPUT_SIDE}, 3]; preprocess the uint8 images first."
            )
        p = self.precision
        unit = functools.partial(ConvNormRelu, precision=p)
        x = unit(32, (3, 3), stride=2, same=False, name="Conv2d_1a_3x3")(x)  # [B,149,149,32]
        x = unit(32, (3, 3), same=False, name="Conv2d_2a_3x3")(x)
        x = unit(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = _max_pool(x)  # [B,73,73,64]
        x = unit(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = unit(192, (3, 3), same=False, name="Conv2d_4a_3x3")(x)
        x = _max_pool(x)  # [B,35,35,192]
        x = InceptionA(32, p, name="Mixed_5b")(x)
        x = InceptionA(64, p, name="Mixed_5c")(x)
        x = InceptionA(64, p, name="Mixed_5d")(x)
        x = InceptionB(p, name="Mixed_6a")(x)  # [B,17,17,768]
        x = InceptionC(128, p, name="Mixed_6b")(x)
        x = InceptionC(160, p, name="Mixed_6c")(x)
        x = InceptionC(160, p, name="Mixed_6d")(x)
        spatial = x[..., :SPATIAL_CHANNELS].reshape(x.shape[0], SPATIAL_FEATURES)
        x = InceptionC(192, p, name="Mixed_6e")(x)
        x = InceptionD(p, name="Mixed_7a")(x)  # [B,8,8,1280]
        x = InceptionE(_average_pool, p, name="Mixed_7b")(x)
        # An average in the paper and in other releases; the frozen graph takes the maximum.
        x = InceptionE(_max_neighbour, p, name="Mixed_7c")(x)
        pool = jnp.mean(x, axis=(1, 2))
        logits_unbiased, bias = BiasApart(NUM_LOGITS, p, name="fc")(pool)
        return InceptionFeatures(pool, spatial, logits_unbiased + bias, logits_unbiased)
