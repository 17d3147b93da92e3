"""Bigger images: three sizes x two patch sizes on digit scenes, 32x32 pixels in colour.

    C=experiments/small/scenes.py
    python -m ditjax.sweep --config=$C --workdir=runs/small/scenes --jobs=2

A scene holds one to three digits of one class with random colours, sizes and positions
(`ditjax/data/scenes.py`). There are 20,000 scenes, so that each is used at most seven times.
Two cores: 30 minutes, estimated; not yet run in full.
"""

from ml_collections import ConfigDict

from .. import digits

SIZES = ("2x32x2", "3x64x2", "4x96x3")
PATCHES = (8, 4)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the study's recipe; 'SIZE/PATCH' selects the model that `train` trains."""
    config = digits.get_config(arg or f"{SIZES[-1]}/{PATCHES[-1]}")
    config.data.name = "digit_scenes"
    config.data.image_size = 32
    config.data.channels = 3
    config.train.steps = 8000
    config.train.evaluate_every_steps = 1000
    config.evaluate.features = "scenes"
    config.evaluate.reference = "digit_scenes/train[:5000]"  # enough for 1,000 samples
    config.sweep.grid = (("model.size", SIZES), ("model.patch", PATCHES))
    return config
