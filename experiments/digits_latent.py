"""The latent path on real digits: autoencoder, latents, DiT on latents, decoded samples.

    R=runs/digits_latent; C=experiments/digits_latent.py
    python -m ditjax.train --config=$C:autoencoder --workdir=$R/autoencoder
    python -m ditjax.encode --config=$C --out=$R/latents
    python -m ditjax.train --config=$C --workdir=$R/dit --config.data.name=latents:$R/latents
    python -m ditjax.sample --config=$C --workdir=$R/dit
    python -m ditjax.evaluate --config=$C --workdir=$R/dit

1,438 digits of 8x8 pixels are upsampled to 32x32; latents are 8x8x4. The commands are those for
ImageNet, with a small autoencoder trained here instead of the published one; `bash
launch/digits_latent.sh` runs them. Hardware, minutes and expected result: docs/results.md, "The
latent path".
"""

from ml_collections import ConfigDict

from . import digits


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the DiT's recipe, or with 'autoencoder' that of its autoencoder."""
    if arg not in (None, "autoencoder"):
        raise ValueError(f"digits_latent takes 'autoencoder' or nothing, not {arg!r}")
    config = digits.get_config("4x96x3/2")
    config.data.image_size = 32
    config.autoencoder.kind = "kl"
    config.autoencoder.path = "runs/digits_latent/autoencoder"
    config.autoencoder.base_width = 16
    config.autoencoder.multipliers = (1, 2, 2)
    config.autoencoder.res_blocks = 1
    config.autoencoder.groups = 8
    # 1 / standard deviation of this autoencoder's latents, measured on the training split.
    config.autoencoder.scale = 0.66
    config.autoencoder.kl_weight = 1e-3
    config.train.steps = 8000
    config.train.evaluate_every_steps = 0
    config.sample.clip_x0 = False
    config.sweep.grid = ()
    if arg is None:
        return config
    config.task = "autoencoder"
    config.autoencoder.path = ""
    config.train.steps = 400
    config.train.log_every_steps = 20
    config.optim.learning_rate = 2e-3
    for section in ("model", "diffusion", "sample"):  # keys of the DiT's task
        del config[section]
    return config
