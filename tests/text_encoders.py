"""Folders of tiny text encoders, from the golden file that transformers made."""

import json
from pathlib import Path

import numpy as np

from ditjax.weights.tensors import write_safetensors

GOLDENS = Path(__file__).parent / "goldens" / "text.npz"


def golden(name):
    """What the golden file holds of a model, by the rest of the name."""
    with np.load(GOLDENS) as file:
        return {
            key.partition("/")[2]: file[key] for key in file.files if key.startswith(f"{name}/")
        }


def golden_images():
    """The images f32[3,8,8,3] that CLIP's golden embeds."""
    with np.load(GOLDENS) as file:
        return file["images"]


def write_folder(folder, found, rename=lambda name: name):
    """Write a model's folder of transformers: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(str(found["config"]), encoding="utf-8")
    tensors = {
        rename(key.removeprefix("tensor/")): value
        for key, value in found.items()
        if key.startswith("tensor/")
    }
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def with_config(found, **changes):
    """The same with other values in config.json."""
    config = {**json.loads(str(found["config"])), **changes}
    return {**found, "config": np.array(json.dumps(config))}


def relative(ours, theirs):
    """max |a - b| / max |b|."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
