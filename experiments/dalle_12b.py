"""DALL·E at the size of Ramesh et al. 2021: 12 billion parameters, 250 million pairs.

    ditjax train --config=dalle_12b:dvae --workdir=runs/dalle_dvae
    ditjax train --config=dalle_12b --workdir=runs/dalle

Not run. Sizes, batches, steps and rates are the paper's (App. A.2, B.2), which trained on 1,024
V100s. Its data are not public; `laion400m/images` and `captions:` shards of CC12M are. Instead of
training the discrete VAE, name the folder of openai/DALL-E's files as config.tokens.dvae.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; 'dvae' is the discrete VAE."""
    config = ConfigDict({"task": "dvae" if arg == "dvae" else "tokens"})
    config.data = ConfigDict({"name": "laion400m/images", "num_classes": 1})
    config.data.update(flip=False, max_damaged=10_000)
    config.train = ConfigDict({"sample_every_steps": 0})
    if arg == "dvae":
        config.optim = ConfigDict({"learning_rate": 1e-4, "schedule": "cosine"})
        config.optim.update(weight_decay=1e-4)
        config.train.update(steps=3_000_000, batch_size=512, ema_decay=0.999)
        return config
    config.model = ConfigDict({"attention": "sparse", "dtype": "bfloat16"})
    config.text = ConfigDict({"tokens": 256})
    config.tokens = ConfigDict({"dvae": "runs/dalle_dvae"})
    config.optim = ConfigDict({"learning_rate": 4.5e-4, "warmup_steps": 5000, "clip_norm": 4.0})
    config.optim.update(b2=0.96, weight_decay=4.5e-2, decay="kernels")
    config.train.update(steps=430_000, batch_size=1024)
    config.mesh = ConfigDict({"fsdp": -1, "data": 1})
    return config
