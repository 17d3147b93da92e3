"""MeanFlow-XL/2 on ImageNet 256x256 latents: one evaluation of the network a sample.

    C=imagenet256_meanflow
    ditjax train --config=$C --workdir=$RUN --config.data.name=latents:$LATENTS
    ditjax evaluate --workdir=$RUN --features=inception:$INCEPTION --reference=$REFERENCE
    ditjax plan --config=$C --topology=h100:8 --mesh=fsdp=8 --config.model.remat=full

$LATENTS, $INCEPTION and $REFERENCE are those of imagenet256.py. The values are those of
MeanFlow's XL/2 (Geng et al. 2025, Table 4, cited from memory): logit-normal times (-.4, 1), r < t
in a quarter of the examples, adaptive weight 1/(e + .01), guided velocities in the target with
ω = .2 and κ = .92, of which the effective scale is ω / (1 - κ) = 2.5, the time unscaled, 240 epochs
of 1,281,167 images. Theirs guides for times below .75 alone; here guidance is at all times.

Published (Geng et al. 2025): FID-50K 3.43 in one evaluation, 2.93 in two.
Hardware and hours, computed and not measured: 118.6 Gflops a forward pass. A step differentiates
forwards, too, and evaluates the network twice more for the guided target: six forward passes, so
that 1,200,000 steps of 256 are 31 hours of 8 H100s at half of their bfloat16 peak. Not run.
"""

from ml_collections import ConfigDict

from . import imagenet256


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe of MeanFlow-SIZE/PATCH, by default 'XL/2'."""
    config = imagenet256.get_config(arg)
    config.diffusion.process = "flow"
    config.diffusion.prediction = "velocity"
    config.diffusion.loss = "meanflow"
    config.diffusion.variance = "none"
    config.diffusion.time_scale = 1.0
    config.diffusion.time = "logit_normal"
    config.diffusion.time_mean = -0.4
    config.diffusion.target_omega = 0.2
    config.diffusion.target_kappa = 0.92
    config.optim.b2 = 0.95
    config.train.steps = 1_200_000
    config.sample.sampler = "meanflow"
    config.sample.steps = "1"
    config.sweep.grid = ()
    return config
