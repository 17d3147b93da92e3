"""The paper's recipe: DiT-XL/2 on ImageNet 256x256 latents. The other recipes build on it.

    ditjax train --config=base:S/4 --workdir=runs/mine --config.data.name=folder:/data/birds ...

A recipe sets only what differs from the paper's values, which are the defaults of the keys
(`ditjax/config.py`, and the files of tasks and networks). A run's `config.json` has every key.
"""

from ml_collections import ConfigDict

SECTIONS = (
    "model",
    "diffusion",
    "data",
    "autoencoder",
    "optim",
    "train",
    "mesh",
    "distributed",
    "sample",
    "evaluate",
    "sweep",
)

# For `config.diffusion`: flow matching with uniform times, and with those of Stable Diffusion 3.
UNIFORM_FLOW = {
    "process": "flow",
    "prediction": "velocity",
    "loss": "simple",
    "variance": "none",
}
FLOW = {**UNIFORM_FLOW, "time": "logit_normal"}


def get_config(arg: str = "XL/2") -> ConfigDict:
    """Return the recipe of DiT-SIZE/PATCH, as the paper trains it. Raises ValueError."""
    size, _, patch = arg.partition("/")
    if not (size and patch.isdecimal() and len(patch) < 7):
        raise ValueError(f"{arg!r}: expected SIZE/PATCH, such as '{size or 'XL'}/2' or '4x96x3/1'")
    config = ConfigDict({section: {} for section in SECTIONS})
    config.model.size = size
    config.model.patch = int(patch)
    return config
