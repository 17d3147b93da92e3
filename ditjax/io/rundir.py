"""A run's directory and its recipe: how "the same command again" is told from another."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ditjax.errors import UserError
from ditjax.io.results import write_atomic

RECIPE_FILE = "config.json"
CHECKPOINTS = "checkpoints"

# What may differ on resuming: where and how often, never what is learned.
FREE_KEYS = (
    "mesh.", "distributed.", "sample.", "evaluate.", "sweep.", "model.unroll", "model.remat",
    "model.attention", "train.microbatches", "train.prefetch", "data.threads",
    "data.cache_mb", "data.data_dir", "train.steps", "train.log_every_steps",
    "train.checkpoint_every_steps", "train.keep_checkpoints", "train.sample_every_steps",
    "train.evaluate_every_steps", "train.evaluate_num",
)  # fmt: skip


def open_run(workdir: str | os.PathLike[str], recipe: Mapping[str, Any]) -> Path:
    """Makes the directory and writes its recipe, or checks that it is the same run.

    Raises UserError when the directory cannot be written, or holds a run of another recipe.
    """
    folder = Path(workdir)
    path = folder / RECIPE_FILE
    if path.exists():
        _check_same(path, recipe)
        return folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir={folder} is a file: give a directory.")
    write_atomic(path, (json.dumps(recipe, indent=1) + "\n").encode())
    return folder


def open_study(workdir: str | os.PathLike[str], recipe: Mapping[str, Any]) -> Path:
    """Makes a sweep's directory and records its recipe: the grid may grow from call to call.

    Raises UserError when the directory cannot be written or is a single run's.
    """
    folder = Path(workdir)
    if (folder / CHECKPOINTS).exists():
        raise UserError(f"--workdir={folder} is a single run's: give a study its own directory.")
    write_atomic(folder / RECIPE_FILE, (json.dumps(recipe, indent=1) + "\n").encode())
    return folder


def is_run(workdir: str | os.PathLike[str]) -> bool:
    """Whether a directory is a run's: a model folder of diffusers has a config.json too."""
    # Not Path.exists, which raises for a name that is too long.
    return all(os.path.exists(Path(workdir) / name) for name in (RECIPE_FILE, CHECKPOINTS))


def read_recipe(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe that a run was started with. Raises UserError when there is none."""
    path = Path(workdir) / RECIPE_FILE
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{workdir} is no run directory: cannot read {path.name} ({error.strerror})."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}. Restore it, or remove the run.") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path} is damaged: it holds no recipe.")
    return recipe


def _check_same(path: Path, recipe: Mapping[str, Any]) -> None:
    started = dict(leaves(read_recipe(path.parent)))
    asked = dict(leaves(json.loads(json.dumps(recipe))))
    for key in sorted(started.keys() | asked.keys()):
        if started.get(key) != asked.get(key) and not key.startswith(FREE_KEYS):
            raise UserError(
                f"{path.parent} holds a run with {key}={started.get(key)!r}, this command says"
                f" {asked.get(key)!r}: give another --workdir, or the recipe it was started with."
            )


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """('a.b', value) for every leaf of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
