"""diffusers' UNet2DModel in ADM's form on seeded weights, and the golden file of its outputs."""

import json
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel

from tests.oracles.networks import seeded_network

PACKAGES = ("torch", "diffusers", "numpy")

# One residual block a level, attention at the lower one.
SMALL = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "attn_norm_num_groups": 8,
    "num_class_embeds": 11,
}


def unet(config: dict[str, Any]) -> UNet2DModel:
    """diffusers' U-Net; the layers that start at zero are not zero here."""
    return seeded_network(UNet2DModel(**config))


def inputs(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x f32[3,C,S,S], t i64[3], y i64[3]."""
    side = config["sample_size"]
    x = np.random.default_rng(1).standard_normal((3, config["in_channels"], side, side))
    return x.astype(np.float32), np.array([0, 17, 999]), np.array([3, 0, 10])


def output(network: UNet2DModel, config: dict[str, Any]) -> np.ndarray:
    """f32[3,2C,S,S]."""
    x, t, y = (torch.from_numpy(a) for a in inputs(config))
    with torch.no_grad():
        return network(x, t, class_labels=y).sample.numpy()


def goldens() -> dict[str, np.ndarray]:
    """Names, shapes, inputs and output of the small U-Net."""
    network = unet(SMALL)
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    x, t, y = inputs(SMALL)
    return {
        "shapes": np.array(json.dumps(shapes)),
        "x": x,
        "t": t,
        "y": y,
        "output": output(network, SMALL),
    }
