"""Processes, small: process x prediction x times of a DiT on digits, then sampler x evaluations.

    ditjax sweep --config=small/process --workdir=runs/small/process --jobs=2
    ditjax grid --workdir=runs/small/process --sampler=ddim,dpmpp_2m,edm --steps=3,5,10,25 \\
      --out=runs/small/process/samplers
    ditjax sweep --config=small/process:fashion --workdir=runs/small/process_fashion --jobs=2

It asks how few evaluations of the network each process needs. Heun's rule evaluates twice a step:
compare at equal Gflops, which the grid lists. Seeds are the runs' own, so that their spread shows.
Hardware, hours and the result: docs/processes.md, "How few evaluations".
"""

from ml_collections import ConfigDict

from .. import digits, fashion
from ..base import UNIFORM_FLOW

_DDPM = (("diffusion.process", "ddpm"), ("diffusion.variance", "fixed_small"))
_EDM = (
    ("diffusion.process", "edm"),
    ("diffusion.prediction", "F"),
    ("diffusion.time", "logit_normal"),
    ("diffusion.time_mean", -0.4),
    ("diffusion.sigma_min", 0.02),
    ("diffusion.sigma_max", 20.0),
)
ARMS = (
    (("diffusion.prediction", "eps"), *_DDPM),
    (("diffusion.prediction", "v"), *_DDPM),
    (),  # the flow of the recipe
    (("diffusion.time", "logit_normal"),),
    (  # JiT's pair: x0 predicted, the velocity's loss
        ("diffusion.prediction", "x0"),
        ("diffusion.weighting", "velocity"),
        ("diffusion.t_eps", 0.05),
    ),
    _EDM,
    (*_EDM, ("diffusion.uncertainty", True)),
)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the study's recipe: on digits, or with 'fashion' on Fashion-MNIST."""
    config = fashion.get_config() if arg == "fashion" else digits.get_config(arg or "3x64x2/2")
    config.diffusion.update(UNIFORM_FLOW)
    config.train.evaluate_every_steps = 0
    config.sample.sampler = "ddim"
    config.sample.steps = "25"
    config.sample.eta = 0.0
    config.evaluate.guided_scale = 0.0
    config.sweep.grid = ()
    config.sweep.lists = ARMS
    config.sweep.seeds = (0, 1)
    config.sweep.title = f"Processes on {config.evaluate.features}"
    return config
