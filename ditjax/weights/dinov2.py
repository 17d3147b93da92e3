"""DINOv2 from the release's files (dinov2_vitl14_pretrain.pth), or transformers' folders."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ditjax.errors import UserError
from ditjax.files.assets import unflatten
from ditjax.models.dinov2 import DINO_SIDE, DinoConfig, DinoV2
from ditjax.models.text import Layers
from ditjax.weights import layouts
from ditjax.weights import tensors as weights
from ditjax.weights.layouts import Layout, LeafRule
from ditjax.weights.networks import initial_shapes
from ditjax.weights.text import linear_rules, norm_rules

_HEAD_WIDTH = 64  # of all released sizes; a folder of transformers says the number of heads
_EPS = 1e-6
# The release divides the grid's side plus this by the table's side (interpolate_offset).
_OFFSET = 0.1


class LoadedDino(NamedTuple):
    """The network, its parameters f32 for images of a side, its files, and a line to print."""

    config: DinoConfig
    params: Any
    files: tuple[Path, ...]
    account: str


def _rules(theirs: Mapping[str, str]) -> Layout:
    layer = theirs["layer"]
    return [
        LeafRule("cls", (theirs["cls"],), "vector"),
        LeafRule("positions", (theirs["positions"],), "table"),
        LeafRule("x_embedder/kernel", (f"{theirs['patches']}.weight",), "patch"),
        LeafRule("x_embedder/bias", (f"{theirs['patches']}.bias",), "vector"),
        *linear_rules("blocks/attn/qkv", *(f"{layer}.{name}" for name in theirs["qkv"].split())),
        *linear_rules("blocks/attn/out", f"{layer}.{theirs['out']}"),
        *norm_rules("blocks/norm1", f"{layer}.norm1"),
        *norm_rules("blocks/norm2", f"{layer}.norm2"),
        *linear_rules("blocks/mlp/in", f"{layer}.mlp.fc1"),
        *linear_rules("blocks/mlp/out", f"{layer}.mlp.fc2"),
        LeafRule("blocks/scale1", (f"{layer}.{theirs['scale'].format(1)}",), "vector"),
        LeafRule("blocks/scale2", (f"{layer}.{theirs['scale'].format(2)}",), "vector"),
        *norm_rules("norm", theirs["norm"]),
    ]


_RELEASE = {
    "cls": "cls_token",
    "positions": "pos_embed",
    "patches": "patch_embed.proj",
    "layer": "blocks.{i}",
    "qkv": "attn.qkv",
    "out": "attn.proj",
    "scale": "ls{}.gamma",
    "norm": "norm",
    "mask": "mask_token",
}
_TRANSFORMERS = {
    "cls": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings",
    "patches": "embeddings.patch_embeddings.projection",
    "layer": "encoder.layer.{i}",
    "qkv": "attention.attention.query attention.attention.key attention.attention.value",
    "out": "attention.output.dense",
    "scale": "layer_scale{}.lambda1",
    "norm": "layernorm",
    "mask": "embeddings.mask_token",
}


def load_dinov2(path: str | os.PathLike[str], side: int = DINO_SIDE) -> LoadedDino:
    """Read a ViT of DINOv2 for images of side x side pixels.

    Positions are interpolated as the program that wrote the file does it. Raises UserError for a
    file of another network, and for variants with registers or SwiGLU, which are not built.
    """
    file = weights.read_tensors(path)
    theirs = _RELEASE if _RELEASE["cls"] in file.tensors else _TRANSFORMERS
    if theirs["positions"] not in file.tensors or theirs["cls"] not in file.tensors:
        raise UserError(
            f"{path} has no {_RELEASE['positions']}: expected DINOv2, such as"
            " dinov2_vitl14_pretrain.pth, or a folder of transformers' Dinov2Model."
        )
    for mark, what in (
        ("register_tokens", "registers"),
        ("w12", "SwiGLU"),
        ("weights_in", "SwiGLU"),
    ):
        if any(mark in name for name in file.tensors):
            raise UserError(
                f"{path} is a DINOv2 with {what}, which is not built: choose ViT-S, B or L without"
                " registers, such as dinov2_vitl14_pretrain.pth."
            )
    file = file.without(lambda name: name == theirs["mask"])  # of the training alone
    tensors = dict(file.tensors)
    kernel = tensors.get(f"{theirs['patches']}.weight", np.empty(0))
    if kernel.ndim != 4:
        raise UserError(f"{path}: {theirs['patches']}.weight is missing or has not four axes.")
    width, patch = kernel.shape[0], kernel.shape[-1]
    if side % patch:
        raise UserError(f"{path} has patches of {patch} pixels, which do not divide {side}.")
    tensors[theirs["cls"]] = tensors[theirs["cls"]].reshape(-1)
    offset = _OFFSET if theirs is _RELEASE else 0.0
    tensors[theirs["positions"]] = fitted_positions(
        tensors[theirs["positions"]], side // patch, offset
    )
    layers = _layers(tensors, theirs, width, file.config)
    config, rules = DinoConfig(layers, patch), _rules(theirs)
    x = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    ours = initial_shapes(DinoV2(config).init, x)
    expected = layouts.expected_shapes(rules, ours, patch=patch)
    weights.check_tensors(file.path, "DINOv2", tensors, expected)
    leaves = layouts.to_ours(rules, tensors, ours)
    params = unflatten({name: np.asarray(leaf, np.float32) for name, leaf in leaves.items()})
    return LoadedDino(config, params, file.files, file.account)


def _layers(
    tensors: Mapping[str, np.ndarray],
    theirs: Mapping[str, str],
    width: int,
    config: Mapping[str, Any],
) -> Layers:
    first = f"{theirs['layer']}.mlp.fc1.weight"
    depth = 0
    while first.format(i=depth) in tensors:
        depth += 1
    hidden = tensors[first.format(i=0)].shape[0] if depth else 4 * width
    heads = int(config.get("num_attention_heads", max(1, width // _HEAD_WIDTH)))
    return Layers(depth or 1, width, heads, hidden, "gelu", _EPS, layer_scale=True)


def fitted_positions(table: np.ndarray, grid: int, offset: float = 0.0) -> np.ndarray:
    """Positions [1,1+n²,D] of an n x n grid -> [1+grid²,D], bicubic without antialiasing.

    PyTorch's kernel, a = -3/4, with the edge repeated; pixel i of the new grid reads
    (i + 1/2) n / (grid + offset) - 1/2. A table of that grid is taken as it is.
    """
    table = np.asarray(table, np.float64).reshape(-1, table.shape[-1])
    n = math.isqrt(len(table) - 1)
    if n * n != len(table) - 1:
        raise UserError(f"{len(table)} positions: expected a class token and a square grid.")
    if n == grid:
        return table.astype(np.float32)
    at = (np.arange(grid) + 0.5) * n / (grid + offset) - 0.5
    weight, low = np.zeros((grid, n)), np.floor(at).astype(int)
    for tap in range(-1, 3):
        away = np.abs(at - (low + tap))
        near = (1.25 * away - 2.25) * away**2 + 1
        far = -0.75 * (((away - 5) * away + 8) * away - 4)
        value = np.where(away <= 1, near, far)
        np.add.at(weight, (np.arange(grid), (low + tap).clip(0, n - 1)), value)
    grown = np.einsum("ai,bj,ijd->abd", weight, weight, table[1:].reshape(n, n, -1))
    return np.concatenate([table[:1], grown.reshape(grid * grid, -1)]).astype(np.float32)
