"""PixArt-α as Chen et al. 2023 describe it: DiT-XL/2 with text blocks on latents, T5-XXL's tokens.

    ditjax train --config=pixart --workdir=runs/pixart --config.adapt.base=DiT-XL-2-256x256.pt
    ditjax train --config=pixart:512 --workdir=runs/pixart512 --config.adapt.base=runs/pixart
    ditjax plan --config=pixart --topology=v5e:16x16

Not run. The encoder is a folder of transformers (docs/text.md), the base the public class-
conditional DiT, from which it starts as docs/text2image.md says. The paper's internal data are not
public; its batch of 64 on each of 64 GPUs and its stages are not copied: `steps` is ours.
Hardware: the paper reports 753 days of an A100.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe for 256 pixels; '512' is the second stage."""
    side = int(arg or 256)
    config = ConfigDict({"task": "text2image"})
    config.text = ConfigDict({"encoder": "t5-v1_1-xxl", "tokenizer": "t5-v1_1-xxl"})
    config.text.update(width=4096, tokens=120)
    config.data = ConfigDict({"name": "laion400m/images", "num_classes": 1})
    config.data.update(flip=False, max_damaged=10_000)
    config.autoencoder = ConfigDict({"path": "sd-vae-ft-ema"})
    config.optim = ConfigDict({"learning_rate": 2e-5, "weight_decay": 0.03})
    config.train = ConfigDict({"steps": 200_000, "batch_size": 4096})
    config.sample = ConfigDict({"sampler": "dpmpp_2m", "steps": "20", "cfg_scale": 4.5})
    config.sample.update(cfg_channels="all")
    config.mesh = ConfigDict({"fsdp": 8})
    if side != 256:
        config.data.image_size = side
    return config
