"""The guidance ablation, small: scale x guided channels of a latent DiT on digits.

    bash launch/digits_latent.sh
    RUN=runs/digits_latent/dit OUT=runs/small/guidance
    python -m ditjax.grid --workdir=$RUN --out=$OUT --cfg_channels=three,all --cfg_scale=1,1.5,2,4

It runs on latents, because the release guides three of their four channels; grey or RGB pixels have
no fourth. It asks how the scale affects fidelity and variety, and whether the fourth channel
matters.
Two cores: 5 minutes for the training and 3 for the cells, estimated; not yet run in full.
"""

from ml_collections import ConfigDict

from .. import digits_latent


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe of the runs: experiments/digits_latent.py."""
    return digits_latent.get_config(arg)
