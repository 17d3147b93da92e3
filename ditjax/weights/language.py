"""Layers of language models, to be run on other tokens: BERT's and LLaMA's layouts.

A folder of transformers (model_type bert or llama), a folder of LLaMA's own release
(consolidated.*.pth with params.json), or a GGUF file of LLaMA's architecture. Tensors of LLaMA are
renamed to transformers' first. Where several query heads share a key head, the key and value heads
are repeated, so that all layers have one form; what is trained of them is then no longer tied.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.errors import UserError, shown
from ditjax.files.atomic import read_json
from ditjax.models.frozen import LayerStack
from ditjax.models.text import Layers
from ditjax.weights import tensors as weights
from ditjax.weights.gguf import read_gguf
from ditjax.weights.layouts import Layout, LeafRule
from ditjax.weights.networks import initial_shapes
from ditjax.weights.text import (
    TransformersFolder,
    bert_blocks,
    bert_layers,
    linear_rules,
    read_leaves,
)

_GGUF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_RELEASE_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_LAYER = "layers.{i}"


class LoadedLayers(NamedTuple):
    """Layers of a language model: their sizes, parameters f32 of a `LayerStack`, and a line."""

    layers: Layers
    final_norm: bool
    params: Any
    account: str


def _llama_rules() -> Layout:
    attention, mlp = f"{_LAYER}.self_attn", f"{_LAYER}.mlp"
    qkv = (f"{attention}.{name}_proj" for name in "qkv")
    return [
        *linear_rules("blocks/attn/qkv", *qkv, biases=False),
        *linear_rules("blocks/attn/out", f"{attention}.o_proj", biases=False),
        LeafRule("blocks/norm1/scale", (f"{_LAYER}.input_layernorm.weight",), "vector"),
        *linear_rules("blocks/mlp/gate_up", f"{mlp}.gate_proj", f"{mlp}.up_proj", biases=False),
        *linear_rules("blocks/mlp/out", f"{mlp}.down_proj", biases=False),
        LeafRule("blocks/norm2/scale", (f"{_LAYER}.post_attention_layernorm.weight",), "vector"),
        LeafRule("norm_final/scale", ("norm.weight",), "vector"),
    ]


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """'blk.3.attn_q.weight' -> 'layers.3.self_attn.q_proj.weight'; '' for what no layer needs."""
    if name in ("output_norm.weight", "norm.weight"):
        return "norm.weight"
    match = re.fullmatch(r"(?:blk|layers)\.(\d+)\.(.+)\.weight", name)
    found = names.get(match[2]) if match else None
    return f"layers.{match[1]}.{found}.weight" if match and found else ""


def _in(name: str, first: int, last: int) -> bool:
    """Whether a tensor is of one of the layers first to last - 1, or of none."""
    match = re.search(r"layers?\.(\d+)\.", name)
    return match is None or first <= int(match[1]) < last


def _from_gguf(path: Path, first: int, last: int) -> TransformersFolder:
    file = read_gguf(path)
    kind = file.values.get("general.architecture")
    if kind != "llama":
        raise UserError(f"{path} is a model of {shown(kind)}: expected LLaMA's architecture.")
    found = {name: _renamed(name, _GGUF_NAMES) for name in file.shapes}
    tensors = {new: file.read(name) for name, new in found.items() if new and _in(new, first, last)}
    config = {
        "model_type": "llama",
        "num_attention_heads": file.values.get("llama.attention.head_count"),
        "num_key_value_heads": file.values.get("llama.attention.head_count_kv"),
        "rms_norm_eps": file.values.get("llama.attention.layer_norm_rms_epsilon"),
    }
    stated = {name: value for name, value in config.items() if value is not None}
    left = {name: 1 for name, new in found.items() if new not in tensors}
    return TransformersFolder(
        path, weights.TensorFile(path, tensors, (path,), stated, {}, {}, left=left)
    )


def _from_release(folder: Path, first: int, last: int) -> TransformersFolder:
    params = read_json(folder / "params.json")
    parts = sorted(folder.glob("consolidated.*"))
    if len(parts) != 1:
        raise UserError(
            f"{folder} has {len(parts)} files consolidated.*: expected one; join parts of larger"
            " models, whose tensors are split, by transformers' converter first."
        )
    file = weights.read_tensors(parts[0])
    found = {name: _renamed(name, _RELEASE_NAMES) for name in file.tensors}
    kept = {new: name for name, new in found.items() if new and _in(new, first, last)}
    file = file.without(lambda name: name not in kept.values())
    config = {
        "model_type": "llama",
        "num_attention_heads": params.get("n_heads", 32),
        "num_key_value_heads": params.get("n_kv_heads") or params.get("n_heads", 32),
        "rms_norm_eps": params.get("norm_eps", 1e-6),
    }
    tensors = {new: file.tensors[name] for new, name in kept.items()}
    return TransformersFolder(folder, file._replace(tensors=tensors, config=config))


def _opened(path: str, first: int, last: int) -> TransformersFolder:
    place = Path(path)
    if place.suffix == ".gguf":
        return _from_gguf(place, first, last)
    if (place / "params.json").exists():
        return _from_release(place, first, last)
    folder = TransformersFolder(path)
    if folder.kind not in ("bert", "llama"):
        raise UserError(
            f"{path}: config.json says model_type={shown(folder.kind)}: expected 'bert' or"
            " 'llama', LLaMA's own folder, or a GGUF file."
        )
    keep = ("encoder.layer.",) if folder.kind == "bert" else ("layers.", "norm.")
    folder.plain(keep, ("bert.", "model."))
    folder.file = folder.file.without(lambda name: not _in(name, first, last))
    return folder


def _with_all_heads(folder: TransformersFolder, first: int, last: int, heads: int) -> None:
    """Repeat the key and value heads that several query heads share."""
    shared = folder.heads("", "num_key_value_heads", heads, heads)
    tensors = dict(folder.file.tensors)
    for i in range(first, last):
        for name in (f"layers.{i}.self_attn.{kind}_proj.weight" for kind in "kv"):
            rows, width = folder.shape(name, 2)
            by_head = tensors[name].reshape(shared, rows // shared, width)
            tensors[name] = np.repeat(by_head, heads // shared, axis=0).reshape(-1, width)
    folder.file = folder.file._replace(tensors=tensors)


def _llama_layers(folder: TransformersFolder, first: int, last: int) -> Layers:
    stem = f"layers.{first}"
    hidden, width = folder.shape(f"{stem}.mlp.gate_proj.weight", 2)
    inner, _ = folder.shape(f"{stem}.self_attn.q_proj.weight", 2)
    heads = folder.heads("", "num_attention_heads", 32, inner)
    _with_all_heads(folder, first, last, heads)
    return Layers(
        last - first,
        width,
        heads,
        hidden,
        folder.activation("", "hidden_act", "silu"),
        folder.stated("", "rms_norm_eps", 1e-6),
        rms=True,
        biases=False,
        gated=True,
        head_width=inner // heads,
    )


def load_layers(path: str, first: int, last: int) -> LoadedLayers:
    """Layers first to last - 1 of a language model, without positions, with the final norm if any.

    Raises UserError for a path of another layout, and for layers that it does not have.
    """
    folder = _opened(path, first, last)
    count = _layers_of(folder)
    if not {*range(first, last)} <= count:
        raise UserError(
            f"{path}: layers {first} to {last - 1} are asked for by config.lm.layers=({first},"
            f" {last}), and it lacks {min({*range(first, last)} - count)}."
        )
    if folder.kind == "bert":
        layers, rules = bert_layers(folder, first, last), bert_blocks()
    else:
        layers, rules = _llama_layers(folder, first, last), _llama_rules()
    rules = [rule._replace(first=first) if "{i}" in rule.theirs[0] else rule for rule in rules]
    stack = LayerStack(layers, layers.rms)
    tokens = jax.ShapeDtypeStruct((1, 1, layers.width), jnp.float32)
    params = read_leaves(folder, rules, initial_shapes(stack.init, tokens))
    account = f"layers {first} to {last - 1} of {path}: {len(folder.file.tensors)} tensors"
    return LoadedLayers(layers, layers.rms, params, account)


def _layers_of(folder: TransformersFolder) -> set[int]:
    found = (re.search(r"layers?\.(\d+)\.", name) for name in folder.file.tensors)
    return {int(match[1]) for match in found if match}
