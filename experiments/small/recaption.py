"""Recaptioning, small: text to image from alt texts, and from what a captioner writes instead.

    ditjax train --config=small/clip --workdir=runs/small/clip
    ditjax train --config=small/recaption:captioner --workdir=runs/small/captioner
    ditjax evaluate --workdir=runs/small/captioner
    ditjax sweep --config=small/recaption --workdir=runs/small/recaption --jobs=2
    ditjax evaluate --workdir=RUN --config.evaluate.split=train[:800] --out=RUN/alt.json

The training captions leave out 60 % of the attributes of a scene and get 15 % wrong. The captioner
has seen 2,000 clean pairs. The arms give its captions to 0, 65, 80, 95 and 100 % of the records.
The last command scores a run on prompts like the alt texts: what writing all captions anew costs
shows there, if anywhere. Print the captioner's score first; no arm can be better than it.
Hardware, time and the result of two seeds: docs/dalle3.md, "A small study".
"""

from ml_collections import ConfigDict

from . import clip, text2image

SHARES = (0.0, 0.65, 0.8, 0.95, 1.0)
CLIP = "runs/small/clip"


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the study's recipe; 'captioner' trains the captioner. Raises ValueError."""
    if arg not in (None, "captioner"):
        raise ValueError(f"{arg!r}: expected 'captioner', or nothing")
    if arg == "captioner":
        config = clip.get_config()
        config.task = "captioner"
        config.model = ConfigDict({"size": "3x96x4", "vocabulary": 360, "end": 1})
        config.text.captions = "first"
        config.data.split = "train[:2000]"
        del config.clip
        config.captioner = ConfigDict({"clip": CLIP})
        config.train.steps = 2000
        config.train.batch_size = 64
        return config
    config = text2image.get_config()
    config.data.name = "ditjax.data.caption_scenes.AltCaptionScenes"
    config.text.captioner = "runs/small/captioner"
    config.train.steps = 6000  # enough for colours and places
    config.sweep = ConfigDict({"title": "A share of written captions"})
    config.sweep.grid = (("text.synthetic_share", SHARES),)
    config.sweep.seeds = (0, 1, 2)
    return config
