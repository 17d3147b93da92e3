"""What a run stands on: its recipe, its data set, its weights, a frozen autoencoder."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ditjax.config import Config, as_tree, migrated, read
from ditjax.data import source
from ditjax.data.names import is_latents
from ditjax.errors import FaultError, UserError
from ditjax.files import lease
from ditjax.models.network import Rules
from ditjax.parallel import processes, rules
from ditjax.parallel.processes import is_primary
from ditjax.runs import rundir
from ditjax.runs.checkpoint import Checkpoints, DamagedError, Step
from ditjax.training.program import abstract_state
from ditjax.training.task import Task

# Whose are the samples in a folder, while they are drawn and scored: a training there goes on.
SAMPLES_LEASE = ".samples.lease"
# The field of the training state that config.sample.weights names.
WEIGHTS = {"ema": "ema", "model": "params"}


def data_spec(c: Config) -> source.DataSpec:
    """The data set of a recipe, as the readers take it."""
    d = c.data
    return source.DataSpec(
        name=d.name,
        split=d.split,
        image_size=d.image_size,
        channels=d.channels,
        flip=d.flip,
        data_dir=d.data_dir or None,
        cache_mb=d.cache_mb,
        threads=d.threads,
        max_damaged=d.max_damaged,
    )


def check_data(c: Config) -> source.DatasetInfo:
    """The data set is whole and has the recipe's classes and size. Raises UserError otherwise."""
    d = c.data
    info = source.dataset_info(d.name, d.split, d.data_dir or None, d.max_damaged)
    if info.num_classes != c.data.num_classes:
        raise UserError(
            f"config.data.num_classes is {c.data.num_classes}, and data set {c.data.name!r} has"
            f" {info.num_classes} classes: set it to that."
        )
    if is_latents(d.name):
        expected, found = (
            (c.input_size, c.input_size, c.input_channels),
            source.latent_shape(d.name),
        )
        if found != expected:
            raise UserError(
                f"data set {d.name!r} holds latents of {list(found)}, and the recipe's are"
                f" {list(expected)}: set config.data.image_size and config.autoencoder to what it"
                " was encoded with, or encode it again."
            )
    return info


def open_run(workdir: str | os.PathLike[str], c: Config) -> Path:
    """`rundir.open_run` by the first process; the others only read what it wrote.

    The directory is this run's alone until the `lease.scope` around the call ends. Raises UserError
    where another process has it, and for a directory that not all processes see.
    """
    own(workdir)
    if is_primary():
        rundir.open_run(workdir, as_tree(c))
    processes.barrier()
    if not is_primary():
        if not (Path(workdir) / rundir.RECIPE_FILE).exists():
            raise UserError(
                f"{processes.name()} does not see the {rundir.RECIPE_FILE} that process 0 wrote to"
                f" {workdir}: give a --workdir that all share."
            )
        rundir.check_same(Path(workdir), rundir.read_recipe(workdir), as_tree(c))
    return Path(workdir)


def own(folder: str | os.PathLike[str], file: str = lease.FILE, *, waits: bool = False) -> None:
    """`lease.acquire` of a directory, or of what the lease is named after, by the first process."""
    if is_primary():
        lease.acquire(Path(folder) / file, str(folder), waits=waits, lost=_end)


def _end(line: str) -> None:
    """The lease is lost: all processes end, and write nothing more."""
    processes.abort(line, 1)
    lease.end_process(line)


def newest(checkpoints: Checkpoints, abstract: Any) -> tuple[Any, Mapping[str, Any]] | None:
    """(state, data position) of the newest sound checkpoint, on every process; None without any.

    Damaged ones after it are set aside. Raises UserError when no other is left, for a run must not
    begin anew where one has been: whatever cannot read any of them, it changes nothing then.
    FaultError when only one of several processes cannot read one.
    """
    damaged: list[DamagedError] = []
    for step, _ in reversed(processes.broadcast_ranges([(step, 0) for step in checkpoints.steps])):
        try:
            found = checkpoints.restore(abstract, step)
        except DamagedError as error:
            if jax.process_count() > 1 and not error.everywhere:
                # The others wait for this one within the restore: all end, and start again.
                checkpoints.set_aside(error)
                raise FaultError(
                    f"checkpoint {step} in {checkpoints.directory} is damaged: {error.what}; the"
                    " same command on all goes on from the one before it"
                ) from error
            damaged.append(error)
            continue
        if is_primary():
            for worse in damaged:
                checkpoints.set_aside(worse)
        return found
    found_bad = [f"{error.step} ({error.what})" for error in damaged]
    aside = checkpoints.damaged
    if damaged or processes.broadcast_step(len(aside) or None):
        raise UserError(
            f"{checkpoints.directory} has no sound checkpoint left: {', '.join(found_bad + aside)}."
            " Nothing was changed. Bring one back from a copy, or give another --workdir to begin"
            " anew."
        )
    return None


def load_weights(
    c: Config, task: Task, workdir: str | os.PathLike[str], mesh: Mesh, step: Step = "latest"
) -> tuple[Any, int]:
    """(parameters on the mesh, step) of a run's checkpoint: its newest, its best or one step's.

    `config.sample.weights` chooses the average or the parameters themselves. Raises UserError.
    """
    abstract = abstract_state(c, task, mesh)
    part = weights_field(c)
    with Checkpoints(Path(workdir) / rundir.CHECKPOINTS, keep=1, read_only=True) as checkpoints:
        # Of a run in training one process may see a newer checkpoint than another.
        found = processes.broadcast_step(checkpoints.find(step) if is_primary() else None)
        assert found is not None
        return checkpoints.restore_part(part, getattr(abstract, part), found)


def weights_field(c: Config) -> str:
    """The field of the training state that samples are drawn with: the average, unless asked."""
    sample = getattr(c, "sample", None)
    return "ema" if sample is None else WEIGHTS[sample.weights]


def no_step(path: str | os.PathLike[str], step: Step) -> None:
    """Raises UserError for the step of what is no run."""
    if step != "latest":
        raise UserError(f"--step={step} is for a run, and {path} is none: leave it out.")


def digest(params: Any) -> str:
    """SHA-256 of all parameters, by path: what is on record of the weights behind a number."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        value = np.ascontiguousarray(processes.gather(leaf))
        found.update(rules.path_of(path).encode() + b"\0")
        found.update(value.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def put(params: Any, mesh: Mesh, table: Rules = ()) -> Any:
    """Host arrays on the mesh, by their network's sharding rules; without any, on every device."""
    return jax.device_put(params, rules.state_shardings(params, mesh, table))


def recipe_of(workdir: str | os.PathLike[str]) -> Config:
    """The checked recipe of an existing run."""
    return read(migrated(rundir.read_recipe(workdir)))
