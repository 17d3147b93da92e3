"""A data set of two classes: images that are light on the left, and on the right."""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class Sides(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=["left", "right"]),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(64, 0), "test": self._generate_examples(32, 1)}

    def _generate_examples(self, count: int, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
        rng = np.random.default_rng(seed)
        for i in range(count):
            image = rng.integers(0, 64, (8, 8, 1), dtype=np.uint8)
            image[:, 4 * (i % 2) : 4 * (i % 2) + 4] += np.uint8(160)
            # Of an array tensorflow-datasets would need TensorFlow to make a PNG.
            yield i, {"image": Image.fromarray(image[..., 0]), "label": i % 2}


class SizedSides(Sides):
    """The same, of a builder that has configurations: the first is the default."""

    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name="small", description="8x8"),
        tfds.core.BuilderConfig(name="smaller", description="8x8, too"),
    ]
