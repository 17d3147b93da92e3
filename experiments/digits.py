"""Gflops against FD-digits: 3 sizes x 3 patch sizes on 1,438 handwritten digits of 8x8 pixels.

    python -m ditjax.sweep --config=experiments/digits.py --workdir=runs/digits --jobs=2
    python -m ditjax.train --config=experiments/digits.py:4x96x3/1 --workdir=runs/one

Hardware, hours and expected result: docs/results.md, "The demo".
"""

from ml_collections import ConfigDict

from . import base

SIZES = ("2x32x2", "3x64x2", "4x96x3")
PATCHES = (4, 2, 1)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the sweep's recipe; 'SIZE/PATCH' selects the model that `train` trains."""
    config = base.get_config(arg or f"{SIZES[-1]}/{PATCHES[-1]}")
    config.model.unroll = 64  # no loop over blocks: faster on CPUs
    config.data.name = "digits"
    config.data.image_size = 8
    config.data.channels = 1
    config.data.num_classes = 10
    config.data.flip = False
    config.data.threads = 1
    config.autoencoder.kind = "none"
    # Not the paper's constant 1e-4: 4,000 steps of 16 digits replace its 400,000 steps.
    config.optim.learning_rate = 5e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.optim.b2 = 0.99
    config.train.steps = 4000
    config.train.batch_size = 16
    config.train.ema_decay = 0.995
    config.train.log_every_steps = 200
    config.train.checkpoint_every_steps = 2000
    config.train.keep_checkpoints = 1
    config.train.sample_every_steps = 0
    config.train.evaluate_every_steps = 2000
    config.train.evaluate_num = 250  # one batch; a smaller set gives higher distances
    config.sample.sampler = "ddim"
    config.sample.steps = "ddim25"
    config.sample.eta = 1.0
    config.sample.cfg_channels = "all"
    config.sample.clip_x0 = True
    config.sample.batch_size = 250
    config.sample.num = 100
    config.evaluate.split = "test"
    config.evaluate.features = "digits"
    config.evaluate.num_samples = 1000
    config.evaluate.guided_scale = 2.0
    config.evaluate.guided_num = 200
    config.evaluate.val_loss_num = 1000
    config.sweep.grid = (("model.size", SIZES), ("model.patch", PATCHES))
    return config
