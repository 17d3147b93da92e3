"""Open runs: check the recipe and the data set, acquire leases, load checkpoints."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ditjax.config import Config, as_tree, migrated, read
from ditjax.data import latents, records, source
from ditjax.data.captions import TextSpec
from ditjax.data.classes import ClassNames, class_names, names_of
from ditjax.data.folders import report_reading
from ditjax.data.names import Split, is_latents, parse_name
from ditjax.errors import FaultError, UserError, first_few
from ditjax.files import lease
from ditjax.files.store import place
from ditjax.models.network import Rules
from ditjax.parallel import processes, rules
from ditjax.parallel.processes import is_primary
from ditjax.runs import contents, rundir, snapshots
from ditjax.runs.checkpoint import Checkpoints, DamagedError, Step
from ditjax.runs.steps import check_can_hold
from ditjax.training.averages import POWER
from ditjax.training.program import abstract_state
from ditjax.training.step import WEIGHTS, weights_named
from ditjax.training.task import IDENTITY, Frozen, Task

# The lease of the samples in a run's folder. Training holds another lease and can continue.
SAMPLES_LEASE = ".samples.lease"


def data_spec(c: Config) -> source.DataSpec:
    """The data set of a recipe, as the readers expect it."""
    d, text = c.data, getattr(c, "text", None)
    return source.DataSpec(
        name=d.name,
        split=d.split,
        image_size=d.image_size,
        channels=d.channels,
        frames=d.frames,
        frame_stride=d.frame_stride,
        flip=d.flip,
        data_dir=d.data_dir or None,
        cache_mb=d.cache_mb,
        threads=d.threads,
        max_damaged=d.max_damaged,
        text=text and TextSpec(text.captions, text.feature, text.tokenizer, text.tokens),
    )


def held_out(c: Config) -> source.DataSpec:
    """The images of a recipe's validation loss; for latents, the images they encode.

    A damaged image is an error, because a loss over other images would be another metric. Of the
    captions of an image, the first is used.
    """
    name, split = source.images_of(Split(c.data.name, c.evaluate.split))
    spec = data_spec(c)
    text = spec.text and spec.text._replace(mode="first")
    return dataclasses.replace(spec, name=name, split=split, flip=False, max_damaged=0, text=text)


def check_data(c: Config) -> source.DatasetInfo:
    """Raise UserError unless the data set is complete and has the recipe's classes and size."""
    d = c.data
    info = source.dataset_info(d.name, d.split, d.data_dir or None, d.max_damaged)
    many = f"{info.num_classes} class{'es' * (info.num_classes > 1)}"
    if info.num_classes != c.data.num_classes:
        left_out = source.left_out_of(d.name)
        raise UserError(
            f"config.data.num_classes is {d.num_classes}, but data set {d.name!r} has"
            f" {many} ({first_few(info.class_names, 5)})"
            + (f" and, left out: {left_out}; mend the folder, or" if left_out else ":")
            + f" set it to {info.num_classes}."
        )
    if is_primary() and parse_name(d.name).kind != "folder":  # whose line says more
        report_reading(
            f"data: {d.name}, {d.split}: {info.num_examples:,} records of {many}; nothing left out"
        )
    if is_latents(d.name):
        expected, found = c.input_shape, source.latent_shape(d.name)
        if found != expected:
            raise UserError(
                f"data set {d.name!r} holds latents of {list(found)}, but the recipe's are"
                f" {list(expected)}: set config.data.image_size and config.autoencoder as for the"
                " encoding, or encode the data set again."
            )
        _check_statistics(c)
    elif d.frames > 1:
        records.check_frames(data_spec(c))
    return info


def _check_statistics(c: Config) -> None:
    """Raise UserError unless encoded latents are normalised as at their encoding."""
    recorded = latents.recorded_statistics(parse_name(c.data.name).path)
    a = c.autoencoder
    if recorded is None:  # older sets were all normalised by a scale alone
        recorded = {**a.statistics, "shift": 0.0, "latent_mean": [], "latent_std": []}
    for key, ours in a.statistics.items():
        if recorded.get(key) != ours:
            raise UserError(
                f"data set {c.data.name!r} was encoded with autoencoder.{key}"
                f" {recorded.get(key)!r}, but config.autoencoder.{key} is {ours!r}: set it to that,"
                " or encode the data set again."
            )


def open_run(
    workdir: str | os.PathLike[str],
    c: Config,
    frozen: Frozen | None = None,
    classes: Sequence[str] = (),
    places: Mapping[str, str] = {},
) -> Path:
    """Open a run's directory: the first process writes the recipe, and the others read it.

    `frozen` are the frozen weights, if they were loaded: what lies at the places in the recipe is
    recorded, and compared when the run resumes, as are the contents of other `places`. `classes`
    are the names of the data set's classes, which are recorded beside the recipe.

    The directory is leased until the `lease.scope` around the call ends. Raises UserError if
    another run holds the lease, or if not all processes share the directory.
    """
    check_can_hold(place(workdir))
    acquire_lease(workdir)
    found = {**contents.data_contents(c), **places}
    for name, where in contents.FROZEN.items():
        if frozen and name in frozen:
            found[where] = digest(frozen[name])
    same = contents.same_content(place(workdir), found, c.data.data_dir)
    if is_primary():
        folder = rundir.open_directory(workdir, as_tree(c), same, classes)
        contents.check_contents(folder, found)
        contents.record_contents(folder, found)
    processes.barrier()
    if not is_primary():
        if not (place(workdir) / rundir.RECIPE_FILE).exists():
            raise UserError(
                f"{processes.name()} does not see the {rundir.RECIPE_FILE} that process 0 wrote to"
                f" {workdir}: use a --workdir that all processes share."
            )
        rundir.check_same(place(workdir), rundir.read_recipe(workdir), as_tree(c), same=same)
    return place(workdir)


def acquire_lease(
    folder: str | os.PathLike[str], file: str = lease.FILE, *, waits: bool = False
) -> None:
    """Acquire the lease `file` of a directory, in the first process only."""
    if is_primary():
        lease.acquire(place(folder) / file, str(folder), waits=waits, lost=_end)


def _end(line: str) -> None:
    """End all processes after the lease is lost, without further writes."""
    processes.abort(line, 1)
    lease.end_process(line)


def restore_newest(checkpoints: Checkpoints, abstract: Any) -> tuple[Any, Mapping[str, Any]] | None:
    """Restore (state, data position) of the newest intact checkpoint; None if there are none.

    Damaged checkpoints after it are set aside. Raises UserError, without changing anything, if all
    are damaged, because a run must not silently start over. Raises FaultError if only some of the
    processes cannot read a checkpoint.
    """
    damaged: list[DamagedError] = []
    for step, _ in reversed(processes.broadcast_ranges([(step, 0) for step in checkpoints.steps])):
        try:
            found = checkpoints.restore(abstract, step)
        except DamagedError as error:
            if jax.process_count() > 1 and not error.everywhere:
                # The others wait inside the restore: all processes must end and start again.
                checkpoints.set_aside(error)
                raise FaultError(
                    f"checkpoint {step} in {checkpoints.directory} is damaged: {error.what}; run"
                    " the same command on all hosts to resume from the one before it"
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
            f"{checkpoints.directory} has no intact checkpoint: {', '.join(found_bad + aside)}."
            " Nothing was changed. Restore one from a copy, or give another --workdir to start"
            " over."
        )
    return None


def load_weights(
    c: Config, task: Task, workdir: str | os.PathLike[str], mesh: Mesh, step: Step = "latest"
) -> tuple[Any, int]:
    """Load (parameters on the mesh, step) of a run's latest or best checkpoint, or of a step.

    `config.sample.weights` selects an average or the raw parameters; 'power:STD' is made of the
    run's snapshots up to that step. Raises UserError.
    """
    name = weights_name(c)
    abstract = abstract_state(c, task, mesh)
    if name.startswith(POWER):
        path = place(workdir)
        mine = snapshots.snapshot_step(path, step) if is_primary() else None
        last = processes.broadcast_step(mine)
        assert last is not None
        made = snapshots.combination(c, path, last)
        return snapshots.make_average(path, made, abstract.params), last
    part = WEIGHTS.get(name, f"averages/trees/{name}")
    with Checkpoints(place(workdir) / rundir.CHECKPOINTS, keep=1, read_only=True) as checkpoints:
        # While a run trains, one process may see a newer checkpoint than another.
        found = processes.broadcast_step(checkpoints.find(step) if is_primary() else None)
        assert found is not None
        return checkpoints.restore_part(part, weights_named(abstract, name), found)


def network_weights(
    c: Config, task: Task, workdir: str | os.PathLike[str], mesh: Mesh, step: Step = "latest"
) -> tuple[Any, int]:
    """Load (the whole network's parameters, step) of a run, what it did not train included.

    Raises as `load_weights`.
    """
    trained, found = load_weights(c, task, workdir, mesh, step)
    if task.transform is IDENTITY:
        return trained, found
    assert task.start is not None
    return jax.jit(task.transform.merge)(task.start(mesh).params, trained), found


def weights_name(c: Config) -> str:
    """The name of the weights that samples are drawn with, by default the average."""
    sample = getattr(c, "sample", None)
    return "ema" if sample is None else str(sample.weights)


def account(path: str | os.PathLike[str], step: int, c: Config) -> str:
    """What of a run is taken: 'runs/a: step 400, ema weights'."""
    return f"{path}: step {step}, {weights_name(c)} weights"


def check_no_step(path: str | os.PathLike[str], step: Step) -> None:
    """Raise UserError for a step of something other than a run."""
    if step != "latest":
        raise UserError(f"--step={step} is for runs, and {path} is not a run: remove --step.")


def digest(params: Any) -> str:
    """The SHA-256 of all parameters by path, which identifies the weights in records."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        value = np.ascontiguousarray(processes.gather(leaf))
        found.update(rules.path_of(path).encode() + b"\0")
        found.update(value.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def put_on_mesh(params: Any, mesh: Mesh, table: Rules = ()) -> Any:
    """Put host arrays on the mesh by a network's sharding rules; without rules, replicate them."""
    return jax.device_put(params, rules.state_shardings(params, mesh, table))


def spread_on_mesh(params: Any, mesh: Mesh) -> Any:
    """Put the host arrays of a frozen network without rules on the mesh, split over `fsdp`."""
    return jax.device_put(params, rules.spread_shardings(params, mesh))


def class_names_of(workdir: str | os.PathLike[str], c: Config) -> ClassNames | None:
    """The names of the classes of a run, None if they are not known.

    Raises UserError if the record is damaged.
    """
    labels = rundir.read_classes(workdir)
    if labels is None:  # an older ditjax recorded none
        of_imagenet = re.match(r"imagenet2012\b", c.data.name)
        return class_names() if of_imagenet and c.data.num_classes == 1000 else None
    if len(labels) != c.data.num_classes:
        raise UserError(
            f"{place(workdir) / rundir.CLASSES_FILE} names {len(labels)} classes, and the run has"
            f" {c.data.num_classes}: restore it, or remove it and use class numbers."
        )
    return names_of(labels)


def recipe_of(workdir: str | os.PathLike[str]) -> Config:
    """The checked recipe of an existing run."""
    return read(migrated(rundir.read_recipe(workdir)))
