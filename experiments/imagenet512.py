"""DiT on ImageNet 512x512: 64x64x4 latents, 1,024 tokens at patch 2, batch 256, 3,000,000 steps.

    C=experiments/imagenet512.py
    python -m ditjax.encode --config=$C --config.autoencoder.path=$AE --config.model.dtype=float32 \
      --config.train.batch_size=64 --out=$LATENTS
    python -m ditjax.train --config=$C:XL/2 --workdir=$RUN --config.autoencoder.path=$AE \
      --config.data.name=latents:$LATENTS
    python -m ditjax.evaluate --samples=$RUN --reference=VIRTUAL_imagenet512.npz \
      --features=inception:$INCEPTION --out=$RUN/fid.json

imagenet256.py explains the variables. The latents take 336 GB.

Published (Peebles & Xie 2023, FID-50K, 250 DDPM steps) of XL/2: 12.03 without guidance, 3.04 with
cfg_scale 1.5. Hardware and hours, computed and not measured: 524.6 Gflops, so 2.4e21 floating-point
operations: 170 hours of 8 H100s at half of their bfloat16 peak. Not run.
"""

from ml_collections import ConfigDict

from . import imagenet256


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe of DiT-SIZE/PATCH, by default 'XL/2'."""
    config = imagenet256.get_config(arg)
    config.data.image_size = 512
    config.train.steps = 3_000_000
    config.sweep.grid = ()
    return config
