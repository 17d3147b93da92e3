"""Text-to-image, small: 32x32 caption scenes, and what a text's tokens are worth beside one vector.

    ditjax train --config=small/clip --workdir=runs/small/clip
    ditjax sweep --config=small/text2image --workdir=runs/small/text2image
    ditjax train --config=small/text2image:shuffled --workdir=runs/small/text2image_shuffled
    ditjax evaluate --workdir=runs/small/text2image_shuffled
    ditjax evaluate --workdir=RUN --config.evaluate.split=test_heldout
    ditjax sweep --config=small/text2image:binding --workdir=runs/small/text2image_binding

It asks whether samples show the digit, colour and place that a caption names, also in pairs of
digit and colour that no training scene shows. Arms of the study: the tokens of a text, or its one
vector, and two sizes of the network. The baseline, 'shuffled', learns from the captions of other
images, so that it can only guess. 'binding' asks, with three seeds of the small network, how often
the two digits of a scene have the colours that the caption gives them. 'minilm' takes the tokens
of all-MiniLM-L6-v2 in place of CLIP's:

    ditjax train --config=small/text2image:minilm --workdir=runs/small/text2image_minilm \
      --config.text.encoder=MINILM --config.text.tokenizer=MINILM

Hardware, time and the result: docs/text2image.md, "A small study".
"""

from ml_collections import ConfigDict

from ..base import FLOW

POOLED = (("text.features", "pooled"), ("text.width", 64))  # CLIP's vector of a text


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; 'shuffled' is the baseline, 'binding' and 'minilm' are other arms."""
    config = ConfigDict({"task": "text2image"})
    config.model = ConfigDict({"size": "4x96x4", "patch": 4})
    config.data = ConfigDict({"name": "caption_scenes", "image_size": 32, "num_classes": 10})
    config.data.update(flip=False, threads=1)
    config.autoencoder = ConfigDict({"kind": "none"})
    config.text = ConfigDict({"encoder": "runs/small/clip", "width": 96, "tokens": 12})
    config.diffusion = ConfigDict({**FLOW, "prediction": "x0"})
    config.optim = ConfigDict({"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 100})
    config.train = ConfigDict({"steps": 20000, "batch_size": 32, "ema_decay": 0.999})
    config.train.update(log_every_steps=200, checkpoint_every_steps=1000, keep_checkpoints=1)
    config.train.update(sample_every_steps=5000)
    config.sample = ConfigDict({"sampler": "heun", "steps": "20", "cfg_scale": 3.0})
    config.sample.update(cfg_channels="all", batch_size=128, num=16)
    config.evaluate = ConfigDict({"features": "captions", "split": "test", "num_samples": 800})
    config.evaluate.update(reference="caption_scenes/train[:5000]", val_loss_num=2000)
    if arg == "shuffled":
        config.data.name = "ditjax.data.caption_scenes.ShuffledCaptionScenes"
    elif arg == "minilm":
        config.text.update(encoder="all-MiniLM-L6-v2", tokenizer="all-MiniLM-L6-v2")
        config.text.update(width=384, tokens=16, cache=True)
    elif arg == "binding":
        config.model.size = "2x48x3"
        config.train.steps = 6000  # enough for colours
        config.sweep = ConfigDict({"title": "Colours of two digits", "lists": ((), POOLED)})
        config.sweep.seeds = (0, 1, 2)
    else:
        config.sweep = ConfigDict({"title": "Text-to-image of caption scenes"})
        config.sweep.grid = (("model.size", ("2x48x3", "4x96x4")),)
        config.sweep.lists = ((), POOLED)
    return config
