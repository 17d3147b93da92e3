"""Which size makes the most of equal training compute, on MNIST? 7 sizes at two budgets, one seed.

    ditjax sweep --config=small/mnist_compute:300 --workdir=runs/small/mnist_compute/300 --jobs=2
    ditjax sweep --config=small/mnist_compute:900 --workdir=runs/small/mnist_compute/900 --jobs=2
    ditjax report --runs=runs/small/mnist_compute

Every run has so many training Gflops, and a learning rate that falls until its last step. At 900
Gflops DiT-1x32x2/4 sees 360,000 images, six epochs, and the largest model 12,500. The budget and
the model set the steps. One core, busy: 25 minutes. The result: docs/results.md.
"""

from ml_collections import ConfigDict

from . import mnist_scaling

SIZES = ("1x16x2", *mnist_scaling.SIZES)


def get_config(budget: str = "900") -> ConfigDict:
    """Return the recipe of a budget in training Gflops. Raises ValueError."""
    config = mnist_scaling.get_config()
    config.train.evaluate_every_steps = 0
    config.sweep.grid = (("model.size", SIZES), ("model.patch", (4,)))
    config.sweep.budget = ("gflops", float(budget))
    config.sweep.title = "Sizes at equal training compute on MNIST"
    return config
