"""Low-rank adapters (LoRA) in files of peft and diffusers: read, written, and as factors.

    peft       a folder: adapter_model.safetensors and adapter_config.json
    diffusers  one file, pytorch_lora_weights.safetensors, with or without a configuration inside

A module of either program's DiT computes W x + s B A x, with A [r, D], B [F, r] and s = alpha / r
(Hu et al. 2021, Eq. 3). Modules are named as in diffusers, where queries, keys and values are
three, or as in the release, where they are one. Three are written as one, and one is read as three,
without a change of B A: zero columns are added to B, or left out of it.
"""

import hashlib
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ditjax.errors import UserError, first_few, shown
from ditjax.files.assets import flatten
from ditjax.files.atomic import read_json, write_json
from ditjax.files.store import local_copy
from ditjax.training.transforms import num_projections
from ditjax.weights import tensors as weights
from ditjax.weights.layouts import DIT_DIFFUSERS, DIT_RELEASE, Layout, Shapes

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
CONFIG_KEY = "lora_adapter_metadata"  # in the metadata of diffusers' file: the configuration
_OF_PEFT, _OF_PIPELINE = _PREFIXES = ("base_model.model.", "transformer.")
_MAX_RANK = 2**16

ModuleNames = Literal["diffusers", "release"]


class Product(NamedTuple):
    """One product of a network: its layer, such as 'blocks/attn/qkv', block and projection.

    The projection counts q, k and v; the block is 0 in layers that no block holds.
    """

    layer: str
    block: int
    projection: int


class LowRank(NamedTuple):
    """s B A: a [r, D], b [F, r]."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return len(self.a)


class Adapter(NamedTuple):
    """An adapter of a DiT, and where it was found.

    `layout` is the program whose names its file has. `base` is the SHA-256 of the weights that it
    was trained beside, '' if that is not known. `notes` are lines to print.
    """

    path: Path
    layout: str
    modules: Mapping[Product, LowRank]
    base: str = ""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """'LoRA of rank 8', or of several ranks."""
        ranks = sorted({module.rank for module in self.modules.values()})
        return f"LoRA of rank {', '.join(map(str, ranks))}"

    @property
    def num_parameters(self) -> int:
        """The number of values of A and B, with an A for each projection."""
        return sum(module.a.size + module.b.size for module in self.modules.values())

    @property
    def dtype(self) -> np.dtype:
        """The floating-point type of the factors."""
        return next(iter(self.modules.values())).a.dtype

    @property
    def sha256(self) -> str:
        """The SHA-256 of the factors and their scales, in whatever file they are."""
        found = hashlib.sha256()
        for place, (a, b, scale) in sorted(self.modules.items(), key=lambda item: item[0]):
            found.update(f"{place.layer} {place.block} {place.projection} {scale!r}".encode())
            for factor in (a, b):
                found.update(
                    np.ascontiguousarray(factor, np.float32).reshape(-1).view(np.uint8).data
                )
        return found.hexdigest()


# ---- names


class _Module(NamedTuple):
    """A module of another program: its name, with '{i}' for the block, and its projections."""

    name: str
    layer: str
    projections: tuple[int, ...]
    pattern: re.Pattern[str]  # of its names; the group is the block


def _linear_layers(layout: Layout) -> dict[str, tuple[str, ...]]:
    """The modules that hold each of our linear layers; copies of a layer are left out."""
    return {
        rule.ours.removesuffix("/kernel"): tuple(x.removesuffix(".weight") for x in rule.theirs)
        for rule in layout
        if rule.kind == "linear" and not rule.copies
    }


_SPLIT = _linear_layers(DIT_DIFFUSERS)


def _modules(layout: Layout) -> tuple[_Module, ...]:
    found = []
    for layer, names in _linear_layers(layout).items():
        count = len(_SPLIT.get(layer, names))
        for k, name in enumerate(names):
            projections = tuple(range(count)) if len(names) == 1 else (k,)
            pattern = re.compile(re.escape(name).replace(r"\{i\}", "(?P<i>[0-9]{1,6})"))
            found.append(_Module(name, layer, projections, pattern))
    return tuple(found)


_NAMES: Mapping[ModuleNames, tuple[_Module, ...]] = {
    "diffusers": _modules(DIT_DIFFUSERS),
    "release": _modules(DIT_RELEASE),
}


def _located(name: str, modules: Sequence[_Module]) -> tuple[_Module, int] | None:
    """The module of a name, and its block; None for a name of none of them."""
    for module in modules:
        if match := module.pattern.fullmatch(name):
            return module, int(match.groupdict().get("i", 0))
    return None


# ---- configurations

# What a configuration of peft says that changes nothing of what a trained adapter computes.
_INERT = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("peft_version", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "megatron_config", "megatron_core", "runtime_config", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
}
_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    # Others, such as pissa, change the base.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


class _Stated(NamedTuple):
    """What a configuration states of a module, by its name: its rank and its scale."""

    rank: Callable[[str], int]
    scale: Callable[[str], float]


def _stated(where: str, config: Mapping[str, Any]) -> _Stated:
    """Read a configuration. Raises UserError for what is not plain LoRA."""
    odd = [
        f"{key}={shown(value)}"
        for key, value in sorted(config.items())
        if (value not in _ONLY[key] if key in _ONLY else value and key not in _INERT | _READ)
    ]
    if odd:
        raise UserError(f"{where} states {first_few(odd, 8)}: only plain LoRA is read.")
    rank = _chosen(where, config, "r", "rank_pattern", _is_rank)
    alpha = _chosen(where, config, "lora_alpha", "alpha_pattern", _is_finite)
    power = 0.5 if config.get("use_rslora") else 1  # Kalajdzievski 2023
    return _Stated(rank, lambda module: alpha(module) / rank(module) ** power)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MAX_RANK


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _chosen(
    where: str, config: Mapping[str, Any], key: str, pattern: str, legal: Callable[[Any], bool]
) -> Callable[[str], Any]:
    """(module) -> the value of the first pattern that its name matches, or that of the key."""
    table = config.get(pattern) or {}
    if not isinstance(table, Mapping):
        raise UserError(f"{where}: {pattern} is {shown(table)}: expected an object.")
    for name, value in ((key, config.get(key)), *table.items()):
        if not legal(value):
            raise UserError(
                f"{where}: {name if name == key else f'{pattern} of {shown(name)}'} is"
                f" {shown(value)}: expected a finite number, and of a rank an integer from 1 to"
                f" {_MAX_RANK}."
            )
    matches = {name: _ends_with(where, pattern, name) for name in table}
    return lambda module: next((table[x] for x, is_ in matches.items() if is_(module)), config[key])


def _ends_with(where: str, key: str, pattern: str) -> Callable[[str], bool]:
    """Whether the name of a module ends with the words of a pattern, or, after '^', is they.

    Other regular expressions are refused: a hostile one would match for ever.
    """
    words = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[\w.]+", words):
        raise UserError(
            f"{where}: {key} has {shown(pattern)}: expected names of modules, such as 'attn1.to_q'."
        )
    if pattern.startswith("^"):
        return lambda name: name == words
    return lambda name: f".{name}".endswith(f".{words}")


# ---- reading


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read a folder of peft, or a file of either program.

    Where no alpha is stated, it is the rank, as in diffusers. Raises UserError for anything else,
    with every tensor that is of no linear layer of a DiT, or every module of another rank.
    """
    file, beside = _files(local_copy(path))
    tensors, metadata = weights.read_named(file)
    prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), "")
    pairs, unknown = _pairs({name.removeprefix(prefix): x for name, x in tensors.items()})
    layout, modules = max(
        _NAMES.items(), key=lambda each: sum(_located(name, each[1]) is not None for name in pairs)
    )
    located = {name: home for name in pairs if (home := _located(name, modules))}
    unknown += [f"{x}.lora_{half}.weight" for x in pairs.keys() - located.keys() for half in "AB"]
    if unknown or not pairs:
        some = first_few(weights.collapse(unknown), 8) or "it holds no tensors"
        raise UserError(
            f"{path} is no adapter of a DiT: {some}; expected pairs of matrices of its linear"
            f" layers, such as {modules[0].name.format(i=0)}.lora_A.weight and lora_B.weight."
        )
    config = _config(file, beside, metadata)
    stated = _stated(*config) if config else None
    found: dict[Product, LowRank] = {}
    faults = []
    for name, (module, block) in located.items():
        a, b = pairs[name]
        count, rank = len(module.projections), stated.rank(name) if stated else len(a)
        if (len(a), b.shape[1], len(b) % count) != (rank, rank, 0):
            faults.append(f"{name} has A {a.shape} and B {b.shape}, not of rank {rank}")
            continue
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            faults.append(f"{name} has values that are not finite")
        scale = stated.scale(name) if stated else 1.0
        for k, rows in zip(module.projections, np.split(b, count), strict=True):
            pair = (a, rows) if count == 1 else _used(a, rows)
            found[Product(module.layer, block, k)] = LowRank(*pair, scale)
    if faults:
        raise UserError(
            f"{path}: {first_few(faults)}: expected the ranks that it states, and numbers."
        )
    notes = [f"{file}: {len(tensors)} tensors taken, none left out"]
    if not stated:
        notes.append(f"{file} states no alpha: its factors are taken with scale 1, as in diffusers")
    if config:
        notes += _unmet(*config, located)
    if idle := sum(not module.scale for module in found.values()):
        notes.append(f"{file}: {idle} of {len(found)} products have alpha 0 and change nothing")
    return Adapter(Path(path), layout, found, notes=tuple(notes))


def _files(path: Path) -> tuple[Path, Path | None]:
    """The tensors of an adapter, and its configuration if that is a file of its own."""
    if not os.path.isdir(path):
        beside = path.parent / PEFT_CONFIG
        return path, beside if path.name == PEFT_FILE and os.path.exists(beside) else None
    there = sorted(os.listdir(path))
    if PEFT_FILE in there and PEFT_CONFIG in there:
        return path / PEFT_FILE, path / PEFT_CONFIG
    if DIFFUSERS_FILE in there:
        return path / DIFFUSERS_FILE, None
    raise UserError(
        f"{path} holds no adapter: expected {PEFT_FILE} with {PEFT_CONFIG}, {DIFFUSERS_FILE}, or a"
        f" run of LoRA; it holds {first_few(there, 8) or 'nothing'}."
    )


def _pairs(
    tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """A and B by module, and the names of tensors that are no half of such a pair."""
    halves: dict[str, dict[str, np.ndarray]] = {}
    unknown = []
    for name, x in tensors.items():
        module, _, half = name.rpartition(".lora_")
        matrix = x.ndim == 2 and x.size and x.dtype in weights.FLOATS
        if matrix and half in ("A.weight", "B.weight"):
            halves.setdefault(module, {})[half[0]] = x
        else:
            unknown.append(name)
    unknown += [
        f"{name}.lora_{half}.weight" for name, x in halves.items() if len(x) < 2 for half in x
    ]
    return {name: (x["A"], x["B"]) for name, x in halves.items() if len(x) == 2}, unknown


def _config(
    file: Path, beside: Path | None, metadata: Mapping[str, str]
) -> tuple[str, dict[str, Any]] | None:
    """Where the configuration is, and what it says; None if there is none."""
    if beside:
        return str(beside), read_json(beside)
    if CONFIG_KEY not in metadata:
        return None
    try:
        config = json.loads(metadata[CONFIG_KEY])
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{file}: {CONFIG_KEY} in its metadata is not a JSON object.")
    return f"{CONFIG_KEY} of {file}", {k.removeprefix(_OF_PIPELINE): v for k, v in config.items()}


def _unmet(where: str, config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """A line on modules that a configuration lists and the file has no tensors of."""
    listed = config.get("target_modules")
    if not isinstance(listed, list):  # a regular expression, or a word for all
        return []
    ends = [f".{name}" for name in names]
    words = [x for x in listed if isinstance(x, str) and not any(e.endswith(f".{x}") for e in ends)]
    return [f"{where} lists {first_few(words)}, of which there are no tensors"] if words else []


def _used(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A and B without the zero columns of B; as they are if all are zero, as before training."""
    used = (b != 0).any(axis=0)
    return (a, b) if used.all() or not used.any() else (a[used], b[:, used])


# ---- factors


def from_factors(
    path: str | os.PathLike[str], tree: Mapping[str, Any], scale: float, stack: str, base: str
) -> Adapter:
    """The adapter of trained factors: a [.., S, D, r] and b [.., S, r, *features] by layer."""
    flat = flatten(tree)
    modules: dict[Product, LowRank] = {}
    for layer in (name.removesuffix("/a") for name in flat if name.endswith("/a")):
        a, b = flat[f"{layer}/a"], flat[f"{layer}/b"]
        b = b.reshape(*a.shape[:-2], a.shape[-1], -1)
        if not layer.startswith(f"{stack}/"):
            a, b = a[None], b[None]
        for block, k in itertools.product(*map(range, a.shape[:2])):
            modules[Product(layer, block, k)] = LowRank(a[block, k].T, b[block, k].T, scale)
    return Adapter(Path(path), "ditjax", modules, base)


def check_fits(adapter: Adapter, kernels: Shapes, stack: str) -> None:
    """Raise UserError unless every module of an adapter is a product of the network's kernels."""
    faults = []
    for (layer, block, k), (a, b, _) in adapter.modules.items():
        if (kernel := kernels.get(f"{layer}/kernel")) is None:
            faults.append(f"it has no {layer}")
            continue
        L, S, D, F = _products(layer, kernel, stack)
        if block >= L or k >= S or (a.shape[1], len(b)) != (D, F):
            faults.append(
                f"{layer} of block {block} maps {a.shape[1]} values to {len(b)}, and the network's"
                f" {L} map {D} to {F}"
            )
    if faults:
        raise UserError(
            f"{adapter.path} is an adapter of another network: {first_few(dict.fromkeys(faults))}."
        )


def _products(layer: str, kernel: tuple[int, ...], stack: str) -> tuple[int, int, int, int]:
    """Blocks, projections and the width before and after each, of a kernel [.., D, *features]."""
    L, D, *features = kernel if layer.startswith(f"{stack}/") else (1, *kernel)
    S = num_projections(features)
    return L, S, D, math.prod(features) // S


def factors_of(
    adapters: Iterable[tuple[Adapter, float]], kernels: Shapes, stack: str
) -> dict[str, np.ndarray]:
    """Factors f32 of Σ w s B A, by 'layer/a' and 'layer/b' as `transforms.low_rank` has them.

    Those of several adapters are concatenated along r, and padded with zeros. Each must fit. Raises
    UserError for a scale that float32 does not hold.
    """
    added: dict[str, dict[Product, list[tuple[np.ndarray, np.ndarray]]]] = {}
    for adapter, weight in adapters:
        for place, (a, b, scale) in adapter.modules.items():
            with np.errstate(over="ignore"):
                scaled = b.astype(np.float32) * np.float32(weight * scale)
            if not np.isfinite(scaled).all():
                raise UserError(
                    f"{adapter.path}: its factors times the scale {weight:g} are beyond float32:"
                    " expected a smaller one."
                )
            pair = a.astype(np.float32), scaled
            added.setdefault(place.layer, {}).setdefault(place, []).append(pair)
    found = {}
    for layer, places in added.items():
        kernel = kernels[f"{layer}/kernel"]
        L, S, D, F = _products(layer, kernel, stack)
        r = max(sum(len(a) for a, _ in pairs) for pairs in places.values())
        a_all, b_all = np.zeros((L, S, D, r), np.float32), np.zeros((L, S, r, F), np.float32)
        for (_, block, k), pairs in places.items():
            a, b = (np.concatenate([p[i] for p in pairs], axis=i) for i in (0, 1))
            a_all[block, k, :, : len(a)], b_all[block, k, : len(a)] = a.T, b.T
        lead = (L,) if layer.startswith(f"{stack}/") else ()
        features = kernel[len(lead) + 1 :]
        found[f"{layer}/a"] = a_all.reshape(*lead, S, D, r)
        found[f"{layer}/b"] = b_all.reshape(*lead, S, r, *features[int(S > 1) :])
    return found


# ---- writing


def write_peft(
    folder: str | os.PathLike[str], adapter: Adapter, names: ModuleNames = "diffusers"
) -> Path:
    """Write a folder of peft. Raises UserError for layers that the other network does not have."""
    folder, modules = Path(folder), _named(adapter, names)
    weights.write_safetensors(folder / PEFT_FILE, _halves(modules, _OF_PEFT), {"format": "pt"})
    write_json(folder / PEFT_CONFIG, _description(modules, names))  # last: now the folder is whole
    return folder


def write_lora_file(path: str | os.PathLike[str], adapter: Adapter) -> Path:
    """Write diffusers' one file, as of a pipeline's transformer, with its configuration.

    The scale is multiplied into B: not every way in which diffusers opens the file reads alpha.
    """
    modules = {name: _unscaled(module) for name, module in _named(adapter, "diffusers").items()}
    config = {f"{_OF_PIPELINE}{k}": v for k, v in _description(modules, "diffusers").items()}
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(config, indent=2, sort_keys=True)}
    return weights.write_safetensors(path, _halves(modules, _OF_PIPELINE), metadata)


def _named(adapter: Adapter, names: ModuleNames) -> dict[str, LowRank]:
    """The modules of another program. Projections that are one module there are joined."""
    homes = {(module.layer, k): module for module in _NAMES[names] for k in module.projections}
    if unknown := sorted(
        {p.layer for p in adapter.modules if (p.layer, p.projection) not in homes}
    ):
        raise UserError(
            f"{adapter.path} adapts {', '.join(unknown)}, which the DiT of {names} does not have:"
            f" expected some of {', '.join(dict.fromkeys(layer for layer, _ in homes))}."
        )
    found: dict[str, tuple[Sequence[int], dict[int, LowRank]]] = {}
    for place, module in sorted(adapter.modules.items(), key=lambda item: item[0]):
        home = homes[place.layer, place.projection]
        name = home.name.format(i=place.block)
        found.setdefault(name, (home.projections, {}))[1][place.projection] = module
    return {name: _joined(parts, every) for name, (every, parts) in found.items()}


def _joined(parts: Mapping[int, LowRank], every: Sequence[int]) -> LowRank:
    """One module of some of its projections: B block by block, or one A if all have the same."""
    first = next(iter(parts.values()))
    if len(every) == 1:
        return first
    if len({part.scale for part in parts.values()}) > 1:
        parts = {k: _unscaled(part) for k, part in parts.items()}
    scale = next(iter(parts.values())).scale
    if len(parts) == len(every) and all(np.array_equal(p.a, first.a) for p in parts.values()):
        return LowRank(first.a, np.concatenate([parts[k].b for k in every]), scale)
    F, column = len(first.b), 0
    a = np.concatenate([part.a for part in parts.values()])
    b = np.zeros((len(every) * F, len(a)), first.b.dtype)
    for k, part in parts.items():
        row = every.index(k) * F
        b[row : row + F, column : column + part.rank] = part.b
        column += part.rank
    return LowRank(a, b, scale)


def _unscaled(module: LowRank) -> LowRank:
    """The same product with scale 1, rounded once."""
    a, b, scale = module
    return LowRank(a, (b.astype(np.float32) * np.float32(scale)).astype(b.dtype), 1.0)


def _halves(modules: Mapping[str, LowRank], prefix: str) -> dict[str, np.ndarray]:
    found = {}
    for name, module in modules.items():
        found[f"{prefix}{name}.lora_A.weight"] = module.a
        found[f"{prefix}{name}.lora_B.weight"] = module.b
    return found


# What diffusers' class is to peft, which loads its base by it.
_AUTO_MAPPING = {
    "base_model_class": "DiTTransformer2DModel",
    "parent_library": "diffusers.models.transformers.dit_transformer_2d",
}


def _description(modules: Mapping[str, LowRank], names: ModuleNames) -> dict[str, Any]:
    """The configuration of peft that says what these modules compute."""
    ranks = {name: module.rank for name, module in modules.items()}
    alphas = {name: _alpha(module) for name, module in modules.items()}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    return {
        "alpha_pattern": {name: x for name, x in alphas.items() if x != alpha},
        "auto_mapping": _AUTO_MAPPING if names == "diffusers" else None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {name: x for name, x in ranks.items() if x != rank},
        "target_modules": sorted(modules),
        "task_type": None,
        "use_rslora": False,
    }


def _alpha(module: LowRank) -> int | float:
    """The alpha whose quotient by the rank is the scale, a round number where there is one."""
    alpha = module.scale * module.rank
    near = float(f"{alpha:.12g}")
    alpha = near if near / module.rank == module.scale else alpha
    return int(alpha) if alpha.is_integer() else alpha
