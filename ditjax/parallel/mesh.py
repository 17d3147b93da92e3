"""The devices of a run as a named grid."""

import math
from collections import defaultdict
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from ditjax.errors import UserError, divisors

# Outermost first: neighbours along the last axis have the fastest links. `tensor` speaks in the
# middle of every product's pair, `context` once a layer, `fsdp` ahead of time, `data` once a step.
AXES = ("data", "fsdp", "context", "tensor")


def make_mesh(
    data: int,
    fsdp: int,
    devices: Sequence[jax.Device] | None = None,
    *,
    tensor: int = 1,
    context: int = 1,
    slices: int = 1,
) -> Mesh:
    """A (data, fsdp, context, tensor) grid over all devices; one size may be -1: what is left.

    `data` replicates the state and splits the batch; `fsdp` splits both; `tensor` splits heads and
    the MLP's width; `context` splits tokens. With `slices`, groups of devices with slow links
    between them, each slice is such a grid and the mesh's data axis is slices · data long: it alone
    crosses from slice to slice. TPUs say which slice they are of: `slices` must be their number.
    Elsewhere it is free: slices are equal runs of devices in the order of their processes, so that
    the hosts of a rack can be one. Raises UserError when the sizes do not multiply to the number of
    devices, or `slices` is not what the devices are.
    """
    devices = jax.devices() if devices is None else list(devices)
    groups = _slices(devices, slices)
    sizes = axis_sizes(
        len(groups[0]), data=data, fsdp=fsdp, tensor=tensor, context=context, slices=slices
    )
    shape = tuple(sizes[axis] for axis in AXES)
    grids = [_grid(shape, group) for group in groups]
    # Linen and patchify's reshape need axes that XLA propagates, not JAX 0.10's Explicit default.
    return Mesh(np.concatenate(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(
    each: int, *, data: int, fsdp: int, tensor: int = 1, context: int = 1, slices: int = 1
) -> dict[str, int]:
    """The axes of a slice of `each` devices, -1 filled in; raises UserError as `make_mesh`."""
    given = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    sizes = dict(given)
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise UserError(
            f"mesh axes {' and '.join(free)} are {'both' if len(free) == 2 else 'all'} -1: only one"
            " takes what is left."
        )
    if free and fixed > 0:
        sizes[free[0]] = each // fixed
    if math.prod(sizes.values()) != each or min(sizes.values()) < 1:
        said = ", ".join(
            f"{axis}={given[axis]}"
            for axis in ("data", "fsdp", "tensor", "context")
            if given[axis] != 1 or axis in ("data", "fsdp")
        )
        where = f"{each} device(s)" + (f" of each of {slices} slices" if slices > 1 else "")
        raise UserError(
            f"mesh {said} does not fill {where}: the sizes must multiply to it. Sizes that divide"
            f" {each}: {', '.join(map(str, divisors(each)))}; -1 takes what is left."
        )
    return sizes


def _grid(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """One slice's devices, so that neighbours in the grid are neighbours in the wiring."""
    return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)


def _slices(devices: Sequence[jax.Device], slices: int) -> list[list[jax.Device]]:
    """The devices of each slice, in order."""
    found: dict[int, list[jax.Device]] = defaultdict(list)
    for device in devices:
        found[getattr(device, "slice_index", None) or 0].append(device)
    groups = [found[index] for index in sorted(found)]
    if devices[0].platform == "tpu":
        if slices != len(groups):
            raise UserError(
                f"mesh slices={slices}, and the {len(devices)} devices are of {len(groups)}"
                f" slice(s): set config.mesh.slices={len(groups)}."
            )
        return groups
    processes = len({device.process_index for device in devices})
    units = processes if processes > 1 else len(devices)
    if slices < 1 or len(devices) % slices or units % slices:
        legal = divisors(math.gcd(units, len(devices)))
        raise UserError(
            f"mesh slices={slices} does not divide {len(devices)} device(s) of {processes}"
            f" process(es) into equal groups: expected one of {', '.join(map(str, legal))}."
        )
    if slices == 1:
        return [list(devices)]
    ordered = [
        device
        for group in groups
        for device in sorted(group, key=lambda device: (device.process_index, device.id))
    ]
    each = len(ordered) // slices
    return [ordered[start : start + each] for start in range(0, len(ordered), each)]
