"""The host process: what is set before XLA starts its threads."""

import ctypes
import importlib.util
import os
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
ACCELERATORS = ("libtpu", "jax_plugins")  # what the extras tpu, cuda12 and cuda13 install


def keep_freed_memory() -> bool:
    """On a machine that computes with its CPU, memory that was freed stays with the process.

    XLA's CPU client takes a step's temporaries (1.6 GB for S/2 at batch 8) from malloc and gives
    them back after it; glibc returns such blocks to the kernel, which must find and clear every
    page again: a fifth of the step. Threads keep the allocator they began with, so this comes
    before JAX makes its own. Returns whether it was done; where malloc is not glibc's, nothing is.
    """
    cpu_only = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(
        importlib.util.find_spec(name) for name in ACCELERATORS
    )
    if not cpu_only or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # One heap, never a mapping of its own, never trimmed.
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
