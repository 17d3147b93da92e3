"""DiT appendix A: guidance of three or all four latent channels, by scale. XL/2, 256 pixels.

    C=experiments/paper/guidance.py
    python -m ditjax.grid --workdir=$RUN --cfg_channels=three,all --cfg_scale=1,1.25,1.375,1.5 \
      --published=$C --out=$RUN/guidance

$RUN is the run of imagenet256.py in this folder: nothing is trained. The protocol is the same.

Published (FID-50K): 2.27 for three channels with scale 1.5, 2.20 for all four with 1.375: guiding
all with scale 1 + 3x/4 is about equal to guiding three with 1 + x. Table 2 has 9.62 without
guidance and 3.22 for three channels with scale 1.25.
Hardware and hours, computed and not measured: the seven cells on h100:8 (8 chips), 1.35 hours of
sampling at best. Not run.
"""

from ml_collections import ConfigDict

from . import imagenet256, published


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the run's recipe, with the published figures of the grid's cells."""
    config = imagenet256.get_config(arg)
    keys = {"model__size": "XL", "model__patch": 2, "train__steps": imagenet256.STEPS}
    config.sweep.title = "DiT appendix A: channels and scale of guidance"
    config.sweep.published = sum(
        (
            published.figures(
                {"fid": fid}, **keys, sample__cfg_channels=channels, sample__cfg_scale=scale
            )
            for (channels, scale), fid in published.GUIDANCE.items()
        ),
        (),
    )
    config.sweep.published += published.figures(
        {"fid": published.TABLES[256][1.0][0]}, **keys, sample__cfg_scale=1.0
    )
    config.sweep.published += published.figures(
        {"fid": published.TABLES[256][1.25][0]},
        **keys,
        sample__cfg_channels="three",
        sample__cfg_scale=1.25,
    )
    config.sweep.published_protocol = published.protocol(
        decoder="ft-EMA", leave=("steps", "cfg_scale", "cfg_channels")
    )
    config.sweep.published_source = f"{published.PAPER}, appendix A and table 2"
    return config
