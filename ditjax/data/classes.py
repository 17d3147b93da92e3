"""Parse classes given as numbers, names or WordNet ids; the names of ImageNet's classes.

The classes of ILSVRC-2012 are synsets of WordNet 3.0 in the order of their ids. The lemmas, their
source and WordNet's notice are in assets/imagenet_classes.txt.
"""

import functools
import re
from collections.abc import Sequence

from ditjax.errors import UserError, nearest
from ditjax.files.assets import SHIPPED

IMAGENET_CLASSES = "imagenet_classes.txt"

ClassNames = Sequence[Sequence[str]]  # of each class, its names


@functools.cache
def _imagenet() -> tuple[tuple[str, tuple[str, ...]], ...]:
    path = SHIPPED / IMAGENET_CLASSES
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; reinstall ditjax.") from error
    classes = []
    for line in lines:
        if not line.startswith("#"):
            wordnet_id, _, lemmas = line.partition(" ")
            classes.append((wordnet_id, tuple(lemmas.split(", "))))
    return tuple(classes)


def class_names() -> tuple[tuple[str, ...], ...]:
    """The WordNet 3.0 lemmas of ImageNet's 1,000 classes: [207] is ('golden retriever',).

    The lemmas of a class joined by ', ' are its text in diffusers' id2label: 'tench, Tinca tinca'.
    """
    return tuple(lemmas for _, lemmas in _imagenet())


def wordnet_ids() -> tuple[str, ...]:
    """The WordNet 3.0 ids of ImageNet's 1,000 classes: [207] is 'n02099601'."""
    return tuple(wordnet_id for wordnet_id, _ in _imagenet())


def names_of(labels: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The names of a data set's classes: the label, and ImageNet's lemmas if it is a WordNet id."""
    lemmas = dict(_imagenet())
    return tuple((label, *lemmas.get(label, ())) for label in labels)


def parse_classes(text: str, num_classes: int, names: ClassNames | None = None) -> list[int]:
    """The class numbers that --classes names: '207, Golden_Retriever,n02099601' -> [207, 207, 207].

    A word of digits is always a class number. A name is any of names[k]; case is ignored, and '_',
    '-' and spaces are equal. WordNet ids are accepted along with ImageNet's names. Without `names`
    classes have numbers only.

    Raises UserError for an unknown word, a name of several classes, or a wrong number of names.
    """
    if names is None:
        names = [()] * num_classes
    if len(names) != num_classes:
        raise UserError(
            f"names of {len(names)} classes came with a network of {num_classes}: expected one"
            " entry per class; give the names that it was trained with."
        )
    numbers: dict[str, list[int]] = {}
    for k, aliases in enumerate(names):
        for name in {_normal(alias) for alias in aliases} - {""}:
            if not name.isdecimal():  # '-1' would be the name '1'
                numbers.setdefault(name, []).append(k)
    expected = f"class numbers from 0 to {num_classes - 1}" + " or names" * bool(numbers)
    ids: dict[str, list[int]] = {}
    if tuple(map(tuple, names)) == class_names():
        ids = {wordnet_id: [k] for k, wordnet_id in enumerate(wordnet_ids())}
        expected = f"class numbers from 0 to {num_classes - 1}, ImageNet's names or WordNet ids"

    def number(word: str) -> int:
        # At most nine digits, because int() raises beyond some thousands.
        if re.fullmatch("[0-9]{1,9}", word) and int(word) < num_classes:
            return int(word)
        name = _normal(word)
        found = [] if word.isdecimal() else numbers.get(name) or ids.get(name, [])
        if len(found) > 1:
            several = "; ".join(f"{k} ({', '.join(names[k])})" for k in found)
            raise UserError(
                f"--classes holds {word!r}, a name of {len(found)} classes: {several}; give the"
                " number."
            )
        if not found:
            hint = nearest(name, numbers) if re.search("[a-z]", name) else ""
            if not numbers and re.search("[a-z]", name):
                hint = (
                    " No class names are recorded with this network."
                    + " --class_names=imagenet takes ImageNet's." * (num_classes == 1000)
                )
            raise UserError(
                f"--classes holds {word!r}: expected {expected}, separated by commas.{hint}"
            )
        return found[0]

    return [number(word.strip()) for word in text.split(",")]


def _normal(name: str) -> str:
    """'Golden_Retriever' -> 'golden retriever'."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
