"""diffusers' Latte of texts on seeded weights, made tiny."""

import json
from typing import Any

import numpy as np
import torch
from diffusers import LatteTransformer3DModel

from tests.oracles.networks import seeded_network

PACKAGES = ("torch", "diffusers", "numpy")
CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "attention_bias": True,
    "caption_channels": 10,
    "sample_size": 8,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "video_length": 3,
}


def latte_text() -> LatteTransformer3DModel:
    """A network none of whose weights is zero."""
    network: LatteTransformer3DModel = seeded_network(LatteTransformer3DModel(**CONFIG))
    return network


def inputs() -> dict[str, np.ndarray]:
    """x f32[2,C,F,S,S], t i64[2], context f32[2,M,C_t]."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((2, 4, 3, 8, 8)).astype(np.float32)
    context = rng.standard_normal((2, 5, 10)).astype(np.float32)
    return {"x": x, "t": np.array([17, 999]), "context": context}


@torch.no_grad()
def output(network: LatteTransformer3DModel) -> np.ndarray:
    """f32[2,2C,F,S,S]."""
    given = {name: torch.from_numpy(value) for name, value in inputs().items()}
    found = network(given["x"], timestep=given["t"], encoder_hidden_states=given["context"])
    result: np.ndarray = found.sample.numpy()
    return result


def goldens() -> dict[str, np.ndarray]:
    """The inputs, the tensors' shapes, the folder's config and the output."""
    network = latte_text()
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    config = {"_class_name": "LatteTransformer3DModel", **network.config}
    return {
        **inputs(),
        "shapes": np.array(json.dumps(shapes)),
        "config": np.array(json.dumps(config, default=str)),
        "output": output(network),
    }
