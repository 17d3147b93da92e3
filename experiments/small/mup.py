"""Does the best learning rate stay the same when the network gets wider? With and without μP.

    python -m ditjax.sweep --config=experiments/small/mup.py --workdir=runs/small/mup --jobs=2
    python -m ditjax.transfer --runs=runs/small/mup --metric=val_loss

DiTs of two blocks on 8x8 digits, 32 to 256 wide, each trained for 500 steps at seven learning rates
in both parametrizations. The base is the narrowest network, where both are the same: its runs agree
bit for bit. All widths have two heads, so that heads widen too.
Two cores: 8 minutes. Expected result: docs/results.md.
"""

from ml_collections import ConfigDict

from .. import digits

SIZES = ("2x32x2", "2x96x2", "2x256x2")
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)


def get_config() -> ConfigDict:
    """Return the sweep's recipe."""
    config = digits.get_config(f"{SIZES[0]}/4")
    config.model.base_width = 32
    config.model.base_head_width = 16
    config.optim.warmup_steps = 50
    config.train.steps = 500
    config.train.log_every_steps = 125  # the compared loss is that of the last interval
    config.train.checkpoint_every_steps = 500
    config.train.evaluate_every_steps = 0
    # Only the loss matters, so few samples are drawn.
    config.sample.steps = "ddim10"
    config.sample.batch_size = 100
    config.evaluate.num_samples = 100
    config.evaluate.guided_scale = 0.0
    config.sweep.grid = (
        ("model.parametrization", ("standard", "mup")),
        ("model.size", SIZES),
        ("optim.learning_rate", RATES),
        ("seed", (0,)),
    )
    return config
