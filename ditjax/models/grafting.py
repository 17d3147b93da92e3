"""A trained network's parameters on another network: what is copied, adapted, fresh and unused.

A network's file names the leaves whose shape follows from its inputs, and the rule of each
(`Network.grafts`). Any other leaf is copied, and must have the same shape.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ditjax.errors import UserError
from ditjax.models.network import Inputs

Leaves = Mapping[str, np.ndarray]


class End(NamedTuple):
    """One of the two networks of a graft: its keys of `config.model`, and its inputs."""

    keys: Any
    inputs: Inputs


class Join(NamedTuple):
    """The two ends of a graft, and for each new class the old one that it starts as, or -1."""

    old: End
    new: End
    classes: Sequence[int] = ()


class Grafted(NamedTuple):
    """Leaves by path, and the four lists: every leaf of either network is in exactly one.

    `adapted` says what was done. Leaves that only the base has are `unused`.
    """

    leaves: dict[str, np.ndarray]
    copied: list[str]
    adapted: dict[str, str]
    fresh: list[str]
    unused: list[str]


class Adopted(NamedTuple):
    """Leaves of another kind of network as those of this one, complete, and what was done.

    `adapted` and `fresh` are the paths that are not copies; `unused` are the old network's.
    """

    leaves: dict[str, np.ndarray]
    adapted: dict[str, str]
    fresh: list[str]
    unused: list[str]


# (leaves, keys of config.model of the old network, shapes and initial values of the new one)
Adoption = Callable[
    [Leaves, Any, Mapping[str, tuple[int, ...]], Callable[[str], np.ndarray]], Adopted
]


def of_adopted(grafted: Grafted, adopted: Adopted) -> Grafted:
    """What was done with the leaves of a graft whose base was adopted from another network."""
    others = {*adopted.adapted, *adopted.fresh}
    return grafted._replace(
        copied=[path for path in grafted.copied if path not in others],
        adapted={**adopted.adapted, **grafted.adapted},
        fresh=[*grafted.fresh, *adopted.fresh],
        unused=[*grafted.unused, *adopted.unused],
    )


# (old leaf, shape of the new one, its initial value, ends) -> (new leaf, what was done; '' for a
# copy). Raises UserError, without the leaf's path, for ends that the rule does not connect.
GraftRule = Callable[
    [np.ndarray, tuple[int, ...], Callable[[], np.ndarray], Join], tuple[np.ndarray, str]
]


def graft(
    base: Leaves,
    shapes: Mapping[str, tuple[int, ...]],
    fresh: Callable[[str], np.ndarray],
    rules: Sequence[tuple[str, GraftRule]],
    join: Join,
    skip: str = "",
) -> Grafted:
    """Put the leaves of `base` on a network of the given shapes.

    `fresh(path)` is the initial value of a leaf. Leaves that match `skip`, a regular expression,
    are not taken from the base. Raises UserError that names every leaf without a place.
    """
    result = Grafted({}, [], {}, [], [])
    wrong: list[str] = []
    for path, shape in shapes.items():
        if skip and re.search(skip, path):
            result.fresh.append(path)
            result.leaves[path] = fresh(path)
        elif path not in base:
            wrong.append(f"{path} {shape} is not in the base")
        else:
            _take(result, path, shape, base[path], fresh, rules, join, wrong)
    for path in sorted(base.keys() - shapes.keys()):
        if skip and re.search(skip, path):
            result.unused.append(path)
        else:
            wrong.append(f"{path} {base[path].shape} is only in the base")
    if wrong:
        raise UserError("; ".join(wrong))
    return result


def _take(
    result: Grafted,
    path: str,
    shape: tuple[int, ...],
    leaf: np.ndarray,
    fresh: Callable[[str], np.ndarray],
    rules: Sequence[tuple[str, GraftRule]],
    join: Join,
    wrong: list[str],
) -> None:
    """Copy or adapt one leaf of the base."""
    done = ""
    before = leaf.shape
    for pattern, rule in rules:
        if re.fullmatch(pattern, path):
            try:
                leaf, done = rule(leaf, shape, lambda: fresh(path), join)
            except UserError as error:
                wrong.append(f"{path}: {error}")
                return
    if leaf.shape != shape:
        wrong.append(f"{path} is {shape}, and {before} in the base")
        return
    result.leaves[path] = np.asarray(leaf, np.float32)
    if done:
        result.adapted[path] = done
    else:
        result.copied.append(path)


def label_rows(
    table: np.ndarray, shape: tuple[int, ...], fresh: Callable[[], np.ndarray], join: Join
) -> tuple[np.ndarray, str]:
    """A label table of other classes; with a null label, its row is the last one of a table.

    A class that is -1 starts as the mean of the old classes plus its own initial row. A null row
    that the base lacks starts as their mean.
    """
    old, new = (end.inputs.num_classes for end in (join.old, join.new))
    null_before, null_now = (end.keys.label_dropout > 0 for end in (join.old, join.new))
    if not join.classes and old != new:
        raise UserError(
            f"the base has {old} classes and the recipe {new}: set config.adapt.classes to the"
            f" base's class, or -1 for a new one, for each of the {new}"
        )
    if bad := [k for k in join.classes if k >= old]:
        raise UserError(
            f"config.adapt.classes names class {bad[0]}, and the base has classes 0 to {old - 1}"
        )
    classes = np.asarray(join.classes or range(new))
    mean = table[:old].mean(axis=0, keepdims=True)
    rows = table[np.maximum(classes, 0)]
    made = classes < 0
    if made.any():
        rows[made] = mean + fresh()[:new][made]
    null = [table[old:] if null_before else mean] if null_now else []
    words = []
    if made.any() or old != new or (classes != np.arange(new)).any():
        words.append(f"{new - made.sum()} of {new} classes from the base's {old}")
    if made.any():
        words.append(f"{made.sum()} new: the mean of the base's, plus N(0, 0.02²)")
    if null_before != null_now:
        words.append("a null row: the mean of the classes" if null_now else "null row unused")
    return np.concatenate([rows, *null]), "; ".join(words)


def input_channels(
    kernel: np.ndarray, shape: tuple[int, ...], fresh: Callable[[], np.ndarray], join: Join
) -> tuple[np.ndarray, str]:
    """A patch embedding [p²C, D] of more channels, whose rows are zero at first.

    Within a patch the channel is the fastest axis (`embed.patchify`), so rows are added per pixel.
    """
    pixels = _pixels(join)
    x = kernel.reshape(pixels, -1, kernel.shape[-1])
    before, now = x.shape[1], shape[0] // pixels
    return _wider(x, now).reshape(-1, kernel.shape[-1]), _channels_text(before, now)


def output_channels(
    leaf: np.ndarray, shape: tuple[int, ...], fresh: Callable[[], np.ndarray], join: Join
) -> tuple[np.ndarray, str]:
    """A last layer [.., p²K] of more channels, or of more or fewer variances.

    K is C, or 2C with the variances in [C:2C]. What the base lacks is zero.
    """
    pixels = _pixels(join)
    before, now = (end.inputs.shape[-1] for end in (join.old, join.new))
    had, has = (end.inputs.out_channels > end.inputs.shape[-1] for end in (join.old, join.new))
    x = leaf.reshape(-1, pixels, join.old.inputs.out_channels).transpose(1, 2, 0)
    parts, words = [_wider(x[:, :before], now)], [_channels_text(before, now)]
    if has:
        parts.append(_wider(x[:, before:] if had else np.zeros_like(x[:, :before]), now))
    if has != had:
        words.append("variances added, zero" if has else "the base's variances unused")
    wider = np.concatenate(parts, axis=1).transpose(2, 0, 1)
    return wider.reshape(*leaf.shape[:-1], -1), "; ".join(filter(None, words))


def _pixels(join: Join) -> int:
    """The pixels of a patch, p². Raises UserError if the two networks' patches differ."""
    old, new = join.old.keys.patch, join.new.keys.patch
    if old != new:
        raise UserError(f"the base has patches of {old}x{old} and the recipe of {new}x{new}")
    return int(new**2)


def _wider(x: np.ndarray, channels: int) -> np.ndarray:
    """x [pixels, C, D] with zeros after its channels."""
    if channels < x.shape[1]:
        raise UserError(
            f"the base has {x.shape[1]} channels and the recipe {channels}: it would lose some"
        )
    return np.pad(x, ((0, 0), (0, channels - x.shape[1]), (0, 0)))


def _channels_text(before: int, now: int) -> str:
    return f"{before} -> {now} channels, the new ones zero" if before != now else ""
