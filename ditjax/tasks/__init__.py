"""Tasks: one module each, selected by `config.task`."""

import os

from jax.sharding import Mesh

from ditjax.config import Config, task_module
from ditjax.errors import UserError
from ditjax.models.network import NetworkCost
from ditjax.training.task import Task


def make_task(c: Config, mesh: Mesh | None = None) -> Task:
    """Build the task of a recipe for a mesh or one device. Raises UserError for an unfit mesh."""
    task: Task = task_module(c.task).TASK.make(c, mesh)
    return task


def resolved(c: Config, workdir: str | os.PathLike[str]) -> Config:
    """The recipe of a run with the keys that follow from files; a run that has begun keeps its own.

    Raises UserError for files that do not fit, and for what training does not use.
    """
    if adapters := getattr(getattr(c, "sample", None), "adapters", ""):
        raise UserError(
            f"config.sample.adapters is {adapters!r}, which training does not use: give it to"
            " sample, grid or evaluate, and leave it out here."
        )
    found: Config = task_module(c.task).TASK.resolve(c, workdir)
    return found


def sampling_gflops(c: Config) -> float:
    """Multiply-accumulates / 1e9 of the network for one sample: a forward pass per step, or two.

    Guided steps need two, or one and one of the weak network that guides. The decoder is not
    counted, as in the paper's figure 10. Raises UserError if the task draws no samples, or if its
    network's cost is not known in closed form.
    """
    sampling = make_task(c).sampling
    if sampling is None:
        raise UserError(f"config.task is {c.task!r}: it draws no samples.")
    if sampling.timesteps is None:
        raise UserError(
            f"config.sample.sampler is {c.sample.sampler!r}, whose evaluations are not known before"
            " it runs: its cost has no figure; choose a sampler of fixed steps."
        )
    gflops, steps = cost_of(c).gflops, len(sampling.timesteps)
    if sampling.weak is None:
        return gflops * (steps + sampling.guided)
    return gflops * steps + cost_of(sampling.weak).gflops * sampling.guided


def cost_of(c: Config) -> NetworkCost:
    """The cost of a recipe's network. Raises UserError if no closed form is known."""
    task = make_task(c)
    if task.cost is None:
        raise UserError(
            f"config.task is {c.task!r}: the cost of its network, {task.name}, is not known in"
            " closed form."
        )
    return task.cost
