"""Where every array lives on a mesh. The only PartitionSpecs there are.

A network's file has the table of its parameters (`models.network.Rules`). It serves their average
and both Adam moments, too: an optimizer's leaf carries the path of its parameter as a suffix. The
table here is of the activations that networks name.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ditjax.errors import UserError, divisors
from ditjax.models.embed import ANYWHERE, Placement
from ditjax.models.network import Rules

BATCH_AXES = ("data", "fsdp")

# Name of an activation -> where it lives. Keys and values are whole along `context`: a query sees
# every token.
ACTIVATIONS: dict[str, P] = {
    "conditioning": P("data", "fsdp"),  # [B, D]
    "row": P(BATCH_AXES, None),  # [B, D], before it becomes a context token
    "context": P(BATCH_AXES, None, None),  # [B, 2, D]
    "columns": P(BATCH_AXES, None, "tensor"),  # [B, 6, D] as the product returns it
    "modulation": P(BATCH_AXES, None, None),  # [B, 6, D]
    "tokens": P(BATCH_AXES, "context", None),  # [B, N, D]
    "hidden": P(BATCH_AXES, "context", "tensor"),  # [B, N, 4D]
    "queries": P(BATCH_AXES, "tensor", "context", None),  # [B, H, N, d]
    "keys": P(BATCH_AXES, "tensor", None, None),  # [B, H, M, d]; values too
    "similarities": P(BATCH_AXES, None),  # [B, B], of every row with every other
}

# The same with an axis of groups behind the batch, within which attention stays: a clip's frames,
# or its places. `context` splits the groups, so that every query and key of one is on one device.
GROUPED: dict[str, P] = {
    "tokens": P(BATCH_AXES, "context", None, None),  # [B, G, N, D]
    "hidden": P(BATCH_AXES, "context", None, "tensor"),  # [B, G, N, 4D]
    "queries": P(BATCH_AXES, "context", "tensor", None, None),  # [B, G, H, N, d]
    "keys": P(BATCH_AXES, "context", "tensor", None, None),
}

# The share of the parameters that may be replicated along an fsdp or tensor axis. Networks below a
# million parameters may exceed it: their biases alone do, and there is no memory to save.
MOST_WHOLE, SMALL = 0.02, 1_000_000


def path_of(path: Any) -> str:
    """A tree path as 'a/b/c'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Rules) -> P:
    """The first rule that matches `path`, right-aligned to `shape`; replicated when none does."""
    rule = next((axes for pattern, axes in rules if re.search(rf"(^|/)(?:{pattern})$", path)), None)
    if rule is None:
        return P()
    spec = P(*(None,) * (len(shape) - len(rule)), *rule)
    _check_divides(spec, shape, mesh, path)
    return spec


def _check_divides(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, what: str) -> None:
    for dim, axes in zip(shape, spec, strict=True):
        names = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[name] for name in names)
        if dim % parts:
            sizes = " x ".join(f"{name}={mesh.shape[name]}" for name in names)
            raise UserError(
                f"mesh axis {sizes} does not divide {what} {shape} along {dim}:"
                f" sizes that do: {_legal(dim)}."
            )


def _legal(number: int) -> str:
    return ", ".join(map(str, divisors(number)))


def state_shardings(state: Any, mesh: Mesh | AbstractMesh, rules: Rules) -> Any:
    """Shardings for a tree of arrays or ShapeDtypeStructs, by a network's rules."""

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec_of(path_of(path), leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(sharding, state)


def placed_shapes(tree: Any, shardings: Any) -> Any:
    """Arrays, or shapes, as shapes on a mesh: their dtypes with these shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


SPREAD = 1_000_000  # entries from which a frozen array is worth its gathers


def spread_shardings(params: Any, mesh: Mesh) -> Any:
    """Shardings of a frozen network without rules, such as a large text encoder, over `fsdp`.

    A large array is split along the first axis that it divides behind the leading one, which is of
    layers or of a table's rows. The others are whole on every device.
    """

    def sharding(leaf: Any) -> NamedSharding:
        split = (i for i in range(1, leaf.ndim) if leaf.shape[i] % mesh.shape["fsdp"] == 0)
        axis = next(split, None)
        if axis is None or leaf.size < SPREAD:
            return replicated(mesh)
        return NamedSharding(mesh, P(*(None,) * axis, "fsdp"))

    return jax.tree.map(sharding, params)


def check_split(params: Any, mesh: Mesh | AbstractMesh, rules: Rules) -> None:
    """Raises UserError when `fsdp` and `tensor` leave more than 2 % of the parameters whole.

    `params` are arrays or ShapeDtypeStructs.
    """
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return
    shardings = state_shardings(params, mesh, rules)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    total, whole = 0, []
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        total += math.prod(leaf.shape)
        if sharding.shard_shape(leaf.shape) == leaf.shape:
            whole.append((math.prod(leaf.shape), path_of(path), leaf.shape))
    left = sum(size for size, _, _ in whole)
    if total < SMALL or left <= MOST_WHOLE * total:
        return
    largest = ", ".join(f"{path} {shape}" for _, path, shape in sorted(whole, reverse=True)[:3])
    raise UserError(
        f"mesh fsdp={mesh.shape['fsdp']}, tensor={mesh.shape['tensor']} leaves"
        f" {left / total:.1%} of {total:,} parameters whole on every device, at most"
        f" {MOST_WHOLE:.0%} may be; the largest: {largest}. Legal without a rule for them in"
        " their network's file: fsdp=1, tensor=1."
    )


def activation_placement(mesh: Mesh) -> Callable[[str, jax.Array], jax.Array]:
    """Return place(name, activation), which constrains the activation's sharding by the table.

    While a program is traced, place raises UserError for an axis that does not divide.
    """

    def place(name: str, x: jax.Array) -> jax.Array:
        spec = ACTIVATIONS[name] if len(ACTIVATIONS[name]) == x.ndim else GROUPED[name]
        _check_divides(spec, x.shape, mesh, name)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return place


def rows_placement(mesh: Mesh | None) -> Placement:
    """Where the activations of a frozen network are whose weights are spread: split by rows alone.

    Without it the compiler would move the activations to the weights, not the weights to them.
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return ANYWHERE
    rows = batch_sharding(mesh)
    return Placement(lambda name, x: jax.lax.with_sharding_constraint(x, rows))


def whole_placement(mesh: Mesh | None, what: str) -> Placement:
    """Where the activations of a network without tokens to split are. Raises as `check_whole`."""
    if mesh is None:
        return ANYWHERE
    check_whole(mesh, what)
    return Placement(activation_placement(mesh)) if mesh.size > 1 else ANYWHERE


def check_tokens(tokens: int, extra: int, heads: int, mesh: Mesh, frames: int = 1) -> None:
    """Raise UserError if `context` does not divide a network's tokens, or `tensor` its heads.

    `extra` conditioning tokens are added to the others within the blocks. Of more than one, the
    `frames` are groups, which `context` must divide, too.
    """
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    if tokens % context or (tokens + extra) % context:
        joined = f" and with {extra} of conditioning" if extra else ""
        common = math.gcd(tokens, tokens + extra)
        raise UserError(
            f"mesh axis context={context} does not divide the model's {tokens} tokens{joined}:"
            f" sizes that do: {_legal(common)}."
        )
    if frames > 1 and frames % context:
        raise UserError(
            f"mesh axis context={context} does not divide the model's {frames} groups of frames:"
            f" sizes that do: {_legal(math.gcd(tokens, frames))}."
        )
    if heads % tensor:
        raise UserError(
            f"mesh axis tensor={tensor} does not divide the model's {heads} heads:"
            f" sizes that do: {_legal(heads)}."
        )


def check_whole(mesh: Mesh, what: str) -> None:
    """Raise UserError for a mesh that splits tokens or heads, of a network which names none."""
    _check_unsplit(
        mesh, ("context", "tensor"), f"{what} has no tokens or heads that it could split"
    )


def check_whole_tokens(mesh: Mesh) -> None:
    """Raise UserError for a mesh that splits tokens, of a network whose attention has them whole.

    On a split grid each hop of a window would need a halo from its neighbours.
    """
    what = "attention in windows or hops (config.model.attention_window, attention_hops)"
    _check_unsplit(mesh, ("context",), f"{what} needs all tokens of a head on one device")


def check_data_only(mesh: Mesh, what: str) -> None:
    """Raise UserError for a mesh with another axis than `data`."""
    others = [axis for axis in mesh.shape if axis != "data"]
    _check_unsplit(mesh, others, f"{what} is trained over data alone")


def _check_unsplit(mesh: Mesh, axes: Iterable[str], why: str) -> None:
    for axis in axes:
        if mesh.shape[axis] > 1:
            raise UserError(f"mesh axis {axis}={mesh.shape[axis]}: {why}; legal: {axis}=1.")


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose leading axis is split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """The number of parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def by_heads(attend: Callable[..., jax.Array], mesh: Mesh) -> Callable[..., jax.Array]:
    """Run `attend(q, k, v)` on each device's rows, heads and queries, with the keys of all tokens.

    Attention mixes none of these, so no device needs those of another. XLA would gather whole
    operands for a kernel that it cannot partition.
    """
    queries, keys = ACTIVATIONS["queries"], ACTIVATIONS["keys"]
    return jax.shard_map(
        attend, mesh=mesh, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False
    )


def by_rows(of_rows: Callable[..., Any], mesh: Mesh) -> Callable[[Any, Any], Any]:
    """Run `of_rows(own, whole, first, shared)` on each device's rows, beside those of all devices.

    (own, shared): trees of arrays [B, ...], split over the batch, and of whole arrays. `whole` are
    the gathered rows, through which gradients flow; the rows `own` are `whole[first:]`.
    """
    rows = P(BATCH_AXES)

    def local(own: Any, shared: Any) -> Any:
        def gather(x: jax.Array) -> jax.Array:
            return jax.lax.all_gather(x, BATCH_AXES, tiled=True)

        first = jax.lax.axis_index(BATCH_AXES) * len(jax.tree.leaves(own)[0])
        return of_rows(own, jax.tree.map(gather, own), first, shared)

    return jax.shard_map(local, mesh=mesh, in_specs=(rows, P()), out_specs=rows)


def check_batch(batch_size: int, mesh: Mesh, what: str) -> None:
    """Raise UserError if the mesh does not divide a batch."""
    parts = batch_parts(mesh)
    if batch_size % parts:
        raise UserError(
            f"{what} is {batch_size}: not divisible by the mesh's data x fsdp = {parts}; the next"
            f" size that is: {batch_size + parts - batch_size % parts}."
        )
