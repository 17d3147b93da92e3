"""How well samples follow their control images: the map of a sample beside the one asked for."""

from typing import Any

import jax
import numpy as np

from ditjax.config import Config
from ditjax.data.crop import normalize
from ditjax.data.records import HostBatch
from ditjax.metrics.scores import mask_f1
from ditjax.sampling.controls import Controls
from ditjax.sampling.program import sampling_of
from ditjax.tasks import make_task
from ditjax.training import keys


class ControlScores:
    """Scores of samples that are added in order, from sample 0 on.

    The map of each sample is computed as those that it was controlled by (`data/maps.py`).
    `control_f1` is the F1 of its pixels above 0 against the map asked for, `control_f1_shuffled`
    against that of the next sample, and `control_error` the mean squared difference.
    """

    def __init__(self, c: Config, controls: Controls, seed: int) -> None:
        maps_of = sampling_of(c, make_task(c)).control
        assert maps_of is not None

        def maps(images: jax.Array, indices: jax.Array) -> jax.Array:
            key = keys.stream(seed, keys.CONTROL)
            return maps_of(images, jax.vmap(jax.random.fold_in, (None, 0))(key, indices))

        self._maps, self._rows = jax.jit(maps), controls.rows
        self._parts: list[dict[str, np.ndarray]] = []
        self._start = 0

    def add(self, images: np.ndarray) -> None:
        """Score the next samples, u8[B,H,W,C]."""
        indices = np.arange(self._start, self._start + len(images), dtype=np.uint32)
        self._start += len(images)
        found = np.asarray(self._maps(normalize(images), indices))
        asked, other = (self._asked(each) for each in (indices, indices + np.uint32(1)))
        error = np.square(found - asked).reshape(len(images), -1).mean(1)
        self._parts.append(
            {
                "control_f1": mask_f1(found > 0, asked > 0),
                "control_f1_shuffled": mask_f1(found > 0, other > 0),
                "control_error": error.astype(np.float64),
            }
        )

    def _asked(self, indices: np.ndarray) -> np.ndarray:
        rows: HostBatch = self._rows(indices.astype(np.int64))
        return np.asarray(self._maps(rows["image"], indices))

    def means(self) -> dict[str, float]:
        """The mean of each score over all samples."""
        parts: Any = self._parts
        return {name: float(np.concatenate([p[name] for p in parts]).mean()) for name in parts[0]}
