"""Networks of other runs or files that a task reads and never trains."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from ditjax.config import Config
from ditjax.errors import UserError
from ditjax.runs import opening, rundir
from ditjax.tasks import make_task


class Opened(NamedTuple):
    """A frozen network: its sizes, a function that loads {'params': ..} on a mesh, and a line.

    `recipe` is that of the run that trained it, None for a file.
    """

    config: Any
    load: Callable[[Mesh], Any]
    account: str
    recipe: Any = None


def opened_run(path: str | os.PathLike[str], key_name: str, task: str) -> Opened:
    """The network of a run of a task, with its averaged weights. Raises UserError for another."""
    if not os.fspath(path):
        raise UserError(
            f"config.{key_name} is '': expected a run of task {task!r}, or its weights."
        )
    if not rundir.is_run(path):
        raise UserError(f"config.{key_name}={path} is no run: expected one of task {task!r}.")
    recipe: Config = opening.recipe_of(path)
    if recipe.task != task:
        raise UserError(
            f"config.{key_name}={path} is a run of task {recipe.task!r}: expected {task!r}."
        )

    def load(mesh: Mesh) -> Any:
        return opening.load_weights(recipe, make_task(recipe), path, mesh)[0]

    return Opened(None, load, str(path), recipe)


def check_trained_alike(c: Config, theirs: Config, names: Sequence[str], who: str) -> None:
    """Raise UserError unless a recipe's keys are those that a network `who` was trained with."""
    for name in names:
        section, _, leaf = name.partition(".")
        ours, other = (getattr(getattr(each, section), leaf) for each in (c, theirs))
        if ours != other:
            raise UserError(
                f"config.{name} is {ours!r}, and {who} was trained with {other!r}: expected the"
                " same."
            )


def check_channels(path: str | os.PathLike[str], theirs: int, ours: int) -> None:
    """Raise UserError for a network of images of another number of channels."""
    if theirs != ours:
        raise UserError(
            f"config.data.channels is {ours}, and the network at {path} was trained on {theirs}."
        )
