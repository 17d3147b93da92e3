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


def tiny_bert(folder, vocabulary=360, width=16, layers=1):
    """Write the folder of a random BERT whose table holds the shipped tokenizer's tokens."""
    rng, D = np.random.default_rng(7), width
    shapes: dict[str, tuple[int, ...]] = {
        f"embeddings.{name}_embeddings.weight": (rows, D)
        for name, rows in (("word", vocabulary), ("position", 32), ("token_type", 2))
    }
    linear = {"attention.self.query": (D, D), "attention.self.key": (D, D)}
    linear |= {"attention.self.value": (D, D), "attention.output.dense": (D, D)}
    linear |= {"intermediate.dense": (2 * D, D), "output.dense": (D, 2 * D)}
    norms = ["embeddings.LayerNorm"]
    for i in range(layers):
        layer = f"encoder.layer.{i}"
        for name, shape in linear.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    shapes |= {f"{name}.{leaf}": (D,) for name in norms for leaf in ("weight", "bias")}
    tensors = {
        name: (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "bert", "num_attention_heads": 2, "layer_norm_eps": 1e-12}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def relative(ours, theirs):
    """max |a - b| / max |b|."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
