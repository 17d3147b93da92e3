"""A control branch, small: which pixels of a digit are ink, for a DiT that is frozen.

    ditjax train --config=small/control:base --workdir=runs/small/control_base
    ditjax sweep --config=small/control --workdir=runs/small/control
    ditjax grid --workdir=runs/small/control/runs/RUN --cfg_scale=0,1 --out=with
    ditjax grid --workdir=runs/small/control/runs/RUN --cfg_scale=0,1 --out=without \
      --config.control.scale=0

It asks whether samples follow the mask of a held-out digit, and whether the mask alone, without a
label (cfg_scale 0), shows which digit is meant. The grid without control is the baseline with the
right label; `control_f1_shuffled` is that of another digit's mask. The base is at BASE.
Hardware, time and the result: docs/control.md, "A small study".
"""

from ml_collections import ConfigDict

from .. import digits

BASE = "runs/small/control_base"
ARMS = ((("control.form", "sd3"),), (("control.form", "pixart"),))


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the study's recipe; 'base' is the recipe of its base."""
    config = digits.get_config("3x64x2/2")
    config.sweep.grid = ()
    config.evaluate.guided_scale = 0.0
    if arg == "base":
        config.train.steps = 2000
        config.train.evaluate_every_steps = 0
        return config
    config.adapt = {"base": BASE, "kind": "control"}
    config.control = {"blocks": 2, "source": "ink"}
    config.optim.learning_rate = 2e-3
    config.train.steps = 1000
    config.train.checkpoint_every_steps = 500
    config.train.evaluate_every_steps = 250
    config.train.evaluate_num = 50
    config.train.ema_decay = 0.98
    config.evaluate.val_loss_num = 200
    config.sweep.lists = ARMS
    config.sweep.seeds = (0, 1)
    config.sweep.title = "Ink as a control"
    return config
