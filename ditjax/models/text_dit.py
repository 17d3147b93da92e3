"""A DiT of texts: adaLN-single and cross-attention (PixArt-α, Chen et al. 2023, arXiv:2310.00426).

A block is modulated by a table of its own plus six vectors that all blocks share, and attends to
the tokens of a text. All other keys and layers are `models/dit.py`'s. Parameters: `caption/`, the
projection of the text; `adaln_single/`, the shared vectors; `blocks/table`, `final_layer/table`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ditjax.config import key, non_negative
from ditjax.errors import UserError
from ditjax.models import dit, grafting, mup
from ditjax.models.attention import CrossAttention
from ditjax.models.blocks import Block, Conditioning, layer_norm, modulate, over_tokens
from ditjax.models.dit import DiT, DiTKeys
from ditjax.models.embed import (
    ANYWHERE,
    TIMESTEP_FREQUENCIES,
    Linear,
    Placement,
    TimestepEmbedder,
    unpatchify,
)
from ditjax.models.network import (
    AnyArray,
    Attention,
    Conditions,
    Inputs,
    InspectionSeam,
    Network,
    NetworkCost,
    Rules,
)

# ---- keys


@dataclass(frozen=True)
class TextDiTKeys(DiTKeys):
    """The keys of `config.model` for a DiT of texts: those of a DiT, and two."""

    kind: str = key("text_dit")
    # Side in pixels that the network is conditioned on, as PixArt-α's of 1024 pixels; 0 = none.
    size_condition: int = non_negative(0, most=16_384)
    # Tokens that a vector adds to the text, beside its part in the time (DALL-E 2, Sec. 2.1).
    vector_tokens: int = non_negative(0, most=64)


def check(k: TextDiTKeys, inputs: Inputs) -> None:
    """Raise UserError if the network cannot process its inputs."""
    dit.check(k, inputs)
    for name, value, wanted in (
        ("block", k.block, "adaln_zero"),
        ("norm", k.norm, "layer"),
        ("mlp", k.mlp, "gelu"),
        ("align_block", k.align_block, 0),
    ):
        if value != wanted:
            raise UserError(
                f"config.model.{name} is {value!r}, which a DiT of texts (config.model.kind="
                f"text_dit) does not have: leave it at {wanted!r}."
            )
    width = dit.parse_size(k.size).width
    if k.size_condition and width % 3:
        raise UserError(
            f"config.model.size_condition is {k.size_condition} and the width {width}:"
            " expected a multiple of 3, a third each for height, width and their ratio."
        )
    if k.vector_tokens and not inputs.vector:
        raise UserError(
            f"config.model.vector_tokens is {k.vector_tokens}, and this network is given no vector:"
            " leave it at 0, or set config.task to 'unclip'."
        )


# ---- cost


def parameters(k: TextDiTKeys, inputs: Inputs) -> int:
    """The number of trainable weights and biases."""
    s = dit.shape(k, inputs)
    L, D, _ = s.size
    mlp = (D * s.mlp_width + s.mlp_width) + (s.mlp_width * D + D)
    block = 2 * (4 * D * D + 4 * D) + mlp + 6 * D + 2 * (D // s.size.heads) * s.qk_norm
    patch_in, patch_out = s.patch**2 * s.in_channels, s.patch**2 * s.out_channels
    times = (TIMESTEP_FREQUENCIES * D + D) + (D * D + D)
    third = D // 3
    sizes = (TIMESTEP_FREQUENCIES * third + third) + (third * third + third)
    caption = (inputs.context.width * D + D) + (D * D + D)
    shared = 6 * (D * D + D) + inputs.vector * D + k.vector_tokens * (inputs.vector + 1) * D
    ends = (patch_in * D + D) + (D * patch_out + patch_out) + 2 * D
    return L * block + times + 2 * sizes * bool(k.size_condition) + caption + shared + ends


def text_macs(k: TextDiTKeys, inputs: Inputs) -> int:
    """Multiply-accumulates of one forward pass of one sample, counted as `dit.forward_macs`.

    L(14ND² + 2N²D + 2MD² + 2NMD + 2ND) + p²C·ND + p²K·ND + ND + FD + 7D² + M(C_t D + D²) for M
    tokens of a text and r = 4; its projection is computed once for all blocks. A vector of width E
    adds (V + 1)ED, and its V tokens count as those of the text do in the blocks.
    """
    s = dit.shape(k, inputs)
    M = inputs.context.tokens + k.vector_tokens
    N = s.tokens
    return s.size.depth * text_block_macs(s, N, N, M) + text_ends_macs(k, inputs, N)


def text_block_macs(s: dit.Shape, N: int, keys: int, M: int | None) -> int:
    """Those of a block of N tokens, each of which sees `keys`; without a text M is None."""
    D = s.size.width
    block = 4 * N * D * D + dit.attention_macs(s, N, keys) + 2 * N * D * s.mlp_width
    if M is not None:
        block += 2 * N * D * D + 2 * M * D * D + 2 * N * M * D
    return block + (4 if s.qk_norm else 2) * N * D


def text_ends_macs(k: TextDiTKeys, inputs: Inputs, N: int) -> int:
    """Those of all but the blocks, for N tokens of an image or a clip."""
    s, M = dit.shape(k, inputs), inputs.context.tokens
    D = s.size.width
    ends = s.patch**2 * (s.in_channels + s.out_channels) * N * D + N * D
    shared = TIMESTEP_FREQUENCIES * D + 7 * D * D + (k.vector_tokens + 1) * inputs.vector * D
    if k.size_condition:
        shared += 3 * (TIMESTEP_FREQUENCIES * (D // 3) + (D // 3) ** 2)
    return ends + shared + M * (inputs.context.width * D + D * D)


def cost(k: TextDiTKeys, inputs: Inputs) -> NetworkCost:
    """The cost of a recipe's network."""
    s, macs = dit.shape(k, inputs), text_macs(k, inputs)
    L, D, _ = s.size
    N = s.tokens
    seen = inputs.context.tokens + k.vector_tokens
    attended = L * (dit.attention_macs(s, N, N) + 2 * N * seen * D)
    return NetworkCost(
        name=f"TextDiT-{k.size}/{k.patch}",
        parameters=parameters(k, inputs),
        macs=macs,
        training_macs={"none": 0, "dots": attended, "full": macs}[k.remat],
        tokens=N,
        description={**dit.description(k, N, text_tokens=inputs.context.tokens), "block": "text"},
    )


# ---- the module


class TextConditioning(NamedTuple):
    """Conditioning of a block: six vectors [B, 6, D], and the text [B, M, D] with its mask."""

    vector: jax.Array
    context: jax.Array
    mask: jax.Array | None


class TextBlock(Block):
    """x += g₁ attn(LN(x)(1 + s₁) + b₁); x += cross(x, text); x += g₂ mlp(LN(x)(1 + s₂) + b₂).

    Sec. 2.3. (b₁, s₁, g₁, b₂, s₂, g₂) are the block's table plus the shared vectors; there is no
    norm before cross-attention. Zero at first are the table, the shared vectors and the last layer
    of cross-attention: the block begins as the identity. One that does not cross has no text.
    """

    crosses: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x: jax.Array, cond: Conditioning | TextConditioning) -> jax.Array:
        assert isinstance(cond, TextConditioning)
        c, zeros = self.config, nn.initializers.zeros
        table = self.param("table", zeros, (6, x.shape[-1]), jnp.float32)
        rows = table.astype(c.dtype)[None] + cond.vector
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (rows[:, i] for i in range(6))
        h = modulate(layer_norm(x), shift, scale)
        x = x + over_tokens(gate, x) * self.attend(h)
        if self.crosses:
            x = x + self.crossed(x, cond)
        h = modulate(layer_norm(x, c.norm2_eps), shift_mlp, scale_mlp)
        return x + over_tokens(gate_mlp, x) * self.mlp(h)

    @nn.nowrap
    def crossed(self, x: jax.Array, cond: TextConditioning) -> jax.Array:
        """What tokens [B,N,D] get of the text."""
        c, zeros = self.config, nn.initializers.zeros
        cross = CrossAttention(c.heads, c.dtype, c.place, c.query_scale, zeros, name="cross")
        out: jax.Array = cross(x, cond.context, cond.mask)
        return out


class TextFinalLayer(nn.Module):
    """LN(x)(1 + s) + b -> Linear(D, p²·C_out); (b, s) is a table [2, D] plus the time [B, D]."""

    out_features: int
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, x: jax.Array, e: jax.Array) -> jax.Array:
        zeros = nn.initializers.zeros
        table = self.param("table", zeros, (2, x.shape[-1]), jnp.float32).astype(self.dtype)
        x = modulate(layer_norm(x), table[None, 0] + e, table[None, 1] + e)
        return Linear(self.out_features, zeros, self.dtype, self.place, name="linear")(x)


class _Caption(nn.Module):
    """Features of a text [B,M,C_t] -> Linear -> GELU (tanh) -> Linear: [B,M,D]."""

    width: int
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        linear = functools.partial(Linear, self.width, dtype=self.dtype, place=self.place)
        h = nn.gelu(linear(name="in")(x), approximate=True)
        return linear(name="out")(h)


class _SharedModulation(nn.Module):
    """The vectors that all blocks share: e [B,D] -> SiLU -> Linear: [B,6,D], zero at first."""

    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, e: jax.Array) -> jax.Array:
        zeros, put = nn.initializers.zeros, self.place.put
        linear = Linear((6, e.shape[-1]), zeros, self.dtype, self.place, name="linear")
        return put("modulation", put("columns", linear(nn.silu(e))))


class TextDiT(DiT):
    """x f32[B,H,W,C], t [B], context f32[B,M,C_t], context_mask bool[B,M] -> f32[B,H,W,out].

    The fields are DiT's. Without a mask every token of the text is seen. `vector` is the width of
    the condition of that name, whose projection is added to the embedded time, and which makes
    `vector_tokens` before those of the text; 0 is none.
    """

    vector: int = 0
    vector_tokens: int = 0
    size_condition: int = 0

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, conditions: Conditions, per_block: Any = None
    ) -> jax.Array:
        _, H, W, _ = x.shape
        grid = (H // self.patch, W // self.patch)
        e, cond = self._texts(t, conditions)
        tokens, _ = self._stack(self._embedder()(x), cond, per_block, grid)
        return unpatchify(self._ended(tokens, e), self.patch, H, W).astype(jnp.float32)

    @nn.nowrap
    def _texts(self, t: jax.Array, conditions: Conditions) -> tuple[jax.Array, Any]:
        """The embedded time [B,D], and what every block is given."""
        conditions.only("context", "context_mask", *(("vector",) if self.vector else ()))
        if conditions.context is None:
            raise ValueError("a DiT of texts needs a context: use the null text's for no text")
        e = self.place.put("conditioning", self._embed(t, conditions.vector))
        shared = _SharedModulation(self.dtype, self.place, name="adaln_single")(e)
        caption = _Caption(self.width, self.dtype, self.place, name="caption")
        context = self.place.put("context", caption(jnp.asarray(conditions.context)))
        mask = None if conditions.context_mask is None else jnp.asarray(conditions.context_mask)
        if self.vector_tokens:
            context, mask = self._before_text(conditions.vector, context, mask)
        return e, TextConditioning(shared, context, mask)

    @nn.nowrap
    def _ended(self, tokens: jax.Array, e: jax.Array) -> jax.Array:
        """The values of each patch."""
        features = self.patch**2 * self.out_channels
        final = TextFinalLayer(features, self.dtype, self.place, name="final_layer")
        out: jax.Array = final(tokens, e)
        return out

    @nn.nowrap
    def _block(
        self, grid: tuple[int, int], kind: type[Block] | None = None
    ) -> Callable[..., nn.Module]:
        return super()._block(grid, kind or TextBlock)

    @nn.nowrap
    def _before_text(
        self, vector: AnyArray | None, context: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The context [B,V+M,D] and its mask, with the V tokens of a vector before the text's."""
        features = (self.vector_tokens, self.width)
        linear = Linear(features, dtype=self.dtype, place=self.place, name="vector_tokens")
        context = jnp.concatenate([linear(jnp.asarray(vector)), context], axis=1)
        if mask is not None:
            seen = ((0, 0), (self.vector_tokens, 0))
            mask = jnp.pad(mask.astype(bool), seen, constant_values=True)
        return self.place.put("context", context), mask

    @nn.nowrap
    def _embed(self, t: jax.Array, vector: AnyArray | None) -> jax.Array:
        """The embedded time, plus the embedded size and the projected vector, if there are any."""
        e = self._embed_times(t, None)
        if self.size_condition:
            embed = functools.partial(
                TimestepEmbedder, self.width // 3, self.frequency_shift, self.dtype
            )
            side = jnp.full(t.shape, float(self.size_condition))
            of_side = embed(name="side_embedder")(side)
            ratio = embed(name="ratio_embedder")(jnp.ones_like(side))
            e = e + jnp.concatenate([of_side, of_side, ratio], axis=-1)
        if self.vector:
            if vector is None:
                raise ValueError(f"this network needs a vector of width {self.vector}")
            linear = functools.partial(Linear, use_bias=False, dtype=self.dtype, place=self.place)
            e = e + linear(self.width, name="vector")(jnp.asarray(vector))
        return e


# Those of a DiT serve the same layers; these are of what only this network has.
TEXT_RULES: Rules = (
    (r"caption/in/kernel", ("fsdp", "tensor")),
    (r"caption/in/bias", ("tensor",)),
    (r"caption/out/kernel", ("tensor", "fsdp")),
    (r"adaln_single/linear/kernel", ("fsdp", None, "tensor")),
    (r"adaln_single/linear/bias", (None, "tensor")),
    (r"(side|ratio)_embedder/(in|out)/kernel", (None, None)),
    (r"vector/kernel", (None, "fsdp")),
    (r"vector_tokens/kernel", (None, None, "fsdp")),
    *dit.RULES,
)

TEXT_KINDS: mup.Kinds = (
    (r"((side|ratio)_embedder/in|caption/in|vector|vector_tokens)/kernel", "input"),
    (r"((side|ratio)_embedder/out|caption/out|adaln_single/linear)/kernel", "hidden"),
    (r"(blocks|final_layer)/table", "vector"),
    *dit.KINDS,
)


# ---- from a class-conditional DiT


_MIDDLE = 500.0  # the network's time at which its modulations are taken (PixArt-α, Sec. 2.3)
_SAME = re.compile(r"(x_embedder|t_embedder|blocks/(attn|mlp)|final_layer/linear)/.*")


def adopt_dit(
    leaves: grafting.Leaves,
    k: Any,
    shapes: Mapping[str, tuple[int, ...]],
    fresh: Callable[[str], np.ndarray],
) -> grafting.Adopted:
    """The leaves of a DiT with adaLN-Zero as a start: at t = 500 it is the DiT without a class.

    The tables are the DiT's modulations there, of its null label or, without one, of the mean of
    its classes. What all blocks share is zero, as is the last layer of cross-attention. Raises
    UserError for a DiT of other blocks.
    """
    for name, expected in (
        ("block", "adaln_zero"),
        ("norm", "layer"),
        ("mlp", "gelu"),
        ("parametrization", "standard"),
    ):
        if (value := getattr(k, name)) != expected:
            raise UserError(f"the base has {name} {value!r}: expected {expected!r}")

    def of(name: str) -> np.ndarray:
        return np.asarray(leaves[name], np.float64)

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    half = TIMESTEP_FREQUENCIES // 2
    angle = _MIDDLE * np.exp(-np.log(1e4) * np.arange(half) / (half - k.frequency_shift))
    frequencies = np.concatenate([np.cos(angle), np.sin(angle)])
    h = silu(frequencies @ of("t_embedder/in/kernel") + of("t_embedder/in/bias"))
    e = h @ of("t_embedder/out/kernel") + of("t_embedder/out/bias")
    labels = of("y_embedder/table")
    c = silu(e + (labels[-1] if k.label_dropout > 0 else labels.mean(0)))
    kernel, bias = of("blocks/adaln/linear/kernel"), of("blocks/adaln/linear/bias")
    tables = np.einsum("d,ldsf->lsf", c, kernel) + bias
    final = np.einsum("d,dsf->sf", c, of("final_layer/adaln/linear/kernel"))
    final += of("final_layer/adaln/linear/bias") - e
    said = "the DiT's modulation at t = 500, of its null label"
    adapted = {"blocks/table": said, "final_layer/table": f"{said}, less the time's"}
    found = {path: leaf for path, leaf in leaves.items() if _SAME.fullmatch(path)}
    found |= {"blocks/table": tables, "final_layer/table": final}
    rest = [path for path in shapes if path not in found]
    unused = [path for path in leaves if path not in found]
    return grafting.Adopted({**found, **{p: fresh(p) for p in rest}}, adapted, rest, unused)


def module(k: TextDiTKeys, inputs: Inputs, place: Placement = ANYWHERE) -> TextDiT:
    """Build the denoiser of a recipe; its parameters do not depend on `place`."""
    plain = dit.module(dataclasses.replace(k, label_dropout=0.0), inputs, place)
    own = {"vector": inputs.vector, "size_condition": k.size_condition}
    own |= {"vector_tokens": k.vector_tokens}
    made: TextDiT = dit.with_fields_of(plain, TextDiT, **own)
    return made


def _attention(k: TextDiTKeys, inputs: Inputs) -> Attention:
    """The tokens and heads that a mesh may split; the text's tokens it does not split."""
    size = dit.parse_size(k.size)
    return Attention(dit.shape(k, inputs).tokens, 0, size.heads, size.width // size.heads)


# ---- inspection


class TextLens(TextDiT):
    """`dit.Lens` of a DiT of texts: its last layers on the tokens x [B,N,D] of any block."""

    size: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, conditions: Conditions, per_block: Any = None
    ) -> jax.Array:
        e, _ = self._texts(t, conditions)
        return unpatchify(self._ended(x, e), self.patch, *self.size).astype(jnp.float32)


def text_branches(k: TextDiTKeys) -> dict[str, str]:
    """The branches of a block: name -> its last linear layer."""
    return {"attention": "attn/out", "cross-attention": "cross/out", "mlp": "mlp/out"}


NETWORK = Network(
    keys=TextDiTKeys,
    module=module,
    cost=cost,
    check=check,
    attention=_attention,
    kernel=lambda k: k.attention,
    rules=TEXT_RULES,
    rates=functools.partial(dit.rates, kinds=TEXT_KINDS),
    varied=("size", "patch"),
    grafts=(
        (r"x_embedder/kernel", grafting.input_channels),
        (r"final_layer/linear/(kernel|bias)", grafting.output_channels),
    ),
    adopts={"dit": adopt_dit},
    inherited=dit.INHERITED,
    stack="blocks",
    inspection=InspectionSeam(
        functools.partial(dit.reader_of, build=module, branches_of=text_branches),
        functools.partial(dit.patcher_of, build=module),
        functools.partial(dit.lens_of, build=module, kind=TextLens),
        text_branches,
    ),
    texts=True,
)
