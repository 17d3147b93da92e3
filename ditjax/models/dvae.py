"""The discrete VAE of DALL·E: images as a grid of codes (Ramesh et al. 2021, Sec. 2.1, App. A).

The architecture is that of openai/DALL-E at any width, channels last. Parameters: `encoder/` and
`decoder/`, each with `input`, `group_G/block_B/{id_path, conv_1 .. conv_4}` and `output`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ditjax.config import Model, at_least, at_most, key, positive
from ditjax.models.convolutions import doubled
from ditjax.models.network import DTYPES, Network

PIXEL_EPSILON = 0.1  # App. A.3: pixels are mapped to [ε, 1 - ε], where the logit is bounded
_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


@dataclass(frozen=True)
class DvaeKeys(Model):
    """The keys of `config.model` for a discrete VAE; the defaults are the release's."""

    kind: str = key("dvae")
    codes: int = key(8192, at_least(2), at_most(2**20))
    width: int = key(256, at_least(4), at_most(2**16))  # of the group at the image's resolution
    init_width: int = positive(128)  # of the decoder's first convolution
    groups: int = key(4, at_least(1), at_most(12))  # the resolution is halved between them
    blocks_per_group: int = positive(2)

    @property
    def stride(self) -> int:
        return 2 ** (self.groups - 1)


class DvaeConfig(NamedTuple):
    """The sizes of a discrete VAE. Group g of the encoder, from 0, has width · 2^g channels."""

    codes: int
    width: int
    init_width: int
    groups: int
    blocks_per_group: int
    image_channels: int

    @property
    def downsample(self) -> int:
        """Pixels per code along a side."""
        return 2 ** (self.groups - 1)


class ConvBlock(nn.Module):
    """id_path(x) + `gain` · four convolutions of x, a ReLU before each: f[B,H,W,C] -> width.

    The inner width is a quarter; `kernels` are the sides of the convolutions.
    """

    width: int
    kernels: tuple[int, ...]
    gain: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        widths = (*3 * (self.width // 4,), self.width)
        h = x
        for i, (width, side) in enumerate(zip(widths, self.kernels, strict=True), 1):
            h = _convolution(width, side, self.dtype, f"conv_{i}")(nn.relu(h))
        if x.shape[-1] != self.width:
            x = _convolution(self.width, 1, self.dtype, "id_path")(x)
        return x + self.gain * h


def _convolution(width: int, side: int, dtype: Any, name: str) -> nn.Conv:
    return nn.Conv(width, (side, side), dtype=dtype, kernel_init=_INIT, name=name)


class GroupOfBlocks(nn.Module):
    """The blocks of one resolution, each with the gain 1/n² of n blocks in all."""

    config: DvaeConfig
    width: int
    kernels: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gain = 1 / (c.groups * c.blocks_per_group) ** 2
        for b in range(1, c.blocks_per_group + 1):
            x = ConvBlock(self.width, self.kernels, gain, self.dtype, name=f"block_{b}")(x)
        return x


class CodeEncoder(nn.Module):
    """Pixels f[B,H,W,C] -> the logits of every code, f32[B,h,w,K]."""

    config: DvaeConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = _convolution(c.width, 7, self.dtype, "input")(x)
        for g in range(c.groups):
            x = x if g == 0 else nn.max_pool(x, (2, 2), (2, 2))
            name = f"group_{g + 1}"
            x = GroupOfBlocks(c, c.width * 2**g, (3, 3, 3, 1), self.dtype, name=name)(x)
        return _convolution(c.codes, 1, jnp.float32, "output")(nn.relu(x))


class CodeDecoder(nn.Module):
    """Weights of the codes f[B,h,w,K] -> f32[B,H,W,2C]: μ, then ln b."""

    config: DvaeConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        c = self.config
        x = _convolution(c.init_width, 1, jnp.float32, "input")(z).astype(self.dtype)
        for g in range(c.groups):
            x = x if g == 0 else doubled(x)
            width, name = c.width * 2 ** (c.groups - 1 - g), f"group_{g + 1}"
            x = GroupOfBlocks(c, width, (1, 3, 3, 3), self.dtype, name=name)(x)
        x = _convolution(2 * c.image_channels, 1, self.dtype, "output")(nn.relu(x))
        return x.astype(jnp.float32)


class Laplace(NamedTuple):
    """The distribution of logit(pixel): Laplace of location μ and scale exp(log_scale)."""

    location: jax.Array
    log_scale: jax.Array


class DVAE(nn.Module):
    """Images f32[B,H,W,C] in [-1, 1] -> logits of codes; codes, or weights of them -> `Laplace`."""

    config: DvaeConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.encoder = CodeEncoder(self.config, self.dtype)
        self.decoder = CodeDecoder(self.config, self.dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        """Those of q(code | x) at every place: f32[B,h,w,K]."""
        return self.encoder(mapped_pixels(x))

    def codes(self, x: jax.Array) -> jax.Array:
        """The most probable code of every place: i32[B,h,w]."""
        return jnp.argmax(self.logits(x), axis=-1).astype(jnp.int32)

    def decode(self, z: jax.Array) -> Laplace:
        """z f32[B,h,w,K], that add up to 1 -> `Laplace` of f32[B,H,W,C]."""
        return Laplace(*jnp.split(self.decoder(z), 2, axis=-1))

    def images(self, codes: jax.Array) -> jax.Array:
        """Codes i32[B,h,w] -> images f32[B,H,W,C] in [-1, 1], the likeliest."""
        z = jax.nn.one_hot(codes, self.config.codes, dtype=jnp.float32)
        return unmapped_pixels(jax.nn.sigmoid(self.decode(z).location))

    def __call__(self, x: jax.Array) -> Laplace:
        return self.decode(jax.nn.softmax(self.logits(x)))


def mapped_pixels(x: jax.Array) -> jax.Array:
    """φ of App. A.3: [-1, 1] -> [ε, 1 - ε]."""
    return (1 - 2 * PIXEL_EPSILON) * (x + 1) / 2 + PIXEL_EPSILON


def unmapped_pixels(y: jax.Array) -> jax.Array:
    """The inverse of `mapped_pixels`, clipped to [-1, 1]."""
    return 2 * jnp.clip((y - PIXEL_EPSILON) / (1 - 2 * PIXEL_EPSILON), 0, 1) - 1


def relaxed_codes(logits: jax.Array, gumbel: jax.Array, temperature: jax.Array) -> jax.Array:
    """Jang et al. 2016 Eq. 2: softmax((logits + g) / τ), f32[B,h,w,K]; temperature [B]."""
    return jax.nn.softmax((logits + gumbel) / temperature[:, None, None, None])


def laplace_nll(x: jax.Array, p: Laplace) -> jax.Array:
    """App. A.3: -ln of the logit-Laplace density of pixels f32[B,H,W,C] in [-1, 1], of that shape.

    -ln p(y) = ln 2b + ln y(1 - y) + |logit y - μ| / b, with y = `mapped_pixels`.
    """
    y = mapped_pixels(x)
    logit = jnp.log(y) - jnp.log1p(-y)
    away = jnp.abs(logit - p.location) * jnp.exp(-p.log_scale)
    return np.log(2).astype(np.float32) + p.log_scale + jnp.log(y) + jnp.log1p(-y) + away


def normal_nll(x: jax.Array, p: Laplace, std: float) -> jax.Array:
    """-ln of the normal density of pixels f32[B,H,W,C] in [-1, 1], of that shape.

    Its mean is the decoded image before it is clipped, its standard deviation `std`, in pixels of
    [-1, 1]. The scale that the decoder gives is not used.
    """
    slope = np.float32((1 - 2 * PIXEL_EPSILON) / 2)  # of `mapped_pixels`
    away = (mapped_pixels(x) - jax.nn.sigmoid(p.location)) / (slope * np.float32(std))
    return jnp.square(away) / 2 + np.log(np.sqrt(2 * np.pi) * std).astype(np.float32)


def kl_to_uniform(logits: jax.Array) -> jax.Array:
    """KL(q || uniform) = Σ_k q_k ln(q_k K) of each place, in nats: f32[B,h,w]."""
    log_q = jax.nn.log_softmax(logits)
    return (jnp.exp(log_q) * log_q).sum(-1) + np.log(logits.shape[-1]).astype(np.float32)


def dvae_config(k: DvaeKeys, image_channels: int) -> DvaeConfig:
    """The sizes of a recipe's discrete VAE."""
    return DvaeConfig(k.codes, k.width, k.init_width, k.groups, k.blocks_per_group, image_channels)


def module(k: DvaeKeys, image_channels: int) -> DVAE:
    """Build the discrete VAE of a recipe."""
    return DVAE(dvae_config(k, image_channels), DTYPES[k.dtype])


NETWORK = Network(keys=DvaeKeys, module=module)
