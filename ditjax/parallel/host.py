"""Memory of the host process: settings of malloc that make training on CPUs faster."""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

# Constants of glibc's malloc.h and Linux's mman.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_MADV_DONTNEED, _MADV_HUGEPAGE = 4, 14
_HUGE_PAGE = 2**21
# Free blocks between these sizes are discarded; a block larger than all ends the heap.
_SMALLEST_HOLE, _LARGEST_HOLE, _ABOVE_ALL = 2**11, 2**30, 2**32
ACCELERATORS = ("libtpu", "jax_plugins")  # installed by the extras tpu, cuda12 and cuda13

_keeps = False  # whether `keep_freed_memory` has changed this process's malloc


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed memory in the process, on machines without an accelerator.

    XLA's CPU client allocates the temporaries of each step (1.6 GB for S/2 at batch 8) with malloc
    and frees them after it. glibc returns such blocks to the kernel, which must find and clear the
    pages again: a fifth of the step. Threads keep the arena that they start with, so call this
    before JAX starts its threads. Returns whether it was done, which needs glibc's malloc.
    """
    cpu_only = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(
        importlib.util.find_spec(name) for name in ACCELERATORS
    )
    if not cpu_only or sys.platform != "linux":
        return False
    if not _malloc_is_of_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # A single heap that is never trimmed, and no blocks mapped outside of it.
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}
    global _keeps
    _keeps = all(mallopt(name, value) == 1 for name, value in settings.items())
    if _keeps:
        _request_huge_pages()
    return _keeps


def _malloc_is_of_glibc() -> bool:
    """False if another malloc such as jemalloc is preloaded; glibc's mallopt exists even then."""
    try:
        glibc = ctypes.CDLL("libc.so.6")
        found = [ctypes.cast(lib.malloc, ctypes.c_void_p) for lib in (ctypes.CDLL(None), glibc)]
    except (OSError, AttributeError):
        return False
    return found[0].value == found[1].value and hasattr(glibc, "mallopt")


def _request_huge_pages() -> None:
    """Grow the heap's address space to half of the free memory, and allow huge pages in it.

    The kernel then clears 512 pages at a time, and fewer addresses need translation. Does nothing
    if the kernel counts addresses as memory (vm.overcommit_memory = 2), or refuses.
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


def discard_free_blocks() -> None:
    """Take the free blocks that a compilation left in the heap out of use.

    LLVM leaves tens of thousands of them (28,000 for S/2, half a gigabyte). XLA's products allocate
    scratch buffers in every step, and malloc finds them among these blocks, under the lock of the
    single heap and cold in the caches: 7 % of the step. This allocates the blocks for good and
    returns their pages; later allocations come from the end of the heap. Does nothing without
    `keep_freed_memory`.
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
    """Call madvise on the whole pages of a block; a refusal by the kernel is ignored."""
    first = -(-block // page) * page
    if first < (last := (block + size) // page * page):
        libc.madvise(first, last - first, advice)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
