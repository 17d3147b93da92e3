"""Where a figure was made: the program, the versions, the devices, the day."""

import os
import platform
import shlex
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import ditjax


def environment(command: str) -> dict[str, Any]:
    """Where a result was made: versions and devices, never the process's environment."""
    device = jax.devices()[0]
    return {
        "ditjax": ditjax.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "flax", "optax", "numpy")},
        "platform": platform.platform(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpus": len(cores()) or os.cpu_count(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": command,
    }


def typed(
    command: str, argv: Sequence[str], *, drop: Sequence[str] = (), folders: Sequence[str] = ()
) -> str:
    """'python -m ditjax.COMMAND ...' as a shell reads it back, for a record.

    Flags of `drop` are left out with their values, and those of `folders` have DIR for theirs:
    where files lie here is nobody else's matter.
    """
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, _ = word.partition("=")
        # Any beginning of a flag that no other has is the flag, too.
        meant = [each for each in (*drop, *folders) if len(flag) > 2 and each.startswith(flag)]
        if not meant:
            kept.append(word)
            continue
        if not equals:
            next(words, None)
        kept += [f"{each}=DIR" for each in meant if each in folders]
    return " ".join(map(_quoted, ["python", "-m", f"ditjax.{command}", *kept]))


def _quoted(word: str) -> str:
    """For a shell; in double quotes where there are single ones, as in a grid, and nothing else."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def cores() -> list[int]:
    """The cores that this process may use; [] where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def commit() -> str:
    """Of the repository that ditjax lies in, '-dirty' where files differ; '' outside of one."""
    folder = Path(ditjax.__file__).parent
    try:
        return subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
