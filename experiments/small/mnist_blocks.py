"""Figure 5 on MNIST: the paper's four blocks at one size, 2 seeds.

    ditjax sweep --config=small/mnist_blocks --workdir=runs/small/mnist_blocks --jobs=2

DiT-3x64x2/7 as `small/mnist_scaling` trains it. docs/data.md says how MNIST is prepared.
Hardware, time and the result: docs/results.md.
"""

from ml_collections import ConfigDict

from . import mnist_scaling

BLOCKS = ("adaln_zero", "adaln", "cross_attention", "in_context")


def get_config() -> ConfigDict:
    """Return the study's recipe."""
    config = mnist_scaling.get_config("3x64x2/7")
    config.train.evaluate_every_steps = 0
    config.sweep.grid = (("model.block", BLOCKS), ("seed", mnist_scaling.SEEDS))
    config.sweep.title = "Four blocks on MNIST"
    return config
