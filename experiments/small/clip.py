"""CLIP, small: 32x32 caption scenes, and the baselines of its scores.

    ditjax train --config=small/clip --workdir=runs/small/clip
    ditjax evaluate --workdir=runs/small/clip
    ditjax evaluate --workdir=runs/small/clip --config.evaluate.split=test_heldout
    ditjax train --config=small/clip:shuffled --workdir=runs/small/clip_shuffled

It asks whether the towers learn digit, colour and place from captions alone. The baseline is the
same run with the captions of other images, 'shuffled', whose scores are those of chance. Pairs of
digit and colour in test_heldout were never seen together in training.
Hardware, time and the result: docs/clip.md, "A small study".
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; 'shuffled' trains on captions of other images."""
    config = ConfigDict({"task": "clip"})
    config.model = ConfigDict({"size": "4x96x4", "text_size": "2x96x4"})
    config.model.update(patch=8, embedding=64, vocabulary=360, end=1)
    config.text = ConfigDict({"tokens": 12})
    config.data = ConfigDict({"name": "caption_scenes", "image_size": 32, "num_classes": 10})
    config.data.update(flip=False, threads=1)
    if arg == "shuffled":
        config.data.name = "ditjax.data.caption_scenes.ShuffledCaptionScenes"
    config.clip = ConfigDict({"targets": "captions"})
    config.clip.templates = (
        ("digit", "the digit {}"),
        ("colour", "a {} digit"),
        ("place", "a digit at the {}"),
    )
    config.optim = ConfigDict({"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 100})
    config.optim.update(b2=0.98, eps=1e-6, weight_decay=0.05, decay="kernels")
    config.train = ConfigDict({"steps": 4000, "batch_size": 128, "ema_decay": 0.99})
    config.train.update(log_every_steps=200, checkpoint_every_steps=1000, keep_checkpoints=1)
    config.train.update(sample_every_steps=0)
    config.evaluate = ConfigDict({"split": "test"})
    return config
