"""CLIP score: the cosine of a sample and its caption as a CLIP embeds them (Hessel et al. 2021)."""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ditjax.errors import UserError, shown
from ditjax.models.clip import CLIP
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening
from ditjax.tasks import text_conditions
from ditjax.tasks.clip import opened_clip

_PREPROCESSOR = "preprocessor_config.json"


def clip_scores(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """max(100 cos, 0) of unit vectors f[B,E] each -> f64[B].

    The paper's weight is 2.5 in the place of 100; this is torchmetrics' `CLIPScore`.
    """
    cosine = (image.astype(np.float64) * text.astype(np.float64)).sum(1)
    return np.maximum(100 * cosine, 0)


class ClipScorer:
    """The CLIP at a path: a folder of transformers with its tokenizer, or a run of CLIP.

    `tokenizer` and `tokens` are what its texts are read by; `protocol` fixes what a score means.
    Raises UserError for another network.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        opened = opened_clip(os.fspath(path), "evaluate.clip")
        config, params = opened.config, opened.load(make_mesh(-1, 1))["params"]
        if opened.recipe:
            text, mean, std = opened.recipe.text, (0.5,) * 3, (0.5,) * 3
            self.tokenizer, self.tokens = text.tokenizer, text.tokens
        else:
            mean, std = _normalisation(Path(path))
            self.tokenizer, self.tokens = os.fspath(path), config.text.positions
        self._side = config.image.side
        self._mean, self._std = (np.asarray(each, np.float32) for each in (mean, std))
        self._apply: Any = jax.jit(CLIP(config).apply, static_argnames="method")
        self._variables = {"params": params}
        self.protocol: Mapping[str, Any] = {
            "clip": {
                "sha256": opening.digest(params),
                "tokenizer": text_conditions.tokenizer_of(self.tokenizer).sha256,
                "tokens": self.tokens,
                "resize": f"bicubic to {self._side}",
                "weight": 100,
            }
        }

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """Images u8[B,S,S,3] -> unit vectors f32[B,E]."""
        if images.shape[1] != self._side:
            size = (self._side, self._side)
            resized = [Image.fromarray(x).resize(size, Image.Resampling.BICUBIC) for x in images]
            images = np.stack([np.asarray(each) for each in resized])
        x = (images.astype(np.float32) / np.float32(255) - self._mean) / self._std
        return np.asarray(self._apply(self._variables, jnp.asarray(x), method="embed_image"))

    def embed_texts(self, ids: np.ndarray) -> np.ndarray:
        """Token ids i32[B,M] -> unit vectors f32[B,E]."""
        return np.asarray(self._apply(self._variables, jnp.asarray(ids), method="embed_text"))


def _normalisation(folder: Path) -> tuple[Any, Any]:
    """The mean and deviation of the channels that a folder states. Raises UserError without."""
    try:
        stated = json.loads((folder / _PREPROCESSOR).read_bytes())
        mean, std = stated["image_mean"], stated["image_std"]
        found = np.asarray([mean, std], np.float64)
        if found.shape != (2, 3) or not np.isfinite(found).all() or (found[1] <= 0).any():
            raise ValueError(shown([mean, std]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / _PREPROCESSOR}: expected image_mean and image_std, three numbers each"
            f" ({type(error).__name__}: {error})."
        ) from None
    return mean, std


@functools.lru_cache(maxsize=2)
def open_scorer(path: str) -> ClipScorer:
    """The CLIP at a path, read once."""
    return ClipScorer(path)
