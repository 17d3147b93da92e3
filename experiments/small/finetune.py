"""Fine-tuning, small: five new digits for a DiT that knows 0 to 4, against training from scratch.

    ditjax train --config=small/finetune:base --workdir=runs/small/finetune_base
    ditjax sweep --config=small/finetune --workdir=runs/small/finetune
    ditjax train --config=small/finetune:16 --workdir=runs/small/finetune_16
    ditjax sweep --config=small/finetune:32 --workdir=runs/small/finetune_32

It asks how many steps each arm needs to the validation loss that scratch ends with, and what a
LoRA gives up against all weights. All arms have the same steps, data and learning rate. The base
is at BASE; LoRA trains the label table beside its factors, which it cannot reach otherwise.

'32' asks the same of another size: digit scenes of 32x32 pixels, from scratch and from a network of
16x16 (SMALLER), whose positions go on beyond the base's, or are interpolated.
Hardware, time and the result: docs/finetuning.md, "A small study".
"""

from ml_collections import ConfigDict

from .. import digits
from . import scenes

BASE = "runs/small/finetune_base"
SMALLER = "runs/small/finetune_16"
_FROM = (("adapt.base", BASE), ("adapt.classes", (0, 1, 2, 3, 4, -1, -1, -1, -1, -1)))
_LABELS = ("adapt.train", "y_embedder")
_LORA = (*_FROM, ("adapt.kind", "lora"), _LABELS)
ARMS = (
    (),  # from scratch
    _FROM,  # all weights
    (*_FROM, ("adapt.kind", "partial"), _LABELS),
    (*_LORA, ("adapt.rank", 2), ("adapt.alpha", 4.0)),
    (*_LORA, ("adapt.rank", 8)),
)
_LARGER = ("adapt.base", SMALLER)
SIZES = (
    (),  # from scratch
    (_LARGER,),  # positions beyond the base's
    (_LARGER, ("model.position_grid", 4)),  # between the base's
)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the study's recipe; 'base' and '16' are those of bases, '32' of its other half."""
    if arg in ("16", "32"):
        return of_scenes(int(arg))
    config = digits.get_config("3x64x2/2")
    config.sweep.grid = ()
    if arg == "base":
        config.data.name = "ditjax.data.builders.FirstDigits"
        config.data.num_classes = 5
        config.train.steps = 2000
        config.train.evaluate_every_steps = 0
        return config
    config.optim.learning_rate = 2e-3
    config.train.steps = 1000
    config.train.checkpoint_every_steps = 500
    config.train.evaluate_every_steps = 100
    config.train.ema_decay = 0.98
    config.evaluate.guided_scale = 0.0
    config.sweep.lists = ARMS
    config.sweep.seeds = (0, 1, 2)
    config.sweep.title = "Five new digits"
    return config


def of_scenes(side: int) -> ConfigDict:
    """The recipe of digit scenes of 16x16 pixels, or of the study at 32x32."""
    config = scenes.get_config("3x64x2/4")
    config.data.image_size = side
    config.evaluate.guided_scale = 0.0
    config.sweep.grid = ()
    config.train.steps = 2000
    config.train.evaluate_every_steps = 0
    if side == 16:
        return config
    config.train.steps = 1000
    config.train.checkpoint_every_steps = 500
    config.train.evaluate_every_steps = 100
    config.train.evaluate_num = 50  # what is read along training is the validation loss
    config.train.ema_decay = 0.98
    config.sweep.lists = SIZES
    config.sweep.seeds = (0, 1, 2)
    config.sweep.title = "From 16x16 to 32x32 pixels"
    return config
