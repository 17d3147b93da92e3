"""Memory that was freed is had again without the kernel."""

import importlib.util
import subprocess
import sys

import pytest

from ditjax import host

# A block of 64 MB, beyond what malloc keeps by itself: taken, written and freed, as a step's
# temporaries are. Prints the pages that the kernel had to find in the last three rounds of five.
BLOCKS = """
import ctypes, resource, sys
from ditjax import host
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


@pytest.mark.parametrize("package", ["libtpu", "jax_plugins"])
def test_a_machine_with_an_accelerator_is_left_alone(monkeypatch, package):
    monkeypatch.delenv("JAX_PLATFORMS")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name == package else real(name)
    )
    monkeypatch.setattr("ctypes.CDLL", lambda _: pytest.fail("settings were made"))
    assert host.keep_freed_memory() is False
