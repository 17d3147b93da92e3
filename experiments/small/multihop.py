"""Windows and hops of attention on digits, at equal training Gflops.

    ditjax sweep --config=small/multihop --workdir=runs/small/multihop --jobs=2
    ditjax sweep --config=small/multihop:scenes --workdir=runs/small/multihop_scenes --jobs=2

Five arms: attention to all tokens; to a window of radius 1; the same in four hops, so that a block
reaches four tokens; a window of radius 2; and one more block of radius 1. Every arm trains for the
same Gflops; a dearer one takes fewer steps. Digits are 64 tokens, one a pixel. All digits of a
scene are of one class, so that its 256 tokens have something to say to each other from afar.
Compare `val_loss` by pairs of seeds, and the seconds of a step beside it: hops are sequential.
One core: a quarter of an hour on digits; on scenes four hours, estimated, **not run**. The result:
docs/attention.md, "A small study".
"""

from ml_collections import ConfigDict

from .. import digits
from ..base import UNIFORM_FLOW
from . import scenes

SIZE, DEEPER = "3x64x2", "4x64x2"
BUDGETS = {"digits": 500.0, "scenes": 8_000.0}  # of training: about 930 and 2,600 steps of ()
ARMS = (
    (),
    (("model.attention_window", 1),),
    (("model.attention_window", 1), ("model.attention_hops", 4)),
    (("model.attention_window", 2),),
    (("model.attention_window", 1), ("model.size", DEEPER)),
)


def get_config(arg: str = "digits") -> ConfigDict:
    """Return the study on 'digits' or 'scenes'. Raises ValueError."""
    if arg not in BUDGETS:
        raise ValueError(f"{arg!r}: expected 'digits' or 'scenes'")
    config = digits.get_config(f"{SIZE}/1")
    if arg == "scenes":
        config = scenes.get_config(f"{SIZE}/2")
    config.diffusion.update(UNIFORM_FLOW)
    config.train.evaluate_every_steps = 0
    config.sample.sampler = "heun"
    config.sample.steps = "20"
    config.sample.eta = 0.0
    config.evaluate.guided_scale = 0.0
    config.sweep.grid = ()
    config.sweep.lists = ARMS
    config.sweep.budget = ("gflops", BUDGETS[arg])
    config.sweep.seeds = (0, 1)
    config.sweep.title = f"Windows and hops of attention: {arg}"
    return config
