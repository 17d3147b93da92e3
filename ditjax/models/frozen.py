"""Layers of a language model inside a denoiser, frozen or not (Pang et al. 2024; LLMDiff).

Tokens h [B,..,C] of any shape -> W₁ -> the layers, without positions and without a mask -> their
final norm, if they have one -> W₂. The result is added to h, or takes its place. Frozen layers are
no parameters: they are read from the collection `lm`, an argument of the jitted programs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ditjax.models.embed import ANYWHERE, Linear
from ditjax.models.text import AffineRMSNorm, Layers, apply_layers

LM = "lm"  # the collection of frozen layers, and the name of the block in a network


class LanguageLayers(NamedTuple):
    """The layers in a network. `kind` is what config.lm.mode says; `residual`: h + f(h), not f(h).

    `final_norm`: an RMSNorm behind the layers. A `mapper` has W₁ and W₂ alone; of `unfrozen`
    layers, the parameters are the network's.
    """

    layers: Layers
    final_norm: bool
    kind: str
    residual: bool

    @property
    def frozen(self) -> bool:
        """Whether the layers are read, and not trained."""
        return self.kind not in ("mapper", "unfrozen")

    @property
    def timeless(self) -> bool:
        """Whether the network ignores the time, as LLMDiff's release does."""
        return self.kind == "released"

    def macs(self, tokens: int, width: int) -> int:
        """Multiply-accumulates of W₁, the layers, their norms and W₂ on so many tokens."""
        c = self.layers
        N, d = tokens, c.width
        maps = 2 * N * width * d
        if self.kind == "mapper":
            return maps
        inner = c.heads * (c.head_width or d // c.heads)
        layer = 4 * N * d * inner + 2 * N * N * inner + (2 + c.gated) * N * d * c.hidden
        return maps + c.depth * (layer + 2 * N * d) + self.final_norm * N * d

    def parameters(self, width: int) -> int:
        """What is trained of it."""
        maps = 2 * width * self.layers.width
        return maps + (self.held() if self.kind == "unfrozen" else 0)

    def held(self) -> int:
        """The parameters of the layers, trained or not."""
        c, d = self.layers, self.layers.width
        if self.kind == "mapper":
            return 0
        inner = c.heads * (c.head_width or d // c.heads)
        weights = 4 * d * inner + (2 + c.gated) * d * c.hidden
        biases = (3 * inner + d + (1 + c.gated) * c.hidden + d) * c.biases
        norms = 2 * d * (1 if c.rms else 2)
        return c.depth * (weights + biases + norms) + self.final_norm * d


class LayerStack(nn.Module):
    """The layers and their final norm: x [B,N,d] -> [B,N,d]."""

    layers: Layers
    final_norm: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = apply_layers(self.layers, x, None, self.dtype, ANYWHERE)
        return AffineRMSNorm(self.layers.eps, name="norm_final")(x) if self.final_norm else x


class LanguageBlock(nn.Module):
    """h [B,..,C] -> [B,..,C] by way of a language model's layers."""

    spec: LanguageLayers
    dtype: Any

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        s, C = self.spec, h.shape[-1]
        tokens = h.reshape(len(h), -1, C)

        def linear(features: int, name: str) -> nn.Module:
            return Linear(features, dtype=self.dtype, use_bias=False, name=name)

        x = linear(s.layers.width, "in")(tokens)
        if s.kind == "unfrozen":
            x = LayerStack(s.layers, s.final_norm, self.dtype, name="layers")(x)
        elif s.frozen and not self.is_initializing():
            stack = LayerStack(s.layers, s.final_norm, self.dtype, parent=None)
            out: Any = stack.apply({"params": self.get_variable(LM, "layers")}, x)
            x = out
        y = linear(C, "out")(x).reshape(h.shape)
        return h + y if s.residual else y
