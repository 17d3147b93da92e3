"""A denoiser of two convolutions, with one learned vector a class."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ditjax.config import positive
from ditjax.models.network import Conditions, Denoiser, Inputs, Network, NetworkCost


@dataclass(frozen=True)
class ConvKeys(Denoiser):
    width: int = positive(8)


class Conv(nn.Module):
    width: int
    out_channels: int
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, conditions: Conditions) -> jax.Array:
        conditions.only("label")
        label = nn.Embed(self.num_classes + 1, self.width, name="label")(
            jnp.asarray(conditions.label)
        )
        time = nn.Dense(self.width, name="time")(t[:, None].astype(jnp.float32) / 1000)
        h = nn.Conv(self.width, (3, 3), name="in")(x) + (label + time)[:, None, None]
        return nn.Conv(self.out_channels, (3, 3), name="out")(nn.silu(h))


def module(k: ConvKeys, inputs: Inputs, place: Any = None) -> Conv:
    return Conv(k.width, inputs.out_channels, inputs.num_classes)


def cost(k: ConvKeys, inputs: Inputs) -> NetworkCost:
    H, W, C = inputs.shape
    kernels = 9 * C * k.width + 9 * k.width * inputs.out_channels
    biases = k.width + inputs.out_channels
    embeddings = (inputs.num_classes + 1) * k.width + 2 * k.width
    return NetworkCost(
        name=f"Conv-{k.width}",
        parameters=kernels + biases + embeddings,
        macs=H * W * kernels + k.width,
        description={"width": k.width},
    )


NETWORK = Network(
    keys=ConvKeys,
    module=module,
    cost=cost,
    rules=(
        (r"in/kernel", (None, None, None, "fsdp")),
        (r"out/kernel", (None, None, "fsdp", None)),
    ),
    varied=("width",),
)
