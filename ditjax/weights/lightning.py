"""LightningDiT (Yao et al. 2025): the release's names, and four parts that ours computes otherwise.

The norms have scales γ, which ours do not: γ x̂ (1 + s) + shift is x̂ (1 + s') + shift with
s' = γ s + γ - 1, so that γ is folded into the layer that regresses s. Rotary positions turn the
pairs (2i, 2i + 1) of a head, ours (i, i + d/2): the rows of queries and keys change places, which
changes no product. The tables of the rotations are compared and not kept. SwiGLU and the norms of
queries and keys are ours by other names (`layouts.lightning_layout`).

Names and equations as in models/lightningdit.py of hustvl/LightningDiT at 2725fed.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditjax.errors import UserError
from ditjax.models.attention import rotary_table

_Tensors = dict[str, np.ndarray]

_ROTATIONS = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
_NORM, _LAST_NORM = "blocks.{i}.{norm}.weight", "final_layer.norm_final.weight"
_QK = ("q_norm", "k_norm")
# Its own script draws with Euler's rule and a shift of .3 of the time from noise.
SAMPLING = {"sampler": "euler", "steps": "250", "shift": 1 / 0.3}
PROCESS = {
    "process": "flow",
    "prediction": "velocity",
    "time_scale": 1.0,
    "time_from_noise": True,
}
AUTOENCODER = (1, 1, 2, 2, 4)  # VA-VAE's levels: 16 pixels a latent
_WITHOUT_SHIFT = 4  # vectors of adaLN with wo_shift


def is_lightning(names: Iterable[str]) -> bool:
    """Whether these names are LightningDiT's and not the release's."""
    own = {"blocks.0.mlp.w12.weight", "blocks.0.attn.q_norm.weight", _LAST_NORM}
    return bool({*own, *_ROTATIONS} & set(names))


def block_keys(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The keys of config.model that its names show. Raises UserError for others than ours."""
    first, qk = "blocks.0.", "blocks.0.attn.q_norm.weight" in tensors
    rms = f"{first}norm1.weight" in tensors
    width = tensors["x_embedder.proj.weight"].shape[0]
    adaln = tensors.get(f"{first}adaLN_modulation.1.weight")
    if adaln is not None and adaln.shape[0] == _WITHOUT_SHIFT * width:
        raise UserError(
            f"{path}: its blocks have no shift (wo_shift): expected a LightningDiT with six vectors"
            " a block."
        )
    if qk and (not rms or f"{first}attn.q_norm.bias" in tensors):
        raise UserError(
            f"{path}: its queries and keys are normalised by LayerNorm: expected RMSNorm"
            " (use_rmsnorm), or none."
        )
    return {
        "norm": "rms" if rms else "layer",
        "mlp": "swiglu" if f"{first}mlp.w12.weight" in tensors else "gelu",
        "qk_norm": qk,
        "rope": _ROTATIONS[0] in tensors,
    }


def to_plain(path: Path, tensors: _Tensors, k: Any, depth: int, heads: int, side: int) -> _Tensors:
    """Its tensors with the scales folded and the rows in our order. Raises UserError."""
    found = dict(tensors)
    if k.rope:
        _check_rotations(path, found, k, heads, side)
        _turn(found, depth, heads, _apart)
    if k.norm != "rms":
        return found
    for i in range(depth):
        for norm, chunk in (("norm1", 1), ("norm2", 4)):
            scale = found.pop(_NORM.format(i=i, norm=norm), None)
            _fold(path, found, scale, f"blocks.{i}.adaLN_modulation.1", chunk)
    scale = found.pop(_LAST_NORM, None)
    _fold(path, found, scale, "final_layer.adaLN_modulation.1", 1)
    return found


def from_plain(tensors: _Tensors, k: Any, depth: int, heads: int, side: int) -> _Tensors:
    """The inverse, with scales of 1."""
    found = dict(tensors)
    dtype, width = found["x_embedder.proj.bias"].dtype, found["x_embedder.proj.bias"].size
    if k.rope:
        _turn(found, depth, heads, _together)
        tables = _rotations(side, width // heads)
        found |= {name: each.astype(dtype) for name, each in zip(_ROTATIONS, tables, strict=True)}
    if k.norm == "rms":
        names = [_NORM.format(i=i, norm=norm) for i in range(depth) for norm in ("norm1", "norm2")]
        names.append(_LAST_NORM)
        found |= {name: np.ones(width, dtype) for name in names}
    return found


def _fold(path: Path, found: _Tensors, scale: Any, layer: str, chunk: int) -> None:
    """Multiply the scale of a norm into the layer that regresses the `chunk`-th vector."""
    weight, bias = (found.get(f"{layer}.{name}") for name in ("weight", "bias"))
    if scale is None or weight is None or bias is None or weight.shape[0] % scale.size:
        raise UserError(f"{path}: {layer} or its norm is missing, or of another width.")
    gamma = scale.astype(np.float32)
    rows = slice(chunk * gamma.size, (chunk + 1) * gamma.size)
    weight, bias = weight.copy(), bias.copy()
    weight[rows] = gamma[:, None] * weight[rows].astype(np.float32)
    bias[rows] = gamma * bias[rows].astype(np.float32) + (gamma - 1)
    found |= {f"{layer}.weight": weight, f"{layer}.bias": bias}


def _apart(x: np.ndarray) -> np.ndarray:
    """Pairs (2i, 2i + 1) of the axis d of [.., d, rest] to (i, i + d/2)."""
    return np.concatenate([x[..., 0::2, :], x[..., 1::2, :]], axis=-2)


def _together(x: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, axis=-2)
    return np.stack([first, second], axis=-2).reshape(x.shape)


def _turn(found: _Tensors, depth: int, heads: int, order: Any) -> None:
    """Reorder the rows of queries and keys, and the scales of their norms, within each head."""
    for i in range(depth):
        for name in ("weight", "bias"):
            whole = found[f"blocks.{i}.attn.qkv.{name}"]
            parts = whole.reshape(3, heads, -1, whole[0].size)
            turned = np.concatenate([order(parts[:2]), parts[2:]])
            found[f"blocks.{i}.attn.qkv.{name}"] = turned.reshape(whole.shape)
        for norm in _QK:
            name = f"blocks.{i}.attn.{norm}.weight"
            if name in found:
                found[name] = order(found[name][:, None])[:, 0]


def _rotations(side: int, head_width: int) -> list[np.ndarray]:
    """Its tables: cos and sin f32[side², d] of the angle of each number."""
    tables = rotary_table(side, side, head_width, side * side)
    return [np.repeat(table, 2, axis=1) for table in tables]


def _check_rotations(path: Path, found: _Tensors, k: Any, heads: int, side: int) -> None:
    width = found["x_embedder.proj.weight"].shape[0]
    for name, expected in zip(_ROTATIONS, _rotations(side, width // heads), strict=True):
        table = found.pop(name, None)
        if table is None or table.shape != expected.shape:
            shape = None if table is None else table.shape
            raise UserError(f"{path}: {name} is of shape {shape}: expected {expected.shape}.")
        if np.abs(table.astype(np.float32) - expected).max() > 2.0**-7:
            raise UserError(
                f"{path}: {name} are rotations by other angles than the base 10,000 gives on"
                f" {side}x{side} tokens, which ditjax does not have."
            )
