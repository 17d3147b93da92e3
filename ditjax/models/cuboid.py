"""A transformer of cuboids as a denoiser of clips (Gao et al. 2022, Earthformer, Sec. 3.2).

Attention stays inside cuboids of frames, rows and columns: local ones, which may be shifted, or
dilated ones. An encoder of all frames, at two or more resolutions, keeps a memory of each; a
decoder of the frames to be drawn begins with their places alone and attends to the memory of the
same place in all frames. As in a DiT, the time and the label shift, scale and gate every layer.
What is drawn, what is known and their channels enter the encoder together; the paper's forecasting
network has no time and no noise.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ditjax.config import Config, Rule, above, at_most, key, non_negative, positive
from ditjax.errors import UserError
from ditjax.models.attention import MASKED
from ditjax.models.blocks import MLP, AffineLayerNorm, layer_norm, modulate, over_tokens
from ditjax.models.embed import (
    ANYWHERE,
    LabelEmbedder,
    Linear,
    Placement,
    TimestepEmbedder,
    sincos_position_embedding,
)
from ditjax.models.frozen import LM, LanguageBlock, LanguageLayers
from ditjax.models.network import (
    DTYPES,
    Conditions,
    Denoiser,
    Inputs,
    Network,
    NetworkCost,
)
from ditjax.models.video import temporal_table, with_channels

Size3 = tuple[int, int, int]
_LEAK = 0.1  # of the stem's activation
_ALL_POSITIVE = Rule(lambda v: 1 <= len(v) <= 8 and min(v) >= 1, "1 to 8 numbers, at least 1")

# ---- keys


@dataclass(frozen=True)
class CuboidKeys(Denoiser):
    """The keys of `config.model` for a transformer of cuboids."""

    units: int = positive(128)  # width of the finest level; each coarser one has twice as many
    heads: int = positive(4)
    depths: tuple[int, ...] = key((1, 1), _ALL_POSITIVE)  # blocks of each level, finest first
    # axial: all frames, all rows, all columns in turn; shifted: local cuboids, then shifted ones
    cuboids: Literal["axial", "shifted"] = key("axial")
    window: tuple[int, ...] = key((2, 4, 4), _ALL_POSITIVE, used_if=("cuboids", ("shifted",)))
    global_vectors: int = non_negative(0, most=1024)  # that every cuboid sees
    mlp_ratio: float = key(4.0, above(0), at_most(64))
    # The stem: convolutions, each of which shrinks the sides by a factor; SEVIR's in Earthformer
    stem_factors: tuple[int, ...] = key((3, 2, 2), _ALL_POSITIVE)
    stem_widths: tuple[int, ...] = key((16, 64, 128), _ALL_POSITIVE)

    @property
    def stride(self) -> int:
        return math.prod(self.stem_factors) * 2 ** (len(self.depths) - 1)

    def check(self, c: Config) -> None:
        if len(self.stem_factors) != len(self.stem_widths):
            raise UserError(
                f"config.model.stem_factors is {self.stem_factors} and stem_widths"
                f" {self.stem_widths}: expected as many of each."
            )
        if len(self.window) != 3:
            raise UserError(
                f"config.model.window is {self.window}: expected frames, rows and columns."
            )
        if self.units % self.heads or self.units % 4:
            raise UserError(
                f"config.model.units is {self.units}: expected a multiple of 4 and of the"
                f" {self.heads} heads of config.model.heads."
            )


def check(k: CuboidKeys, inputs: Inputs) -> None:
    """Raise UserError if the network cannot process its inputs."""
    if len(inputs.shape) != 4:
        raise UserError(
            "config.model.kind is 'cuboid', a network of clips, and config.data.frames is 1: set it"
            " to more, or kind to 'dit'."
        )
    H, W, _ = inputs.shape[-3:]
    if H % k.stride or W % k.stride:
        raise UserError(
            f"an input of {H}x{W}, and config.model.stem_factors={k.stem_factors} with"
            f" {len(k.depths)} levels of config.model.depths: expected multiples of {k.stride}."
        )


# ---- cuboids


def clipped(shape: Size3, cuboid: Size3, shift: Size3, strategy: str) -> tuple[Size3, Size3]:
    """Cuboid and shift on a grid: a side that a cuboid spans, or dilates, is not shifted."""
    size, moved = list(cuboid), list(shift)
    for i in range(3):
        if strategy[i] == "d" or shape[i] <= cuboid[i]:
            moved[i] = 0
        size[i] = min(shape[i], cuboid[i])
    return (size[0], size[1], size[2]), (moved[0], moved[1], moved[2])


def _split(shape: Size3, cuboid: Size3, strategy: str) -> tuple[list[int], list[int], list[int]]:
    """The axes of a grid in two: (sizes, places of the cuboids, places inside one)."""
    sizes: list[int] = []
    outer, inner = [], []
    for i in range(3):
        pieces = shape[i] // cuboid[i]
        local = strategy[i] == "l"
        sizes += [pieces, cuboid[i]] if local else [cuboid[i], pieces]
        outer.append(2 * i + 1 + (not local))
        inner.append(2 * i + 1 + local)
    return sizes, outer, inner


def into_cuboids(x: Any, cuboid: Size3, strategy: str) -> Any:
    """x [B,T,H,W,C] -> [B, cuboids, V, C]: pieces of size b, or 'd' every (n / b)-th place."""
    B, *shape, C = x.shape
    sizes, outer, inner = _split((shape[0], shape[1], shape[2]), cuboid, strategy)
    x = x.reshape(B, *sizes, C).transpose(0, *outer, *inner, 7)
    return x.reshape(B, -1, math.prod(cuboid), C)


def from_cuboids(x: Any, shape: Size3, cuboid: Size3, strategy: str) -> Any:
    """The inverse of `into_cuboids`."""
    B, C = x.shape[0], x.shape[-1]
    sizes, outer, inner = _split(shape, cuboid, strategy)
    order = [0, *outer, *inner, 7]
    x = x.reshape(B, *(sizes[a - 1] for a in outer), *cuboid, C)
    return x.transpose(*np.argsort(order).tolist()).reshape(B, *shape, C)


def cuboid_mask(shape: Size3, cuboid: Size3, shift: Size3, strategy: str) -> np.ndarray:
    """Which tokens of a cuboid see one another: bool[cuboids, V, V].

    None sees padding, and across a shifted border what the roll has brought together is apart.
    """
    padded = _padded(shape, cuboid)
    regions, real = np.zeros(padded, np.int64), np.ones(padded, bool)
    for axis in range(3):
        i = np.arange(padded[axis])
        region = (i >= padded[axis] - cuboid[axis]).astype(int) + (i >= padded[axis] - shift[axis])
        region = region if shift[axis] else np.zeros_like(i)
        there = np.roll(i < shape[axis], -shift[axis])
        along = [1, 1, 1]
        along[axis] = -1
        regions = 3 * regions + region.reshape(along)
        real &= there.reshape(along)
    found = (into_cuboids(x[None, ..., None], cuboid, strategy)[0, ..., 0] for x in (regions, real))
    region, live = found
    return (region[:, :, None] == region[:, None]) & live[:, :, None] & live[:, None]


def _padded(shape: Size3, cuboid: Size3) -> Size3:
    sides = [-(-n // b) * b for n, b in zip(shape, cuboid, strict=True)]
    return sides[0], sides[1], sides[2]


def relative_index(cuboid: Size3) -> np.ndarray:
    """The row of the table of relative positions for query n and key m: i64[V, V]."""
    places = np.stack(np.meshgrid(*map(np.arange, cuboid), indexing="ij")).reshape(3, -1)
    away = places[:, :, None] - places[:, None] + (np.array(cuboid) - 1)[:, None, None]
    _, h, w = (2 * b - 1 for b in cuboid)
    return np.asarray((away[0] * h + away[1]) * w + away[2])


def _attended(logits: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(logits) v with weights in float32."""
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("...nm,...md->...nd", weights, v)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q kᵀ / √d, f32[..,N,M]."""
    q = q * q.shape[-1] ** -0.5
    return jnp.einsum("...nd,...md->...nm", q, k, preferred_element_type=jnp.float32)


# ---- the layers


class CuboidAttention(nn.Module):
    """x [B,T,H,W,C], global vectors g [B,P,C] or None -> what is added to both.

    Tokens of a cuboid also see the global vectors, which see every token and one another; with
    `separate` they have products of their own for that. Without `updates` they stay as they are.
    """

    heads: int
    cuboid: Size3
    shift: Size3 = (0, 0, 0)
    strategy: str = "lll"
    separate: bool = True
    updates: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, g: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        _, *sides, C = x.shape
        shape = (sides[0], sides[1], sides[2])
        cuboid, shift = clipped(shape, self.cuboid, self.shift, self.strategy)
        padded = _padded(shape, cuboid)
        pads = [(0, p - n) for p, n in zip(padded, shape, strict=True)]
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        x = jnp.roll(x, [-s for s in shift], (1, 2, 3)) if any(shift) else x
        x = into_cuboids(x, cuboid, self.strategy)  # [B,n,V,C]
        mask = cuboid_mask(shape, cuboid, shift, self.strategy)
        q, k, v = self._heads(x, 3, "qkv")
        rows = math.prod(2 * b - 1 for b in cuboid)
        table = self.param(
            "bias_table", nn.initializers.truncated_normal(0.02), (rows, self.heads), jnp.float32
        )
        logits = _scores(q, k) + table[relative_index(cuboid)].transpose(2, 0, 1)[None, None]
        if not mask.all():
            logits = jnp.where(mask[None, :, None], logits, MASKED)
        out_g = None
        if g is not None:
            every = self.updates or not self.separate
            shared = self._heads(g, 3, "global_qkv") if every else ()
            if self.updates:
                out_g = self._of_globals(x, g, (k, v, *shared), mask)
            logits, v = self._with_globals(x, g, (q, v, shared), logits)
        y = _attended(logits, v).swapaxes(2, 3).reshape(x.shape)
        y = Linear(C, dtype=self.dtype, name="out")(y)
        y = from_cuboids(y, padded, cuboid, self.strategy)
        y = jnp.roll(y, shift, (1, 2, 3)) if any(shift) else y
        return y[:, : shape[0], : shape[1], : shape[2]], out_g

    @nn.nowrap
    def _heads(self, x: jax.Array, count: int, name: str) -> tuple[jax.Array, ...]:
        """`count` products of x [B,..,M,C] -> [B,..,heads,M,d] each."""
        features = (count, self.heads, x.shape[-1] // self.heads)
        out = Linear(features, dtype=self.dtype, name=name)(x)
        return tuple(jnp.moveaxis(out[..., i, :, :], -2, -3) for i in range(count))

    @nn.nowrap
    def _with_globals(
        self, x: jax.Array, g: jax.Array, own: Any, logits: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The logits and values of tokens with those of the global vectors."""
        (seeing, v, shared), (B, P, C) = own, g.shape
        if self.separate:
            (seeing,) = self._heads(x, 1, "token_q")
            key, value = self._heads(g, 2, "global_kv")
        else:
            _, key, value = shared
        spread = (B, x.shape[1], self.heads, P, C // self.heads)
        key, value = (jnp.broadcast_to(each[:, None], spread) for each in (key, value))
        both = jnp.concatenate([logits, _scores(seeing, key)], -1)
        return both, jnp.concatenate([v, value], 3)

    @nn.nowrap
    def _of_globals(self, x: jax.Array, g: jax.Array, own: Any, mask: np.ndarray) -> jax.Array:
        """What global vectors get of every token of every cuboid, and of themselves."""
        (token_k, token_v, self_q, self_k, self_v), (B, P, C) = own, g.shape
        asking = self_q
        if self.separate:
            (asking,) = self._heads(g, 1, "global_q")
            token_k, token_v = self._heads(x, 2, "token_kv")
        flat_k, flat_v = (
            each.swapaxes(1, 2).reshape(B, self.heads, -1, C // self.heads)
            for each in (token_k, token_v)
        )
        live = np.diagonal(mask, axis1=1, axis2=2).reshape(1, 1, 1, -1)
        to_tokens = jnp.where(live, _scores(asking, flat_k), MASKED)
        logits = jnp.concatenate([to_tokens, _scores(self_q, self_k)], -1)
        out = _attended(logits, jnp.concatenate([flat_v, self_v], 2))
        return Linear(C, dtype=self.dtype, name="global_out")(out.swapaxes(1, 2).reshape(B, P, C))


class PlaceAttention(nn.Module):
    """x [B,T,H,W,C] attends to all frames of its own place in a memory [B,M,H,W,C]."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, memory: jax.Array) -> jax.Array:
        C = x.shape[-1]

        def of_places(y: jax.Array) -> jax.Array:
            return jnp.moveaxis(y, 1, 3)  # [B,H,W,T,C]

        d = C // self.heads
        q = Linear((self.heads, d), dtype=self.dtype, name="q")(of_places(x))
        kv = Linear((2, self.heads, d), dtype=self.dtype, name="kv")(of_places(memory))
        q, k, v = (jnp.moveaxis(y, -2, -3) for y in (q, kv[..., 0, :, :], kv[..., 1, :, :]))
        y = _attended(_scores(q, k), v)
        y = jnp.moveaxis(y, -3, -2).reshape(of_places(x).shape)
        return jnp.moveaxis(Linear(C, dtype=self.dtype, name="out")(y), 3, 1)


class CuboidLayer(nn.Module):
    """Cuboid attention and an MLP, each shifted, scaled and gated by the vector of time."""

    attention: CuboidAttention
    mlp_ratio: float

    @nn.compact
    def __call__(
        self, x: jax.Array, g: jax.Array | None, vector: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        dtype = self.attention.dtype
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _wide_modulation(
            6, x.shape[-1], dtype, "adaln"
        )(vector)
        seen = None if g is None else AffineLayerNorm(name="norm_global")(g)
        y, out_g = self.attention(modulate(layer_norm(x), shift, scale), seen)
        x = x + over_tokens(gate, x) * y
        h = modulate(layer_norm(x), shift_mlp, scale_mlp)
        h = MLP(self.mlp_ratio, dtype, name="mlp")(h.reshape(len(h), -1, h.shape[-1]))
        x = x + over_tokens(gate_mlp, x) * h.reshape(x.shape)
        return x, g if g is None or out_g is None else g + out_g


def _wide_modulation(count: int, width: int, dtype: Any, name: str) -> Callable[..., Any]:
    """`Modulation` of vectors of another width than the tokens."""

    def modulation(vector: jax.Array) -> list[jax.Array]:
        zeros = nn.initializers.zeros
        out = Linear((count, width), zeros, dtype, name=name)(nn.silu(vector))
        return [out[:, i] for i in range(count)]

    return modulation


class CuboidNet(nn.Module):
    """x f32[B,T,H,W,C], t [B], label i32[B] -> f32[B,T,H,W,out_channels].

    `given` channels f32[B,past+T,H,W,given] of all frames are concatenated to x.
    """

    keys: CuboidKeys
    out_channels: int
    num_classes: int
    given: int = 0
    language: LanguageLayers | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, conditions: Conditions, per_block: Any = None
    ) -> jax.Array:
        conditions.only("label", *(("channels",) if self.given else ()))
        if conditions.label is None or per_block is not None:
            raise ValueError("a transformer of cuboids needs a label, and takes no per_block")
        k, frames = self.keys, x.shape[1]
        vector = self._vector(t, conditions.label)
        h = with_channels(x, conditions, self.given) if self.given else x
        h = self._stem(h.astype(self.dtype))
        memories = self._encoded(h + self._places(h.shape, k.units), vector)
        if self.language:
            memories[-1] = LanguageBlock(self.language, self.dtype, name=LM)(memories[-1])
        h = self._decoded(memories, frames, vector)
        return self._end(h, vector).astype(jnp.float32)

    @nn.nowrap
    def _vector(self, t: jax.Array, label: Any) -> jax.Array:
        k = self.keys
        if self.language and self.language.timeless:
            t = jnp.zeros_like(t)
        embed = TimestepEmbedder(k.units, 0, self.dtype, name="t_embedder")
        null = k.label_dropout > 0
        of_label = LabelEmbedder(self.num_classes, k.units, null, self.dtype, name="y_embedder")
        return embed(t) + of_label(label)

    @nn.nowrap
    def _places(self, shape: tuple[int, ...], width: int) -> jax.Array:
        """Frozen sin-cos tables of frames and places, [1,T,H,W,width]."""
        _, T, H, W, _ = shape
        table = sincos_position_embedding(width, H, W).reshape(1, 1, H, W, width)
        return jnp.asarray(table + temporal_table(T, width)[None, :, None, None], self.dtype)

    @nn.nowrap
    def _stem(self, h: jax.Array) -> jax.Array:
        k = self.keys
        for i, (factor, width) in enumerate(zip(k.stem_factors, k.stem_widths, strict=True)):
            h = nn.leaky_relu(self._conv(width, f"stem_conv_{i}")(h), _LEAK)
            last = i + 1 == len(k.stem_factors)
            h = self._merged(h, factor, k.units if last else width, f"stem_{i}")
        return h

    @nn.nowrap
    def _conv(self, width: int, name: str) -> Callable[[jax.Array], jax.Array]:
        conv = nn.Conv(width, (3, 3), padding=1, dtype=self.dtype, name=name)

        def each_frame(h: jax.Array) -> jax.Array:
            y = conv(h.reshape(-1, *h.shape[2:]))
            return y.reshape(*h.shape[:2], *y.shape[1:])

        return each_frame

    @nn.nowrap
    def _merged(self, h: jax.Array, factor: int, width: int, name: str) -> jax.Array:
        """Patches of factor x factor as one token: concatenate, normalise, project."""
        B, T, H, W, C = h.shape
        f, rows, columns = factor, H // factor, W // factor
        h = h.reshape(B, T, rows, f, columns, f, C).swapaxes(3, 4).reshape(B, -1, f * f * C)
        h = AffineLayerNorm(name=f"{name}_norm")(h)
        h = Linear(width, dtype=self.dtype, use_bias=False, name=f"{name}_merge")(h)
        return h.reshape(B, T, rows, columns, width)

    @nn.nowrap
    def _block(
        self, h: jax.Array, g: jax.Array | None, vector: jax.Array, name: str, last: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """The cuboid layers of one block; the very last does not change the global vectors."""
        k, layers = self.keys, pattern(self.keys, (h.shape[1], h.shape[2], h.shape[3]))
        for i, (cuboid, shift) in enumerate(layers):
            updates = not (last and i + 1 == len(layers))
            attention = CuboidAttention(
                *(k.heads, cuboid, shift), updates=updates, dtype=self.dtype, parent=None
            )
            h, g = CuboidLayer(attention, k.mlp_ratio, name=f"{name}_{i}")(h, g, vector)
        return h, g

    @nn.nowrap
    def _encoded(self, h: jax.Array, vector: jax.Array) -> list[jax.Array]:
        """The memories of all levels, finest first."""
        k, memories, g = self.keys, [], None
        for level, depth in enumerate(k.depths):
            width = k.units << level
            if level:
                h = self._merged(h, 2, width, f"down_{level}")
            if k.global_vectors:
                start = self.param(
                    f"globals_{level}", nn.initializers.normal(0.02), (k.global_vectors, width)
                )
                g = jnp.broadcast_to(start.astype(self.dtype)[None], (len(h), *start.shape))
            for i in range(depth):
                h, g = self._block(h, g, vector, f"encoder_{level}_{i}", i + 1 == depth)
            memories.append(h)
        return memories

    @nn.nowrap
    def _decoded(self, memories: list[jax.Array], frames: int, vector: jax.Array) -> jax.Array:
        k, h = self.keys, None
        for level in reversed(range(len(k.depths))):
            memory, width = memories[level], k.units << level
            if h is None:
                B, _, H, W, _ = memory.shape
                # Every clip begins with its places, so that these need not attend to one another.
                start = self._places((B, frames, H, W, width), width)
                h = jnp.broadcast_to(
                    Linear(width, dtype=self.dtype, name="start")(start), (B, frames, H, W, width)
                )
            else:
                h = jnp.repeat(jnp.repeat(h, 2, axis=2), 2, axis=3)
                h = self._conv(width, f"up_{level}")(h)
            first = level + 1 == len(k.depths)
            for i in range(k.depths[level]):
                if not (first and i == 0):
                    h, _ = self._block(h, None, vector, f"decoder_{level}_{i}")
                h = self._crossed(h, memory, vector, f"cross_{level}_{i}")
        assert h is not None
        return h

    @nn.nowrap
    def _crossed(self, h: jax.Array, memory: jax.Array, vector: jax.Array, name: str) -> jax.Array:
        made = _wide_modulation(3, h.shape[-1], self.dtype, f"{name}_adaln")(vector)
        shift, scale, gate = made
        attention = PlaceAttention(self.keys.heads, self.dtype, name=name)
        y = attention(modulate(layer_norm(h), shift, scale), layer_norm(memory))
        return h + over_tokens(gate, h) * y

    @nn.nowrap
    def _end(self, h: jax.Array, vector: jax.Array) -> jax.Array:
        k = self.keys
        for i in reversed(range(len(k.stem_factors))):
            f = k.stem_factors[i]
            h = jnp.repeat(jnp.repeat(h, f, axis=2), f, axis=3)
            h = nn.leaky_relu(self._conv(k.stem_widths[i], f"end_conv_{i}")(h), _LEAK)
        shift, scale = _wide_modulation(2, h.shape[-1], self.dtype, "final_adaln")(vector)
        h = modulate(layer_norm(h), shift, scale)
        return Linear(self.out_channels, nn.initializers.zeros, self.dtype, name="final")(h)


def pattern(k: CuboidKeys, shape: Size3) -> list[tuple[Size3, Size3]]:
    """The cuboids and shifts of a block's layers on a grid of T, H, W tokens."""
    T, H, W = shape
    if k.cuboids == "axial":
        return [(each, (0, 0, 0)) for each in ((T, 1, 1), (1, H, 1), (1, 1, W))]
    window = (k.window[0], k.window[1], k.window[2])
    half = (window[0] // 2, window[1] // 2, window[2] // 2)
    return [(window, (0, 0, 0)), (window, half)]


# ---- cost


class _Level(NamedTuple):
    """A level: tokens T x H x W of all frames, and its width."""

    shape: Size3
    width: int


def _levels(k: CuboidKeys, inputs: Inputs) -> list[_Level]:
    frames, H, W, _ = inputs.shape
    f = math.prod(k.stem_factors)
    sides = [(H // f >> level, W // f >> level) for level in range(len(k.depths))]
    T = inputs.past + frames
    return [_Level((T, *side), k.units << level) for level, side in enumerate(sides)]


def _block_macs(k: CuboidKeys, level: _Level, globals_: int) -> int:
    """4NC² + 2NVC of each attention, 2rNC² of its MLP, norms, vectors, and global vectors."""
    C, P, total = level.width, globals_, 0
    for cuboid, shift in pattern(k, level.shape):
        size, _ = clipped(level.shape, cuboid, shift, "lll")
        N, V = math.prod(_padded(level.shape, size)), math.prod(size)
        tokens = math.prod(level.shape)
        total += 4 * N * C * C + 2 * N * V * C + 2 * tokens * C * int(C * k.mlp_ratio)
        total += 6 * k.units * C + 2 * tokens * C
        if P:  # seen by the tokens, and, but for the last layer, seeing them
            total += N * C * C + 2 * P * C * C + 2 * N * P * C + P * C
            total += 2 * N * C * C + 5 * P * C * C + 2 * (N + P) * P * C
    return total


def cuboid_macs(k: CuboidKeys, inputs: Inputs) -> int:
    """Multiply-accumulates of one forward pass of one clip, elements of norms included."""
    levels, frames = _levels(k, inputs), inputs.shape[0]
    _, H, W, channels = inputs.shape
    total = (256 + k.units) * k.units
    width, pixels, T = channels + inputs.given, H * W, levels[0].shape[0]
    for i, (factor, out) in enumerate(zip(k.stem_factors, k.stem_widths, strict=True)):
        total += 9 * width * out * pixels * T
        width = k.units if i + 1 == len(k.stem_factors) else out
        total += pixels * T * out * (width + 1)
        pixels //= factor**2
    for n, level in enumerate(levels):
        N, C = math.prod(level.shape), level.width
        if n:
            total += N * 2 * C * (C + 1)
        total += k.depths[n] * _block_macs(k, level, k.global_vectors)
        if P := k.global_vectors:
            size, _ = clipped(level.shape, pattern(k, level.shape)[-1][0], (0, 0, 0), "lll")
            padded = math.prod(_padded(level.shape, size))
            total -= 2 * padded * C * C + 5 * P * C * C + 2 * (padded + P) * P * C
        drawn = level._replace(shape=(frames, *level.shape[1:]))
        Q, deepest = math.prod(drawn.shape), n + 1 == len(levels)
        total += (k.depths[n] - deepest) * _block_macs(k, drawn, 0)
        cross = 2 * (Q + N) * C * C + 2 * Q * level.shape[0] * C + 3 * k.units * C + (Q + N) * C
        total += k.depths[n] * cross
        total += Q * C * C if deepest else 9 * Q * C * 2 * C
    width, pixels = k.units, math.prod(levels[0].shape[1:])
    for factor, out in reversed(list(zip(k.stem_factors, k.stem_widths, strict=True))):
        pixels *= factor**2
        total += 9 * width * out * pixels * frames
        width = out
    total += 2 * k.units * width + frames * pixels * width * (1 + inputs.out_channels)
    return total


@functools.lru_cache(maxsize=64)
def _parameters(k: CuboidKeys, inputs: Inputs) -> int:
    """Of the network without a language model; the shapes are traced, nothing is computed."""
    net = module(k, inputs._replace(language=None))

    def init() -> Any:
        x = jnp.zeros((1, *inputs.shape))
        frames = (inputs.past + inputs.shape[0], *inputs.shape[1:3])
        channels = jnp.zeros((1, *frames, inputs.given)) if inputs.given else None
        label = jnp.zeros(1, jnp.int32)
        return net.init(jax.random.key(0), x, label, Conditions(label, channels=channels))

    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init)))


def cost(k: CuboidKeys, inputs: Inputs) -> NetworkCost:
    """The cost of a recipe's network for one clip."""
    levels = _levels(k, inputs)
    last = levels[-1]
    return NetworkCost(
        name=f"Cuboid-{k.units}-{k.cuboids}",
        parameters=_parameters(k, inputs),
        macs=cuboid_macs(k, inputs),
        tokens=math.prod(levels[0].shape),
        description={
            "units": k.units,
            "depths": list(k.depths),
            "heads": k.heads,
            "cuboids": k.cuboids,
            "global_vectors": k.global_vectors,
        },
    ).with_language(inputs.language, math.prod(last.shape), last.width)


def module(k: CuboidKeys, inputs: Inputs, place: Placement = ANYWHERE) -> CuboidNet:
    """Build the denoiser of a recipe. A mesh may split the batch alone, so `place` is not read."""
    del place
    return CuboidNet(
        k,
        inputs.out_channels,
        inputs.num_classes,
        inputs.given,
        inputs.language,
        DTYPES[k.dtype],
    )


NETWORK = Network(
    keys=CuboidKeys,
    module=module,
    cost=cost,
    check=check,
    varied=("units", "cuboids"),
    given=True,
    clips=True,
    language=True,
)
