"""Bigger images: three sizes x two patch sizes on digit scenes, 32x32 in colour.

    C=experiments/small/scenes.py
    python -m ditjax.sweep --config=$C --workdir=runs/small/scenes --jobs=2

A scene holds one to three digits of one class with colour, size, place and count of their own
(`ditjax/data/scenes.py`): 20,000 of them, so that no image is seen more than seven times.
Two cores: 30 minutes, estimated; not run whole by us yet.
"""

from ml_collections import ConfigDict

from .. import digits

SIZES = ("2x32x2", "3x64x2", "4x96x3")
PATCHES = (8, 4)


def get_config(arg: str | None = None) -> ConfigDict:
    """The study's recipe; 'SIZE/PATCH' picks the model that `train` alone would train."""
    config = digits.get_config(arg or f"{SIZES[-1]}/{PATCHES[-1]}")
    config.data.name = "digit_scenes"
    config.data.image_size = 32
    config.data.channels = 3
    config.train.steps = 8000
    config.train.evaluate_every_steps = 1000
    config.evaluate.features = "scenes"
    config.evaluate.reference = "digit_scenes/train[:5000]"  # enough beside 1,000 samples
    config.sweep.grid = (("model.size", SIZES), ("model.patch", PATCHES))
    return config
