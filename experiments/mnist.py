"""Gflops against FD-mnist: 3 sizes x 3 patch sizes on the 60,000 digits of MNIST, 28x28 grey.

    ditjax train --config=mnist --workdir=runs/mnist                 # DiT-3x64x2/4
    ditjax evaluate --workdir=runs/mnist                             # FD-mnist of 1,000 samples
    ditjax sweep --config=mnist --workdir=runs/mnist_study --jobs=2  # nine models

Patches of 7, 4 and 2 pixels make 16, 49 and 196 tokens. tensorflow-datasets downloads and prepares
MNIST; docs/data.md says how to do without. The test split is held out: it gives the validation loss
and the floor of FD-mnist, the distance of 10,000 real digits that no model has seen.
One batch is 64 images; 4,000 steps are 4 epochs. Hours and expected result: not run.
"""

from ml_collections import ConfigDict

from . import digits

SIZES = ("2x32x2", "3x64x2", "4x96x3")
PATCHES = (7, 4, 2)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the sweep's recipe; 'SIZE/PATCH' selects the model that `train` trains."""
    config = digits.get_config(arg or f"{SIZES[1]}/{PATCHES[1]}")
    config.data.name = "mnist"
    config.data.image_size = 28
    config.train.batch_size = 64
    config.optim.learning_rate = 3e-3
    config.evaluate.features = "mnist"
    config.sweep.grid = (("model.size", SIZES), ("model.patch", PATCHES))
    return config
