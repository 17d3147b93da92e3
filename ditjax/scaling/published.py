"""Figures that were published elsewhere: printed as *published*, never mixed with ours.

Compared with two independent transcriptions of the paper's text and with the public release's
README on 2026-11-23: every digit the same.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """Peebles & Xie 2023, 256x256: Gflops and FID-50K at 400K steps, both of Table 4."""

    gflops: float
    fid50k_400k: float


# Table 4 of arXiv 2212.09748: 400K steps, batch 256, 250 DDPM steps, ft-MSE decoder, no guidance.
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

# FID-50K of trainings of one recipe, 400K steps: the paper's in JAX first, then the release's
# README's in PyTorch, of seed 42, and of B/4 seed 100 as well.
REPEATS = {
    "DiT-XL/2": (19.47, 18.1),
    "DiT-B/4": (68.38, 68.9, 68.3),
}
