"""Layers of a language model in a class-conditional DiT of digits: do frozen blocks help images?

    ditjax sweep --config=small/language --workdir=runs/small/language/arms --jobs=2
    ditjax sweep --config=small/language:cost --workdir=runs/small/language/cost --jobs=2
    ditjax report --runs=runs/small/language/arms

The arms of `small/nowcast`, at equal steps, or with `:cost` at equal training Gflops, where the
plain network trains longer. Weights of MiniLM and SmolLM2 are expected in weights/
(docs/nowcasting.md). Two cores: an hour each for three seeds, estimated. **Not run yet**.
"""

from ml_collections import ConfigDict

from .. import digits
from .nowcast import LANGUAGE_ARMS, REPLACING

ARMS = (*LANGUAGE_ARMS, REPLACING)
BUDGET = 9_000.0  # Gflops of training: 1,500 steps of 32 with frozen layers of MiniLM


def get_config(which: str = "arms") -> ConfigDict:
    """Return the recipe 'arms' or 'cost'."""
    config = digits.get_config("4x64x4/2")
    config.train.batch_size = 32
    config.train.steps = 1_500
    config.train.checkpoint_every_steps = 500
    config.train.evaluate_every_steps = 0
    config.evaluate.num_samples = 2_000
    config.evaluate.val_loss_num = 1_436
    config.sweep.grid = ()
    config.sweep.lists = ARMS
    if which == "cost":
        config.sweep.budget = ("gflops", BUDGET)
    config.sweep.seeds = (0, 1, 2)
    config.sweep.title = "Layers of a language model in a DiT of digits"
    return config
