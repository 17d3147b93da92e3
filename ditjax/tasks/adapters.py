"""Adapters of a network: the factors of a run of LoRA, or files of other programs."""

import os
from pathlib import Path

import jax

from ditjax.config import network_module
from ditjax.errors import UserError
from ditjax.files.atomic import read_json
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening, rundir
from ditjax.runs.checkpoint import Step
from ditjax.tasks import make_task
from ditjax.weights.adapters import Adapter, from_factors, read_adapter


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
    record = read_json(Path(path) / rundir.START_FILE)
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
    return adapter._replace(notes=(f"{path}: step {found}, {c.sample.weights} weights",))
