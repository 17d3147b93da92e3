"""unCLIP's prior, small: vectors of the CLIP of 16x16 caption scenes, drawn from captions.

    ditjax train --config=small/clip --workdir=runs/small/clip
    ditjax train --config=small/unclip --workdir=runs/small/unclip
    ditjax evaluate --workdir=runs/small/unclip

It asks whether drawn vectors have the mean, the spread and the distribution of real ones. The
baselines are a ridge regression of the image's vector by the caption's, and the caption's vector
itself: the prior should have a mean as near as the regression's, a calibration gap below .03, and a
smaller energy distance than both.
Hardware, time and the result: docs/unclip.md, "A small study".
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe."""
    config = ConfigDict({"task": "prior"})
    config.model = ConfigDict({"size": "3x128x4"})
    config.text = ConfigDict({"tokens": 12})
    config.prior = ConfigDict({"clip": "runs/small/clip"})
    config.data = ConfigDict({"name": "caption_scenes", "image_size": 16, "num_classes": 10})
    config.data.update(flip=False, threads=1)
    config.diffusion = ConfigDict({"prediction": "x0", "schedule": "cosine", "loss": "simple"})
    config.diffusion.update(variance="fixed_small")
    config.optim = ConfigDict({"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 100})
    config.train = ConfigDict({"steps": 3000, "batch_size": 128, "ema_decay": 0.999})
    config.train.update(log_every_steps=200, checkpoint_every_steps=1000, keep_checkpoints=1)
    config.train.update(sample_every_steps=0)
    config.sample = ConfigDict({"steps": "64"})
    config.evaluate = ConfigDict({"split": "test"})
    return config
