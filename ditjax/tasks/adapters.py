"""Adapters merged into a trained network for sampling: `config.sample.adapters`."""

import functools
import os
import sys
from typing import Any

import jax
from jax.sharding import Mesh

from ditjax.config import Config, adapters_of, network_module
from ditjax.errors import UserError, one_line
from ditjax.files.assets import unflatten
from ditjax.files.atomic import read_json
from ditjax.files.store import place
from ditjax.parallel.mesh import make_mesh
from ditjax.parallel.processes import is_primary
from ditjax.parallel.rules import path_of
from ditjax.runs import opening, rundir
from ditjax.runs.checkpoint import Step
from ditjax.tasks import make_task
from ditjax.training.task import IDENTITY
from ditjax.training.transforms import merged_factors
from ditjax.weights.adapters import Adapter, check_fits, factors_of, from_factors, read_adapter


def open_adapter(path: str | os.PathLike[str], step: Step = "latest") -> Adapter:
    """Read the factors of a run of LoRA, or a file or folder of another program.

    Raises UserError for anything else, and for a run that is more than its base and factors.
    """
    if not rundir.is_run(path):
        opening.check_no_step(path, step)
        return read_adapter(path)
    c = opening.recipe_of(path)
    kind = c.adapt.kind if hasattr(c, "adapt") and c.adapt.base else "full"
    if kind != "lora":
        raise UserError(
            f"{path} is a run of config.adapt.kind {kind!r}: expected a run of LoRA, whose kind is"
            " 'lora', or an adapter of peft or diffusers."
        )
    record = read_json(place(path) / rundir.START_FILE)
    words = ("adapted", "fresh", "unused")
    other = {word: sorted(record[word]) for word in words if record.get(word)}
    other |= {"config.adapt.train": c.adapt.train} if c.adapt.train else {}
    if other:
        raise UserError(
            f"{path} is more than its base with factors ({other}), which an adapter cannot be: use"
            " the run itself, or its merged network by `ditjax convert`."
        )
    params, found = opening.load_weights(c, make_task(c), path, make_mesh(-1, 1), step)
    stack = network_module(c.model.kind).NETWORK.stack
    tree = jax.device_get(params["lora"])
    adapter = from_factors(path, tree, c.adapt.scale, stack, c.adapt.sha256)
    return adapter._replace(notes=(opening.account(path, found, c),))


# A command reads each once; what is merged and what its protocol says are the same.
open_once = functools.lru_cache(maxsize=16)(open_adapter)


def adapters_record(c: Config) -> dict[str, list[list[Any]]]:
    """{'adapters': [[SHA-256, scale], ...]} of those that change the network, or {}."""
    found = [[open_once(path).sha256, scale] for path, scale in _chosen(c) if scale]
    return {"adapters": found} if found else {}


def _chosen(c: Config) -> tuple[tuple[str, float], ...]:
    return adapters_of(c.sample.adapters) if hasattr(c, "sample") else ()


def with_adapters(c: Config, params: Any, mesh: Mesh) -> Any:
    """Merge config.sample.adapters into a network's parameters on the mesh: W + Σ w s B A.

    Without any, or with scales of 0 only, these are the parameters themselves. Raises UserError for
    an adapter of another network, or trained beside other weights.
    """
    chosen = [(open_once(path), scale) for path, scale in _chosen(c)]
    if not chosen:
        return params
    if make_task(c).transform is not IDENTITY:
        raise UserError(
            f"config.sample.adapters is {c.sample.adapters!r}, and this run trained only a part of"
            f" its network: give it to the run's base, {c.adapt.base}, beside the others, or"
            " convert the run first."
        )
    stack = network_module(c.model.kind).NETWORK.stack
    found = jax.tree_util.tree_leaves_with_path(params["params"])
    leaves = {path_of(path): leaf for path, leaf in found}
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    for adapter, scale in chosen:
        check_fits(adapter, shapes, stack)
        _check_base(adapter, params)
        if is_primary():
            about = f"adapter: {adapter.path}, {adapter.name} ({adapter.layout}), scale {scale:g}"
            lines = (*adapter.notes, f"{about}, SHA-256 {adapter.sha256}")
            print("\n".join(map(one_line, lines)), file=sys.stderr, flush=True)
    used = [(adapter, scale) for adapter, scale in chosen if scale]
    if not used:
        return params
    factors = factors_of(used, shapes, stack)
    # The other leaves are shared with the base.
    layers = [path.removesuffix("/a") for path in factors if path.endswith("/a")]
    kernels = unflatten({f"{layer}/kernel": leaves[f"{layer}/kernel"] for layer in layers})
    shardings = jax.tree.map(lambda leaf: leaf.sharding, kernels)
    merged = jax.jit(merged_factors, out_shardings=shardings)(kernels, unflatten(factors))
    found = jax.tree_util.tree_leaves_with_path(merged)
    return {"params": unflatten(leaves | {path_of(path): leaf for path, leaf in found})}


def _check_base(adapter: Adapter, params: Any) -> None:
    if adapter.base and (found := opening.digest(params)) != adapter.base:
        raise UserError(
            f"{adapter.path} was trained beside weights of SHA-256 {adapter.base}, and these are of"
            f" {found}: give it to its base (config.adapt.base and which in its config.json)."
        )
