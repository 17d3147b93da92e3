"""Digit scenes: real handwritten digits on a canvas, with colour, position, size and count.

Scene i of a split is a function of (seed, split, i) alone, so that a data set can have any number N
of scenes: it holds the first N. What a model has to learn is known exactly, and no digit of a test
scene occurs in a training scene.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ditjax.errors import UserError

SCENE_SIDE = 32
MAX_COUNT = 3
SIZES = (12, 16)  # smallest and largest side of a digit's box in pixels
DEFAULT_EXAMPLES = 20_000
TEST_SHARE = 10  # training scenes for each test scene

_SPLITS = ("train", "test")
_CLASSES = 10
_CONFIG = re.compile(r"([1-9]\d{1,7})(?:-seed(\d{1,9}))?")
_OVERLAP = 0.05  # largest share of a digit's ink that may fall on other digits
_PLACES, _LAYOUTS = 24, 4  # tries to place a digit, and to lay out the whole scene
_WORDS = 8 + _LAYOUTS * MAX_COUNT * (5 + 2 * _PLACES)  # the most that a scene can draw


class Handwriting(NamedTuple):
    """The digits of one split: ink f64[n,8,8] in [0, 1], and the records of each class."""

    ink: np.ndarray
    of_class: tuple[np.ndarray, ...]


def read_handwriting(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 digits: records i[n], ink f64[n,8,8] in [0, 16], classes i[n].

    Record i is in the split 'test' when i % 5 == 4, in 'train' otherwise.
    """
    # Imported here because only preparation needs scikit-learn.
    from sklearn.datasets import load_digits

    found = load_digits()
    chosen = np.flatnonzero((np.arange(len(found.target)) % 5 == 4) == (split == "test"))
    return chosen, found.images[chosen], found.target[chosen]


class Scene(NamedTuple):
    """image u8[32,32,3]; the class of all digits in it; boxes (row, column, size) of them."""

    image: np.ndarray
    label: int
    boxes: tuple[tuple[int, int, int], ...]


def load_handwriting(split: str) -> Handwriting:
    """The digits of one split of the data set 'digits'."""
    _, counts, target = read_handwriting(split)
    of_class = tuple(np.flatnonzero(target == label) for label in range(_CLASSES))
    return Handwriting(counts / 16, of_class)


def scene(digits: Handwriting, seed: int, split: str, index: int) -> Scene:
    """Scene `index` of a split: 1 to 3 digits of one class, which is the scene's label.

    Class and count are uniform. Each digit is by another hand and has its own size, colour and
    place, within the canvas and almost clear of the others. A digit that finds no room is left out.
    Half of the backgrounds are near black, the others darkly tinted.
    """
    u = scene_uniforms(seed, _SPLITS.index(split), index, _WORDS)
    label, count = int(next(u) * _CLASSES), 1 + int(next(u) * MAX_COUNT)
    background = _background(u)
    best: list[_Placed] = []
    for _ in range(_LAYOUTS):
        placed = _layout(digits, digits.of_class[label], count, u)
        if len(placed) > len(best):
            best = placed
        if len(best) == count:
            break
    canvas = np.broadcast_to(background, (SCENE_SIDE, SCENE_SIDE, 3)).copy()
    for each in best:
        row, column, size = each.box
        part = canvas[row : row + size, column : column + size]
        part += each.ink[:, :, None] * (each.colour - part)
    # Rounded to six places first, so that the last bit of a product cannot change a pixel.
    image = np.rint(np.round(255 * canvas, 6)).astype(np.uint8)
    return Scene(image, label, tuple(each.box for each in best))


class _Placed(NamedTuple):
    box: tuple[int, int, int]
    ink: np.ndarray
    colour: np.ndarray


def _layout(
    digits: Handwriting, candidates: np.ndarray, count: int, u: Iterator[float]
) -> list[_Placed]:
    """Place up to `count` digits, one after another."""
    taken = np.zeros((SCENE_SIDE, SCENE_SIDE))
    placed: list[_Placed] = []
    for _ in range(count):
        record = candidates[int(next(u) * len(candidates))]
        size = SIZES[0] + int(next(u) * (SIZES[1] - SIZES[0] + 1))
        colour = rgb(next(u), 0.3 + 0.7 * next(u), 0.75 + 0.25 * next(u))
        ink = magnified(digits.ink[record], size)
        places = [
            (int(next(u) * (SCENE_SIDE - size + 1)), int(next(u) * (SCENE_SIDE - size + 1)))
            for _ in range(_PLACES)
        ]
        for row, column in places:
            there = taken[row : row + size, column : column + size]
            if np.minimum(there, ink).sum() <= _OVERLAP * ink.sum():
                np.maximum(there, ink, out=there)
                placed.append(_Placed((row, column, size), ink, colour))
                break
    return placed


def magnified(ink: np.ndarray, size: int) -> np.ndarray:
    """Bilinear magnification with no ink outside: f64[8,8] -> f64[size,size]."""
    source = (np.arange(size) + 0.5) * len(ink) / size - 0.5
    tent = np.maximum(0, 1 - np.abs(source[:, None] - np.arange(len(ink))))
    return tent @ ink @ tent.T


def _background(u: Iterator[float]) -> np.ndarray:
    dark, hue, saturation, value = next(u) < 0.5, next(u), next(u), next(u)
    return (
        rgb(hue, 0, 0.08 * value) if dark else rgb(hue, 0.4 + 0.5 * saturation, 0.15 + 0.25 * value)
    )


def rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Hue, saturation, value in [0, 1] -> RGB f64[3] in [0, 1] (Smith 1978)."""
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue) % 6
    return value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))


def scene_uniforms(seed: int, stream: int, index: int, count: int) -> Iterator[float]:
    """The uniform numbers in [0, 1) that a scene draws, in order: `count` at most.

    Philox4x64-10 (Salmon et al. 2011) with key (seed, stream); scene i counts from i·2^64. NumPy
    promises never to change its words.
    """
    key = np.array([seed, stream], np.uint64)
    words = np.random.Philox(key=key, counter=index << 64).random_raw(count)
    return iter(((words >> np.uint64(11)) * 2.0**-53).tolist())


# ---- the data set


class SceneSet(NamedTuple):
    """The scenes of a configuration 'N' or 'N-seedS': N training scenes and N // 10 test scenes."""

    examples: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.examples}-seed{self.seed}" if self.seed else str(self.examples)


def parse_scene_set(config: str, name: str = "digit_scenes") -> SceneSet:
    """'20000' or '20000-seed1' -> SceneSet. Raises UserError."""
    match = _CONFIG.fullmatch(config)
    if match is None:
        raise UserError(
            f"data set '{name}/{config}': expected '{name}', '{name}/N' or"
            f" '{name}/N-seedS', with N from 10 to 99999999 training scenes."
        )
    return SceneSet(int(match[1]), int(match[2] or 0))


class GeneratedBuilder(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """A data set that is computed, by default from the digits: example i of a split is record i.

    `size` has a name, examples and a seed. There is one example of a test split for `TEST_SHARE` of
    the training split.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}
    KIND: ClassVar[str] = "Scenes"  # what the examples are
    TEST_SPLITS: ClassVar[tuple[str, ...]] = ("test",)
    HOMEPAGE: ClassVar[str] = "https://archive.ics.uci.edu/dataset/80"
    LICENSE: ClassVar[str] = "Creative Commons Attribution 4.0 (CC BY 4.0), as the digits are"

    def __init__(self, data_dir: Any, size: Any) -> None:
        self._size = size
        config = tfds.core.BuilderConfig(
            name=size.name,
            description=f"{self.KIND} 0 to {size.examples - 1} of seed {size.seed}.",
        )
        super().__init__(data_dir=data_dir, config=config, file_format="array_record")

    def info_of(self, description: str, features: Mapping[str, Any]) -> tfds.core.DatasetInfo:
        """What `_info` returns, by the description and the features."""
        return tfds.core.DatasetInfo(
            builder=self,
            description=description,
            features=tfds.features.FeaturesDict(dict(features)),
            supervised_keys=("image", "label"),
            homepage=self.HOMEPAGE,
            license=self.LICENSE,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # Nothing is downloaded.
        test = dict.fromkeys(self.TEST_SPLITS, self._size.examples // TEST_SHARE)
        counts = {"train": self._size.examples, **test}
        return {split: self._generate_examples(split, n) for split, n in counts.items()}


class DigitScenes(
    GeneratedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """Scenes as a data set: 32x32 RGB, ten classes, N training and N // 10 test scenes."""

    def _info(self) -> tfds.core.DatasetInfo:
        return self.info_of(
            "One to three real handwritten digits of one class on a 32x32 canvas, each of its"
            " own hand, size, colour and place; the class is the label. The digits are"
            " scikit-learn's load_digits: record i is in test scenes iff i % 5 == 4, and in"
            " training scenes otherwise. Scene i is a function of (seed, split, i).",
            {
                "image": tfds.features.Image(
                    shape=(SCENE_SIDE, SCENE_SIDE, 3), encoding_format="png"
                ),
                "label": tfds.features.ClassLabel(names=[str(d) for d in range(_CLASSES)]),
            },
        )

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        digits = load_handwriting(split)
        for i in range(count):
            made = scene(digits, self._size.seed, split, i)
            yield i, {"image": Image.fromarray(made.image), "label": made.label}
