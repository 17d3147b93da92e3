"""Averages, small: FD-digits against the width of the average, all from one run for each schedule.

    ditjax sweep --config=small/averages --workdir=runs/small/averages --jobs=2
    ditjax grid --workdir=runs/small/averages --out=runs/small/averages/widths \\
      --weights=model,power:0.025,power:0.04,power:0.05,power:0.075,power:0.1,power:0.15,power:0.2,power:0.25

A run keeps two power-function averages and 16 snapshots of them; other widths are made of these.
It asks which width is best, and whether a rate that decays to 0 leaves anything to average.
The grid is not run; docs/training.md, "Averages of other widths", has what was measured.
"""

from ml_collections import ConfigDict

from .. import digits


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the study's recipe."""
    config = digits.get_config(arg or "3x64x2/2")
    config.optim.learning_rate = 2e-3
    config.train.average_stds = (0.05, 0.1)
    config.train.average_every_steps = 250
    config.train.evaluate_every_steps = 0
    config.evaluate.guided_scale = 0.0
    config.sweep.grid = (("optim.schedule", ("constant", "cosine")),)
    config.sweep.title = "Averages on digits"
    return config
