"""PSNR and SSIM of images beside the true ones, in float64 NumPy."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

SSIM_RADIUS, SSIM_SIGMA = 5, 1.5
SSIM_SIDE = 2 * SSIM_RADIUS + 1  # the smallest image


def psnr(found: NDArray[np.number], truth: NDArray[np.number], peak: float) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio in dB of each image [N,...] -> f64[N]; infinite for no error."""
    error = np.square(found.astype(np.float64) - truth.astype(np.float64))
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(peak**2 / error.mean(tuple(range(1, found.ndim)))))


def _blurred(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian means over 11 x 11 pixels of [N,H,W,C], where the window fits."""
    offsets = np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)
    weights = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights /= weights.sum()
    for axis in (1, 2):
        x = sliding_window_view(x, SSIM_SIDE, axis=axis) @ weights
    return x


def ssim(found: NDArray[np.number], truth: NDArray[np.number], peak: float) -> NDArray[np.float64]:
    """Wang et al. 2004: structural similarity of each image [N,H,W,C] -> f64[N], at least 11 wide.

    The authors' settings: Gaussian weights of σ = 1.5, K = (.01, .03), population covariances; the
    mean over channels and over windows that lie in the image. It is scikit-image's
    `structural_similarity` with gaussian_weights=True and use_sample_covariance=False.
    """
    x, y = found.astype(np.float64), truth.astype(np.float64)
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x = _blurred(x * x) - mean_x**2
    var_y = _blurred(y * y) - mean_y**2
    both = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    bottom = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return np.asarray((top / bottom).mean((1, 2, 3)))
