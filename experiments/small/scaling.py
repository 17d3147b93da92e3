"""Figures 6 to 9, small: 4 sizes x 3 patch sizes x 2 seeds on real digits, measured on the way.

    C=experiments/small/scaling.py
    python -m ditjax.sweep --config=$C --workdir=runs/small/scaling --jobs=2

Asks whether bigger models and smaller patches are better, what Gflops and parameters predict, and
who uses training compute best: validation loss and FD-digits every 500 steps are the curves. The
rate falls along a cosine to 4,000 steps (a constant one ends at FD-digits 26 to 30 where it ends at
19), so a point on the way is of a run that was not to end there, the same for every model.
Two cores: 23 minutes; the same command again goes on. Expected result: see README.
"""

from ml_collections import ConfigDict

from .. import digits

SIZES = ("2x32x2", "3x48x2", "4x64x2", "4x96x3")
PATCHES = (4, 2, 1)
SEEDS = (0, 1)


def get_config(arg: str | None = None) -> ConfigDict:
    """The study's recipe; 'SIZE/PATCH' picks the model that `train` alone would train."""
    config = digits.get_config(arg or f"{SIZES[-1]}/{PATCHES[-1]}")
    config.train.evaluate_every_steps = 500
    config.sweep.grid = (("model.size", SIZES), ("model.patch", PATCHES), ("seed", SEEDS))
    return config
