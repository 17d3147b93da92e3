"""The devices of a run as a named grid."""

from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from ditjax.errors import UserError

AXES = ("data", "fsdp")


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp) grid over all devices; one size may be -1: what the other leaves.

    `data` replicates the state and splits the batch; `fsdp` splits both. Raises UserError when the
    sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = 1
    for size in sizes.values():
        fixed *= size if size != -1 else 1
    if len(free) > 1:
        raise UserError(f"mesh axes {' and '.join(free)} are both -1: only one takes what is left.")
    if free:
        sizes[free[0]] = len(devices) // fixed
        fixed *= sizes[free[0]]
    if fixed != len(devices) or min(sizes.values()) < 1:
        legal = [d for d in range(1, len(devices) + 1) if len(devices) % d == 0]
        raise UserError(
            f"mesh data={data}, fsdp={fsdp} does not fill {len(devices)} device(s): the sizes must"
            f" multiply to it. Sizes that divide {len(devices)}: {', '.join(map(str, legal))}; -1"
            " takes what is left."
        )
    shape = tuple(sizes[axis] for axis in AXES)
    # Linen and patchify's reshape need axes that XLA propagates, not JAX 0.10's Explicit default.
    return Mesh(
        mesh_utils.create_device_mesh(shape, devices=devices),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
    )
