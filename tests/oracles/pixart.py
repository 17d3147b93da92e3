"""diffusers' PixArt-α on seeded weights: both types, of 512 and of 1024 pixels, made tiny."""

import json
from typing import Any

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel

from tests.oracles.networks import seeded_network

PACKAGES = ("torch", "diffusers", "numpy")
CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "caption_channels": 10,
    "sample_size": 8,
    "patch_size": 2,
}
# The second is conditioned on the size of its images, and its positions are interpolated.
TYPES: dict[str, dict[str, Any]] = {
    "512": CONFIG,
    "1024": {**CONFIG, "interpolation_scale": 2, "use_additional_conditions": True},
}


def pixart(kind: str) -> PixArtTransformer2DModel:
    """A network none of whose weights is zero."""
    network: PixArtTransformer2DModel = seeded_network(PixArtTransformer2DModel(**TYPES[kind]))
    return network


def inputs() -> dict[str, np.ndarray]:
    """x f32[3,C,S,S], t i64[3], context f32[3,M,C_t] and mask i64[3,M] of texts of 1, 4, 7."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((3, 4, 8, 8)).astype(np.float32)
    context = rng.standard_normal((3, 7, 10)).astype(np.float32)
    mask = (np.arange(7)[None] < np.array([[1], [4], [7]])).astype(np.int64)
    return {"x": x, "t": np.array([0, 17, 999]), "context": context, "mask": mask}


@torch.no_grad()
def output(kind: str, network: PixArtTransformer2DModel) -> np.ndarray:
    """f32[3,2C,S,S]."""
    given = {name: torch.from_numpy(value) for name, value in inputs().items()}
    told: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if kind == "1024":
        side = torch.full((3, 2), 64.0)
        told = {"resolution": side, "aspect_ratio": torch.ones((3, 1))}
    found = network(
        given["x"],
        encoder_hidden_states=given["context"],
        timestep=given["t"],
        added_cond_kwargs=told,
        encoder_attention_mask=given["mask"],
    )
    result: np.ndarray = found.sample.numpy()
    return result


def goldens() -> dict[str, np.ndarray]:
    """The inputs, and of each type its tensors' shapes, its folder's config and its output."""
    found = inputs()
    for kind in TYPES:
        network = pixart(kind)
        shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
        found[f"{kind}/shapes"] = np.array(json.dumps(shapes))
        config = {"_class_name": "PixArtTransformer2DModel", **network.config}
        found[f"{kind}/config"] = np.array(json.dumps(config, default=str))
        found[f"{kind}/output"] = output(kind, network)
    return found
