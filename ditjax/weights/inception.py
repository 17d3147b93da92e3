"""FID's Inception, from the state dict that pytorch-fid and torch-fidelity read."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ditjax.errors import UserError
from ditjax.files.assets import unflatten
from ditjax.models.inception import INPUT_SIDE, FIDInception
from ditjax.weights import layouts
from ditjax.weights import tensors as weights
from ditjax.weights.networks import initial_shapes

_KINDS = {4: "conv", 2: "linear", 1: "vector"}
_LEAVES = {"kernel": "weight", "scale": "weight"}


class Inception(NamedTuple):
    """The variables of `FIDInception` f32, the files that hold them, and a line to print."""

    params: dict[str, Any]
    files: tuple[Path, ...]
    account: str  # how many tensors were taken and left out


def inception_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of our leaves, by path."""
    x = jax.ShapeDtypeStruct((1, INPUT_SIDE, INPUT_SIDE, 3), np.float32)
    return initial_shapes(FIDInception().init, x)


def inception_layout() -> layouts.Layout:
    """The layout of `models/inception.py`, with one tensor per leaf."""
    rules = []
    for path, shape in inception_shapes().items():
        *modules, leaf = path.split("/")
        name = ".".join([*modules, _LEAVES.get(leaf, leaf)])
        rules.append(layouts.LeafRule(path, (name,), _KINDS[len(shape)]))  # type: ignore[arg-type]
    return rules


def load_inception(path: str | os.PathLike[str]) -> Inception:
    """Read and check `pt_inception-2015-12-05-6726825d.pth`, or another file with its names.

    Raises a UserError that lists every missing, extra, mis-shaped and differently typed tensor.
    """
    file = weights.read_tensors(path)
    rules, ours = inception_layout(), inception_shapes()
    expected = layouts.expected_shapes(rules, ours)
    dtype = weights.check_tensors(file.path, "FID's Inception", file.tensors, expected)
    if dtype != np.float32:
        raise UserError(
            f"{file.path} is of {dtype}: FID's Inception is of float32, and rounded weights give"
            " another FID."
        )
    return Inception(
        {"params": unflatten(layouts.to_ours(rules, file.tensors, ours))}, file.files, file.account
    )
