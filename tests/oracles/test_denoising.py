"""Our estimate of an image's noise beside scikit-image's."""

import numpy as np
import pytest

from ditjax.diffusion.denoising import estimate_noise
from tests.diffusion.test_denoising import noisy_image

restoration = pytest.importorskip("skimage.restoration")


@pytest.mark.parametrize("shape", [(11, 14, 3), (8, 8, 1), (5, 32, 1), (128, 128, 1)])
def test_the_noise_of_an_image(shape):
    image = noisy_image(shape)
    expected = restoration.estimate_sigma(image, channel_axis=-1, average_sigmas=True)
    np.testing.assert_allclose(estimate_noise(image), expected, rtol=1e-9)
