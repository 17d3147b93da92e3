"""DiT against ADM's U-Net on digits: the same forward Gflops, each at three learning rates.

    ditjax sweep --config=small/unet --workdir=runs/small/unet --jobs=2

Steps, batch and forward Gflops are matched; seconds are not. docs/unet.md has what was run.
"""

from ml_collections import ConfigDict

from .. import digits

# Gflops of DiT-3x64x2/2, 4x96x3/2 and 6x128x4/2, .00258, .00758 and .01999, and the widths that
# `ditjax.models.unet.width_for` finds for them: .00270, .00741 and .01883.
PAIRS = (("3x64x2", 12), ("4x96x3", 20), ("6x128x4", 32))
RATES = {"dit": (2e-3, 5e-3, 1e-2), "unet": (1e-3, 3e-3, 1e-2)}
UNET = (
    ("model.multipliers", (1.0, 2.0)),
    ("model.res_blocks", 1),
    ("model.attention_factors", (2,)),
    ("model.head_width", 8),
    ("model.groups", 4),
)


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.train.steps = 2000
    config.train.checkpoint_every_steps = 2000
    config.train.evaluate_every_steps = 1000
    config.evaluate.guided_scale = 0.0
    runs = []
    for size, width in PAIRS:
        dit = (("model.size", size), ("model.patch", 2))
        unet = (("model.width", width), *UNET)
        for kind, keys in (("dit", dit), ("unet", unet)):
            for rate in RATES[kind]:
                runs.append((("model.kind", kind), *keys, ("optim.learning_rate", rate)))
    config.sweep.grid = ()
    config.sweep.lists = tuple(runs)
    config.sweep.seeds = (0, 1)
    config.sweep.title = "DiT and U-Net at equal Gflops"
    return config
