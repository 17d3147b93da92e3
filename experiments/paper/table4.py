"""DiT table 4, figures 2, 6, 7 and 8: the twelve models at 400,000 steps, FID-50K, no guidance.

    python -m ditjax.sweep --config=experiments/paper/table4.py --workdir=$STUDY \
      --config.data.name=latents:$LATENTS
    python -m ditjax.sweep --config=experiments/paper/table4.py --workdir=$STUDY \
      --models=S/8,B/4 --dry_run

Read from the working directory unless overridden: the ft-MSE autoencoder (config.autoencoder.path),
FID's Inception (config.evaluate.features) and ADM's reference (config.evaluate.reference).
docs/weights.md and docs/evaluation.md say where to get them; $LATENTS is the output of `encode`.

Protocol: 50,000 samples, uniform labels, 250 DDPM steps, no guidance, averaged weights, ft-MSE
decoder, ADM's evaluator; batch 256, AdamW 1e-4 constant. The paper states neither precision nor
seed; the authors trained in JAX on TPU v3, XL/2 at 5.7 steps/s on a v3-256. This recipe computes in
bfloat16.

Published (FID-50K): S 153.60, 100.41, 68.40 at patch 8, 4, 2; B 122.74, 68.38, 43.47; L 118.87,
45.64, 23.33; XL 106.41, 43.01, 19.47. Correlation of log Gflops and FID -0.93.
Hardware and hours, computed and not measured: all twelve on a v5e:4x4 (16 chips), 23.6 hours of
training at best (56.1 with nothing hidden) and .657 hours of sampling. Not run: the data was not
available.
"""

from ml_collections import ConfigDict

from .. import imagenet256
from . import published

DECODER = "vae-ft-mse-840000-ema-pruned.ckpt"


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the sweep; 'SIZE/PATCH' selects the model that `train` trains."""
    config = imagenet256.get_config(arg)
    config.autoencoder.path = DECODER
    config.evaluate.features = "inception:pt_inception-2015-12-05-6726825d.pth"
    config.evaluate.reference = "VIRTUAL_imagenet256_labeled.npz"
    config.sweep.title = "DiT table 4: twelve models at 400,000 steps"
    config.sweep.topology = "v5e:4x4"
    config.sweep.published = sum(
        (
            published.figures({"fid": fid}, model__size=size, model__patch=patch)
            for (size, patch), fid in published.MODELS.items()
        ),
        (),
    )
    config.sweep.published_protocol = published.protocol()
    config.sweep.published_source = f"{published.PAPER}, table 4"
    return config
