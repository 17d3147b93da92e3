"""Layers of a language model in a nowcasting network, in two stages as LLMDiff, on computed rain.

    ditjax train --config=small/nowcast:first --workdir=runs/small/nowcast/first
    ditjax evaluate --workdir=runs/small/nowcast/first
    ditjax sweep --config=small/nowcast:arms --workdir=runs/small/nowcast/arms --jobs=2
    ditjax sweep --config=small/nowcast:cost --workdir=runs/small/nowcast/cost --jobs=2
    ditjax report --runs=runs/small/nowcast/arms

Clips of 8 frames of 32x32 pixels: 4 are seen, 4 are forecast. `first` is the regression of stage
one, `arms` the ablation of stage two at equal steps, `cost` the plain network for as many training
Gflops as an arm of MiniLM; of `small/nowcast:advect:first` and so on, the rain only moves. Weights
of MiniLM are expected in weights/ (docs/nowcasting.md). One core: 12 minutes for `first`, four to
six for each of 16 runs of `arms`. The result: docs/nowcasting.md, "On rain".
"""

from ml_collections import ConfigDict

from .. import digits
from ..base import FLOW

MINILM = (("lm.path", "weights/minilm"), ("lm.layers", (2, 4)))
SMOLLM2 = (("lm.path", "weights/smollm2.gguf"), ("lm.layers", (14, 16)))
LANGUAGE_ARMS = (
    (("lm.mode", "none"),),
    (("lm.mode", "mapper"), *MINILM),
    (("lm.mode", "frozen"), *MINILM),
    (("lm.mode", "frozen"), *SMOLLM2),
    (("lm.mode", "random"), *MINILM),
    (("lm.mode", "permuted"), *MINILM),
    (("lm.mode", "unfrozen"), *MINILM),
)
REPLACING = (("lm.mode", "frozen"), *MINILM, ("lm.residual", False))
ARMS = (
    *LANGUAGE_ARMS[:3],  # without SmolLM2, which costs twice as much as MiniLM
    *LANGUAGE_ARMS[4:],
    (("lm.mode", "released"), *MINILM),
    (("lm.mode", "none"), ("given.first", "")),
)
EQUAL_COST = LANGUAGE_ARMS[:1]  # the arms of MiniLM cost that much in 1,500 steps
BUDGET = 7_542.0  # Gflops of training: what 1,500 steps of the frozen arm cost
FIRST = "runs/small/nowcast/first"


def _base(advect: bool) -> ConfigDict:
    config = digits.get_config("4x64x2/4")
    config.model = {
        "kind": "cuboid",
        "units": 64,
        "heads": 4,
        "depths": (1, 1),
        "stem_factors": (4, 2),
        "stem_widths": (16, 32),
        "label_dropout": 0.0,
    }
    config.data.name = "radar/4000-advect" if advect else "radar/4000"
    config.data.image_size = 32
    config.data.frames = 8
    config.data.num_classes = 1
    config.given = {"kind": "past", "past": 4}
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 50
    config.optim.clip_norm = 1.0
    config.train.batch_size = 8
    config.train.steps = 1_500
    config.train.checkpoint_every_steps = 500
    config.train.evaluate_every_steps = 0
    config.train.sample_every_steps = 0
    config.train.ema_decay = 0.99
    config.sample.num = 20
    config.sample.batch_size = 48
    config.evaluate.split = "test[:48]"
    config.evaluate.features = "rain"
    config.evaluate.guided_scale = 0.0
    config.evaluate.val_loss_num = 400
    config.sweep.grid = ()
    return config


def get_config(which: str = "arms") -> ConfigDict:
    """Return the recipe 'first', 'arms' or 'cost', of rain that only moves after 'advect:'."""
    set_, _, stage = which.rpartition(":")
    config = _base(set_ == "advect")
    if stage == "first":
        config.diffusion = {
            "loss": "regression",
            "prediction": "x0",
            "variance": "fixed_small",
        }
        config.sample.sampler = "regression"
        config.train.steps = 6_000
        config.evaluate.num_samples = 48
        return config
    # Of the data, not the velocity: after 400 steps that drew no rain.
    config.diffusion = {**FLOW, "prediction": "x0"}
    config.given.first = FIRST + ("_advect" if set_ == "advect" else "")
    config.sample.sampler = "heun"
    config.sample.steps = "5"
    config.sample.eta = 0.0
    config.evaluate.num_samples = 192  # 4 members of each record
    config.sweep.lists = EQUAL_COST if stage == "cost" else ARMS
    if stage == "cost":
        config.sweep.budget = ("gflops", BUDGET)
    config.sweep.seeds = (0, 1)
    config.sweep.title = "Layers of a language model in a nowcasting network"
    return config
