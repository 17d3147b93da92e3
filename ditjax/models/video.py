"""A DiT of video clips: attention over space and time in four patterns (Ma et al. 2024, Latte).

A clip f32[B,F,H,W,C] is cut into tubelets of p_t frames and p x p pixels: F' = F / p_t groups of
frames with S = (H / p)(W / p) places each, N = F'S tokens. The blocks are DiT's. A temporal sin-cos
table says which frame a token is of.

`joint`: every token attends to all N. `alternate` (Latte's variant 1): even blocks attend within a
frame, odd ones within a place of all frames. `late` (variant 2): first all spatial blocks, then all
temporal ones. `divided` (variant 3): a block attends within a frame, then within a place, and has
one MLP. `spatial`: all blocks attend within a frame, and no frame sees another: the baseline. The
depth L counts all blocks.

An image is a clip of one frame, without the temporal table: the one token of a place attends to
itself. A `joint` DiT of images is `models/dit.py`'s, with its parameters and its program.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ditjax.config import Config, key, positive
from ditjax.errors import UserError, divisors
from ditjax.models import dit, grafting
from ditjax.models.blocks import Block, Conditioning, modulate, over_tokens
from ditjax.models.dit import DiT, DiTKeys, given_channels
from ditjax.models.embed import ANYWHERE, Placement, sincos_position_embedding
from ditjax.models.network import Attention, Conditions, Inputs, Network, NetworkCost

# ---- keys


@dataclass(frozen=True)
class VideoKeys(DiTKeys):
    """The keys of `config.model` for a DiT of clips: those of a DiT, and three."""

    video: Literal["joint", "alternate", "late", "divided", "spatial"] = key("alternate")
    tubelet: int = positive(1, most=1024)  # frames of a token
    # What temporal blocks do to an image: run as MLPs with attention to one token, or nothing.
    video_image: Literal["run", "skip"] = key("run")

    def unused(self, name: str, c: Config) -> str:
        if name == "video_image" and c.data.frames > 1:
            return "data.frames"
        if name == "video_image" and self.video not in ("alternate", "late"):
            return "model.video"
        return super().unused(name, c)


class Cut(NamedTuple):
    """A clip in tubelets: F' groups of frames of S places each."""

    frames: int
    places: int

    @property
    def tokens(self) -> int:
        """N = F'S."""
        return self.frames * self.places


def cut(k: VideoKeys, inputs: Inputs) -> Cut:
    """The tubelets of a recipe's clips; an image is one frame."""
    *frames, H, W, _ = inputs.shape
    return Cut((inputs.past + math.prod(frames)) // k.tubelet, (H // k.patch) * (W // k.patch))


def check(k: VideoKeys, inputs: Inputs) -> None:
    """Raise UserError if the network cannot process its inputs."""
    frames = math.prod(inputs.shape[:-3])
    if frames % k.tubelet or inputs.past % k.tubelet:
        both = f"{inputs.past} and {frames}" if inputs.past else f"{frames}"
        shared = divisors(math.gcd(inputs.past, frames))
        raise UserError(
            f"config.model.tubelet is {k.tubelet}: it does not divide the {both} frames of"
            f" config.data.frames; sizes that do: {', '.join(map(str, shared))}."
        )
    dit.check(k, inputs._replace(shape=inputs.shape[-3:]))
    depth = dit.parse_size(k.size).depth
    if depth % 2 and k.video in ("alternate", "late"):
        raise UserError(
            f"config.model.size is {k.size!r}, of {depth} blocks: config.model.video={k.video} has"
            " as many spatial as temporal ones; expected an even depth."
        )
    for name, value, wanted in (
        ("block", k.block, "adaln_zero"),
        ("rope", k.rope, False),
        ("align_block", k.align_block, 0),
        ("attention_window", k.attention_window, 0),
        ("attention_hops", k.attention_hops, 0),
    ):
        if value != wanted:
            raise UserError(
                f"config.model.{name} is {value!r}, which a DiT of clips (config.model.kind=video)"
                f" does not have: expected {wanted!r}."
            )


# ---- cost


def _shape(k: VideoKeys, inputs: Inputs) -> dit.Shape:
    """A DiT's `Shape`, but that a token has p_t times the values of a patch."""
    s = dit.shape(k, inputs._replace(shape=inputs.shape[-3:]))
    return s._replace(
        in_channels=k.tubelet * s.in_channels, out_channels=k.tubelet * s.out_channels
    )


def clip_macs(k: VideoKeys, inputs: Inputs) -> int:
    """Multiply-accumulates of one forward pass of one clip, counted as `dit.forward_macs`.

    alternate and late: L(12ND² + 6D² + 2ND) + (L/2)·2ND(S + F') + (p_t p²C + p_t p²K)ND + FD + 3D²
    + ND. joint has L·2N²D in the second term. divided: L(16ND² + 9D² + 3ND + 2ND(S + F')) + ...
    """
    s, c = _shape(k, inputs), cut(k, inputs)
    N, D, L = c.tokens, s.size.width, s.size.depth
    spatial, temporal = dit.block_macs(s, N, c.places), dit.block_macs(s, N, c.frames)
    runs = k.video_image == "run" or c.frames > 1
    # Attention, its norm and its three vectors once more.
    second = 4 * N * D * D + 2 * N * c.frames * D + 3 * D * D + N * D
    blocks = {
        "joint": L * dit.block_macs(s, N, N),
        "divided": L * (spatial + second),
        "spatial": L * spatial,
    }.get(k.video, L // 2 * (spatial + runs * temporal))
    return blocks + dit.ends_macs(s, N)


def _parameters(k: VideoKeys, inputs: Inputs) -> int:
    s = _shape(k, inputs)
    D, L = s.size.width, s.size.depth
    second = (4 * D * D + 4 * D) + 3 * (D * D + D) + 2 * (D // s.size.heads) * s.qk_norm
    return dit.trainable_parameters(s) + L * second * (k.video == "divided")


def cost(k: VideoKeys, inputs: Inputs) -> NetworkCost:
    """The cost of a recipe's network for one clip."""
    s, c, macs = _shape(k, inputs), cut(k, inputs), clip_macs(k, inputs)
    L, D, _ = s.size
    keys = {"joint": c.tokens, "divided": c.places + c.frames, "spatial": c.places}
    attended = 2 * L * c.tokens * keys.get(k.video, (c.places + c.frames) / 2) * D
    repeated = {"none": 0, "dots": int(attended), "full": macs}[k.remat]
    tubelet = f"/{k.tubelet}" if k.tubelet > 1 else ""
    return NetworkCost(
        name=f"Video-{k.size}/{k.patch}{tubelet}-{k.video}",
        parameters=_parameters(k, inputs),
        macs=macs,
        training_macs=repeated,
        tokens=c.tokens,
        description=dit.description(k, c.tokens, tubelet=k.tubelet, video=k.video),
    ).with_language(inputs.language, c.tokens, D)


# ---- the module


def temporal_table(frames: int, width: int) -> np.ndarray:
    """The frozen 1-D table of Latte -> f32[frames, width]: [sin(ωi), cos(ωi)], ω = 10⁴^(-2j/D)."""
    omega = 1.0 / 10000.0 ** (np.arange(width // 2, dtype=np.float64) / (width / 2))
    angle = np.arange(frames)[:, None] * omega[None]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def with_channels(x: jax.Array, conditions: Conditions, channels: int) -> jax.Array:
    """Concatenate the channels that are given to a clip x [B,F,H,W,C].

    They may have frames before those of x, where x has none: zeros stand there.
    """
    given = given_channels(conditions, channels)
    past = given.shape[1] - x.shape[1]
    x = jnp.pad(x, ((0, 0), (past, 0), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([x, given.astype(x.dtype)], axis=-1)


def tubelets(x: jax.Array, frames: int, patch: int) -> jax.Array:
    """x [B,F,H,W,C] -> [B, F', S, p_t p p C]; frame, row, column, channel from slow to fast."""
    B, F, H, W, C = x.shape
    f, h, w = F // frames, H // patch, W // patch
    x = x.reshape(B, f, frames, h, patch, w, patch, C).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(B, f, h * w, frames * patch * patch * C)


def untubelets(tokens: jax.Array, frames: int, patch: int, height: int, width: int) -> jax.Array:
    """The inverse of `tubelets`: [B, F', S, p_t p p C] -> [B,F,H,W,C]."""
    B, f, _, values = tokens.shape
    h, w, C = height // patch, width // patch, values // (frames * patch**2)
    x = tokens.reshape(B, f, h, w, frames, patch, patch, C).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(B, f * frames, height, width, C)


def _over_time(
    block: Callable[[jax.Array], jax.Array], place: Placement, tokens: jax.Array
) -> jax.Array:
    """Apply a block to the places of tokens [B,F',S,D]: the frames of one are a group."""
    of_places = place.put("tokens", tokens.swapaxes(1, 2))
    return place.put("tokens", block(of_places).swapaxes(1, 2))


class TemporalAttention(Block):
    """Self-attention of the second kind in a block."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.attend(x)


class DividedBlock(Block):
    """adaLN-Zero with two attentions, over space and then over time: tokens [B,F',S,D]."""

    @nn.compact
    def __call__(self, x: jax.Array, cond: Conditioning) -> jax.Array:
        vectors = self.modulation(9, True, cond.vector)
        (shift, scale, gate), (shift_t, scale_t, gate_t) = vectors[:3], vectors[3:6]
        shift_mlp, scale_mlp, gate_mlp = vectors[6:]
        h = modulate(self.normalised(x), shift, scale)
        x = x + over_tokens(gate, x) * self.attend(h)
        temporal = TemporalAttention(self.config, name="temporal")
        h = modulate(self.normalised(x), shift_t, scale_t)
        x = x + over_tokens(gate_t, x) * _over_time(temporal, self.config.place, h)
        h = modulate(self.normalised(x, self.config.norm2_eps), shift_mlp, scale_mlp)
        return x + over_tokens(gate_mlp, x) * self.mlp(h)


class BlockPair(nn.Module):
    """A spatial and a temporal block: tokens [B,F',S,D], `added` f[F',D] between them or None.

    Both are of one kind, unless `temporal_block` is another.
    """

    block: Callable[..., nn.Module]
    place: Placement
    temporal: bool
    temporal_block: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(
        self, tokens: jax.Array, cond: Conditioning, added: jax.Array | None
    ) -> tuple[jax.Array, None]:
        spatial = self.block(name="spatial")
        temporal = (self.temporal_block or self.block)(name="temporal")
        tokens = self.place.put("tokens", spatial(tokens, cond))
        if added is not None:
            tokens = tokens + added[None, :, None]
        if self.temporal or self.is_initializing():
            tokens = _over_time(lambda x: temporal(x, cond), self.place, tokens)
        return tokens, None


class _Late(nn.Module):
    """All spatial blocks, and then all temporal ones."""

    block: Callable[..., nn.Module]
    place: Placement
    temporal: bool
    scan: Callable[..., Any]

    @nn.compact
    def __call__(
        self, tokens: jax.Array, cond: Conditioning, added: jax.Array | None
    ) -> tuple[jax.Array, None]:
        def body(module: nn.Module, tokens: jax.Array, cond: Conditioning) -> Any:
            return self.place.put("tokens", module(tokens, cond)), None

        tokens, _ = self.scan(body)(self.block(name="spatial"), tokens, cond)
        if added is not None:
            tokens = tokens + added[None, :, None]
        if self.temporal or self.is_initializing():

            def run(x: jax.Array) -> jax.Array:
                out: jax.Array = self.scan(body)(self.block(name="temporal"), x, cond)[0]
                return out

            tokens = _over_time(run, self.place, tokens)
        return tokens, None


class VideoDiT(DiT):
    """x f32[B,F,H,W,C] or f32[B,H,W,C], t [B], label i32[B] -> f32[..,out_channels].

    The fields are DiT's. Parameters of blocks are stacked on a leading axis: of L, or of L/2 in
    blocks/spatial and blocks/temporal. With `run_temporal` False an image passes the spatial ones
    alone.
    """

    pattern: str = "alternate"
    tubelet: int = 1
    run_temporal: bool = True

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, conditions: Conditions, per_block: Any = None
    ) -> jax.Array:
        conditions.only("label", *(("channels",) if self.given else ()))
        if conditions.label is None or per_block is not None:
            raise ValueError("a DiT of clips needs a label, and takes no per_block")
        cond = self._conditioning(t, conditions.label)
        clip = x if x.ndim == 5 else x[:, None]
        frames = clip.shape[1]
        if self.given:
            clip = with_channels(clip, conditions, self.given)
        H, W = clip.shape[2:4]
        grid = (H // self.patch, W // self.patch)
        tokens = self._after_blocks(self._walk(self._embedded(clip, grid), cond, grid))
        features = self.tubelet * self.patch**2 * self.out_channels
        out = self._final(features)(tokens, cond.vector)
        out = untubelets(out, self.tubelet, self.patch, H, W)
        if self.given:
            out = out[:, -frames:]
        return out.reshape(*x.shape[:-1], self.out_channels).astype(jnp.float32)

    @nn.nowrap
    def _embedded(self, clip: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """The tokens [B,F',S,D] of a clip with their places."""
        tokens = self._patches()(tubelets(clip, self.tubelet, self.patch))
        table = sincos_position_embedding(self.width, *grid, self.position_grid)
        return tokens + jnp.asarray(table, self.dtype)[None, None]

    @nn.nowrap
    def _walk(self, tokens: jax.Array, cond: Conditioning, grid: tuple[int, int]) -> jax.Array:
        """The blocks, in their pattern: tokens [B,F',S,D] -> same."""
        shape, put = tokens.shape, self.place.put
        times = None
        if shape[1] > 1:
            times = jnp.asarray(temporal_table(shape[1], self.width), self.dtype)
        if self.pattern in ("joint", "divided") and times is not None:
            tokens = tokens + times[None, :, None]
        if self.pattern == "joint":
            whole = put("tokens", tokens.reshape(shape[0], -1, self.width))
            return self._stack(whole, cond, None, grid)[0].reshape(shape)
        tokens = put("tokens", tokens)
        if self.pattern in ("divided", "spatial"):
            kind = DividedBlock if self.pattern == "divided" else None
            block = self._block(grid, kind)(name="blocks")

            def body(module: nn.Module, tokens: jax.Array, cond: Conditioning) -> Any:
                return put("tokens", module(tokens, cond)), None

            return self._scan(self.depth)(body)(block, tokens, cond)[0]
        half, run = self.depth // 2, self.run_temporal or shape[1] > 1
        if self.pattern == "late":
            late = _Late(self._block(grid), self.place, run, self._scan(half), name="blocks")
            return late(tokens, cond, times)[0]
        # The table is added once, in the first pair.
        added = None
        if times is not None:
            added = jnp.zeros((half, *times.shape), self.dtype).at[0].set(times)
        scan = self._scan(half, over=(nn.broadcast, 0))
        pair = self._pair(grid, run)
        return scan(lambda module, *args: module(*args))(pair, tokens, cond, added)[0]

    @nn.nowrap
    def _pair(self, grid: tuple[int, int], run: bool) -> nn.Module:
        """A spatial and a temporal block in turn."""
        return BlockPair(self._block(grid), self.place, run, name="blocks")


def module(k: VideoKeys, inputs: Inputs, place: Placement = ANYWHERE) -> DiT:
    """Build the denoiser of a recipe; its parameters do not depend on `place`."""
    whole = dit.module(k, inputs._replace(shape=inputs.shape[-3:]), place)
    if k.video == "joint" and len(inputs.shape) == 3:
        return whole
    own = {"pattern": k.video, "tubelet": k.tubelet, "run_temporal": k.video_image == "run"}
    made: DiT = dit.with_fields_of(whole, VideoDiT, **own)
    return made


def _attention(k: VideoKeys, inputs: Inputs) -> Attention:
    """The tokens, frames and heads that a mesh may split."""
    size, c = dit.parse_size(k.size), cut(k, inputs)
    of_head = (size.heads, size.width // size.heads)
    if k.video == "joint":
        return Attention(c.tokens, 0, *of_head)
    return Attention(c.places, 0, *of_head, frames=c.frames)


NETWORK = Network(
    keys=VideoKeys,
    module=module,
    cost=cost,
    check=check,
    attention=_attention,
    kernel=lambda k: k.attention,
    rules=dit.RULES,
    rates=dit.rates,
    varied=("size", "patch", "video"),
    grafts=((r"y_embedder/table", grafting.label_rows),),
    inherited=dit.INHERITED,
    stack="blocks",
    given=True,
    clips=True,
    language=True,
)
