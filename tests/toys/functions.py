"""A sampler, an objective, and features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditjax.diffusion import losses, samplers, solvers
from ditjax.diffusion.gaussian import Denoise
from ditjax.evaluation.features import Extractor, ImageFeatures


def _solve_twice(
    denoise: Denoise,
    objective: losses.Objective,
    times: np.ndarray,
    x_T: jax.Array,
    noise: samplers.Noise,
    **settings: Any,
) -> jax.Array:
    """DDIM, and DDIM again from its result: nobody needs it."""
    x = solvers.general_ddim(denoise, objective, times, x_T, noise, **settings)
    return solvers.general_ddim(denoise, objective, times, x, noise, **settings)


twice = solvers.Sampler(
    _solve_twice, evaluated=lambda process, times: np.tile(times[:-1], 2), options=("eta",)
)


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


def noisy_map(image: jax.Array, key: jax.Array) -> jax.Array:
    """A control image of an image, with noise of its own."""
    return 0.5 * image + 0.5 * jax.random.uniform(key, image.shape)
