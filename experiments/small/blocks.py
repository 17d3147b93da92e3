"""Figure 5, small: the four blocks at the same size, steps and data, with three seeds each.

    C=experiments/small/blocks.py
    python -m ditjax.sweep --config=$C --workdir=runs/small/blocks --jobs=2

It asks whether adaLN-Zero beats the other blocks by more than seeds differ. The Gflops differ:
cross-attention has 15 % more, in-context 9 % more (two extra tokens, of 16), adaLN 1 % less. The
learning rate was tuned for adaLN-Zero.
Two cores: 14 minutes. Expected result: docs/results.md.
"""

from ml_collections import ConfigDict

from .. import digits

BLOCKS = ("adaln_zero", "adaln", "cross_attention", "in_context")
SEEDS = (0, 1, 2)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the study's recipe; 'SIZE/PATCH' is the model that all blocks are tested in."""
    config = digits.get_config(arg or "4x96x3/2")
    config.train.evaluate_every_steps = 500
    config.sweep.grid = (("model.block", BLOCKS), ("seed", SEEDS))
    return config
