"""DINOv2's ViT without registers (Oquab et al. 2023), which gives features of images.

A pre-norm ViT with a class token, learned positions and a scale on what each sublayer adds.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ditjax.errors import UserError
from ditjax.models.blocks import AffineLayerNorm
from ditjax.models.embed import ANYWHERE, Linear, Placement, patchify
from ditjax.models.text import Layers, apply_layers

DINO_SIDE = 224  # pixels; 16 x 16 patches of 14
# ImageNet's, of pixels in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class DinoConfig(NamedTuple):
    """The sizes of a ViT."""

    layers: Layers
    patch: int


class DinoV2(nn.Module):
    """x f32[B,S,S,3], normalised -> the class token after the last norm, f32[B,D]."""

    config: DinoConfig
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, D = self.config, self.config.layers.width
        normal = nn.initializers.normal(0.02)
        patches = patchify(x, c.patch)
        tokens = Linear(D, dtype=self.dtype, place=self.place, name="x_embedder")(patches)
        cls = self.param("cls", normal, (D,), jnp.float32).astype(self.dtype)
        tokens = jnp.concatenate([jnp.broadcast_to(cls[None, None], (len(x), 1, D)), tokens], 1)
        shape = (tokens.shape[1], D)
        tokens = tokens + self.param("positions", normal, shape, jnp.float32)[None]
        tokens = apply_layers(c.layers, tokens.astype(self.dtype), None, self.dtype, self.place)
        return AffineLayerNorm(c.layers.eps, name="norm")(tokens[:, :1])[:, 0].astype(jnp.float32)


def preprocess_dino(images: jax.Array, side: int = DINO_SIDE) -> jax.Array:
    """u8[B,H,W,3] -> f32[B,side,side,3], as the DINOv2 features of FD-DINOv2 are computed.

    Bicubic with antialiasing (a = -1/2, PIL's kernel) in floating point, cut to 0..255 and not
    rounded, then ImageNet's mean and deviation: Stein et al. 2023, dgm-eval (recalled).
    torch-fidelity 0.4.0 resizes bilinearly without antialiasing, which gives other features.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.uint8:
        raise UserError(
            f"images of type {images.dtype} and shape {tuple(images.shape)}: DINOv2 expects uint8"
            " [batch, height, width, 3] in 0..255."
        )
    x = images.astype(jnp.float32)
    x = jax.image.resize(x, (len(x), side, side, 3), "cubic", antialias=True).clip(0.0, 255.0)
    mean, std = jnp.array(IMAGENET_MEAN), jnp.array(IMAGENET_STD)
    return (x / 255.0 - mean[None, None, None]) / std[None, None, None]
