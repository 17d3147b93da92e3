"""Compiled programs are kept on disk: what was compiled once starts at once."""

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import jax

OFF = "off"
MAX_BYTES = 4 * 2**30
SECONDS = 0.1  # what compiles faster is not kept; jax's own threshold, 1 s, leaves out a third


def keep() -> None:
    """Sets JAX's persistent compilation cache: $DITJAX_CACHE, else ~/.cache/ditjax/xla.

    DITJAX_CACHE=off keeps nothing. Where JAX_COMPILATION_CACHE_DIR is set, that is used, as JAX's
    own variables say. A place that cannot be written is none: nothing is kept, and no word lost.
    """
    chosen = os.environ.get("DITJAX_CACHE") or "~/.cache/ditjax/xla"
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or chosen == OFF:
        return
    folder = Path(chosen).expanduser().absolute() / host()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _prune(folder.parent)
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)


def host() -> str:
    """This kind of processor: 'x86_64-1f2e3d4c'.

    What XLA compiled for one CPU may be illegal instructions on another, and its key does not tell
    them apart where machines share a home directory.
    """
    flags = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next(line for line in lines if line.lower().startswith(("flags", "features")))
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def _prune(folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Removes the files written first until the rest take at most `max_bytes`.

    JAX's own bound wants a package more. One that reads a file meanwhile compiles instead.
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
