"""Names and layouts of the same weights in other programs, as tables: ours <-> theirs.

A layout is a list of rules. Each rule connects one of our leaves to the tensors that hold it in
another program, and works in both directions, so that what is read can be written back:

    ours    blocks/attn/qkv/kernel  [L, D, 3, H, d]     (the L blocks are stacked)
    theirs  blocks.{i}.attn.qkv.weight  [3D, D]         {i} counts the blocks

`to_ours` copies. `to_theirs` returns views of our arrays, so that writing a file needs no second
copy of the weights.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from ditjax.models.unet import UNetKeys, all_layers, layers

Shapes = Mapping[str, tuple[int, ...]]


class LeafRule(NamedTuple):
    """One of our leaves and the tensors that hold it elsewhere.

    Several names are parts of one tensor along its first axis (to_q, to_k, to_v). A name with '{i}'
    exists once per layer: our layer n is their layer `first` + n `every`. With `copies`, our one
    leaf is repeated in each of their layers.
    """

    ours: str
    theirs: tuple[str, ...]
    kind: Literal[
        "vector",
        "table",
        "batched_table",
        "linear",
        "conv",
        "linear_as_conv",
        "linear_as_conv1d",
        "patch",
        "heads",
    ]
    copies: bool = False
    first: int = 0
    every: int = 1

    def names(self, layer: int) -> list[str]:
        """Their names of one of our layers."""
        return [name.format(i=self.first + layer * self.every) for name in self.theirs]

    @property
    def stacked(self) -> bool:
        """Whether the first axis of our leaf counts the layers."""
        return "{i}" in self.theirs[0] and not self.copies


Layout = list[LeafRule]


def _their_shape(kind: str, ours: tuple[int, ...], patch: int) -> tuple[int, ...]:
    match kind:
        case "vector":
            return (int(np.prod(ours)),)
        case "table":
            return ours
        case "batched_table":
            return (1, *ours)
        case "linear":
            return (int(np.prod(ours[1:])), ours[0])
        case "linear_as_conv":
            return (int(np.prod(ours[1:])), ours[0], 1, 1)
        case "linear_as_conv1d":
            return (int(np.prod(ours[1:])), ours[0], 1)
        case "heads":
            rows = int(np.prod(ours[-3:]))
            return (rows,) if len(ours) == 3 else (rows, ours[0], 1)
        case "conv":
            return (ours[3], ours[2], ours[0], ours[1])
        case _:
            return (ours[1], ours[0] // patch**2, patch, patch)


def _their_view(kind: str, leaf: np.ndarray, patch: int) -> np.ndarray:
    match kind:
        case "vector":
            return leaf.reshape(-1)
        case "table":
            return leaf
        case "batched_table":
            return leaf[None]
        case "linear":
            return leaf.reshape(leaf.shape[0], -1).T
        case "linear_as_conv":
            return leaf.reshape(leaf.shape[0], -1).T[:, :, None, None]
        case "linear_as_conv1d":
            return leaf.reshape(leaf.shape[0], -1).T[:, :, None]
        case "heads":
            # Their rows are ordered (head, q k v, d), ours (q k v, head, d).
            rows = leaf.swapaxes(-3, -2)
            if leaf.ndim == 3:
                return rows.reshape(-1)
            return rows.reshape(leaf.shape[0], -1).T[:, :, None]
        case "conv":
            return leaf.transpose(3, 2, 0, 1)
        case _:
            # A token's values are ordered (row, column, channel), a kernel's (C, row, column).
            return leaf.reshape(patch, patch, -1, leaf.shape[1]).transpose(3, 2, 0, 1)


def _our_leaf(kind: str, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    match kind:
        case "linear" | "linear_as_conv" | "linear_as_conv1d":
            theirs = theirs.reshape(theirs.shape[:2]).T
        case "heads":
            *into, qkv, heads, d = shape
            rows = theirs.T.reshape(*into, heads, qkv, d)
            theirs = rows.swapaxes(-3, -2)
        case "conv" | "patch":
            theirs = theirs.transpose(2, 3, 1, 0)
    return theirs.reshape(shape)


def _layers(rule: LeafRule, shape: tuple[int, ...], depth: int) -> list[int]:
    if "{i}" not in rule.theirs[0]:
        return [0]
    return list(range(depth if rule.copies else shape[0]))


def expected_shapes(layout: Layout, ours: Shapes, *, patch: int = 1, depth: int = 0) -> Shapes:
    """The names and shapes of the tensors that hold our leaves of shapes `ours`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in layout:
        shape = ours[rule.ours]
        whole = _their_shape(rule.kind, shape[1:] if rule.stacked else shape, patch)
        part = (whole[0] // len(rule.theirs), *whole[1:])
        for i in _layers(rule, shape, depth):
            shapes |= dict.fromkeys(rule.names(i), part)
    return shapes


def to_ours(
    layout: Layout, theirs: Mapping[str, np.ndarray], ours: Shapes
) -> dict[str, np.ndarray]:
    """Their tensors -> our leaves. Names and shapes must be those of `expected_shapes`.

    Raises a ValueError that names the tensors if copies of one leaf differ.
    """
    leaves: dict[str, np.ndarray] = {}
    for rule in layout:
        shape = ours[rule.ours]
        if not rule.stacked:
            leaves[rule.ours] = np.array(_join(rule, theirs, 0, shape))
            if rule.copies:
                _check_copies(rule, theirs)
            continue
        first = _join(rule, theirs, 0, shape[1:])
        leaf = np.empty(shape, first.dtype)
        for i in range(shape[0]):
            leaf[i] = _join(rule, theirs, i, shape[1:])
        leaves[rule.ours] = leaf
    return leaves


def _join(
    rule: LeafRule, theirs: Mapping[str, np.ndarray], layer: int, shape: tuple[int, ...]
) -> np.ndarray:
    parts = [theirs[name] for name in rule.names(layer)]
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return _our_leaf(rule.kind, whole, shape)


def _check_copies(rule: LeafRule, theirs: Mapping[str, np.ndarray]) -> None:
    (template,) = rule.theirs
    pattern = re.compile(re.escape(template).replace(r"\{i\}", r"\d+"))
    names = [name for name in theirs if pattern.fullmatch(name)]
    for name in names[1:]:
        if not np.array_equal(theirs[names[0]], theirs[name], equal_nan=True):
            raise ValueError(f"{name} and {names[0]} are not equal")


def to_theirs(
    layout: Layout, leaves: Mapping[str, np.ndarray], *, patch: int = 1, depth: int = 0
) -> dict[str, np.ndarray]:
    """Our leaves -> their tensors, as views."""
    tensors: dict[str, np.ndarray] = {}
    for rule in layout:
        leaf = leaves[rule.ours]
        for i in _layers(rule, leaf.shape, depth):
            whole = _their_view(rule.kind, leaf[i] if rule.stacked else leaf, patch)
            size = whole.shape[0] // len(rule.theirs)
            for part, name in enumerate(rule.names(i)):
                tensors[name] = whole[part * size : (part + 1) * size]
    return tensors


def _linear(ours: str, *theirs: str, copies: bool = False) -> list[LeafRule]:
    """The kernel and bias of one Linear."""
    return [
        LeafRule(f"{ours}/kernel", tuple(f"{name}.weight" for name in theirs), "linear", copies),
        LeafRule(f"{ours}/bias", tuple(f"{name}.bias" for name in theirs), "vector", copies),
    ]


# The public PyTorch release (facebookresearch/DiT, models.py). Its frozen position table,
# `pos_embed`, is not a parameter here: `weights/reading.py` checks it, `writing.py` writes it.
DIT_RELEASE: Layout = [
    LeafRule("x_embedder/kernel", ("x_embedder.proj.weight",), "patch"),
    LeafRule("x_embedder/bias", ("x_embedder.proj.bias",), "vector"),
    *_linear("t_embedder/in", "t_embedder.mlp.0"),
    *_linear("t_embedder/out", "t_embedder.mlp.2"),
    LeafRule("y_embedder/table", ("y_embedder.embedding_table.weight",), "table"),
    *_linear("blocks/attn/qkv", "blocks.{i}.attn.qkv"),
    *_linear("blocks/attn/out", "blocks.{i}.attn.proj"),
    *_linear("blocks/mlp/in", "blocks.{i}.mlp.fc1"),
    *_linear("blocks/mlp/out", "blocks.{i}.mlp.fc2"),
    *_linear("blocks/adaln/linear", "blocks.{i}.adaLN_modulation.1"),
    *_linear("final_layer/linear", "final_layer.linear"),
    *_linear("final_layer/adaln/linear", "final_layer.adaLN_modulation.1"),
]

# Latte (Vchitect/Latte, models/latte.py), a DiT of clips in the release's names: its blocks are
# spatial and temporal in turn.
LATTE: Layout = [rule for rule in DIT_RELEASE if not rule.stacked] + [
    rule._replace(ours=rule.ours.replace("blocks", f"blocks/{kind}"), first=first, every=2)
    for first, kind in enumerate(("spatial", "temporal"))
    for rule in DIT_RELEASE
    if rule.stacked
]


def lightning_layout(swiglu: bool, qk_norm: bool) -> Layout:
    """LightningDiT, when `weights/lightning.py` has folded its scales and turned its rows."""
    rules = [rule for rule in DIT_RELEASE if not (swiglu and "/mlp/" in rule.ours)]
    if swiglu:
        rules += _linear("blocks/mlp/gate_up", "blocks.{i}.mlp.w12")
        rules += _linear("blocks/mlp/out", "blocks.{i}.mlp.w3")
    for norm in ("q_norm", "k_norm") if qk_norm else ():
        name = f"blocks.{{i}}.attn.{norm}.weight"
        rules.append(LeafRule(f"blocks/attn/{norm}/scale", (name,), "vector"))
    return rules


# REPA's projector (sihyun-yu/REPA, models/sit.py) of one teacher, beside the names of the release.
REPA_PROJECTOR: Layout = [
    *_linear("projector/in", "projectors.0.0"),
    *_linear("projector/middle", "projectors.0.2"),
    *_linear("projector/out", "projectors.0.4"),
]

_D = "transformer_blocks.{i}"

# diffusers' DiTTransformer2DModel, which repeats the timestep and label embedders in every block.
DIT_DIFFUSERS: Layout = [
    LeafRule("x_embedder/kernel", ("pos_embed.proj.weight",), "patch"),
    LeafRule("x_embedder/bias", ("pos_embed.proj.bias",), "vector"),
    *_linear("t_embedder/in", f"{_D}.norm1.emb.timestep_embedder.linear_1", copies=True),
    *_linear("t_embedder/out", f"{_D}.norm1.emb.timestep_embedder.linear_2", copies=True),
    LeafRule(
        "y_embedder/table",
        (f"{_D}.norm1.emb.class_embedder.embedding_table.weight",),
        "table",
        copies=True,
    ),
    *_linear("blocks/attn/qkv", f"{_D}.attn1.to_q", f"{_D}.attn1.to_k", f"{_D}.attn1.to_v"),
    *_linear("blocks/attn/out", f"{_D}.attn1.to_out.0"),
    *_linear("blocks/mlp/in", f"{_D}.ff.net.0.proj"),
    *_linear("blocks/mlp/out", f"{_D}.ff.net.2"),
    *_linear("blocks/adaln/linear", f"{_D}.norm1.linear"),
    *_linear("final_layer/linear", "proj_out_2"),
    *_linear("final_layer/adaln/linear", "proj_out_1"),
]

_SINGLE = "adaln_single.emb"

# diffusers' PixArtTransformer2DModel. Keys and values of cross-attention are ours in one product.
PIXART: Layout = [
    LeafRule("x_embedder/kernel", ("pos_embed.proj.weight",), "patch"),
    LeafRule("x_embedder/bias", ("pos_embed.proj.bias",), "vector"),
    *_linear("t_embedder/in", f"{_SINGLE}.timestep_embedder.linear_1"),
    *_linear("t_embedder/out", f"{_SINGLE}.timestep_embedder.linear_2"),
    *_linear("adaln_single/linear", "adaln_single.linear"),
    *_linear("caption/in", "caption_projection.linear_1"),
    *_linear("caption/out", "caption_projection.linear_2"),
    LeafRule("blocks/table", (f"{_D}.scale_shift_table",), "table"),
    *_linear("blocks/attn/qkv", f"{_D}.attn1.to_q", f"{_D}.attn1.to_k", f"{_D}.attn1.to_v"),
    *_linear("blocks/attn/out", f"{_D}.attn1.to_out.0"),
    *_linear("blocks/cross/q", f"{_D}.attn2.to_q"),
    *_linear("blocks/cross/kv", f"{_D}.attn2.to_k", f"{_D}.attn2.to_v"),
    *_linear("blocks/cross/out", f"{_D}.attn2.to_out.0"),
    *_linear("blocks/mlp/in", f"{_D}.ff.net.0.proj"),
    *_linear("blocks/mlp/out", f"{_D}.ff.net.2"),
    LeafRule("final_layer/table", ("scale_shift_table",), "table"),
    *_linear("final_layer/linear", "proj_out"),
]

# diffusers' LatteTransformer3DModel: blocks in pairs, of which the temporal one sees no text.
LATTE_TEXT: Layout = [rule for rule in PIXART if not rule.stacked] + [
    rule._replace(
        ours=rule.ours.replace("blocks", f"blocks/{kind}"),
        theirs=tuple(f"{prefix}{name}" for name in rule.theirs),
    )
    for kind, prefix in (("spatial", ""), ("temporal", "temporal_"))
    for rule in PIXART
    if rule.stacked and not (prefix and "/cross/" in rule.ours)
]

# PixArt-α of a network that is conditioned on the size of its images.
PIXART_SIZED: Layout = [
    *PIXART,
    *_linear("side_embedder/in", f"{_SINGLE}.resolution_embedder.linear_1"),
    *_linear("side_embedder/out", f"{_SINGLE}.resolution_embedder.linear_2"),
    *_linear("ratio_embedder/in", f"{_SINGLE}.aspect_ratio_embedder.linear_1"),
    *_linear("ratio_embedder/out", f"{_SINGLE}.aspect_ratio_embedder.linear_2"),
]


# Modules of a U-Net's blocks in diffusers and in guided-diffusion.
_RES = {
    "norm1": ("norm1", "in_layers.0"),
    "conv1": ("conv1", "in_layers.2"),
    "emb": ("time_emb_proj", "emb_layers.1"),
    "norm2": ("norm2", "out_layers.0"),
    "conv2": ("conv2", "out_layers.3"),
    "shortcut": ("conv_shortcut", "skip_connection"),
}
_UNET = {
    "conv_in": ("conv_in", "input_blocks.0.0"),
    "t_in": ("time_embedding.linear_1", "time_embed.0"),
    "t_out": ("time_embedding.linear_2", "time_embed.2"),
    "y_embedder": ("class_embedding", "label_emb"),
    "norm_out": ("conv_norm_out", "out.0"),
    "conv_out": ("conv_out", "out.2"),
}


def adm_of_64(k: UNetKeys) -> bool:
    """Whether this is guided-diffusion's network of 64x64 images.

    Of its published networks that one alone has rows (q k v, head, d) (use_new_attention_order) and
    the cosine schedule, as its README's flags say.
    """
    return (k.width, k.multipliers, k.res_blocks) == (192, (1.0, 2.0, 3.0, 4.0), 3)


def unet_layout(k: UNetKeys, leaves: Shapes, names: Literal["diffusers", "adm"]) -> Layout:
    """The rules of a U-Net: diffusers' UNet2DModel, or UNetModel of guided-diffusion ('adm')."""
    program = ("diffusers", "adm").index(names)
    blocks = (_diffusers_blocks, _adm_blocks)[program](k)
    legacy, layout = names == "adm" and not adm_of_64(k), []
    for path in leaves:
        parent, _, leaf = path.rpartition("/")
        block, _, part = parent.rpartition("/")
        attention = block.endswith("_attention")
        if not block:
            modules = [_UNET[part][program]]
        elif attention and names == "diffusers":
            parts = {"norm": ["group_norm"], "qkv": ["to_q", "to_k", "to_v"], "out": ["to_out.0"]}
            modules = [f"{blocks[block]}.{each}" for each in parts[part]]
        elif attention:
            modules = [f"{blocks[block]}.{'proj_out' if part == 'out' else part}"]
        else:
            modules = [f"{blocks[block]}.{_RES[part][program]}"]
        suffix = "bias" if leaf == "bias" else "weight"
        theirs = tuple(f"{module}.{suffix}" for module in modules)
        layout.append(LeafRule(path, theirs, _unet_kind(part, leaf, names, attention, legacy)))
    return layout


def _unet_kind(part: str, leaf: str, names: str, attention: bool, legacy: bool) -> Any:
    if part == "qkv" and legacy:
        return "heads"
    if leaf in ("bias", "scale"):
        return "vector"
    if leaf == "table":
        return "table"
    if attention:
        return "linear" if names == "diffusers" else "linear_as_conv1d"
    return "linear" if part in ("emb", "t_in", "t_out") else "conv"


def _diffusers_blocks(k: UNetKeys) -> dict[str, str]:
    """{'down_0_1': 'down_blocks.0.resnets.1', 'down_0_1_attention': ..attentions.1} and so on."""
    blocks: dict[str, str] = {}
    for layer in all_layers(k):
        part, *place = layer.name.split("_")
        if part == "middle":
            resnets, attentions = f"mid_block.resnets.{place[0]}", "mid_block.attentions.0"
        else:
            level = int(place[0]) if part == "down" else len(k.multipliers) - 1 - int(place[0])
            module = f"{part}_blocks.{level}"
            resnets = f"{module}.{part}samplers.0" if layer.resample else ""
            resnets = resnets or f"{module}.resnets.{place[1]}"
            attentions = f"{module}.attentions.{place[1]}"
        blocks |= {layer.name: resnets, f"{layer.name}_attention": attentions}
    return blocks


def _adm_blocks(k: UNetKeys) -> dict[str, str]:
    """{'down_0_1': 'input_blocks.2.0', 'down_0_1_attention': 'input_blocks.2.1'} and so on.

    A block that doubles the resolution follows the last layer of its level, in the same place.
    """
    down, middle, up = layers(k)
    blocks: dict[str, str] = {}
    for n, layer in enumerate(down, start=1):
        blocks |= {layer.name: f"input_blocks.{n}.0"}
        blocks |= {f"{layer.name}_attention": f"input_blocks.{n}.1"}
    blocks |= {f"middle_{i}": f"middle_block.{2 * i}" for i in range(len(middle))}
    blocks |= {"middle_0_attention": "middle_block.1"}
    n, inside = -1, 0
    for layer in up:
        n, inside = (n, inside) if layer.resample else (n + 1, 0)
        blocks |= {layer.name: f"output_blocks.{n}.{inside}"}
        blocks |= {f"{layer.name}_attention": f"output_blocks.{n}.{inside + 1}"}
        inside += 1 + layer.attention
    return blocks


def autoencoder_layout(
    leaves: Shapes, names: Literal["diffusers", "diffusers_old", "ldm"]
) -> Layout:
    """The rules of an autoencoder of any width, made from its leaves.

    'diffusers': AutoencoderKL since 0.14. 'diffusers_old': before, when the projections of the
    attention were named query, key, value and proj_attn. 'ldm': the `first_stage_model` of the
    original latent diffusion and Stable Diffusion checkpoints, which project by 1x1 convolutions.
    """
    levels = 1 + max(
        int(n) for path in leaves for n in re.findall(r"^decoder/up_blocks_(\d+)", path)
    )
    rename = {
        "diffusers": _diffusers_name,
        "diffusers_old": lambda path: _old_attention(_diffusers_name(path)),
        "ldm": lambda path: _ldm_name(path, levels),
    }[names]
    layout = []
    for path, shape in leaves.items():
        parent, _, kind_of_leaf = path.rpartition("/")
        name = rename(parent) + (".bias" if kind_of_leaf == "bias" else ".weight")
        if len(shape) == 4:
            layout.append(LeafRule(path, (name,), "conv"))
        elif len(shape) == 2:
            layout.append(LeafRule(path, (name,), "linear_as_conv" if names == "ldm" else "linear"))
        else:
            layout.append(LeafRule(path, (name,), "vector"))
    return layout


def _diffusers_name(path: str) -> str:
    """encoder/down_blocks_0/resnets_1/conv1 -> encoder.down_blocks.0.resnets.1.conv1."""
    return re.sub(r"_(\d+)(?=\.|$)", r".\1", path.replace("/", "."))


_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_LDM_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def _old_attention(name: str) -> str:
    head, found, last = name.partition(".attentions.0.")
    return f"{head}{found}{_ATTENTION.get(last, last)}"


def _ldm_name(path: str, levels: int) -> str:
    name = _diffusers_name(path)
    head, found, last = name.partition(".mid_block.attentions.0.")
    if found:
        return f"{head}.mid.attn_1.{_LDM_ATTENTION[last]}"
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    # There the decoder's levels are numbered by resolution; in diffusers, in order of use.
    name = re.sub(
        r"up_blocks\.(\d+)\.(resnets|upsamplers\.0)",
        lambda m: f"up.{levels - 1 - int(m[1])}." + ("block" if m[2] == "resnets" else "upsample"),
        name,
    )
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
