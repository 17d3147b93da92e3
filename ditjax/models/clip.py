"""CLIP: an image tower and a text tower that embed in one space (Radford et al. 2021).

Parameters: `image/` and `text/` (`models/text.py`), and `logit_scale`, the logarithm of the inverse
temperature; `logit_bias` for the sigmoid loss.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ditjax.config import Model, above, key, positive
from ditjax.errors import UserError
from ditjax.models.blocks import AffineLayerNorm
from ditjax.models.dit import parse_size
from ditjax.models.embed import ANYWHERE, Linear, Placement, patchify
from ditjax.models.network import DTYPES, Network, NetworkCost, Rules
from ditjax.models.text import (
    LAYER_RULES,
    Encoded,
    Layers,
    TextConfig,
    TextEncoder,
    apply_layers,
    layers_macs,
    layers_parameters,
)

FIRST_SCALE = float(np.log(1 / 0.07))  # Sec. 2.5


@dataclass(frozen=True)
class ClipKeys(Model):
    """The keys of `config.model` for CLIP."""

    kind: str = key("clip")
    size: str = key("12x768x12")  # of the image tower: depth x width x heads
    text_size: str = key("12x512x8")
    patch: int = positive(32)
    embedding: int = positive(512)  # width of the space that both towers share
    vocabulary: int = positive(49_408)  # rows of the table of tokens
    end: int = key(49_407)  # the token that a text is pooled at; -1 = the largest id in it
    # gelu in LAION's models
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = key("quick_gelu")
    hidden: int = key(0)  # width of the image tower's MLPs; 0 = four times that of the tower
    text_hidden: int = key(0)
    norm_eps: float = key(1e-5, above(0))


class ImageConfig(NamedTuple):
    """The sizes of an image tower, for square images of `side` pixels."""

    layers: Layers
    side: int
    channels: int
    patch: int
    projection: int


def tower_layers(k: ClipKeys, size: str, hidden: int) -> Layers:
    """The layers of a tower of a recipe."""
    depth, width, heads = parse_size(size)
    mlp = hidden or 4 * width
    return Layers(depth, width, heads, mlp, k.activation, k.norm_eps, openai_init=True)


class ImageTower(nn.Module):
    """x f32[B,S,S,C] in [-1, 1] -> embeddings f32[B,E], not normalised: a pre-norm ViT.

    With `states`, the states of all tokens in its place, f32[B,1+N,D], the class token's first.
    """

    config: ImageConfig
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    @nn.compact
    def __call__(self, x: jax.Array, states: bool = False) -> jax.Array:
        c, D = self.config, self.config.layers.width
        normal = nn.initializers.normal(D**-0.5)
        patches = patchify(x, c.patch)
        linear = Linear(D, dtype=self.dtype, place=self.place, use_bias=False, name="x_embedder")
        cls = self.param("cls", normal, (D,), jnp.float32).astype(self.dtype)
        tokens = linear(patches)
        first = jnp.broadcast_to(cls[None, None], (len(x), 1, D))
        shape = (1 + patches.shape[1], D)
        positions = self.param("positions", normal, shape, jnp.float32).astype(self.dtype)
        tokens = jnp.concatenate([first, tokens], axis=1) + positions[None]
        tokens = AffineLayerNorm(c.layers.eps, name="norm_pre")(tokens)
        tokens = apply_layers(c.layers, tokens, None, self.dtype, self.place)
        if states:
            return tokens.astype(jnp.float32)
        pooled = AffineLayerNorm(c.layers.eps, name="norm_post")(tokens[:, :1])[:, 0]
        projection = self.param("projection", normal, (D, c.projection), jnp.float32)
        return pooled.astype(jnp.float32) @ projection


class ClipConfig(NamedTuple):
    """Both towers. `biased`: there is a logit_bias, for the sigmoid loss."""

    image: ImageConfig
    text: TextConfig
    biased: bool = False


class Embeddings(NamedTuple):
    """Images v and texts w f32[B,E], not normalised; the scale s and bias b of logits f32[]."""

    image: jax.Array
    text: jax.Array
    log_scale: jax.Array
    bias: jax.Array


def unit(x: jax.Array) -> jax.Array:
    """x / ‖x‖ over the last axis."""
    return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))


class CLIP(nn.Module):
    """Images and texts -> `Embeddings`; `embed_image` and `embed_text` give unit vectors."""

    config: ClipConfig
    dtype: Any = jnp.float32
    place: Placement = ANYWHERE

    def setup(self) -> None:
        c = self.config
        self.image = ImageTower(c.image, self.dtype, self.place)
        self.text = TextEncoder(c.text, self.dtype, self.place)
        # SigLIP (Zhai et al. 2023, Sec. 3.2): exp(s) = 10, b = -10.
        first = np.log(10.0) if c.biased else FIRST_SCALE
        constant = nn.initializers.constant
        self.logit_scale = self.param("logit_scale", constant(first), (), jnp.float32)
        if c.biased:
            self.logit_bias = self.param("logit_bias", constant(-10.0), (), jnp.float32)

    def embed_image(self, x: jax.Array) -> jax.Array:
        return unit(self.image(x))

    def embed_text(self, ids: jax.Array) -> jax.Array:
        return unit(self.text(ids).pooled)

    def encode_image(self, x: jax.Array) -> jax.Array:
        """The states of an image's tokens f32[B,1+N,D], the class token's first."""
        return self.image(x, states=True)

    def encode_text(self, ids: jax.Array) -> Encoded:
        """The features of every token, and the embedding, not normalised."""
        return self.text(ids)

    def __call__(self, x: jax.Array, ids: jax.Array) -> Embeddings:
        bias = self.logit_bias if self.config.biased else jnp.zeros((), jnp.float32)
        return Embeddings(self.image(x), self.text(ids).pooled, self.logit_scale, bias)


def clip_config(k: ClipKeys, side: int, channels: int, tokens: int, biased: bool) -> ClipConfig:
    """The towers of a recipe."""
    image = tower_layers(k, k.size, k.hidden)
    text = tower_layers(k, k.text_size, k.text_hidden)
    return ClipConfig(
        ImageConfig(image, side, channels, k.patch, k.embedding),
        TextConfig("clip", k.vocabulary, text, tokens, projection=k.embedding, end=k.end),
        biased,
    )


def module(k: ClipKeys, config: ClipConfig, place: Placement = ANYWHERE) -> CLIP:
    """Build the towers of a recipe. Raises UserError for a patch that does not divide."""
    if config.image.side % k.patch:
        raise UserError(
            f"config.model.patch is {k.patch}, which does not divide config.data.image_size ="
            f" {config.image.side}."
        )
    return CLIP(config, DTYPES[k.dtype], place)


def clip_cost(k: ClipKeys, c: ClipConfig) -> NetworkCost:
    """Parameters and multiply-accumulates of one image and one text, in closed form."""
    image, text, E = c.image.layers, c.text.layers, c.image.projection
    N, M = (c.image.side // c.image.patch) ** 2, c.text.positions
    pixels = c.image.patch**2 * c.image.channels
    parameters = layers_parameters(image) + layers_parameters(text) + 1 + c.biased
    parameters += image.width * (pixels + N + 6 + E) + text.width * (k.vocabulary + M + 2 + E)
    macs = layers_macs(image, N + 1) + layers_macs(text, M) + N * pixels * image.width
    return NetworkCost(
        name=f"CLIP-{k.size}/{k.patch}",
        parameters=parameters,
        macs=macs + E * (image.width + text.width),
        tokens=N,
        description={"size": k.size, "text_size": k.text_size, "patch": k.patch, "embedding": E},
    )


CLIP_RULES: Rules = (
    (r"x_embedder/kernel", (None, "fsdp")),
    *LAYER_RULES,
    (r"projection", ("fsdp", None)),
)

# `cost` follows from the texts' length, too: the task gives it (`clip_cost`).
NETWORK = Network(keys=ClipKeys, module=module, rules=CLIP_RULES, varied=("size", "patch"))
