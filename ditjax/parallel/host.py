"""The host process: what is set before XLA starts its threads."""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

# Of glibc's malloc.h, and of Linux's mman.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_MADV_DONTNEED, _MADV_HUGEPAGE = 4, 14
_HUGE_PAGE = 2**21
# Holes between these sizes are left; a block above all of them lies at the end of the heap.
_SMALLEST_HOLE, _LARGEST_HOLE, _ABOVE_ALL = 2**11, 2**30, 2**32
ACCELERATORS = ("libtpu", "jax_plugins")  # what the extras tpu, cuda12 and cuda13 install

_keeps = False  # what `keep_freed_memory` did to this process's malloc


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
    if not _malloc_is_of_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # One heap, never a mapping of its own, never trimmed.
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}
    global _keeps
    _keeps = all(mallopt(name, value) == 1 for name, value in settings.items())
    if _keeps:
        _ask_for_huge_pages()
    return _keeps


def _malloc_is_of_glibc() -> bool:
    """False where another one is preloaded (jemalloc): glibc's mallopt is there even then."""
    try:
        glibc = ctypes.CDLL("libc.so.6")
        found = [ctypes.cast(lib.malloc, ctypes.c_void_p) for lib in (ctypes.CDLL(None), glibc)]
    except (OSError, AttributeError):
        return False
    return found[0].value == found[1].value and hasattr(glibc, "mallopt")


def _ask_for_huge_pages() -> None:
    """The heap grows to half of the free memory, as addresses only, which may be of huge pages.

    A step's blocks are cleared 512 pages at a time, and fewer addresses are to be translated. Where
    the kernel counts addresses as memory (vm.overcommit_memory = 2), or refuses, nothing is done.
    """
    try:
        if Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip() == "2":
            return
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) << 10
    except (OSError, ValueError, StopIteration):
        return
    libc = _libc()
    block = libc.malloc(free // 2)
    if block:
        _advise(libc, block, free // 2, _MADV_HUGEPAGE, _HUGE_PAGE)
        libc.free(block)


def leave_holes() -> None:
    """After a compilation: the free blocks that it left in the heap are not looked at again.

    LLVM leaves tens of thousands (28,000 for S/2, half a gigabyte). XLA's products take scratch
    buffers from malloc at every step, and find them among these, under the one heap's lock, cold in
    the caches: 7 % of the step. They are taken here for good and their pages given back; what is
    asked for later comes from the end of the heap. Without `keep_freed_memory` nothing is done.
    """
    if not _keeps:
        return
    libc = _libc()
    end = libc.malloc(_ABOVE_ALL)
    libc.free(end)
    size = _LARGEST_HOLE
    while end and size >= _SMALLEST_HOLE:
        block = libc.malloc(size)
        if block and block < end:
            _advise(libc, block, size, _MADV_DONTNEED, os.sysconf("SC_PAGE_SIZE"))
        else:
            libc.free(block)
            size = size * 7 // 8


def _advise(libc: ctypes.CDLL, block: int, size: int, advice: int, page: int) -> None:
    """Of the whole pages in a block; what the kernel refuses is left as it was."""
    first = -(-block // page) * page
    if first < (last := (block + size) // page * page):
        libc.madvise(first, last - first, advice)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
