"""Where every array lives: path pattern -> PartitionSpec. The only PartitionSpecs there are.

The same table serves parameters, their average and both Adam moments: an optimizer's leaf carries
the path of its parameter as a suffix.
"""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ditjax.errors import UserError

# First match wins; specs are over the leaf's last axes (a scanned stack adds a leading one).
# Kernels split their input axis, which every product contracts or gathers whole; adaLN's "6" and
# qkv's "3" stay unsplit axes of their own. Conv kernels [h, w, in, out] split in; the image and
# latent ends (3 or 4 channels) stay whole.
RULES: tuple[tuple[str, P], ...] = (
    (r"x_embedder/kernel", P(None, "fsdp")),
    (r"final_layer/linear/kernel", P("fsdp", None)),
    (r"qkv/kernel", P("fsdp", None, None, None)),
    (r"q/kernel", P("fsdp", None, None)),
    (r"kv/kernel", P("fsdp", None, None, None)),
    (r"adaln/linear/kernel", P("fsdp", None, None)),
    (r"(attn|cross)/out/kernel", P("fsdp", None)),
    (r"(mlp|t_embedder)/(in|out)/kernel", P("fsdp", None)),
    (r"y_embedder/table", P(None, "fsdp")),
)

BATCH = P(("data", "fsdp"))


def path_of(path: Any) -> str:
    """A tree path as 'a/b/c'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The first rule that matches `path`, right-aligned to `shape`; replicated when none does."""
    rule = next((spec for pattern, spec in RULES if re.search(rf"(^|/)(?:{pattern})$", path)), None)
    if rule is None:
        return P()
    spec = P(*(None,) * (len(shape) - len(rule)), *rule)
    for dim, axis in zip(shape, spec, strict=True):
        if axis is not None and dim % mesh.shape[axis]:
            legal = [n for n in range(1, dim + 1) if dim % n == 0]
            raise UserError(
                f"mesh axis {axis}={mesh.shape[axis]} does not divide {path} {shape} along {dim}:"
                f" sizes that do: {', '.join(map(str, legal))}."
            )
    return spec


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of arrays or ShapeDtypeStructs, by the rules."""

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec_of(path_of(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, state)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over all devices."""
    return NamedSharding(mesh, BATCH)


def check_batch(batch_size: int, mesh: Mesh, what: str) -> None:
    """Raises UserError when the devices do not divide a batch."""
    if batch_size % mesh.size:
        raise UserError(
            f"{what} is {batch_size}: not divisible by the mesh's {mesh.size} devices; the next"
            f" size that is: {batch_size + mesh.size - batch_size % mesh.size}."
        )
