"""Figure 9, small: which size makes the most of equal training compute? 4 sizes, 2 seeds.

    C=experiments/small/compute.py
    python -m ditjax.sweep --config=$C --workdir=runs/small/compute --jobs=2

Every run has 2,400 training Gflops (3 x forward Gflops x images): 23,400 steps of the smallest
model, 1,570 of the largest, each with a learning rate that falls until its last step. The curves of
the scaling study do not allow this comparison: at equal compute the smaller model has finished its
schedule and the larger one has not (the paper's rate is constant). The budget sets the steps.
Two cores: 17 minutes. Expected result: docs/results.md.
"""

from ml_collections import ConfigDict

from . import scaling


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the study's recipe; 'SIZE/PATCH' selects the model that `train` trains."""
    config = scaling.get_config(arg)
    config.train.evaluate_every_steps = 250
    config.sweep.grid = (("model.size", scaling.SIZES), ("model.patch", (1,)))
    config.sweep.seeds = scaling.SEEDS
    config.sweep.budget = ("gflops", 2400)
    return config
