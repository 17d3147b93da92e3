"""L_simple on held-out images at fixed (t, eps): a cheap proxy of what samples are worth.

Pair i is an image of config.evaluate.split, a timestep and a noise, all from (seed, i) with the
seed of the samples: every model, however trained and at whatever step, sees the same pairs, on any
number of devices and in any batch. So what two models differ by is far surer than either value.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ditjax.config import Config
from ditjax.data import latents, stream
from ditjax.diffusion.losses import stratified_timesteps
from ditjax.metrics.uncertainty import systematic_error
from ditjax.runs import opening
from ditjax.tasks import programs


class Validator:
    """Measures DiTs that share a mesh and an autoencoder; each program compiles once."""

    def __init__(self, mesh: Mesh, frozen: Any = None) -> None:
        """`frozen` are a latent recipe's autoencoder parameters."""
        self._mesh, self._frozen = mesh, frozen
        self._programs: dict[Any, programs.Validation] = {}
        self._infos: dict[stream.DataSpec, stream.DatasetInfo] = {}
        self._kept: dict[Any, list[stream.Batch]] = {}

    def __call__(self, c: Config, params: Any) -> dict[str, float]:
        """val_loss (L_simple), of a learned variance val_vlb (bits/dim at t), their _stderr.

        Means over config.evaluate.val_loss_num pairs; {} for 0. The standard error is of other
        pairs of these images. Raises UserError for a split that is not there, or a damaged record.
        """
        n = c.evaluate.val_loss_num
        if not n:
            return {}
        program = self._program(c)
        t, parts = timesteps(c), []
        for start, images in zip(range(0, n, c.sample.batch_size), self._images(c), strict=True):
            parts.append(program(params, c.evaluate.seed, start, images, t))
        found: dict[str, float] = {}
        for name, key in (("val_loss", "mse"), ("val_vlb", "vlb")):
            if key in parts[0]:
                values = np.concatenate([part[key] for part in parts])[:n].astype(np.float64)
                error = systematic_error(values, t)
                found |= {name: float(values.mean()), f"{name}_stderr": error}
        return found

    def protocol(self, c: Config) -> dict[str, Any]:
        """What two validation losses must share to be compared; {} where there is none.

        Raises UserError as a call does, before anything is computed.
        """
        if not c.evaluate.val_loss_num:
            return {}
        d = c.diffusion
        return {
            "val_loss_num": c.evaluate.val_loss_num,
            "val_loss_data": f"{self._info(c).full_name}/{c.evaluate.split}",
            "val_loss_target": f"{d.prediction}, {d.schedule}, {d.timesteps} steps",
        }

    def _program(self, c: Config) -> programs.Validation:
        key = (c.model, c.diffusion, c.data, c.autoencoder, c.sample.batch_size)
        if key not in self._programs:
            self._programs[key] = programs.validation(c, self._mesh, self._frozen)
        return self._programs[key]

    def _info(self, c: Config) -> stream.DatasetInfo:
        spec = held_out(c)
        if spec not in self._infos:
            self._infos[spec] = stream.dataset_info(spec.name, spec.split, spec.data_dir)
        return self._infos[spec]

    def _images(self, c: Config) -> Iterator[stream.Batch]:
        """The images of the pairs; small sets stay in memory for the next time."""
        spec, size = held_out(c), c.sample.batch_size
        records = stream.records_of_step(
            c.evaluate.seed, 1, c.evaluate.val_loss_num, self._info(c).num_examples
        )
        key = (spec, size, c.evaluate.seed, len(records))
        if key in self._kept:
            return iter(self._kept[key])
        batches = stream.taken(spec, records, size)
        if 4 * len(records) * spec.image_size**2 * spec.channels > c.data.cache_mb * 2**20:
            return batches
        self._kept[key] = list(batches)
        return iter(self._kept[key])


def held_out(c: Config) -> stream.DataSpec:
    """The images that a recipe's validation loss is of: of encoded latents, those behind them.

    A damaged one is an error: a loss of others in their place would be another loss.
    """
    name = c.data.name
    if name.startswith(latents.PREFIX):
        name = latents.images_of(name).rpartition("/")[0]
    return dataclasses.replace(
        opening.data_spec(c), name=name, split=c.evaluate.split, flip=False, max_damaged=0
    )


def timesteps(c: Config) -> np.ndarray:
    """The timestep of each pair, spread evenly: i32[config.evaluate.val_loss_num]."""
    # NumPy promises never to change SeedSequence's words.
    shift = int(np.random.SeedSequence(c.evaluate.seed).generate_state(1)[0])
    indices = np.arange(c.evaluate.val_loss_num)
    return stratified_timesteps(indices, c.diffusion.timesteps, shift)
