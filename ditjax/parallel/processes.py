"""What several processes of one run agree on."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils


def agreed(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first process's [start, stop) ranges, on every process: only it looks at the disk."""
    if jax.process_count() == 1:
        return list(ranges)
    count = multihost_utils.broadcast_one_to_all(np.int32(len(ranges)))
    mine = np.zeros((int(count), 2), np.int32)
    if jax.process_index() == 0:
        mine[:] = np.asarray(ranges, np.int32).reshape(-1, 2)
    return [(int(a), int(b)) for a, b in multihost_utils.broadcast_one_to_all(mine)]


def gathered(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """A leaf whole in this process's memory, wherever its shards are; every process calls it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def meet() -> None:
    """Returns when every process has called it: what the others read may then be removed."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("ditjax")
