"""Small classifiers of square grey images, with two deliberately different architectures.

`DigitsConvNet` computes the features of FD-digits and FD-mnist. `DigitsMixer` predicts the class of
a sample: it has patches and no 3x3 convolution, so the two are unlikely to share a blind spot.
`ditjax.classify` trains a pair of them on a data set.
`MovingConvNet` computes the features of FD-clips.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ditjax.errors import UserError
from ditjax.models.video import tubelets

DIGIT_SIDE = 8
MNIST_SIDE = 28
NUM_CLASSES = 10
CLIP_LENGTH, CLIP_SIDE = 8, 16


class Recognition(NamedTuple):
    """features f32[B,F], the penultimate activations; logits f32[B,10]."""

    features: jax.Array
    logits: jax.Array


class DigitsConvNet(nn.Module):
    """Stages of two 3x3 convolutions, the second of which halves the side, and a dense layer.

    Stage s has width 2^s channels: 8x8 -> 4x4 -> 2x2 with the defaults.
    x f32[B,side,side,1] in [-1,1] -> features f32[B,features], logits f32[B,10]. SiLU, because a
    dead ReLU is a feature with zero variance.
    Raises UserError for another image shape.
    """

    width: int = 20
    features: int = 64
    side: int = DIGIT_SIDE
    stages: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> Recognition:
        _check_images(x, self.side)
        h = x
        for stage in range(self.stages):
            width = self.width * 2**stage
            h = nn.silu(nn.Conv(width, (3, 3), name=f"conv_{2 * stage}")(h))
            h = nn.silu(nn.Conv(width, (3, 3), strides=2, name=f"conv_{2 * stage + 1}")(h))
        h = nn.silu(nn.Dense(self.features, name="penultimate")(h.reshape(h.shape[0], -1)))
        return Recognition(h, nn.Dense(NUM_CLASSES, name="logits")(h))


class DigitsMixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021) over square patches of `patch` pixels, mean-pooled.

    x f32[B,side,side,1] in [-1,1] -> features f32[B,width], logits f32[B,10].
    Raises UserError for another image shape.
    """

    width: int = 48
    blocks: int = 3
    side: int = DIGIT_SIDE
    patch: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> Recognition:
        _check_images(x, self.side)
        B, rows, p = x.shape[0], self.side // self.patch, self.patch
        tokens = rows**2
        h = x.reshape(B, rows, p, rows, p).transpose(0, 1, 3, 2, 4).reshape(B, tokens, p * p)
        h = nn.Dense(self.width, name="patches")(h)  # [B,N,D]
        h = h + self.param("positions", nn.initializers.normal(0.02), (1, tokens, self.width))
        for i in range(self.blocks):
            y = nn.LayerNorm(name=f"token_norm_{i}")(h).swapaxes(1, 2)  # [B,D,N]
            y = nn.gelu(nn.Dense(2 * tokens, name=f"token_in_{i}")(y))
            h = h + nn.Dense(tokens, name=f"token_out_{i}")(y).swapaxes(1, 2)
            y = nn.LayerNorm(name=f"channel_norm_{i}")(h)
            y = nn.gelu(nn.Dense(2 * self.width, name=f"channel_in_{i}")(y))
            h = h + nn.Dense(self.width, name=f"channel_out_{i}")(y)
        h = jnp.mean(nn.LayerNorm(name="final_norm")(h), axis=1)
        return Recognition(h, nn.Dense(NUM_CLASSES, name="logits")(h))


class Motion(NamedTuple):
    """What is in a clip: features f32[B,F], and four answers.

    digit f32[B,10], bounce f32[B] and shuffled f32[B] are logits; velocity f32[B,2], by row and
    column, is in pixels from a frame to the next, when the clip begins.
    """

    features: jax.Array
    digit: jax.Array
    velocity: jax.Array
    bounce: jax.Array
    shuffled: jax.Array


class MovingConvNet(nn.Module):
    """Convolutions over time and space whose kernels do not overlap, and dense layers.

    x f32[B,8,16,16,1] in [-1,1] -> 4x4x4 of kernels 2x4x4 -> 2x2x2 of kernels 2x2x2 -> `Motion`
    with 64 features. Raises UserError for another shape.
    """

    width: int = 48
    features: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> Motion:
        if x.shape[1:] != (CLIP_LENGTH, CLIP_SIDE, CLIP_SIDE, 1):
            raise UserError(
                f"clips of shape {tuple(x.shape)}: expected [batch, {CLIP_LENGTH}, {CLIP_SIDE},"
                f" {CLIP_SIDE}, 1] in [-1, 1]."
            )
        h = nn.silu(nn.Dense(self.width, name="conv_0")(tubelets(x, 2, 4)))
        h = h.reshape(-1, 4, 4, 4, self.width)
        h = nn.silu(nn.Dense(self.width, name="conv_1")(tubelets(h, 2, 2)))
        h = nn.silu(nn.Dense(self.features, name="penultimate")(h.reshape(h.shape[0], -1)))
        out = nn.Dense(NUM_CLASSES + 4, name="heads")(h)
        digit, velocity = out[:, :NUM_CLASSES], out[:, NUM_CLASSES : NUM_CLASSES + 2]
        return Motion(h, digit, velocity, out[:, -2], out[:, -1])


def _check_images(x: jax.Array, side: int) -> None:
    if x.ndim != 4 or x.shape[1:] != (side, side, 1):
        raise UserError(
            f"images of shape {tuple(x.shape)}: this classifier expects [batch, {side}, {side}, 1]"
            " in [-1, 1]; resize and convert to grey first."
        )
