"""Layers of a language model in a class-conditional DiT of digits: do frozen blocks help images?

    ditjax sweep --config=small/language --workdir=runs/small/language/arms --jobs=2
    ditjax sweep --config=small/language:cost --workdir=runs/small/language/cost --jobs=2
    ditjax report --runs=runs/small/language/arms

Eight arms at equal steps; with `:cost` the plain network for as many training Gflops as an arm of
MiniLM. Weights of MiniLM and SmolLM2 are expected in weights/ (docs/nowcasting.md). One core, busy:
an hour, and ten minutes for `:cost`. The result: docs/nowcasting.md, "The ablation".
"""

from ml_collections import ConfigDict

from .. import digits
from .nowcast import LANGUAGE_ARMS, REPLACING

ARMS = (*LANGUAGE_ARMS, REPLACING)
EQUAL_COST = LANGUAGE_ARMS[:1]  # an arm of MiniLM costs nearly that much in its 1,500 steps
BUDGET = 4_500.0  # Gflops of training: 1,531 steps of 16 with frozen layers of MiniLM


def get_config(which: str = "arms") -> ConfigDict:
    """Return the recipe 'arms' or 'cost'."""
    config = digits.get_config("4x64x4/2")
    config.train.batch_size = 16
    config.train.steps = 1_500
    config.train.checkpoint_every_steps = 1_500
    config.train.evaluate_every_steps = 0
    config.evaluate.num_samples = 500
    config.evaluate.val_loss_num = 1_436
    config.sweep.grid = ()
    config.sweep.lists = ARMS
    if which == "cost":
        config.sweep.lists = EQUAL_COST
        config.sweep.budget = ("gflops", BUDGET)
    config.sweep.seeds = (0, 1) if which == "cost" else (0, 1, 2)
    config.sweep.title = "Layers of a language model in a DiT of digits"
    return config
