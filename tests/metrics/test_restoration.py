"""PSNR and SSIM are scikit-image's."""

import numpy as np
import pytest

from ditjax.metrics.restoration import psnr, ssim
from tests.seeded import seeded_images

# scikit-image 0.26.0: structural_similarity(gaussian_weights=True, sigma=1.5,
# use_sample_covariance=False, data_range=1, channel_axis=-1) and peak_signal_noise_ratio.
GOLDEN = {
    (2, 11, 16, 1): (
        [0.9544513207219002, 0.9253101537232181],
        [22.84960149301099, 21.91567720886902],
    ),
    (2, 32, 32, 3): (
        [0.9153130928525243, 0.9311143267578931],
        [22.42964787152179, 22.49235568982911],
    ),
}


@pytest.mark.parametrize("shape", GOLDEN)
def test_they_are_scikit_images(shape):
    truth = seeded_images(shape, 1)
    noise = np.random.default_rng(2).normal(0, 20, shape)
    found = np.clip(truth + noise, 0, 255).astype(np.uint8)
    similar, decibels = GOLDEN[shape]
    np.testing.assert_allclose(ssim(found / 255, truth / 255, 1.0), similar, rtol=1e-9)
    np.testing.assert_allclose(psnr(found, truth, 255), decibels, rtol=1e-12)


def test_the_same_image():
    truth = seeded_images((1, 12, 12, 1), 3)
    assert psnr(truth, truth, 255) == [np.inf]
    assert ssim(truth, truth, 255) == pytest.approx([1.0])
