"""EDM with DiT-XL/2 on ImageNet 256x256 latents: F predicted, log-normal σ, 32 Heun steps.

    C=imagenet256_edm
    ditjax train --config=$C --workdir=$RUN --config.data.name=latents:$LATENTS
    ditjax evaluate --workdir=$RUN --features=inception:$INCEPTION --reference=$REFERENCE
    ditjax grid --workdir=$RUN --cfg_scale=1,1.5,2 --config.sample.guide=$RUN@50000

$LATENTS, $INCEPTION and $REFERENCE are those of imagenet256.py. EDM2's values (Karras et al. 2024)
are for data of standard deviation .5: ln σ ~ N(-.4, 1) and σ from .002 to 80. These latents have
about 1, so that every σ is twice that, and the mean of ln σ is -.4 + ln 2. The loss in the space of
F has weight 1, which is EDM's, over its learned uncertainty, which is EDM2's. An early checkpoint
is kept for autoguidance.

Published: none of this network; EDM2 has networks of its own. Steps and batch are those of the
paper's table 4. Hardware and hours, computed and not measured: as imagenet256.py, 400,000 steps are
5 hours of 8 H100s at half of their bfloat16 peak. Not run.
"""

from ml_collections import ConfigDict

from . import imagenet256


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe of DiT-SIZE/PATCH, by default 'XL/2'."""
    config = imagenet256.get_config(arg)
    config.diffusion.process = "edm"
    config.diffusion.prediction = "F"
    config.diffusion.loss = "simple"
    config.diffusion.variance = "none"
    config.diffusion.sigma_data = 1.0
    config.diffusion.sigma_min = 0.004
    config.diffusion.sigma_max = 160.0
    config.diffusion.uncertainty = True
    config.diffusion.time = "logit_normal"
    config.diffusion.time_mean = 0.293
    config.train.keep_every_steps = 50_000
    config.sample.sampler = "edm"
    config.sample.steps = "32"
    config.sample.cfg_channels = "all"
    config.sweep.grid = ()
    return config
