"""peft's LoRA on diffusers' DiT with seeded weights, and the golden file of what it computes."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from diffusers.loaders.peft import PeftAdapterMixin
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

from tests.adapter_files import GAIN, PREFIX
from tests.oracles.networks import SMALL_DIT, dit, dit_inputs, seeded_network
from tests.seeded import seeded_state

PACKAGES = ("torch", "diffusers", "peft", "numpy")
SEED = 7
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear"]


class AdaptedDiT(DiTTransformer2DModel, PeftAdapterMixin):
    """diffusers' DiT with the files of its other networks, which its own class lacks."""


@functools.cache
def stated() -> dict[str, Any]:
    """A rank and an alpha of one layer other than those of the others."""
    return {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": [*TARGETS, "proj_out_2"],
        "rank_pattern": {"attn1.to_v": 3},
        "alpha_pattern": {"ff.net.2": 5},
        "init_lora_weights": False,
    }


def seed_factors(network: torch.nn.Module) -> torch.nn.Module:
    """A and B of `tests.seeded`, by their names without an adapter's."""
    halves = {
        name: x
        for name, x in network.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    short = {name: name.removeprefix(PREFIX).replace(".default.", ".") for name in halves}
    values = seeded_state({short[name]: tuple(x.shape) for name, x in halves.items()}, SEED, GAIN)
    with torch.no_grad():
        for name, x in halves.items():
            x.copy_(torch.from_numpy(values[short[name]]))
    return network


def adapted(**changes: Any) -> PeftModel:
    """peft's network."""
    config = LoraConfig(**{**stated(), **changes})
    network = get_peft_model(dit(SMALL_DIT), config)
    return seed_factors(network).eval()


def output(network: torch.nn.Module) -> np.ndarray:
    """f32[3,2C,S,S]."""
    with torch.no_grad():
        return network(*map(torch.from_numpy, dit_inputs(SMALL_DIT))).sample.numpy()


def gradients(network: torch.nn.Module) -> dict[str, np.ndarray]:
    """Of the mean square of the output with respect to every A and B, by their short names."""
    network.zero_grad()
    found = network(*map(torch.from_numpy, dit_inputs(SMALL_DIT))).sample
    (found**2).mean().backward()
    return {
        name.removeprefix(PREFIX).replace(".default.", "."): x.grad.numpy()
        for name, x in network.named_parameters()
        if x.grad is not None
    }


def goldens() -> dict[str, np.ndarray]:
    """What peft and diffusers write of it, beside the values, and what it computes."""
    network = adapted()
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        with safe_open(Path(folder) / "adapter_model.safetensors", framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    config["target_modules"].sort()
    theirs = seeded_network(AdaptedDiT(**SMALL_DIT))
    theirs.add_adapter(LoraConfig(**stated()))
    seed_factors(theirs)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_lora_adapter(folder)
        with safe_open(
            Path(folder) / "pytorch_lora_weights.safetensors", framework="numpy"
        ) as file:
            metadata = dict(file.metadata())
    return {
        "config": np.array(json.dumps(config)),
        "metadata": np.array(json.dumps(metadata)),
        "shapes": np.array(json.dumps(shapes)),
        "output": output(network),
        **{f"gradient {name}": x for name, x in gradients(network).items()},
    }
