"""LightningDiT's own code on seeded weights: python -m tests.oracles.make_goldens lightning

It is no package: LIGHTNINGDIT names a checkout of github.com/hustvl/LightningDiT, of which
`models/lightningdit.py` is run as it is (commit 2725fed), but not compiled by PyTorch. fairscale,
which only layers import that it does not use, need not be there.
"""

import importlib
import json
import os
import sys
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.oracles.networks import seeded_network

PACKAGES = ("torch", "timm", "einops", "numpy")

# All of its parts: two blocks on 4x4 latents, with labels; 10 classes and the null label.
SMALL = {
    "input_size": 4,
    "patch_size": 1,
    "in_channels": 4,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
    "use_qknorm": True,
    "use_swiglu": True,
    "use_rope": True,
    "use_rmsnorm": True,
}
_TABLES = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")


def lightning(config: dict[str, Any]) -> torch.nn.Module:
    """LightningDiT with every weight seeded but its tables of positions."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    sys.path.insert(0, os.environ["LIGHTNINGDIT"])
    parallel = "fairscale.nn.model_parallel"
    for name in ("fairscale", "fairscale.nn", parallel, f"{parallel}.initialize"):
        sys.modules[name] = mock.MagicMock()
    sys.modules[f"{parallel}.layers"] = mock.MagicMock()
    try:
        module = importlib.import_module("models.lightningdit")
    finally:
        sys.path.pop(0)
    network = module.LightningDiT(**config)
    tables = {name: network.state_dict()[name].clone() for name in _TABLES}
    network = seeded_network(network)
    network.load_state_dict(tables, strict=False)
    return network.eval()


def inputs(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x f32[2,C,S,S], t f32[2] from noise to data, y i64[2], the last unconditional."""
    shape = (2, config["in_channels"], config["input_size"], config["input_size"])
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    return x, np.array([0.2, 0.9], np.float32), np.array([7, 10])


def output(network: torch.nn.Module, config: dict[str, Any]) -> np.ndarray:
    """f32[2,C,S,S]."""
    with torch.no_grad():
        return network(*(torch.from_numpy(a) for a in inputs(config))).numpy()


def goldens() -> dict[str, np.ndarray]:
    """Names, shapes, tables, inputs and output of the small LightningDiT."""
    network = lightning(SMALL)
    state = network.state_dict()
    x, t, y = inputs(SMALL)
    return {
        "shapes": np.array(
            json.dumps({name: list(tensor.shape) for name, tensor in state.items()})
        ),
        **{name: state[name].numpy() for name in _TABLES},
        "x": x,
        "t": t,
        "y": y,
        "output": output(network, SMALL),
    }
