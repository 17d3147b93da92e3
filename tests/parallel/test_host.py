"""Memory that was freed is had again without the kernel."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ditjax.parallel import host

# A block of 64 MB, beyond what malloc keeps by itself: taken, written and freed, as a step's
# temporaries are. Prints the pages that the kernel had to find in the last three rounds of five.
BLOCKS = """
import ctypes, resource, sys
from ditjax.parallel import host
if sys.argv[1] == "keep":
    assert host.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for k in range(5):
    if k == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS, how], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept():
    pages = 3 * (64 << 20) // 4096
    assert faults("leave") > pages / 2
    assert faults("keep") < pages / 50


# Holes of 4 to 260 KiB, as a compilation leaves them, and blocks between that stay. Prints whether
# a block asked for after `leave_holes` lies below one of these, and how much memory was given back.
HOLES = """
import ctypes, sys
from pathlib import Path
from ditjax.parallel import host
if sys.argv[1] == "keep":
    assert host.keep_freed_memory()
libc = host._libc()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
blocks = []
for k in range(2000):
    blocks.append(libc.malloc(4096 + 1024 * (k % 257)))
    ctypes.memset(blocks[-1], 1, 4096 + 1024 * (k % 257))
    pinned = libc.malloc(64)
for block in blocks:
    libc.free(block)
before = resident()
host.discard_free_blocks()
print(libc.malloc(65536) < pinned, before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize(("how", "looked_at"), [("keep", False), ("leave", True)])
def test_the_holes_that_a_compilation_leaves_are_not_looked_at_again(how, looked_at):
    done = subprocess.run(
        [sys.executable, "-c", HOLES, how], capture_output=True, text=True, check=True
    )
    below, given_back = done.stdout.split()
    assert (below == "True") is looked_at
    # Half of what the holes held, at least: pages that they share with what stays are kept.
    assert (int(given_back) > 2000 * 132 * 1024 / 2) is not looked_at


HUGE = """
from pathlib import Path
from ditjax.parallel import host
assert host.keep_freed_memory()
lines = Path("/proc/self/smaps").read_text().splitlines()
print(*[line for line in lines if line.startswith("VmFlags")])
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="no huge pages here"
)
def test_the_heap_may_have_huge_pages():
    done = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, check=True)
    assert "hg" in done.stdout.split()


ANOTHER = """
#include <stddef.h>
extern void *__libc_malloc(size_t);
void *malloc(size_t size) { return __libc_malloc(size); }
"""


@pytest.mark.skipif(not shutil.which("cc") or sys.platform != "linux", reason="needs a C compiler")
def test_another_malloc_is_left_alone(tmp_path):
    # What is true of glibc's heap is not of another's: holes would be looked for without an end.
    (tmp_path / "m.c").write_text(ANOTHER)
    library = tmp_path / "m.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "m.c"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", "from ditjax.parallel import host; print(host.keep_freed_memory())"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LD_PRELOAD": str(library)},
    )
    assert done.stdout.split() == ["False"]


@pytest.mark.parametrize("package", ["libtpu", "jax_plugins"])
def test_a_machine_with_an_accelerator_is_left_alone(monkeypatch, package):
    monkeypatch.delenv("JAX_PLATFORMS")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name == package else real(name)
    )
    monkeypatch.setattr("ctypes.CDLL", lambda _: pytest.fail("settings were made"))
    assert host.keep_freed_memory() is False
