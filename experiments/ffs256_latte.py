"""Latte-XL/2 on clips of faces: 16 frames of 256x256, stride 3, in latents, 1,000,000 steps of 40.

    ditjax train --config=ffs256_latte --workdir=$RUN --config.autoencoder.path=$AE \
      --config.data.name=folder:$FFS
    ditjax convert --weights=$RUN --to=latte --out=latte.pt

$AE is Stable Diffusion's autoencoder (docs/weights.md), $FFS a folder of videos or of NAME.frames
(docs/video.md). The numbers are those of Latte's configs/ffs/ffs_train.yaml (commit b27c24a); that
script clips gradients at 0.1 from step 20,000 on, and this recipe from the first. The images of the
autoencoder are encoded at each step, frame by frame.
Hardware and hours, computed and not measured: 1,863 Gflops a clip, so 1,000,000 steps are 4.5e20
floating-point operations: 32 hours of 8 H100s at half of their bfloat16 peak. Not run: the data was
not available.
"""

from ml_collections import ConfigDict

from . import base


def get_config() -> ConfigDict:
    """Return the recipe of Latte-XL/2."""
    config = base.get_config("XL/2")
    config.model.kind = "video"
    config.model.dtype = "bfloat16"
    config.model.label_dropout = 0.0  # one class
    config.data.name = "folder:ffs"
    config.data.num_classes = 1
    config.data.frames = 16
    config.data.frame_stride = 3
    config.optim.clip_norm = 0.1
    config.train.steps = 1_000_000
    config.train.batch_size = 40
    return config
