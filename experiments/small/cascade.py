"""Super-resolution, small: digit scenes from 16x16 to 32x32 pixels, and a cascade from a label.

    ditjax sweep --config=small/cascade --workdir=runs/small/cascade
    ditjax train --config=small/cascade:base --workdir=runs/small/cascade_base
    python -m tests.cascade runs/small/cascade --base=runs/small/cascade_base

It asks what a sample of super-resolution gains over a regressor of the same network, and what noise
in the low-resolution image is worth when that image is drawn, too. Arms: the regressor, a network
without noise, one with, and one with blur. 'base' draws scenes of 16x16 pixels.
Hardware, time and the result: docs/cascades.md, "A small study".
"""

from ml_collections import ConfigDict

from ..base import FLOW
from . import scenes

ARMS = (
    (("diffusion.loss", "regression"), ("sample.sampler", "regression")),
    (),
    (("given.noise_most", 0.4), ("given.noise", 0.1)),
    (("given.blur_most", 1.0),),
)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the study's recipe; 'base' is the recipe of the cascade's base."""
    config = scenes.get_config("3x64x2/4")
    config.diffusion = {**FLOW, "prediction": "x0"}
    config.sample.sampler = "heun"
    config.sample.steps = "20"
    config.train.steps = 3000
    config.train.checkpoint_every_steps = 1500
    config.train.evaluate_every_steps = 0
    config.evaluate.guided_scale = 0.0
    config.evaluate.val_loss_num = 0
    config.sweep.grid = ()
    if arg == "base":
        config.model.patch = 2
        config.data.image_size = 16
        config.evaluate.features = "none"
        config.evaluate.reference = ""
        return config
    config.given = {"kind": "low", "side": 16}
    config.sweep.lists = ARMS
    config.sweep.title = "Super-resolution of digit scenes"
    return config
