"""Snapshots of a run's power-function averages, and the average of any width made of them.

WORKDIR/averages/STEP holds {'power:STD': weights, ...} in float32, in the format of checkpoints,
with the number of updates as its position. A snapshot is never removed while its run goes on.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ditjax.config import FEWEST_SNAPSHOTS, Config
from ditjax.errors import UserError, first_few
from ditjax.files.atomic import recordable
from ditjax.parallel import processes
from ditjax.runs import rundir
from ditjax.runs.checkpoint import Checkpoints, Step
from ditjax.training.averages import POWER, coefficients
from ditjax.training.step import TrainState

# The largest distance between the profile that is made and the one that is wanted, relative to it.
# With 16 equally spaced snapshots of 0.05 and 0.1 it is 0.08 at the width 0.25, where
# the weights are 1 % apart (docs/training.md).
LARGEST_ERROR = 0.1


class Combination(NamedTuple):
    """The stored averages that the average of a width is the sum of, with their coefficients.

    `terms` are (step, name, coefficient). `error` is that of `training.averages.coefficients`.
    `digests` are those of the snapshots by step.
    """

    std: float
    terms: tuple[tuple[int, str, float], ...]
    error: float
    digests: dict[int, str]


def open_snapshots(workdir: Path, *, read_only: bool = False) -> Checkpoints:
    """The snapshots of a run's directory. Raises UserError."""
    folder = workdir / rundir.AVERAGES
    if read_only and not folder.is_dir():
        raise UserError(f"{folder} does not exist: train on to the first snapshot, or restore it.")
    return Checkpoints(folder, keep=sys.maxsize, read_only=read_only, noun="snapshot")


def save_snapshot(snapshots: Checkpoints, step: int, state: TrainState) -> None:
    """Save the power-function averages of a training state, in the background."""
    trees = {k: tree for k, tree in state.averages.trees.items() if k.startswith(POWER)}
    snapshots.save(step, trees, {"updates": int(state.averages.updates)})


def rewind_snapshots(snapshots: Checkpoints, step: int) -> None:
    """Remove the snapshots after the step at which a run resumes: it writes them again."""
    if processes.is_primary() and (later := snapshots.rewind(step)):
        print(
            f"{snapshots.directory}: the run resumes at step {step}; later snapshots are removed"
            f" and written again: {first_few(map(str, later))}",
            file=sys.stderr,
        )
    processes.barrier()


def snapshot_step(workdir: Path, step: Step) -> int:
    """The number of an existing snapshot; the best is that of the best checkpoint.

    Raises UserError.
    """
    if step == "best":
        with Checkpoints(workdir / rundir.CHECKPOINTS, keep=1, read_only=True) as checkpoints:
            step = checkpoints.find(step)
    with open_snapshots(workdir, read_only=True) as snapshots:
        return snapshots.find(step)


def combination(c: Config, workdir: Path, last: int) -> Combination:
    """How the average config.sample.weights, 'power:STD', after step `last` is made of snapshots.

    Raises UserError for snapshots that are too few or too far apart.
    """
    std, stds = float(c.sample.weights.removeprefix(POWER)), c.train.average_stds
    with open_snapshots(workdir, read_only=True) as snapshots:
        if std in stds:
            term = (last, f"{POWER}{std!r}", 1.0)
            return Combination(std, (term,), 0.0, {last: snapshots.saved_with(last)[1]})
        saved = {at: snapshots.saved_with(at) for at in snapshots.steps if at <= last}
    # After the same number of updates the averages are the same; before the first there are none.
    steps = {position["updates"]: at for at, (position, _) in saved.items()}
    steps.pop(0, None)
    if len(steps) < FEWEST_SNAPSHOTS:
        raise UserError(
            f"{snapshots.directory} holds {len(steps)} snapshots up to step {last}:"
            f" 'power:{std!r}', a width that was not kept, needs at least {FEWEST_SNAPSHOTS}; train"
            f" on, restore missing ones, or take a width that was: {', '.join(map(str, stds))}."
        )
    pairs = [(updates, each) for updates in steps for each in stds]
    times, widths = zip(*pairs, strict=True)
    x, error = coefficients(times, widths, max(steps), std)
    if error > LARGEST_ERROR:
        raise UserError(
            f"{snapshots.directory} holds snapshots of steps"
            f" {first_few(map(str, steps.values()), 40)}: the profile of 'power:{std!r}' is missed"
            f" by {error:.0%}, expected at most {LARGEST_ERROR:.0%}; restore missing ones, or take"
            f" a width nearer to one that was kept: {', '.join(map(str, stds))}."
        )
    terms = tuple(
        (steps[updates], f"{POWER}{each!r}", float(coefficient))
        for (updates, each), coefficient in zip(pairs, x, strict=True)
    )
    return Combination(std, terms, error, {at: saved[at][1] for at in steps.values()})


def make_average(workdir: Path, made: Combination, abstract: Any) -> Any:
    """The sum of a combination's terms, in float64, as float32 on the shardings of `abstract`.

    One stored average is in memory at a time, beside the sum. Raises as `Checkpoints.restore`.
    """
    # Of each leaf, this process's part of the sum by its place in the array.
    sums: list[dict[str, np.ndarray]] = [{} for _ in jax.tree.leaves(abstract)]
    with open_snapshots(workdir, read_only=True) as snapshots:
        for step, name, coefficient in made.terms:
            tree, _ = snapshots.restore_part(name, abstract, step)
            for parts, leaf in zip(sums, jax.tree.leaves(tree), strict=True):
                held = {str(shard.index): shard.data for shard in leaf.addressable_shards}
                for place, data in held.items():
                    part = coefficient * np.asarray(data, np.float64)
                    parts[place] = parts.get(place, 0.0) + part

    def placed(leaf: Any, parts: dict[str, np.ndarray]) -> jax.Array:
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: parts[str(index)].astype(leaf.dtype)
        )

    leaves, structure = jax.tree.flatten(abstract)
    return jax.tree.unflatten(structure, map(placed, leaves, sums))


def average_record(c: Config, workdir: Path, step: int) -> dict[str, Any]:
    """{'average': how the weights of a step were made}, {} for weights that a checkpoint holds."""
    sample = getattr(c, "sample", None)
    if sample is None or not sample.weights.startswith(POWER):
        return {}
    made = combination(c, workdir, step)
    record = {"std": made.std, "profile_error": made.error, "snapshots": made.digests}
    return {"average": recordable(record)}
