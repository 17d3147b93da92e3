"""Resampling is Pillow's of floats, and means of pixels are means."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ditjax.diffusion.inverse import known_means
from ditjax.diffusion.resampling import resampling_matrix, resized
from ditjax.errors import UserError

RNG = np.random.default_rng(0)
PILLOW = {"area": Image.Resampling.BOX, "bicubic": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("kernel", PILLOW)
@pytest.mark.parametrize(("old", "new"), [(32, 16), (16, 32), (24, 8), (7, 21), (12, 12)])
def test_it_is_pillows(kernel, old, new):
    x = RNG.uniform(-1, 1, (2, old, old, 3)).astype(np.float32)
    expected = np.stack(
        [
            np.stack(
                [
                    np.asarray(Image.fromarray(image[..., k]).resize((new, new), PILLOW[kernel]))
                    for k in range(3)
                ],
                axis=-1,
            )
            for image in x
        ]
    )
    np.testing.assert_allclose(resized(x, new, kernel), expected, atol=2e-6)


def test_means_are_those_that_an_edit_projects_on():
    x = RNG.uniform(-1, 1, (2, 12, 12, 1)).astype(np.float32)
    low = resized(x, 4, "area")
    projected = known_means(jnp.asarray(low), 3)
    np.testing.assert_allclose(projected.project(jnp.asarray(x)), projected.image, atol=1e-6)
    np.testing.assert_allclose(resized(low, 12, "area"), projected.image, atol=1e-6)


def test_weights_sum_to_one_and_the_kernel_is_known():
    for kernel in PILLOW:
        np.testing.assert_allclose(resampling_matrix(kernel, 9, 5).sum(1), 1)
    with pytest.raises(UserError, match="kernel 'lanczos': expected one of area, bicubic"):
        resampling_matrix("lanczos", 4, 2)
