"""Figures 6 to 9, small: 4 sizes x 3 patch sizes x 2 seeds on digits, scored during training.

    C=experiments/small/scaling.py
    python -m ditjax.sweep --config=$C --workdir=runs/small/scaling --jobs=2

It asks whether bigger models and smaller patches are better, what Gflops and parameters predict,
and which model uses training compute best. The curves are validation loss and FD-digits every 500
steps. The learning rate falls along a cosine to 4,000 steps (a constant rate ends at FD-digits 26
to 30, the cosine at 19), so earlier points belong to unfinished schedules, equally for all models.
Two cores: 23 minutes; the same command again resumes. Expected result: docs/results.md.
"""

from ml_collections import ConfigDict

from .. import digits

SIZES = ("2x32x2", "3x48x2", "4x64x2", "4x96x3")
PATCHES = (4, 2, 1)
SEEDS = (0, 1)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the study's recipe; 'SIZE/PATCH' selects the model that `train` trains."""
    config = digits.get_config(arg or f"{SIZES[-1]}/{PATCHES[-1]}")
    config.train.evaluate_every_steps = 500
    config.sweep.grid = (("model.size", SIZES), ("model.patch", PATCHES), ("seed", SEEDS))
    return config
