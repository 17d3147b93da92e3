"""Gflops against FD-fashion: 3 sizes x 3 patch sizes on Fashion-MNIST, 60,000 clothes, 28x28 grey.

    ditjax train --config=fashion --workdir=runs/fashion              # DiT-3x64x2/4
    ditjax evaluate --workdir=runs/fashion                            # FD-fashion
    ditjax sweep --config=fashion --workdir=runs/fashion_study --jobs=2  # nine models
    ditjax sweep --config=small/process:fashion --workdir=runs/small/process_fashion --jobs=2

All but the data is as in the recipe `mnist`. docs/data.md says how the data are prepared. Of these,
a part of the last was run: docs/processes.md, "On Fashion-MNIST".
"""

from ml_collections import ConfigDict

from . import mnist


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the sweep's recipe; 'SIZE/PATCH' selects the model that `train` trains."""
    config = mnist.get_config(arg)
    config.data.name = "fashion_mnist"
    config.evaluate.features = "fashion"
    return config
