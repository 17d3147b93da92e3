"""Autoguidance: a worse network in place of the unconditional one (Karras et al. 2024).

`config.sample.guide` names it: a run's directory, at a step with RUN@STEP, or a file of weights.
"""

import dataclasses
import functools
import os
import sys
from typing import Any, cast

from jax.sharding import Mesh

from ditjax.config import Config, replaced
from ditjax.errors import UserError, one_line
from ditjax.parallel.processes import is_primary
from ditjax.runs import opening, rundir
from ditjax.runs.checkpoint import Step
from ditjax.tasks import make_task
from ditjax.tasks.control import is_controlled
from ditjax.training.task import Frozen
from ditjax.weights import networks, reading

# The keys of config.diffusion that say what a network is given and what it returns.
_SAME = (
    *("process", "timesteps", "schedule", "prediction", "variance"),
    *("time_scale", "time_from_noise"),
)


def guide_place(guide: str) -> tuple[str, Step]:
    """Split RUN@STEP -> the path, the step. A path that exists is taken whole."""
    path, at, word = guide.rpartition("@")
    if at and not os.path.exists(guide):
        if word in ("latest", "best"):
            return path, cast(Step, word)
        if word.isdecimal():
            return path, int(word)
    return guide, "latest"


@functools.lru_cache(maxsize=16)
def _recipe(path: str, step: Step) -> Config:
    if rundir.is_run(path):
        return opening.recipe_of(path)
    if step != "latest":
        raise UserError(f"{path} is not a run, and @{step} a step of one: leave @{step} out.")
    return reading.load_network(path, wanted="dit").config


def guide_recipe(c: Config) -> Config:
    """The recipe of the network at config.sample.guide, in the precision of the guided one.

    Raises UserError if there is none, or if it is of another task, input, labels or process.
    """
    guide = c.sample.guide
    try:
        weak = _recipe(*guide_place(guide))
    except UserError as error:
        raise UserError(f"config.sample.guide is {guide!r}: {error}") from None
    for what, theirs, ours in _compared(weak, c):
        if theirs != ours:
            raise UserError(
                f"config.sample.guide is {guide!r}, whose {what} is {theirs!r}, and that of the"
                f" network that it guides {ours!r}: expected the same; name another network."
            )
    if is_controlled(weak):
        raise UserError(
            f"config.sample.guide is {guide!r}, a run of a control, and a guide is given no control"
            " image: name its base, or another network."
        )
    model = dataclasses.replace(weak.model, dtype=c.model.dtype, matmul=c.model.matmul)
    return replaced(weak, model=model, sample=dataclasses.replace(weak.sample, guide=""))


def _compared(weak: Config, c: Config) -> list[tuple[str, Any, Any]]:
    """What a network and its guide must share: (name, the guide's, the network's)."""
    if weak.task != c.task:
        return [("task", weak.task, c.task)]
    theirs, ours = _facts(weak), _facts(c)
    return [(what, theirs.get(what), ours[what]) for what in ours]


def _facts(c: Config) -> dict[str, Any]:
    """What a network is given and what it returns."""
    d, keys = c.diffusion, (*_SAME, *(("sigma_data",) if c.diffusion.process == "edm" else ()))
    return {
        "input": (c.input_size, c.input_size, c.input_channels),
        "data.num_classes": c.data.num_classes,
        **{f"diffusion.{key}": getattr(d, key) for key in keys},
        "autoencoder": c.autoencoder.statistics if c.latent else "none",
    }


def load_guide(c: Config, mesh: Mesh) -> Frozen:
    """Load the network at config.sample.guide -> {"guide": parameters on the mesh}, or {}.

    A run's weights are the average, or as its own recipe's config.sample.weights says.
    """
    if not c.sample.guide:
        return {}
    weak, (path, step) = guide_recipe(c), guide_place(c.sample.guide)
    task = make_task(weak)
    if rundir.is_run(path):
        params, found = opening.network_weights(weak, task, path, mesh, step)
        if is_primary():
            line = f"guide: {opening.account(path, found, weak)}"
            print(one_line(line), file=sys.stderr, flush=True)
        return {"guide": params}
    loaded = reading.load_network(path, wanted="dit")
    if is_primary():
        print("\n".join(loaded.notes), file=sys.stderr, flush=True)
    return {"guide": opening.put_on_mesh(networks.as_float32(loaded), mesh, task.rules)}
