"""The paper's twelve DiTs on ImageNet 256x256: 32x32x4 latents, batch 256, 400,000 steps.

    C=experiments/imagenet256.py
    python -m ditjax.encode --config=$C --config.autoencoder.path=$AE --config.model.dtype=float32 \
      --out=$LATENTS
    python -m ditjax.train --config=$C:XL/2 --workdir=$RUN --config.autoencoder.path=$AE \
      --config.data.name=latents:$LATENTS
    python -m ditjax.evaluate --samples=$RUN --reference=VIRTUAL_imagenet256_labeled.npz \
      --features=inception:$INCEPTION --out=$RUN/fid.json

$AE is Stable Diffusion's autoencoder (docs/weights.md; the paper's tables of 400,000 steps use
ft-MSE), $INCEPTION the network of FID (docs/evaluation.md). Choose a mesh for the machine, such as
--config.mesh.fsdp=16. `sweep` trains and evaluates all twelve models, or one with --index=0 ... 11;
it needs --config.evaluate.features=inception:$INCEPTION --config.evaluate.reference=REFERENCE.

Published (Peebles & Xie 2023, FID-50K, 250 DDPM steps, no guidance): S/2 68.40, B/2 43.47, L/2
23.33, XL/2 19.47. XL/2 with --config.train.steps=7000000: 9.62, and 2.27 with cfg_scale 1.5.
Hardware and hours, computed and not measured: XL/2 is 118.6 Gflops, so 400,000 steps are 7.3e19
floating-point operations: 5 hours of 8 H100s at half of their bfloat16 peak of 989e12 a second, and
7,000,000 steps 90 hours. Not run: the data was not available.
"""

from ml_collections import ConfigDict

from . import base

SIZES = ("S", "B", "L", "XL")
PATCHES = (8, 4, 2)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe of DiT-SIZE/PATCH, by default 'XL/2'; its sweep has all twelve models."""
    size, _, patch = (arg or "XL/2").partition("/")
    if size not in SIZES or patch not in map(str, PATCHES):
        raise ValueError(
            f"{arg!r} is none of the paper's twelve models: expected SIZE/PATCH, a size of"
            f" {', '.join(SIZES)} and a patch of {', '.join(map(str, PATCHES))}, such as 'XL/2'"
        )
    config = base.get_config(f"{size}/{patch}")
    config.model.dtype = "bfloat16"
    config.sweep.grid = (("model.size", SIZES), ("model.patch", PATCHES))
    return config
