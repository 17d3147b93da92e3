"""DiT against ADM's U-Net on digits: the same forward Gflops, each at its own best learning rate.

    ditjax sweep --config=small/unet:rates --workdir=runs/small/unet_rates --jobs=2
    ditjax sweep --config=small/unet:1e-2/1e-2/5e-3,1e-2/3e-3/3e-3 --workdir=runs/small/unet

The first tries learning rates for each network at each size, on a seed that the study does not
have, so that the choice favours neither. The second is the study, at the rates given, by default
those that the first found: DiT's of the three sizes, then the U-Net's. Steps, batch and forward
Gflops are matched; seconds are not. Two cores: about 20 minutes each. docs/unet.md has the result.
"""

from ml_collections import ConfigDict

from .. import digits

# Gflops of DiT-2x52x2/2, 3x64x2/2 and 4x96x3/2, .00116, .00258 and .00758, and the widths that
# `ditjax.models.unet.width_for` finds for them: .00122, .00270 and .00741.
PAIRS = (("2x52x2", 8), ("3x64x2", 12), ("4x96x3", 20))
RATES = {"dit": (2e-3, 5e-3, 1e-2, 2e-2), "unet": (1e-3, 3e-3, 1e-2)}
BEST = "1e-2/1e-2/5e-3,1e-2/3e-3/3e-3"
UNET = (
    ("model.multipliers", (1.0, 2.0)),
    ("model.res_blocks", 1),
    ("model.attention_factors", (2,)),
    ("model.head_width", 8),
    ("model.groups", 4),
)


def get_config(arg: str = BEST) -> ConfigDict:
    """Return the recipe of the rates ('rates'), or of the study at 'D/D/D,U/U/U' rates."""
    config = digits.get_config()
    config.train.steps = 2000
    config.train.checkpoint_every_steps = 2000
    config.train.evaluate_every_steps = 1000
    config.evaluate.guided_scale = 0.0
    picks = arg == "rates"
    rates: dict[str, list[tuple[float, ...]]] = {
        kind: [tried] * len(PAIRS) for kind, tried in RATES.items()
    }
    if not picks:
        for kind, text in zip(RATES, arg.split(","), strict=True):
            rates[kind] = [(float(rate),) for rate in text.split("/")]
    runs = []
    for i, (size, width) in enumerate(PAIRS):
        dit = (("model.size", size), ("model.patch", 2))
        unet = (("model.width", width), *UNET)
        for kind, keys in (("dit", dit), ("unet", unet)):
            for rate in rates[kind][i]:
                runs.append((("model.kind", kind), *keys, ("optim.learning_rate", rate)))
    config.sweep.grid = ()
    config.sweep.lists = tuple(runs)
    config.sweep.seeds = (100,) if picks else (0, 1, 2)
    config.sweep.title = "DiT and U-Net at equal Gflops"
    return config
