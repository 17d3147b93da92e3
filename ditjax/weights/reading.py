"""Load networks from files of the public release, diffusers, latent diffusion and ditjax.

A file is read as named tensors (`weights/tensors.py`). The names determine its layout and the
shapes its architecture; every tensor is checked against the architecture, and the rules of
`weights/layouts.py` convert the tensors to ditjax's parameters.
"""

import fnmatch
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import ml_dtypes
import numpy as np

from ditjax.config import Config, changed, check_no_imports, migrated, read
from ditjax.data.classes import ClassNames
from ditjax.errors import UserError, shown
from ditjax.files.assets import unflatten
from ditjax.files.atomic import read_json
from ditjax.files.store import local_copy, place, present
from ditjax.models.dit import PAPER_SIZES, DiTKeys, Size, parse_size
from ditjax.models.embed import sincos_position_embedding
from ditjax.models.unet import UNetKeys
from ditjax.models.video import temporal_table
from ditjax.weights import layouts, lightning, vocabulary
from ditjax.weights import tensors as weights
from ditjax.weights.arguments import Arguments, Labels, labels_of, stated_process
from ditjax.weights.networks import LoadedNetwork, check_fit, shapes_of, task_of

Numerics = Literal["auto", "release", "diffusers"]
Wanted = Literal["dit", "autoencoder", "any"]

_TABLE = {
    "release": "pos_embed",
    "latte": "pos_embed",
    "lightning": "pos_embed",
    "diffusers": "pos_embed.pos_embed",
}
_TEMPORAL_TABLE = "temp_embed"  # of Latte

_MAX_TIMESTEPS = 1_000_000
# Of averaging in float32, relative to a value. Each update rounds twice by at most 2^-24, until the
# pull towards the value balances it. Measured: 1.7e-4 at a decay of 0.9999, 1.4e-3 at 0.99999.
_AVERAGING_DRIFT = 2e-3
_MAX_SIDE = 2048  # of latents: far above any DiT's; bounds the position table for a hostile file

# Tensors by which a network is recognised below any prefix.
_UNET = "input_blocks.0.0.weight"
_DITS = ("x_embedder.proj.weight", "pos_embed.proj.weight", _UNET)
_AUTOENCODERS = ("encoder.conv_in.weight", "decoder.conv_in.weight")
_MARKS = {
    "dit": (_DITS,),
    "autoencoder": (_AUTOENCODERS,),
    "any": (_DITS, _AUTOENCODERS),
}

_FIRST = "transformer_blocks.0"
_CAPTION = "caption_projection.linear_1.weight"  # of PixArt-α

_DIT_LAYOUTS = {
    "release": layouts.DIT_RELEASE,
    "latte": layouts.LATTE,
    "diffusers": layouts.DIT_DIFFUSERS,
}


class WeightsOptions(TypedDict, total=False):
    """Choices that a weights file may leave open; see `load_network`."""

    which: str
    heads: int
    num_classes: int
    numerics: Numerics
    leave_out: Sequence[str]


_NOT_GIVEN: WeightsOptions = {
    "which": "ema",
    "heads": 0,
    "num_classes": 0,
    "numerics": "auto",
    "leave_out": (),
}


def check_no_options(
    path: str | os.PathLike[str], what: str, options: WeightsOptions, allowed: Sequence[str] = ()
) -> None:
    """Raise UserError for an option of weights files that is given and would have no effect."""
    for name, value in options.items():
        if name not in allowed and value != _NOT_GIVEN.get(name):
            raise UserError(
                f"--{name} is for weights files, and {path} is {what}: remove --{name}."
            )


class Given(NamedTuple):
    """What the user says of a DiT; 0 leaves it to the file."""

    heads: int
    num_classes: int
    numerics: Numerics


def load_network(
    path: str | os.PathLike[str],
    *,
    which: str = "ema",
    heads: int = 0,
    numerics: Numerics = "auto",
    num_classes: int = 0,
    leave_out: Sequence[str] = (),
    wanted: Wanted = "any",
    assumed_heads: int = 0,
) -> LoadedNetwork:
    """Load a DiT or a KL autoencoder from a weights file or a model folder of diffusers.

    `which`: the averaged ('ema') or the raw ('model') weights of a training checkpoint, the dotted
    path of others, or a folder's variant. `heads`, `num_classes`: for a file that does not contain
    them; a label table of one row more ends with the null label. `numerics`: 'auto' computes what
    the file's own program computes (see `DiTKeys.frequency_shift`); 'release' or 'diffusers'
    overrides it. `leave_out`: tensors or modules that the network does not use. `wanted`: the
    network to choose where a file holds several. `assumed_heads`: a recipe's, for a file that lacks
    them.

    Raises UserError for any other file, with a list of all faults.
    """
    if present(place(path) / vocabulary.MODEL_INDEX):
        raise UserError(f"{path} is a whole pipeline: expected its folder 'transformer' or 'vae'.")
    file = weights.read_tensors(path, which, _MARKS[wanted])
    file = _without(file, leave_out)
    names = file.tensors.keys()
    given = Given(heads, num_classes, numerics)
    assumed = given._replace(heads=heads or assumed_heads)
    if vocabulary.METADATA in file.metadata:
        return _without_effect(_load_ours(file), given)
    if _TEMPORAL_TABLE in names:
        return _load_dit(file, "latte", given)
    if lightning.is_lightning(names):
        return _load_dit(file, "lightning", assumed)
    if any(name.startswith(("x_embedder.", "t_embedder.", "blocks.0.attn.")) for name in names):
        return _load_dit(file, "release", assumed)
    if _UNET in names:
        return _without_effect(_load_unet(file, given), given)
    if _CAPTION in names:
        return _without_effect(_load_pixart(file, given), given)
    if any(name.startswith("transformer_blocks.0.") for name in names):
        return _load_dit(file, "diffusers", assumed)
    if any(re.match(r"(first_stage_model\.)?(encoder|decoder)\.", name) for name in names):
        return _without_effect(_load_autoencoder(file), given)
    some = ", ".join(weights.collapse(names)[:4]) or "nothing"
    raise UserError(
        f"{path} holds no known network: expected a DiT (of the public release or of diffusers), a"
        " U-Net (of guided-diffusion) or a KL autoencoder (of diffusers or latent diffusion); it"
        f" holds {some}."
    )


def _without_effect(network: LoadedNetwork, given: Given) -> LoadedNetwork:
    """A network whose file says all. Raises UserError for a user who says something else."""
    c = network.config
    size = getattr(c.model, "size", "")
    shift = {0: "release", 1: "diffusers"}.get(getattr(c.model, "frequency_shift", -1))
    found = {
        "heads": parse_size(size).heads if size else None,
        "num_classes": None if network.decodes else c.data.num_classes,
        "numerics": shift,
    }
    for name, value in found.items():
        if getattr(given, name) not in (_NOT_GIVEN[name], value):  # type: ignore[literal-required]
            states = "has none" if value is None else f"states {value}"
            raise UserError(
                f"--{name} is {getattr(given, name)}, and {network.files[0]}, a {network.name},"
                f" {states}: remove --{name}."
            )
    return network


def load_autoencoder(path: str | os.PathLike[str], which: str = "ema") -> LoadedNetwork:
    """Load the autoencoder of a DiT. A `which` other than 'ema' and 'model' is the DiT's alone."""
    which = which if which in ("ema", "model") else "ema"
    return load_network(path, which=which, wanted="autoencoder")


def _without(file: weights.TensorFile, leave_out: Sequence[str]) -> weights.TensorFile:
    """Leave out tensors by name, by the module that they are in, or by a pattern such as '*.x'."""

    def matches(name: str, pattern: str) -> bool:
        return any(fnmatch.fnmatchcase(name, each) for each in (pattern, f"{pattern}.*"))

    for pattern in leave_out:
        if not any(matches(name, pattern) for name in file.tensors):
            raise UserError(f"{file.path} has no tensor {shown(pattern)} to leave out.")
    return file.without(lambda name: any(matches(name, pattern) for pattern in leave_out))


def _load_ours(file: weights.TensorFile) -> LoadedNetwork:
    try:
        kept = json.loads(file.metadata[vocabulary.METADATA])
        sections = kept["config"]
        # Files older than config.task name their network.
        task = {"task": kept["task"]} if "task" in kept else {"train": {"network": kept["network"]}}
        check_no_imports({**sections, **task}, "its recipe")
        # The metadata have no section train; the values that `migrated` adds for it are not theirs.
        config = read({**migrated({**sections, **task}), "train": {}})
        shapes = shapes_of(config)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{file.path}: illegal metadata for a ditjax file: {error!r}.") from None
    weights.check_tensors(file.path, f"{task_of(config).name} of ditjax", file.tensors, shapes)
    tree = unflatten({name: np.asarray(file.tensors[name]) for name in shapes})
    return LoadedNetwork(
        config,
        {"params": tree},
        "ditjax",
        file.files,
        (file.account,),
        class_names=_named_in(file, config),
    )


def _named_in(file: weights.TensorFile, c: Config) -> ClassNames | None:
    """The class names in the metadata of a safetensors file; None if there are none."""
    if (text := file.metadata.get(vocabulary.CLASS_NAMES)) is None:
        return None
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not (
        isinstance(names, list)
        and len(names) == c.data.num_classes
        and all(
            isinstance(each, list) and all(isinstance(name, str) for name in each) for each in names
        )
    ):
        raise UserError(
            f"{file.path}: {vocabulary.CLASS_NAMES} in its metadata are not the names of"
            f" {c.data.num_classes} classes."
        )
    return tuple(map(tuple, names))


# The published DiTs are bare weights of this network. A training checkpoint also has arguments.
_PUBLISHED = ("XL", 2, 1000, (256, 512))


def _looks_published(file: weights.TensorFile, c: Config) -> bool:
    size, patch, classes, sides = _PUBLISHED
    ours = (c.model.size, c.model.patch, c.data.num_classes)
    return not file.extra and ours == (size, patch, classes) and c.data.image_size in sides


def _shape(file: weights.TensorFile, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that determines the architecture."""
    tensor = file.tensors.get(name)
    if tensor is None or tensor.ndim != rank or 0 in tensor.shape:
        found = "missing" if tensor is None else f"of shape {tensor.shape}"
        raise UserError(
            f"{file.path}: {name} is {found}, but its shape determines the architecture. The file"
            " is incomplete, or of another network."
        )
    return tensor.shape


def _count(names: Iterable[str], pattern: str) -> int:
    """1 + the largest number that a pattern matches in the names, at most the number of names."""
    names = list(names)
    found = [int(m[1]) for name in names if (m := re.match(pattern, name))]
    return min(1 + max(found, default=0), len(names))


def _recipe(file: weights.TensorFile, changes: Mapping[str, Any]) -> Config:
    """The paper's recipe with keys changed. Raises UserError that names the file.

    OverflowError is caught because a JSON integer may be too large for a float.
    """
    try:
        return read(changes)
    except (UserError, OverflowError) as error:
        raise UserError(f"{file.path}: {error}") from None


def _dit_recipe(
    file: weights.TensorFile, layout: str, given: Given, arguments: Arguments, labels: Labels
) -> Config:
    """The recipe of a DiT, from the shapes of its tensors and what the file says in words."""
    release = layout != "diffusers"
    prefix = "x_embedder" if release else "pos_embed"
    D, C, p, _ = _shape(file, f"{prefix}.proj.weight", 4)
    depth = _count(file.tensors, r"(?:transformer_)?blocks\.([0-9]{1,9})\.")
    out, _ = _shape(file, "final_layer.linear.weight" if release else "proj_out_2.weight", 2)
    own = lightning.block_keys(file.path, file.tensors) if layout == "lightning" else {}
    hidden = _hidden_width(file, release, own.get("mlp") == "swiglu")
    _check_outputs(file.path, out, p, C)
    if not release:
        _check_config(file, _DIT_CONFIG)
    input_size = _input_size(file, layout, p)
    size = Size(depth, D, _heads(file, depth, D, given.heads, arguments))
    of_diffusers = (layout if given.numerics == "auto" else given.numerics) == "diffusers"
    norm2_eps = file.config.get("norm_eps", 1e-5) if of_diffusers else 1e-6
    latent = C not in (1, 3)
    factor = 16 if layout == "lightning" else 8  # pixels of a latent
    projector = _projector(file, depth, arguments)
    frames = _shape(file, _TEMPORAL_TABLE, 3)[1] if layout == "latte" else 0
    learned, process = out == 2 * p * p * C, _process(arguments, layout, bool(projector))
    flows = "process" in process
    return _recipe(
        file,
        {
            "model": {
                "size": _size_name(size),
                "patch": p,
                "mlp_ratio": _mlp_ratio(hidden, D),
                "frequency_shift": int(of_diffusers),
                "norm2_eps": norm2_eps,
                "label_dropout": labels.dropout,
                **projector,
                **own,
                **({"kind": "video", "video": "alternate"} if frames else {}),
            },
            "diffusion": {
                **process,
                # SiT's networks have channels for a variance that is neither trained nor read.
                "variance": _VARIANCES[flows][learned],
                "loss": "hybrid" if learned and not flows else "simple",
            },
            "data": {
                "image_size": input_size * (factor if latent else 1),
                "num_classes": labels.classes,
                "channels": 3 if latent else C,
                **({"frames": frames} if frames else {}),
            },
            **_around(layout, C, flows),
        },
    )


def _around(layout: str, channels: int, flows: bool) -> dict[str, dict[str, Any]]:
    """The autoencoder and the sampling of a DiT."""
    latent, light = channels not in (1, 3), layout == "lightning"
    drawn: Mapping[str, Any] = lightning.SAMPLING if light else _SIT_SAMPLING if flows else {}
    return {
        "autoencoder": {
            "kind": "kl" if latent else "none",
            "latent_channels": channels,
            **({"multipliers": lightning.AUTOENCODER} if light and latent else {}),
        },
        "sample": {
            # Latte guides all channels.
            "cfg_channels": "three" if layout in _GUIDES_THREE and channels >= 3 else "all",
            "clip_x0": not latent,
            **drawn,
        },
    }


def _check_outputs(path: Path, out: int, p: int, C: int) -> None:
    if out not in (p * p * C, 2 * p * p * C):
        raise UserError(
            f"{path}: its last layer has {out} outputs: expected {p * p * C}, or {2 * p * p * C}"
            f" with a learned variance, for {p}x{p} patches of {C} channels."
        )


# REPA's process, where a file with its projector does not state one.
_REPA_PROCESS = {"process": "flow", "prediction": "velocity", "time_scale": 1.0}
_REPA_BLOCK = 8
_OF_PROJECTOR = "projectors.0.{}.weight"


_GUIDES_THREE = ("release", "lightning")


def _hidden_width(file: weights.TensorFile, release: bool, swiglu: bool) -> int:
    """The hidden width of the blocks' MLPs."""
    if swiglu:
        return _shape(file, "blocks.0.mlp.w3.weight", 2)[1]
    name = "blocks.0.mlp.fc1.weight" if release else "transformer_blocks.0.ff.net.0.proj.weight"
    return _shape(file, name, 2)[0]


def _process(arguments: Arguments, layout: str, repa: bool) -> Mapping[str, Any]:
    unstated = lightning.PROCESS if layout == "lightning" else _REPA_PROCESS if repa else {}
    return stated_process(arguments) or unstated


def _projector(file: weights.TensorFile, depth: int, arguments: Arguments) -> dict[str, int]:
    """The keys of config.model that describe REPA's projector; {} if the file has not just one."""
    names = {_OF_PROJECTOR.format(i) for i in (0, 2, 4)}
    if {name for name in file.tensors if re.match(r"projectors\..*weight", name)} != names:
        return {}
    width, _ = _shape(file, _OF_PROJECTOR.format(0), 2)
    features, _ = _shape(file, _OF_PROJECTOR.format(4), 2)
    stated = arguments.whole("align_block")
    block = stated.value if stated else min(_REPA_BLOCK, depth)
    return {"align_block": block, "align_width": width, "align_features": features}


def _unstated_projector(c: Config, path: Path, arguments: Arguments) -> tuple[str, ...]:
    """What is taken for granted of a file with REPA's projector."""
    taken = []
    if c.model.align_block and not arguments.whole("align_block"):
        taken.append(f"its projector reads block {c.model.align_block}")
    if c.model.align_block and not stated_process(arguments):
        taken.append("its process is REPA's linear path, with velocities and unscaled times")
    return (
        (f"{path} does not say so, but is taken for REPA's: {'; '.join(taken)}",) if taken else ()
    )


# Whether it is a flow -> whether the network has 2C channels -> config.diffusion.variance.
_VARIANCES = {False: ("fixed_small", "learned_range"), True: ("none", "unused")}
# The sampler of SiT's own script: 250 steps of its SDE.
_SIT_SAMPLING = {"sampler": "sde", "steps": "250", "last_step": 0.04}


def _load_dit(file: weights.TensorFile, layout: str, given: Given) -> LoadedNetwork:
    arguments = Arguments(file.path, file.config, file.extra)
    of_table = f"{_FIRST}.norm1.emb.class_embedder" if layout == "diffusers" else "y_embedder"
    rows, _ = _shape(file, f"{of_table}.embedding_table.weight", 2)
    labels = labels_of(arguments, rows, given.num_classes, DiTKeys().label_dropout)
    config = _dit_recipe(file, layout, given, arguments, labels)
    size, p = parse_size(config.model.size), config.model.patch
    side = config.input_size // p
    if layout == "lightning":
        plain = lightning.to_plain(file.path, file.tensors, config.model, *size[::2], side)
        file = file._replace(tensors=plain)
    what = f"DiT of {size.depth} layers, width {size.width}, patch {p} in the layout of"
    shapes = shapes_of(config)
    rules = _rules_of(layout, config) + (layouts.REPA_PROJECTOR if config.model.align_block else [])
    expected = dict(layouts.expected_shapes(rules, shapes, patch=p, depth=size.depth))
    table = _TABLE[layout]
    if layout != "diffusers" or table in file.tensors:
        expected[table] = (1, side**2, size.width)
    if layout == "latte":
        expected[_TEMPORAL_TABLE] = (1, config.data.frames, size.width)
    # The tables are compared and not used: their type does not matter.
    tables = {table, _TEMPORAL_TABLE}
    weights.check_tensors(
        file.path, f"{what} {_program(layout)}", file.tensors, expected, any_float=tables
    )
    if table in expected:
        _check_table(file.path, table, file.tensors[table], size.width, side)
    if layout == "latte":
        _check_times(file.path, file.tensors[_TEMPORAL_TABLE], size.width)
    notes = (
        file.account,
        *(() if labels.stated else (_unstated_labels(file.path, rows),)),
        *_unstated_projector(config, file.path, arguments),
        *_unstated_process(layout, file.path, arguments),
    )
    return LoadedNetwork(
        config,
        _params(file, rules, shapes),
        layout,
        file.files,
        notes,
        class_names=_named_in(file, config),
        published=_looks_published(file, config),
    )


_PIXART_CONFIG: Mapping[str, tuple[Any, ...]] = {
    # The published folders are older than the class.
    "_class_name": ("PixArtTransformer2DModel", "Transformer2DModel"),
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_single",),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-6,),
    "attention_bias": (True,),
}
_LATTE_CLASS = "LatteTransformer3DModel"
_LATTE_BLOCKS = "temporal_transformer_blocks."
_PIXART_TOKENS = 120  # to which its pipeline pads and cuts texts
_UNUSED_NULL = "caption_projection.y_embedding"  # a learned null text, which its pipeline ignores


def _load_pixart(file: weights.TensorFile, given: Given) -> LoadedNetwork:
    """PixArt-α, or Latte of texts, in a folder of diffusers.

    Its config.json says heads, size and positions, and of clips their frames.
    """
    file = file.without(lambda name: name == _UNUSED_NULL)
    clips = any(name.startswith(_LATTE_BLOCKS) for name in file.tensors)
    _check_config(file, {**_PIXART_CONFIG, **({"_class_name": (_LATTE_CLASS,)} if clips else {})})
    D, C, p, _ = _shape(file, "pos_embed.proj.weight", 4)
    out, _ = _shape(file, "proj_out.weight", 2)
    hidden, _ = _shape(file, f"{_FIRST}.ff.net.0.proj.weight", 2)
    _, width = _shape(file, _CAPTION, 2)
    depth = _count(file.tensors, r"transformer_blocks\.([0-9]{1,9})\.") * (1 + clips)
    _check_outputs(file.path, out, p, C)
    side = _input_size(file, "diffusers", p)
    heads = _heads(file, depth, D, given.heads, Arguments(file.path, file.config, file.extra))
    latent = C not in (1, 3)
    pixels = side * (8 if latent else 1)
    sized = "adaln_single.emb.resolution_embedder.linear_1.weight" in file.tensors
    learned = out == 2 * p * p * C
    config = _recipe(
        file,
        {
            "task": "text2image",
            "model": {
                "kind": "text_video" if clips else "text_dit",
                "size": _size_name(Size(depth, D, heads)),
                "patch": p,
                "mlp_ratio": _mlp_ratio(hidden, D),
                "position_grid": _position_grid(file, side, p),
                "size_condition": pixels if sized else 0,
            },
            "text": {"width": width, "tokens": _PIXART_TOKENS, **_text_keys(file)},
            "diffusion": {
                "variance": "learned_range" if learned else "fixed_small",
                "loss": "hybrid" if learned else "simple",
            },
            "data": {
                "image_size": pixels,
                "channels": 3 if latent else C,
                "num_classes": 1,
                "flip": False,
                **({"frames": _video_length(file)} if clips else {}),
            },
            "autoencoder": {"kind": "kl" if latent else "none", "latent_channels": C},
            "sample": {"cfg_channels": "all", "clip_x0": not latent},
        },
    )
    shapes = shapes_of(config)
    rules = layouts.PIXART_SIZED if sized else layouts.PIXART
    rules = layouts.LATTE_TEXT if clips else rules
    what = f"DiT of texts of {depth} layers, width {D}, patch {p} in the layout of diffusers"
    expected = layouts.expected_shapes(rules, shapes, patch=p)
    weights.check_tensors(file.path, what, file.tensors, expected)
    params = _params(file, rules, shapes)
    return LoadedNetwork(config, params, "diffusers", file.files, (file.account,))


def _video_length(file: weights.TensorFile) -> int:
    """The frames of Latte's clips."""
    frames = file.config.get("video_length", 16)
    if type(frames) is not int or not 2 <= frames <= 1024:
        raise UserError(
            f"{file.path}: video_length in {weights.CONFIG_FILE} is {shown(frames)}: expected a"
            " whole number from 2 to 1024."
        )
    return frames


def _text_keys(file: weights.TensorFile) -> dict[str, Any]:
    """The keys of config.text that a file of ours states; {} of another program's."""
    try:
        stated = json.loads(file.metadata.get(vocabulary.TEXT, "{}"))
        return {name: stated[name] for name in ("tokens", "features") if name in stated}
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{file.path}: {vocabulary.TEXT} in its metadata is not JSON.") from None


def _position_grid(file: weights.TensorFile, side: int, patch: int) -> int:
    """config.model.position_grid: positions are divided by interpolation_scale, by default s/64."""
    scale, tokens = file.config.get("interpolation_scale"), side // patch
    scale = max(side // 64, 1) if scale is None else scale
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not number or scale < 1 or (tokens / scale) % 1:
        raise UserError(
            f"{file.path}: interpolation_scale in {weights.CONFIG_FILE} is {shown(scale)}: expected"
            f" a number of at least 1 that divides the {tokens} tokens of a side."
        )
    return 0 if scale == 1 else int(tokens / scale)


def _rules_of(layout: str, c: Config) -> layouts.Layout:
    if layout == "lightning":
        return layouts.lightning_layout(c.model.mlp == "swiglu", c.model.qk_norm)
    return _DIT_LAYOUTS[layout]


def _unstated_process(layout: str, path: Path, arguments: Arguments) -> tuple[str, ...]:
    """What is taken for granted of a LightningDiT."""
    if layout != "lightning" or stated_process(arguments):
        return ()
    return (
        f"{path} does not say so, but is taken for LightningDiT's: the linear path, with velocities"
        " from noise to data and unscaled times",
    )


_ADM_HEAD_WIDTH = 64  # of the published models but for that of 128x128
_ADM_128 = (256, (1.0, 1.0, 2.0, 3.0, 4.0))
_ADM_DEEPEST = 8  # the lowest resolution of all published models


def _unet_keys(file: weights.TensorFile) -> dict[str, Any]:
    """The keys of config.model of guided-diffusion's U-Net, from names and shapes.

    Blocks that halve have the tensors of others, so the levels are counted on the way up, where a
    block that doubles stands beside another.
    """
    ups = _count(file.tensors, r"output_blocks\.([0-9]{1,3})\.")
    block = re.compile(r"output_blocks\.[0-9]{1,3}\.[12]\.in_layers\.2\.weight")
    levels = 1 + sum(1 for name in file.tensors if block.fullmatch(name))
    if ups % levels or ups <= levels:
        raise UserError(
            f"{file.path}: its {ups} output blocks are not those of {levels} levels: expected a"
            " U-Net whose residual blocks change the resolution (resblock_updown)."
        )
    _, width = _shape(file, "time_embed.0.weight", 2)
    per_level = ups // levels
    firsts = [1 + level * per_level for level in range(levels)]
    widths = [_shape(file, f"input_blocks.{n}.0.out_layers.3.weight", 4)[0] for n in firsts]
    attention = [f"input_blocks.{n}.1.qkv.weight" in file.tensors for n in firsts]
    return {
        "kind": "unet",
        "width": width,
        "multipliers": tuple(w / width for w in widths),
        "res_blocks": per_level - 1,
        "attention_factors": tuple(2**i for i, has in enumerate(attention) if has),
        "head_width": _ADM_HEAD_WIDTH,
    }


def _load_unet(file: weights.TensorFile, given: Given) -> LoadedNetwork:
    """A U-Net of guided-diffusion, whose files hold tensors alone."""
    arguments = Arguments(file.path, file.config, file.extra)
    if "label_emb.weight" not in file.tensors:
        raise UserError(
            f"{file.path} has no label_emb.weight: it is an unconditional U-Net, a classifier or"
            " incomplete; expected a class-conditional U-Net of guided-diffusion."
        )
    rows, _ = _shape(file, "label_emb.weight", 2)
    labels = labels_of(arguments, rows, given.num_classes or rows, 0.0)
    keys = _unet_keys(file)
    _, C, _, _ = _shape(file, _UNET, 4)
    out, _, _, _ = _shape(file, "out.2.weight", 4)
    if out not in (C, 2 * C):
        raise UserError(
            f"{file.path}: its U-Net has {C} channels in and {out} out: expected {C}, or {2 * C}"
            " with a learned variance."
        )
    if C not in (1, 3):
        raise UserError(
            f"{file.path}: its U-Net reads {C} channels: expected 3 of an image, or 1 in grey;"
            " networks that enlarge an image are not read."
        )
    if (keys["width"], keys["multipliers"]) == _ADM_128:
        raise UserError(
            f"{file.path} looks like the U-Net of 128x128 images, which has four heads at every"
            " width: expected heads of 64 channels."
        )
    schedule = "cosine" if layouts.adm_of_64(UNetKeys(**keys)) else "linear"
    side = _ADM_DEEPEST * 2 ** (len(keys["multipliers"]) - 1)
    config = _recipe(
        file,
        {
            "model": {**keys, "label_dropout": labels.dropout},
            "diffusion": {
                "variance": "learned_range" if out == 2 * C else "fixed_small",
                "loss": "hybrid" if out == 2 * C else "simple",
                "schedule": schedule,
            },
            "data": {"image_size": side, "num_classes": labels.classes, "channels": C},
            "autoencoder": {"kind": "none"},
            "sample": {"cfg_channels": "all", "clip_x0": True},
        },
    )
    shapes = shapes_of(config)
    rules = layouts.unet_layout(config.model, shapes, "adm")
    what = f"U-Net of width {keys['width']} in the layout of guided-diffusion"
    weights.check_tensors(file.path, what, file.tensors, layouts.expected_shapes(rules, shapes))
    note = (
        f"{file.path} does not say so, but is taken for images of {side}x{side}, with the"
        f" {schedule} schedule and heads of {_ADM_HEAD_WIDTH} channels, as the published models"
    )
    return LoadedNetwork(
        config, _params(file, rules, shapes), "adm", file.files, (file.account, note)
    )


def _unstated_labels(path: Path, rows: int) -> str:
    return (
        f"{path} does not say how many classes it has: the last of {rows} rows of its label table"
        f" is taken for the null label; give --num_classes={rows} if it is a class"
    )


def _mlp_ratio(hidden: int, width: int) -> float:
    """The ratio whose product with the width, truncated to an integer, is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _program(layout: str) -> str:
    return {
        "release": "the public release",
        "latte": "Latte",
        "lightning": "LightningDiT",
        "diffusers": "diffusers",
        "diffusers_old": "diffusers before 0.14",
        "ldm": "latent diffusion",
    }[layout]


def _params(
    file: weights.TensorFile, rules: layouts.Layout, shapes: layouts.Shapes
) -> dict[str, Any]:
    try:
        return {"params": unflatten(layouts.to_ours(rules, file.tensors, shapes))}
    except ValueError as error:
        raise UserError(
            f"{file.path}: {error}: ditjax stores it once, so this file is not supported."
        ) from None


def _input_size(file: weights.TensorFile, layout: str, patch: int) -> int:
    if layout == "diffusers":
        side = file.config.get("sample_size")
        if type(side) is not int or not 1 <= side <= _MAX_SIDE or side % patch:
            raise UserError(
                f"{file.path}: sample_size in {weights.CONFIG_FILE} is {side!r}: expected the"
                f" side of the latents, at most {_MAX_SIDE} and a multiple of the patch size"
                f" {patch}. A single weights file of diffusers lacks it: give its folder."
            )
        return side
    _, N, _ = _shape(file, "pos_embed", 3)
    if math.isqrt(N) ** 2 != N:
        raise UserError(f"{file.path}: pos_embed has {N} positions: expected a square number.")
    return math.isqrt(N) * patch


def _heads(
    file: weights.TensorFile, depth: int, width: int, given: int, arguments: Arguments
) -> int:
    """The number of heads, from the user, the file's arguments or the paper's sizes.

    Tensor shapes do not determine it.
    """
    stated = Arguments(file.path, file.config).get("heads")
    configured = stated.value if stated else None
    known = [s.heads for s in PAPER_SIZES.values() if (s.depth, s.width) == (depth, width)]
    # A script's arguments may be of another network, such as a teacher.
    if not (given or configured) and (argument := arguments.get("heads")):
        configured = argument.value
        if known and configured != known[0]:
            raise UserError(
                f"{file.path}: {depth} layers of width {width} are the paper's with {known[0]}"
                f" attention heads, but its arguments say {argument}: give --heads=N."
            )
    heads = given or configured or (known[0] if known else 0)
    if not heads:
        raise UserError(
            f"{file.path}: {depth} layers of width {width} are not a size of the paper, and the"
            " file does not contain the number of attention heads: give --heads=N."
        )
    if given and configured and given != configured:
        raise UserError(f"{file.path} has {configured!r} attention heads, but --heads is {given}.")
    if type(heads) is not int or heads < 1 or width % heads:
        raise UserError(
            f"{file.path}: {heads!r} attention heads for a width of {width}: expected a divisor"
            " of the width."
        )
    each = file.config.get("attention_head_dim", width // heads)
    if each != width // heads:
        raise UserError(
            f"{file.path}: {weights.CONFIG_FILE} has {heads} attention heads of width {each!r},"
            f" but the total width is {width}."
        )
    return heads


def _size_name(size: Size) -> str:
    named = [name for name, known in PAPER_SIZES.items() if known == size]
    return named[0] if named else "x".join(map(str, size))


def _check_table(path: Path, name: str, table: np.ndarray, width: int, side: int) -> None:
    """Raise UserError unless a position table is the frozen one that ditjax computes.

    A training script that averages all parameters averages this table too, and it drifts by
    rounding. Rounding depends on the value alone, so the table keeps its form: the first half of
    the width depends on the column only, the second on the row only. A learned table does not.
    """
    expected = sincos_position_embedding(width, side, side).reshape(side, side, width)
    found = table.astype(np.float32).reshape(side, side, width)
    # One unit in the last place below 1, plus differences between math libraries.
    unit = {2: 2.0**-8 if table.dtype == ml_dtypes.bfloat16 else 2.0**-11}.get(
        table.dtype.itemsize, 2e-6
    )
    error = np.abs(found - expected)
    half = width // 2
    uneven = max(np.ptp(found[..., :half], axis=0).max(), np.ptp(found[..., half:], axis=1).max())
    if not ((error <= unit + _AVERAGING_DRIFT * np.abs(expected)).all() and uneven <= unit):
        raise UserError(
            f"{path}: {name} differs from the 2-D sin-cos table by {error.max():.2g}, and not as"
            " averaging makes it: learned or other tables are not supported."
        )


def _check_times(path: Path, table: np.ndarray, width: int) -> None:
    """Raise UserError unless a table of times is the frozen one, as far as averaging leaves it."""
    expected = temporal_table(table.shape[1], width)
    error = np.abs(table[0].astype(np.float32) - expected)
    unit = 2e-6 if table.dtype.itemsize > 2 else 2.0**-8
    if not (error <= unit + _AVERAGING_DRIFT * np.abs(expected)).all():
        raise UserError(
            f"{path}: {_TEMPORAL_TABLE} differs from the 1-D sin-cos table by {error.max():.2g}:"
            " learned or other tables are not supported."
        )


def _autoencoder_recipe(file: weights.TensorFile, layout: str) -> Config:
    """The recipe of an autoencoder, from the shapes of its tensors and what the file states."""
    ldm = layout == "ldm"
    level = r"encoder\.down\.([0-9]{1,9})\." if ldm else r"encoder\.down_blocks\.([0-9]{1,9})\."
    block = "encoder.down.{i}.block" if ldm else "encoder.down_blocks.{i}.resnets"
    levels = _count(file.tensors, level)
    width, channels, _, _ = _shape(file, "encoder.conv_in.weight", 4)
    widths = [_shape(file, f"{block.format(i=i)}.0.conv1.weight", 4)[0] for i in range(levels)]
    # One digit: each is traced, and a hostile name shall not ask for a million.
    res_blocks = _count(file.tensors, re.escape(block.format(i=0)) + r"\.([0-9])\.")
    _, latent, _, _ = _shape(file, "decoder.conv_in.weight", 4)
    if any(w % width for w in widths):
        raise UserError(f"{file.path}: level widths {widths} are no multiples of {width}.")
    options = {**file.config, **file.extra}
    statistics = {ours: options.get(theirs) for ours, theirs in _STATISTICS.items()}
    return _recipe(
        file,
        {
            "task": "autoencoder",
            "data": {"channels": channels},
            "autoencoder": {
                "base_width": width,
                "multipliers": tuple(w // width for w in widths),
                "res_blocks": res_blocks,
                "latent_channels": latent,
                "groups": options.get("norm_num_groups", 32),
                **{name: _has_convolution(file, name) for name in _CONVOLUTIONS},
                **{key: value for key, value in statistics.items() if value is not None},
                "scale": options.get("scaling_factor", 0.18215),
            },
        },
    )


def _load_autoencoder(file: weights.TensorFile) -> LoadedNetwork:
    # The autoencoder's training checkpoint also has a discriminator and another average.
    file = file.without(
        lambda name: name.startswith(("loss.", "model_ema.")), lambda name: name.partition(".")[0]
    )
    tensors = file.tensors
    if any(name.startswith(("encoder.down.", "decoder.up.")) for name in tensors):
        layout: Literal["diffusers", "diffusers_old", "ldm"] = "ldm"
    else:
        old = any(".attentions.0.query." in name for name in tensors)
        layout = "diffusers_old" if old else "diffusers"
    _check_config(file, _AUTOENCODER_CONFIG)
    config = _autoencoder_recipe(file, layout)
    shapes = shapes_of(config)
    rules = layouts.autoencoder_layout(shapes, layout)
    # Before 0.14, attention weights were stored as matrices or as 1x1 convolutions.
    if layout == "diffusers_old":
        file = file._replace(
            tensors={
                n: t.reshape(t.shape[:2]) if ".attentions." in n and t.ndim == 4 else t
                for n, t in tensors.items()
            }
        )
    a = config.autoencoder
    widths = [a.base_width * m for m in a.multipliers]
    what = f"KL autoencoder of widths {widths} in the layout of {_program(layout)}"
    weights.check_tensors(file.path, what, file.tensors, layouts.expected_shapes(rules, shapes))
    params, notes = _params(file, rules, shapes), [file.account]
    # diffusers' class has a default, and a bare file has none.
    states_scale = bool(file.config) or "scaling_factor" in file.extra
    if not states_scale and a.latent_channels == 4:
        notes.append(f"{file.path} does not state the scale of its latents: 0.18215 is taken")
    return LoadedNetwork(config, params, layout, file.files, tuple(notes), states_scale)


_CONVOLUTIONS = ("quant_conv", "post_quant_conv")
# Our keys, and the options of diffusers' AutoencoderKL.
_STATISTICS = {
    "shift": "shift_factor",
    "latent_mean": "latents_mean",
    "latent_std": "latents_std",
}


def _has_convolution(file: weights.TensorFile, name: str) -> bool:
    """Whether an autoencoder has the 1x1 convolution of that name; a config must agree."""
    there = any(each.startswith(f"{name}.") for each in file.tensors)
    option = f"use_{name}"
    # The class's default is that it has one; files that are no folder have no config.
    stated = file.config.get(option, there if not file.config else True)
    if stated is not there:
        raise UserError(
            f"{file.path}: {option} in {weights.CONFIG_FILE} is {stated!r}, but the file"
            f" {'holds' if there else 'lacks'} {name}."
        )
    if there:
        _shape(file, f"{name}.weight", 4)
    return there


# Options of diffusers' classes that tensors do not determine, and their supported values.
_AUTOENCODER_CONFIG: Mapping[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu",),
    "mid_block_add_attention": (True,),
}
_DIT_CONFIG: Mapping[str, tuple[Any, ...]] = {
    # The published folders are older than the class.
    "_class_name": ("DiTTransformer2DModel", "Transformer2DModel"),
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
}


def _check_config(file: weights.TensorFile, supported: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in supported.items():
        if file.config.get(key, values[0]) not in values:
            raise UserError(
                f"{file.path}: {key} in {weights.CONFIG_FILE} is {file.config[key]!r}: only"
                f" {' or '.join(map(repr, values))} is supported."
            )


class PipelineFolder(NamedTuple):
    """A DiTPipeline of diffusers: both networks, and the class names by index."""

    dit: LoadedNetwork
    autoencoder: LoadedNetwork
    class_names: tuple[tuple[str, ...], ...]


def load_pipeline(folder: str | os.PathLike[str], *, numerics: Numerics = "auto") -> PipelineFolder:
    """Load a whole DiTPipeline folder. Raises UserError for any other folder."""
    folder = local_copy(folder)
    index = read_json(folder / vocabulary.MODEL_INDEX)
    if index.get("_class_name") != "DiTPipeline":
        raise UserError(
            f"{folder}/{vocabulary.MODEL_INDEX} describes a {index.get('_class_name')}: expected a"
            " DiTPipeline."
        )
    dit = load_network(folder / "transformer", numerics=numerics, wanted="dit")
    autoencoder = load_network(folder / "vae", wanted="autoencoder")
    check_fit(dit, autoencoder)
    dit = dit._replace(config=with_scheduler(dit.config, folder / "scheduler"))
    return PipelineFolder(dit, autoencoder, _class_names(folder, index, dit.config))


def _class_names(folder: Path, index: Mapping[str, Any], c: Config) -> tuple[tuple[str, ...], ...]:
    id2label = index.get("id2label") or {}
    if not isinstance(id2label, Mapping):
        raise UserError(f"{folder}/{vocabulary.MODEL_INDEX}: id2label is not a JSON object.")
    return tuple(
        tuple(name.strip() for name in str(id2label.get(str(i), "")).split(",") if name.strip())
        for i in range(c.data.num_classes)
    )


def with_scheduler(c: Config, folder: Path) -> Config:
    """The recipe with the diffusion process of a scheduler's config."""
    scheduler = read_json(folder / "scheduler_config.json")
    predictions = {theirs: name for name, theirs in vocabulary.PREDICTIONS.items()}
    schedules = {theirs: name for name, theirs in vocabulary.SCHEDULES.items()}
    # str, because a hostile value may not be hashable.
    schedule = schedules.get(str(scheduler.get("beta_schedule", "linear")))
    prediction = predictions.get(str(scheduler.get("prediction_type", "epsilon")))
    steps = scheduler.get("num_train_timesteps", 1000)
    if (
        schedule is None
        or prediction is None
        or type(steps) is not int
        or not 2 <= steps <= _MAX_TIMESTEPS
    ):
        raise UserError(
            f"{folder}: beta_schedule {scheduler.get('beta_schedule')!r}, prediction_type"
            f" {scheduler.get('prediction_type')!r}, num_train_timesteps {steps!r}: expected one of"
            f" {', '.join(schedules)}; one of {', '.join(predictions)}; from 2 to"
            f" {_MAX_TIMESTEPS}."
        )

    kind = str(scheduler.get("_class_name", ""))
    if re.search("Flow|EDM|Consistency|LCM|Karras|ScoreSde|VQ", kind):
        raise UserError(f"{folder} is a {kind}: only schedulers of DDPM's process are supported.")
    odd = ("trained_betas", "rescale_betas_zero_snr", "use_flow_sigmas")
    custom = [key for key in odd if scheduler.get(key)]
    if custom:
        raise UserError(f"{folder}: {', '.join(custom)} is set: this schedule is not supported.")
    ends = (scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02))
    if schedule == "linear" and not (
        all(isinstance(end, float) for end in ends)
        and np.allclose(np.multiply(ends, steps / 1000), (1e-4, 0.02), rtol=1e-6, atol=0)
    ):
        raise UserError(
            f"{folder}: beta from {ends[0]!r} to {ends[1]!r}: only the linear schedule of the"
            " paper, 0.0001 to 0.02 for 1000 steps, is supported."
        )
    # The default of those schedulers of diffusers that can clip is to do so.
    clips = scheduler.get("clip_sample", kind in ("DDIMScheduler", "DDPMScheduler"))
    return changed(
        c,
        {
            "diffusion": {"schedule": schedule, "prediction": prediction, "timesteps": steps},
            "sample": {"clip_x0": bool(clips)},
        },
    )
