"""DiT: patchify -> position -> L blocks -> final layer -> unpatchify (DiT Fig. 3).

This module defines everything about the network: its keys and sizes, the Linen module, its cost in
closed form, the sharding rules of its parameters, and the scaling of their learning rates by width.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ditjax.config import Config, Rule, above, at_most, key, non_negative, positive
from ditjax.errors import UserError, divisors, nearest
from ditjax.models import grafting, mup
from ditjax.models.attention import (
    Window,
    attention_weights,
    autodiff_attend,
    diffused_attend,
    key_bias,
    rotated,
)
from ditjax.models.blocks import (
    BLOCKS,
    LAYER_NORM_EPS,
    NORMS,
    AffineLayerNorm,
    Block,
    BlockConfig,
    Conditioning,
    Modulation,
)
from ditjax.models.blocks import modulate as modulate_tokens
from ditjax.models.embed import (
    ANYWHERE,
    TIMESTEP_FREQUENCIES,
    Attend,
    LabelEmbedder,
    Linear,
    Placement,
    TimestepEmbedder,
    patchify,
    sincos_position_embedding,
    unpatchify,
    xavier_uniform,
)
from ditjax.models.frozen import LM, LanguageBlock, LanguageLayers
from ditjax.models.network import (
    DTYPES,
    AnyArray,
    Attention,
    Branch,
    Conditions,
    ControlSeam,
    Denoiser,
    Hook,
    Inputs,
    InspectionSeam,
    Network,
    NetworkCost,
    Rules,
    Taps,
)

# ---- sizes and keys


class Size(NamedTuple):
    """Layers L, hidden width D and attention heads of a transformer."""

    depth: int
    width: int
    heads: int


# DiT Table 1.
PAPER_SIZES = {
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
}
PAPER_PATCHES = (8, 4, 2)

_EXPLICIT = re.compile(r"(\d{1,4})x(\d{1,6})x(\d{1,4})")


def parse_size(name: str) -> Size:
    """'XL' -> Size(28, 1152, 16); other sizes are depth x width x heads, such as '4x96x3'.

    Raises UserError for an unknown name, a zero, or a width that the heads or 4 do not divide.
    """
    if name in PAPER_SIZES:
        return PAPER_SIZES[name]
    match = _EXPLICIT.fullmatch(name)
    if match is None:
        raise UserError(
            f"model size {name!r} is unknown: expected one of {', '.join(PAPER_SIZES)}"
            f" or depth x width x heads such as '4x96x3'.{nearest(name, PAPER_SIZES)}"
        )
    size = Size(*(int(group) for group in match.groups()))
    if min(size) < 1:
        raise UserError(f"model size {name!r}: depth, width and heads must each be at least 1.")
    if size.width % size.heads:
        raise UserError(
            f"model size {name!r}: width {size.width} is not divisible by {size.heads} heads;"
            f" the nearest width that is: {max(1, round(size.width / size.heads)) * size.heads}."
        )
    if size.width % 4:
        raise UserError(
            f"model size {name!r}: width {size.width} is not divisible by 4, which the 2-D sin-cos"
            f" position embedding needs; the next width that is: {size.width + 4 - size.width % 4}."
        )
    return size


def _is_size(name: str) -> bool:
    parse_size(name)  # raises an error with a better message
    return True


def _grown(k: "DiTKeys", factor: float) -> tuple["DiTKeys", float]:
    """The keys of a DiT about `factor` times as deep and wide, and its width over that of `k`.

    A head keeps its width, or nearly so: heads are whole, and widths multiples of 4.
    """
    depth, width, heads = parse_size(k.size)
    more = max(1, round(heads * factor))
    unit = more * 4 // math.gcd(more, 4)
    wider = max(1, round(width * factor / unit)) * unit
    size = f"{max(1, round(depth * factor))}x{wider}x{more}"
    return dataclasses.replace(k, size=size), wider / width


@dataclass(frozen=True)
class DiTKeys(Denoiser):
    """The keys of `config.model` for a DiT."""

    # 'S', 'B', 'L', 'XL' or depth x width x heads: '4x96x3'
    size: str = key("XL", Rule(_is_size, "a model size"))
    patch: int = positive(2)
    block: Literal["adaln_zero", "adaln", "cross_attention", "in_context"] = key("adaln_zero")
    mlp_ratio: float = key(4.0, above(0), at_most(64))
    remat: Literal["none", "dots", "full"] = key("none", free=True)
    # auto: the fastest of the backend
    attention: Literal["auto", "plain", "cudnn", "flash"] = key("auto", free=True)
    unroll: int = positive(1, free=True)  # blocks per scan step; at least the depth: no loop
    # Public implementations differ in these: the release uses 0 and 1e-6, diffusers 1 and 1e-5.
    frequency_shift: Literal[0, 1] = key(0)  # timestep frequencies exp(-ln 10^4 i / (128 - shift))
    norm2_eps: float = key(1e-6, above(0))  # of the LayerNorm before a block's MLP
    # Blocks since the paper, off by default: today's tree and step are unchanged without them.
    norm: Literal["layer", "rms"] = key("layer")
    mlp: Literal["gelu", "swiglu"] = key("gelu")  # swiglu has 3 products: mlp_ratio 8/3 costs as 4
    qk_norm: bool = key(False)  # RMSNorm of queries and keys
    rope: bool = key(False)  # rotary positions, beside the sin-cos embedding
    # A token attends to those at most so many rows and columns away; 0 = to all. Its values travel
    # so many hops, at each of which (1 - alpha) of them moves on (`attention.diffused_attend`).
    attention_window: int = non_negative(0, most=64)
    attention_hops: int = non_negative(0, most=1024)  # 0 = plain attention
    attention_alpha: float = key(0.15, above(0), at_most(1))
    # Representation alignment (tasks/alignment.py): a projector of the tokens after this block,
    # which only training evaluates; 0 = none. Its hidden width, and that of the teacher's features.
    align_block: int = non_negative(0)
    align_width: int = positive(2048)
    align_features: int = positive(768)
    # Tokens a side whose positions these tokens span: those of the base of another resolution.
    position_grid: int = non_negative(0, most=1024)  # 0 = their own
    # mup: initial weights, learning rates and attention logits scale with width, so that the best
    # learning rate at base_width and base_head_width is the best at any width (`models/mup.py`).
    parametrization: Literal["standard", "mup"] = key("standard")
    base_width: int = positive(384)
    base_head_width: int = positive(64)

    @property
    def stride(self) -> int:
        return self.patch

    def unused(self, name: str, c: Config) -> str:
        if name in ("align_width", "align_features") and not self.align_block:
            return "model.align_block"
        if name == "attention_alpha" and not self.attention_hops:
            return "model.attention_hops"
        standard = self.parametrization == "standard" and name in ("base_width", "base_head_width")
        return "model.parametrization" if standard else ""


_MAX_TOKENS = 2**20


def check(k: DiTKeys, inputs: Inputs) -> None:
    """Raise UserError if the network cannot process its inputs."""
    H, W, _ = inputs.shape
    if H % k.patch or W % k.patch:
        raise UserError(
            f"config.model.patch is {k.patch}: it does not divide the {H}x{W} input; sizes that do:"
            f" {', '.join(map(str, divisors(H)))}."
        )
    if (tokens := shape(k, inputs).tokens) > _MAX_TOKENS:
        raise UserError(
            f"an input of {H}x{W} with config.model.patch={k.patch} has {tokens} tokens; expected"
            f" at most {_MAX_TOKENS}."
        )
    size = parse_size(k.size)
    width = size.width
    if k.align_block > size.depth:
        raise UserError(
            f"config.model.align_block is {k.align_block}, and the network has {size.depth} blocks:"
            f" expected 1 to {size.depth}, or 0 for none."
        )
    if inputs.interval and k.block == "cross_attention":
        raise UserError(
            "config.model.block is 'cross_attention', and config.diffusion.loss needs forward"
            " derivatives of the network, which this block lacks: choose another block."
        )
    if inputs.interval and k.attention not in ("auto", "plain"):
        raise UserError(
            f"config.model.attention is {k.attention!r}, and config.diffusion.loss needs forward"
            " derivatives of the network, which this kernel lacks: set it to 'auto' or 'plain'."
        )
    _check_attention(k, inputs)
    if k.norm != "layer" and k.block not in ("adaln", "adaln_zero"):
        raise UserError(
            f"config.model.norm is {k.norm!r} with block {k.block!r}, whose norms are LayerNorms"
            " with an affine: set block 'adaln_zero' or 'adaln', or norm 'layer'."
        )
    if k.rope and (width // size.heads) % 4:
        raise UserError(
            f"config.model.rope with heads of width {width // size.heads}: expected a multiple of"
            " 4, half for rows and half for columns, in pairs; change the heads of the size."
        )
    if k.rope and k.position_grid:
        raise UserError(
            f"config.model.position_grid is {k.position_grid} with rope, whose rotations are not"
            " interpolated: leave one of them out."
        )
    if int(width * k.mlp_ratio) < 1:
        raise UserError(
            f"config.model.mlp_ratio is {k.mlp_ratio}: with width {width}, the MLP would have no"
            " hidden unit; increase it."
        )


def _check_attention(k: DiTKeys, inputs: Inputs) -> None:
    """Raise UserError for a window or hops that the network cannot have."""
    name = "attention_window" if k.attention_window else "attention_hops"
    if not getattr(k, name):
        return
    said = f"config.model.{name} is {getattr(k, name)}"
    if k.attention not in ("auto", "plain"):
        raise UserError(
            f"{said}, and config.model.attention {k.attention!r}, a kernel that has neither windows"
            " nor hops: set it to 'auto' or 'plain'."
        )
    if not k.attention_window:
        return
    if k.block == "in_context":
        raise UserError(
            f"{said} with block 'in_context', whose tokens of time and label have no place on the"
            " grid: choose another block, or set the window to 0."
        )
    rows, columns = inputs.shape[0] // k.patch, inputs.shape[1] // k.patch
    if (2 * k.attention_window + 1) ** 2 >= rows * columns:
        raise UserError(
            f"{said}: its (2r + 1)² = {(2 * k.attention_window + 1) ** 2} places cost as much as"
            f" attention to all {rows}x{columns} tokens; expected fewer places, or 0 for all."
        )


# ---- cost


class Shape(NamedTuple):
    """Everything that a DiT's cost depends on. `input_size` is the side of x, latent or pixels."""

    size: Size
    patch: int
    input_size: int
    in_channels: int
    out_channels: int
    num_classes: int
    null_label: bool = True
    block: str = "adaln_zero"
    mlp_ratio: float = 4.0
    mlp: str = "gelu"
    qk_norm: bool = False
    projector: tuple[int, int] = (0, 0)  # its hidden and its output width; 0 = none
    interval: bool = False  # a second time
    level: bool = False  # of the noise in given channels
    window: int = 0
    hops: int = 0

    @property
    def tokens(self) -> int:
        """N = (I / p)² (DiT Sec. 3.2)."""
        return (self.input_size // self.patch) ** 2

    @property
    def mlp_width(self) -> int:
        """r·D."""
        return int(self.size.width * self.mlp_ratio)


def paper_shape(size: Size, patch: int, resolution: int = 256) -> Shape:
    """A model of the paper: latents of side resolution/8, 4 channels in, 8 out, 1,000 classes."""
    return Shape(size, patch, resolution // 8, in_channels=4, out_channels=8, num_classes=1000)


# Number of width-D vectors that a block, or the final layer, regresses from the conditioning.
_BLOCK_MODULATIONS = {"in_context": 0, "cross_attention": 0, "adaln": 4, "adaln_zero": 6}
_FINAL_MODULATIONS = {"in_context": 0, "cross_attention": 0, "adaln": 2, "adaln_zero": 2}


# Hidden vectors that an MLP's first product computes.
_MLP_INPUTS = {"gelu": 1, "swiglu": 2}


def block_parameters(s: Shape) -> int:
    """Of one block."""
    D = s.size.width
    attention = (3 * D * D + 3 * D) + (D * D + D)
    ins = _MLP_INPUTS[s.mlp] * s.mlp_width
    mlp = (D * ins + ins) + (s.mlp_width * D + D)
    block = attention + mlp + _BLOCK_MODULATIONS[s.block] * (D * D + D)
    block += 2 * (D // s.size.heads) * s.qk_norm
    if s.block in ("in_context", "cross_attention"):
        block += 2 * 2 * D  # scale and bias of two LayerNorms
    if s.block == "cross_attention":
        block += 4 * (D * D + D)  # q, k, v, output
    return block


def trainable_parameters(s: Shape) -> int:
    """The number of trainable weights and biases, without the frozen position table."""
    L, D, _ = s.size
    final = _FINAL_MODULATIONS[s.block] * (D * D + D)
    final += 2 * D * (s.block in ("in_context", "cross_attention"))
    patch_in, patch_out = s.patch**2 * s.in_channels, s.patch**2 * s.out_channels
    times = (1 + s.interval + s.level) * ((TIMESTEP_FREQUENCIES * D + D) + (D * D + D))
    embed = (patch_in * D + D) + times
    embed += (s.num_classes + int(s.null_label)) * D
    if s.projector[0]:
        W, Z = s.projector
        embed += (D * W + W) + (W * W + W) + (W * Z + Z)
    return L * block_parameters(s) + embed + final + (D * patch_out + patch_out)


def block_macs(s: Shape, tokens: int, keys: int) -> int:
    """Of one block and its norms on so many tokens, each of which attends to `keys` of them."""
    D, N, M = s.size.width, tokens, tokens
    if s.block == "in_context":
        M, keys = N + 2, keys + 2  # inside the stack
    block = (
        4 * M * D * D + attention_macs(s, M, keys) + (_MLP_INPUTS[s.mlp] + 1) * M * D * s.mlp_width
    )
    block += _BLOCK_MODULATIONS[s.block] * D * D
    norms = 4 if s.qk_norm else 2
    if s.block == "cross_attention":
        block += 2 * N * D * D + 2 * 2 * D * D + 2 * N * 2 * D  # q and output; k and v; scores
        norms += 1
    return block + norms * M * D


def attention_macs(s: Shape, tokens: int, keys: int) -> int:
    """Of the products of self-attention: NMD(1 + K) for K sums of values, by default one.

    M are the `keys` of a token, or the (2r + 1)² places of its window.
    """
    seen = (2 * s.window + 1) ** 2 if s.window else keys
    return tokens * seen * s.size.width * (1 + max(1, s.hops))


def forward_macs(s: Shape) -> int:
    """Multiply-accumulates of one forward pass of one sample, elements of norms included.

    Other elementwise work, such as GELU, gating and rotations, is not counted, as in the paper.

    adaLN-Zero: L(12ND² + 2N²D + 6D²) + p²C·ND + (FD + D²) + 2D² + p²K·ND + (2L+1)·ND for r = 4.
    """
    N = s.tokens
    return s.size.depth * block_macs(s, N, N) + ends_macs(s, N)


def ends_macs(s: Shape, tokens: int) -> int:
    """Of the embeddings and the final layer, for one sample of so many tokens."""
    D, N = s.size.width, tokens
    times = (1 + s.interval + s.level) * (TIMESTEP_FREQUENCIES * D + D * D)
    embed = s.patch**2 * s.in_channels * N * D + times
    final = _FINAL_MODULATIONS[s.block] * D * D + s.patch**2 * s.out_channels * N * D
    return embed + final + N * D


def projector_macs(s: Shape) -> int:
    """Multiply-accumulates of the projector for one sample: N(DW + W² + WZ). Training alone."""
    W, Z = s.projector
    return s.tokens * (s.size.width * W + W * W + W * Z)


def gflops(s: Shape) -> float:
    """The paper's Gflops: `forward_macs` / 10⁹."""
    return forward_macs(s) / 1e9


def shape(k: DiTKeys, inputs: Inputs) -> Shape:
    """The `Shape` of a recipe's DiT."""
    H, _, C = inputs.shape
    return Shape(
        size=parse_size(k.size),
        patch=k.patch,
        input_size=H,
        in_channels=C + inputs.given,
        out_channels=inputs.out_channels,
        num_classes=inputs.num_classes,
        null_label=k.label_dropout > 0,
        block=k.block,
        mlp_ratio=k.mlp_ratio,
        mlp=k.mlp,
        qk_norm=k.qk_norm,
        projector=(k.align_width, k.align_features) if k.align_block else (0, 0),
        interval=inputs.interval,
        level=inputs.level,
        window=k.attention_window,
        hops=k.attention_hops,
    )


def cost(k: DiTKeys, inputs: Inputs) -> NetworkCost:
    """The cost of a recipe's DiT."""
    s = shape(k, inputs)
    L = s.size.depth
    tokens = s.tokens + (2 if s.block == "in_context" else 0)
    attention = L * attention_macs(s, tokens, tokens)
    # 'full' repeats the whole forward pass of the blocks, 'dots' the products of attention.
    repeated = {"none": 0, "dots": attention, "full": forward_macs(s)}[k.remat]
    # A forward derivative costs the products again, and those of two activations twice.
    passes = 4 + attention / forward_macs(s) if s.interval else 3.0
    return NetworkCost(
        name=f"DiT-{k.size}/{k.patch}",
        parameters=trainable_parameters(s),
        macs=forward_macs(s),
        training_macs=repeated + 3 * projector_macs(s),
        passes=passes,
        tokens=s.tokens,
        description=description(k, s.tokens),
    ).with_language(inputs.language, s.tokens, s.size.width)


def description(k: DiTKeys, tokens: int, **own: Any) -> dict[str, Any]:
    """Build `NetworkCost.description`, with what a network has of its own."""
    sizes = {"size": k.size, **parse_size(k.size)._asdict(), "patch": k.patch}
    return {**sizes, **own, "block": k.block, "tokens": tokens}


# ---- the module


# What a block stores for its backward pass: everything, nothing, or the products with weights.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class FinalLayer(nn.Module):
    """Norm (adaptive in the adaLN variants) -> Linear(D, p²·C_out), zero weights and bias."""

    out_features: int
    block: str
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE
    norm: str = "layer"

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        if self.block in ("adaln", "adaln_zero"):
            zero = self.block == "adaln_zero"
            shift, scale = Modulation(2, zero, self.dtype, self.place, name="adaln")(c)
            x = modulate_tokens(NORMS[self.norm](x), shift, scale)
        else:
            x = AffineLayerNorm(name="norm")(x)
        zeros = nn.initializers.zeros
        return Linear(self.out_features, zeros, self.dtype, self.place, name="linear")(x)


class Projector(nn.Module):
    """REPA's MLP, token by token: Linear(D, W) -> SiLU -> Linear(W, W) -> SiLU -> Linear(W, Z)."""

    width: int
    features: int
    base_width: int
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D, put = x.shape[-1], self.place.put
        # An output layer in μP, whose initial weights are not zero: their deviation is 1 / r of the
        # base's. This fan-out gives it.
        fan_out = (self.base_width + self.width) * (D / self.base_width) ** 2 - D
        init = functools.partial(xavier_uniform, fan_out=round(fan_out))
        h = Linear(self.width, init, self.dtype, self.place, name="in")(x)
        h = nn.silu(put("hidden", h))
        h = Linear(self.width, dtype=self.dtype, place=self.place, name="middle")(h)
        h = nn.silu(put("tokens", h))
        return put(
            "tokens", Linear(self.features, dtype=self.dtype, place=self.place, name="out")(h)
        )


def given_channels(conditions: Conditions, channels: int) -> jax.Array:
    """The channels that are given beside x. Raises ValueError for others than the network has."""
    found = conditions.channels
    if found is None or found.shape[-1] != channels:
        shape = None if found is None else list(found.shape)
        raise ValueError(f"channels are {shape}: this network needs {channels} of them")
    return jnp.asarray(found)


class DiT(nn.Module):
    """x f32[B,H,W,C], t i32[B], label i32[B] -> f32[B,H,W,out_channels].

    `out_channels` is C, or 2C with the variance fraction in [C:2C]. The parameters of the L blocks
    are stacked on a leading axis, whether the blocks are scanned (`unroll=1`: fast to compile) or
    unrolled (`unroll=L`: fast on CPUs); any `unroll` is valid. With `null_label`, a label may be
    `num_classes`, the null label. `place` says where a mesh has the activations. `base` sets the
    initialisation and the scale of attention as in `models/mup.py`. After each block, `hook` maps
    its tokens and its slice of `per_block`, whose arrays have a leading axis of L, to new tokens.
    With `interval`, a second embedding, of h = t - r, is added to that of t f32[B]. `given` counts
    the channels that are concatenated to x; with `level` an embedding of their noise, which is zero
    at first, is added, too. `language`: layers of a language model behind the blocks.

    With `align_block`, the tokens [B,N,D] after that block are sown as `tapped`, and what the
    projector makes of them as `aligned`, if the collection "intermediates" is mutable. Elsewhere
    neither is computed.
    """

    depth: int
    width: int
    heads: int
    patch: int
    out_channels: int
    num_classes: int
    null_label: bool = True
    block: str = "adaln_zero"
    mlp_ratio: float = 4.0
    unroll: int = 1
    remat: str = "none"
    frequency_shift: int = 0
    norm2_eps: float = LAYER_NORM_EPS
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE
    norm: str = "layer"
    mlp: str = "gelu"
    qk_norm: bool = False
    rope: bool = False
    position_grid: int = 0
    base: mup.Base | None = None
    hook: Hook | None = None
    align_block: int = 0
    projector: tuple[int, int] = (0, 0)  # hidden and output width
    interval: bool = False
    given: int = 0
    level: bool = False
    language: LanguageLayers | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, conditions: Conditions, per_block: Any = None
    ) -> jax.Array:
        doors = {"interval": self.interval, "channels": self.given, "level": self.level}
        conditions.only("label", *(name for name, has in doors.items() if has))
        if per_block is not None and self.hook is None:
            raise ValueError("per_block is given to a DiT without a hook")
        label = conditions.label
        if label is None:
            raise ValueError("a DiT needs a label: use the null label for unconditional outputs")
        if self.given:
            x = jnp.concatenate([x, given_channels(conditions, self.given)], axis=-1)
        _, H, W, _ = x.shape
        if H % self.patch or W % self.patch:
            raise UserError(
                f"an input of {H}x{W} is not divisible into patches of {self.patch}:"
                f" choose a patch size that divides both."
            )
        cond = self._conditioning(t, label, conditions.interval, conditions.level)
        tokens = self._embedder()(x)
        N, grid = tokens.shape[1], (H // self.patch, W // self.patch)

        if self.block == "in_context":
            tokens = jnp.concatenate([tokens, cond.context], axis=1)
        tokens, tapped = self._stack(tokens, cond, per_block, grid)
        tokens = tokens[:, :N]
        if tapped is not None:
            self._align(tapped[:, :N])
        tokens = self._after_blocks(tokens)

        return self._end(tokens, cond, H, W)

    @nn.nowrap
    def _after_blocks(self, tokens: jax.Array) -> jax.Array:
        """The layers of a language model, if there are any, on tokens [B,..,D]."""
        if self.language is None:
            return tokens
        return LanguageBlock(self.language, self.dtype, name=LM)(tokens)

    @nn.nowrap
    def _end(self, tokens: jax.Array, cond: Conditioning, H: int, W: int) -> jax.Array:
        """The final layer on tokens [B,N,D] -> [B,H,W,out_channels]."""
        out = self._final(self.patch**2 * self.out_channels)(tokens, cond.vector)
        return unpatchify(out, self.patch, H, W).astype(jnp.float32)

    @nn.nowrap
    def _final(self, features: int) -> FinalLayer:
        """The final layer, of so many values a token."""
        args = (features, self.block, self.dtype, self.place, self.norm)
        return FinalLayer(*args, name="final_layer")

    @nn.nowrap
    def _conditioning(
        self, t: jax.Array, label: Any, h: AnyArray | None = None, level: AnyArray | None = None
    ) -> Conditioning:
        """The embedded times and labels."""
        put = self.place.put
        if self.language and self.language.timeless:
            t = jnp.zeros_like(t)
        t_emb = self._embed_times(t, h)
        if self.level:
            if level is None:
                raise ValueError("a network that was trained on noisy channels needs their level")
            embed = TimestepEmbedder(
                self.width, self.frequency_shift, self.dtype, out_std=0.0, name="s_embedder"
            )
            t_emb = t_emb + embed(jnp.asarray(level))
        y_emb = LabelEmbedder(
            self.num_classes, self.width, self.null_label, self.dtype, name="y_embedder"
        )(label)
        t_emb, y_emb = put("conditioning", t_emb), put("conditioning", y_emb)
        context = jnp.stack([put("row", t_emb), put("row", y_emb)], axis=1)
        return Conditioning(vector=t_emb + y_emb, context=put("context", context))

    @nn.nowrap
    def _embedder(self) -> Callable[[jax.Array], jax.Array]:
        """The embedding of x [B,H,W,C] as tokens [B,N,D] with their positions."""
        embed = self._patches()

        def tokens_of(x: jax.Array) -> jax.Array:
            H, W = x.shape[1:3]
            grid = (H // self.patch, W // self.patch)
            tokens = self.place.put("tokens", embed(patchify(x, self.patch)))
            position = sincos_position_embedding(self.width, *grid, self.position_grid)
            return tokens + jnp.asarray(position, self.dtype)[None]

        return tokens_of

    @nn.nowrap
    def _patches(self) -> Linear:
        """The embedding of the values of a token."""
        init = functools.partial(xavier_uniform, fan_out=self._base().width)
        return Linear(self.width, init, self.dtype, self.place, name="x_embedder")

    @nn.nowrap
    def _block(
        self, grid: tuple[int, int], kind: type[Block] | None = None
    ) -> Callable[..., nn.Module]:
        """A block, by default of the key `block`, but for its name."""
        block = kind or BLOCKS[self.block]
        if self.remat != "none":
            # prevent_cse is not needed inside a scan.
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        config = BlockConfig(
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            norm2_eps=self.norm2_eps,
            dtype=self.dtype,
            place=self.place,
            query_scale=mup.query_scale(self._base(), self.width // self.heads),
            norm=self.norm,
            mlp=self.mlp,
            qk_norm=self.qk_norm,
            rope=grid if self.rope else None,
        )
        return functools.partial(block, config)

    @nn.nowrap
    def _embed_times(self, t: jax.Array, h: AnyArray | None) -> jax.Array:
        """The embedding of t, and with `interval` that of h = t - r beside it; no h is 0."""
        embedder = functools.partial(
            TimestepEmbedder,
            self.width,
            self.frequency_shift,
            self.dtype,
            out_std=0.02 * (self._base().width / self.width) ** 0.5,
        )
        t_emb = embedder(name="t_embedder")(t)
        if not self.interval:
            return t_emb
        h = jnp.zeros_like(t) if h is None else jnp.asarray(h)
        return t_emb + embedder(name="h_embedder")(h)

    def _align(self, tapped: jax.Array) -> None:
        """Sow the tapped tokens and their projection."""
        width = self._base().width
        projector = Projector(*self.projector, width, self.dtype, self.place, name="projector")
        for name, value in (("tapped", tapped), ("aligned", projector(tapped))):
            self.sow("intermediates", name, value)

    def _stack(
        self, tokens: jax.Array, cond: Conditioning, per_block: Any, grid: tuple[int, int]
    ) -> tuple[jax.Array, jax.Array | None]:
        """The L blocks as one scan over stacked parameters, and the tokens that are tapped.

        The tap is carried along: slices of the stacked parameters, for one scan before it and one
        behind, would be copies of them.
        """
        taps = self.align_block and (
            self.is_initializing() or self.is_mutable_collection("intermediates")
        )
        here = np.arange(self.depth) == self.align_block - 1 if taps else None

        def body(
            module: nn.Module, carry: Any, cond: Conditioning, inputs: Any
        ) -> tuple[Any, None]:
            (tokens, tapped), (hook_input, here) = carry, inputs
            tokens = self.place.put("tokens", module(tokens, cond))
            tokens = tokens if self.hook is None else self.hook(tokens, hook_input)
            return (tokens, tapped if here is None else jnp.where(here, tokens, tapped)), None

        scan = self._scan(self.depth, over=(nn.broadcast, 0))(body)
        carry = (tokens, jnp.zeros_like(tokens) if taps else None)
        return scan(self._block(grid)(name="blocks"), carry, cond, (per_block, here))[0]

    @nn.nowrap
    def _scan(self, length: int, over: Any = nn.broadcast) -> Callable[..., Any]:
        """Build a loop over blocks of stacked parameters."""
        return functools.partial(
            nn.scan,
            # The results of `capture_intermediates` are stacked as the parameters are.
            variable_axes={"params": 0, "intermediates": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=over,
            length=length,
            unroll=min(self.unroll, length),
        )

    def _base(self) -> mup.Base:
        return self.base or mup.Base(self.width, self.width // self.heads)


class CopiedBlock(nn.Module):
    """A copied block and the zero-initialised layer of its residual -> tokens, residual [B,N,D]."""

    block: Callable[..., nn.Module]
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, tokens: jax.Array, cond: Conditioning) -> tuple[jax.Array, jax.Array]:
        put, zeros = self.place.put, nn.initializers.zeros
        tokens = put("tokens", self.block(name="block")(tokens, cond))
        out = Linear(tokens.shape[-1], zeros, self.dtype, self.place, name="out")(tokens)
        return tokens, put("tokens", out)


class ControlBranch(DiT):
    """What a control image adds to the tokens after each block (Zhang et al. 2023, Eq. 2-3).

    x, t, conditions (label and, as channels, the control f32[B,h,w,K]) -> residuals [L,B,N,D], the
    `per_block` of a DiT that adds them. The first `copies` blocks are copied; their parameters are
    `copies`, and those of the image `in`. Its embedders are the base's, x_embedder, t_embedder and
    y_embedder, and for `pixart` the base's first block is `first`. Its own `per_block` f32[copies]
    multiplies the residuals by depth.

    `sd3`, as in Stable Diffusion 3: the copies read the tokens and the control, which has a patch
    embedding of its own; after block j of L comes residual ⌊jN/L⌋. `pixart`, as in PixArt-δ (Chen
    et al. 2024): the control is embedded as x is, the copies read it and the output of the first
    block; residual i comes after block i.
    """

    copies: int = 1
    form: str = "sd3"

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, conditions: Conditions, per_block: Any = None
    ) -> jax.Array:
        conditions.only("label", "channels")
        control = jnp.asarray(conditions.channels)
        grid = (x.shape[1] // self.patch, x.shape[2] // self.patch)
        cond, embed = self._conditioning(t, conditions.label), self._embedder()
        tokens, zeros = embed(x), nn.initializers.zeros
        zero = Linear(self.width, zeros, self.dtype, self.place, name="in")
        if self.form == "pixart":
            tokens = self._block(grid)(name="first")(tokens, cond) + zero(embed(control))
        else:
            # A control of a latent has more pixels, and as many patches.
            pixels = self.patch * control.shape[1] // x.shape[1]
            tokens = tokens + zero(patchify(control, pixels))
        copy = CopiedBlock(self._block(grid), self.dtype, self.place, name="copies")
        scan = self._scan(self.copies)(lambda module, tokens, cond: module(tokens, cond))
        _, residuals = scan(copy, self.place.put("tokens", tokens), cond)
        if per_block is not None:
            residuals = residuals * per_block[:, None, None, None].astype(residuals.dtype)
        if self.form == "pixart":
            return jnp.pad(residuals, ((0, self.depth - self.copies), *((0, 0),) * 3))
        return residuals[np.arange(self.depth) * self.copies // self.depth]


def control_branch(k: DiTKeys, inputs: Inputs, branch: Branch, place: Placement) -> ControlBranch:
    """Build the control branch of a recipe's DiT."""
    return with_fields_of(
        module(k, inputs, place), ControlBranch, copies=branch.copies, form=branch.form
    )


def with_fields_of(dit: DiT, kind: Any, **own: Any) -> Any:
    """A module of a kind that extends a DiT's, with the fields of the DiT and its own."""
    fields = {name: getattr(dit, name) for name in type(dit).__dataclass_fields__}
    return kind(**{**fields, **own, "parent": None, "name": None})


def control_variables(base: Any, control: Any) -> Any:
    """The variables of a branch: its own, and what it shares with the base."""
    first = jax.tree.map(lambda leaf: leaf[0], base["blocks"])
    return {"params": {**base, "first": first, **control}}


def check_branch(k: DiTKeys, inputs: Inputs, branch: Branch) -> None:
    """Raise UserError for a branch that the DiT cannot have."""
    depth, pixart = parse_size(k.size).depth, branch.form == "pixart"
    if not 1 <= branch.copies <= depth - pixart:
        raise UserError(
            f"config.control.blocks is {branch.copies}, and the network has {depth} blocks:"
            f" expected 1 to {depth - pixart}"
            + (", as the first one has no residual of form 'pixart'." if pixart else ".")
        )
    if k.block == "in_context":
        raise UserError(
            "config.model.block is 'in_context', whose blocks have tokens beside the image's: a"
            " control needs 'adaln_zero', 'adaln' or 'cross_attention'."
        )
    if inputs.interval:
        raise UserError(
            "config.diffusion.loss trains a network of two times, which a control branch does not"
            " read: choose another loss, or another config.adapt.kind than 'control'."
        )
    if pixart and branch.shape[-1] != inputs.shape[-1]:
        raise UserError(
            f"config.control.form is 'pixart' and the control has {branch.shape[-1]} channels,"
            f" where the network's own embedding reads {inputs.shape[-1]}: set it to 'sd3'."
        )


def branch_cost(k: DiTKeys, inputs: Inputs, branch: Branch) -> tuple[int, int]:
    """Parameters and multiply-accumulates of a branch, beside those of the network.

    N copies with D² + D of their zero layers each, and the embedding of the control. `pixart`
    evaluates the base's first block and embedding once more.
    """
    s = shape(k, inputs)
    D, tokens, copies = s.size.width, s.tokens, branch.copies
    features = D if branch.form == "pixart" else math.prod(branch.shape) // tokens
    parameters = copies * (block_parameters(s) + D * D + D) + features * D + D
    block = block_macs(s, tokens, tokens)
    macs = copies * (block + tokens * D * D) + tokens * features * D
    if branch.form == "pixart":
        macs += block + s.patch**2 * s.in_channels * tokens * D
    return parameters, macs


# ---- inspection


class Lens(DiT):
    """The layers behind the blocks, on the tokens x [B,N,D] of any block -> [B,*size,channels].

    The logit lens (nostalgebraist 2020) for a denoiser. Its parameters are those of the DiT.
    """

    size: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, conditions: Conditions, per_block: Any = None
    ) -> jax.Array:
        label = jnp.asarray(conditions.label)
        cond = self._conditioning(t, label, conditions.interval, conditions.level)
        return self._end(x, cond, *self.size)


def lens_of(
    k: DiTKeys,
    inputs: Inputs,
    place: Placement = ANYWHERE,
    *,
    build: Callable[..., DiT],
    kind: type[DiT] = Lens,
) -> Callable[..., jax.Array]:
    """Build `InspectionSeam.lens`, a module of a kind with the fields of what `build` builds."""
    lens = with_fields_of(build(k, inputs, place), kind, size=inputs.shape[:2])
    apply: Callable[..., jax.Array] = lens.apply
    return apply


# Field of `Taps` -> the modules whose outputs it is made of.
_TAPPED = {
    "tokens": ("blocks",),
    "branches": ("attn", "cross", "mlp"),
    "attention": ("qkv", "q_norm", "k_norm"),
    "crossed": ("q", "kv"),
}


def branches(k: DiTKeys) -> dict[str, str]:
    """The branches of a block: name -> its last linear layer."""
    cross = {"cross-attention": "cross/out"} if k.block == "cross_attention" else {}
    return {"attention": "attn/out", **cross, "mlp": "mlp/out"}


def reader_of(
    k: DiTKeys,
    inputs: Inputs,
    place: Placement = ANYWHERE,
    *,
    build: Callable[..., DiT],
    branches_of: Callable[[Any], Mapping[str, str]],
) -> Callable[..., tuple[jax.Array, Taps]]:
    """Build `InspectionSeam.read` of a network that `build` builds, by `capture_intermediates`."""
    # What the product of qkv yields is read with its tokens first.
    dit = build(k, inputs, dataclasses.replace(place, heads_first=False)).clone(align_block=0)
    N = shape(k, inputs).tokens

    def read(
        variables: Any, x: jax.Array, t: jax.Array, conditions: Conditions, *wanted: str
    ) -> tuple[jax.Array, Taps]:
        names = {name for each in wanted for name in _TAPPED[each]}
        result: Any = dit.apply(
            variables,
            x,
            t,
            conditions,
            capture_intermediates=lambda module, method: (
                method == "__call__" and module.name in names
            ),
            mutable=["intermediates"],
        )
        out, state = result
        if not names:
            return out, Taps()
        blocks = state["intermediates"]["blocks"]
        found = Taps()
        if "tokens" in wanted:
            found = found._replace(tokens=_captured(blocks)[:, :, :N])
        if "branches" in wanted:
            each = {
                name: _captured(blocks[layer.partition("/")[0]])[:, :, :N]
                for name, layer in branches_of(k).items()
            }
            found = found._replace(branches=each)
        if "attention" in wanted:
            found = found._replace(attention=_weights_of(k, inputs, blocks["attn"]))
        if "crossed" in wanted:
            weights = _crossed_weights(k, blocks["cross"], conditions.context_mask)
            found = found._replace(crossed=weights)
        return out, found

    return read


def _captured(module: Any) -> jax.Array:
    """The output of a module, which was evaluated once."""
    (found,) = module["__call__"]
    return found


def _weights_of(k: DiTKeys, inputs: Inputs, captured: Any) -> jax.Array:
    """The weights of self-attention f32[L,B,H,M,M], from what its products yield."""
    qkv = _captured(captured["qkv"])  # [L,B,M,3,H,d]
    L, B, M = qkv.shape[:3]
    q, key = (qkv[:, :, :, i].transpose(0, 1, 3, 2, 4) for i in range(2))
    if k.qk_norm:
        q, key = (_captured(captured[name]) for name in ("q_norm", "k_norm"))
    if k.rope:
        grid = (inputs.shape[0] // k.patch, inputs.shape[1] // k.patch)
        q, key = (rotated(x.reshape(L * B, *x.shape[2:]), *grid) for x in (q, key))
        q, key = (x.reshape(L, B, *x.shape[1:]) for x in (q, key))
    if attend := attend_of(k, inputs):
        # What attention makes of one-hot values are its weights.
        q, key = (x.reshape(L * B, *x.shape[2:]) for x in (q * query_factor(k), key))
        one_hot = jnp.broadcast_to(jnp.eye(M, dtype=jnp.float32), (*q.shape[:2], M, M))
        return attend(q, key, one_hot).reshape(L, B, *one_hot.shape[1:])
    return attention_weights(q, key, query_factor(k))


def _crossed_weights(k: DiTKeys, captured: Any, mask: AnyArray | None) -> jax.Array:
    """The weights of cross-attention f32[L,B,H,N,K]; a mask is of the last tokens of a context."""
    q, kv = (jnp.moveaxis(_captured(captured[name]), -2, 2) for name in ("q", "kv"))
    key = kv[:, :, :, :, 0]  # of [L,B,H,K,2,d]
    bias = None
    if mask is not None:
        others = key.shape[3] - mask.shape[-1]
        mask = jnp.pad(jnp.asarray(mask), ((0, 0), (others, 0)), constant_values=True)
        bias = key_bias(mask)[None]
    return attention_weights(q, key, query_factor(k), bias)


def patcher_of(
    k: DiTKeys,
    inputs: Inputs,
    place: Placement = ANYWHERE,
    *,
    build: Callable[..., DiT],
) -> Callable[..., jax.Array]:
    """Build `InspectionSeam.patch`. Tokens of conditions are never patched."""

    def hook(tokens: jax.Array, given: tuple[jax.Array, jax.Array]) -> jax.Array:
        mask, value = given
        extra = tokens.shape[1] - value.shape[1]
        mask = jnp.pad(mask, ((0, 0), (0, extra)))
        value = jnp.pad(value, ((0, 0), (0, extra), (0, 0)))
        return jnp.where(mask[:, :, None], value.astype(tokens.dtype), tokens)

    dit = build(k, inputs, place).clone(align_block=0, hook=hook)

    def patch(
        variables: Any,
        x: jax.Array,
        t: jax.Array,
        conditions: Conditions,
        mask: jax.Array,
        value: jax.Array,
    ) -> jax.Array:
        out: Any = dit.apply(variables, x, t, conditions, (mask, value))
        return out

    return patch


# ---- sharding rules and learning rates

# The first match wins; the specs are for the last axes of a leaf (a scanned stack adds a leading
# one). `fsdp` splits an axis that every product contracts or gathers whole. `tensor` follows
# Megatron (Shoeybi et al. 2019, Sec. 3): the first product of a pair is split by columns (whole
# heads in attention), with its bias; the second by rows, so that each pair needs one sum over
# `tensor`. adaLN's kernel is never gathered. The conditioning has B rows, not B·N, so it is moved
# instead: split by `fsdp` like the kernel's input, summed over it, and gathered over `tensor`. The
# "6" of adaLN and the "3" of qkv are separate axes, so that no split crosses them. All other biases
# have D numbers and are replicated.
RULES: Rules = (
    (r"x_embedder/kernel", (None, "fsdp")),
    (r"final_layer/linear/kernel", ("fsdp", None)),
    (r"qkv/kernel", ("fsdp", None, "tensor", None)),
    (r"qkv/bias", (None, "tensor", None)),
    (r"q/kernel", ("fsdp", "tensor", None)),
    (r"q/bias", ("tensor", None)),
    (r"kv/kernel", ("fsdp", None, "tensor", None)),
    (r"kv/bias", (None, "tensor", None)),
    (r"adaln/linear/kernel", ("fsdp", None, "tensor")),
    (r"adaln/linear/bias", (None, "tensor")),
    (r"mlp/gate_up/kernel", ("fsdp", None, "tensor")),
    (r"mlp/gate_up/bias", (None, "tensor")),
    (r"(mlp|[hst]_embedder)/in/kernel", ("fsdp", "tensor")),
    (r"(mlp|[hst]_embedder)/in/bias", ("tensor",)),
    (r"(attn|cross|mlp|[hst]_embedder)/out/kernel", ("tensor", "fsdp")),
    (r"y_embedder/table", (None, "fsdp")),
    (r"projector/in/kernel", ("fsdp", "tensor")),
    (r"projector/in/bias", ("tensor",)),
    (r"projector/middle/kernel", ("tensor", "fsdp")),
    (r"projector/out/kernel", ("fsdp", None)),
    (r"control/in/kernel", (None, "fsdp")),
    (r"copies/out/kernel", ("fsdp", None)),
    # Factors of adapters, a [S, D, r] and b [S, r, *features], are split as their kernel is.
    (r"(attn|cross|mlp|[hst]_embedder)/out/a", ("tensor", None)),
    (r"(attn|cross|mlp|[hst]_embedder)/out/b", (None, "fsdp")),
    (r"(qkv|q|kv)/b", (None, "tensor", None)),
    (r"mlp/(in|gate_up)/b", (None, "tensor")),
    (r"adaln/linear/b", (None, None, "tensor")),
    (r"x_embedder/a", (None, None)),
    (r"a", ("fsdp", None)),
)

# Exactly one pattern matches the path of each parameter.
KINDS: mup.Kinds = (
    (r"(x_embedder|[hst]_embedder/in)/kernel", "input"),
    (r"y_embedder/table", "input"),
    (r"(attn/(qkv|out)|cross/(q|kv|out)|mlp/(in|gate_up|out)|[hst]_embedder/out)/kernel", "hidden"),
    (r"adaln/linear/kernel", "hidden"),
    # Only the projector's first layer reads D numbers; the factors of a fixed layer are an input's.
    (r"(final_layer/linear|projector/in)/kernel", "output"),
    (r"projector/(middle|out)/kernel", "input"),
    (r"bias|scale", "vector"),
)


def attend_of(k: DiTKeys, inputs: Inputs) -> Attend | None:
    """The self-attention of a recipe's window and hops, or None for that of the devices."""
    if not (k.attention_window or k.attention_hops):
        return None
    grid = (inputs.shape[0] // k.patch, inputs.shape[1] // k.patch)
    return functools.partial(
        diffused_attend,
        hops=k.attention_hops or 1,
        alpha=k.attention_alpha if k.attention_hops else 0.0,
        window=Window(*grid, k.attention_window) if k.attention_window else None,
    )


def module(k: DiTKeys, inputs: Inputs, place: Placement = ANYWHERE) -> DiT:
    """Build the denoiser of a recipe; its parameters do not depend on `place`."""
    size = parse_size(k.size)
    attend = attend_of(k, inputs) or (autodiff_attend if inputs.interval else None)
    if attend:
        place = dataclasses.replace(place, attend=attend)
    return DiT(
        depth=size.depth,
        width=size.width,
        heads=size.heads,
        patch=k.patch,
        out_channels=inputs.out_channels,
        num_classes=inputs.num_classes,
        null_label=k.label_dropout > 0,
        block=k.block,
        mlp_ratio=k.mlp_ratio,
        unroll=k.unroll,
        remat=k.remat,
        frequency_shift=k.frequency_shift,
        norm2_eps=k.norm2_eps,
        dtype=DTYPES[k.dtype],
        place=place,
        norm=k.norm,
        mlp=k.mlp,
        qk_norm=k.qk_norm,
        rope=k.rope,
        position_grid=k.position_grid,
        base=base(k),
        align_block=k.align_block,
        projector=(k.align_width, k.align_features),
        interval=inputs.interval,
        given=inputs.given,
        level=inputs.level,
        language=inputs.language,
    )


def base(k: DiTKeys) -> mup.Base | None:
    """The base widths of μP, or None for the standard parametrization."""
    return mup.Base(k.base_width, k.base_head_width) if k.parametrization == "mup" else None


def query_factor(k: DiTKeys) -> float:
    """The factor of a recipe's queries, in addition to 1 / √d."""
    size, relative = parse_size(k.size), base(k)
    return 1.0 if relative is None else mup.query_scale(relative, size.width // size.heads)


def rates(k: DiTKeys, kinds: mup.Kinds = KINDS) -> Callable[[str], float] | None:
    """The learning-rate multiplier of each parameter by its path, or None if all are 1."""
    relative = base(k)
    if relative is None:
        return None
    ratio = parse_size(k.size).width / relative.width
    return lambda path: mup.rate_multiplier(path, ratio, kinds)


def attention(k: DiTKeys, inputs: Inputs) -> Attention:
    """The tokens and heads that a mesh may split."""
    size = parse_size(k.size)
    extra = 2 if k.block == "in_context" else 0
    tokens = shape(k, inputs).tokens
    whole = bool(k.attention_window or k.attention_hops)
    return Attention(tokens, extra, size.heads, size.width // size.heads, whole=whole)


# Of a base: the keys that its weights were trained with and do not show.
INHERITED = (
    "frequency_shift",
    "norm2_eps",
    "norm",
    "rope",
    "attention_window",
    "attention_hops",
    "attention_alpha",
    "parametrization",
    "base_width",
    "base_head_width",
)

NETWORK = Network(
    keys=DiTKeys,
    module=module,
    cost=cost,
    check=check,
    attention=attention,
    kernel=lambda k: k.attention,
    rules=RULES,
    rates=rates,
    varied=("size", "patch"),
    grafts=(
        (r"y_embedder/table", grafting.label_rows),
        (r"x_embedder/kernel", grafting.input_channels),
        (r"final_layer/linear/(kernel|bias)", grafting.output_channels),
    ),
    inherited=INHERITED,
    stack="blocks",
    grown=_grown,
    control=ControlSeam(control_branch, control_variables, check_branch, branch_cost),
    inspection=InspectionSeam(
        functools.partial(reader_of, build=module, branches_of=branches),
        functools.partial(patcher_of, build=module),
        functools.partial(lens_of, build=module),
        branches,
    ),
    interval=True,
    given=True,
    language=True,
)
