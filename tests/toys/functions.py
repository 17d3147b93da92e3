"""A sampler, an objective, and features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditjax.diffusion import losses, samplers
from ditjax.diffusion.gaussian import Denoise
from ditjax.diffusion.schedule import Schedule
from ditjax.evaluation.features import Extractor, ImageFeatures


def twice(
    denoise: Denoise, schedule: Schedule, x_T: jax.Array, noise: samplers.Noise, **settings: Any
) -> jax.Array:
    """DDIM, and DDIM again from its result: nobody needs it."""
    x = samplers.ddim(denoise, schedule, x_T, noise, **settings)
    return samplers.ddim(denoise, schedule, x, noise, **settings)


def absolute(
    objective: losses.Objective, denoise: Denoise, x0: jax.Array, t: jax.Array, eps: jax.Array
) -> dict[str, jax.Array]:
    """L_simple, and the mean of |ε - ε̂| that it is the square of, roughly."""
    parts = losses.simple_loss(objective, denoise, x0, t, eps)
    return {**parts, "root": jnp.sqrt(parts["mse"])}


def halves(mesh: Mesh, batch_size: int) -> Extractor:
    """The means of an image's halves: the toy data set's two classes, seen."""

    def extract(images: np.ndarray) -> ImageFeatures:
        x = images.astype(np.float32).mean(3) / np.float32(255)
        pool = np.stack([x[:, :, :4].mean((1, 2)), x[:, :, 4:].mean((1, 2))], 1)
        return ImageFeatures(pool, None, pool)

    record = {"features": "means of halves", "features_sha256": "of no file"}
    return Extractor("halves", extract, batch_size or 32, record, side=8, family="halves")
