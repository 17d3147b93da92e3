"""DiT table 5: three decoders of the same latents. XL/2, 256 pixels, guidance 1.5.

    for D in ft-mse ft-ema original; do
      C=experiments/paper/decoders.py:$D
      python -m ditjax.grid --workdir=$RUN --cfg_scale=1.5 --published=$C --out=$RUN/decoder-$D \
        --config.autoencoder.path=$DECODER
    done

$RUN is the run of imagenet256.py in this folder: nothing is trained, because all three share the
encoder. $DECODER is vae-ft-mse-840000-ema-pruned.ckpt, vae-ft-ema-560000-ema-pruned.ckpt, or the f8
autoencoder of latent diffusion, as in Stable Diffusion 1 (a folder named kl-f8, for example). A
result identifies a decoder by the SHA-256 of its weights, and its name by the file's name.

Published (FID, sFID, IS, precision, recall): original 2.46, 5.18, 271.56, .82, .57; ft-MSE 2.30,
4.73, 276.09, .83, .57; ft-EMA 2.27, 4.60, 278.24, .83, .57.
Hardware and hours, computed and not measured: each on h100:8 (8 chips), .208 hours of sampling at
best. Not run.
"""

from ml_collections import ConfigDict

from . import imagenet256, published, table4

FILES = {"ft-MSE": table4.DECODER, "ft-EMA": imagenet256.DECODER, "original": "kl-f8"}


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the run's recipe with decoder 'ft-mse', 'ft-ema' (default) or 'original'.

    Raises ValueError for other names.
    """
    names = {name.lower(): name for name in FILES}
    name = names.get(arg or "ft-ema")
    if name is None:
        raise ValueError(f"{arg!r}: expected one of {', '.join(names)}")
    config = imagenet256.get_config()
    config.autoencoder.path = FILES[name]
    config.sample.cfg_scale = 1.5
    config.sweep.title = f"DiT table 5: the {name} decoder"
    config.sweep.published = published.figures(
        published.scores(published.DECODERS[name]),
        model__size="XL",
        model__patch=2,
        train__steps=imagenet256.STEPS,
        sample__cfg_scale=1.5,
    )
    config.sweep.published_protocol = published.protocol(decoder=name, leave=("steps", "cfg_scale"))
    config.sweep.published_source = f"{published.PAPER}, table 5"
    return config
