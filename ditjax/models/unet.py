"""ADM's U-Net, the network that DiT is compared with (Dhariwal & Nichol 2021, App. A and Table 11).

Each level has residual blocks, with attention at some downsampling factors, and a residual block
that halves or doubles the resolution. The way up reads what each layer of the way down returned.
Time and label enter every residual block, as a scale and a shift behind its second norm.

This module defines everything about the network: its keys, the walk through its layers, the Linen
module, its cost in closed form, and the sharding rules of its parameters.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ditjax.config import Rule, key, numbers, positive
from ditjax.errors import UserError
from ditjax.models.attention import attend
from ditjax.models.convolutions import doubled, group_norm
from ditjax.models.embed import (
    ANYWHERE,
    LabelEmbedder,
    Linear,
    Placement,
    timestep_frequencies,
)
from ditjax.models.network import (
    DTYPES,
    Conditions,
    Denoiser,
    Inputs,
    Network,
    NetworkCost,
    Rules,
)

_NORM_EPSILON = 1e-5  # PyTorch's, which ADM keeps

# ---- keys


@dataclass(frozen=True)
class UNetKeys(Denoiser):
    """The keys of `config.model` for a U-Net; the default is ADM's for 256x256 images."""

    width: int = positive(256)  # channels where a multiplier is 1
    multipliers: tuple[float, ...] = key(
        (1.0, 1.0, 2.0, 2.0, 4.0, 4.0),  # one per level; the resolution is halved between them
        Rule(lambda v: 1 <= len(v) <= 12 and min(v) > 0, "1 to 12 numbers above 0"),
    )
    res_blocks: int = positive(2)  # per level, on the way down; one more on the way up
    # Downsampling factors whose levels have attention, such as 8, 16 and 32; () = the middle alone.
    attention_factors: tuple[int, ...] = key(
        (8, 16, 32), read=numbers("model.attention_factors", int)
    )
    head_width: int = positive(64)
    groups: int = positive(32)  # of every GroupNorm

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, starting at the input's resolution."""
        return tuple(int(self.width * multiplier) for multiplier in self.multipliers)

    @property
    def stride(self) -> int:
        return 2 ** (len(self.multipliers) - 1)


class Layer(NamedTuple):
    """One residual block with its attention, at `factor` times less than the input's resolution.

    `factor` is that of its output. `skip` is the number of channels that the way up concatenates
    to its input, 0 elsewhere.
    """

    name: str
    resample: str  # 'down', 'up' or ''
    width_in: int
    width: int
    factor: int
    attention: bool
    skip: int = 0

    @property
    def reads(self) -> int:
        """Channels of its input, with those of the skip connection."""
        return self.width_in + self.skip


def layers(k: UNetKeys) -> tuple[list[Layer], list[Layer], list[Layer]]:
    """The layers of the way down, of the middle and of the way up, in their order."""
    widths, R = k.widths, k.res_blocks
    down, width = [], widths[0]
    skips = [width]
    for level, wide in enumerate(widths):
        factor = 2**level
        for i in range(R):
            attention = factor in k.attention_factors
            down.append(Layer(f"down_{level}_{i}", "", width, wide, factor, attention))
            width = wide
            skips.append(width)
        if level < len(widths) - 1:
            down.append(Layer(f"down_{level}_halve", "down", width, width, 2 * factor, False))
            skips.append(width)
    deepest = 2 ** (len(widths) - 1)
    middle = [
        Layer("middle_0", "", width, width, deepest, True),
        Layer("middle_1", "", width, width, deepest, False),
    ]
    up = []
    for level, wide in reversed(list(enumerate(widths))):
        factor = 2**level
        for i in range(R + 1):
            attention = factor in k.attention_factors
            skip = skips.pop()
            up.append(Layer(f"up_{level}_{i}", "", width, wide, factor, attention, skip))
            width = wide
        if level:
            up.append(Layer(f"up_{level}_double", "up", width, width, factor // 2, False))
    return down, middle, up


def all_layers(k: UNetKeys) -> Iterator[Layer]:
    """All of `layers`, in their order."""
    for part in layers(k):
        yield from part


def check(k: UNetKeys, inputs: Inputs) -> None:
    """Raise UserError if the network cannot process its inputs."""
    H, W, _ = inputs.shape
    if H % k.stride or W % k.stride:
        raise UserError(
            f"config.model.multipliers has {len(k.multipliers)} levels, which halve the {H}x{W}"
            f" input {len(k.multipliers) - 1} times: expected sides divisible by {k.stride}, or"
            " fewer levels."
        )
    for factor in k.attention_factors:
        if factor not in {2**level for level in range(len(k.multipliers))}:
            raise UserError(
                f"config.model.attention_factors has {factor}: expected downsampling factors of the"
                f" levels, {', '.join(str(2**n) for n in range(len(k.multipliers)))}."
            )
    for layer in all_layers(k):
        for width in (layer.reads, layer.width):
            if width % k.groups:
                raise UserError(
                    f"config.model.groups is {k.groups}: it does not divide the {width} channels of"
                    f" {layer.name}; choose groups that divide width {k.width} times each"
                    " multiplier."
                )
        if layer.attention and layer.width % k.head_width:
            raise UserError(
                f"config.model.head_width is {k.head_width}: it does not divide the {layer.width}"
                f" channels of the attention in {layer.name}."
            )


# ---- cost


def _parameters(k: UNetKeys, inputs: Inputs) -> int:
    M, first, C = k.width, k.widths[0], inputs.shape[-1]
    total = 9 * C * first + first
    total += (4 * M * M + 4 * M) + (16 * M * M + 4 * M)
    total += (inputs.num_classes + int(k.label_dropout > 0)) * 4 * M
    for layer in all_layers(k):
        ci, co = layer.reads, layer.width
        total += 2 * ci + (9 * ci * co + co) + (4 * M * 2 * co + 2 * co)
        total += 2 * co + (9 * co * co + co) + (ci * co + co) * (ci != co)
        total += (2 * co + 4 * co * co + 4 * co) * layer.attention
    return total + 2 * first + (9 * first * inputs.out_channels + inputs.out_channels)


def _macs(k: UNetKeys, inputs: Inputs) -> int:
    """Multiply-accumulates of one forward pass of one sample, elements of norms included.

    A residual block from ci to co channels, whose first norm sees a and whose output has b pixels:
    b(9ci·co + 9co² + [ci≠co]ci·co) + 8M·co + a·ci + b·co. Attention over b pixels: 4bc² + 2b²c +
    bc.
    """
    (H, W, C), M, first = inputs.shape, k.width, k.widths[0]
    total = H * W * 9 * C * first + 4 * M * M + 16 * M * M
    for layer in all_layers(k):
        ci, co = layer.reads, layer.width
        b = H * W // layer.factor**2
        a = {"down": 4 * b, "up": b // 4}.get(layer.resample, b)
        total += b * (9 * ci * co + 9 * co * co + ci * co * (ci != co))
        total += 2 * 4 * M * co + a * ci + b * co
        total += (4 * b * co * co + 2 * b * b * co + b * co) * layer.attention
    return total + H * W * (first + 9 * first * inputs.out_channels)


def cost(k: UNetKeys, inputs: Inputs) -> NetworkCost:
    """The cost of a recipe's U-Net."""
    return NetworkCost(
        name=f"U-Net-{k.width}",
        parameters=_parameters(k, inputs),
        macs=_macs(k, inputs),
        description={
            "width": k.width,
            "multipliers": list(k.multipliers),
            "res_blocks": k.res_blocks,
            "attention_factors": list(k.attention_factors),
            "head_width": k.head_width,
        },
    )


# ---- the module


def _uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype: Any) -> jax.Array:
    """PyTorch's initial weights: U(-b, b), b = 1 / √fan_in."""
    return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)


def _conv_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return _uniform(key, shape, math.prod(shape[:-1]), dtype)


def _linear_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return _uniform(key, shape, shape[0], dtype)  # of `Linear`, whose features may be several axes


def _conv(width: int, side: int, dtype: Any, name: str, zero: bool = False) -> nn.Conv:
    init = nn.initializers.zeros if zero else _conv_init
    return nn.Conv(width, (side, side), padding=side // 2, dtype=dtype, kernel_init=init, name=name)


def _halved(x: jax.Array) -> jax.Array:
    B, H, W, C = x.shape
    return x.reshape(B, H // 2, 2, W // 2, 2, C).mean((2, 4))


_RESAMPLE = {"": lambda x: x, "down": _halved, "up": doubled}


class ResBlock(nn.Module):
    """f[B,H,W,C] and emb f[B,E] -> f[B,h,w,width], of half, the same or double the resolution.

    x + conv2(silu(norm2(conv1(silu(norm1(x)))) (1 + scale) + shift)), where scale and shift are
    linear in silu(emb). It is resampled behind the first norm, and so is x.
    """

    width: int
    groups: int
    resample: str = ""
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array) -> jax.Array:
        dtype, resample = self.dtype, _RESAMPLE[self.resample]
        h = resample(nn.silu(group_norm(x, self.groups, _NORM_EPSILON, "norm1")).astype(dtype))
        h = _conv(self.width, 3, dtype, "conv1")(h)
        linear = Linear((2, self.width), _linear_init, dtype, self.place, name="emb")
        scale, shift = jnp.moveaxis(linear(nn.silu(emb)), 1, 0)[:, :, None, None]
        h = group_norm(h, self.groups, _NORM_EPSILON, "norm2") * (1 + scale) + shift
        h = _conv(self.width, 3, dtype, "conv2", zero=True)(nn.silu(h).astype(dtype))
        x = resample(x)
        if x.shape[-1] != self.width:
            x = _conv(self.width, 1, dtype, "shortcut")(x)
        return x + h


class UNetAttention(nn.Module):
    """x + out(attention(norm(x))) over all pixels: f[B,H,W,C] -> same."""

    heads: int
    groups: int
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        h = (
            group_norm(x, self.groups, _NORM_EPSILON, "norm")
            .astype(self.dtype)
            .reshape(B, H * W, C)
        )
        features = (3, self.heads, C // self.heads)
        qkv = Linear(features, _linear_init, self.dtype, self.place, name="qkv")(h)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # each [B,H,N,d]
        y = attend(q, k, v).transpose(0, 2, 1, 3).reshape(B, H * W, C)
        zeros = nn.initializers.zeros
        y = Linear(C, zeros, self.dtype, self.place, name="out")(y)
        return x + y.reshape(x.shape)


class UNet(nn.Module):
    """x f32[B,H,W,C], t i32[B], label i32[B] -> f32[B,H,W,out_channels].

    `out_channels` is C, or 2C with the variance fraction in [C:2C]. With a null label, a label may
    be `num_classes`. `k` are the keys of the recipe.
    """

    k: UNetKeys
    out_channels: int
    num_classes: int
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, conditions: Conditions) -> jax.Array:
        conditions.only("label")
        if conditions.label is None:
            raise ValueError("a U-Net needs a label: use the null label for unconditional outputs")
        k, dtype = self.k, DTYPES[self.k.dtype]
        emb = self._embedding(t, conditions.label)
        down, middle, up = layers(k)
        h = _conv(k.widths[0], 3, dtype, "conv_in")(x.astype(dtype))
        skips = [h]
        for layer in down:
            h = self._layer(layer, h, emb)
            skips.append(h)
        for layer in middle:
            h = self._layer(layer, h, emb)
        for layer in up:
            h = jnp.concatenate([h, skips.pop()], -1) if layer.skip else h
            h = self._layer(layer, h, emb)
        h = nn.silu(group_norm(h, k.groups, _NORM_EPSILON, "norm_out")).astype(dtype)
        out = _conv(self.out_channels, 3, dtype, "conv_out", zero=True)(h)
        return out.astype(jnp.float32)

    def _embedding(self, t: jax.Array, label: Any) -> jax.Array:
        """f[B, 4 width] of time and label."""
        k, wide = self.k, 4 * self.k.width
        dtype, place = DTYPES[k.dtype], self.place
        h = timestep_frequencies(t, k.width)
        h = Linear(wide, _linear_init, dtype, place, name="t_in")(h)
        h = Linear(wide, _linear_init, dtype, place, name="t_out")(nn.silu(h))
        null = k.label_dropout > 0
        return h + LabelEmbedder(self.num_classes, wide, null, dtype, 1.0, name="y_embedder")(label)

    def _layer(self, layer: Layer, h: jax.Array, emb: jax.Array) -> jax.Array:
        k, dtype = self.k, DTYPES[self.k.dtype]
        name, place = layer.name, self.place
        block = ResBlock(layer.width, k.groups, layer.resample, dtype, place, name=name)
        h = block(h, emb)
        if layer.attention:
            heads = layer.width // k.head_width
            h = UNetAttention(heads, k.groups, dtype, place, name=f"{name}_attention")(h)
        return h


# Convolutions are split by their output channels, but for the last, which has only the image's.
_RULES: Rules = (
    (r"conv_out/kernel", (None, None, "fsdp", None)),
    (r"(conv1|conv2|shortcut|conv_in)/kernel", (None, None, None, "fsdp")),
    (r"emb/kernel", ("fsdp", None, None)),
    (r"qkv/kernel", ("fsdp", None, None, None)),
    (r"(out|t_in|t_out)/kernel", (None, "fsdp")),
    (r"y_embedder/table", (None, "fsdp")),
)


def module(k: UNetKeys, inputs: Inputs, place: Placement = ANYWHERE) -> UNet:
    """Build the denoiser of a recipe; its parameters do not depend on `place`."""
    return UNet(k, inputs.out_channels, inputs.num_classes, place)


def width_for(k: UNetKeys, inputs: Inputs, gflops: float) -> int:
    """The width, a multiple of the groups, whose forward Gflops are nearest to a number."""

    def distance(width: int) -> float:
        return abs(_macs(dataclasses.replace(k, width=width), inputs) / 1e9 - gflops)

    best = k.groups
    while distance(best + k.groups) < distance(best):
        best += k.groups
    return best


def _grown(k: UNetKeys, factor: float) -> tuple[UNetKeys, float]:
    """The keys of a U-Net about `factor` times as wide, and its width over that of `k`."""
    width = max(1, round(k.width * factor / k.groups)) * k.groups
    return dataclasses.replace(k, width=width), width / k.width


NETWORK = Network(
    keys=UNetKeys,
    module=module,
    cost=cost,
    check=check,
    rules=_RULES,
    varied=("width",),
    grown=_grown,
)
