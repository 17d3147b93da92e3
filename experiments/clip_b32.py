"""CLIP-B/32 as Radford et al. 2021 trained it: 400 million pairs, 32 epochs, batches of 32,768.

    ditjax train --config=clip_b32 --workdir=runs/clip_b32 --config.data.name=captions:SHARDS

Not run. The tokenizer is the folder of a CLIP of transformers (docs/text.md), or its two files. The
paper's data are not public; `laion400m/images` and `captions:` shards of CC12M are.
Hardware: the paper used 256 V100s; 32,768 pairs are 128 for each of 256 devices.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; the network's defaults are those of B/32."""
    config = ConfigDict({"task": "clip"})
    config.text = ConfigDict({"tokenizer": "clip-vit-base-patch32"})
    config.data = ConfigDict({"name": "laion400m/images", "image_size": 224, "num_classes": 1})
    config.data.update(flip=False, max_damaged=10_000)
    config.clip = ConfigDict({"form": "local"})
    config.optim = ConfigDict({"learning_rate": 5e-4, "schedule": "cosine", "warmup_steps": 2000})
    config.optim.update(b2=0.98, eps=1e-6, weight_decay=0.2, decay="kernels")
    config.train = ConfigDict({"steps": 390_625, "batch_size": 32_768})
    config.train.update(sample_every_steps=0)
    config.mesh = ConfigDict({"fsdp": 8})
    return config
