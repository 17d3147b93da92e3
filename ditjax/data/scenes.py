"""Digit scenes: real handwritten digits on a canvas, with colour, position, size and count.

There are as many as one asks for: scene i of a split is a function of (seed, split, i) alone, and a
data set of N is the first N. What is in it that a model must learn is known, and a scene of the
test split holds no digit that a training scene holds.
"""

import re
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ditjax.errors import UserError

SIDE = 32
MAX_COUNT = 3
SIZES = (12, 16)  # of a digit's box in pixels, both included
DEFAULT_EXAMPLES = 20_000
TEST_SHARE = 10  # one test scene for so many training scenes

_SPLITS = ("train", "test")
_CLASSES = 10
_CONFIG = re.compile(r"([1-9]\d{1,7})(?:-seed(\d{1,9}))?")
_OVERLAP = 0.05  # of a digit's ink may fall on that of others
_PLACES, _LAYOUTS = 24, 4  # tries for a digit, and for the whole scene
_WORDS = 8 + _LAYOUTS * MAX_COUNT * (5 + 2 * _PLACES)  # as many as a scene may take


class Digits(NamedTuple):
    """The digits of one split: ink f64[n,8,8] in [0, 1], and the records of each class."""

    ink: np.ndarray
    of_class: tuple[np.ndarray, ...]


def handwritten(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 digits: records i[n], ink f64[n,8,8] of 0 to 16, classes i[n].

    Record i is in the split 'test' when i % 5 == 4, in 'train' otherwise.
    """
    # Imported here: only a preparation needs scikit-learn, reading does not.
    from sklearn.datasets import load_digits

    found = load_digits()
    chosen = np.flatnonzero((np.arange(len(found.target)) % 5 == 4) == (split == "test"))
    return chosen, found.images[chosen], found.target[chosen]


class Scene(NamedTuple):
    """image u8[32,32,3]; the class of all digits in it; boxes (row, column, size) of them."""

    image: np.ndarray
    label: int
    boxes: tuple[tuple[int, int, int], ...]


def load(split: str) -> Digits:
    """The digits of the data set 'digits', and its split."""
    _, counts, target = handwritten(split)
    of_class = tuple(np.flatnonzero(target == label) for label in range(_CLASSES))
    return Digits(counts / 16, of_class)


def scene(digits: Digits, seed: int, split: str, index: int) -> Scene:
    """Scene `index` of a split: 1 to 3 digits of one class, and the class is the scene's label.

    A uniform class; a uniform count; each digit another hand's, of its own size, colour and place,
    within the canvas and all but clear of the others. Where they find no room, fewer are there. The
    background is near black or darkly tinted, each for half of the scenes.
    """
    u = _uniforms(seed, split, index)
    label, count = int(next(u) * _CLASSES), 1 + int(next(u) * MAX_COUNT)
    background = _background(u)
    best: list[_Placed] = []
    for _ in range(_LAYOUTS):
        placed = _layout(digits, digits.of_class[label], count, u)
        if len(placed) > len(best):
            best = placed
        if len(best) == count:
            break
    canvas = np.broadcast_to(background, (SIDE, SIDE, 3)).copy()
    for each in best:
        row, column, size = each.box
        part = canvas[row : row + size, column : column + size]
        part += each.ink[:, :, None] * (each.colour - part)
    # To six places first: a last bit of a product must not turn a pixel.
    image = np.rint(np.round(255 * canvas, 6)).astype(np.uint8)
    return Scene(image, label, tuple(each.box for each in best))


class _Placed(NamedTuple):
    box: tuple[int, int, int]
    ink: np.ndarray
    colour: np.ndarray


def _layout(
    digits: Digits, candidates: np.ndarray, count: int, u: Iterator[float]
) -> list[_Placed]:
    """As many of `count` digits as find a place, one after another."""
    taken = np.zeros((SIDE, SIDE))
    placed: list[_Placed] = []
    for _ in range(count):
        record = candidates[int(next(u) * len(candidates))]
        size = SIZES[0] + int(next(u) * (SIZES[1] - SIZES[0] + 1))
        colour = _rgb(next(u), 0.3 + 0.7 * next(u), 0.75 + 0.25 * next(u))
        ink = magnified(digits.ink[record], size)
        places = [
            (int(next(u) * (SIDE - size + 1)), int(next(u) * (SIDE - size + 1)))
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
    """Bilinear, no ink outside: f64[8,8] -> f64[size,size]."""
    source = (np.arange(size) + 0.5) * len(ink) / size - 0.5
    tent = np.maximum(0, 1 - np.abs(source[:, None] - np.arange(len(ink))))
    return tent @ ink @ tent.T


def _background(u: Iterator[float]) -> np.ndarray:
    dark, hue, saturation, value = next(u) < 0.5, next(u), next(u), next(u)
    return (
        _rgb(hue, 0, 0.08 * value)
        if dark
        else _rgb(hue, 0.4 + 0.5 * saturation, 0.15 + 0.25 * value)
    )


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Smith 1978: hue, saturation, value in [0, 1] -> f64[3] in [0, 1]."""
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue) % 6
    return value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))


def _uniforms(seed: int, split: str, index: int) -> Iterator[float]:
    """Uniform numbers in [0, 1) of a scene, in order.

    Philox4x64-10 (Salmon et al. 2011), whose words NumPy promises never to change: the key is
    (seed, split), and scene i counts from i·2^64.
    """
    key = np.array([seed, _SPLITS.index(split)], np.uint64)
    words = np.random.Philox(key=key, counter=index << 64).random_raw(_WORDS)
    return iter(((words >> np.uint64(11)) * 2.0**-53).tolist())


# ---- the data set


class Size(NamedTuple):
    """Which scenes a configuration holds, 'N' or 'N-seedS': N to train on, N // 10 to test."""

    examples: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.examples}-seed{self.seed}" if self.seed else str(self.examples)


def parse_size(config: str) -> Size:
    """'20000' or '20000-seed1' -> Size. Raises UserError."""
    match = _CONFIG.fullmatch(config)
    if match is None:
        raise UserError(
            f"data set 'digit_scenes/{config}': expected 'digit_scenes', 'digit_scenes/N' or"
            " 'digit_scenes/N-seedS', with N from 10 to 99999999 training scenes."
        )
    return Size(int(match[1]), int(match[2] or 0))


class DigitScenes(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """`scene`s as a data set: 32x32 RGB, ten classes, N to train on and N // 10 to test."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}

    def __init__(self, data_dir: Any, size: Size) -> None:
        self._size = size
        config = tfds.core.BuilderConfig(
            name=size.name,
            description=f"Scenes 0 to {size.examples - 1} of seed {size.seed}.",
        )
        super().__init__(data_dir=data_dir, config=config, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "One to three real handwritten digits of one class on a 32x32 canvas, each of its"
                " own hand, size, colour and place; the class is the label. The digits are"
                " scikit-learn's load_digits: record i is in test scenes iff i % 5 == 4, and in"
                " training scenes otherwise. Scene i is a function of (seed, split, i)."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(d) for d in range(_CLASSES)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            license="Creative Commons Attribution 4.0 (CC BY 4.0), as the digits are",
            # Scene i is record i.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # Nothing is downloaded.
        counts = {"train": self._size.examples, "test": self._size.examples // TEST_SHARE}
        return {split: self._generate_examples(split, n) for split, n in counts.items()}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        digits = load(split)
        for i in range(count):
            made = scene(digits, self._size.seed, split, i)
            yield i, {"image": Image.fromarray(made.image), "label": made.label}
