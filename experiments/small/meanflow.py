"""Few steps, small: average velocities, a flow and DDPM on digits, at equal training compute.

    ditjax sweep --config=small/meanflow --workdir=runs/small/meanflow --jobs=2
    ditjax grid --workdir=runs/small/meanflow --steps=1,2,4,50 --out=runs/small/meanflow/steps

It asks what one evaluation of the network is worth. A step of MeanFlow costs a forward derivative
more than one of a flow, so that its runs have fewer steps. Each run samples by its own rule: DDPM
by DDIM's, the flows by Euler's, the others by theirs.
Hardware, hours and the result: docs/processes.md, "In one step".
"""

from ml_collections import ConfigDict

from .. import digits
from ..base import FLOW

_DDPM = (
    ("diffusion.process", "ddpm"),
    ("diffusion.prediction", "eps"),
    ("diffusion.variance", "fixed_small"),
    ("diffusion.time", "uniform"),
    ("diffusion.time_mean", 0.0),
    ("sample.sampler", "ddim"),
    ("sample.grid", "uniform"),  # one step of its own grid is at the data
)
_RAW_TIME = (("diffusion.time_scale", 1.0),)
_MEANFLOW = (*_RAW_TIME, ("sample.sampler", "meanflow"), ("diffusion.loss", "meanflow"))
_IMPROVED = (
    *_RAW_TIME,
    ("sample.sampler", "meanflow"),
    ("diffusion.loss", "meanflow_v"),
    ("diffusion.interval_share", 0.5),
)
ARMS = (
    _DDPM,
    (),  # the flow of the recipe
    _RAW_TIME,  # the flow with the time that MeanFlow needs
    _MEANFLOW,
    _IMPROVED,
)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the study's recipe."""
    config = digits.get_config(arg or "3x64x2/2")
    config.diffusion.update(FLOW)
    config.diffusion.time_mean = -0.4
    config.train.evaluate_every_steps = 0
    config.sample.sampler = "euler"
    config.sample.steps = "1"
    config.sample.eta = 0.0
    config.evaluate.guided_scale = 0.0
    config.sweep.grid = ()
    config.sweep.lists = ARMS
    config.sweep.seeds = (0, 1)
    # 3,236 steps of the flow
    config.sweep.budget = ("gflops", 400.0)
    config.sweep.title = "Few steps on digits"
    return config
