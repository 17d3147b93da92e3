"""Figures 6 to 9 on MNIST: 6 sizes x 2 patch sizes x 2 seeds, scored during training.

    ditjax sweep --config=small/mnist_scaling --workdir=runs/small/mnist_scaling --jobs=2

The twelve models span a factor of 80 in Gflops. One run sees 40,000 images, two thirds of an
epoch, so that nothing can be learned by heart; validation loss on the test split beside the
training loss, and authenticity beside that of held-out digits, would show it. Flow matching with
prediction of the data: with the paper's process these small networks draw no digits after as many
images. docs/data.md says how MNIST is prepared. One core, busy: 40 minutes. The result:
docs/results.md, "Scaling on MNIST".
"""

from ml_collections import ConfigDict

from .. import mnist
from ..base import UNIFORM_FLOW

SIZES = ("1x32x2", "2x32x2", "2x48x2", "3x64x2", "4x64x2", "4x96x3")
PATCHES = (7, 4)
SEEDS = (0, 1)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the study's recipe; 'SIZE/PATCH' selects the model that `train` trains."""
    config = mnist.get_config(arg)
    config.diffusion.update({**UNIFORM_FLOW, "prediction": "x0"})
    config.train.batch_size = 16
    config.train.steps = 2500
    config.train.checkpoint_every_steps = 2500
    config.train.evaluate_every_steps = 625
    config.sample.sampler = "heun"
    config.sample.steps = "20"
    config.sample.eta = 0.0
    config.evaluate.guided_scale = 0.0
    config.sweep.grid = (("model.size", SIZES), ("model.patch", PATCHES), ("seed", SEEDS))
    config.sweep.title = "Scaling on MNIST"
    return config
