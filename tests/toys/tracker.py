"""A tracker that keeps what it is given, for tests that name it in a recipe."""

from typing import Any

import numpy as np

from ditjax.runs.trackers import TrackedRun

OPENED: list["Kept"] = []


class Kept:
    """Rows (step, values), pictures (step, name, shape), and whether it was closed."""

    def __init__(self, run: TrackedRun) -> None:
        self.run, self.closed = run, False
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.pictures: list[tuple[int, str, tuple[int, ...]]] = []
        OPENED.append(self)

    def scalars(self, step: int, values: Any) -> None:
        self.rows.append((step, dict(values)))

    def image(self, step: int, name: str, grid: np.ndarray) -> None:
        self.pictures.append((step, name, grid.shape))

    def close(self) -> None:
        self.closed = True
