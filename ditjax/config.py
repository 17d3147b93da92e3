"""A recipe: every key with the paper's value as its default, its type and its bounds.

A recipe file (`experiments/*.py`) states what differs from these defaults. `read` turns its nested
mapping into frozen dataclasses or raises UserError; the rest of the program uses only those.

`Config` has the sections that all tasks share. `config.task` and `config.model.kind` name modules:
`ditjax.tasks.NAME` and `ditjax.models.NAME`, or your own module by its dotted name. The task's
module adds sections (`Definition.sections`), and the network's module the keys of `config.model`
(`Network.keys`).
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import math
import pkgutil
import re
import sys
import typing
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from types import ModuleType
from typing import Any, ClassVar, Literal, TypeVar

from ditjax.errors import UserError, divisors, nearest, nearest_key, one_line, reason, shown

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """A condition on a value beyond its type, and its description for error messages."""

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


def between(low: float, high: float) -> Rule:
    return Rule(lambda v: low <= v <= high, f"from {low} to {high}")


# A larger value rounds to 1 in float32: Adam's correction 1 - b**t would be 0.
FRACTION = Rule(lambda v: 0 <= v < 1 - 2**-25, "from 0 to below 1, in float32 too")
AXIS_SIZE = Rule(lambda v: v == -1 or v >= 1, "at least 1, or -1 for all remaining devices")
PATH = Rule(
    lambda v: all(len(part.encode()) <= 255 for part in v.split("/")),
    "a name or path, no part of it longer than 255 bytes",
)


def key(
    default: T,
    *rules: Rule,
    free: bool = False,
    fixes: Mapping[Any, tuple[str, ...]] | None = None,
    protocol: bool = False,
    used_if: tuple[str, tuple[Any, ...]] | None = None,
    read: Callable[[Any, "Schemas"], Any] | None = None,
) -> T:
    """Define a key of a recipe by its default and the rules that a value must satisfy.

    free: a resumed run may change it. fixes: for a value of this key, the other keys that its
    meaning depends on; a resumed run may not change these. protocol: it affects what a score means,
    so it is part of the protocol. used_if: another key of its section, and the values of that key
    with which this one has an effect. read: a function that parses and checks a value with no
    simple type.
    """
    metadata = {
        "rules": rules,
        "free": free,
        "fixes": fixes or {},
        "protocol": protocol,
        "used_if": used_if,
        "read": read,
    }
    return dataclasses.field(default=default, metadata=metadata)


_DOTTED: re.Pattern[str] = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
# Of the classifiers that ship (`evaluation/features.py`).
SHIPPED_FEATURES = ("digits", "mnist", "fashion", "scenes", "clips", "captions", "rain")
FEATURES_EXPECTED = f"{', '.join(map(repr, SHIPPED_FEATURES))}, 'inception:FILE', 'dinov2:FILE'"
FEATURE_NAME = Rule(
    lambda v: (
        v in (*SHIPPED_FEATURES, "none")
        or bool(v.partition("inception:")[2] or v.partition("dinov2:")[2])
        or bool(_DOTTED.fullmatch(v))
    ),
    f"'none', {FEATURES_EXPECTED}, or the dotted name of your own function",
)


def registry(dotted: str) -> Mapping[str, Any]:
    """Import a registry by its dotted name, such as 'ditjax.diffusion.solvers.SAMPLERS'."""
    module, _, attribute = dotted.rpartition(".")
    known: Mapping[str, Any] = getattr(importlib.import_module(module), attribute)
    return known


def lookup(name: str, dotted: str) -> Any:
    """Return the object that a recipe names: an entry of a `registry`, or your own by dotted name.

    Raises UserError if nothing has that name.
    """
    known = registry(dotted)
    if name in known:
        return known[name]
    if not _DOTTED.fullmatch(name):
        raise UserError(
            f"{shown(name)}: expected one of {', '.join(map(repr, known))}, or the dotted name of"
            f" your own, such as 'package.module.name'.{nearest(name, known)}"
        )
    return import_attribute(name)


def import_attribute(name: str) -> Any:
    """Import the attribute at a dotted name, 'package.module.name'. Raises UserError."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(_import_module(module), attribute)
    except AttributeError:
        raise UserError(f"{name!r}: module {module!r} has no {attribute!r}.") from None


def check_no_imports(tree: Mapping[str, Any], where: str) -> None:
    """Raise UserError if a recipe stored in a file names a module that is not yet imported.

    Reading a recipe imports the modules that it names, but a downloaded file must not run code.
    """
    for name in _texts(tree):
        if not _DOTTED.fullmatch(name):
            continue
        known = {name, name.rpartition(".")[0]} & sys.modules.keys()
        if not known or name.partition(".")[0] in sys.stdlib_module_names:
            raise UserError(
                f"{where} names {name!r}, a module outside of ditjax, and a file must not run code:"
                " import that module first, from Python, if you trust it."
            )


# The keys whose dotted names are imported.
_IMPORTED = (
    "task",
    "model.kind",
    "data.name",
    "diffusion.loss",
    "control.source",
    "sample.sampler",
    "edit.method",
    "reward.source",
    "evaluate.features",
    "train.tracker",
)


def check_recorded(tree: Mapping[str, Any], where: str) -> None:
    """Say which modules a recorded recipe is about to import, and refuse Python's own.

    A run's recipe is trusted as code is: its dotted names are imported. No task, network or data
    set is in the standard library, but functions that do harm are. Raises UserError.
    """
    for key in _IMPORTED:
        section, _, leaf = key.rpartition(".")
        group = tree.get(section) if section else tree
        name = group.get(leaf) if isinstance(group, Mapping) else None
        if not isinstance(name, str) or not _DOTTED.fullmatch(name):
            continue
        if name.partition(".")[0] in sys.stdlib_module_names:
            raise UserError(
                f"{where} names {name!r} as config.{key}: a module of Python itself is none."
                " Restore the file, or do not use this run."
            )
        if not {name, name.rpartition(".")[0]} & sys.modules.keys():
            line = f"note: {where} names {name!r} as config.{key}: this module is imported"
            print(one_line(line), file=sys.stderr)


def _texts(tree: Any) -> Iterator[str]:
    """Yield every string in nested mappings and lists."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for each in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _texts(each)


def registered(dotted: str) -> Rule:
    """Require a name that `lookup` finds in a registry."""

    def holds(name: str) -> bool:
        lookup(name, dotted)  # raises an error with a better message
        return True

    return Rule(holds, "a known name")


def _import_module(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:  # the user's own module may fail in any way
        raise UserError(
            f"cannot import {module!r} ({type(error).__name__}: {reason(error)}): expected a module"
            " that Python can find; add its folder to PYTHONPATH."
        ) from None


# The devices count steps and records in int32.
_MOST = 2**31 - 1


def positive(default: int, *, most: int = _MOST, free: bool = False) -> int:
    """Define a key that is an integer from 1 to `most`."""
    return key(default, at_least(1), at_most(most), free=free)


def non_negative(default: int, *, most: int = _MOST, free: bool = False) -> int:
    """Define a key that is an integer from 0 to `most`."""
    return key(default, at_least(0), at_most(most), free=free)


def seed() -> int:
    """Define a seed. JAX's keys use 32 bits and drop the rest: 2**32 would be the same as 0."""
    return non_negative(0, most=2**32 - 1)


class Section:
    """A group of keys. `FREE`: a resumed run may change all of them."""

    FREE: ClassVar[bool] = False

    def check(self, c: "Config") -> None:
        """Raise UserError for values that are legal on their own but not together."""

    def unused(self, name: str, c: "Config") -> str:
        """The key, such as 'sample.sampler', whose value leaves a key without effect, or ''.

        A key of the same section needs no section's name.
        """
        fields = {each.name: each for each in dataclasses.fields(self)}  # type: ignore[arg-type]
        other, values = fields[name].metadata.get("used_if") or ("", ())
        return other if other and getattr(self, other) not in values else ""


@dataclass(frozen=True)
class Model(Section):
    """The keys of `config.model` that all networks share; a network's module adds its own."""

    # a module of ditjax.models, or the dotted name of your own module
    kind: str = key("dit", PATH)
    dtype: Literal["float32", "bfloat16"] = key("float32")  # of compute; parameters are float32
    # products of float32 matrices: the backend's fast mode, or exact
    matmul: Literal["default", "float32"] = key("default")

    @property
    def stride(self) -> int:
        """What the sides of an input must be divisible by."""
        return 1


@dataclass(frozen=True)
class Data(Section):
    """The data set (`data/source.py`)."""

    # 'digits', a tfds name, 'folder:PATH', 'latents:PATH', or the dotted name of your tfds builder
    name: str = key("imagenet2012", PATH)
    split: str = key("train")
    image_size: int = positive(256, most=16_384)
    channels: Literal[1, 3] = key(3)
    frames: int = positive(1, most=4096)  # of a clip; 1 = images
    frame_stride: int = positive(1, most=4096)  # frames of the data from one to the next
    num_classes: int = positive(1000, most=2**24)
    flip: bool = key(True)
    data_dir: str = key("", PATH, free=True)  # '' = $DITJAX_DATA or ~/.cache/ditjax/data
    cache_mb: int = non_negative(256, free=True)  # a split that decodes to less stays in memory
    threads: int = positive(16, most=1024, free=True)
    max_damaged: int = non_negative(0, free=True)  # damaged records to skip and report; 0 = stop

    def unused(self, name: str, c: "Config") -> str:
        return "data.frames" if name == "frame_stride" and self.frames == 1 else ""

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) of an image, or (F, H, W, C) of a clip."""
        image = (self.image_size, self.image_size, self.channels)
        return (self.frames, *image) if self.frames > 1 else image


@dataclass(frozen=True)
class Text(Section):
    """The captions of a data set, and how they become tokens (`data/captions.py`)."""

    captions: Literal["first", "random", "concat"] = key("random")  # of a record that has several
    feature: str = key("")  # with the captions; '' = the only one that holds texts
    tokenizer: str = key("scenes", PATH)  # the shipped one, a folder or a file
    tokens: int = positive(77, most=4096)  # to which every text is padded or cut

    def check(self, c: "Config") -> None:
        if c.data.flip:
            raise UserError(
                "config.data.flip is True: a mirrored image's caption may say 'left' of what is now"
                " on the right; set it to False."
            )


def numbers(path: str, kind: Any = float, *rules: Rule) -> Callable[[Any, "Schemas"], Any]:
    """A reader of any count of numbers, () among them, each of which satisfies the rules."""

    def read(value: Any, schemas: "Schemas") -> Any:
        if isinstance(value, tuple | list) and not value:
            return ()
        found = _typed(tuple[kind, ...], value, path)
        for rule in rules:
            if not all(map(rule.holds, found)):
                raise UserError(f"config.{path} is {shown(value)}: expected each {rule.expected}.")
        return found

    return read


@dataclass(frozen=True)
class Autoencoder(Section):
    """The KL autoencoder: the network that is trained, or the frozen one of a latent DiT."""

    FROZEN: ClassVar[bool] = False

    kind: Literal["none", "kl"] = key("kl")
    path: str = key("", PATH)  # a run's directory or weights; '' while it is being trained
    base_width: int = positive(128)
    multipliers: tuple[int, ...] = key(
        (1, 2, 4, 4),
        Rule(lambda v: 1 <= len(v) <= 12 and min(v) >= 1, "1 to 12 numbers, each at least 1"),
    )
    res_blocks: int = positive(2)
    latent_channels: int = positive(4)
    groups: int = positive(32)
    quant_conv: bool = key(True)  # a 1x1 convolution after the encoder; SD3's and Flux's have none
    post_quant_conv: bool = key(True)  # and before the decoder
    # A network sees (z - shift) * scale, or (z - latent_mean) * scale / latent_std by channel.
    scale: float = key(0.18215, above(0))
    shift: float = key(0.0)
    latent_mean: tuple[float, ...] = key((), read=numbers("autoencoder.latent_mean"))
    latent_std: tuple[float, ...] = key((), read=numbers("autoencoder.latent_std"))
    kl_weight: float = key(1e-6, at_least(0))

    @property
    def statistics(self) -> dict[str, Any]:
        """The keys that normalise latents, as plain JSON."""
        return {
            "scale": self.scale,
            "shift": self.shift,
            "latent_mean": list(self.latent_mean),
            "latent_std": list(self.latent_std),
        }

    def unused(self, name: str, c: "Config") -> str:
        return "autoencoder.kind" if self.kind == "none" and name != "kind" else ""

    def check(self, c: "Config") -> None:
        if self.kind == "none":
            if not self.FROZEN:
                raise UserError(
                    "config.autoencoder.kind is 'none', but this task trains the autoencoder: set"
                    " it to 'kl'."
                )
            return
        self._check_statistics()
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

    def _check_statistics(self) -> None:
        counts = {len(self.latent_mean), len(self.latent_std)}
        if counts not in ({0}, {self.latent_channels}):
            raise UserError(
                f"config.autoencoder.latent_mean has {len(self.latent_mean)} numbers and latent_std"
                f" {len(self.latent_std)}: expected one for each of the {self.latent_channels}"
                " channels in both, or none."
            )
        if min(self.latent_std, default=1.0) <= 0:
            raise UserError(
                f"config.autoencoder.latent_std is {self.latent_std}: expected numbers above 0."
            )
        if self.shift and self.latent_mean:
            raise UserError(
                f"config.autoencoder.shift is {self.shift} and latent_mean is given, too: expected"
                " one of them."
            )


@dataclass(frozen=True)
class FrozenAutoencoder(Autoencoder):
    """The autoencoder whose latents a network is trained on; kind 'none' for pixels."""

    FROZEN: ClassVar[bool] = True


@dataclass(frozen=True)
class Optim(Section):
    """AdamW (`training/optim.py`). The paper's: constant 1e-4, no weight decay, no clipping."""

    learning_rate: float = key(1e-4, above(0))
    # A cosine reaches 0 at the last step: another last step is another schedule.
    schedule: Literal["constant", "cosine"] = key("constant", fixes={"cosine": ("train.steps",)})
    warmup_steps: int = non_negative(0)
    # Steps after which the schedule begins anew; the first ends at the first of them.
    restarts: tuple[int, ...] = key((), read=numbers("optim.restarts", int))
    b1: float = key(0.9, FRACTION)
    b2: float = key(0.999, FRACTION)
    eps: float = key(1e-8, above(0))
    weight_decay: float = key(0.0, at_least(0))
    decay: Literal["all", "kernels"] = key("all")  # kernels: no scale and no bias decays
    clip_norm: float = key(0.0, at_least(0))  # 0 = no clipping
    # An update is skipped if its gradient norm exceeds this many times the norms' running mean.
    spike_factor: float = key(0.0, zero_or_above(1))  # 0 = off

    def check(self, c: "Config") -> None:
        if self.warmup_steps >= c.train.steps:
            raise UserError(
                f"config.optim.warmup_steps is {self.warmup_steps} and config.train.steps is"
                f" {c.train.steps}: the warm-up must end before the training does."
            )
        if not self.restarts:
            return
        if self.schedule == "constant":
            raise UserError(
                f"config.optim.restarts is {self.restarts} and config.optim.schedule is 'constant':"
                " a constant rate needs no restart; raise config.train.steps alone."
            )
        bounds = (0, *self.restarts, c.train.steps)
        for start, end in itertools.pairwise(bounds):
            if end - start <= self.warmup_steps:
                raise UserError(
                    f"config.optim.restarts is {self.restarts}: the schedule from step {start} to"
                    f" {end} must be longer than config.optim.warmup_steps={self.warmup_steps};"
                    " expected rising steps below config.train.steps."
                )


# Widths of power-function averages: standard deviations relative to the length of training. The
# averages that a run keeps add up to no narrower or wider one well.
WIDTH = between(0.025, 0.25)
# From which the average of another width is made. Of 0.05 and 0.1 they make those from 0.075 to
# 0.13 to within 0.03 % (docs/training.md).
FEWEST_SNAPSHOTS = 16


@dataclass(frozen=True)
class Train(Section):
    """The training loop (`train.py`)."""

    steps: int = positive(400_000, free=True)
    batch_size: int = positive(256, most=2**24)  # global
    microbatches: int = positive(1, free=True)  # parts of a step's batch: less memory, same update
    prefetch: int = non_negative(2, most=1024, free=True)  # batches moved to the devices ahead
    ema_decay: float = key(0.9999, FRACTION)
    # Further averages (`training/averages.py`): EMAs, and power-function averages by their width.
    ema_decays: tuple[float, ...] = key((), read=numbers("train.ema_decays", float, FRACTION))
    average_stds: tuple[float, ...] = key((), read=numbers("train.average_stds", float, WIDTH))
    average_every_steps: int = non_negative(0, free=True)  # between snapshots of average_stds
    log_every_steps: int = positive(100, free=True)
    # Beside the run's own log: 'wandb', 'trackio', or the dotted name of your own.
    tracker: str = key("none", registered("ditjax.runs.trackers.TRACKERS"), free=True)
    checkpoint_every_steps: int = positive(10_000, free=True)
    keep_checkpoints: int = positive(2, free=True)  # the newest; the best is kept beside them
    keep_every_steps: int = non_negative(0, free=True)  # its multiples are never deleted; 0 = off
    grace_seconds: int = positive(25, free=True)  # from SIGTERM to exit: the time to save
    sample_every_steps: int = non_negative(10_000, free=True)  # 0 = no sample grids while training
    evaluate_every_steps: int = non_negative(0, free=True)  # 0 = no evaluation while training
    evaluate_num: int = key(5_000, at_least(2), at_most(999_999_999), free=True)
    max_bad_steps: int = non_negative(5, free=True)  # consecutive skipped updates; more: stop

    def unused(self, name: str, c: "Config") -> str:
        needs = {"evaluate_num": "evaluate_every_steps", "average_every_steps": "average_stds"}
        other = needs.get(name)
        return other if other and not getattr(self, other) else ""

    @property
    def averages(self) -> tuple[str, ...]:
        """The names of the averages beside the EMA, by which config.sample.weights selects them."""
        powers = tuple(f"power:{std!r}" for std in self.average_stds)
        return powers + tuple(f"ema:{decay!r}" for decay in self.ema_decays)

    def check(self, c: "Config") -> None:
        if self.keep_every_steps % self.checkpoint_every_steps:
            raise UserError(
                f"config.train.keep_every_steps is {self.keep_every_steps} and"
                f" config.train.checkpoint_every_steps is {self.checkpoint_every_steps}: expected a"
                " multiple of it, or 0."
            )
        if self.evaluate_every_steps and c.evaluate.features == "none":
            raise UserError(
                f"config.train.evaluate_every_steps is {self.evaluate_every_steps} and"
                f" config.evaluate.features is 'none': set features to {FEATURES_EXPECTED},"
                " or evaluate_every_steps to 0."
            )
        self._check_averages()
        if self.batch_size % self.microbatches:
            raise UserError(
                f"config.train.microbatches={self.microbatches} does not divide"
                f" config.train.batch_size={self.batch_size}: numbers that do:"
                f" {', '.join(map(str, divisors(self.batch_size)))}."
            )

    def _check_averages(self) -> None:
        """Raise UserError for an average that is named twice, and for too few snapshots."""
        for name in ("average_stds", "ema_decays"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"config.train.{name} is {values}: expected each value once.")
        every = self.average_every_steps
        if self.average_stds and (not every or self.steps // every < FEWEST_SNAPSHOTS):
            made = f"makes {self.steps // every} snapshots" if every else "makes none"
            most = self.steps // FEWEST_SNAPSHOTS
            raise UserError(
                f"config.train.average_every_steps is {every}, which {made} in {self.steps} steps:"
                f" averages of other widths need at least {FEWEST_SNAPSHOTS}; expected"
                + (f" 1 to {most}." if most else f" {FEWEST_SNAPSHOTS} steps or more.")
            )


@dataclass(frozen=True)
class Mesh(Section):
    """The mesh of devices (`parallel/mesh.py`); one axis may be -1: all remaining devices."""

    FREE: ClassVar[bool] = True

    data: int = key(-1, AXIS_SIZE)  # splits the batch; the state is replicated
    fsdp: int = key(1, AXIS_SIZE)  # splits the state and the batch
    tensor: int = key(1, AXIS_SIZE)  # splits heads and the MLP's width
    context: int = key(1, AXIS_SIZE)  # splits tokens
    slices: int = positive(1)  # groups of devices with slow links between them

    def check(self, c: "Config") -> None:
        free = [axis for axis in ("data", "fsdp", "tensor", "context") if getattr(self, axis) == -1]
        if len(free) > 1:
            rest = " ".join(f"--config.mesh.{axis}=1" for axis in free[:-1])
            raise UserError(
                f"config.mesh.{' and config.mesh.'.join(free)} are -1 (data is, unless it is set):"
                " only one axis can take the remaining devices. To give them all to"
                f" {free[-1]}, add {rest}."
            )


@dataclass(frozen=True)
class Distributed(Section):
    """Time limits of a run with several processes (`parallel/processes.py`)."""

    FREE: ClassVar[bool] = True

    initialization_seconds: int = positive(300, most=86_400)  # until all have connected
    heartbeat_seconds: int = positive(25, most=86_400)  # of silence until a process counts as dead


SAMPLER_REGISTRY = "ditjax.diffusion.solvers.SAMPLERS"


@dataclass(frozen=True)
class Sample(Section):
    """Sampling (`sample.py`)."""

    FREE: ClassVar[bool] = True

    sampler: str = key("ddpm", registered(SAMPLER_REGISTRY), protocol=True)
    steps: str = key("250", protocol=True)  # '250', 'ddim50' or section counts '10,15,20'
    # '' = the process's own: respaced for ddpm, karras for edm, uniform for the others
    grid: Literal["", "uniform", "karras", "logsnr"] = key("", protocol=True)
    rho: float = key(7.0, above(0), protocol=True)  # of 'karras'
    shift: float = key(1.0, above(0), protocol=True)  # of the grid: t <- st/(1 + (s-1)t)
    last_step: float = key(0.0, between(0, 0.5), protocol=True)  # 0 = as long as the others
    eta: float = key(0.0, between(0, 1), protocol=True)  # DDIM only
    order: Literal[1, 2, 3] = key(2, protocol=True)  # UniPC only
    s_churn: float = key(0.0, at_least(0), protocol=True)  # EDM's sampler only, and the next three
    s_min: float = key(0.0, at_least(0), protocol=True)
    s_max: float = key(1e9, at_least(0), protocol=True)
    s_noise: float = key(1.0, above(0), protocol=True)
    rtol: float = key(1e-4, above(0), at_most(0.1), protocol=True)  # dopri5 only
    # SDE only, and the next two
    sde_form: Literal[
        "sigma", "constant", "sbdm", "linear", "decreasing", "increasing_decreasing"
    ] = key("sigma", protocol=True)
    sde_norm: float = key(1.0, above(0), protocol=True)
    sde_last: Literal["mean", "euler", "tweedie"] = key("mean", protocol=True)
    cfg_scale: float = key(1.0, at_least(0), protocol=True)  # 1 = no guidance
    cfg_channels: Literal["all", "three"] = key("three", protocol=True)
    # (low, high): guidance only at timesteps low <= t/T < high
    cfg_interval: tuple[float, ...] = key((0.0, 1.0), protocol=True)
    cfg_rule: Literal["cfg", "rescale", "apg", "zero"] = key("cfg", protocol=True)
    cfg_rescale: float = key(0.7, between(0, 1), protocol=True, used_if=("cfg_rule", ("rescale",)))
    apg_eta: float = key(0.0, between(0, 1), protocol=True, used_if=("cfg_rule", ("apg",)))
    # 0 = no bound
    apg_norm: float = key(0.0, at_least(0), protocol=True, used_if=("cfg_rule", ("apg",)))
    # of the change that guidance makes, from one evaluation to the next
    apg_momentum: float = key(0.0, between(-1, 1), protocol=True, used_if=("cfg_rule", ("apg",)))
    # the first steps, which do not move
    zero_steps: int = key(
        0, at_least(0), at_most(100_000), protocol=True, used_if=("cfg_rule", ("zero",))
    )
    # a worse network in place of the unconditional one: RUN, RUN@STEP or a file of weights
    guide: str = key("", PATH, protocol=True)
    # merged into the network: PATH[:SCALE],...
    adapters: str = key("", protocol=True, read=lambda value, _: _read_adapters(value))
    clip_x0: bool = key(False, protocol=True)  # clamp the predicted x_0 to [-1, 1]: pixels only
    # the average, the parameters as trained, 'ema:DECAY' or 'power:STD'
    weights: str = key("ema", protocol=True, read=lambda value, _: _read_weights(value))
    batch_size: int = positive(64, most=2**24)
    num: int = positive(64, most=999_999_999)

    def unused(self, name: str, c: "Config") -> str:
        every = {option for each in registry(SAMPLER_REGISTRY).values() for option in each.options}
        if name in every - {*lookup(self.sampler, SAMPLER_REGISTRY).options}:
            return "sampler"
        guided = self.cfg_scale != 1 or c.evaluate.guided_scale not in (0, 1)
        if name in ("cfg_channels", "cfg_interval", "cfg_rule", "guide") and not guided:
            return "cfg_scale"
        return super().unused(name, c)

    def check(self, c: "Config") -> None:
        interval = self.cfg_interval
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise UserError(
                f"config.sample.cfg_interval is {interval}: expected (low, high) with 0 <= low <"
                " high <= 1; (0.0, 1.0) guides every step."
            )
        held = ("ema", "model", *c.train.averages)
        made = self.weights.startswith("power:") and c.train.average_stds
        if self.weights not in held and not made:
            raise UserError(
                f"config.sample.weights is {self.weights!r}, and the run keeps"
                f" {', '.join(map(repr, held))}: expected one of these"
                + (", or another width." if c.train.average_stds else ".")
                + " Further averages are kept from a run's start, by config.train.average_stds and"
                " ema_decays."
            )


def adapters_of(text: str) -> tuple[tuple[str, float], ...]:
    """'PATH[:SCALE],...' -> each path and its scale, by default 1.

    What follows the last colon is the scale if it is a number. Raises UserError for no finite one.
    """
    found: list[tuple[str, float]] = []
    for word in filter(None, text.split(",")):
        path, _, number = word.rpartition(":")
        try:
            pair = path, float(number)
        except ValueError:
            pair = word, 1.0
        if not (pair[0] and PATH.holds(pair[0]) and abs(pair[1]) <= _HUGE):
            raise UserError(
                f"config.sample.adapters has {shown(word)}: expected PATH or PATH:SCALE, a finite"
                f" scale and {PATH.expected}."
            )
        if any(pair[0] == path for path, _ in found):
            raise UserError(f"config.sample.adapters names {shown(pair[0])} twice: add its scales.")
        found.append(pair)
    return tuple(found)


def _read_adapters(value: Any) -> str:
    text: str = _typed(str, value, "sample.adapters")
    adapters_of(text)  # raises
    return text


def _read_weights(value: Any) -> str:
    """'ema', 'model', 'ema:0.999' or 'power:0.13', with the number as Python writes it."""
    text: str = _typed(str, value, "sample.weights")
    kind, _, number = text.partition(":")
    rule = {"ema": FRACTION, "power": WIDTH}.get(kind)
    if text in ("ema", "model"):
        return text
    with contextlib.suppress(ValueError):
        if rule and rule.holds(float(number)):
            return f"{kind}:{float(number)!r}"
    raise UserError(
        f"config.sample.weights is {shown(value)}: expected 'ema', 'model', 'ema:DECAY' with a"
        f" decay {FRACTION.expected}, or 'power:STD' with a width {WIDTH.expected}."
        f"{nearest(text, ('ema', 'model'))}"
    )


@dataclass(frozen=True)
class Evaluate(Section):
    """The evaluation of a model (`evaluate.py`)."""

    FREE: ClassVar[bool] = True

    split: str = key("validation")  # held-out images for the validation loss or the PSNR
    # as FEATURE_NAME says
    features: str = key("none", PATH, FEATURE_NAME)
    reference: str = key("", PATH)  # statistics, images or DATASET/SPLIT; '' = the training split
    # The parts of a sample set have nine-digit names.
    num_samples: int = key(50_000, at_least(2), at_most(999_999_999))
    labels: Literal["uniform", "balanced"] = key("uniform")
    seed: int = seed()  # of the samples: every model starts from the same noise
    guided_scale: float = key(0.0, at_least(0))  # of a second sample set, for accuracy; 0 = none
    guided_num: int = key(1000, at_least(2), at_most(999_999_999))
    # Pairs (t, eps) on held-out images that L_simple is averaged over; 0 = no validation loss.
    val_loss_num: int = key(0, zero_or_above(1), at_most(999_999_999))
    # a CLIP, run or folder, that scores samples of captions by their cosine; '' = none
    clip: str = key("", PATH)
    # Held-out images whose likelihood under the probability-flow ODE is averaged; 0 = none.
    bpd_num: int = key(0, zero_or_above(1), at_most(999_999_999))

    def unused(self, name: str, c: "Config") -> str:
        return "evaluate.guided_scale" if name == "guided_num" and not self.guided_scale else ""


Override = tuple[str, Any]
SweepAxis = tuple[str, tuple[Any, ...]]
# A published figure: the keys that identify the run, the metric, its value.
Figure = tuple[tuple[Override, ...], str, float]
Schemas = tuple[type["Config"], ...]  # of the recipe, then of the other networks in its study
BUDGETS = ("steps", "images", "gflops")
_MAX_STRING = 4096  # characters, the longest path
_MAX_CELLS = 10_000
# The range of normal float32 numbers: parameters and rates are of that type.
_TINY, _HUGE = 2.0**-126, (2 - 2**-23) * 2.0**127


def _unexpected(where: str, value: Any, expected: str) -> UserError:
    return UserError(f"config.sweep.{where} {shown(value)}: expected {expected}.")


def _check_unique(items: Sequence[Any], what: str, where: str, value: Any) -> None:
    if len(set(items)) < len(items):
        raise UserError(f"config.sweep.{where} {shown(value)}: a {what} appears twice.")


def _read_grid(value: Any, schemas: Schemas) -> tuple[SweepAxis, ...]:
    """(('model.size', ('S', 'B')), ('model.patch', (4, 2))): each key known, each value once."""
    axes = tuple(_read_axis(axis, "grid", schemas) for axis in _as_list(value))
    _check_unique([key for key, _ in axes], "key", "grid is", value)
    return axes


def _read_lists(value: Any, schemas: Schemas) -> tuple[tuple[Override, ...], ...]:
    """((('model.patch', 4), ('seed', 1)), ()): runs, each a set of overrides that may be empty."""
    runs = []
    for run in _as_list(value):
        if not _are_pairs(run):
            example = "(('model.patch', 4), ('seed', 1))"
            raise _unexpected("lists holds", run, f"a run's overrides, such as {example}")
        _read_overrides(run, "lists", run, schemas)
        runs.append(tuple((key, _hashable(each)) for key, each in run))
    return tuple(runs)


def _read_zips(value: Any, schemas: Schemas) -> tuple[tuple[SweepAxis, ...], ...]:
    """((('model.size', ('S', 'B')), ('optim.learning_rate', (2e-4, 1e-4))),): of one length."""
    zips = []
    for together in _as_list(value):
        if not isinstance(together, tuple | list) or not together:
            example = "(('model.size', ('S', 'B')), ('optim.b2', (0.99, 0.999)))"
            raise _unexpected(
                "zips holds", together, f"axes that are walked together, such as {example}"
            )
        axes = tuple(_read_axis(axis, "zips", schemas, unique=False) for axis in together)
        if len({len(values) for _, values in axes}) > 1:
            lengths = ", ".join(f"{len(values)} of {key}" for key, values in axes)
            raise UserError(
                f"config.sweep.zips walks {lengths} together: expected the same number of values."
            )
        zips.append(axes)
    return tuple(zips)


def _read_seeds(value: Any, schemas: Schemas) -> tuple[int, ...]:
    if not isinstance(value, tuple | list):
        raise _unexpected("seeds is", value, "integers, such as (0, 1)")
    seeds = _read_values("seed", value, "seeds", schemas)
    _check_unique(seeds, "seed", "seeds is", value)
    return tuple(seeds)


def _read_budget(value: Any, schemas: Schemas) -> tuple[Any, ...]:
    """('gflops', 1e6), or ()."""
    match value:
        case []:
            return ()
        case [unit, int() | float() as number] if (
            unit in BUDGETS
            and not isinstance(number, bool)
            and 0 < number <= _HUGE
            and (unit == "gflops" or number == int(number))
        ):
            return (unit, number)
    raise _unexpected(
        "budget is",
        value,
        f"(UNIT, NUMBER), a unit of {', '.join(BUDGETS)} and a number above 0, whole but for"
        " gflops, such as ('gflops', 1e6); or ()",
    )


def _read_published(value: Any, schemas: Schemas) -> tuple[Figure, ...]:
    """(((('model.size', 'XL'), ('model.patch', 2)), 'fid', 19.47), ...).

    Every key and value must be legal, and no two figures may have the same keys and metric.
    """
    rows = _as_list(value)
    if len(rows) > _MAX_CELLS:
        raise UserError(
            f"config.sweep.published has {len(rows)} figures: expected at most {_MAX_CELLS}."
        )
    figures: dict[Any, Figure] = {}
    for row in rows:
        if not isinstance(row, tuple | list) or len(row) != 3 or not _are_pairs(row[0]):
            example = "((('model.size', 'XL'), ('model.patch', 2)), 'fid', 19.47)"
            raise _unexpected("published holds", row, f"figures such as {example}")
        keys = tuple(_read_overrides(row[0], "published", row, schemas).items())
        metric = _typed(str, row[1], "sweep.published")
        number = _typed(float, row[2], "sweep.published")
        if number <= 0:
            raise _unexpected("published holds", row, "a figure above 0")
        identity = (frozenset(keys), metric)
        if identity in figures:
            raise UserError(
                f"config.sweep.published holds two figures of one metric and cell: {shown(row)}."
            )
        figures[identity] = (keys, metric, number)
    return tuple(figures.values())


def _read_fields(value: Any, schemas: Schemas) -> tuple[tuple[str, str], ...]:
    """(('num_samples', '50000'), ...): each field once."""
    read = text_pairs("sweep.published_protocol", ("labels", "uniform"))
    pairs: tuple[tuple[str, str], ...] = read(value, schemas)
    _check_unique([field for field, _ in pairs], "field", "published_protocol is", value)
    return pairs


def text_pairs(path: str, example: tuple[str, str]) -> Callable[[Any, "Schemas"], Any]:
    """A reader of pairs of texts, (('a', 'b'), ...)."""

    def read(value: Any, schemas: "Schemas") -> Any:
        if not _are_pairs(value):
            raise UserError(f"config.{path} is {shown(value)}: expected pairs such as {example!r}.")
        return tuple((_typed(str, a, path), _typed(str, b, path)) for a, b in value)

    return read


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[0], str)


def _are_pairs(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(map(_is_pair, value))


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _read_axis(axis: Any, where: str, schemas: Schemas, *, unique: bool = True) -> SweepAxis:
    """('model.patch', (4, 2)). With `unique` no value may appear in it twice."""
    if not _is_pair(axis):
        raise _unexpected(f"{where} holds", axis, "pairs such as ('model.patch', (4, 2))")
    key, values = axis
    _check_key(key, where, schemas)
    if not isinstance(values, tuple | list) or not values:
        raise _unexpected(f"{where} gives {key!r}", values, "its values")
    read = _read_values(key, values, where, schemas)
    if unique:
        _check_unique(read, "value", f"{where} gives {key!r}", values)
    # The values as written: 1 for a float stays 1 in a cell's name.
    return key, tuple(map(_hashable, values))


def _read_overrides(pairs: Any, where: str, row: Any, schemas: Schemas) -> dict[str, Any]:
    """The checked values of the overrides in a row of a list, no key twice."""
    _check_unique([key for key, _ in pairs], "key", f"{where} holds", row)
    return {key: _read_values(key, [value], where, schemas)[0] for key, value in pairs}


def _check_key(key: str, where: str, schemas: "Schemas") -> type["Config"]:
    """The first schema that has a key. Raises UserError if a study cannot vary it."""
    for cls in schemas:
        if type_of(cls, key) is not None and not key.startswith("sweep."):
            return cls
    legal = [k for cls in schemas for k in leaf_keys(cls) if not k.startswith("sweep.")]
    if key.startswith("model."):
        hint = nearest(key, (each for each in legal if each.startswith("model.")), cutoff=0.8)
        raise UserError(
            f"config.sweep.{where} names {shown(key)}, which the recipe's network does not"
            f" have.{hint} Name a recipe of that network, or leave the study out with"
            f" --config.sweep.{where}=()."
        )
    raise UserError(
        f"config.sweep.{where} names {shown(key)}: expected a key of a recipe."
        f"{nearest_key(key, legal)}"
    )


def _read_values(key: str, values: Any, where: str, schemas: Schemas) -> list[Any]:
    """The values of a recipe's key, checked as the recipe's own would be."""
    cls: Any = _check_key(key, where, schemas)
    *groups, leaf = key.split(".")
    for group in groups:
        cls = hints(cls)[group]
    field = next(each for each in dataclasses.fields(cls) if each.name == leaf)
    try:
        return [_read_key(field, hints(cls)[leaf], each, key, schemas) for each in values]
    except UserError as error:
        raise UserError(f"config.sweep.{where}: {error}") from None


def _check_choices(s: "Sweep") -> None:
    """Raise UserError if two of the choices set the same key, or if they make too many runs."""
    # The runs of a list may share keys with each other, but not with the other choices.
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
                " remove it from one of them."
            )
        first[key] = where
    axes = [len(values) for _, values in s.grid] + [len(together[0][1]) for together in s.zips]
    count = math.prod([*axes, len(s.lists) or 1, len(s.seeds) or 1])
    if count > _MAX_CELLS:
        raise UserError(
            f"config.sweep has {count} cells: expected at most {_MAX_CELLS}; remove values, or"
            " split it into several studies."
        )


def _check_published(c: "Config") -> None:
    """Raise UserError unless the published figures are for images like those of the recipe."""
    protocol = dict(c.sweep.published_protocol)
    for field in ("image_size", "num_classes"):
        ours = str(getattr(c.data, field))
        if protocol.get(field) != ours:
            stated = protocol.get(field, "not stated")
            raise UserError(
                f"config.sweep.published is for {field} {stated} (config.sweep.published_protocol)"
                f" and config.data.{field} is {ours}: figures for other images cannot be compared;"
                " remove them with --config.sweep.published=()."
            )
    if not c.sweep.published_source:
        raise UserError(
            "config.sweep.published_source is empty: name the publication that"
            " config.sweep.published is from."
        )


@dataclass(frozen=True)
class Sweep(Section):
    """The runs of a study (`studies/cells.py`): every combination of these choices.

    An override is a dotted key of this config and a value; an axis is a key and its values. A key
    may be in one of the choices only. If all are empty, the recipe is one run. `published` are
    figures that others have reported for such runs (`studies/published.py`).
    """

    FREE: ClassVar[bool] = True

    grid: tuple[SweepAxis, ...] = key((), read=_read_grid)  # axes, in all combinations
    lists: tuple[tuple[Override, ...], ...] = key((), read=_read_lists)  # runs, one by one
    zips: tuple[tuple[SweepAxis, ...], ...] = key((), read=_read_zips)  # axes walked together
    seeds: tuple[int, ...] = key((), read=_read_seeds)  # empty: the recipe's own seed
    # ('steps' | 'images' | 'gflops', number): determines each run's train.steps
    budget: tuple[Any, ...] = key((), read=_read_budget)
    title: str = key("")
    topology: str = key("")  # CHIP:SHAPE, such as 'v5e:4x4', for the cost of a dry run; '' = none
    published: tuple[Figure, ...] = key((), read=_read_published)
    # (field, text) pairs: the evaluation protocol of the published figures
    published_protocol: tuple[tuple[str, str], ...] = key((), read=_read_fields)
    published_source: str = key("")  # where the figures were published

    def check(self, c: "Config") -> None:
        _check_choices(self)
        if self.published:
            _check_published(c)


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. `schema` adds the sections of a task and a network."""

    seed: int = seed()
    # a module of ditjax.tasks, or the dotted name of your own module
    task: str = key("diffusion", PATH)
    model: Any = dataclasses.field(default_factory=Model)  # the keys of its network, a `Model`
    data: Data = dataclasses.field(default_factory=Data)
    optim: Optim = dataclasses.field(default_factory=Optim)
    train: Train = dataclasses.field(default_factory=Train)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)
    sweep: Sweep = dataclasses.field(default_factory=Sweep)

    def __getattr__(self, name: str) -> Any:
        """Raise AttributeError for a section that this task does not have."""
        raise AttributeError(f"recipes of task {self.task!r} have no section {name!r}")

    @property
    def latent(self) -> bool:
        """Whether the network is trained on the latents of a frozen autoencoder."""
        a = getattr(self, "autoencoder", None)
        return a is not None and a.FROZEN and a.kind == "kl"

    @property
    def downsample(self) -> int:
        """Pixels per latent along a side: 8 for Stable Diffusion's autoencoder, 1 for pixels."""
        return 2 ** (len(self.autoencoder.multipliers) - 1) if self.latent else 1

    @property
    def input_size(self) -> int:
        """Height and width of the network's input."""
        return self.data.image_size // self.downsample

    @property
    def input_channels(self) -> int:
        """Channels of the network's input."""
        return self.autoencoder.latent_channels if self.latent else self.data.channels

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(H, W, C) of the network's input, or (F, H, W, C)."""
        return (*self.data.shape[:-3], self.input_size, self.input_size, self.input_channels)


def task_module(name: str) -> ModuleType:
    """Import the module of a task, which defines `TASK` (`training/task.py`)."""
    return _find_module("ditjax.tasks", "TASK", name)


def network_module(kind: str) -> ModuleType:
    """Import the module of a network, which defines `NETWORK` (`models/network.py`)."""
    return _find_module("ditjax.models", "NETWORK", kind)


def _find_module(package: str, attribute: str, name: str) -> ModuleType:
    """Import the module that a recipe names: one of a package, or your own by its dotted name.

    Raises UserError if there is none, or if it does not define `attribute`.
    """
    if _DOTTED.fullmatch(name):
        if not hasattr(module := _import_module(name), attribute):
            raise UserError(f"{name!r}: the module defines no {attribute} (see docs/design.md).")
        return module
    if name.isidentifier() and importlib.util.find_spec(f"{package}.{name}"):
        module = importlib.import_module(f"{package}.{name}")
        if hasattr(module, attribute):
            return module
    files = pkgutil.iter_modules(importlib.import_module(package).__path__)
    modules = (importlib.import_module(f"{package}.{each.name}") for each in files)
    known = [each.__name__.rpartition(".")[2] for each in modules if hasattr(each, attribute)]
    raise UserError(
        f"{shown(name)}: expected one of {', '.join(map(repr, known))}, or the dotted name of your"
        f" own module.{nearest(name, known)}"
    )


@functools.cache
def schema(task: str = "diffusion", kind: str = "") -> type[Config]:
    """`Config` with the sections of a task and the keys of a network, by default the task's.

    Raises UserError for an unknown task or network.
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
    """Turn a recipe's nested mapping into a Config; missing keys take their defaults.

    Raises UserError for the first key that is unknown, mistyped, non-finite or out of range, and
    for values that contradict each other.
    """
    cls = schema_of(tree)
    schemas = (cls, *_other_networks(tree, cls))
    config: Config = _read_section(cls, tree, "", schemas)
    for name in hints(cls):
        if isinstance(section := getattr(config, name), Section):
            section.check(config)
    task_module(config.task).TASK.check(config)
    return config


def check_used(c: Config, given: Iterable[str]) -> None:
    """Raise UserError if a key that the user gave has no effect beside the others.

    It may have one in a study that varies the other key. A section whose every key must have an
    effect, given or recorded, calls this in its `check`.
    """
    axes = [*c.sweep.grid, *(axis for together in c.sweep.zips for axis in together)]
    varied = {name for name, _ in (*axes, *(pair for run in c.sweep.lists for pair in run))}
    for dotted in given:
        by = voiding(c, dotted)
        if by and by not in varied:
            raise UserError(f"config.{dotted} has no effect: {void_by(c, by)}.")


def voiding(c: Config, dotted: str) -> str:
    """The key, such as 'sample.sampler', whose value leaves a key without effect, or ''."""
    section, _, leaf = dotted.partition(".")
    group = getattr(c, section, None)
    by = group.unused(leaf, c) if isinstance(group, Section) else ""
    return f"{section}.{by}" if by and "." not in by else by


def void_by(c: Config, key: str) -> str:
    """What makes another key void, and the remedy: "config.a.b is 'c': remove it, or ..."."""
    section, _, leaf = key.partition(".")
    value = getattr(getattr(c, section), leaf)
    return f"config.{key} is {value!r}; remove the one, or change the other"


def _other_networks(tree: Any, cls: type[Config]) -> "Schemas":
    """The schemas of the other networks in a recipe's study, whose keys it may vary too."""
    task = cls().task
    found: list[str] = []

    def walk(value: Any) -> None:
        if _is_pair(value) and value[0] == "model.kind":
            found.extend(each for each in _as_list(value[1]) if isinstance(each, str))
        elif isinstance(value, tuple | list):
            for each in value:
                walk(each)

    if "sweep" in tree and isinstance(tree["sweep"], Mapping):
        walk(list(tree["sweep"].values()))
    return tuple(schema(task, kind) for kind in dict.fromkeys(found))


def schema_of(tree: Any) -> type[Config]:
    """The schema of the task and network that a recipe names."""
    _check_group(tree, "config")
    task = _name_at(tree, "task", "task", "diffusion")
    model = tree.get("model", {})
    _check_group(model, "config.model")
    try:
        module = task_module(task)
    except UserError as error:
        raise UserError(f"config.task: {error}") from None
    kind = _name_at(model, "kind", "model.kind", module.TASK.network)
    try:
        return schema(task, kind)
    except UserError as error:
        raise UserError(f"config.model.kind: {error}") from None


def _name_at(tree: Mapping[str, Any], name: str, path: str, default: str) -> str:
    return str(_typed(str, tree[name], path)) if name in tree else default


def as_tree(c: Config) -> dict[str, Any]:
    """Every key of a recipe, as a nested mapping that `read` accepts."""
    return dataclasses.asdict(c)


def changed(c: Config, changes: Mapping[str, Any]) -> Config:
    """Change keys of a recipe, {'seed': 1, 'model': {'patch': 4}}, and check it again.

    Raises UserError as `read` does.
    """
    return read(merged(as_tree(c), changes))


def replaced(c: Config, **sections: Any) -> Config:
    """Replace whole sections of a recipe, without checks."""
    return dataclasses.replace(c, **sections)


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Change keys of a recipe's nested mapping."""
    result = dict(tree)
    for name, value in changes.items():
        group = isinstance(value, Mapping)
        result[name] = {**result.get(name, {}), **value} if group else value
    return result


def of_network(tree: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The section `model` of a recipe for another network: its kind, and the keys that both have.

    Raises UserError for an unknown kind.
    """
    legal: Any = hints(hints(schema(str(tree["task"]), kind))["model"])
    return {**{name: v for name, v in tree["model"].items() if name in legal}, "kind": kind}


# Runs older than config.task: the values of keys that they lack, where these were not today's
# defaults, and the task and network that train.network meant.
_OLD_DEFAULTS = {"train": {"max_bad_steps": 0, "evaluate_num": 1000}}
_OLD_NETWORKS = {"dit": ("diffusion", "dit"), "autoencoder": ("autoencoder", "autoencoder")}


def migrated(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the recorded recipe of a run of any version to today's keys, all of them present.

    Illegal values are kept: `read` raises UserError for them.
    """
    tree: dict[str, Any] = {}
    tree |= {k: dict(v) if isinstance(v, Mapping) else v for k, v in recorded.items()}
    if "task" not in tree and isinstance(tree.get("train"), dict):
        for section, values in _OLD_DEFAULTS.items():
            tree[section] = {**values, **tree[section]}
        network = tree["train"].pop("network", "dit")
        tree["task"] = network
        try:
            tree["task"], kind = _OLD_NETWORKS.get(network, (network, "dit"))
            legal: Any = hints(schema(tree["task"], kind))
        except (UserError, TypeError):  # not the name of a task, or not a name
            return tree
        # Every old recipe had the sections of all tasks.
        tree = {name: value for name, value in tree.items() if name in legal}
        if isinstance(tree.get("model"), dict):
            keys = hints(legal["model"])
            tree["model"] = {k: v for k, v in tree["model"].items() if k in keys}
            tree["model"]["kind"] = kind
    return completed(tree)


def completed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Add the defaults to a recipe's mapping; illegal values are kept, as in `migrated`."""
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


def is_free(cls: type[Config], dotted: str) -> bool:
    """Whether a key does not affect what is learned: a resumed run may change it.

    It may not if another key's meaning depends on it (`fixed_keys`).
    """
    section, _, leaf = dotted.partition(".")
    group: Any = hints(cls).get(section)
    if group is None or not leaf:
        return False
    return group.FREE or any(
        each.name == leaf and each.metadata["free"] for each in dataclasses.fields(group)
    )


def fixed_keys(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The keys that others of a recipe depend on, with these: {'train.steps': "optim.s='c'"}."""
    fixed: dict[str, str] = {}
    for section, group in hints(schema_of(recipe)).items():
        found = recipe.get(section)
        values = found if isinstance(found, Mapping) else {}
        for each in dataclasses.fields(group) if dataclasses.is_dataclass(group) else ():
            value = values.get(each.name, each.default)
            for of, keys in each.metadata["fixes"].items():
                if of == value:
                    fixed |= dict.fromkeys(keys, f"{section}.{each.name}={value!r}")
    return fixed


def _hints(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields by name."""
    types = typing.get_type_hints(cls)
    return {each.name: types[each.name] for each in dataclasses.fields(cls)}


hints: Callable[[Any], dict[str, Any]] = functools.cache(_hints)


def _check_group(tree: Any, where: str) -> None:
    if not isinstance(tree, Mapping) and not hasattr(tree, "keys"):
        raise UserError(f"{where} is {shown(tree)}: expected a group of keys.")


def _read_section(cls: type[T], tree: Any, path: str, schemas: "Schemas") -> T:
    where = f"config.{path}" if path else "config"
    _check_group(tree, where)
    legal = {each.name: each for each in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in tree.keys():  # noqa: SIM118 (a ConfigDict is not a Mapping)
        if name not in legal:
            plain = isinstance(name, str) and name.isidentifier() and len(name) < 100
            word = name if plain else shown(name)
            raise UserError(
                f"{where}.{word} is not a key of a recipe.{_hint(path, word, legal, schemas)}"
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


def _hint(path: str, word: str, legal: Iterable[str], schemas: "Schemas") -> str:
    """' Did you mean X?' for an unknown key: one of its section, else one of the whole recipe."""
    if hint := nearest(word, legal):
        return hint
    keys = [f"config.{each}" for each in leaf_keys(schemas[0])]
    return nearest_key(f"config.{path}.{word}" if path else f"config.{word}", keys)


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
    """List every dotted key of a schema, in order."""
    keys: list[str] = []
    for name, hint in hints(cls).items():
        group = dataclasses.is_dataclass(hint)
        keys += leaf_keys(typing.cast(type, hint), f"{prefix}{name}.") if group else [prefix + name]
    return keys


def type_of(cls: type, dotted: str) -> Any:
    """The type of a dotted key, or None for an unknown key and for a group of keys."""
    hint: Any = cls
    for name in dotted.split("."):
        hint = hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
    return None if dataclasses.is_dataclass(hint) else hint


def _typed(hint: Any, value: Any, path: str) -> Any:
    prefix = f"config.{path} is {shown(value)}"
    if typing.get_origin(hint) is Literal:
        legal = typing.get_args(hint)
        # By type first: True and 1.0 equal 1.
        if type(value) is not type(legal[0]) or value not in legal:
            raise UserError(
                f"{prefix}: expected one of {', '.join(map(repr, legal))}."
                f"{nearest(value, map(str, legal)) if isinstance(value, str) else ''}"
            )
        return value
    wrong_type = UserError(f"{prefix}, of type {type(value).__name__}: expected {_describe(hint)}.")
    if typing.get_origin(hint) is tuple and isinstance(value, int | float | str) and value != "":
        wrong_type = UserError(f"{prefix}: expected {_describe(hint)}, such as ({shown(value)},).")
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple | list) or not value:
            raise wrong_type
        return tuple(_typed(typing.get_args(hint)[0], item, path) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if value.bit_length() < 1024 else math.inf
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise wrong_type
    if isinstance(value, float) and not (value == 0 or _TINY <= abs(value) <= _HUGE):
        raise UserError(
            f"{prefix}: expected a finite number, 0 or from {_TINY:.3g} to {_HUGE:.3g} in size, as"
            " float32 holds it."
        )
    if isinstance(value, int) and value.bit_length() > 62:
        raise UserError(f"{prefix}: expected an integer below 2**62.")
    if isinstance(value, str):
        if len(value) > _MAX_STRING:
            raise UserError(
                f"{prefix}, {len(value)} characters long: expected at most {_MAX_STRING}."
            )
        if any(unicodedata.category(each) in ("Cc", "Cs") for each in value):
            raise UserError(f"{prefix}: expected text without control characters or line breaks.")
    return value


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"a list of {typing.get_args(hint)[0].__name__}, not empty"
    return {"str": "a string", "int": "an integer", "float": "a number", "bool": "True or False"}[
        hint.__name__
    ]


_SUFFIXES = {"": 1, "k": 10**3, "K": 10**3, "m": 10**6, "M": 10**6, "b": 10**9, "B": 10**9}
_NUMBER = re.compile(r"([+-]?[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,3})?)([kKmMbB]?)")


def parse_value(text: str, hint: Any, key: str) -> Any:
    """Parse a command line's value of a key by the key's type.

    Integers may be written 10_000, 400k, 1M or 1e3. Raises UserError for any other text.
    """
    if typing.get_origin(hint) is Literal:
        hint = type(typing.get_args(hint)[0])
    if hint is str and text not in ("None", "null"):
        return text
    if hint is str:
        raise UserError(
            f"--config.{key}={text}: expected a text; give nothing after the equals sign,"
            f" --config.{key}=, for an empty one."
        )
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
    if typing.get_args(hint)[:1] == (str,):
        expected = f"texts in a Python tuple, such as ({text!r},)"
    raise UserError(f"--config.{key}={shown(text)[1:-1]}: expected {expected}.")
