"""DiT table 2, the rows of DiT: XL/2 on ImageNet 256x256 after 7,000,000 steps, with guidance.

    C=experiments/paper/imagenet256.py
    python -m ditjax.train --config=$C --workdir=$RUN --config.data.name=latents:$LATENTS
    python -m ditjax.grid --workdir=$RUN --cfg_scale=1,1.25,1.5 --published=$C

The files are those of table4.py, but with the ft-EMA autoencoder, which differs only in the
decoder: $LATENTS are the same.

Protocol: 50,000 samples, uniform labels, 250 DDPM steps, guidance of the first three of the four
latent channels, averaged weights, ft-EMA decoder, ADM's evaluator. The paper states neither
precision nor seed; the release's README has 2.21 for the same weights sampled in PyTorch's float32,
where the paper has 2.27.

Published (FID, sFID, IS, precision, recall): no guidance 9.62, 6.85, 121.50, .67, .67; scale 1.25
3.22, 5.28, 201.77, .76, .62; scale 1.5 2.27, 4.60, 278.24, .83, .57. After 2,352,000 steps, guided:
FID 2.55 (the text does not state the scale; 1.5 is assumed).
Hardware and hours, computed and not measured: on h100:8 (8 chips), 44.8 hours of training at best
(65.2 with nothing hidden) and .520 hours of sampling for the three scales. Not run.
"""

from ml_collections import ConfigDict

from . import published, table4

DECODER = "vae-ft-ema-560000-ema-pruned.ckpt"
STEPS = 7_000_000


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe of DiT-SIZE/PATCH, by default 'XL/2'; only XL/2 has figures."""
    config = table4.get_config(arg)
    config.autoencoder.path = DECODER
    config.train.steps = STEPS
    config.sweep.grid = (("train.steps", (STEPS,)),)
    config.sweep.title = "DiT table 2: XL/2 at 256 pixels"
    config.sweep.topology = "h100:8"
    xl2 = {"model__size": "XL", "model__patch": 2}
    config.sweep.published = sum(
        (
            published.figures(
                published.scores(row), **xl2, train__steps=STEPS, sample__cfg_scale=scale
            )
            for scale, row in published.TABLES[256].items()
        ),
        published.figures(
            {"fid": published.GUIDED_AT_2352K}, **xl2, train__steps=2_352_000, sample__cfg_scale=1.5
        ),
    )
    config.sweep.published_protocol = published.protocol(
        decoder="ft-EMA", leave=("steps", "cfg_scale")
    )
    config.sweep.published_source = f"{published.PAPER}, table 2 and section 5.1"
    return config
