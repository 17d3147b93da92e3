"""Rewards, small: a digit that a classifier recognises, for a DiT that was trained a little.

    ditjax train --config=small/rewards:base --workdir=runs/small/rewards_base
    ditjax sweep --config=small/rewards --workdir=runs/small/rewards

The reward is the log-probability of the asked class by one classifier, and everything that is
reported is measured by another, which no arm has seen. It asks what DDPO, with DPOK's penalty or
with LoRA, and Diffusion-DPO gain over as many updates, and over as much computation, of the loss
that trained the base. The base is at BASE.
Hardware, time and the result: docs/rewards.md, "A small study".
"""

from ml_collections import ConfigDict

from .. import digits

BASE = "runs/small/rewards_base"
_DDPO = (
    ("reward.method", "ddpo"),
    ("reward.group", 16),
    ("reward.updates", 4),
    ("reward.clip", 1e-3),
)
ARMS = (
    (),  # as many updates of the supervised loss
    (("train.steps", 2650),),  # as much computation
    _DDPO,
    (*_DDPO, ("reward.kl", 0.1)),
    (*_DDPO, ("adapt.kind", "lora"), ("optim.learning_rate", 3e-3)),
    (("reward.method", "dpo"),),
)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the study's recipe; 'base' is the recipe of its base."""
    config = digits.get_config("2x32x2/2")
    config.sweep.grid = ()
    config.evaluate.guided_scale = 0.0
    if arg == "base":
        config.train.steps = 2000
        config.train.evaluate_every_steps = 0
        return config
    config.adapt = {"base": BASE}
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "constant"
    config.optim.warmup_steps = 0
    config.optim.clip_norm = 1.0
    config.train.steps = 200
    config.train.batch_size = 80
    config.train.ema_decay = 0.9
    config.train.log_every_steps = 4
    config.train.checkpoint_every_steps = 50
    config.train.evaluate_every_steps = 0
    config.sample.steps = "ddim10"
    config.evaluate.val_loss_num = 0
    config.evaluate.features = "ditjax.evaluation.features.mixer_extractor"
    config.sweep.lists = ARMS
    config.sweep.seeds = (0, 1, 2)
    config.sweep.title = "A reward on digits"
    return config
