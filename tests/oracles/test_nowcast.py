"""Scores of forecasts beside pysteps' and scikit-image's, on fields that are not in the goldens."""

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from ditjax.data.radar import radar_clip
from ditjax.metrics import nowcast
from ditjax.metrics.restoration import ssim
from tests.oracles import nowcast as oracle


@pytest.fixture(scope="module")
def rain() -> tuple[np.ndarray, np.ndarray]:
    """A persistence forecast and the truth u8[20,6,32,32]."""
    clips = np.stack([radar_clip(7, "test", i) for i in range(20)])
    return np.repeat(clips[:, 6:7], 6, axis=1), clips[:, 7:]


@pytest.mark.parametrize("threshold", nowcast.SEVIR_THRESHOLDS)
def test_contingency_scores(rain, threshold):
    table = nowcast.contingency(rain[0], rain[1], (threshold,))
    ours = (
        nowcast.critical_success(table),
        nowcast.detection(table),
        nowcast.false_alarm_ratio(table),
        nowcast.frequency_bias(table),
    )
    theirs = oracle.contingency_scores(rain[0], rain[1], threshold)
    np.testing.assert_array_equal(np.concatenate(ours), theirs)


def test_crps_where_nothing_is_equal(rain):
    forecast, truth = (each.astype(np.float64) for each in rain)
    rng = np.random.default_rng(0)
    members = forecast + rng.normal(0, 9, (5, *truth.shape))
    ours = nowcast.crps(members, truth).mean()
    np.testing.assert_allclose(ours, oracle.crps(members, truth), rtol=1e-12)


def test_crps_of_dry_fields_differs_where_pysteps_drops_an_interval(rain):
    """Until everything is moved by less than a billionth."""
    truth = rain[1].astype(np.float64)
    rng = np.random.default_rng(0)
    members = np.maximum(truth + rng.normal(0, 9, (5, *truth.shape)), 0)
    ours, theirs = nowcast.crps(members, truth).mean(), oracle.crps(members, truth)
    assert abs(ours - theirs) > 0.01
    moved = [x + rng.uniform(0, 1e-9, x.shape) for x in (members, truth)]
    np.testing.assert_allclose(oracle.crps(*moved), ours, rtol=1e-8)


def test_ssim_of_frames(rain):
    found, truth = (each.reshape(-1, 32, 32, 1) for each in rain)
    theirs = [
        structural_similarity(
            *(a, b), data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(found[..., 0], truth[..., 0], strict=True)
    ]
    # Theirs is the mean over the picture without a rim of 5 pixels, as ours.
    np.testing.assert_allclose(ssim(found, truth, 255.0), theirs, atol=1e-6)
