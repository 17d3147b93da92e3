"""DiT-XL/2 at 256x256, tuned on a reward by DDPO with LoRA: compressibility, without a classifier.

    ditjax train --config=imagenet256_reward --workdir=runs/reward

Not run. 200 rounds of 256 chains, two updates each, 50 steps of DDIM with η = 1 and guidance 4, as
Black et al. 2023 tuned Stable Diffusion. An update of 128 chains costs 128 x 100 evaluations to
draw, and four times as much to differentiate, one of them again in the backward pass. Before a
claim: a classifier of ImageNet as the reward, another one as its judge, and FID.
"""

from ml_collections import ConfigDict

from . import imagenet256


def get_config(arg: str = "XL/2") -> ConfigDict:
    """Return the recipe of DiT-SIZE/PATCH."""
    config = imagenet256.get_config(arg)
    config.model.dtype = "float32"  # of the ratio, which two updates clip
    config.sweep.grid = ()
    config.adapt = {"base": "DiT-XL-2-256x256.pt", "kind": "lora", "rank": 16}
    config.adapt.targets = r"blocks/attn/.*"
    config.reward = {"method": "ddpo", "source": "jpeg", "updates": 2}
    config.optim.learning_rate = 3e-4
    config.optim.clip_norm = 1.0
    config.train.steps = 400
    config.train.batch_size = 128
    config.train.ema_decay = 0.99
    config.train.log_every_steps = 2
    config.train.checkpoint_every_steps = 10
    config.sample.sampler = "ddim"
    config.sample.steps = "ddim50"
    config.sample.eta = 1.0
    config.sample.cfg_scale = 4.0
    return config
