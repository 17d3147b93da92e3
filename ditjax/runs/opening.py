"""What a run stands on: its recipe, its data set, its weights, a frozen autoencoder."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ditjax.config import Config, completed, read
from ditjax.data import latents, stream
from ditjax.errors import FaultError, UserError
from ditjax.files import lease
from ditjax.parallel import processes, rules
from ditjax.parallel.processes import is_primary
from ditjax.runs import rundir
from ditjax.runs.checkpoint import Checkpoints, DamagedError, Step
from ditjax.tasks import programs
from ditjax.weights import networks, reading

# Whose are the samples in a folder, while they are drawn and scored: a training there goes on.
SAMPLES_LEASE = ".samples.lease"
# The field of the training state that config.sample.weights names.
WEIGHTS = {"ema": "ema", "model": "params"}


def data_spec(c: Config) -> stream.DataSpec:
    """The data set of a recipe, as the readers take it."""
    d = c.data
    return stream.DataSpec(
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


def check_data(c: Config) -> stream.DatasetInfo:
    """The data set is whole and has the recipe's classes and size. Raises UserError otherwise."""
    d = c.data
    info = stream.dataset_info(d.name, d.split, d.data_dir or None, d.max_damaged)
    if info.num_classes != c.data.num_classes:
        raise UserError(
            f"config.data.num_classes is {c.data.num_classes}, and data set {c.data.name!r} has"
            f" {info.num_classes} classes: set it to that."
        )
    if d.name.startswith(latents.PREFIX):
        expected, found = (c.input_size, c.input_size, c.input_channels), latents.shape_of(d.name)
        if found != expected:
            raise UserError(
                f"data set {d.name!r} holds latents of {list(found)}, and the recipe's are"
                f" {list(expected)}: set config.data.image_size and config.autoencoder to what it"
                " was encoded with, or encode it again."
            )
    return info


def open_run(workdir: str | os.PathLike[str], recipe: Mapping[str, Any]) -> Path:
    """`rundir.open_run` by the first process; the others only read what it wrote.

    The directory is this run's alone until the `lease.scope` around the call ends. Raises UserError
    where another process has it, and for a directory that not all processes see.
    """
    own(workdir)
    if is_primary():
        rundir.open_run(workdir, recipe, completed)
    processes.meet()
    if not is_primary():
        if not (Path(workdir) / rundir.RECIPE_FILE).exists():
            raise UserError(
                f"{processes.name()} does not see the {rundir.RECIPE_FILE} that process 0 wrote to"
                f" {workdir}: give a --workdir that all share."
            )
        rundir.check_same(Path(workdir), completed(rundir.read_recipe(workdir)), recipe)
    return Path(workdir)


def own(folder: str | os.PathLike[str], file: str = lease.FILE, *, waits: bool = False) -> None:
    """`lease.own` of a directory, or of what the lease is named after, by the first process."""
    if is_primary():
        lease.own(Path(folder) / file, str(folder), waits=waits, lost=_end)


def _end(line: str) -> None:
    """The lease is lost: all processes end, and write nothing more."""
    processes.leave(line, 1)
    lease.end(line)


def newest(checkpoints: Checkpoints, abstract: Any) -> tuple[Any, Mapping[str, Any]] | None:
    """(state, data position) of the newest sound checkpoint, on every process; None without any.

    Damaged ones after it are set aside. Raises UserError when no other is left, for a run must not
    begin anew where one has been: whatever cannot read any of them, it changes nothing then.
    FaultError when only one of several processes cannot read one.
    """
    damaged: list[DamagedError] = []
    for step, _ in reversed(processes.agreed([(step, 0) for step in checkpoints.steps])):
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
    if damaged or processes.agreed_step(len(aside) or None):
        raise UserError(
            f"{checkpoints.directory} has no sound checkpoint left: {', '.join(found_bad + aside)}."
            " Nothing was changed. Bring one back from a copy, or give another --workdir to begin"
            " anew."
        )
    return None


def load_weights(
    c: Config, workdir: str | os.PathLike[str], mesh: Mesh, step: Step = "latest"
) -> tuple[Any, int]:
    """(parameters on the mesh, step) of a run's checkpoint: its newest, its best or one step's.

    config.sample.weights says which: the average, or the parameters themselves. Raises UserError.
    """
    abstract = programs.abstract_state(c, mesh)
    part = WEIGHTS[c.sample.weights]
    with Checkpoints(Path(workdir) / rundir.CHECKPOINTS, keep=1, read_only=True) as checkpoints:
        # A run that goes on meanwhile may show one process a newer checkpoint than another.
        found = processes.agreed_step(checkpoints.find(step) if is_primary() else None)
        assert found is not None
        return checkpoints.restore_part(part, getattr(abstract, part), found)


def no_step(path: str | os.PathLike[str], step: Step) -> None:
    """Raises UserError for the step of what is no run."""
    if step != "latest":
        raise UserError(f"--step={step} is for a run, and {path} is none: leave it out.")


def load_autoencoder(c: Config, mesh: Mesh) -> Any:
    """The frozen autoencoder's parameters that a latent recipe names; None for pixels.

    Raises UserError when the run at config.autoencoder.path has another architecture.
    """
    if not c.latent:
        return None
    path = c.autoencoder.path
    if not path:
        raise UserError(
            "config.autoencoder.path is '': a latent DiT needs the work directory of a trained"
            " autoencoder, or its weights (see README, Published weights)."
        )
    published = None if rundir.is_run(path) else reading.load(path)
    trained = published.config if published else recipe_of(path)
    if trained.train.network != "autoencoder":
        what = "holds" if published else "is a run of"
        raise UserError(
            f"config.autoencoder.path={path} {what} a {trained.train.network}: expected an"
            " autoencoder."
        )
    for field in ("base_width", "multipliers", "res_blocks", "latent_channels", "groups"):
        theirs, ours = getattr(trained.autoencoder, field), getattr(c.autoencoder, field)
        if theirs != ours:
            raise UserError(
                f"config.autoencoder.{field} is {ours}, and the autoencoder at {path} was trained"
                f" with {theirs}."
            )
    if trained.data.channels != c.data.channels:
        raise UserError(
            f"config.data.channels is {c.data.channels}, and the autoencoder at {path} was trained"
            f" on {trained.data.channels}."
        )
    if published:
        return put(networks.as_float32(published.params), mesh)
    return load_weights(trained, path, mesh)[0]


def digest(params: Any) -> str:
    """SHA-256 of all parameters, by path: what is on record of the weights behind a number."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        value = np.ascontiguousarray(processes.gathered(leaf))
        found.update(rules.path_of(path).encode() + b"\0")
        found.update(value.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def put(params: Any, mesh: Mesh) -> Any:
    """Host arrays on the mesh, by the sharding rules."""
    return jax.device_put(params, rules.state_shardings(params, mesh))


def recipe_of(workdir: str | os.PathLike[str]) -> Config:
    """The checked recipe of an existing run."""
    return read(completed(rundir.read_recipe(workdir)))
