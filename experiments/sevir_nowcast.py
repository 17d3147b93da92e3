"""Nowcasting on SEVIR at full size: 13 frames of 384x384 are seen, 12 are forecast, in two stages.

    C=sevir_nowcast; SEVIR=sevir:/data/sevir
    ditjax train --config=$C:first --workdir=$FIRST --config.data.name=$SEVIR
    ditjax train --config=$C --workdir=$RUN --config.data.name=$SEVIR --config.given.first=$FIRST
    ditjax evaluate --workdir=$RUN
    ditjax train --config=$C --workdir=$LM --config.data.name=$SEVIR --config.given.first=$FIRST \
      --config.lm.mode=frozen --config.lm.path=$LLAMA --config.lm.layers='(30, 32)'
    ditjax plan --config=$C --topology=h100:8 --compile=none

The network and the training of stage one are those of Earthformer's SEVIR (Gao et al. 2022, Sec.
4.2 and its configuration, cited from memory): axial cuboids, units 128, depths 1 and 1, 8 global
vectors, a stem of 3, 2 and 2; AdamW at 1e-3 with a cosine, 100 epochs of 35,718 windows at a batch
of 32, gradients clipped at 1. Its network has no time and no noise; stage two has (docs/
nowcasting.md), with as many steps. $SEVIR is the folder of the Registry of Open Data, $LLAMA the
layers of a language model, if any.

Published (Earthformer, Table 4, cited from memory): CSI .4419, MSE 3.6957e-3.
Hardware and hours, in closed form and not measured (`plan` above): 107 Gflops a forward pass, and
3.2 hours of an H100 for either stage at 40 % of the peak of its products, without memory traffic
(docs/nowcasting.md, "Full size"). Not run: the data was not available.
"""

from ml_collections import ConfigDict

from . import base

EPOCHS, WINDOWS, BATCH = 100, 35_718, 32


def get_config(stage: str = "second") -> ConfigDict:
    """Return the recipe of stage 'first' or 'second'."""
    config = base.get_config()
    config.model = {"kind": "cuboid", "global_vectors": 8, "label_dropout": 0.0}
    config.data = {
        "name": "sevir:/data/sevir",
        "image_size": 384,
        "frames": 25,
        "channels": 1,
        "num_classes": 1,
        "flip": False,
    }
    config.autoencoder = {"kind": "none"}
    config.given = {"kind": "past", "past": 13}
    config.optim = {"learning_rate": 1e-3, "schedule": "cosine", "clip_norm": 1.0}
    config.train.steps = EPOCHS * WINDOWS // BATCH
    config.optim.warmup_steps = config.train.steps // 5
    config.train.batch_size = BATCH
    config.sample.batch_size = 32
    config.evaluate = {"split": "test[:1000]", "features": "rain"}
    if stage == "first":
        config.diffusion = {"loss": "regression", "prediction": "x0", "variance": "fixed_small"}
        config.sample.sampler = "regression"
        config.evaluate.num_samples = 1_000
        return config
    config.diffusion = dict(base.FLOW)
    config.sample.sampler = "heun"
    config.sample.steps = "10"
    config.evaluate.num_samples = 8_000  # 8 members of each record
    return config
