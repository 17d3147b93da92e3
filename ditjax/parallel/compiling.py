"""Compilation: XLA's warnings of rematerialization as errors, and the heap that it leaves."""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

import jax
from jax.sharding import AbstractMesh, Mesh

from ditjax.errors import UserError
from ditjax.parallel import host

_REMATERIALIZATION = re.compile(
    rb"(?:[A-Z]\d{4} [^\]]*\] )?(?:\[\w+\] )?Involuntary full rematerialization"
    rb".*?from sharding (?P<source>\{(?!mesh\[).*?\}) to (?P<target>\{.*?\}) efficiently"
    rb" for HLO operation %\S+ = (?P<shape>\w+\[[^\]]*\])\S* (?P<operation>[\w-]+)\("
    rb"(?:.*?op_name=\"(?P<name>[^\"]*)\")?"
)

# XLA makes a ring of permutes of a product whose operand is gathered, if that is larger than so
# many MiB. Rings send half as much again as gathers do, so that there are none.
_NO_RINGS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
# What FSDP on a kind of TPU is compiled with (compiled, not run: docs/results.md).
_FSDP = {
    "TPU v5 lite": _NO_RINGS,
    "TPU v6 lite": {
        **_NO_RINGS,
        # Gradients of devices that lie along both axes of the slice are scattered by the chip's
        # SparseCores. Without it they are summed whole on every device, twice the bytes, and split.
        "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": "true",
    },
}

# The process's file descriptor 2 is redirected by one thread at a time; others wait.
_redirecting = threading.RLock()


def step_options(kind: str, axes: Mapping[str, int]) -> dict[str, str] | None:
    """XLA's options for a train step on devices of a kind, in a mesh of these axes, or None."""
    return _FSDP.get(kind) if axes["fsdp"] > 1 == axes["tensor"] else None


@contextlib.contextmanager
def no_rematerialization(mesh: Mesh | AbstractMesh) -> Iterator[None]:
    """Raise UserError if a compilation inside must gather a whole array to reshard it.

    XLA calls this an "involuntary full rematerialization", logs a warning in C++, and compiles. So
    the process's stderr is read meanwhile, and everything else is passed on. A program from JAX's
    compilation cache logs nothing, so a program that is refused is removed from the cache. Nothing
    is detected if TF_CPP_MIN_LOG_LEVEL is 2 or more. A warning about a sharding written by mesh
    axis is passed on to stderr and no error: XLA writes so where JAX was started before
    `ditjax.parallel` was imported (see there), and then warns where nothing is gathered, too.
    """
    cached = _cache_entries()
    with _stderr_without(_REMATERIALIZATION) as found:
        yield
    if not found:
        return
    for entry in _cache_entries() - cached:
        with contextlib.suppress(OSError):
            os.remove(entry)
    words = {key: (value or b"").decode() for key, value in found[0].groupdict().items()}
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    others = ", ".join(axis for axis, size in mesh.shape.items() if size > 1 and axis != "data")
    where = f" in {words['name']}" if words["name"] else ""
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    raise UserError(
        f"mesh {sizes}: XLA would gather {words['shape']} ({words['operation']}{where}) whole on"
        f" every device{more}, an involuntary full rematerialization: it cannot go from sharding"
        f" {words['source']} to {words['target']}. Legal: 1 for one or more of {others or 'data'};"
        " data alone always is."
    )


@contextlib.contextmanager
def watching(mesh: Mesh | AbstractMesh) -> Iterator[None]:
    """Around the call that compiles a program: `no_rematerialization`, then no holes in the heap.

    See `host.discard_free_blocks`. On one device nothing is watched.
    """
    with contextlib.nullcontext() if mesh.size == 1 else no_rematerialization(mesh):
        yield
    host.discard_free_blocks()


def once() -> Callable[[], AbstractContextManager[None]]:
    """Around every call of a program on one host: after the first, no holes are in the heap."""
    compiled = False

    @contextlib.contextmanager
    def compiling() -> Iterator[None]:
        nonlocal compiled
        yield
        if not compiled:
            host.discard_free_blocks()
            compiled = True

    return compiling


def _cache_entries() -> set[str]:
    """The files of JAX's compilation cache, if it is a local folder."""
    folder = getattr(jax.config, "jax_compilation_cache_dir", None)
    if not folder or not os.path.isdir(folder):
        return set()
    return {entry.path for entry in os.scandir(folder) if entry.is_file()}


@contextlib.contextmanager
def _stderr_without(pattern: re.Pattern[bytes]) -> Iterator[list[re.Match[bytes]]]:
    """Remove the lines that match `pattern` from file descriptor 2, and pass on all others.

    Yields the list of matches, which is complete once the context has ended.
    """
    found: list[re.Match[bytes]] = []
    with _redirecting:
        try:
            before = os.dup(2)
        except OSError:  # a process without stderr
            yield found
            return
        read, write = os.pipe()
        end = b"\0end of ditjax's redirection\n"
        ended = threading.Event()

        def pass_on() -> None:
            rest = b""
            # Continue after `end`: a child process started meanwhile has the pipe as its stderr.
            while chunk := os.read(read, 65536):
                *lines, rest = re.split(rb"(?<=[\r\n])", rest + chunk)
                if ended.is_set():
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    if line.endswith(end):
                        _write(before, line.removesuffix(end))
                        ended.set()
                    elif match := pattern.search(line):
                        _write(before, line[: match.start()])
                        found.append(match)
                    else:
                        _write(before, line)
            os.close(read)
            os.close(before)

        thread = threading.Thread(target=pass_on, daemon=True)
        thread.start()
        sys.stderr.flush()
        os.dup2(write, 2)
        try:
            yield found
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.write(write, end)
            os.close(write)
            ended.wait()


def _write(descriptor: int, data: bytes) -> None:
    # Without a reader the lines are lost; the thread must go on to the end of the redirection.
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(descriptor, data) :]
