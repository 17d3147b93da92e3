"""Which size makes the most of equal training compute, on MNIST? 6 sizes, 2 seeds, two budgets.

    ditjax sweep --config=small/mnist_compute:300 --workdir=runs/small/mnist_compute/300 --jobs=2
    ditjax sweep --config=small/mnist_compute:900 --workdir=runs/small/mnist_compute/900 --jobs=2
    ditjax report --runs=runs/small/mnist_compute

Every run has so many training Gflops, and a learning rate that falls until its last step. The
smallest model takes 28 times as many steps as the largest: at 900 Gflops it sees 350,000 images,
six epochs, and the largest 12,500. The budget and the model set the steps.
"""

from ml_collections import ConfigDict

from . import mnist_scaling


def get_config(budget: str = "900") -> ConfigDict:
    """Return the recipe of a budget in training Gflops. Raises ValueError."""
    config = mnist_scaling.get_config()
    config.train.evaluate_every_steps = 0
    config.sweep.grid = (("model.size", mnist_scaling.SIZES), ("model.patch", (4,)))
    config.sweep.seeds = mnist_scaling.SEEDS
    config.sweep.budget = ("gflops", float(budget))
    config.sweep.title = "Sizes at equal training compute on MNIST"
    return config
