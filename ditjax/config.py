"""The schema of a recipe: every key, its type, its legal values. What else comes is refused.

A recipe (`experiments/*.py`) is an ml_collections ConfigDict that names every key. `read` turns it
into the frozen dataclasses below or raises UserError; nothing after it sees a ConfigDict.
"""

import dataclasses
import functools
import math
import typing
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from ditjax.errors import UserError, divisors, nearest, shown
from ditjax.models.sizes import parse_size


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy beyond its type, and how to say so."""

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


def fraction_below_one() -> Rule:
    # Above this one float32 rounds to 1: Adam's correction 1 - b**t would be 0.
    return Rule(lambda v: 0 <= v < 1 - 2**-25, "from 0 to below 1, in float32 too")


def axis_size() -> Rule:
    return Rule(lambda v: v == -1 or v >= 1, "at least 1, or -1 for all devices that are left")


def model_size() -> Rule:
    def holds(value: str) -> bool:
        parse_size(value)  # raises with its own, better message
        return True

    return Rule(holds, "a model size")


def path_text() -> Rule:
    return Rule(
        lambda v: all(len(part.encode()) <= 255 for part in v.split("/")),
        "a name or path, no part of it longer than 255 bytes",
    )


def features_name() -> Rule:
    def holds(value: str) -> bool:
        named = value in ("digits", "scenes", "none")
        return named or bool(value.partition("inception:")[2])

    return Rule(holds, "'digits', 'scenes', 'none' or 'inception:FILE'")


def levels() -> Rule:
    return Rule(lambda v: 1 <= len(v) <= 12 and min(v) >= 1, "1 to 12 numbers, each at least 1")


# Steps and records are counted in int32 on the devices.
Positive = Annotated[int, at_least(1), at_most(2**31 - 1)]
Count = Annotated[int, at_least(0), at_most(2**31 - 1)]
# JAX's keys take 32 bits of a seed and drop the rest: 2**32 would be 0 again.
Seed = Annotated[int, at_least(0), at_most(2**32 - 1)]
Small = Annotated[int, at_least(0), at_most(1024)]
Seconds = Annotated[int, at_least(1), at_most(86_400)]
PathName = Annotated[str, path_text()]
# The parts of a sample set are named by nine digits.
Samples = Annotated[int, at_least(2), at_most(999_999_999)]

_MAX_STRING = 4096  # characters, what a path may have
_MAX_TOKENS = 2**20
_MAX_CELLS = 10_000
# What float32 holds with all of its digits; parameters and rates are of that type.
_TINY, _HUGE = 2.0**-126, (2 - 2**-23) * 2.0**127


@dataclass(frozen=True)
class Model:
    """The denoiser (`models/dit.py`)."""

    size: Annotated[str, model_size()]  # 'S', 'B', 'L', 'XL' or depth x width x heads: '4x96x3'
    patch: Positive
    block: Literal["adaln_zero", "adaln", "cross_attention", "in_context"]
    mlp_ratio: Annotated[float, above(0), at_most(64)]
    label_dropout: Annotated[float, fraction_below_one()]  # > 0 makes a null label for guidance
    dtype: Literal["float32", "bfloat16"]  # compute; parameters stay float32
    remat: Literal["none", "dots", "full"]
    attention: Literal["auto", "plain", "cudnn", "flash"]  # auto: the best of the backend
    unroll: Positive  # blocks per scan step; depth and more: no loop at all
    matmul: Literal["default", "float32"]  # products of float32: the backend's fast ones, or exact
    # Where public implementations differ; the release has 0 and 1e-6, diffusers 1 and 1e-5.
    frequency_shift: Literal[0, 1]  # timestep frequencies exp(-ln 10^4 i / (128 - shift))
    norm2_eps: Annotated[float, above(0)]  # of the LayerNorm before a block's MLP
    # mup: initial weights, learning rates and attention by width, so that what is the best learning
    # rate at base_width and base_head_width is it at any (`models/mup.py`)
    parametrization: Literal["standard", "mup"]
    base_width: Positive
    base_head_width: Positive


@dataclass(frozen=True)
class Diffusion:
    """The process and its objective (`diffusion/`)."""

    timesteps: Annotated[int, at_least(2), at_most(100_000)]
    schedule: Literal["linear", "cosine"]
    prediction: Literal["eps", "x0", "v"]
    variance: Literal["learned_range", "fixed_small", "fixed_large"]
    loss: Literal["hybrid", "simple", "vlb"]


@dataclass(frozen=True)
class Data:
    """Where images come from (`data/stream.py`)."""

    name: PathName  # 'digits', 'digit_scenes', a tfds name, 'folder:PATH' or 'latents:PATH'
    split: str
    image_size: Annotated[int, at_least(1), at_most(16_384)]
    channels: Literal[1, 3]
    num_classes: Annotated[int, at_least(1), at_most(2**24)]
    flip: bool
    data_dir: PathName  # '' = $DITJAX_DATA or ~/.cache/ditjax/data
    cache_mb: Count  # splits that decode to less are kept in memory
    threads: Annotated[int, at_least(1), at_most(1024)]
    max_damaged: Count  # records that may be damaged: skipped, each named; 0 = stop at the first


@dataclass(frozen=True)
class Autoencoder:
    """The KL autoencoder in front of a latent DiT, or the network being trained itself."""

    kind: Literal["none", "kl"]
    path: PathName  # work directory of an autoencoder run; '' while it is the network in training
    base_width: Positive
    multipliers: Annotated[tuple[int, ...], levels()]
    res_blocks: Positive
    latent_channels: Positive
    groups: Positive
    scale: Annotated[float, above(0)]  # latents are multiplied by it: unit variance for the DiT
    kl_weight: Annotated[float, at_least(0)]


@dataclass(frozen=True)
class Optim:
    """AdamW (`training/optim.py`). The paper: lr 1e-4 constant, no decay, no clipping."""

    learning_rate: Annotated[float, above(0)]
    schedule: Literal["constant", "cosine"]
    warmup_steps: Count
    b1: Annotated[float, fraction_below_one()]
    b2: Annotated[float, fraction_below_one()]
    eps: Annotated[float, above(0)]
    weight_decay: Annotated[float, at_least(0)]
    clip_norm: Annotated[float, at_least(0)]  # 0 = no clipping
    # An update is skipped when its gradient's norm is above so many times their running mean.
    spike_factor: Annotated[float, zero_or_above(1)]  # 0 = off


@dataclass(frozen=True)
class Train:
    """The loop (`train.py`)."""

    network: Literal["dit", "autoencoder"]
    steps: Positive
    batch_size: Annotated[int, at_least(1), at_most(2**24)]  # global
    microbatches: Positive  # a step's batch is computed in so many parts: less memory, same update
    prefetch: Small  # batches that are put on the devices ahead of their step
    ema_decay: Annotated[float, fraction_below_one()]
    log_every_steps: Positive
    checkpoint_every_steps: Positive
    keep_checkpoints: Positive  # the newest; the best is kept beside them
    keep_every_steps: Count  # checkpoints of its multiples are kept for good; 0 = none
    grace_seconds: Positive  # from SIGTERM to the end: what is not saved by then is given up
    sample_every_steps: Count  # 0 = no sample grids while training
    evaluate_every_steps: Count  # 0 = no evaluation while training
    evaluate_num: Samples  # samples of such an evaluation
    max_bad_steps: Count  # so many in a row are skipped (not finite, or a spike); one more ends it


@dataclass(frozen=True)
class Mesh:
    """Devices as a grid (`parallel/mesh.py`); one axis may be -1: all that are left."""

    data: Annotated[int, axis_size()]  # copies of the state; the batch is split
    fsdp: Annotated[int, axis_size()]  # the state and the batch are split
    tensor: Annotated[int, axis_size()]  # heads and the MLP's width are split
    context: Annotated[int, axis_size()]  # tokens are split
    slices: Positive  # groups of devices with slow links between them: `data` times as many copies


@dataclass(frozen=True)
class Distributed:
    """Bounds of a run of several processes (`parallel/processes.py`)."""

    initialization_seconds: Seconds  # until all have met
    heartbeat_seconds: Seconds  # of silence until a process counts as dead


@dataclass(frozen=True)
class Sample:
    """How images are drawn (`sample.py`)."""

    sampler: Literal["ddpm", "ddim"]
    steps: str  # '250', 'ddim50' or section counts '10,15,20'
    eta: Annotated[float, within(0, 1)]  # DDIM only
    cfg_scale: Annotated[float, at_least(0)]  # 1 = no guidance
    cfg_channels: Literal["all", "three"]
    cfg_interval: tuple[float, ...]  # (low, high): guided at timesteps low <= t/T < high only
    clip_x0: bool  # clamp the predicted x_0 to [-1, 1]: for pixels, never for latents
    weights: Literal["ema", "model"]  # of a run: the average, or the parameters themselves
    batch_size: Annotated[int, at_least(1), at_most(2**24)]
    num: Annotated[int, at_least(1), at_most(999_999_999)]


@dataclass(frozen=True)
class Evaluate:
    """What a finished model is measured by (`evaluate.py`)."""

    split: str  # held-out images: of the validation loss, and of an autoencoder's PSNR
    features: Annotated[
        str, features_name(), path_text()
    ]  # 'digits', 'scenes', 'inception:FILE' or 'none'
    reference: PathName  # statistics, images or DATASET/SPLIT; '' = the training split
    num_samples: Samples
    labels: Literal["uniform", "balanced"]
    seed: Seed  # of the samples: the same noise for every model, whatever seed trained it
    guided_scale: Annotated[float, at_least(0)]  # accuracy of a second sample set; 0 = none
    guided_num: Samples
    # Pairs (t, eps) that L_simple is the mean of, on held-out images; 0 = no validation loss.
    val_loss_num: Annotated[int, zero_or_above(1), at_most(999_999_999)]


Override = tuple[str, Any]
Axis = tuple[str, tuple[Any, ...]]
# A published figure: what a run must have, the metric, its value.
Figure = tuple[tuple[Override, ...], str, float]
BUDGETS = ("steps", "images", "gflops")


@dataclass(frozen=True)
class Sweep:
    """The runs of a study (`studies.py`): every combination of what stands here.

    An override is a dotted key of this config and a value, an axis a key and its values. A key
    stands in one place only. All empty: the recipe is one run. `published` is what others have
    measured of such runs (`published.py`), never what we have.
    """

    grid: tuple[Axis, ...]  # each varies by itself
    lists: tuple[tuple[Override, ...], ...]  # runs that are told one by one
    zips: tuple[tuple[Axis, ...], ...]  # the axes of each are walked together
    seeds: tuple[int, ...]  # empty: the recipe's own seed
    budget: tuple[Any, ...]  # ('steps' | 'images' | 'gflops', number): makes each run's train.steps
    title: str
    topology: str  # CHIP:SHAPE, such as 'v5e:4x4', that a dry run tells the cost on; '' = none
    published: tuple[Figure, ...]
    published_protocol: tuple[tuple[str, str], ...]  # field and text: what fixes their meaning
    published_source: str  # where they stand


@dataclass(frozen=True)
class Config:
    """One run: everything it depends on."""

    seed: Seed
    model: Model
    diffusion: Diffusion
    data: Data
    autoencoder: Autoencoder
    optim: Optim
    train: Train
    mesh: Mesh
    distributed: Distributed
    sample: Sample
    evaluate: Evaluate
    sweep: Sweep

    @property
    def latent(self) -> bool:
        """Whether the denoiser works on latents of a frozen autoencoder."""
        return self.autoencoder.kind == "kl" and self.train.network == "dit"

    @property
    def downsample(self) -> int:
        """Pixels per latent along a side: 8 for Stable Diffusion's autoencoder, 1 for pixels."""
        return 2 ** (len(self.autoencoder.multipliers) - 1) if self.latent else 1

    @property
    def input_size(self) -> int:
        """Side of what the denoiser sees."""
        return self.data.image_size // self.downsample

    @property
    def input_channels(self) -> int:
        """Channels of what the denoiser sees."""
        return self.autoencoder.latent_channels if self.latent else self.data.channels


T = TypeVar("T")


def read(tree: Mapping[str, Any]) -> Config:
    """A recipe's nested mapping -> Config.

    Raises UserError for the first key that is unknown, missing, mistyped, non-finite or out of
    range, and for values that contradict one another.
    """
    config = _read_dataclass(Config, tree, "")
    _check_consistency(config)
    _check_sweep(config.sweep)
    return config


def changed(c: Config, changes: Mapping[str, Any]) -> Config:
    """A recipe with keys changed, {'seed': 1, 'model': {'patch': 4}}, checked again.

    Raises UserError.
    """
    tree = dataclasses.asdict(c)
    for name, value in changes.items():
        tree[name] = {**tree[name], **value} if isinstance(value, Mapping) else value
    return read(tree)


# Keys that recipes of finished runs may lack, with the value that they ran with.
_ADDED: Mapping[str, Mapping[str, Any]] = {
    "model": {
        "matmul": "default",
        "frequency_shift": 0,
        "norm2_eps": 1e-6,
        "attention": "auto",
        "parametrization": "standard",
        "base_width": 384,
        "base_head_width": 64,
    },
    "data": {"max_damaged": 0},
    "sample": {"cfg_interval": (0.0, 1.0), "weights": "ema"},
    "evaluate": {"reference": "", "seed": 0, "val_loss_num": 0},
    "train": {
        "evaluate_every_steps": 0,
        "evaluate_num": 1000,
        "microbatches": 1,
        "prefetch": 2,
        "keep_every_steps": 0,
        "grace_seconds": 25,
        "max_bad_steps": 0,
    },
    "optim": {"spike_factor": 0.0},
    "mesh": {"tensor": 1, "context": 1, "slices": 1},
    "distributed": {"initialization_seconds": 300, "heartbeat_seconds": 25},
    "sweep": {
        "lists": (),
        "zips": (),
        "seeds": (),
        "budget": (),
        "title": "",
        "topology": "",
        "published": (),
        "published_protocol": (),
        "published_source": "",
    },
}


def completed(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a run with the keys that did not exist when it was started."""
    tree = dict(recorded)
    for section, added in _ADDED.items():
        if isinstance(tree.get(section, {}), Mapping):
            tree[section] = {**added, **tree.get(section, {})}
    return tree


def _read_dataclass(cls: type[T], tree: Any, path: str) -> T:
    where = f"config.{path}" if path else "config"
    if not isinstance(tree, Mapping) and not hasattr(tree, "keys"):
        raise UserError(f"{where} is {shown(tree)}: expected a group of keys.")
    hints = typing.get_type_hints(cls, include_extras=True)
    prefix = f"{where}."
    for key in tree.keys():  # noqa: SIM118 (a ConfigDict is no Mapping)
        if key not in hints:
            plain = isinstance(key, str) and key.isidentifier() and len(key) < 100
            word = key if plain else shown(key)
            raise UserError(
                f"{prefix}{word} is no key of a recipe.{nearest(word, hints)}"
                f" Keys of {where}: {', '.join(hints)}."
            )
    values = {}
    for key, hint in hints.items():
        if key not in tree:
            raise UserError(f"{prefix}{key} is missing: a recipe names every key. Add it.")
        values[key] = _read_value(hint, tree[key], f"{path}.{key}" if path else key)
    return cls(**values)


def _read_value(hint: Any, value: Any, path: str) -> Any:
    rules: tuple[Any, ...] = ()
    if typing.get_origin(hint) is Annotated:
        hint, *rules = typing.get_args(hint)  # type: ignore[assignment]
    if dataclasses.is_dataclass(hint):
        return _read_dataclass(typing.cast(type, hint), value, path)
    if path in _SWEEP:
        return _SWEEP[path](value)
    value = _typed(hint, value, path)
    for rule in rules:
        try:
            holds = rule.holds(value)
        except UserError as error:
            raise UserError(f"config.{path}: {error}") from None
        if not holds:
            raise UserError(f"config.{path} is {shown(value)}: expected {rule.expected}.")
    return value


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


def _read_grid(value: Any) -> tuple[Axis, ...]:
    """(('model.size', ('S', 'B')), ('model.patch', (4, 2))): each key known, each value once."""
    axes = [_read_axis(axis, "grid") for axis in _parts(value)]
    if len({key for key, _ in axes}) < len(axes):
        raise UserError("config.sweep.grid names a key twice: join its values.")
    return tuple(axes)


def _read_lists(value: Any) -> tuple[tuple[Override, ...], ...]:
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
            _check_values(key, [each], "lists")
        runs.append(tuple((key, _hashable(each)) for key, each in run))
    return tuple(runs)


def _read_zips(value: Any) -> tuple[tuple[Axis, ...], ...]:
    """((('model.size', ('S', 'B')), ('optim.learning_rate', (2e-4, 1e-4))),): of one length."""
    zips = []
    for together in _parts(value):
        if not isinstance(together, tuple | list) or not together:
            raise UserError(
                f"config.sweep.zips holds {shown(together)}: expected axes that are walked"
                " together, such as (('model.size', ('S', 'B')), ('optim.b2', (0.99, 0.999)))."
            )
        axes = tuple(_read_axis(axis, "zips", once=False) for axis in together)
        if len({len(values) for _, values in axes}) > 1:
            lengths = ", ".join(f"{len(values)} of {key}" for key, values in axes)
            raise UserError(
                f"config.sweep.zips walks {lengths} together: expected the same number of values."
            )
        zips.append(axes)
    return tuple(zips)


def _read_seeds(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list):
        raise UserError(f"config.sweep.seeds is {shown(value)}: expected integers, such as (0, 1).")
    _check_values("seed", value, "seeds")
    if len(set(value)) < len(value):
        raise UserError(f"config.sweep.seeds is {shown(value)}: a seed stands twice.")
    return tuple(value)


def _read_budget(value: Any) -> tuple[Any, ...]:
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


def _read_published(value: Any) -> tuple[Figure, ...]:
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
        keys = {key: _check_values(key, [each], "published")[0] for key, each in row[0]}
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


def _read_fields(value: Any) -> tuple[tuple[str, str], ...]:
    """(('num_samples', '50000'), ...): each field once."""
    where = "config.sweep.published_protocol"
    if not _are_pairs(value):
        raise UserError(f"{where} is {shown(value)}: expected pairs such as ('labels', 'uniform').")
    fields = {key: _typed(str, text, "sweep.published_protocol") for key, text in value}
    if len(fields) < len(value):
        raise UserError(f"{where} names a field twice: {shown(value)}.")
    return tuple(fields.items())


_SWEEP: Mapping[str, Callable[[Any], Any]] = {
    "sweep.grid": _read_grid,
    "sweep.lists": _read_lists,
    "sweep.zips": _read_zips,
    "sweep.seeds": _read_seeds,
    "sweep.budget": _read_budget,
    "sweep.published": _read_published,
    "sweep.published_protocol": _read_fields,
}


def _parts(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[0], str)


def _are_pairs(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(map(_is_pair, value))


def _read_axis(axis: Any, where: str, *, once: bool = True) -> Axis:
    """('model.patch', (4, 2)). With `once` no value may stand in it twice."""
    if not _is_pair(axis):
        raise UserError(
            f"config.sweep.{where} holds {shown(axis)}: expected pairs such as"
            " ('model.patch', (4, 2))."
        )
    key, values = axis
    _check_key(key, where)
    if not isinstance(values, tuple | list) or not values:
        raise UserError(f"config.sweep.{where} gives {key!r} {shown(values)}: expected its values.")
    read = _check_values(key, values, where)
    if once and len(set(read)) != len(read):
        raise UserError(
            f"config.sweep.{where} gives {key!r} {shown(values)}: a value stands twice."
        )
    # As they were given: 1 for a float stays 1 in a cell's name.
    return key, tuple(map(_hashable, values))


def _check_key(key: str, where: str) -> Any:
    """The type and rules of a key that a study varies."""
    legal = _varied()
    if key not in legal:
        raise UserError(
            f"config.sweep.{where} names {shown(key)}, no key of a recipe.{nearest(key, legal)}"
        )
    return legal[key]


@functools.cache
def _varied() -> Mapping[str, Any]:
    return {k: hint for k, hint in leaf_hints(Config).items() if not k.startswith("sweep.")}


def _check_values(key: str, values: Any, where: str) -> list[Any]:
    hint = _check_key(key, where)
    try:
        return [_read_value(hint, each, key) for each in values]
    except UserError as error:
        raise UserError(f"config.sweep.{where}: {error}") from None


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_sweep(s: Sweep) -> None:
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


def leaf_hints(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the schema with its type and rules, in order."""
    hints: dict[str, Any] = {}
    for key, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            hints |= leaf_hints(typing.cast(type, hint), f"{prefix}{key}.")
        else:
            hints[prefix + key] = hint
    return hints


def leaf_keys(cls: type) -> list[str]:
    """Every dotted key of the schema, in order."""
    return list(leaf_hints(cls))


def _check_consistency(c: Config) -> None:
    """Values that are legal alone and impossible together."""
    if c.autoencoder.kind == "kl" or c.train.network == "autoencoder":
        factor = 2 ** (len(c.autoencoder.multipliers) - 1)
        if c.data.image_size % factor:
            raise UserError(
                f"config.data.image_size is {c.data.image_size}: the autoencoder's"
                f" {len(c.autoencoder.multipliers)} levels need a multiple of {factor}."
            )
        for m in c.autoencoder.multipliers:
            if (c.autoencoder.base_width * m) % c.autoencoder.groups:
                raise UserError(
                    f"config.autoencoder: width {c.autoencoder.base_width} x {m} is not divisible"
                    f" into {c.autoencoder.groups} groups: change base_width, multipliers or"
                    " groups."
                )
    if c.train.network == "autoencoder" and c.autoencoder.kind == "none":
        raise UserError(
            "config.train.network is 'autoencoder' but config.autoencoder.kind is 'none': set it to"
            " 'kl'."
        )
    if c.data.name.startswith("latents:") and not c.latent:
        raise UserError(
            f"config.data.name is {c.data.name!r}, encoded latents, and the recipe trains"
            f" {'an autoencoder' if c.train.network == 'autoencoder' else 'a DiT on pixels'}: name"
            " a data set of images, or set config.autoencoder.kind to 'kl' and"
            " config.train.network to 'dit'."
        )
    if c.train.network == "dit" and c.input_size % c.model.patch:
        sizes = divisors(c.input_size)
        raise UserError(
            f"config.model.patch is {c.model.patch}: an input of {c.input_size}x{c.input_size} is"
            f" not divisible by it. Patch sizes that divide: {', '.join(map(str, sizes))}."
        )
    tokens = (c.input_size // c.model.patch) ** 2
    if c.train.network == "dit" and tokens > _MAX_TOKENS:
        raise UserError(
            f"config.model.patch is {c.model.patch}: an input of {c.input_size}x{c.input_size} has"
            f" {tokens} tokens; expected at most {_MAX_TOKENS}: raise it, or lower"
            " config.data.image_size."
        )
    if int(parse_size(c.model.size).width * c.model.mlp_ratio) < 1:
        raise UserError(
            f"config.model.mlp_ratio is {c.model.mlp_ratio}: no hidden unit is left of width"
            f" {parse_size(c.model.size).width}; 4.0 is the paper's."
        )
    if c.diffusion.schedule == "linear" and c.diffusion.timesteps <= 20:
        raise UserError(
            f"config.diffusion.timesteps is {c.diffusion.timesteps}: the linear schedule needs at"
            " least 21; set more, or config.diffusion.schedule to 'cosine'."
        )
    if c.diffusion.loss == "hybrid" and c.diffusion.variance != "learned_range":
        raise UserError(
            f"config.diffusion.loss is 'hybrid' with variance {c.diffusion.variance!r}: L_vlb would"
            " train nothing. Set variance 'learned_range', or loss 'simple'."
        )
    if c.diffusion.loss == "simple" and c.diffusion.variance == "learned_range":
        raise UserError(
            "config.diffusion.loss is 'simple' with variance 'learned_range': nothing would train"
            " the variance. Set loss 'hybrid', or variance 'fixed_small'."
        )
    interval = c.sample.cfg_interval
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise UserError(
            f"config.sample.cfg_interval is {interval}: expected (low, high) with 0 <= low < high"
            " <= 1; (0.0, 1.0) guides every step."
        )
    guided = c.sample.cfg_scale != 1 or c.evaluate.guided_scale not in (0, 1)
    if guided and c.model.label_dropout == 0 and c.train.network == "dit":
        raise UserError(
            "guidance needs the null label: config.sample.cfg_scale or config.evaluate.guided_scale"
            " asks for it, and config.model.label_dropout is 0. Set label_dropout, or the scales to"
            " 1 and 0."
        )
    if c.sample.cfg_channels == "three" and c.input_channels < 3 and guided:
        raise UserError(
            "config.sample.cfg_channels is 'three' and the input has"
            f" {c.input_channels} channel(s): set it to 'all'."
        )
    if c.train.keep_every_steps % c.train.checkpoint_every_steps:
        raise UserError(
            f"config.train.keep_every_steps is {c.train.keep_every_steps} and"
            f" config.train.checkpoint_every_steps is {c.train.checkpoint_every_steps}: there is"
            " no checkpoint of every such step. Give a multiple of it, or 0."
        )
    if c.train.evaluate_every_steps and c.train.network != "dit":
        raise UserError(
            f"config.train.evaluate_every_steps is {c.train.evaluate_every_steps} and"
            f" config.train.network is {c.train.network!r}: only a DiT is evaluated while it"
            " trains. Set it to 0."
        )
    if c.train.evaluate_every_steps and c.evaluate.features == "none":
        raise UserError(
            f"config.train.evaluate_every_steps is {c.train.evaluate_every_steps} and"
            " config.evaluate.features is 'none': set features to 'digits', 'scenes' or"
            " 'inception:FILE', or evaluate_every_steps to 0."
        )
    if c.optim.warmup_steps >= c.train.steps:
        raise UserError(
            f"config.optim.warmup_steps is {c.optim.warmup_steps} and config.train.steps is"
            f" {c.train.steps}: the warm-up must end before the training does."
        )
    if c.train.batch_size % c.train.microbatches:
        raise UserError(
            f"config.train.microbatches={c.train.microbatches} does not divide"
            f" config.train.batch_size={c.train.batch_size}: numbers that do:"
            f" {', '.join(map(str, divisors(c.train.batch_size)))}."
        )
    if c.sweep.published:
        _check_published(c)
    free = [axis for axis in ("data", "fsdp", "tensor", "context") if getattr(c.mesh, axis) == -1]
    if len(free) > 1:
        raise UserError(
            f"config.mesh.{free[0]} and config.mesh.{free[1]} are -1: only one axis takes what is"
            " left; give the others their sizes."
        )


def _check_published(c: Config) -> None:
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
