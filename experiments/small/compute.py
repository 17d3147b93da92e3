"""Figure 9, small: who makes the most of the same training compute? 4 sizes, 2 seeds.

    C=experiments/small/compute.py
    python -m ditjax.sweep --config=$C --workdir=runs/small/compute --jobs=2

Every run has 2,400 training Gflops (3 x forward Gflops x images), whatever its size: 23,400 steps
of the smallest, 1,570 of the largest, each with a rate that falls to its own end. On the curves of
the scaling study the smaller model is at its end where the larger is still on the way, which is no
fair comparison; the paper's rate is constant. Steps are what the budget makes of them.
Two cores: 17 minutes. Expected result: see README.
"""

from ml_collections import ConfigDict

from . import scaling


def get_config(arg: str | None = None) -> ConfigDict:
    """The study's recipe; 'SIZE/PATCH' picks the model that `train` alone would train."""
    config = scaling.get_config(arg)
    config.train.evaluate_every_steps = 250
    config.sweep.grid = (("model.size", scaling.SIZES), ("model.patch", (1,)))
    config.sweep.seeds = scaling.SEEDS
    config.sweep.budget = ("gflops", 2400)
    return config
