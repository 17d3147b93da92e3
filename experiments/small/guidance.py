"""The guidance ablation, small: scale x guided channels of a latent DiT on digits.

    bash launch/digits_latent.sh
    RUN=runs/digits_latent/dit OUT=runs/small/guidance
    python -m ditjax.grid --workdir=$RUN --out=$OUT --cfg_channels=three,all --cfg_scale=1,1.5,2,4

On latents, because the release guides three of their four channels; of grey or RGB pixels three are
all. Asks what a scale does to fidelity and variety, and whether the fourth channel matters.
Two cores: 5 minutes for the training and 3 for the cells, estimated; not run whole by us yet.
"""

from ml_collections import ConfigDict

from .. import digits_latent


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe of the runs: experiments/digits_latent.py."""
    return digits_latent.get_config(arg)
