"""Two digit classifiers for 8x8 images, with deliberately different architectures.

`DigitsConvNet` computes the features of FD-digits. `DigitsMixer` predicts the class of a sample: it
has 16 patches and no 3x3 convolution, so the two are unlikely to share a blind spot.
`ditjax.classify` trains both.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ditjax.errors import UserError

DIGIT_SIDE = 8
NUM_CLASSES = 10


class Recognition(NamedTuple):
    """features f32[B,F], the penultimate activations; logits f32[B,10]."""

    features: jax.Array
    logits: jax.Array


class DigitsConvNet(nn.Module):
    """Four 3x3 convolutions, 8x8 -> 4x4 -> 2x2, and a dense layer.

    x f32[B,8,8,1] in [-1,1] -> features f32[B,64], logits f32[B,10]. SiLU, because a dead ReLU is a
    feature with zero variance.
    Raises UserError for another image shape.
    """

    width: int = 20
    features: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> Recognition:
        _check_images(x)
        h = nn.silu(nn.Conv(self.width, (3, 3), name="conv_0")(x))
        h = nn.silu(nn.Conv(self.width, (3, 3), strides=2, name="conv_1")(h))  # [B,4,4,width]
        h = nn.silu(nn.Conv(2 * self.width, (3, 3), name="conv_2")(h))
        h = nn.silu(nn.Conv(2 * self.width, (3, 3), strides=2, name="conv_3")(h))  # [B,2,2,2*width]
        h = nn.silu(nn.Dense(self.features, name="penultimate")(h.reshape(h.shape[0], -1)))
        return Recognition(h, nn.Dense(NUM_CLASSES, name="logits")(h))


class DigitsMixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021) over the 16 patches of 2x2 pixels, mean-pooled.

    x f32[B,8,8,1] in [-1,1] -> features f32[B,width], logits f32[B,10].
    Raises UserError for another image shape.
    """

    width: int = 48
    blocks: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> Recognition:
        _check_images(x)
        B, tokens = x.shape[0], (DIGIT_SIDE // 2) ** 2
        h = (
            x.reshape(B, DIGIT_SIDE // 2, 2, DIGIT_SIDE // 2, 2)
            .transpose(0, 1, 3, 2, 4)
            .reshape(B, tokens, 4)
        )
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


def _check_images(x: jax.Array) -> None:
    if x.ndim != 4 or x.shape[1:] != (DIGIT_SIDE, DIGIT_SIDE, 1):
        raise UserError(
            f"images of shape {tuple(x.shape)}: the digit classifiers expect [batch, 8, 8, 1] in"
            " [-1, 1]; resize and convert to grey first."
        )
