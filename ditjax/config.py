"""A recipe: every key with the paper's value as its default, its type and its bounds.

A recipe file (`experiments/*.py`) states what differs from these defaults. `read` turns its nested
mapping into frozen dataclasses or raises UserError; nothing after it sees the mapping.

`Config` has the sections of every task. What is learned (`config.task`) and with which network
(`config.model.kind`) are names of modules: `ditjax.tasks.NAME` and `ditjax.models.NAME`, or a
dotted name of a module of yours. The task's module adds sections (`SECTIONS`), the network's module
the keys of `config.model` (`Keys`).
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import math
import pkgutil
import re
import sys
import typing
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from types import ModuleType
from typing import Any, ClassVar, Literal, TypeVar

from ditjax.errors import UserError, divisors, nearest, reason, shown

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """A condition on a value beyond its type, and the words for it."""

    holds: Callable[[Any], bool]
    expected: str


def at_least(low: float) -> Rule:
    return Rule(lambda v: v >= low, f"at least {low}")


def at_most(high: float) -> Rule:
    return Rule(lambda v: v <= high, f"at most {high}")


def above(low: float) -> Rule:
    return Rule(lambda v: v > low, f"greater than {low}")


def zero_or_above(low: float) -> Rule:
    return Rule(lambda v: v == 0 or v > low, f"0, or greater than {low}")


def within(low: float, high: float) -> Rule:
    return Rule(lambda v: low <= v <= high, f"from {low} to {high}")


# Above this one float32 rounds to 1: Adam's correction 1 - b**t would be 0.
FRACTION = Rule(lambda v: 0 <= v < 1 - 2**-25, "from 0 to below 1, in float32 too")
AXIS_SIZE = Rule(lambda v: v == -1 or v >= 1, "at least 1, or -1 for all devices that are left")
PATH = Rule(
    lambda v: all(len(part.encode()) <= 255 for part in v.split("/")),
    "a name or path, no part of it longer than 255 bytes",
)


def key(
    default: T,
    *rules: Rule,
    free: bool = False,
    protocol: bool = False,
    read: Callable[[Any, "Schemas"], Any] | None = None,
) -> T:
    """A key of a recipe: its default and the rules that a value must satisfy.

    free: a resumed run may change it. protocol: it fixes what a score means, so it is part of the
    protocol. read: parses and checks a value that no simple type describes.
    """
    metadata = {"rules": rules, "free": free, "protocol": protocol, "read": read}
    return dataclasses.field(default=default, metadata=metadata)


_DOTTED: re.Pattern[str] = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
FEATURES = Rule(
    lambda v: (
        v in ("digits", "scenes", "none")
        or bool(v.partition("inception:")[2])
        or bool(_DOTTED.fullmatch(v))
    ),
    "'digits', 'scenes', 'none', 'inception:FILE' or a dotted name of yours",
)


def lookup(name: str, registry: str) -> Any:
    """The object that a recipe names: of ours by its key in a table, of yours by its dotted name.

    registry: the dotted name of our table, as 'ditjax.diffusion.samplers.SAMPLERS'. Raises
    UserError for a name that is in neither.
    """
    module, _, attribute = registry.rpartition(".")
    known: Mapping[str, Any] = getattr(importlib.import_module(module), attribute)
    if name in known:
        return known[name]
    if not _DOTTED.fullmatch(name):
        raise UserError(
            f"{shown(name)}: expected one of {', '.join(map(repr, known))}, or the dotted name of"
            f" one of yours, as 'package.module.name'.{nearest(name, known)}"
        )
    return imported(name)


def imported(name: str) -> Any:
    """The attribute at a dotted name, 'package.module.name'. Raises UserError."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(_imported(module), attribute)
    except AttributeError:
        raise UserError(f"{name!r}: module {module!r} has no {attribute!r}.") from None


def check_no_imports(tree: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a recipe out of a file that names a module which nobody has imported.

    Reading a recipe imports the modules that it names, and a file of others must run nothing.
    """
    for name in _texts(tree):
        if not _DOTTED.fullmatch(name):
            continue
        known = {name, name.rpartition(".")[0]} & sys.modules.keys()
        if not known or name.partition(".")[0] in sys.stdlib_module_names:
            raise UserError(
                f"{where} names {name!r}, a module of its author's, and reading it must run"
                " nothing: import that module first, from Python, if you trust it."
            )


def _texts(tree: Any) -> Iterator[str]:
    """Every text of nested mappings and lists."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for each in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _texts(each)


def named(registry: str) -> Rule:
    """A name that `lookup` finds."""

    def holds(name: str) -> bool:
        lookup(name, registry)  # raises with its own, better message
        return True

    return Rule(holds, "a known name")


def _imported(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a module of the user's own may fail in any way
        raise UserError(
            f"cannot import {module!r} ({type(error).__name__}: {reason(error)}): expected a module"
            " that Python finds from here; PYTHONPATH adds folders."
        ) from None


# Steps and records are counted in int32 on the devices.
_MOST = 2**31 - 1


def positive(default: int, *, most: int = _MOST, free: bool = False) -> int:
    """A key that is an integer from 1 to `most`."""
    return key(default, at_least(1), at_most(most), free=free)


def count(default: int, *, most: int = _MOST, free: bool = False) -> int:
    """A key that is an integer from 0 to `most`."""
    return key(default, at_least(0), at_most(most), free=free)


def seed() -> int:
    """A seed. JAX's keys take 32 bits and drop the rest: 2**32 would be 0 again."""
    return count(0, most=2**32 - 1)


class Section:
    """A group of keys. `FREE`: a resumed run may change all of it."""

    FREE: ClassVar[bool] = False

    def check(self, c: "Config") -> None:
        """Raise UserError for values that are legal alone and impossible together."""


@dataclass(frozen=True)
class Model(Section):
    """What the section `model` of every network has; the network's module adds its own keys."""

    kind: str = key("dit", PATH)  # a module of ditjax.models, or a dotted name of yours
    dtype: Literal["float32", "bfloat16"] = key("float32")  # compute; parameters stay float32
    # products of float32: the backend's fast ones, or exact
    matmul: Literal["default", "float32"] = key("default")


@dataclass(frozen=True)
class Data(Section):
    """Where examples come from (`data/source.py`)."""

    # 'digits', a tfds name, 'folder:PATH', 'latents:PATH', or the dotted name of your tfds builder
    name: str = key("imagenet2012", PATH)
    split: str = key("train")
    image_size: int = positive(256, most=16_384)
    channels: Literal[1, 3] = key(3)
    num_classes: int = positive(1000, most=2**24)
    flip: bool = key(True)
    data_dir: str = key("", PATH, free=True)  # '' = $DITJAX_DATA or ~/.cache/ditjax/data
    cache_mb: int = count(256, free=True)  # splits that decode to less are kept in memory
    threads: int = positive(16, most=1024, free=True)
    max_damaged: int = count(0, free=True)  # damaged records to skip, each reported; 0 = stop


@dataclass(frozen=True)
class Autoencoder(Section):
    """The KL autoencoder: the network in training, or the frozen one in front of a latent DiT."""

    FROZEN: ClassVar[bool] = False

    kind: Literal["none", "kl"] = key("kl")
    path: str = key("", PATH)  # a run's directory or weights; '' while it is in training
    base_width: int = positive(128)
    multipliers: tuple[int, ...] = key(
        (1, 2, 4, 4),
        Rule(lambda v: 1 <= len(v) <= 12 and min(v) >= 1, "1 to 12 numbers, each at least 1"),
    )
    res_blocks: int = positive(2)
    latent_channels: int = positive(4)
    groups: int = positive(32)
    scale: float = key(0.18215, above(0))  # latents are multiplied by it: unit variance
    kl_weight: float = key(1e-6, at_least(0))

    def check(self, c: "Config") -> None:
        if self.kind == "none":
            if not self.FROZEN:
                raise UserError(
                    "config.autoencoder.kind is 'none', and the autoencoder is what is trained: set"
                    " it to 'kl'."
                )
            return
        factor = 2 ** (len(self.multipliers) - 1)
        if c.data.image_size % factor:
            raise UserError(
                f"config.data.image_size is {c.data.image_size}: the autoencoder's"
                f" {len(self.multipliers)} levels need a multiple of {factor}."
            )
        for m in self.multipliers:
            if (self.base_width * m) % self.groups:
                raise UserError(
                    f"config.autoencoder: width {self.base_width} x {m} is not divisible into"
                    f" {self.groups} groups: choose groups that divide every level's width."
                )


@dataclass(frozen=True)
class FrozenAutoencoder(Autoencoder):
    """The autoencoder in front of a network that learns its latents; kind 'none' for pixels."""

    FROZEN: ClassVar[bool] = True


@dataclass(frozen=True)
class Optim(Section):
    """AdamW (`training/optim.py`). The paper: lr 1e-4 constant, no decay, no clipping."""

    learning_rate: float = key(1e-4, above(0))
    schedule: Literal["constant", "cosine"] = key("constant")
    warmup_steps: int = count(0)
    b1: float = key(0.9, FRACTION)
    b2: float = key(0.999, FRACTION)
    eps: float = key(1e-8, above(0))
    weight_decay: float = key(0.0, at_least(0))
    clip_norm: float = key(0.0, at_least(0))  # 0 = no clipping
    # An update is skipped when its gradient's norm exceeds this many times their running mean.
    spike_factor: float = key(0.0, zero_or_above(1))  # 0 = off

    def check(self, c: "Config") -> None:
        if self.warmup_steps >= c.train.steps:
            raise UserError(
                f"config.optim.warmup_steps is {self.warmup_steps} and config.train.steps is"
                f" {c.train.steps}: the warm-up must end before the training does."
            )


@dataclass(frozen=True)
class Train(Section):
    """The loop (`train.py`)."""

    steps: int = positive(400_000, free=True)
    batch_size: int = positive(256, most=2**24)  # global
    microbatches: int = positive(1, free=True)  # parts of a step's batch: less memory, same update
    prefetch: int = count(2, most=1024, free=True)  # batches put on the devices ahead of their step
    ema_decay: float = key(0.9999, FRACTION)
    log_every_steps: int = positive(100, free=True)
    checkpoint_every_steps: int = positive(10_000, free=True)
    keep_checkpoints: int = positive(2, free=True)  # the newest; the best is kept beside them
    keep_every_steps: int = count(0, free=True)  # its multiples are kept for good; 0 = none
    grace_seconds: int = positive(25, free=True)  # from SIGTERM to the end: the time to save
    sample_every_steps: int = count(10_000, free=True)  # 0 = no sample grids while training
    evaluate_every_steps: int = count(0, free=True)  # 0 = no evaluation while training
    evaluate_num: int = key(5_000, at_least(2), at_most(999_999_999), free=True)
    max_bad_steps: int = count(5, free=True)  # bad steps in a row to skip; one more ends the run

    def check(self, c: "Config") -> None:
        if self.keep_every_steps % self.checkpoint_every_steps:
            raise UserError(
                f"config.train.keep_every_steps is {self.keep_every_steps} and"
                f" config.train.checkpoint_every_steps is {self.checkpoint_every_steps}: there is"
                " no checkpoint of every such step. Give a multiple of it, or 0."
            )
        if self.evaluate_every_steps and c.evaluate.features == "none":
            raise UserError(
                f"config.train.evaluate_every_steps is {self.evaluate_every_steps} and"
                " config.evaluate.features is 'none': set features to 'digits', 'scenes' or"
                " 'inception:FILE', or evaluate_every_steps to 0."
            )
        if self.batch_size % self.microbatches:
            raise UserError(
                f"config.train.microbatches={self.microbatches} does not divide"
                f" config.train.batch_size={self.batch_size}: numbers that do:"
                f" {', '.join(map(str, divisors(self.batch_size)))}."
            )


@dataclass(frozen=True)
class Mesh(Section):
    """Devices as a grid (`parallel/mesh.py`); one axis may be -1: all that are left."""

    FREE: ClassVar[bool] = True

    data: int = key(-1, AXIS_SIZE)  # copies of the state; the batch is split
    fsdp: int = key(1, AXIS_SIZE)  # the state and the batch are split
    tensor: int = key(1, AXIS_SIZE)  # heads and the MLP's width are split
    context: int = key(1, AXIS_SIZE)  # tokens are split
    slices: int = positive(1)  # groups of devices with slow links between them

    def check(self, c: "Config") -> None:
        free = [axis for axis in ("data", "fsdp", "tensor", "context") if getattr(self, axis) == -1]
        if len(free) > 1:
            raise UserError(
                f"config.mesh.{free[0]} and config.mesh.{free[1]} are -1: only one axis takes what"
                " is left; give the others their sizes."
            )


@dataclass(frozen=True)
class Distributed(Section):
    """Time limits of a run of several processes (`parallel/processes.py`)."""

    FREE: ClassVar[bool] = True

    initialization_seconds: int = positive(300, most=86_400)  # until all have met
    heartbeat_seconds: int = positive(25, most=86_400)  # of silence until a process counts as dead


@dataclass(frozen=True)
class Sample(Section):
    """How images are drawn (`sample.py`)."""

    FREE: ClassVar[bool] = True

    sampler: str = key("ddpm", named("ditjax.diffusion.samplers.SAMPLERS"), protocol=True)
    steps: str = key("250", protocol=True)  # '250', 'ddim50' or section counts '10,15,20'
    eta: float = key(0.0, within(0, 1), protocol=True)  # DDIM only
    cfg_scale: float = key(1.0, at_least(0), protocol=True)  # 1 = no guidance
    cfg_channels: Literal["all", "three"] = key("three", protocol=True)
    # (low, high): guided at timesteps low <= t/T < high only
    cfg_interval: tuple[float, ...] = key((0.0, 1.0), protocol=True)
    clip_x0: bool = key(False, protocol=True)  # clamp the predicted x_0 to [-1, 1]: pixels only
    weights: Literal["ema", "model"] = key("ema", protocol=True)  # the average, or the parameters
    batch_size: int = positive(64, most=2**24)
    num: int = positive(64, most=999_999_999)

    def check(self, c: "Config") -> None:
        interval = self.cfg_interval
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise UserError(
                f"config.sample.cfg_interval is {interval}: expected (low, high) with 0 <= low <"
                " high <= 1; (0.0, 1.0) guides every step."
            )


@dataclass(frozen=True)
class Evaluate(Section):
    """What a finished model is measured by (`evaluate.py`)."""

    FREE: ClassVar[bool] = True

    split: str = key("validation")  # held-out images: of the validation loss, and of a PSNR
    # 'digits', 'scenes', 'inception:FILE', 'none' or a dotted name of a function of yours
    features: str = key("none", PATH, FEATURES)
    reference: str = key("", PATH)  # statistics, images or DATASET/SPLIT; '' = the training split
    # The parts of a sample set are named by nine digits.
    num_samples: int = key(50_000, at_least(2), at_most(999_999_999))
    labels: Literal["uniform", "balanced"] = key("uniform")
    seed: int = seed()  # of the samples: the same noise for every model, whatever seed trained it
    guided_scale: float = key(0.0, at_least(0))  # accuracy of a second sample set; 0 = none
    guided_num: int = key(1000, at_least(2), at_most(999_999_999))
    # Pairs (t, eps) that L_simple is the mean of, on held-out images; 0 = no validation loss.
    val_loss_num: int = key(0, zero_or_above(1), at_most(999_999_999))


Override = tuple[str, Any]
Axis = tuple[str, tuple[Any, ...]]
# A published figure: what a run must have, the metric, its value.
Figure = tuple[tuple[Override, ...], str, float]
Schemas = tuple[type["Config"], ...]  # of the recipe, then of other networks in its study
BUDGETS = ("steps", "images", "gflops")
_MAX_STRING = 4096  # characters, what a path may have
_MAX_CELLS = 10_000
# What float32 holds with all of its digits; parameters and rates are of that type.
_TINY, _HUGE = 2.0**-126, (2 - 2**-23) * 2.0**127


def _read_grid(value: Any, schemas: "Schemas") -> tuple[Axis, ...]:
    """(('model.size', ('S', 'B')), ('model.patch', (4, 2))): each key known, each value once."""
    axes = [_read_axis(axis, "grid", schemas) for axis in _parts(value)]
    if len({key for key, _ in axes}) < len(axes):
        raise UserError("config.sweep.grid names a key twice: join its values.")
    return tuple(axes)


def _read_lists(value: Any, schemas: "Schemas") -> tuple[tuple[Override, ...], ...]:
    """((('model.patch', 4), ('seed', 1)), ()): runs, each a set of overrides, an empty one too."""
    runs = []
    for run in _parts(value):
        if not isinstance(run, tuple | list) or not all(map(_is_pair, run)):
            raise UserError(
                f"config.sweep.lists holds {shown(run)}: expected a run's overrides, such as"
                " (('model.patch', 4), ('seed', 1))."
            )
        if len({key for key, _ in run}) < len(run):
            raise UserError(f"config.sweep.lists holds {shown(run)}: a key stands twice in it.")
        for key, each in run:
            _check_values(key, [each], "lists", schemas)
        runs.append(tuple((key, _hashable(each)) for key, each in run))
    return tuple(runs)


def _read_zips(value: Any, schemas: "Schemas") -> tuple[tuple[Axis, ...], ...]:
    """((('model.size', ('S', 'B')), ('optim.learning_rate', (2e-4, 1e-4))),): of one length."""
    zips = []
    for together in _parts(value):
        if not isinstance(together, tuple | list) or not together:
            raise UserError(
                f"config.sweep.zips holds {shown(together)}: expected axes that are walked"
                " together, such as (('model.size', ('S', 'B')), ('optim.b2', (0.99, 0.999)))."
            )
        axes = tuple(_read_axis(axis, "zips", schemas, once=False) for axis in together)
        if len({len(values) for _, values in axes}) > 1:
            lengths = ", ".join(f"{len(values)} of {key}" for key, values in axes)
            raise UserError(
                f"config.sweep.zips walks {lengths} together: expected the same number of values."
            )
        zips.append(axes)
    return tuple(zips)


def _read_seeds(value: Any, schemas: "Schemas") -> tuple[int, ...]:
    if not isinstance(value, tuple | list):
        raise UserError(f"config.sweep.seeds is {shown(value)}: expected integers, such as (0, 1).")
    _check_values("seed", value, "seeds", schemas)
    if len(set(value)) < len(value):
        raise UserError(f"config.sweep.seeds is {shown(value)}: a seed stands twice.")
    return tuple(value)


def _read_budget(value: Any, schemas: "Schemas") -> tuple[Any, ...]:
    """('gflops', 1e6), or ()."""
    if isinstance(value, tuple | list) and not value:
        return ()
    wrong = UserError(
        f"config.sweep.budget is {shown(value)}: expected (UNIT, NUMBER), a unit of"
        f" {', '.join(BUDGETS)} and a number above 0, whole but for gflops, such as"
        " ('gflops', 1e6); or ()."
    )
    if not isinstance(value, tuple | list) or len(value) != 2 or value[0] not in BUDGETS:
        raise wrong
    unit, number = value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise wrong
    whole = isinstance(number, int) or number.is_integer()
    if not 0 < number <= _HUGE or (unit != "gflops" and not whole):
        raise wrong
    return (unit, number)


def _read_published(value: Any, schemas: "Schemas") -> tuple[Figure, ...]:
    """(((('model.size', 'XL'), ('model.patch', 2)), 'fid', 19.47), ...), each key and value legal.

    No two are of the same keys and metric.
    """
    where = "config.sweep.published"
    if len(rows := _parts(value)) > _MAX_CELLS:
        raise UserError(f"{where} has {len(rows)} figures: expected at most {_MAX_CELLS}.")
    figures: dict[Any, Figure] = {}
    for row in rows:
        if not isinstance(row, tuple | list) or len(row) != 3 or not _are_pairs(row[0]):
            raise UserError(
                f"{where} holds {shown(row)}: expected figures such as"
                " ((('model.size', 'XL'), ('model.patch', 2)), 'fid', 19.47)."
            )
        keys = {key: _check_values(key, [each], "published", schemas)[0] for key, each in row[0]}
        if len(keys) < len(row[0]):
            raise UserError(f"{where} holds {shown(row)}: a key stands twice in it.")
        metric = _typed(str, row[1], "sweep.published")
        number = _typed(float, row[2], "sweep.published")
        if number <= 0:
            raise UserError(f"{where} holds {shown(row)}: expected a figure above 0.")
        identity = (frozenset(keys.items()), metric)
        if identity in figures:
            raise UserError(f"{where} holds two figures of one metric and cell: {shown(row)}.")
        figures[identity] = (tuple(keys.items()), metric, number)
    return tuple(figures.values())


def _read_fields(value: Any, schemas: "Schemas") -> tuple[tuple[str, str], ...]:
    """(('num_samples', '50000'), ...): each field once."""
    where = "config.sweep.published_protocol"
    if not _are_pairs(value):
        raise UserError(f"{where} is {shown(value)}: expected pairs such as ('labels', 'uniform').")
    fields = {key: _typed(str, text, "sweep.published_protocol") for key, text in value}
    if len(fields) < len(value):
        raise UserError(f"{where} names a field twice: {shown(value)}.")
    return tuple(fields.items())


def _parts(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[0], str)


def _are_pairs(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(map(_is_pair, value))


def _read_axis(axis: Any, where: str, schemas: "Schemas", *, once: bool = True) -> Axis:
    """('model.patch', (4, 2)). With `once` no value may stand in it twice."""
    if not _is_pair(axis):
        raise UserError(
            f"config.sweep.{where} holds {shown(axis)}: expected pairs such as"
            " ('model.patch', (4, 2))."
        )
    key, values = axis
    _check_key(key, where, schemas)
    if not isinstance(values, tuple | list) or not values:
        raise UserError(f"config.sweep.{where} gives {key!r} {shown(values)}: expected its values.")
    read = _check_values(key, values, where, schemas)
    if once and len(set(read)) != len(read):
        raise UserError(
            f"config.sweep.{where} gives {key!r} {shown(values)}: a value stands twice."
        )
    # As they were given: 1 for a float stays 1 in a cell's name.
    return key, tuple(map(_hashable, values))


def _check_key(key: str, where: str, schemas: "Schemas") -> type["Config"]:
    """The first schema that has a key which a study varies."""
    for cls in schemas:
        if type_of(cls, key) is not None and not key.startswith("sweep."):
            return cls
    legal = [k for cls in schemas for k in leaf_keys(cls) if not k.startswith("sweep.")]
    raise UserError(
        f"config.sweep.{where} names {shown(key)}, no key of a recipe.{nearest(key, legal)}"
    )


def _check_values(key: str, values: Any, where: str, schemas: "Schemas") -> list[Any]:
    cls: Any = _check_key(key, where, schemas)
    *groups, leaf = key.split(".")
    for group in groups:
        cls = hints(cls)[group]
    field = next(each for each in dataclasses.fields(cls) if each.name == leaf)
    try:
        return [_read_key(field, hints(cls)[leaf], each, key, schemas) for each in values]
    except UserError as error:
        raise UserError(f"config.sweep.{where}: {error}") from None


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_choices(s: "Sweep") -> None:
    """What grid, lists, zips, seeds and budget say of each other, and how many runs they make."""
    # A list's runs may share keys, and share them with nothing else.
    places = [("grid", key) for key, _ in s.grid]
    places += [("lists", key) for key in dict.fromkeys(key for run in s.lists for key, _ in run)]
    places += [("zips", key) for together in s.zips for key, _ in together]
    places += [("seeds", "seed")] if s.seeds else []
    places += [("budget", "train.steps")] if s.budget else []
    first: dict[str, str] = {}
    for where, key in places:
        if key in first:
            raise UserError(
                f"config.sweep.{where} sets {key}, which config.sweep.{first[key]} sets already:"
                " leave it out of one of them."
            )
        first[key] = where
    axes = [len(values) for _, values in s.grid] + [len(together[0][1]) for together in s.zips]
    count = math.prod([*axes, len(s.lists) or 1, len(s.seeds) or 1])
    if count > _MAX_CELLS:
        raise UserError(
            f"config.sweep has {count} cells: expected at most {_MAX_CELLS}; leave values out, or"
            " make several studies of it."
        )


def _check_published(c: "Config") -> None:
    """Published figures are of the images that the recipe is of, or nothing could be said."""
    protocol = dict(c.sweep.published_protocol)
    for field in ("image_size", "num_classes"):
        ours = str(getattr(c.data, field))
        if protocol.get(field) != ours:
            said = protocol.get(field, "not said")
            raise UserError(
                f"config.sweep.published is of {field} {said} (config.sweep.published_protocol) and"
                f" config.data.{field} is {ours}: figures of other images say nothing here; empty"
                " it with --config.sweep.published=()."
            )
    if not c.sweep.published_source:
        raise UserError(
            "config.sweep.published_source is empty: say where the figures of"
            " config.sweep.published stand."
        )


@dataclass(frozen=True)
class Sweep(Section):
    """The runs of a study (`studies/cells.py`): every combination of these choices.

    An override is a dotted key of this config and a value; an axis is a key and its values. A key
    is in one place only. All empty: the recipe is one run. `published` are figures that others have
    measured of such runs (`studies/published.py`), never ours.
    """

    FREE: ClassVar[bool] = True

    grid: tuple[Axis, ...] = key((), read=_read_grid)  # each varies by itself
    lists: tuple[tuple[Override, ...], ...] = key((), read=_read_lists)  # runs, one by one
    zips: tuple[tuple[Axis, ...], ...] = key((), read=_read_zips)  # axes walked together
    seeds: tuple[int, ...] = key((), read=_read_seeds)  # empty: the recipe's own seed
    # ('steps' | 'images' | 'gflops', number): makes each run's train.steps
    budget: tuple[Any, ...] = key((), read=_read_budget)
    title: str = key("")
    topology: str = key("")  # CHIP:SHAPE, such as 'v5e:4x4', for the cost of a dry run; '' = none
    published: tuple[Figure, ...] = key((), read=_read_published)
    # (field, text) pairs that fix what the published figures mean
    published_protocol: tuple[tuple[str, str], ...] = key((), read=_read_fields)
    published_source: str = key("")  # where the figures were published

    def check(self, c: "Config") -> None:
        _check_choices(self)
        if self.published:
            _check_published(c)


@dataclass(frozen=True)
class Config:
    """One run: everything it depends on. `schema` adds the sections of a task and a network."""

    seed: int = seed()
    task: str = key("diffusion", PATH)  # a module of ditjax.tasks, or a dotted name of yours
    model: Any = dataclasses.field(default_factory=Model)  # the keys of its network, a `Model`
    data: Data = dataclasses.field(default_factory=Data)
    optim: Optim = dataclasses.field(default_factory=Optim)
    train: Train = dataclasses.field(default_factory=Train)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)
    sweep: Sweep = dataclasses.field(default_factory=Sweep)

    def __getattr__(self, name: str) -> Any:
        """A section that only some tasks have."""
        raise AttributeError(f"recipes of task {self.task!r} have no section {name!r}")

    @property
    def latent(self) -> bool:
        """Whether what is learned are latents of a frozen autoencoder."""
        a = getattr(self, "autoencoder", None)
        return a is not None and a.FROZEN and a.kind == "kl"

    @property
    def downsample(self) -> int:
        """Pixels per latent along a side: 8 for Stable Diffusion's autoencoder, 1 for pixels."""
        return 2 ** (len(self.autoencoder.multipliers) - 1) if self.latent else 1

    @property
    def input_size(self) -> int:
        """Side of what the network sees."""
        return self.data.image_size // self.downsample

    @property
    def input_channels(self) -> int:
        """Channels of what the network sees."""
        return self.autoencoder.latent_channels if self.latent else self.data.channels


def task_module(name: str) -> ModuleType:
    """The module of a task, which defines `TASK` (`training/task.py`)."""
    return _module_of("ditjax.tasks", "TASK", name)


def network_module(kind: str) -> ModuleType:
    """The module of a network, which defines `NETWORK` (`models/network.py`)."""
    return _module_of("ditjax.models", "NETWORK", kind)


def _module_of(package: str, mark: str, name: str) -> ModuleType:
    """The module that a recipe names: one of a package of ours, or a dotted name of yours.

    Raises UserError for a name that is neither.
    """
    if _DOTTED.fullmatch(name):
        if not hasattr(module := _imported(name), mark):
            raise UserError(f"{name!r}: the module defines no {mark} (see docs/design.md).")
        return module
    if name.isidentifier() and importlib.util.find_spec(f"{package}.{name}"):
        module = importlib.import_module(f"{package}.{name}")
        if hasattr(module, mark):
            return module
    files = pkgutil.iter_modules(importlib.import_module(package).__path__)
    modules = (importlib.import_module(f"{package}.{each.name}") for each in files)
    known = [each.__name__.rpartition(".")[2] for each in modules if hasattr(each, mark)]
    raise UserError(
        f"{shown(name)}: expected one of {', '.join(map(repr, known))}, or the dotted name of a"
        f" module of yours.{nearest(name, known)}"
    )


@functools.cache
def schema(task: str = "diffusion", kind: str = "") -> type[Config]:
    """`Config` with the sections of a task and the keys of a network, the task's own by default.

    Raises UserError for a name that is none.
    """
    definition = task_module(task).TASK
    network = network_module(kind or definition.network).NETWORK
    sections = {"model": network.keys, **definition.sections}
    fields = [(name, cls, dataclasses.field(default_factory=cls)) for name, cls in sections.items()]
    named = [("task", str, key(task, PATH)), *fields]
    return typing.cast(
        type[Config], dataclasses.make_dataclass("Config", named, bases=(Config,), frozen=True)
    )


def read(tree: Mapping[str, Any]) -> Config:
    """A recipe's nested mapping -> Config; keys that it leaves out have their defaults.

    Raises UserError for the first key that is unknown, mistyped, non-finite or out of range, and
    for values that contradict one another.
    """
    cls = schema_of(tree)
    schemas = (cls, *_other_networks(tree, cls))
    config: Config = _read_section(cls, tree, "", schemas)
    for name in hints(cls):
        if isinstance(section := getattr(config, name), Section):
            section.check(config)
    task_module(config.task).TASK.check(config)
    return config


def _other_networks(tree: Any, cls: type[Config]) -> "Schemas":
    """The schemas of networks that a recipe's study names: it may vary their keys, too."""
    task = cls().task
    found: list[str] = []

    def walk(value: Any) -> None:
        if _is_pair(value) and value[0] == "model.kind":
            found.extend(each for each in _parts(value[1]) if isinstance(each, str))
        elif isinstance(value, tuple | list):
            for each in value:
                walk(each)

    if "sweep" in tree and isinstance(tree["sweep"], Mapping):
        walk(list(tree["sweep"].values()))
    return tuple(schema(task, kind) for kind in dict.fromkeys(found))


def schema_of(tree: Any) -> type[Config]:
    """The schema of the task and network that a recipe names."""
    _check_group(tree, "config")
    task = _named(tree, "task", "task", "diffusion")
    model = tree.get("model", {})
    _check_group(model, "config.model")
    try:
        module = task_module(task)
    except UserError as error:
        raise UserError(f"config.task: {error}") from None
    kind = _named(model, "kind", "model.kind", module.TASK.network)
    try:
        return schema(task, kind)
    except UserError as error:
        raise UserError(f"config.model.kind: {error}") from None


def _named(tree: Mapping[str, Any], name: str, path: str, default: str) -> str:
    return str(_typed(str, tree[name], path)) if name in tree else default


def as_tree(c: Config) -> dict[str, Any]:
    """Every key of a recipe, as `read` takes it back."""
    return dataclasses.asdict(c)


def changed(c: Config, changes: Mapping[str, Any]) -> Config:
    """A recipe with keys changed, {'seed': 1, 'model': {'patch': 4}}, checked again.

    Raises UserError.
    """
    return read(merged(as_tree(c), changes))


def replaced(c: Config, **sections: Any) -> Config:
    """A recipe with whole sections in the place of its own, not checked."""
    return dataclasses.replace(c, **sections)


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's tree with keys changed."""
    result = dict(tree)
    for name, value in changes.items():
        group = isinstance(value, Mapping)
        result[name] = {**result.get(name, {}), **value} if group else value
    return result


def of_network(tree: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The section `model` of a recipe for another network: its kind, and the keys that both have.

    Raises UserError for a kind that is none.
    """
    legal: Any = hints(hints(schema(str(tree["task"]), kind))["model"])
    return {**{name: v for name, v in tree["model"].items() if name in legal}, "kind": kind}


# Keys that runs of before config.task lack, with the value that they ran with, where that is not
# today's default.
_BEFORE_TASKS = {"train": {"max_bad_steps": 0, "evaluate_num": 1000}}
_NETWORKS_BEFORE = {"dit": ("diffusion", "dit"), "autoencoder": ("autoencoder", "autoencoder")}


def migrated(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a run of any version, as today's `read` takes it, every key named.

    Values that are not legal are left for `read` to refuse.
    """
    tree: dict[str, Any] = {}
    tree |= {k: dict(v) if isinstance(v, Mapping) else v for k, v in recorded.items()}
    if "task" not in tree and isinstance(tree.get("train"), dict):
        for section, values in _BEFORE_TASKS.items():
            tree[section] = {**values, **tree[section]}
        network = tree["train"].pop("network", "dit")
        tree["task"] = network
        try:
            tree["task"], kind = _NETWORKS_BEFORE.get(network, (network, "dit"))
            legal: Any = hints(schema(tree["task"], kind))
        except (UserError, TypeError):  # no name of a task, or no name at all
            return tree
        # Before tasks every recipe had the sections of all of them.
        tree = {name: value for name, value in tree.items() if name in legal}
        if isinstance(tree.get("model"), dict):
            keys = hints(legal["model"])
            tree["model"] = {k: v for k, v in tree["model"].items() if k in keys}
            tree["model"]["kind"] = kind
    return completed(tree)


def completed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's tree with its defaults in it; what is not legal stays for `read` to refuse."""
    try:
        cls = schema_of(tree)
    except UserError:
        return dict(tree)
    defaults = as_tree(cls())
    result = {**defaults, **tree}
    for name, value in defaults.items():
        if isinstance(value, dict) and isinstance(group := result[name], Mapping):
            result[name] = {**value, **group}
    return result


def is_free(c: type[Config] | Config, dotted: str) -> bool:
    """Whether a resumed run may change a key: where and how often, never what is learned."""
    cls = c if isinstance(c, type) else type(c)
    section, _, leaf = dotted.partition(".")
    hint = hints(cls).get(section)
    if hint is None or not leaf:
        return False
    group: Any = hint
    return group.FREE or any(
        each.name == leaf and each.metadata["free"] for each in dataclasses.fields(group)
    )


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    found = typing.get_type_hints(cls)
    return {each.name: found[each.name] for each in dataclasses.fields(cls)}


def hints(cls: Any) -> dict[str, Any]:
    """Types of a dataclass's fields by name."""
    return _hints(cls)


def _check_group(tree: Any, where: str) -> None:
    if not isinstance(tree, Mapping) and not hasattr(tree, "keys"):
        raise UserError(f"{where} is {shown(tree)}: expected a group of keys.")


def _read_section(cls: type[T], tree: Any, path: str, schemas: "Schemas") -> T:
    where = f"config.{path}" if path else "config"
    _check_group(tree, where)
    legal = {each.name: each for each in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in tree.keys():  # noqa: SIM118 (a ConfigDict is no Mapping)
        if name not in legal:
            plain = isinstance(name, str) and name.isidentifier() and len(name) < 100
            word = name if plain else shown(name)
            raise UserError(
                f"{where}.{word} is no key of a recipe.{nearest(word, legal)}"
                f" Keys of {where}: {', '.join(legal)}."
            )
    values = {
        name: _read_key(
            each, hints(cls)[name], tree[name], f"{path}.{name}" if path else name, schemas
        )
        for name, each in legal.items()
        if name in tree
    }
    return cls(**values)


def _read_key(
    field: "dataclasses.Field[Any]", hint: Any, value: Any, path: str, schemas: "Schemas"
) -> Any:
    if dataclasses.is_dataclass(hint):
        return _read_section(typing.cast(type, hint), value, path, schemas)
    if reader := field.metadata["read"]:
        return reader(value, schemas)
    value = _typed(hint, value, path)
    for rule in field.metadata["rules"]:
        try:
            holds = rule.holds(value)
        except UserError as error:
            raise UserError(f"config.{path}: {error}") from None
        if not holds:
            raise UserError(f"config.{path} is {shown(value)}: expected {rule.expected}.")
    return value


def leaf_keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key of a schema, in order."""
    keys: list[str] = []
    for name, hint in hints(cls).items():
        group = dataclasses.is_dataclass(hint)
        keys += leaf_keys(typing.cast(type, hint), f"{prefix}{name}.") if group else [prefix + name]
    return keys


def type_of(cls: type, dotted: str) -> Any:
    """The type of a dotted key; None for a key that the schema lacks, or a group of keys."""
    hint: Any = cls
    for name in dotted.split("."):
        hint = hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
    return None if dataclasses.is_dataclass(hint) else hint


def _typed(hint: Any, value: Any, path: str) -> Any:
    said = f"config.{path} is {shown(value)}"
    if typing.get_origin(hint) is Literal:
        legal = typing.get_args(hint)
        # By type first: True and 1.0 equal 1.
        if type(value) is not type(legal[0]) or value not in legal:
            raise UserError(
                f"{said}: expected one of {', '.join(map(repr, legal))}."
                f"{nearest(value, map(str, legal)) if isinstance(value, str) else ''}"
            )
        return value
    wrong = UserError(f"{said}, of type {type(value).__name__}: expected {_name(hint)}.")
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple | list) or not value:
            raise wrong
        return tuple(_typed(typing.get_args(hint)[0], item, path) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if value.bit_length() < 1024 else math.inf
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise wrong
    if isinstance(value, float) and not (value == 0 or _TINY <= abs(value) <= _HUGE):
        raise UserError(
            f"{said}: expected a finite number, 0 or from {_TINY:.3g} to {_HUGE:.3g} in size, as"
            " float32 holds it."
        )
    if isinstance(value, int) and value.bit_length() > 62:
        raise UserError(f"{said}: expected an integer below 2**62.")
    if isinstance(value, str):
        if len(value) > _MAX_STRING:
            raise UserError(
                f"{said}, {len(value)} characters long: expected at most {_MAX_STRING}."
            )
        if any(unicodedata.category(each) in ("Cc", "Cs") for each in value):
            raise UserError(f"{said}: expected text without control characters and line ends.")
    return value


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"a list of {typing.get_args(hint)[0].__name__}, not empty"
    return {"str": "a string", "int": "an integer", "float": "a number", "bool": "True or False"}[
        hint.__name__
    ]


_SUFFIXES = {"": 1, "k": 10**3, "K": 10**3, "m": 10**6, "M": 10**6, "b": 10**9, "B": 10**9}
_NUMBER = re.compile(r"([+-]?[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,3})?)([kKmMbB]?)")


def parse_value(text: str, hint: Any, key: str) -> Any:
    """The value that a command line gives a key, by the key's type.

    Integers may be written 10_000, 400k, 1M or 1e3. Raises UserError.
    """
    if typing.get_origin(hint) is Literal:
        hint = type(typing.get_args(hint)[0])
    if hint is str:
        return text
    if hint is bool and text.lower() in ("true", "false", "1", "0"):
        return text.lower() in ("true", "1")
    if hint is int and (match := _NUMBER.fullmatch(text)):
        number = Decimal(match[1]) * _SUFFIXES[match[2]]
        if number == number.to_integral_value():
            return int(number)
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        if hint is float:
            return float(text)
        if hint not in (int, bool):
            return ast.literal_eval(text)
    expected = {
        bool: "True or False",
        int: "an integer, such as 4000, 10_000, 400k or 1e6",
        float: "a number",
    }.get(hint, "a Python tuple, such as (1, 2) or (('model.size', ('S', 'B')),)")
    raise UserError(f"--config.{key}={shown(text)[1:-1]}: expected {expected}.")
