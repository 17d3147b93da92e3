"""Digests of arrays, against which a checkpoint is checked when it is read back.

`sha256` covers the bytes of the whole array in C order. `sum64` is for arrays that are not in this
process's memory, but on other devices or in other processes. For an array whose element i has the
bits u(i) it is the two sums, mod 2**32,

    sum of h(i)  and  sum of h(i) (2 w(i) + 1),   h(i) = mix(u(i) xor w(i)),
                                                  w(i) = sum over axes of mix(salt + index on it).

A sum has no order: it is the same on every mesh, it is computed where the shards are, and no
process needs the whole array. `mix` is a bijection, so one changed element always changes the sum;
other damage is missed once in 2**64. Both detect accidents, not forgery: whoever forges a
checkpoint can write its digests too.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ditjax.errors import UserError

Scheme = Literal["sha256", "sum64"]
# Path of a leaf -> [dtype, shape, "SCHEME:HEX"], as it is stored in JSON.
Digests = dict[str, list[Any]]

_SALT, _AXIS = 0x9E3779B9, 0xC2B2AE35  # the second distinguishes the axes


def tree_digests(tree: Any, scheme: Scheme | None = None) -> Digests:
    """The digests of a tree of arrays: {'params/in/kernel': ['float32', [2, 8], 'sha256:0123...']}.

    The default scheme is sha256 for arrays in this process's memory, which needs no compilation,
    and sum64 otherwise, which needs no copy. Every process must call this. It waits for the
    devices.
    """
    leaves = jax.tree.leaves(tree)
    if scheme is None:
        scheme = "sha256" if all(map(_in_memory, leaves)) else "sum64"
    if scheme == "sha256":
        found = [_sha256(leaf) for leaf in leaves]
    else:
        sums = np.asarray(_sums(leaves))
        found = ["".join(f"{int(word):08x}" for word in row) for row in sums]
    return {
        path: [*described, f"{scheme}:{digest}"]
        for (path, described), digest in zip(leaf_types(tree).items(), found, strict=True)
    }


def changed_leaves(saved: Mapping[str, list[Any]], tree: Any) -> list[str]:
    """The paths of leaves whose digests differ from the saved ones."""
    schemes = {leaf[2].partition(":")[0] for leaf in saved.values()}
    if unknown := schemes - {"sha256", "sum64"}:
        raise UserError(f"digests of the kind {unknown.pop()!r} are of a newer ditjax: use that.")
    found: Digests = {}
    for scheme in sorted(schemes):
        found = tree_digests(tree, scheme)
    return [path for path, leaf in found.items() if saved.get(path) != leaf]


def leaf_types(tree: Any) -> dict[str, list[Any]]:
    """Path of a leaf -> [dtype, shape], in the order of the leaves."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [
            np.dtype(leaf.dtype).name,
            list(leaf.shape),
        ]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def type_differences(saved: Mapping[str, list[Any]], asked: Mapping[str, list[Any]]) -> list[str]:
    """How the `leaf_types` of a checkpoint differ from those asked for, in words."""
    found = []
    for path in sorted(saved.keys() | asked.keys()):
        if path not in asked:
            found.append(f"{path} is in the checkpoint only")
        elif path not in saved:
            found.append(f"{path} is not in the checkpoint")
        elif saved[path][:2] != asked[path][:2]:
            found.append(f"{path} is {_type(saved[path])}, asked for {_type(asked[path])}")
    return found


def _type(leaf: list[Any]) -> str:
    return f"{leaf[0]}[{','.join(map(str, leaf[1]))}]"


def _in_memory(leaf: jax.Array) -> bool:
    """Whether this process can read the whole array without a transfer."""
    device: Any = next(iter(leaf.sharding.device_set))
    return device.platform == "cpu" and leaf.is_fully_addressable


def _sha256(leaf: jax.Array) -> str:
    if not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    value = np.ascontiguousarray(leaf)
    return hashlib.sha256(value.reshape(-1).view(np.uint8).data).hexdigest()


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    """u32[leaves, 2]."""
    return jnp.stack([_sum(leaf) for leaf in leaves])


def _sum(x: jax.Array) -> jax.Array:
    bits = _bits(x)
    places = jnp.full(bits.shape, np.uint32(_SALT))
    for axis, length in enumerate(bits.shape):
        start = np.uint32((_SALT + (axis + 1) * _AXIS) % 2**32)
        along = _mix(jnp.arange(length, dtype=jnp.uint32) + start)
        places += jax.lax.broadcast_in_dim(along, bits.shape, (axis,))
    mixed = _mix(bits ^ places)
    weighted = mixed * (places * np.uint32(2) + np.uint32(1))
    return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(weighted, dtype=jnp.uint32)])


def _bits(x: jax.Array) -> jax.Array:
    """The elements' bits as u32; 8-byte elements get a last axis with their halves."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    size = x.dtype.itemsize
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Wellons' lowbias32, a bijection of u32 in which every bit of x moves every bit."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
