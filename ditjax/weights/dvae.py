"""Discrete VAEs from and to the files of openai/DALL-E: a folder with an encoder and a decoder.

The released `encoder.pkl` and `decoder.pkl` are pickled modules. They are read as inert records of
attributes (`pickles.Unknown`); nothing that they name is imported. What is written, `encoder.pt`
and `decoder.pt`, are state dicts, which are read as well.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.errors import UserError, first_few
from ditjax.files.assets import flatten, unflatten
from ditjax.models.dvae import DVAE, DvaeConfig
from ditjax.weights import layouts
from ditjax.weights import tensors as weights
from ditjax.weights.layouts import Layout, LeafRule
from ditjax.weights.networks import check_finite, initial_shapes
from ditjax.weights.torch_file import read_torch, write_torch

_PARTS = ("encoder", "decoder")
_ENDINGS = (".pkl", ".pt")
_PROGRAM = "discrete VAE of openai/DALL-E"


class LoadedDvae(NamedTuple):
    """A discrete VAE: its sizes, its parameters f32, its files, and a line to print."""

    config: DvaeConfig
    params: Any
    files: tuple[Path, ...]
    account: str


def load_dvae(path: str | os.PathLike[str]) -> LoadedDvae:
    """The discrete VAE in a folder. Raises UserError for missing, extra or mis-shaped tensors."""
    folder = Path(path)
    files = tuple(_file_of(folder, part) for part in _PARTS)
    tensors: dict[str, np.ndarray] = {}
    for part, file in zip(_PARTS, files, strict=True):
        found = read_torch(file, roots=(f"dall_e.{part}.{part.capitalize()}",))
        named = _named(found) if isinstance(found, Mapping) else ()
        tensors |= {f"{part}.{name}": leaf for name, leaf in named}
    config = _config(folder, tensors)
    ours = _shapes(config)
    rules = dvae_rules(ours)
    expected = layouts.expected_shapes(rules, ours)
    weights.check_tensors(folder, _PROGRAM, tensors, expected)
    leaves = layouts.to_ours(rules, tensors, ours)
    check_finite(leaves, folder, _PROGRAM)
    params = unflatten({path: np.asarray(leaf, np.float32) for path, leaf in leaves.items()})
    names = " and ".join(str(file) for file in files)
    return LoadedDvae(config, params, files, f"{names}: a {_PROGRAM}, {config.codes} codes")


def write_dvae(folder: str | os.PathLike[str], params: Any) -> None:
    """Write encoder.pt and decoder.pt, for `load_state_dict` of dall_e's Encoder and Decoder."""
    leaves = flatten(params)
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    theirs = layouts.to_theirs(dvae_rules(shapes), leaves)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for part in _PARTS:
        state = {
            name.removeprefix(f"{part}."): np.ascontiguousarray(leaf)
            for name, leaf in theirs.items()
            if name.startswith(f"{part}.")
        }
        write_torch(Path(folder) / f"{part}.pt", state)


def dvae_rules(ours: layouts.Shapes) -> Layout:
    """Their name of each of our leaves: encoder.blocks.group_1.block_1.res_path.conv_1.w, .b."""

    def name(path: str) -> str:
        part, *blocks, layer, leaf = path.split("/")
        if layer == "output":
            layer = "output.conv"
        elif layer.startswith("conv_"):
            layer = f"res_path.{layer}"
        return ".".join((part, "blocks", *blocks, layer, {"kernel": "w", "bias": "b"}[leaf]))

    return [
        LeafRule(path, (name(path),), "conv" if path.endswith("kernel") else "vector")
        for path in ours
    ]


def _file_of(folder: Path, part: str) -> Path:
    names = [f"{part}{ending}" for ending in _ENDINGS]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise UserError(
            f"{folder} holds no {' and no '.join(names)}: expected the folder of a"
            f" {_PROGRAM}, or a run of task 'dvae'."
        )
    return found[0]


def _named(module: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a state dict, or of a module that a pickle describes, by their names."""
    if "_modules" not in module:
        for name, leaf in module.items():
            if isinstance(leaf, np.ndarray):
                yield f"{prefix}{name}", leaf
        return
    for name, leaf in (module.get("_parameters") or {}).items():
        if isinstance(leaf, np.ndarray):
            yield f"{prefix}{name}", leaf
    for name, child in (module["_modules"] or {}).items():
        if isinstance(child, Mapping):
            yield from _named(child, f"{prefix}{name}.")


def _config(folder: Path, tensors: Mapping[str, np.ndarray]) -> DvaeConfig:
    """The sizes that the tensors show. Raises UserError if there are no such tensors."""
    found = [re.fullmatch(r"encoder\.blocks\.group_(\d+)\.block_(\d+)\..*", n) for n in tensors]
    groups, blocks = (max((int(match[i]) for match in found if match), default=0) for i in (1, 2))
    ends = ("encoder.blocks.input.w", "encoder.blocks.output.conv.w", "decoder.blocks.input.w")
    missing = [n for n in ends if n not in tensors or tensors[n].ndim != 4]
    if missing or not 1 <= groups <= 12 or not 1 <= blocks <= 1000:
        lack = first_few(missing) if missing else "groups of blocks"
        raise UserError(f"{folder} is no {_PROGRAM}: {lack} missing, or of another rank.")
    first, last, start = (tensors[name].shape for name in ends)
    return DvaeConfig(last[0], first[0], start[0], groups, blocks, first[1])


def _shapes(config: DvaeConfig) -> dict[str, tuple[int, ...]]:
    side = config.downsample
    x = jax.ShapeDtypeStruct((1, side, side, config.image_channels), jnp.float32)
    return initial_shapes(DVAE(config).init, x)
