"""Rules of guidance, small: cfg, rescale, apg, cfg-zero and autoguidance of a flow on digits.

    ditjax sweep --config=small/guidance_rules --workdir=runs/small/guidance_rules --jobs=2
    S=runs/small/guidance_rules
    ditjax grid --workdir=$S --out=$S/apg --cfg_scale=1,1.25,1.5,2,3 --config.sample.cfg_rule=apg
    R=$S/runs/DiT-4x96x3-p2-seed0
    ditjax grid --workdir=$R --out=$S/auto-0 --cfg_scale=1,1.25,1.5,2,3 \\
      --config.sample.guide=$R@400

and so for the other rules and seed 1. It asks which rule improves FD-digits, and what it costs in
recall. The weak network of autoguidance is the run itself at a tenth of its steps.
Hardware, hours and the result: docs/processes.md, "Rules of guidance on digits".
"""

from ml_collections import ConfigDict

from .. import digits
from ..base import UNIFORM_FLOW

WEAK_STEP = 400  # a tenth of the steps


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the study's recipe."""
    config = digits.get_config(arg or "4x96x3/2")
    config.diffusion.update(UNIFORM_FLOW)
    config.train.checkpoint_every_steps = WEAK_STEP
    config.train.keep_every_steps = WEAK_STEP
    config.train.evaluate_every_steps = 0
    config.sample.sampler = "ddim"
    config.sample.steps = "25"
    config.sample.eta = 0.0
    config.evaluate.guided_scale = 0.0
    config.sweep.grid = ()
    config.sweep.seeds = (0, 1)
    config.sweep.title = "Rules of guidance on digits"
    return config
