"""Figure 10, small: the models of the scaling study, each sampled with 4 to 50 steps.

    S=runs/small/scaling
    python -m ditjax.sweep --config=experiments/small/scaling.py --workdir=$S --jobs=2
    RUNS=$(ls -d $S/runs/* | paste -sd,)
    python -m ditjax.grid --workdir=$RUNS --steps=ddim4,ddim10,ddim25,ddim50 --out=$S/sampling
    python -m ditjax.report --runs=$S

It asks whether more sampling compute makes up for a small model. The report finds the grid beside
the runs. The recipe is that of the scaling study.
Two cores: 9 minutes after the training. Expected result: docs/results.md.
"""

from ml_collections import ConfigDict

from . import scaling


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the scaling study's recipe."""
    return scaling.get_config(arg)
