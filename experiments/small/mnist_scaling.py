"""Figures 6 to 9 on MNIST: 6 sizes x 2 patch sizes x 2 seeds, scored during training.

    ditjax sweep --config=small/mnist_scaling --workdir=runs/small/mnist_scaling --jobs=2

The twelve models span a factor of 80 in Gflops. One run sees 96,000 images, 1.6 epochs, so that
nothing can be learned by heart; validation loss on the test split beside the training loss, and
authenticity beside that of held-out digits, would show it. docs/data.md says how MNIST is prepared.
Two cores: about 75 minutes (estimated from its largest run); the same command again resumes.
"""

from ml_collections import ConfigDict

from .. import mnist

SIZES = ("2x32x2", "2x48x2", "3x64x2", "4x64x2", "4x96x3", "4x128x4")
PATCHES = (7, 4)
SEEDS = (0, 1)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the study's recipe; 'SIZE/PATCH' selects the model that `train` trains."""
    config = mnist.get_config(arg)
    config.train.steps = 1500
    config.train.checkpoint_every_steps = 1500
    config.train.evaluate_every_steps = 250
    config.evaluate.guided_scale = 0.0
    config.sweep.grid = (("model.size", SIZES), ("model.patch", PATCHES), ("seed", SEEDS))
    config.sweep.title = "Scaling on MNIST"
    return config
