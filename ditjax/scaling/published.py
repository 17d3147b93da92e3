"""Published figures that commands print beside ours, always marked as published.

Those of the DiT paper were compared with two independent transcriptions of the paper's text and
with the README of the public release on 2026-11-23: every digit agrees. The paper's other figures
belong to its recipes, in experiments/paper/published.py.
"""

# Peebles & Xie 2023 (arXiv 2212.09748), Table 4: Gflops at 256x256.
TABLE4_GFLOPS = {
    "DiT-S/8": 0.36,
    "DiT-S/4": 1.41,
    "DiT-S/2": 6.06,
    "DiT-B/8": 1.42,
    "DiT-B/4": 5.56,
    "DiT-B/2": 23.01,
    "DiT-L/8": 5.01,
    "DiT-L/4": 19.70,
    "DiT-L/2": 80.71,
    "DiT-XL/8": 7.39,
    "DiT-XL/4": 29.05,
    "DiT-XL/2": 118.64,
}

# FID-50K of repeated trainings of one recipe for 400K steps: first the paper's in JAX, then those
# of the release's README in PyTorch, with seed 42, and for B/4 with seed 100 as well.
REPEATS = {
    "DiT-XL/2": (19.47, 18.1),
    "DiT-B/4": (68.38, 68.9, 68.3),
}

# b of a loss that falls as compute^(-b), and its source. Recalled, not read again.
COMPUTE_EXPONENTS = {
    "language models, Kaplan et al. 2020": 0.050,
    "text-to-image DiTs, Liang et al. 2024": 0.0273,
}
