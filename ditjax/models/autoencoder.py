"""LDM Sec. 3.1: the KL autoencoder of latent diffusion (Rombach et al. 2022), channels last.

The architecture is Stable Diffusion's at any width, so that the same module loads the published
weights (`AutoencoderConfig()`: sd-vae-ft-mse and -ema) and trains small autoencoders.

Parameter paths match those of diffusers' `AutoencoderKL`, one to one:

    encoder/down_blocks_0/resnets_1/conv1/kernel  <->  encoder.down_blocks.0.resnets.1.conv1.weight

- '/' becomes '.', and so does '_' before a name's closing number (`to_out_0` -> `to_out.0`);
- `kernel` and a norm's `scale` become `weight`; `bias` stays;
- a convolution kernel [kh, kw, in, out] is transposed to [out, in, kh, kw] and a dense kernel
  [in, out] to [out, in].

Files written before diffusers 0.14 name the attention's to_q, to_k, to_v and to_out.0 query, key,
value and proj_attn, and may store them as 1x1 convolutions.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from ditjax.config import Autoencoder, Model, key
from ditjax.errors import UserError
from ditjax.models.convolutions import doubled, group_norm
from ditjax.models.network import DTYPES, Network

_NORM_EPSILON = 1e-6
_LOG_VARIANCE_MIN, _LOG_VARIANCE_MAX = -30.0, 20.0


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The architecture of an autoencoder; the default is Stable Diffusion's, 83,653,863 parameters.

    Level i has base_width * multipliers[i] channels; the resolution is halved between levels. The
    autoencoders of SD3 and Flux have 16 latent channels and no 1x1 convolutions around them.
    Raises UserError for a number below 1, or a width that `groups` does not divide.
    """

    base_width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    latent_channels: int = 4
    image_channels: int = 3
    groups: int = 32
    quant_conv: bool = True
    post_quant_conv: bool = True

    def __post_init__(self) -> None:
        # The argument may be a list, but the attributes of a Linen module must be hashable.
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        if not self.multipliers:
            raise UserError(
                "autoencoder multipliers are empty: expected one per level, such as (1, 2)."
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is bool:
                continue
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                    raise UserError(
                        f"autoencoder {field.name} is {value!r}: expected whole numbers of at"
                        " least 1."
                    )
        for width in self.widths:
            if width % self.groups:
                raise UserError(
                    f"autoencoder width {width} is not divisible by {self.groups} groups:"
                    f" choose groups that divide base_width {self.base_width}."
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, starting at the image."""
        return tuple(self.base_width * multiplier for multiplier in self.multipliers)

    @property
    def downsample(self) -> int:
        """The downsampling factor f = H / h from image to latent."""
        return 2 ** (len(self.multipliers) - 1)


class Moments(NamedTuple):
    """The posterior q(z|x) = N(mean, diag exp(log_variance)); both f32[B,h,w,latent_channels]."""

    mean: jax.Array
    log_variance: jax.Array


def _conv(width: int, kernel: int, dtype: DTypeLike, name: str | None = None) -> nn.Conv:
    return nn.Conv(width, (kernel, kernel), padding=kernel // 2, dtype=dtype, name=name)


def _norm(x: jax.Array, groups: int, name: str) -> jax.Array:
    return group_norm(x, groups, _NORM_EPSILON, name).astype(x.dtype)


class ResnetBlock(nn.Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))): f[B,H,W,C] -> f[B,H,W,width]."""

    width: int
    groups: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(_norm(x, self.groups, "norm1"))
        h = _conv(self.width, 3, self.dtype, "conv1")(h)
        h = nn.silu(_norm(h, self.groups, "norm2"))
        h = _conv(self.width, 3, self.dtype, "conv2")(h)
        if x.shape[-1] != self.width:
            x = _conv(self.width, 1, self.dtype, "conv_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """x + Dense(softmax(q k^T / sqrt(C)) v), one head over all pixels: f[B,H,W,C] -> same."""

    groups: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        h = _norm(x, self.groups, "group_norm").reshape(B, H * W, C)  # [B,N,C]
        q = nn.Dense(C, dtype=self.dtype, name="to_q")(h)
        k = nn.Dense(C, dtype=self.dtype, name="to_k")(h)
        v = nn.Dense(C, dtype=self.dtype, name="to_v")(h)
        # Logits and softmax are float32 for any compute dtype: bfloat16 has 8 significant bits.
        logits = jnp.einsum("bnc,bmc->bnm", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * C**-0.5, axis=-1).astype(v.dtype)
        h = jnp.einsum("bnm,bmc->bnc", weights, v)
        h = nn.Dense(C, dtype=self.dtype, name="to_out_0")(h)
        return x + h.reshape(B, H, W, C)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    groups: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = ResnetBlock(width, self.groups, self.dtype, name="resnets_0")(x)
        x = AttentionBlock(self.groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock(width, self.groups, self.dtype, name="resnets_1")(x)


class Downsample(nn.Module):
    """3x3 convolution of stride 2: f[B,H,W,C] -> f[B,H/2,W/2,C]."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # Stable Diffusion pads after the last row and column only.
        padding = ((0, 1), (0, 1))
        return nn.Conv(
            x.shape[-1], (3, 3), strides=2, padding=padding, dtype=self.dtype, name="conv"
        )(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling, then a 3x3 convolution: f[B,H,W,C] -> f[B,2H,2W,C]."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = doubled(x)
        return _conv(x.shape[-1], 3, self.dtype, "conv")(x)


class DownBlock(nn.Module):
    """One level of the encoder: `blocks` residual blocks, then `Downsample` unless `last`."""

    width: int
    blocks: int
    groups: int
    last: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.blocks):
            x = ResnetBlock(self.width, self.groups, self.dtype, name=f"resnets_{i}")(x)
        return x if self.last else Downsample(self.dtype, name="downsamplers_0")(x)


class UpBlock(nn.Module):
    """One level of the decoder: `blocks` residual blocks, then `Upsample` unless `last`."""

    width: int
    blocks: int
    groups: int
    last: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.blocks):
            x = ResnetBlock(self.width, self.groups, self.dtype, name=f"resnets_{i}")(x)
        return x if self.last else Upsample(self.dtype, name="upsamplers_0")(x)


class Encoder(nn.Module):
    """x f[B,H,W,image_channels] -> f[B,h,w,2*latent_channels]: mean, then log-variance."""

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, dtype = self.config, self.dtype
        h = _conv(c.base_width, 3, dtype, "conv_in")(x)
        for i, width in enumerate(c.widths):
            last = i == len(c.widths) - 1
            h = DownBlock(width, c.res_blocks, c.groups, last, dtype, name=f"down_blocks_{i}")(h)
        h = MidBlock(c.groups, dtype, name="mid_block")(h)
        h = nn.silu(_norm(h, c.groups, "conv_norm_out"))
        return _conv(2 * c.latent_channels, 3, dtype, "conv_out")(h)


class Decoder(nn.Module):
    """z f[B,h,w,latent_channels] -> f[B,H,W,image_channels]; res_blocks + 1 blocks per level."""

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        c, dtype = self.config, self.dtype
        h = _conv(c.widths[-1], 3, dtype, "conv_in")(z)
        h = MidBlock(c.groups, dtype, name="mid_block")(h)
        for i, width in enumerate(reversed(c.widths)):
            last = i == len(c.widths) - 1
            h = UpBlock(width, c.res_blocks + 1, c.groups, last, dtype, name=f"up_blocks_{i}")(h)
        h = nn.silu(_norm(h, c.groups, "conv_norm_out"))
        return _conv(c.image_channels, 3, dtype, "conv_out")(h)


class AutoencoderKL(nn.Module):
    """LDM Sec. 3.1: encode(x) returns q(z|x), decode(z) the image; images are in [-1, 1].

    Latents are not normalised: the caller applies the statistics of a diffusion model (the factor
    0.18215 for Stable Diffusion's). `dtype` is the compute dtype; parameters, moments and images
    are float32. `init` takes the arguments of `__call__`.
    """

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        latent = self.config.latent_channels
        self.encoder = Encoder(self.config, self.dtype)
        if self.config.quant_conv:
            self.quant_conv = _conv(2 * latent, 1, self.dtype)
        if self.config.post_quant_conv:
            self.post_quant_conv = _conv(latent, 1, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def encode(self, x: jax.Array) -> Moments:
        """q(z|x): x f32[B,H,W,image_channels] -> Moments f32[B,H/f,W/f,latent_channels].

        Raises UserError if f does not divide H and W, or for another number of channels.
        """
        f = self.config.downsample
        _check_channels("image", x, self.config.image_channels)
        for side in x.shape[1:3]:
            if side < f or side % f:
                raise UserError(
                    f"image of {x.shape[1]}x{x.shape[2]} pixels: this autoencoder needs sides"
                    f" divisible by {f}; resize to {max(1, round(side / f)) * f} instead of {side}."
                )
        moments = self.encoder(x)
        if self.config.quant_conv:
            moments = self.quant_conv(moments)
        moments = moments.astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return Moments(mean, jnp.clip(log_variance, _LOG_VARIANCE_MIN, _LOG_VARIANCE_MAX))

    def decode(self, z: jax.Array) -> jax.Array:
        """z f32[B,h,w,latent_channels] -> x f32[B,h*f,w*f,image_channels], not clipped to [-1, 1].

        Raises UserError for another number of channels.
        """
        _check_channels("latent", z, self.config.latent_channels)
        if self.config.post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32)

    def __call__(self, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Moments]:
        """x, key -> (decode(z), q(z|x)) with z ~ q(z|x), for L_rec and L_reg of LDM App. G."""
        moments = self.encode(x)
        eps = jax.random.normal(key, moments.mean.shape, moments.mean.dtype)
        return self.decode(sample_posterior(moments, eps)), moments


def _check_channels(what: str, x: jax.Array, channels: int) -> None:
    if x.ndim != 4 or x.shape[-1] != channels:
        raise UserError(
            f"{what} array of shape {tuple(x.shape)}: this autoencoder expects"
            f" [batch, height, width, {channels}], channels last."
        )


def sample_posterior(moments: Moments, eps: jax.Array) -> jax.Array:
    """z = mean + exp(log_variance / 2) eps, eps ~ N(0, I) of mean's shape -> f32[B,h,w,c].

    The noise is an argument, so that it can be drawn per image, independently of the batch.
    """
    return moments.mean + jnp.exp(0.5 * moments.log_variance) * eps


def kl_to_standard_normal(moments: Moments) -> jax.Array:
    """KL(q(z|x) || N(0, I)) = 1/2 sum(mean^2 + var - 1 - log var), in nats -> f32[B]."""
    mean, log_variance = moments
    terms = mean**2 + jnp.exp(log_variance) - 1.0 - log_variance
    return 0.5 * jnp.sum(terms, axis=(1, 2, 3))


@dataclasses.dataclass(frozen=True)
class AutoencoderKeys(Model):
    """The keys of `config.model` for an autoencoder; its widths are in `config.autoencoder`."""

    kind: str = key("autoencoder")


def module(k: Model, section: Autoencoder, image_channels: int) -> AutoencoderKL:
    """Build the autoencoder of a recipe."""
    widths = AutoencoderConfig(
        base_width=section.base_width,
        multipliers=section.multipliers,
        res_blocks=section.res_blocks,
        latent_channels=section.latent_channels,
        image_channels=image_channels,
        groups=section.groups,
        quant_conv=section.quant_conv,
        post_quant_conv=section.post_quant_conv,
    )
    return AutoencoderKL(widths, dtype=DTYPES[k.dtype])


NETWORK = Network(keys=AutoencoderKeys, module=module)
