"""DiT table 3, the rows of DiT: XL/2 on ImageNet 512x512 after 3,000,000 steps, with guidance.

    C=experiments/paper/imagenet512.py
    python -m ditjax.train --config=$C --workdir=$RUN --config.data.name=latents:$LATENTS
    python -m ditjax.grid --workdir=$RUN --cfg_scale=1,1.25,1.5 --published=$C

Files and protocol are those of imagenet256.py in this folder, but the reference is
VIRTUAL_imagenet512.npz; the paper computes precision and recall with 1,000 real images at this
size. experiments/imagenet512.py shows how to make $LATENTS.

Published (FID, sFID, IS, precision, recall): no guidance 12.03, 7.12, 105.25, .75, .64; scale 1.25
4.64, 5.77, 174.77, .81, .57; scale 1.5 3.04, 5.02, 240.82, .84, .54.
Hardware and hours, computed and not measured: on h100:8 (8 chips), 84.8 hours of training at best
(93.6 with nothing hidden) and 2.30 hours of sampling for the three scales. Not run.
"""

from ml_collections import ConfigDict

from . import imagenet256, published

STEPS = 3_000_000


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe of DiT-SIZE/PATCH, by default 'XL/2'; only XL/2 has figures."""
    config = imagenet256.get_config(arg)
    config.data.image_size = 512
    config.train.steps = STEPS
    config.evaluate.reference = "VIRTUAL_imagenet512.npz"
    config.sweep.grid = (("train.steps", (STEPS,)),)
    config.sweep.title = "DiT table 3: XL/2 at 512 pixels"
    config.sweep.published = sum(
        (
            published.figures(
                published.scores(row),
                model__size="XL",
                model__patch=2,
                train__steps=STEPS,
                sample__cfg_scale=scale,
            )
            for scale, row in published.TABLES[512].items()
        ),
        (),
    )
    config.sweep.published_protocol = published.protocol(
        512, decoder="ft-EMA", leave=("steps", "cfg_scale")
    )
    config.sweep.published_source = f"{published.PAPER}, table 3"
    return config
