"""What is learned: one file each, found by name (`config.task`)."""

from jax.sharding import Mesh

from ditjax.config import Config, task_module
from ditjax.errors import UserError
from ditjax.models.network import Cost
from ditjax.training.task import Task


def make_task(c: Config, mesh: Mesh | None = None) -> Task:
    """What a recipe learns, on a mesh or one device. Raises UserError for a mesh it cannot have."""
    task: Task = task_module(c.task).TASK.make(c, mesh)
    return task


def sampling_gflops(c: Config) -> float:
    """Multiply-accumulates / 1e9 of the network for one sample: a forward pass, two when guided.

    The decoder's are not counted, as in the paper's figure 10. Raises UserError where the task
    draws nothing, or its network's cost is not known.
    """
    sampling = make_task(c).sampling
    if sampling is None:
        raise UserError(f"config.task is {c.task!r}: it draws no samples.")
    return cost_of(c).gflops * (len(sampling.timesteps) + sampling.guided)


def cost_of(c: Config) -> Cost:
    """What the network of a recipe costs. Raises UserError where no closed form is known."""
    task = make_task(c)
    if task.cost is None:
        raise UserError(
            f"config.task is {c.task!r}: the cost of its network, {task.name}, is not known in"
            " closed form."
        )
    return task.cost
