"""A DiT of clips and texts: Latte's network of text to video (Ma et al. 2024, arXiv:2401.03048).

Blocks are PixArt-α's (`models/text_dit.py`) and spatial and temporal in turn, as `alternate` of
`models/video.py`. All share the six vectors of the time. The tokens of every frame attend to the
text in the spatial blocks alone. The depth L counts all blocks.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from ditjax.config import key
from ditjax.errors import UserError
from ditjax.models import dit, mup, text_dit
from ditjax.models.embed import ANYWHERE, Placement
from ditjax.models.network import Attention, Conditions, Inputs, Network, NetworkCost
from ditjax.models.text_dit import (
    TEXT_KINDS,
    TEXT_RULES,
    TextBlock,
    TextConditioning,
    TextDiT,
    TextDiTKeys,
)
from ditjax.models.video import BlockPair, Cut, VideoDiT, untubelets


@dataclass(frozen=True)
class TextVideoKeys(TextDiTKeys):
    """The keys of `config.model` for a DiT of clips and texts: those of a DiT of texts."""

    kind: str = key("text_video")


def _images(inputs: Inputs) -> Inputs:
    """The inputs of one frame."""
    return inputs._replace(shape=inputs.shape[-3:])


def _frames(k: TextVideoKeys, inputs: Inputs) -> Cut:
    """The frames of a clip and the places of one; an image is one frame."""
    return Cut(math.prod(inputs.shape[:-3]), dit.shape(k, _images(inputs)).tokens)


def check(k: TextVideoKeys, inputs: Inputs) -> None:
    """Raise UserError if the network cannot process its inputs."""
    text_dit.check(k, _images(inputs))
    depth = dit.parse_size(k.size).depth
    if depth % 2:
        raise UserError(
            f"config.model.size is {k.size!r}, of {depth} blocks: a DiT of clips and texts has as"
            " many spatial as temporal ones; expected an even depth."
        )
    for name, value, wanted in (
        ("size_condition", k.size_condition, 0),
        ("vector_tokens", k.vector_tokens, 0),
        ("rope", k.rope, False),
        ("attention_window", k.attention_window, 0),
        ("attention_hops", k.attention_hops, 0),
    ):
        if value != wanted:
            raise UserError(
                f"config.model.{name} is {value!r}, which a DiT of clips and texts"
                f" (config.model.kind=text_video) does not have: leave it at {wanted!r}."
            )


# ---- cost


def cost(k: TextVideoKeys, inputs: Inputs) -> NetworkCost:
    """The cost of a recipe's network for one clip, counted as `text_dit.text_macs`."""
    frame = _images(inputs)
    s, c = dit.shape(k, frame), _frames(k, inputs)
    (L, D, _), N, M = s.size, c.tokens, inputs.context.tokens
    spatial = text_dit.text_block_macs(s, N, c.places, M)
    temporal = text_dit.text_block_macs(s, N, c.frames, None)
    macs = L // 2 * (spatial + temporal) + text_dit.text_ends_macs(k, frame, N)
    attended = sum(dit.attention_macs(s, N, keys) for keys in (c.places, c.frames))
    repeated = {"none": 0, "dots": L // 2 * (attended + 2 * N * M * D), "full": macs}
    return NetworkCost(
        name=f"TextVideo-{k.size}/{k.patch}",
        # Temporal blocks have no cross-attention.
        parameters=text_dit.parameters(k, frame) - L // 2 * (4 * D * D + 4 * D),
        macs=macs,
        training_macs=repeated[k.remat],
        tokens=N,
        description={**dit.description(k, N, text_tokens=M), "block": "text", "frames": c.frames},
    )


# ---- the module


class SpatialTextBlock(TextBlock):
    """`TextBlock` of tokens [B,F,S,D]: attention stays within a frame, all frames see the text."""

    @nn.nowrap
    def crossed(self, x: jax.Array, cond: TextConditioning) -> jax.Array:
        whole = x.reshape(x.shape[0], -1, x.shape[-1])
        return super().crossed(whole, cond).reshape(x.shape)


class TemporalTextBlock(TextBlock):
    """`TextBlock` without a text, of the frames of a place."""

    crosses: ClassVar[bool] = False


class TextVideoDiT(TextDiT, VideoDiT):
    """x f32[B,F,H,W,C], t [B], context f32[B,M,C_t], context_mask bool[B,M] -> f32[B,F,H,W,out].

    The fields are those of both networks.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, conditions: Conditions, per_block: Any = None
    ) -> jax.Array:
        if per_block is not None:
            raise ValueError("a DiT of clips takes no per_block")
        e, cond = self._texts(t, conditions)
        clip = x if x.ndim == 5 else x[:, None]
        H, W = clip.shape[2:4]
        grid = (H // self.patch, W // self.patch)
        tokens = self._walk(self._embedded(clip, grid), cond, grid)
        out = untubelets(self._ended(tokens, e), 1, self.patch, H, W)
        return out.reshape(*x.shape[:-1], self.out_channels).astype(jnp.float32)

    @nn.nowrap
    def _pair(self, grid: tuple[int, int], run: bool) -> nn.Module:
        spatial, temporal = (
            self._block(grid, kind) for kind in (SpatialTextBlock, TemporalTextBlock)
        )
        return BlockPair(spatial, self.place, run, temporal, name="blocks")


def module(k: TextVideoKeys, inputs: Inputs, place: Placement = ANYWHERE) -> TextVideoDiT:
    """Build the denoiser of a recipe; its parameters do not depend on `place`."""
    plain = dit.module(replace(k, label_dropout=0.0), _images(inputs), place)
    made: TextVideoDiT = dit.with_fields_of(plain, TextVideoDiT, vector=inputs.vector)
    return made


def _attention(k: TextVideoKeys, inputs: Inputs) -> Attention:
    """The places, frames and heads that a mesh may split."""
    size, c = dit.parse_size(k.size), _frames(k, inputs)
    return Attention(c.places, 0, size.heads, size.width // size.heads, frames=c.frames)


_KINDS: mup.Kinds = ((r"blocks/(spatial|temporal)/table", "vector"), *TEXT_KINDS)

NETWORK = Network(
    keys=TextVideoKeys,
    module=module,
    cost=cost,
    check=check,
    attention=_attention,
    kernel=lambda k: k.attention,
    rules=TEXT_RULES,
    rates=functools.partial(dit.rates, kinds=_KINDS),
    varied=("size", "patch"),
    inherited=dit.INHERITED,
    stack="blocks",
    clips=True,
    texts=True,
)
