"""Adapters in the files of peft and diffusers, spelled out here from those programs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ditjax.files.assets import flatten
from ditjax.weights.adapters import Adapter
from tests.seeded import seeded_state

PREFIX = "base_model.model."
GAIN = 0.4  # of A and B: larger ones would make the network of the goldens a chaotic one
WIDTH, DEPTH = 48, 2  # of the golden network, of 3 heads
# Module of a block -> its outputs and inputs.
DIFFUSERS = {
    "attn1.to_q": (48, 48),
    "attn1.to_k": (48, 48),
    "attn1.to_v": (48, 48),
    "attn1.to_out.0": (48, 48),
    "ff.net.0.proj": (192, 48),
    "ff.net.2": (48, 192),
    "norm1.linear": (288, 48),
}
RELEASE = {
    "attn.qkv": (144, 48),
    "attn.proj": (48, 48),
    "mlp.fc1": (192, 48),
    "mlp.fc2": (48, 192),
    "adaLN_modulation.1": (288, 48),
}


def modules(names: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Of every block, and the last layer."""
    blocks, last = (
        ("transformer_blocks", "proj_out_2")
        if names is DIFFUSERS
        else ("blocks", "final_layer.linear")
    )
    found = {f"{blocks}.{i}.{m}": shape for i in range(DEPTH) for m, shape in names.items()}
    return {**found, last: (128, 48)}


def factors(
    names: dict[str, tuple[int, int]], rank: int = 2, seed: int = 7
) -> dict[str, np.ndarray]:
    """A and B of every module, none of them zero, by their names without a prefix."""
    shapes = {}
    for name, (out, into) in modules(names).items():
        shapes[f"{name}.lora_A.weight"] = (rank, into)
        shapes[f"{name}.lora_B.weight"] = (out, rank)
    return seeded_state(shapes, seed, GAIN)


def config(rank: int = 2, alpha: float = 6, **more: Any) -> dict[str, Any]:
    """What peft 0.21 writes for LoRA, the keys that matter."""
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["to_q", "qkv"],
        "bias": "none",
        "lora_dropout": 0.1,
        "init_lora_weights": False,
        "use_dora": False,
        "modules_to_save": None,
        "megatron_core": "megatron.core",
        **more,
    }


def peft_folder(folder: Path, state: dict[str, np.ndarray], stated: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"{PREFIX}{name}": x for name, x in state.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    return folder


def lora_file(
    path: Path, state: dict[str, np.ndarray], stated: dict[str, Any] | None, prefix: str = ""
) -> Path:
    """As diffusers' `save_lora_adapter`, or with a prefix `save_lora_weights`, writes it."""
    named = {f"{prefix}{name}": x for name, x in state.items()}
    metadata = {"format": "pt"}
    if stated is not None:
        metadata["lora_adapter_metadata"] = json.dumps(
            {f"{prefix}{k}": v for k, v in stated.items()}
        )
    save_file(named, path, metadata)
    return path


def merged(
    state: dict[str, np.ndarray], adapter: dict[str, np.ndarray], scale: float
) -> dict[str, np.ndarray]:
    """Hu et al. 2021, Eq. 3, on another program's state dict: W + s B A."""
    found = dict(state)
    for name in adapter:
        if (module := name.removesuffix(".lora_A.weight")) != name:
            a, b = (adapter[f"{module}.lora_{half}.weight"].astype(np.float64) for half in "AB")
            found[f"{module}.weight"] = (found[f"{module}.weight"] + scale * b @ a).astype(
                np.float32
            )
    return found


def factor_gradients(adapter: Adapter, gradient: Any) -> dict[str, np.ndarray]:
    """The gradient of factors f32 of ours as that of each A and B of diffusers, by its name.

    Ours have the scale in B.
    """
    names = {
        "blocks/attn/qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "blocks/attn/out": ("attn1.to_out.0",),
        "blocks/mlp/in": ("ff.net.0.proj",),
        "blocks/mlp/out": ("ff.net.2",),
        "blocks/adaln/linear": ("norm1.linear",),
        "final_layer/linear": ("proj_out_2",),
    }
    flat, found = flatten(gradient), {}
    for (layer, block, k), module in adapter.modules.items():
        a, b = (np.asarray(flat[f"{layer}/{half}"]) for half in "ab")
        if layer.startswith("blocks/"):
            a, b = a[block], b[block]
        name = names[layer][k]
        name = f"transformer_blocks.{block}.{name}" if layer.startswith("blocks/") else name
        r = module.rank
        found[f"{name}.lora_A.weight"] = a[k, :, :r].T
        found[f"{name}.lora_B.weight"] = module.scale * b[k].reshape(a.shape[-1], -1)[:r].T
    return found
