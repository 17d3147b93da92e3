"""DiT with 7 billion parameters on ImageNet 256x256 latents. Compiled by `plan`, not run.

    python -m ditjax.plan --config=experiments/dit_7b.py --topology=v5p:4x4x4
    python -m ditjax.train --config=experiments/dit_7b.py --workdir=/share/dit_7b

30 blocks of width 3584 with 32 heads of 112, patch 2: 256 tokens. Hardware: any number of devices
that fsdp = 32 divides, such as a v5p:4x4x4, a v5e:16x16 or 64 H100s. The remaining devices are data
parallel. The state is 111 GB, 3.5 GB per device. Expected result: unknown; there is no published
model of this size.
"""

from ml_collections import ConfigDict

from . import dit_3b


def get_config(size: str | None = None) -> ConfigDict:
    """Return the recipe; another 'DEPTHxWIDTHxHEADS' changes only the model."""
    config = dit_3b.get_config(size or "30x3584x32")
    config.mesh.fsdp = 32
    return config
