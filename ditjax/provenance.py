"""Where a figure was made: the program, the versions, the devices, the day."""

import os
import platform
import subprocess
import time
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


def cores() -> list[int]:
    """The cores that this process may use; [] where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def commit() -> str:
    """Of the repository that ditjax lies in, '-dirty' where files differ; '' outside of one."""
    folder = Path(ditjax.__file__).parent
    try:
        return subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""
