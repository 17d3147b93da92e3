"""Compile a recipe's real train step for a machine that is not here, and report needs and costs.

The result is a plan: plain data, the content of plan.json. Its figures are printed with `LABEL`.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import ditjax
from ditjax.config import Config
from ditjax.errors import UserError, one_line
from ditjax.files.atomic import write_json
from ditjax.machines import hlo, roofline
from ditjax.machines.stages import planned_cost
from ditjax.machines.topology import Topology, devices, wire_seconds
from ditjax.models.network import NetworkCost, training_flops
from ditjax.parallel import compiling
from ditjax.parallel.mesh import mesh_of
from ditjax.parallel.rules import path_of
from ditjax.sampling.program import (
    abstract_arguments,
    abstract_frozen,
    abstract_weights,
    batch_sampler,
)
from ditjax.tasks import make_task
from ditjax.training.program import precise, training
from ditjax.training.task import Task

LABEL = "compiled, not run"
PLAN_SCHEMA = 1
PROGRESS_SECONDS = 20.0

_MEASURES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOO_LARGE = (
    re.compile(r"HLO temporaries \((?P<need>[\d.]+)(?P<unit>[KMGT])\)"),
    re.compile(r"Used (?P<need>[\d.]+)(?P<unit>[KMGT]) of [\d.]+[KMGT] hbm"),
)


def make_plan(
    c: Config, topology: Topology, steps: int, cache: Path | None = None, *, hopeless: bool = True
) -> dict[str, Any]:
    """The plan of a recipe on a topology, for a training of `steps`.

    Results are cached in the folder `cache`, if given. Without `hopeless`, a step whose state alone
    exceeds the memory is not compiled. Raises UserError for a mesh that does not suit the topology,
    the network or the batch.
    """
    cost = planned_cost(c)
    mesh = mesh_of(c, devices(topology, c.mesh.slices))
    task = make_task(c, mesh)
    programs = training(c, task, mesh)
    state = programs.abstract_state
    needed = _shard_bytes(state)
    plan = _head(c, topology, mesh, cost, c.train.batch_size) | {"steps": steps}
    plan["microbatches"] = c.train.microbatches
    if needed > topology.chip.device_hbm_bytes and not hopeless:
        compiled: dict[str, Any] = {"seconds": 0.0, "peak_bytes": needed, "state_only": True}
    else:
        compiled = _compiled(c, topology, mesh, programs.lower, state, cache)
    plan |= _memory(topology, compiled, needed, "state", *_held_beside(task, mesh))
    if cost.drawn:
        plan["rollout"] = _rollout(cost, c.train.batch_size)
    if "collectives" in compiled:
        plan |= _speed(c, cost, topology, plan, compiled)
    plan["config"] = dataclasses.asdict(c)
    return plan


def make_sampler_plan(c: Config, topology: Topology, cache: Path | None = None) -> dict[str, Any]:
    """The plan of a recipe's sampler on a topology: its memory.

    Raises UserError for a task that draws no samples, for frozen weights whose sizes follow from a
    file that is missing, and for a mesh as `make_plan` does.
    """
    mesh = mesh_of(c, devices(topology, c.mesh.slices))
    task, size = make_task(c, mesh), c.sample.batch_size
    sampler = batch_sampler(c, task, mesh)
    weights, arguments = abstract_weights(c, task, mesh), abstract_arguments(c, task, size)

    def lower() -> jax.stages.Lowered:
        with precise(c):
            lowered: jax.stages.Lowered = sampler.program.lower(*weights, *arguments)  # type: ignore[attr-defined]
        return lowered

    needed = _shard_bytes(weights)
    compiled = _compiled(c, topology, mesh, lower, None, cache)
    plan = _head(c, topology, mesh, planned_cost(c), size)
    plan |= {"microbatches": 1, "remat": "none"}
    plan |= _memory(topology, compiled, needed, "weights")
    plan["config"] = dataclasses.asdict(c)
    return plan


def _head(
    c: Config, topology: Topology, mesh: Mesh, cost: NetworkCost, batch: int
) -> dict[str, Any]:
    """What every plan says of its recipe and its machine."""
    return {
        "schema": PLAN_SCHEMA,
        "label": LABEL,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(topology),
        "topology": topology.name,
        "slices": c.mesh.slices,
        "chips": topology.chips * c.mesh.slices,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "model": cost.name,
        "parameters": cost.parameters,
        "tokens": cost.tokens,
        "batch_size": batch,
        "dtype": c.model.dtype,
        "remat": getattr(c.model, "remat", "none"),
    }


def _held_beside(task: Task, mesh: Mesh) -> tuple[float, str]:
    """Bytes on one device of the frozen weights that prepare examples, and why they are unknown.

    The training step does not read them, and they stay in the device's memory.
    """
    beside = set(task.reads) - set(task.shapes())
    if not beside:  # other frozen weights are loaded for sampling alone
        return 0.0, ""
    try:
        frozen = abstract_frozen(task, mesh)
    except UserError as error:
        return 0.0, one_line(error)
    return _shard_bytes([tree for name, tree in frozen.items() if name in beside]), ""


def _memory(
    topology: Topology,
    compiled: dict[str, Any],
    needed: float,
    holds: str,
    beside: float = 0.0,
    unknown: str = "",
) -> dict[str, Any]:
    """The memory of a compiled program, of which what it `holds` needs so many bytes.

    beside: bytes of frozen weights that are there, too; `unknown` says why they are not counted.
    """
    hbm, peak = topology.chip.device_hbm_bytes, compiled["peak_bytes"] + beside
    return {
        "memory": {
            "fits": peak <= hbm,
            "peak_bytes": peak,
            "hbm_bytes": hbm,
            "over_bytes": max(0.0, peak - hbm),
            "holds": holds,
            "state_bytes": needed,
            "frozen_bytes": beside,
            "frozen_unknown": unknown,
            "state_only": compiled.get("state_only", False),
        },
        "compile_seconds": compiled["seconds"],
    }


def versions(topology: Topology) -> dict[str, str]:
    """Versions of the packages that a plan depends on."""
    compilers = ("libtpu",) if topology.chip.torus else ("jax-cuda12-plugin", "jax-cuda13-plugin")
    found = {"ditjax": ditjax.__version__}
    for package in ("jax", "jaxlib", *compilers):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def describe(c: Config, mesh: Mesh, topology: Topology) -> str:
    """A candidate in one line, for progress."""
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    remat = getattr(c.model, "remat", "none")
    return f"{topology.name} {axes}, batch {c.train.batch_size}, remat {remat}"


def _compiled(
    c: Config,
    topology: Topology,
    mesh: Mesh,
    lower: Callable[[], jax.stages.Lowered],
    state: Any,
    cache: Path | None,
) -> dict[str, Any]:
    """The compiler's report on a program, from the cache if the same is in it.

    state: that of a training step, whose gradients are looked for, or None.
    """
    lowered = lower()
    identity = json.dumps([PLAN_SCHEMA, topology.name, c.mesh.slices, versions(topology)])
    key = hashlib.sha256(f"{identity}\n{lowered.as_text()}".encode()).hexdigest()[:16]
    file = cache / f"{key}.json" if cache else None
    if file and file.is_file():
        recorded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return recorded
    start = time.monotonic()
    with (
        progress(f"compiling {describe(c, mesh, topology)}"),
        compiling.no_rematerialization(mesh),
    ):
        try:
            executable = lowered.compile(compiler_options=topology.compiler_options)
        except jax.errors.JaxRuntimeError as error:
            report = {"peak_bytes": bytes_needed(str(error))}
            if report["peak_bytes"] is None:
                raise
        else:
            report = _read(executable, mesh, topology, state)
    report["seconds"] = round(time.monotonic() - start, 1)
    if file:
        write_json(file, report)
    return report


def bytes_needed(message: str) -> float | None:
    """Bytes of device memory that a program needs, from the compiler's out-of-memory error."""
    if not message.startswith("RESOURCE_EXHAUSTED"):
        return None
    for pattern in _TOO_LARGE:
        if found := pattern.search(message):
            return float(found["need"]) * _MEASURES[found["unit"]]
    return None


def _read(executable: Any, mesh: Mesh, topology: Topology, state: Any) -> dict[str, Any]:
    """Memory and collectives of a compiled step."""
    memory = executable.memory_analysis()
    placed = list(mesh.devices.flat)
    rows: dict[tuple[str, tuple[str, ...], int], dict[str, float]] = defaultdict(
        lambda: {"calls": 0, "wire_bytes": 0.0, "seconds": 0.0}
    )
    scattered = reduced = 0.0
    gradients = gradient_sizes(state, mesh) if state else set()
    for each in hlo.collectives(executable.as_text(), mesh.size):
        axes = axes_of(each.group, mesh)
        row = rows[each.kind, axes, len(each.group)]
        row["calls"] += each.times
        row["wire_bytes"] += each.wire_bytes
        row["seconds"] += wire_seconds(each, placed, topology)
        if "fsdp" in axes and each.kind == "reduce-scatter":
            scattered += each.times * sum(each.operands)
        elif "fsdp" in axes and each.kind == "all-reduce":
            reduced += each.times * sum(n for n in each.operands if n in gradients)
    peak = memory.peak_memory_in_bytes or (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    return {
        "peak_bytes": float(peak),
        "temporary_bytes": float(memory.temp_size_in_bytes),
        "collectives": [
            {"type": kind, "axes": list(axes), "group": size, **row}
            for (kind, axes, size), row in sorted(
                rows.items(), key=lambda item: -item[1]["wire_bytes"]
            )
        ],
        "scattered": scattered / (scattered + reduced) if scattered + reduced else None,
    }


def axes_of(group: Sequence[int], mesh: Mesh) -> tuple[str, ...]:
    """The axes of the mesh that a group of its devices extends along."""
    places = np.unravel_index(np.asarray(group), mesh.devices.shape)
    return tuple(
        axis for axis, place in zip(mesh.axis_names, places, strict=True) if len(set(place)) > 1
    )


def gradient_sizes(state: Any, mesh: Mesh) -> set[int]:
    """Element counts of the whole gradients, per layer, of the leaves that fsdp splits."""
    sizes = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        if "fsdp" in jax.tree.leaves(tuple(leaf.sharding.spec)):
            shard = int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
            layers = leaf.shape[0] if "blocks" in path_of(path).split("/") else 1
            sizes.add(shard * mesh.shape["fsdp"] // layers)
    return sizes


def _shard_bytes(state: Any) -> float:
    """Bytes of the training state on one device."""
    return float(
        sum(
            np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(state)
        )
    )


def _speed(
    c: Config,
    cost: NetworkCost,
    topology: Topology,
    plan: dict[str, Any],
    compiled: dict[str, Any],
) -> dict[str, Any]:
    """Collectives, roofline and cost of a compiled step."""
    count, images = plan["devices"], c.train.batch_size
    peak = topology.chip.rates.device_flops(c.model.dtype, c.model.matmul)
    flops = training_flops(cost.macs, images, cost.passes)
    wire = sum(row["wire_bytes"] for row in compiled["collectives"])
    traffic = roofline.memory_traffic(plan["memory"]["state_bytes"], compiled["temporary_bytes"])
    step = roofline.StepTime(
        compute=roofline.hardware_flops(cost, images) / (count * peak),
        memory=traffic / (topology.chip.hbm_gb_s * 1e9 / topology.chip.cores),
        wires=sum(row["seconds"] for row in compiled["collectives"]),
    )
    bounds = {"overlapped": step.overlapped, "sequential": step.sequential}
    chips = plan["chips"]
    return {
        "collectives": compiled["collectives"],
        "wire_bytes": wire,
        "wire_bytes_a_parameter": wire / plan["parameters"],
        "ideal_fsdp_bytes_a_parameter": roofline.fsdp_bytes(
            1, plan["mesh"]["fsdp"], 2 if c.model.dtype == "bfloat16" else 4
        ),
        "gradients_by_reduce_scatter": compiled["scattered"],
        "roofline": {
            "peak_flops_a_device": peak,
            "compute_seconds": step.compute,
            "memory_seconds": step.memory,
            "wire_seconds": step.wires,
            "model_flops": flops,
            "step_seconds": bounds,
            "images_a_second": {name: images / t for name, t in bounds.items()},
            "mfu": {name: roofline.mfu(flops, t, count, peak) for name, t in bounds.items()},
        },
        "cost": {
            "hours": {name: t * plan["steps"] / 3600 for name, t in bounds.items()},
            "chip_hours": {name: chips * t * plan["steps"] / 3600 for name, t in bounds.items()},
        },
    }


def _rollout(cost: NetworkCost, examples: int) -> dict[str, float]:
    """What a step on a reward draws, of one example of the batch and of all."""
    again = cost.training_macs / cost.macs
    return {
        "drawn_passes": cost.drawn,
        "passes": cost.passes + again,
        "drawn_flops": 2.0 * cost.drawn * cost.macs * examples,
        "share": cost.drawn / (cost.passes + again),
    }


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Print on stderr what is running, and every PROGRESS_SECONDS for how long."""
    done = threading.Event()
    start = time.monotonic()

    def report() -> None:
        print(f"{what} ...", file=sys.stderr, flush=True)
        while not done.wait(PROGRESS_SECONDS):
            print(f"{what}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
