"""DiT with 3.1 billion parameters on ImageNet 256x256 latents. Compiled by `plan`, not run.

    python -m ditjax.plan --config=experiments/dit_3b.py --topology=v5e:16x16
    python -m ditjax.train --config=experiments/dit_3b.py --workdir=/share/dit_3b

32 blocks of width 2304 with 24 heads of 96, patch 2: 256 tokens. Hardware: any number of devices
that fsdp = 16 divides, such as a v5e:16x16, a v5p:4x4x4 or 64 H100s. The remaining devices are data
parallel. The state is 49 GB, 3.1 GB per device. Expected result: unknown; there is no published
model of this size.
"""

from ml_collections import ConfigDict

from . import base


def get_config(size: str | None = None) -> ConfigDict:
    """Return the recipe; another 'DEPTHxWIDTHxHEADS' changes only the model."""
    config = base.get_config(f"{size or '32x2304x24'}/2")
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.train.batch_size = 1024
    config.mesh.fsdp = 16
    return config
