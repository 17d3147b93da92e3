"""SiT-XL/2 on ImageNet 256x256 latents: the linear path, velocity, 7,000,000 steps of 256.

    C=imagenet256_sit
    ditjax train --config=$C --workdir=$RUN --config.data.name=latents:$LATENTS
    ditjax evaluate --workdir=$RUN --features=inception:$INCEPTION --reference=$REFERENCE
    ditjax convert --weights=$RUN --to=sit --out=sit.pt

$LATENTS, $INCEPTION and $REFERENCE are those of imagenet256.py. The network is SiT's to the letter:
it is given t from noise to data, unscaled, and has channels for a variance that nothing reads, so
that weights go in and out. Samples are drawn as by SiT's script: 250 steps of the SDE with w = 2σ,
the last of them .04 long, and guidance of the first three channels.

Published (Ma et al. 2024, cited from memory): FID 2.06 with the SDE and cfg_scale 1.5.
Hardware and hours, computed and not measured: the network is that of imagenet256.py, and
7,000,000 steps are 90 hours of 8 H100s at half of their bfloat16 peak. Not run.
"""

from ml_collections import ConfigDict

from . import imagenet256


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe of SiT-SIZE/PATCH, by default 'XL/2'."""
    config = imagenet256.get_config(arg)
    config.diffusion.process = "flow"
    config.diffusion.prediction = "velocity"
    config.diffusion.loss = "simple"
    config.diffusion.variance = "unused"
    config.diffusion.time_scale = 1.0
    config.diffusion.time_from_noise = True
    config.train.steps = 7_000_000
    config.sample.sampler = "sde"
    config.sample.last_step = 0.04
    config.sample.cfg_scale = 1.5
    config.sweep.grid = ()
    return config
