"""unCLIP, small: vectors of the CLIP of 32x32 caption scenes drawn from captions, and decoded.

    ditjax train --config=small/clip --workdir=runs/small/clip
    ditjax train --config=small/unclip --workdir=runs/small/unclip
    ditjax evaluate --workdir=runs/small/unclip
    ditjax train --config=small/unclip:x0 --workdir=runs/small/unclip_x0
    ditjax evaluate --workdir=runs/small/unclip_x0
    ditjax train --config=small/unclip:decoder --workdir=runs/small/unclip_decoder
    ditjax evaluate --workdir=runs/small/unclip_decoder
    ditjax evaluate --workdir=runs/small/unclip_decoder --config.unclip.candidates=1
    ditjax evaluate --workdir=runs/small/unclip_decoder --config.unclip.source=text
    ditjax evaluate --workdir=runs/small/unclip_decoder --config.unclip.source=none
    ditjax evaluate --workdir=runs/small/unclip_decoder --config.unclip.source=image
    ditjax evaluate --workdir=runs/small/unclip_decoder --config.unclip.source=other

It asks whether drawn vectors have the mean, the spread and the distribution of real ones. The
baselines are a ridge regression of the image's vector by the caption's, and the caption's vector
itself: the prior should have a mean as near as the regression's, a calibration gap below .03, and a
smaller energy distance than both. The prior is the velocity of a flow: where there is little noise,
a vector is the noisy one plus a little. 'x0' is the paper's prior, the same network whose output is
the vector itself.

Of the decoder it asks whether images of captions, through the prior, show what these say more often
than by the caption's own vector or by no vector (the paper's Fig. 8), on test and test_heldout. The
image's own vector is the most that a prior can give; the vector of another image, whose record the
caption does not tell of, is the baseline that shows how much the caption alone decides.
Hardware, time and the result: docs/unclip.md, "A small study".
"""

from ml_collections import ConfigDict

from ..base import UNIFORM_FLOW
from . import text2image


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe of the prior, of the paper's prior, 'x0', or of the 'decoder'."""
    if arg == "decoder":
        return decoder()
    config = prior()
    if arg == "x0":
        config.diffusion = ConfigDict({"prediction": "x0", "schedule": "cosine", "loss": "simple"})
        config.diffusion.update(variance="fixed_small")
        config.sample = ConfigDict({"steps": "64"})
    return config


def decoder() -> ConfigDict:
    """The recipe of small/text2image, with vectors that samples are given by the prior."""
    config = text2image.get_config()
    del config.sweep
    config.task = "unclip"
    config.model.update(vector_tokens=4, label_dropout=0.5)
    config.unclip = ConfigDict({"clip": "runs/small/clip", "width": 64})
    config.unclip.update(source="prior", prior="runs/small/unclip")
    config.train.update(steps=8000, sample_every_steps=2000)
    return config


def prior() -> ConfigDict:
    """The recipe of the prior."""
    config = ConfigDict({"task": "prior"})
    config.model = ConfigDict({"size": "3x128x4"})
    config.text = ConfigDict({"tokens": 12})
    config.prior = ConfigDict({"clip": "runs/small/clip"})
    config.data = ConfigDict({"name": "caption_scenes", "image_size": 32, "num_classes": 10})
    config.data.update(flip=False, threads=1)
    config.diffusion = ConfigDict(UNIFORM_FLOW)
    config.optim = ConfigDict({"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 100})
    config.train = ConfigDict({"steps": 3000, "batch_size": 128, "ema_decay": 0.999})
    config.train.update(log_every_steps=200, checkpoint_every_steps=1000, keep_checkpoints=1)
    config.train.update(sample_every_steps=0)
    config.sample = ConfigDict({"sampler": "heun", "steps": "32"})
    # All 2,000 scenes, 16 vectors each, take four times as long.
    config.prior.samples = 8
    config.evaluate = ConfigDict({"split": "test[:1000]"})
    return config
