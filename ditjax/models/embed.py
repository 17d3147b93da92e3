"""Embeddings of patches, positions, timesteps and labels, and the linear layer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

Initializer = Callable[..., jax.Array]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (q, k, v) -> softmax(q kᵀ/√d) v

TIMESTEP_FREQUENCIES = 256  # width of the sinusoidal table before its MLP, as in ADM


def xavier_uniform(
    key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, fan_out: int | None = None
) -> jax.Array:
    """Glorot & Bengio 2010 Eq. 16: U(-b, b), b = sqrt(6 / (fan_in + fan_out)).

    The first axis is fan_in, the product of the others is fan_out: a fused qkv or modulation
    kernel [D, 3, H, d] has fan_out 3D, as the flat matrix of the public release. The `fan_out`
    argument overrides it, to use the bound of a network of another width (μP).
    """
    if fan_out is None:
        fan_out = int(np.prod(shape[1:]))
    bound = (6.0 / (shape[0] + fan_out)) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _unplaced(name: str, x: jax.Array) -> jax.Array:
    return x


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a network places its activations on a mesh.

    `put(name, x)` constrains the sharding of the activations of that name. `merge_rows`: whether
    tokens may be merged with the batch; `merge_columns`: whether heads may be merged with the 3 of
    qkv. Merging an axis that is split would gather it first. `attend` is the devices' kernel for
    self-attention; None is the plain form. `heads_first`: whether the product of queries, keys and
    values has its heads before its tokens (`Linear`).
    """

    put: Callable[[str, jax.Array], jax.Array] = _unplaced
    merge_rows: bool = True
    merge_columns: bool = True
    heads_first: bool = False
    attend: Attend | None = None


ANYWHERE = Placement()


class Linear(nn.Module):
    """y = x W + b over the last axis; kernel [D_in, *features], bias [*features] if `use_bias`.

    Where the mesh allows it, this is a product of two matrices. The leading axes are merged first:
    on CPUs, a weight gradient that contracts batch and tokens as two axes runs at half speed.
    Factored features such as (3, H, d) and (6, D) remain separate axes in the parameter, so that
    sharding rules can name the heads and never split a fused 6D. They are merged in the product,
    and before the cast: otherwise a TPU sums the whole gradient over `fsdp` and splits it
    afterwards, which moves twice the bytes.

    With `heads_first`, features (S, H, d) are not merged, and y [.., N, D_in] -> [S, .., H, N, d]
    has the layout that a TPU's kernel of attention reads. Heads of 72 in a merged product are not
    at the 128 lanes of a register, so that each of S, H and N would be moved in a pass of its own.

    If the collection 'lora' has factors a [S, D_in, r] and b [S, r, *rest] of this layer, x a b is
    added, with S products beside each other along the first of the features (Hu et al. 2021).
    """

    features: int | tuple[int, ...]
    kernel_init: Initializer = xavier_uniform
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE
    use_bias: bool = True
    heads_first: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = (self.features,) if isinstance(self.features, int) else self.features
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], *features), jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, features, jnp.float32)
        lead, D = x.shape[:-1], x.shape[-1]
        rows = (-1,) if self.place.merge_rows and not self.heads_first else lead
        columns = (-1,) if self.place.merge_columns else features
        x = x.astype(self.dtype).reshape(*rows, D)
        kernel = kernel.reshape(D, *columns).astype(self.dtype)
        if self.heads_first:
            return self._by_heads(x, kernel.reshape(D, *features), bias)
        y = lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        if bias is not None:
            y = y + bias.reshape(columns).astype(self.dtype)[(None,) * len(rows)]
        if self.has_variable("lora", "a"):
            y = y + self._low_rank(x).reshape(y.shape)
        return y.reshape(*lead, *features)

    def _by_heads(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        """y [S, .., H, N, d] of x [.., N, D_in] and a kernel [D_in, S, H, d]."""
        y = jnp.einsum("...nd,dshk->s...hnk", x, kernel)
        if bias is not None:
            S, H, d = bias.shape
            y = y + bias.astype(self.dtype).reshape(S, *(1,) * (x.ndim - 2), H, 1, d)
        if self.has_variable("lora", "a"):
            added = self._low_rank(x).reshape(*x.shape[:-1], *kernel.shape[1:])
            y = y + jnp.moveaxis(added, (-3, -2), (0, -3))
        return y

    def _low_rank(self, x: jax.Array) -> jax.Array:
        """x a b of the collection 'lora' -> [.., S, features / S]."""
        a: jax.Array = self.get_variable("lora", "a").astype(self.dtype)
        b: jax.Array = self.get_variable("lora", "b").astype(self.dtype)
        reduced = jnp.einsum("...d,sdr->...sr", x, a)
        return jnp.einsum("...sr,srf->...sf", reduced, b.reshape(*b.shape[:2], -1))


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """DiT Sec. 3.2: x [B, H, W, C] -> tokens [B, N, p*p*C], row-major over patches.

    Within a token the channel is the fastest axis, then the column. A convolution with kernel size
    and stride p is this reshape followed by a Linear.
    """
    B, H, W, C = x.shape
    h, w = H // patch, W // patch
    x = x.reshape(B, h, patch, w, patch, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, h * w, patch * patch * C)


def unpatchify(tokens: jax.Array, patch: int, height: int, width: int) -> jax.Array:
    """The inverse of `patchify`: tokens [B, N, p*p*C] -> x [B, height, width, C]."""
    B, _, F = tokens.shape
    h, w, C = height // patch, width // patch, F // patch**2
    x = tokens.reshape(B, h, w, patch, patch, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, height, width, C)


def sincos_position_embedding(width: int, rows: int, columns: int, grid: int = 0) -> np.ndarray:
    """The frozen 2-D sine-cosine table of MAE and DiT -> f32[rows*columns, width].

    Per axis [sin(ωp), cos(ωp)] with ω_i = 10000^(-i / (D/4)), in float64; the column index fills
    the first half of the width, the row index the second. With a `grid`, positions are those of a
    network of grid x grid tokens: each side spans 0 to `grid`, as in diffusers
    (`get_2d_sincos_pos_embed`, base_size).
    """
    # 1 / 10000^x, not 10000^-x, so that the last bit matches the release.
    omega = 1.0 / 10000.0 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    halves = []
    for position, side in ((column, columns), (row, rows)):
        steps = position / (side / grid) if grid else position
        angle = steps.reshape(-1, 1) * omega[None]
        halves += [np.sin(angle), np.cos(angle)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def timestep_frequencies(
    t: jax.Array, width: int = TIMESTEP_FREQUENCIES, shift: int = 0
) -> jax.Array:
    """[cos(tω), sin(tω)], ω_i = exp(-ln(10^4) i / (width/2 - shift)): t [B] -> f32[B, width].

    t is the original integer timestep in [0, T-1], also when sampling is respaced. `shift` is 0 in
    the release and in ADM, and 1 in diffusers' DiT, which therefore embeds the same t differently.
    """
    half = width // 2
    omega = np.exp(-np.log(10000.0) * np.arange(half, dtype=np.float64) / (half - shift))
    angle = t.astype(jnp.float32)[:, None] * jnp.asarray(omega, jnp.float32)[None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimestepEmbedder(nn.Module):
    """t i32[B] -> [B, D]: sinusoids -> Linear -> SiLU -> Linear.

    Initial weights are N(0, 0.02²) in the first Linear and N(0, `out_std`²) in the second.
    """

    width: int
    frequency_shift: int = 0
    dtype: Any = jnp.float32
    out_std: float = 0.02

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        normal = nn.initializers.normal
        frequencies = timestep_frequencies(t, shift=self.frequency_shift)
        h = Linear(self.width, normal(0.02), self.dtype, name="in")(frequencies)
        return Linear(self.width, normal(self.out_std), self.dtype, name="out")(nn.silu(h))


class LabelEmbedder(nn.Module):
    """y i32[B] -> [B, D]: one row per class, and with `null` a last row for "no class".

    The table starts as N(0, std²). With `null`, the label num_classes means unconditional.
    """

    num_classes: int
    width: int
    null: bool
    dtype: Any = jnp.float32
    std: float = 0.02

    @nn.compact
    def __call__(self, y: jax.Array | np.ndarray) -> jax.Array:
        rows = self.num_classes + int(self.null)
        table = self.param(
            "table", nn.initializers.normal(self.std), (rows, self.width), jnp.float32
        )
        return jnp.take(table.astype(self.dtype), y, axis=0)


def drop_labels(key: jax.Array, y: jax.Array, rate: float, num_classes: int) -> jax.Array:
    """Ho & Salimans 2022 Alg. 1: y -> the null label, num_classes, with probability `rate`."""
    return jnp.where(jax.random.bernoulli(key, rate, y.shape), num_classes, y)
