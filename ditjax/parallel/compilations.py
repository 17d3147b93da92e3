"""JAX's persistent compilation cache: a program that was compiled once starts at once."""

import contextlib
import errno
import hashlib
import os
import platform
import sys
from pathlib import Path

import jax

from ditjax.errors import one_line, reason

OFF = "off"
MAX_BYTES = 4 * 2**30
SECONDS = 0.1  # the shortest compilation to cache; JAX's own threshold, 1 s, leaves out a third


def enable_cache() -> None:
    """Enable the persistent compilation cache in $DITJAX_CACHE, by default ~/.cache/ditjax/xla.

    DITJAX_CACHE=off disables it. JAX's own variable JAX_COMPILATION_CACHE_DIR takes precedence. If
    there is no home directory or the folder cannot be written, nothing is cached, and a line says
    so.
    """
    chosen = os.environ.get("DITJAX_CACHE") or "~/.cache/ditjax/xla"
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or chosen == OFF:
        return
    try:
        folder = Path(chosen).expanduser().absolute() / processor_kind()
        folder.mkdir(parents=True, exist_ok=True)
        _prune(folder.parent)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        why = getattr(error, "strerror", None) or reason(error)
        print(
            f"note: compiled programs are not kept: {one_line(chosen)}: {one_line(why)}."
            " DITJAX_CACHE=DIR names another folder, and DITJAX_CACHE=off none",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)


def processor_kind() -> str:
    """A name for this kind of processor, such as 'x86_64-1f2e3d4c'.

    What XLA compiled for one CPU may contain instructions that are illegal on another. JAX's cache
    key does not distinguish them, and machines may share a home directory.
    """
    flags = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next(line for line in lines if line.lower().startswith(("flags", "features")))
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def _prune(folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Remove the oldest files until the rest take at most `max_bytes`.

    JAX's own limit needs another package. A process that misses a removed file compiles instead.
    """
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file():
                found.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= max_bytes:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size
