"""Makes tests/goldens/*.npz again: python -m tests.oracles.make_goldens [NAME ...]

Each file holds a module's `goldens()` and, under "versions", the packages that computed it.
"""

import importlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

NAMES = (
    "adapters",
    "dinov2",
    "dvae",
    "inception",
    "language",
    "latte_text",
    "networks",
    "nowcast",
    "pixart",
    "prior",
    "samplers",
    "scores",
    "solvers",
    "text",
    "torch_file",
    "unet",
)
FOLDER = Path(__file__).parent.parent / "goldens"


def main(names: list[str]) -> None:
    """The files of the named modules, or of all."""
    for name in names or NAMES:
        module = importlib.import_module(f"tests.oracles.{name}")
        versions = {package: version(package) for package in module.PACKAGES}
        path = FOLDER / f"{name}.npz"
        np.savez_compressed(path, versions=np.array(json.dumps(versions)), **module.goldens())
        print(f"{path.relative_to(FOLDER.parent.parent)}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
