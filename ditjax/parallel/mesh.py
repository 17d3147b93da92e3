"""The mesh: the devices of a run as a grid with named axes."""

import math
from collections import defaultdict
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from ditjax.config import Config
from ditjax.errors import UserError, divisors

# Outermost first: neighbours along the last axis have the fastest links. `tensor` communicates
# within every pair of products, `context` once per layer, `fsdp` ahead of time, and `data` once per
# step.
MESH_AXES = ("data", "fsdp", "context", "tensor")


def mesh_of(c: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices of a run, all there are unless given, as the recipe's grid."""
    m = c.mesh
    return make_mesh(m.data, m.fsdp, devices, tensor=m.tensor, context=m.context, slices=m.slices)


def make_mesh(
    data: int,
    fsdp: int,
    devices: Sequence[jax.Device] | None = None,
    *,
    tensor: int = 1,
    context: int = 1,
    slices: int = 1,
) -> Mesh:
    """A (data, fsdp, context, tensor) grid over all devices; one size may be -1, for the rest.

    `data` replicates the state and splits the batch, `fsdp` splits both, `tensor` splits heads and
    the width of the MLP, and `context` splits tokens. Slices are groups of devices with slow links
    between them. Each of `slices` is such a grid, and the data axis of the mesh has the length
    slices · data: only this axis crosses slices. For TPUs, which know their slice, `slices` must be
    the number of slices. For others it is free: slices are equal runs of devices in the order of
    their processes, so that the hosts of a rack can be one. Raises UserError if the product of the
    sizes is not the number of devices, or `slices` does not fit the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    groups = _slices(devices, slices)
    sizes = axis_sizes(
        len(groups[0]), data=data, fsdp=fsdp, tensor=tensor, context=context, slices=slices
    )
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    grids = [_grid(shape, group) for group in groups]
    # Linen and the reshape of patchify need axes that XLA propagates; JAX's default is Explicit.
    return Mesh(np.concatenate(grids), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def axis_sizes(
    each: int, *, data: int, fsdp: int, tensor: int = 1, context: int = 1, slices: int = 1
) -> dict[str, int]:
    """The axis sizes of a slice of `each` devices, with -1 filled in. Raises as `make_mesh`."""
    given = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    sizes = dict(given)
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise UserError(
            f"mesh axes {' and '.join(free)} are {'both' if len(free) == 2 else 'all'} -1: only one"
            " takes the rest."
        )
    if free and fixed > 0:
        sizes[free[0]] = each // fixed
    if math.prod(sizes.values()) != each or min(sizes.values()) < 1:
        given_sizes = ", ".join(
            f"{axis}={given[axis]}"
            for axis in ("data", "fsdp", "tensor", "context")
            if given[axis] != 1 or axis in ("data", "fsdp")
        )
        where = f"{each} device(s)" + (f" of each of {slices} slices" if slices > 1 else "")
        raise UserError(
            f"mesh {given_sizes} does not fill {where}: the sizes must multiply to it. Sizes that"
            f" divide {each}: {', '.join(map(str, divisors(each)))}; -1 takes the rest."
        )
    return sizes


def _grid(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of a slice as a grid whose neighbours are neighbours in the wiring."""
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
                f"mesh slices={slices}, but the {len(devices)} devices belong to {len(groups)}"
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
