"""These tests want PyTorch: `bash launch/test.sh --oracles` installs it and runs them alone."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collected only where this folder is asked for by name."""
    asked = any("oracles" in argument for argument in config.args)
    return None if asked else True
