"""Figures that were published elsewhere: printed as *published*, never mixed with ours."""

from typing import NamedTuple


class Published(NamedTuple):
    """Peebles & Xie 2023, 256x256: Gflops of Table 1 and Fig. 4's FID-50K at 400K steps."""

    gflops: float
    fid50k_400k: float


# Table 4 of arXiv 2212.09748: 400K steps, batch 256, 250 DDPM steps, no guidance.
MODELS = {
    "DiT-S/8": Published(0.36, 153.60),
    "DiT-S/4": Published(1.41, 100.41),
    "DiT-S/2": Published(6.06, 68.40),
    "DiT-B/8": Published(1.42, 122.74),
    "DiT-B/4": Published(5.56, 68.38),
    "DiT-B/2": Published(23.01, 43.47),
    "DiT-L/8": Published(5.01, 118.87),
    "DiT-L/4": Published(19.70, 45.64),
    "DiT-L/2": Published(80.71, 23.33),
    "DiT-XL/8": Published(7.39, 106.41),
    "DiT-XL/4": Published(29.05, 43.01),
    "DiT-XL/2": Published(118.64, 19.47),
}
