"""The provenance of a result: command, versions, devices and date."""

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
    """The record of where a result was made.

    Of the process's environment variables it has the compiler's flags alone.
    """
    device = jax.devices()[0]
    flags = {
        name.lower(): value for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if (value := _set(name))
    }
    return {
        "ditjax": ditjax.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "flax", "optax", "numpy")},
        "platform": platform.platform(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpus": len(cores()) or os.cpu_count(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **flags,
        "command": command,
    }


def _set(name: str) -> str:
    return " ".join(os.environ.get(name, "").split())


def typed(
    command: str, argv: Sequence[str], *, drop: Sequence[str] = (), folders: Sequence[str] = ()
) -> str:
    """'python -m ditjax.COMMAND ...' for a record, quoted so that a shell reads it back.

    The flags in `drop` are left out with their values. The flags in `folders` get the value DIR,
    because the folders of this machine mean nothing elsewhere.
    """
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, _ = word.partition("=")
        # argparse accepts an unambiguous prefix of a flag.
        meant = [each for each in (*drop, *folders) if len(flag) > 2 and each.startswith(flag)]
        if not meant:
            kept.append(word)
            continue
        if not equals:
            next(words, None)
        kept += [f"{each}=DIR" for each in meant if each in folders]
    return " ".join(map(_quoted, ["python", "-m", f"ditjax.{command}", *kept]))


def _quoted(word: str) -> str:
    """Quoted for a shell: in double quotes if that spares the single quotes of a grid."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def cores() -> list[int]:
    """The CPU cores that this process may use; [] if the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def commit() -> str:
    """The commit of ditjax's repository, with '-dirty' if files differ; '' outside a repository."""
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
