"""What the compiler says while it compiles, only on stderr, and what it leaves on the heap."""

import contextlib
import functools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import ParamSpec, TypeVar

import jax
from jax.sharding import AbstractMesh, Mesh

from ditjax.errors import UserError
from ditjax.parallel import host

_REMATERIALIZATION = re.compile(
    rb"(?:[A-Z]\d{4} [^\]]*\] )?(?:\[\w+\] )?Involuntary full rematerialization"
    rb".*?from sharding (?P<source>\{.*?\}) to (?P<target>\{.*?\}) efficiently"
    rb" for HLO operation %\S+ = (?P<shape>\w+\[[^\]]*\])\S* (?P<operation>[\w-]+)\("
    rb"(?:.*?op_name=\"(?P<name>[^\"]*)\")?"
)

# One redirection of the process's file descriptor 2 at a time; compilations in other threads wait.
_redirecting = threading.RLock()

P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def no_rematerialization(mesh: Mesh | AbstractMesh) -> Iterator[None]:
    """Compile inside: raises UserError if XLA must gather an array whole to split it otherwise.

    XLA calls that an "involuntary full rematerialization", compiles, and logs a warning in C++:
    so the process's stderr is read meanwhile, and all else in it passed on. A program that comes
    from JAX's compilation cache says nothing, and so what is refused is taken out of it again.
    Nothing is seen where TF_CPP_MIN_LOG_LEVEL is 2 or more.
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


def watched(program: Callable[P, R], mesh: Mesh) -> Callable[P, R]:
    """The same program, `settled`; the call that compiles it is inside `no_rematerialization`."""
    if mesh.size == 1:
        return settled(program)
    return settled(program, functools.partial(no_rematerialization, mesh))


def settled(
    program: Callable[P, R],
    around: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> Callable[P, R]:
    """The same program; its first call, which compiles it, leaves no holes in the host's heap."""
    compiled = False

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal compiled
        if compiled:
            return program(*args, **kwargs)
        with around():
            out = program(*args, **kwargs)
        host.leave_holes()
        compiled = True
        return out

    return call


def _cache_entries() -> set[str]:
    """The files of JAX's compilation cache, where it is a local folder."""
    folder = getattr(jax.config, "jax_compilation_cache_dir", None)
    if not folder or not os.path.isdir(folder):
        return set()
    return {entry.path for entry in os.scandir(folder) if entry.is_file()}


@contextlib.contextmanager
def _stderr_without(pattern: re.Pattern[bytes]) -> Iterator[list[re.Match[bytes]]]:
    """Takes the lines with `pattern` out of file descriptor 2; all others go where they went.

    Yields the list of what was found, complete once the context has ended.
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
            # Not only until `end`: a child started meanwhile keeps the pipe as its stderr.
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
    while data:
        data = data[os.write(descriptor, data) :]
