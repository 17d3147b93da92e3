"""Patterns of attention over space and time on moving digits, at equal training Gflops.

    ditjax sweep --config=small/video --workdir=runs/small/video --jobs=2
    ditjax sample --workdir=runs/small/video/runs/RUN --num=10

Clips of 8 frames of 16x16 pixels, patch 4: 8 x 16 tokens. The last arm has as many spatial blocks
as the others have blocks. Every arm trains for BUDGET Gflops; a dearer one takes fewer steps.
One core: half an hour. The result: docs/video.md, "Patterns at equal cost".
"""

from ml_collections import ConfigDict

from .. import digits
from ..base import FLOW

SIZE, TWICE = "4x64x2", "8x64x2"
BUDGET = 2_400.0  # of training: about 1,900 steps of `spatial`
ARMS = (
    (("model.video", "spatial"), ("model.size", SIZE)),
    (("model.video", "alternate"), ("model.size", SIZE)),
    (("model.video", "late"), ("model.size", SIZE)),
    (("model.video", "divided"), ("model.size", SIZE)),
    (("model.video", "joint"), ("model.size", SIZE)),
    (("model.video", "alternate"), ("model.size", TWICE)),
)


def get_config() -> ConfigDict:
    """Return the study's recipe."""
    config = digits.get_config(f"{SIZE}/4")
    config.model.kind = "video"
    config.data.name = "moving_digits"
    config.data.image_size = 16
    config.data.frames = 8
    config.diffusion = {**FLOW, "prediction": "x0"}
    config.optim.learning_rate = 2e-3
    config.train.checkpoint_every_steps = 500
    config.train.evaluate_every_steps = 0
    config.sample.sampler = "heun"
    config.sample.steps = "20"
    config.sample.eta = 0.0
    config.sample.num = 20
    config.sample.batch_size = 64
    config.evaluate.features = "clips"
    config.evaluate.num_samples = 256
    config.evaluate.guided_scale = 0.0
    config.evaluate.val_loss_num = 256
    config.sweep.grid = ()
    config.sweep.lists = ARMS
    config.sweep.budget = ("gflops", BUDGET)
    config.sweep.seeds = (0, 1)
    config.sweep.title = "Attention over space and time"
    return config
