"""A recipe's real train step, compiled for a machine that is not here: what it needs and costs.

What comes out is a plan: plain data, as plan.json holds it. `LABEL` goes with every figure of it.
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
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import ditjax
from ditjax.config import Config
from ditjax.errors import UserError
from ditjax.files.atomic import write_json
from ditjax.machines import hlo, roofline
from ditjax.machines.topology import Topology, devices, wire_seconds
from ditjax.models.cost import trainable_parameters, training_flops
from ditjax.parallel import compiling
from ditjax.parallel.rules import path_of
from ditjax.tasks import build, programs

LABEL = "compiled, not run"
SCHEMA = 1
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

    With a folder `cache`, a program that was compiled before is not compiled again; without
    `hopeless`, one whose state alone is larger than the memory is not compiled at all. Raises
    UserError for a mesh that does not suit the topology, the network or the batch.
    """
    if c.train.network != "dit":
        raise UserError(
            f"config.train.network is {c.train.network!r}: plan knows the cost of a DiT only."
        )
    mesh = build.mesh(c, devices(topology, c.mesh.slices))
    training = programs.training(c, mesh)
    state = training.abstract_state
    needed = _shard_bytes(state)
    plan: dict[str, Any] = {
        "schema": SCHEMA,
        "label": LABEL,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(topology),
        "topology": topology.name,
        "slices": c.mesh.slices,
        "chips": topology.chips * c.mesh.slices,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "model": f"DiT-{c.model.size}/{c.model.patch}",
        "parameters": trainable_parameters(build.cost(c)),
        "tokens": build.cost(c).tokens,
        "batch_size": c.train.batch_size,
        "microbatches": c.train.microbatches,
        "dtype": c.model.dtype,
        "remat": c.model.remat,
        "steps": steps,
    }
    hbm = topology.chip.device_hbm_bytes
    if needed > hbm and not hopeless:
        compiled: dict[str, Any] = {"seconds": 0.0, "peak_bytes": needed, "state_only": True}
    else:
        compiled = _compiled(c, topology, mesh, training, cache)
    peak = compiled["peak_bytes"]
    plan["memory"] = {
        "fits": peak <= hbm,
        "peak_bytes": peak,
        "hbm_bytes": hbm,
        "over_bytes": max(0.0, peak - hbm),
        "state_bytes": needed,
        "state_only": compiled.get("state_only", False),
    }
    plan["compile_seconds"] = compiled["seconds"]
    if "collectives" in compiled:
        plan |= _speed(c, topology, plan, compiled)
    plan["config"] = dataclasses.asdict(c)
    return plan


def versions(topology: Topology) -> dict[str, str]:
    """Of the packages that a plan depends on."""
    compilers = ("libtpu",) if topology.chip.torus else ("jax-cuda12-plugin", "jax-cuda13-plugin")
    found = {"ditjax": ditjax.__version__}
    for package in ("jax", "jaxlib", *compilers):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def words_of(c: Config, mesh: Mesh, topology: Topology) -> str:
    """One candidate in a line of progress."""
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{topology.name} {axes}, batch {c.train.batch_size}, remat {c.model.remat}"


def _compiled(
    c: Config, topology: Topology, mesh: Mesh, training: programs.Training, cache: Path | None
) -> dict[str, Any]:
    """What the compiler says of the step, or said: a cache's key is the program itself."""
    lowered = training.lower()
    identity = json.dumps([SCHEMA, topology.name, c.mesh.slices, versions(topology)])
    key = hashlib.sha256(f"{identity}\n{lowered.as_text()}".encode()).hexdigest()[:16]
    file = cache / f"{key}.json" if cache else None
    if file and file.is_file():
        recorded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return recorded
    start = time.monotonic()
    with (
        progress(f"compiling {words_of(c, mesh, topology)}"),
        compiling.no_rematerialization(mesh),
    ):
        try:
            executable = lowered.compile(compiler_options=topology.compiler_options)
        except jax.errors.JaxRuntimeError as error:
            said = {"peak_bytes": bytes_needed(str(error))}
            if said["peak_bytes"] is None:
                raise
        else:
            said = _read(executable, mesh, topology, training.abstract_state)
    said["seconds"] = round(time.monotonic() - start, 1)
    if file:
        write_json(file, said)
    return said


def bytes_needed(message: str) -> float | None:
    """What a program needs of a device's memory, by the compiler's error that it has less."""
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
    gradients = gradient_sizes(state, mesh)
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
    """The axes of the mesh along which a group of its devices lies."""
    places = np.unravel_index(np.asarray(group), mesh.devices.shape)
    return tuple(
        axis for axis, place in zip(mesh.axis_names, places, strict=True) if len(set(place)) > 1
    )


def gradient_sizes(state: Any, mesh: Mesh) -> set[int]:
    """Numbers of elements of whole gradients, one a layer, of the leaves that fsdp splits."""
    sizes = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        if "fsdp" in jax.tree.leaves(tuple(leaf.sharding.spec)):
            shard = int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
            layers = leaf.shape[0] if "blocks" in path_of(path).split("/") else 1
            sizes.add(shard * mesh.shape["fsdp"] // layers)
    return sizes


def _shard_bytes(state: Any) -> float:
    """The training state's bytes on one device."""
    return float(
        sum(
            np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(state)
        )
    )


def _speed(
    c: Config, topology: Topology, plan: dict[str, Any], compiled: dict[str, Any]
) -> dict[str, Any]:
    """Collectives, roofline and cost of a step that was compiled."""
    shape, count, images = build.cost(c), plan["devices"], c.train.batch_size
    peak = topology.chip.rates.device_flops(c.model.dtype, c.model.matmul)
    flops = training_flops(shape, images)
    wire = sum(row["wire_bytes"] for row in compiled["collectives"])
    traffic = roofline.memory_traffic(plan["memory"]["state_bytes"], compiled["temporary_bytes"])
    step = roofline.Step(
        compute=roofline.hardware_flops(shape, images, c.model.remat) / (count * peak),
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


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Says on stderr what takes so long, and every so often for how long it has."""
    done = threading.Event()
    start = time.monotonic()

    def tell() -> None:
        print(f"{what} ...", file=sys.stderr, flush=True)
        while not done.wait(PROGRESS_SECONDS):
            print(f"{what}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
