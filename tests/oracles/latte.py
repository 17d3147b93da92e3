"""Latte's own code on seeded weights: python -m tests.oracles.make_goldens latte

It is no package: LATTE names a checkout of github.com/Vchitect/Latte, of which `models/latte.py` is
run as it is (commit b27c24a).
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.oracles.networks import seeded_network

PACKAGES = ("torch", "timm", "einops", "numpy")

# Two pairs of blocks on 3 frames of 4x4 patches, with labels; 10 classes and the null label.
SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 32,
    "depth": 4,
    "num_heads": 2,
    "num_frames": 3,
    "num_classes": 10,
    "extras": 2,
}
# S/2 of 4 frames at 8x8: what was compared by hand.
S2 = {**SMALL, "hidden_size": 384, "depth": 12, "num_heads": 6, "num_frames": 4}


def latte(config: dict[str, Any]) -> torch.nn.Module:
    """Latte with every weight seeded but its two tables of positions."""
    path = Path(os.environ["LATTE"]) / "models" / "latte.py"
    spec = importlib.util.spec_from_file_location("latte", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.Latte(**config)
    tables = {name: getattr(network, name).detach().clone() for name in ("pos_embed", "temp_embed")}
    network = seeded_network(network)
    network.load_state_dict(tables, strict=False)
    return network


def inputs(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x f32[2,F,C,S,S], t i64[2], y i64[2], the last unconditional."""
    side = config["input_size"]
    x = np.random.default_rng(2).standard_normal(
        (2, config["num_frames"], config["in_channels"], side, side)
    )
    return x.astype(np.float32), np.array([3, 980]), np.array([7, 10])


def output(network: torch.nn.Module, config: dict[str, Any]) -> np.ndarray:
    """f32[2,F,2C,S,S]."""
    x, t, y = (torch.from_numpy(a) for a in inputs(config))
    with torch.no_grad():
        return network(x, t, y).numpy()


def goldens() -> dict[str, np.ndarray]:
    """Names, shapes, inputs and output of the small Latte."""
    network = latte(SMALL)
    state = network.state_dict()
    x, t, y = inputs(SMALL)
    return {
        "shapes": np.array(
            json.dumps({name: list(tensor.shape) for name, tensor in state.items()})
        ),
        "pos_embed": state["pos_embed"].numpy(),
        "temp_embed": state["temp_embed"].numpy(),
        "x": x,
        "t": t,
        "y": y,
        "output": output(network, SMALL),
    }
