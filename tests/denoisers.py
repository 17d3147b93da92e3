"""Small networks that only remove noise from grey images, and the least error of Gaussian ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ditjax import train
from ditjax.sampling.pipeline import Pipeline


class GreyImages(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """A data set of computed grey images of one class."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}
    SIDE: ClassVar[int]
    LABEL: ClassVar[str]
    COUNTS: ClassVar[dict[str, int]]  # of each split

    def images(self, rng: np.random.Generator, count: int) -> Iterator[np.ndarray]:
        """So many images u8[SIDE,SIDE] of the split that `rng` is of."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(self.SIDE, self.SIDE, 1), encoding_format="png")
        label = tfds.features.ClassLabel(names=[self.LABEL])
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in self.COUNTS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        rng = np.random.default_rng(list(self.COUNTS).index(split))
        for i, image in enumerate(self.images(rng, self.COUNTS[split])):
            yield i, {"image": Image.fromarray(image), "label": 0}


def trained(size: str, workdir: Path, own: dict[str, Any]) -> Pipeline:
    """The network of a run, which is trained now unless it is there; `own` are keys of its recipe.

    It predicts the velocity of a flow.
    """
    words = {
        "data.num_classes": 1,
        "diffusion.process": "flow",
        "diffusion.prediction": "velocity",
        "diffusion.loss": "simple",
        "diffusion.variance": "none",
        "train.ema_decay": 0.999,
        "train.sample_every_steps": 0,
        "train.evaluate_every_steps": 0,
        "evaluate.features": "none",
        "sample.sampler": "heun",
        "sample.steps": 10,
        "sample.eta": 0.0,
        **own,
    }
    flags = [f"--config.{key}={value}" for key, value in words.items()]
    status = train.main([f"--config=digits:{size}", f"--workdir={workdir}", *flags])
    if status:
        raise SystemExit(status)
    return Pipeline.from_pretrained(str(workdir))


def linear_mean(
    y: np.ndarray, mean: np.ndarray, cov: np.ndarray, sigma: float
) -> tuple[np.ndarray, float]:
    """Of Gaussian rows f64[N,D] with noise: their means given y, and the expected squared error."""
    gain = cov @ np.linalg.inv(cov + sigma**2 * np.eye(len(cov)))
    return mean + (y - mean) @ gain.T, float(sigma**2 * np.trace(gain) / len(cov))
