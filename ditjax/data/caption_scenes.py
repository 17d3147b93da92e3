"""Caption scenes: one or two handwritten digits of a colour, a size and a place, with captions.

Scene i of a split is a function of (seed, split, i), as in `data/scenes.py`. What a caption says is
known exactly. Some pairs of digit and colour are in no training scene: the split 'test_heldout'
shows these alone, so that it measures whether a model combines what it learned.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ditjax.data.scenes import (
    DEFAULT_EXAMPLES,
    SCENE_SIDE,
    GeneratedBuilder,
    Handwriting,
    SceneSet,
    load_handwriting,
    magnified,
    rgb,
    scene_uniforms,
)

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INK_COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
HUES = (0, 30, 60, 120, 180, 225, 275, 320)  # degrees
SCENE_SIZES = {"small": 12, "large": 16}  # side of a digit's box in pixels
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
CAPTIONED_SPLITS = ("train", "test", "test_heldout")
_FIRST_STREAM = 16  # of Philox, behind those of digit scenes
_JITTER = 6  # degrees of hue
_WORDS = 40


def is_held_out(digit: int, colour: int) -> bool:
    """Whether no training scene shows a digit in a colour: 10 of the 80 pairs."""
    return (digit + colour) % len(INK_COLOURS) == 0


class Thing(NamedTuple):
    """A digit of a scene: indices into DIGIT_NAMES, INK_COLOURS, SCENE_SIZES and PLACES."""

    digit: int
    colour: int
    size: int
    place: int


class CaptionScene(NamedTuple):
    """image u8[32,32,3], its one or two digits, and what is true of it, the fullest first."""

    image: np.ndarray
    things: tuple[Thing, ...]
    captions: tuple[str, ...]


def _an(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' and words[:3] != 'one' else 'a'} {words}"


def single_captions(thing: Thing) -> tuple[str, ...]:
    """Six captions of a scene with one digit; each names some of its attributes."""
    digit, colour, place = DIGIT_NAMES[thing.digit], INK_COLOURS[thing.colour], PLACES[thing.place]
    size = tuple(SCENE_SIZES)[thing.size]
    return (
        f"{_an(size)} {colour} {digit} at the {place}",
        _an(f"{colour} {digit}"),
        f"the digit {digit}",
        _an(f"{colour} digit"),
        f"a digit at the {place}",
        f"{_an(size)} {digit} at the {place}",
    )


def pair_captions(first: Thing, second: Thing, relation: str) -> tuple[str, ...]:
    """Four captions of a scene with two digits; `relation` is 'left of' or 'above'."""
    a, b = DIGIT_NAMES[first.digit], DIGIT_NAMES[second.digit]
    of_a, of_b = INK_COLOURS[first.colour], INK_COLOURS[second.colour]
    return (
        f"{_an(of_a)} {a} {relation} {_an(of_b)} {b}",
        f"{_an(of_a)} {a} and {_an(of_b)} {b}",
        f"{_an(a)} {relation} {_an(b)}",
        f"{_an(of_a)} digit {relation} {_an(of_b)} digit",
    )


def _corner(place: int, size: int) -> tuple[int, int]:
    """The upper left corner of a box of side `size` in one of the 3x3 places."""
    room = SCENE_SIDE - size
    return place // 3 * room // 2, place % 3 * room // 2


def caption_scene(digits: Handwriting, seed: int, split: str, index: int) -> CaptionScene:
    """Scene `index` of a split: one digit in three of four scenes, else two in opposite places.

    Digit and colour are uniform over the pairs that the split shows; the background is near black.
    """
    u = scene_uniforms(seed, _FIRST_STREAM + CAPTIONED_SPLITS.index(split), index, _WORDS)

    def below(count: int) -> int:
        return int(next(u) * count)

    every = itertools.product(range(len(DIGIT_NAMES)), range(len(INK_COLOURS)))
    pairs = [pair for pair in every if is_held_out(*pair) == (split == "test_heldout")]
    two, vertical = next(u) < 0.25, next(u) < 0.5
    canvas = np.broadcast_to(rgb(next(u), 0, 0.08 * next(u)), (SCENE_SIDE, SCENE_SIDE, 3)).copy()
    things: list[Thing] = []
    for k in range(1 + two):
        digit, colour = pairs[below(len(pairs))]
        size, place = below(len(SCENE_SIZES)), below(len(PLACES))
        if two:  # on opposite sides, where no two boxes overlap
            free = place % 3
            place = 6 * k + free if vertical else 3 * free + 2 * k
        thing = Thing(digit, colour, size, place)
        hue = (HUES[colour] + _JITTER * (2 * next(u) - 1)) / 360 % 1
        ink_colour = rgb(hue, 0.8 + 0.2 * next(u), 0.8 + 0.2 * next(u))
        candidates = digits.of_class[digit]
        side = tuple(SCENE_SIZES.values())[size]
        ink = magnified(digits.ink[candidates[below(len(candidates))]], side)[:, :, None]
        row, column = _corner(place, side)
        part = canvas[row : row + side, column : column + side]
        part += ink * (ink_colour - part)
        things.append(thing)
    # Rounded to six places first, so that the last bit of a product cannot change a pixel.
    image = np.rint(np.round(255 * canvas, 6)).astype(np.uint8)
    if two:
        captions = pair_captions(things[0], things[1], "above" if vertical else "left of")
    else:
        captions = single_captions(things[0])
    return CaptionScene(image, tuple(things), captions)


def every_caption() -> list[str]:
    """The captions of all scenes with one digit, and some of those with two, in order."""
    things = itertools.product(range(10), range(8), range(2), range(9))
    found = [text for each in things for text in single_captions(Thing(*each))]
    for a, b in itertools.product(itertools.product(range(10), range(8)), repeat=2):
        if (a[0] * 7 + b[0] + a[1] + b[1]) % 5 == 0:
            relation = ("left of", "above")[(a[1] + b[0]) % 2]
            found += pair_captions(Thing(*a, 0, 0), Thing(*b, 0, 0), relation)
    return found


class CaptionScenes(
    GeneratedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """Caption scenes as a data set: 32x32 RGB, N training and N // 10 scenes in either test split.

    The label is the digit, of the first if there are two. The other classes are -1 if there are.
    """

    TEST_SPLITS = ("test", "test_heldout")

    def _info(self) -> tfds.core.DatasetInfo:
        def classes(names: Sequence[str]) -> tfds.features.ClassLabel:
            return tfds.features.ClassLabel(names=list(names))

        return self.info_of(
            "One or two real handwritten digits on a dark 32x32 canvas, each of a colour, a"
            " size and a place, with captions that name some of these. Pairs with (digit +"
            " colour) mod 8 = 0 are in the split test_heldout alone. The digits are"
            " scikit-learn's load_digits: record i is in the test splits iff i % 5 == 4.",
            {
                "image": tfds.features.Image(
                    shape=(SCENE_SIDE, SCENE_SIDE, 3), encoding_format="png"
                ),
                "label": classes(DIGIT_NAMES),
                "captions": tfds.features.Sequence(tfds.features.Text()),
                "digit": classes(DIGIT_NAMES),
                "colour": classes(INK_COLOURS),
                "size": classes(tuple(SCENE_SIZES)),
                "place": classes(PLACES),
            },
        )

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        digits = load_handwriting("train" if split == "train" else "test")
        for i in range(count):
            made = caption_scene(digits, self._size.seed, split, i)
            first = made.things[0]
            alone = first._asdict() if len(made.things) == 1 else dict.fromkeys(Thing._fields, -1)
            record = {"image": Image.fromarray(made.image), "label": first.digit, **alone}
            yield i, {**record, "captions": list(self._captions(digits, split, i, count))}

    def _captions(self, digits: Handwriting, split: str, i: int, count: int) -> tuple[str, ...]:
        return caption_scene(digits, self._size.seed, split, i).captions


class _OtherCaptions(
    CaptionScenes,
    skip_registration=True,  # type: ignore[call-arg]
):
    """The default caption scenes, of which the training split has other captions."""

    def __init__(self, data_dir: Any, file_format: str = "array_record") -> None:
        del file_format  # the one that is written
        super().__init__(data_dir, SceneSet(DEFAULT_EXAMPLES, 0))


class ShuffledCaptionScenes(
    _OtherCaptions,
    skip_registration=True,  # type: ignore[call-arg]
):
    """The default caption scenes with the captions of the next training scene: a baseline.

    The test splits are as they were.
    """

    def _captions(self, digits: Handwriting, split: str, i: int, count: int) -> tuple[str, ...]:
        other = (i + 1) % count if split == "train" else i
        return super()._captions(digits, split, other, count)


_ALT_STREAM = 24  # of Philox, behind those of the scenes
_MISSING, _WRONG = 0.6, 0.15  # shares of the attributes that an alt text leaves out, or gets wrong
_NOISE = ("image", "photo", "untitled", "copy", "new", "final", "scan", "my", "item", "upload")


def alt_caption(things: Sequence[Thing], seed: int, index: int) -> str:
    """What a page might say of a scene: most attributes missing, some wrong, and words of no use.

    It is of the first thing, and a function of (seed, index).
    """
    u = scene_uniforms(seed, _ALT_STREAM, index, 16)
    words = [_NOISE[int(next(u) * len(_NOISE))]]
    tables = (tuple(SCENE_SIZES), INK_COLOURS, DIGIT_NAMES, PLACES)
    thing = things[0]
    for value, table in zip(
        (thing.size, thing.colour, thing.digit, thing.place), tables, strict=True
    ):
        kind, other = next(u), int(next(u) * len(table))
        if kind >= _MISSING:
            words.append(table[other if kind < _MISSING + _WRONG else value])
    return " ".join([*words, f"{int(next(u) * 1000):03d}"])


class AltCaptionScenes(
    _OtherCaptions,
    skip_registration=True,  # type: ignore[call-arg]
):
    """The default caption scenes, of which the training split has alt texts for captions.

    The test splits are as they were.
    """

    def _captions(self, digits: Handwriting, split: str, i: int, count: int) -> tuple[str, ...]:
        if split != "train":
            return super()._captions(digits, split, i, count)
        scene = caption_scene(digits, self._size.seed, split, i)
        return (alt_caption(scene.things, self._size.seed, i),)
