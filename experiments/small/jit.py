"""What to predict and where to measure the error: nine pairs of a flow on large patches (JiT).

    ditjax sweep --config=small/jit --workdir=runs/small/jit --jobs=2

Li & He 2025 (JiT) train every prediction (x0, ε, velocity) by every loss. Their claim is that only
x0 can be predicted where a patch has more numbers than the network is wide. Here scenes of 32x32
colours have patches of 192 numbers, and the network is 64 wide. Times are JiT's: logit-normal, more
noise than data; the velocity that x0 implies is bounded below t = .05.
Two cores: 30 minutes, estimated; not yet run in full.
"""

from ml_collections import ConfigDict

from ..base import FLOW
from . import scenes

SPACES = ("x0", "eps", "velocity")
ARMS = tuple(
    (
        ("diffusion.prediction", prediction),
        ("diffusion.weighting", loss),
        *((("diffusion.t_eps", 0.05),) if prediction == "x0" else ()),
    )
    for prediction in SPACES
    for loss in SPACES
)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the study's recipe."""
    config = scenes.get_config(arg or "3x64x2/8")
    config.diffusion.update(FLOW)
    config.diffusion.time_mean = 0.8
    config.diffusion.time_std = 0.8
    config.train.steps = 4000
    config.train.evaluate_every_steps = 0
    config.sample.steps = "25"
    config.sample.eta = 0.0
    config.evaluate.guided_scale = 0.0
    config.sweep.grid = ()
    config.sweep.lists = ARMS
    config.sweep.title = "What to predict: digit scenes, patches of 192 numbers"
    return config
