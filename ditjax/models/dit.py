"""DiT: patchify -> position -> L blocks -> final layer -> unpatchify (DiT Fig. 3)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ditjax.errors import UserError
from ditjax.models.blocks import (
    BLOCKS,
    LAYER_NORM_EPS,
    AffineLayerNorm,
    Conditioning,
    Modulation,
    layer_norm,
)
from ditjax.models.blocks import modulate as modulate_tokens
from ditjax.models.embed import (
    ANYWHERE,
    LabelEmbedder,
    Linear,
    Placement,
    TimestepEmbedder,
    patchify,
    sincos_position_embedding,
    unpatchify,
    xavier_uniform,
)
from ditjax.models.mup import Base, query_scale

# What a block keeps for its backward pass: everything, nothing, or the weight products.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class FinalLayer(nn.Module):
    """LayerNorm (adaptive in the adaLN variants) -> Linear(D, p²·C_out), zero weights and bias."""

    out_features: int
    block: str
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        if self.block in ("adaln", "adaln_zero"):
            zero = self.block == "adaln_zero"
            shift, scale = Modulation(2, zero, self.dtype, self.place, name="adaln")(c)
            x = modulate_tokens(layer_norm(x), shift, scale)
        else:
            x = AffineLayerNorm(name="norm")(x)
        zeros = nn.initializers.zeros
        return Linear(self.out_features, zeros, self.dtype, self.place, name="linear")(x)


class DiT(nn.Module):
    """x f32[B,H,W,C], t i32[B], y i32[B] -> f32[B,H,W,out_channels].

    `out_channels` is C, or 2C with the variance fraction in [C:2C]. Parameters of the L blocks are
    stacked on a leading axis whether the stack is scanned (`unroll=1`: fast to compile) or unrolled
    (`unroll=L`: fast on CPUs); `unroll` divides freely and does not change the parameters. `y` may
    be `num_classes`, the null label, when `null_label`. `place` is where a mesh wants activations.
    With a `base` it is initialised and its attention scaled by `models/mup.py`.
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
    base: Base | None = None

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        _, H, W, _ = x.shape
        if H % self.patch or W % self.patch:
            raise UserError(
                f"an input of {H}x{W} is not divisible into patches of {self.patch}:"
                f" choose a patch size that divides both."
            )
        base = self._base()
        t_emb = TimestepEmbedder(
            self.width,
            self.frequency_shift,
            self.dtype,
            out_std=0.02 * (base.width / self.width) ** 0.5,
            name="t_embedder",
        )(t)
        y_emb = LabelEmbedder(
            self.num_classes, self.width, self.null_label, self.dtype, name="y_embedder"
        )(y)
        put = self.place.put
        t_emb, y_emb = put("conditioning", t_emb), put("conditioning", y_emb)
        context = jnp.stack([put("row", t_emb), put("row", y_emb)], axis=1)
        cond = Conditioning(vector=t_emb + y_emb, context=put("context", context))

        init = functools.partial(xavier_uniform, fan_out=base.width)
        embed = Linear(self.width, init, self.dtype, self.place, name="x_embedder")
        tokens = put("tokens", embed(patchify(x, self.patch)))
        N = tokens.shape[1]
        position = sincos_position_embedding(self.width, H // self.patch, W // self.patch)
        tokens = tokens + jnp.asarray(position, self.dtype)[None]

        if self.block == "in_context":
            tokens = jnp.concatenate([tokens, cond.context], axis=1)
        tokens = self._stack(tokens, cond)[:, :N]

        out = FinalLayer(
            self.patch**2 * self.out_channels,
            self.block,
            self.dtype,
            self.place,
            name="final_layer",
        )(tokens, cond.vector)
        return unpatchify(out, self.patch, H, W).astype(jnp.float32)

    def _stack(self, tokens: jax.Array, cond: Conditioning) -> jax.Array:
        """The L blocks as one scan over stacked parameters."""
        block = BLOCKS[self.block]
        if self.remat != "none":
            # prevent_cse only guards against what a scan already rules out.
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)

        def body(module: nn.Module, tokens: jax.Array, cond: Conditioning) -> tuple[Any, None]:
            return self.place.put("tokens", module(tokens, cond)), None

        scan = nn.scan(
            body,
            # What `capture_intermediates` asks for is stacked as the parameters are.
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            unroll=min(self.unroll, self.depth),
        )
        blocks = block(
            self.heads,
            self.mlp_ratio,
            self.norm2_eps,
            self.dtype,
            self.place,
            query_scale(self._base(), self.width // self.heads),
            name="blocks",
        )
        return scan(blocks, tokens, cond)[0]

    def _base(self) -> Base:
        return self.base or Base(self.width, self.width // self.heads)
