"""Representation alignment, small: one flow on digits, aligned to four teachers and to none.

    ditjax sweep --config=small/align --workdir=runs/small/align --jobs=2

It asks whether REPA's loss lowers the validation loss of the denoiser, and whether a trained
teacher does more than the same network with random weights. The runs of one seed begin with the
same weights and see the same data, so their losses are compared in pairs.
Hardware, hours and the result: docs/representations.md, "A small study".
"""

from ml_collections import ConfigDict

from . import process

_MIXER = (("model.align_block", 1), ("model.align_width", 128), ("model.align_features", 48))
_SELF = (*_MIXER[:2], ("model.align_features", 64))
ARMS = (
    (),
    (("align.teacher", "digits_mixer"), *_MIXER),
    (("align.teacher", "random"), *_MIXER),
    (("align.teacher", "self"), ("align.teacher_block", 2), *_SELF),
)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the study's recipe."""
    config = process.get_config(arg)
    config.train.evaluate_every_steps = 500
    config.train.evaluate_num = 50
    config.sweep.lists = ARMS
    config.sweep.seeds = (0, 1, 2)
    config.sweep.title = "Representation alignment on digits"
    return config
