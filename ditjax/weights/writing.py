"""Write networks to ditjax's own files and to the formats of other programs."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ditjax import __version__
from ditjax.config import Autoencoder, Config, changed
from ditjax.errors import UserError
from ditjax.files.assets import unflatten
from ditjax.files.atomic import recordable, write_json
from ditjax.models import dit
from ditjax.models.embed import sincos_position_embedding
from ditjax.models.text_dit import TextDiTKeys
from ditjax.models.text_video import TextVideoKeys
from ditjax.models.unet import UNetKeys
from ditjax.models.video import VideoKeys, temporal_table
from ditjax.weights import layouts, lightning, vocabulary
from ditjax.weights import tensors as weights
from ditjax.weights.arguments import sit_arguments
from ditjax.weights.networks import LoadedNetwork, combined_recipe
from ditjax.weights.torch_file import write_torch

# The sections of the recipe that a ditjax weights file stores: the function that the network
# computes, and how to sample from it.
_KEPT = ("model", "diffusion", "autoencoder", "sample")

_KEPT_DATA = ("image_size", "channels", "num_classes")

DIFFUSERS_VERSION = "0.42.1"  # the version that these folders were tested with


def write_ditjax(path: str | os.PathLike[str], network: LoadedNetwork) -> Path:
    """Write one safetensors file: parameter paths as names, the recipe's main keys as metadata."""
    tree = dataclasses.asdict(network.config)
    kept = {section: tree[section] for section in _KEPT if section in tree}
    if tree.get("given", {}).get("kind", "none") != "none":
        kept["given"] = tree["given"]  # other files are as they were without this section
    if "autoencoder" in kept:
        kept["autoencoder"]["path"] = ""
    if "sample" in kept:
        kept["sample"] |= {"guide": "", "adapters": ""}
    kept["data"] = {key: tree["data"][key] for key in _KEPT_DATA}
    if "text" in tree:
        kept["text"] = {**tree["text"], "encoder": "", "negative": ""}
        kept["data"]["flip"] = False  # which captions need, and is not the default
    if "unclip" in tree:
        kept["unclip"] = {**tree["unclip"], "clip": "", "prior": ""}
    if tree["data"]["frames"] > 1:
        kept["data"]["frames"] = tree["data"]["frames"]
    metadata = {"task": network.config.task, "config": kept, "version": __version__}
    return weights.write_safetensors(
        path,
        network.leaves,
        {vocabulary.METADATA: json.dumps(metadata), **_class_names(network)},
    )


def _class_names(network: LoadedNetwork) -> dict[str, str]:
    """The class names as metadata of a safetensors file, if they are known."""
    if network.class_names is None:
        return {}
    return {vocabulary.CLASS_NAMES: json.dumps(recordable(network.class_names))}


def _text_keys(network: LoadedNetwork) -> dict[str, str]:
    """The keys of config.text that tensors do not show, as metadata of a safetensors file."""
    text = getattr(network.config, "text", None)
    if text is None:
        return {}
    return {vocabulary.TEXT: json.dumps({"tokens": text.tokens, "features": text.features})}


def write_release(path: str | os.PathLike[str], network: LoadedNetwork) -> Path:
    """Write a state dict with the public release's names, for `torch.load` and `load_state_dict`.

    Raises UserError for a network that the release's code cannot express.
    """
    _check_expressible(network, "the public release")
    write_torch(path, _release_state(network))
    return Path(path)


def write_latte(path: str | os.PathLike[str], network: LoadedNetwork) -> Path:
    """Write a state dict with Latte's names, its two tables of positions included.

    Raises UserError for a network that Latte's code cannot express.
    """
    k, frames = network.config.model, network.config.data.frames
    alternates = isinstance(k, VideoKeys) and k.video == "alternate" and k.tubelet == 1
    if not alternates or frames == 1:
        raise UserError(
            f"Latte has no {network.name} of {frames} frame{'s' * (frames > 1)}: expected a DiT of"
            " clips with config.model.video=alternate and tubelet=1."
        )
    _check_expressible(network, "Latte", kind=VideoKeys)
    state = _release_state(network, layouts.LATTE)
    width = state["x_embedder.proj.bias"].size
    times = temporal_table(frames, width)[None].astype(network.dtype)
    write_torch(path, {"temp_embed": times, **state})
    return Path(path)


def _release_state(
    network: LoadedNetwork, layout: layouts.Layout = layouts.DIT_RELEASE
) -> dict[str, np.ndarray]:
    """The release's state dict of a network, its position table included."""
    network, patch = folded(network), network.config.model.patch
    tensors = layouts.to_theirs(layout, network.leaves, patch=patch)
    side, width = network.config.input_size // patch, tensors["x_embedder.proj.bias"].size
    table = sincos_position_embedding(width, side, side)[None].astype(network.dtype)
    return {"pos_embed": table, **tensors}


def write_sit(path: str | os.PathLike[str], network: LoadedNetwork) -> Path:
    """Write a checkpoint of SiT's training script: the release's names under 'ema', and 'args'.

    A network of 2C channels keeps those that SiT does not read; one of C channels is SiT's with
    learn_sigma=False. Raises UserError for a network that SiT's code cannot express.
    """
    _check_expressible(network, "SiT", sit=True)
    args = _script_arguments(network, "SiT")
    write_torch(path, {"ema": _release_state(network), "args": args})
    return Path(path)


def write_lightning(path: str | os.PathLike[str], network: LoadedNetwork) -> Path:
    """Write a checkpoint of LightningDiT's training script: its names under 'ema', and 'args'.

    Scales of norms are 1. Raises UserError for a network that its code cannot express.
    """
    own = ("norm", "mlp", "qk_norm", "rope", "mlp_ratio")
    _check_expressible(network, "LightningDiT", sit=True, own=own)
    c, k = network.config, network.config.model
    size = dit.parse_size(k.size)
    hidden = int(size.width * k.mlp_ratio)
    expected = int(4.0 * size.width) if k.mlp == "gelu" else int(2 / 3 * int(4.0 * size.width))
    if hidden != expected or (k.qk_norm and k.norm != "rms"):
        raise UserError(
            f"LightningDiT has no such DiT: config.model.mlp_ratio is {k.mlp_ratio} with mlp"
            f" {k.mlp!r}, qk_norm {k.qk_norm} and norm {k.norm!r}; its code requires an MLP of"
            f" {expected} hidden units, and norm 'rms' for qk_norm. Convert to ditjax's own format."
        )
    layout = layouts.lightning_layout(k.mlp == "swiglu", k.qk_norm)
    state = _release_state(network, layout)
    side = c.input_size // k.patch
    args = {
        **_script_arguments(network, "LightningDiT"),
        "use_qknorm": k.qk_norm,
        "use_swiglu": k.mlp == "swiglu",
        "use_rope": k.rope,
        "use_rmsnorm": k.norm == "rms",
        "in_chans": c.input_channels,
    }
    state = lightning.from_plain(state, k, size.depth, size.heads, side)
    write_torch(path, {"ema": state, "args": args})
    return Path(path)


def _script_arguments(network: LoadedNetwork, name: str) -> dict[str, Any]:
    """The arguments of SiT's training script, and of those made of it."""
    c, size = network.config, dit.parse_size(network.config.model.size)
    return {
        "model": f"{name}-{c.model.size}/{c.model.patch}",
        **sit_arguments(c),
        "learn_sigma": c.diffusion.variance == "unused",
        "num_classes": c.data.num_classes,
        "image_size": c.data.image_size,
        "num_heads": size.heads,
        "class_dropout_prob": c.model.label_dropout,
    }


def write_diffusers(folder: str | os.PathLike[str], network: LoadedNetwork) -> Path:
    """Write a model folder of diffusers: config.json and diffusion_pytorch_model.safetensors."""
    folder = Path(folder)
    if isinstance(network.config.model, TextDiTKeys):
        tensors, description = _pixart_tensors(network), _pixart_config(network)
    elif not network.decodes:
        _check_expressible(network, "diffusers")
        network, patch = folded(network), network.config.model.patch
        depth = next(iter(network.params["params"]["blocks"]["attn"]["qkv"].values())).shape[0]
        tensors = layouts.to_theirs(layouts.DIT_DIFFUSERS, network.leaves, patch=patch, depth=depth)
        description = _transformer_config(network)
    else:
        rules = layouts.autoencoder_layout(network.shapes, "diffusers")
        tensors = layouts.to_theirs(rules, network.leaves)
        description = _vae_config(network)
    weights.write_safetensors(
        folder / "diffusion_pytorch_model.safetensors",
        tensors,
        {"format": "pt", **_class_names(network), **_text_keys(network)},
    )
    write_json(folder / weights.CONFIG_FILE, description)
    return folder


def write_adm(path: str | os.PathLike[str], network: LoadedNetwork) -> Path:
    """Write a U-Net's state dict with the names of guided-diffusion.

    Raises UserError for another network, or groups and heads that its code does not have.
    """
    k = network.config.model
    if not isinstance(k, UNetKeys):
        raise UserError(f"guided-diffusion has no {network.name}: expected a U-Net.")
    if k.groups != 32:
        raise UserError(
            f"guided-diffusion's code has 32 groups, and config.model.groups is {k.groups}: convert"
            " to ditjax's own format."
        )
    rules = layouts.unet_layout(k, network.shapes, "adm")
    write_torch(path, layouts.to_theirs(rules, network.leaves))
    return Path(path)


def write_ldm(path: str | os.PathLike[str], network: LoadedNetwork) -> Path:
    """Write an autoencoder's checkpoint with latent diffusion's names, under 'state_dict'.

    The file also has the norms' groups and the latents' scale, which shapes do not determine.
    """
    rules = layouts.autoencoder_layout(network.shapes, "ldm")
    a = network.config.autoencoder
    metadata = {"norm_num_groups": a.groups, "scaling_factor": a.scale, **_statistics(a)}
    write_torch(path, {"state_dict": layouts.to_theirs(rules, network.leaves), **metadata})
    return Path(path)


def folded(network: LoadedNetwork) -> LoadedNetwork:
    """Convert a μP DiT to the standard parametrization without changing its outputs.

    The scale of the queries is multiplied into their weights and biases, each rounded once.
    """
    scale = dit.query_factor(network.config.model)
    if scale == 1:
        return network
    by = np.array([scale, 1.0, 1.0])[:, None, None]  # of [..., 3, H, d]
    leaves = {
        path: (leaf * by).astype(leaf.dtype) if "/attn/qkv/" in path else leaf
        for path, leaf in network.leaves.items()
    }
    config = changed(network.config, {"model": {"parametrization": "standard"}})
    return network._replace(config=config, params={"params": unflatten(leaves)})


def _check_expressible(
    network: LoadedNetwork,
    program: str,
    *,
    sit: bool = False,
    kind: type[dit.DiTKeys] = dit.DiTKeys,
    own: Sequence[str] = (),
) -> None:
    """Raise UserError for a DiT that another program's code cannot express.

    `own` are keys of the network that it has, too.
    """
    m, d = network.config.model, network.config.diffusion
    if type(m) is not kind:
        raise UserError(f"{program} has no {network.name}: expected a DiT.")
    if sit:
        sit_arguments(network.config)  # raises for another process
    elif d.process != "ddpm":
        raise UserError(
            f"{program} would sample this network as DDPM: config.diffusion.process is"
            f" {d.process!r}. Convert to ditjax's own format, or to SiT's."
        )
    for key, value, wanted in (
        ("block", m.block, "adaln_zero"),
        ("mlp_ratio", m.mlp_ratio, 4.0),
        ("norm", m.norm, "layer"),
        ("mlp", m.mlp, "gelu"),
        ("qk_norm", m.qk_norm, False),
        ("rope", m.rope, False),
        ("attention_window", m.attention_window, 0),
        ("attention_hops", m.attention_hops, 0),
        ("position_grid", m.position_grid, 0),
        ("label_dropout", m.label_dropout > 0, True),
    ):
        if value != wanted and key not in own:
            raise UserError(
                f"{program} has no such DiT: config.model.{key} is {getattr(m, key)!r}, and its"
                f" code requires {'a null label' if key == 'label_dropout' else repr(wanted)}."
                " Convert to ditjax's own format."
            )
    if network.config.given.kind != "none":
        raise UserError(
            f"{program} has no such DiT: config.given.kind is {network.config.given.kind!r}, and"
            " its code gives a network no channels beside x. Convert to ditjax's own format."
        )
    for has, what in ((m.align_block, "projector"), (d.uncertainty, "learned uncertainty")):
        if has:
            print(
                f"note: {program} has no {what}; training alone reads it: left out", file=sys.stderr
            )


def _transformer_config(network: LoadedNetwork) -> dict[str, Any]:
    c = network.config
    size, channels = dit.parse_size(c.model.size), c.input_channels
    learned = c.diffusion.variance == "learned_range"
    return {
        "_class_name": "DiTTransformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": size.width // size.heads,
        "dropout": 0.0,
        "in_channels": channels,
        "norm_elementwise_affine": False,
        "norm_eps": c.model.norm2_eps,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": size.heads,
        "num_embeds_ada_norm": c.data.num_classes,
        "num_layers": size.depth,
        "out_channels": channels * (2 if learned else 1),
        "patch_size": c.model.patch,
        "sample_size": c.input_size,
        "upcast_attention": False,
    }


def _pixart_tensors(network: LoadedNetwork) -> dict[str, np.ndarray]:
    """The tensors of PixArtTransformer2DModel, or of LatteTransformer3DModel of clips.

    Raises UserError for what they cannot express.
    """
    c, clips = network.config, isinstance(network.config.model, TextVideoKeys)
    program = f"diffusers' {'LatteTransformer3DModel' if clips else 'PixArtTransformer2DModel'}"
    if c.diffusion.process != "ddpm":
        raise UserError(
            f"{program} is sampled as DDPM, and config.diffusion.process is"
            f" {c.diffusion.process!r}. Convert to ditjax's own format."
        )
    if "vector/kernel" in network.shapes:
        raise UserError(
            f"{program} is given texts alone, and this network the vector of an image, too. Convert"
            " to ditjax's own format."
        )
    for key, wanted in (
        ("qk_norm", False),
        ("rope", False),
        ("parametrization", "standard"),
        ("frequency_shift", 0),
        ("norm2_eps", 1e-6),
        ("mlp_ratio", 4.0),
    ):
        if (value := getattr(c.model, key)) != wanted:
            raise UserError(
                f"{program} has no such network: config.model.{key} is {value!r}, and its code"
                f" requires {wanted!r}. Convert to ditjax's own format."
            )
    if c.model.size_condition not in (0, c.data.image_size):
        raise UserError(
            f"{program} conditions on the size of the images that are drawn, {c.data.image_size},"
            f" and config.model.size_condition is {c.model.size_condition}: convert to ditjax's own"
            " format."
        )
    rules = layouts.PIXART_SIZED if c.model.size_condition else layouts.PIXART
    if clips:
        _check_of_latte(c)
        rules = layouts.LATTE_TEXT
    return layouts.to_theirs(rules, network.leaves, patch=c.model.patch)


def _check_of_latte(c: Config) -> None:
    """Raise UserError for clips and positions that LatteTransformer3DModel does not have."""
    tokens = c.input_size // c.model.patch
    scale = max(c.input_size // 64, 1)
    if c.data.frames == 1 or tokens / (c.model.position_grid or tokens) != scale:
        raise UserError(
            f"diffusers' LatteTransformer3DModel has no network of {c.data.frames} frames with"
            f" config.model.position_grid {c.model.position_grid}: its code requires clips, and"
            f" positions that are divided by {scale}. Convert to ditjax's own format."
        )


def _pixart_config(network: LoadedNetwork) -> dict[str, Any]:
    c = network.config
    size, tokens = dit.parse_size(c.model.size), c.input_size // c.model.patch
    scale = tokens / (c.model.position_grid or tokens)
    shared = _transformer_config(network) | {
        "caption_channels": c.text.width,
        "cross_attention_dim": size.width,
        "norm_type": "ada_norm_single",
        "num_embeds_ada_norm": 1000,
    }
    if isinstance(c.model, TextVideoKeys):
        absent = ("norm_num_groups", "upcast_attention")
        return {
            **{name: value for name, value in shared.items() if name not in absent},
            "_class_name": "LatteTransformer3DModel",
            "num_layers": size.depth // 2,
            "video_length": c.data.frames,
        }
    return {
        **shared,
        "_class_name": "PixArtTransformer2DModel",
        "attention_type": "default",
        "interpolation_scale": int(scale) if scale == int(scale) else scale,
        "use_additional_conditions": bool(c.model.size_condition),
    }


def _statistics(a: Autoencoder) -> dict[str, Any]:
    """The options of AutoencoderKL that differ from its defaults."""
    options: dict[str, Any] = {}
    if a.shift:
        options["shift_factor"] = a.shift
    if a.latent_mean:
        options |= {"latents_mean": list(a.latent_mean), "latents_std": list(a.latent_std)}
    return options


def _vae_config(network: LoadedNetwork) -> dict[str, Any]:
    a = network.config.autoencoder
    n = len(a.multipliers)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": [a.base_width * m for m in a.multipliers],
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "in_channels": network.config.data.channels,
        "latent_channels": a.latent_channels,
        "layers_per_block": a.res_blocks,
        "norm_num_groups": a.groups,
        "out_channels": network.config.data.channels,
        "sample_size": network.config.data.image_size,
        "scaling_factor": a.scale,
        **_statistics(a),
        **({} if a.quant_conv else {"use_quant_conv": False}),
        **({} if a.post_quant_conv else {"use_post_quant_conv": False}),
        "up_block_types": ["UpDecoderBlock2D"] * n,
    }


def write_pipeline(
    folder: str | os.PathLike[str],
    denoiser: LoadedNetwork,
    autoencoder: LoadedNetwork,
    class_names: Sequence[Sequence[str]],
) -> Path:
    """Write a folder for `DiTPipeline.from_pretrained`.

    Raises UserError for networks that do not fit together, or that the pipeline cannot run.
    """
    folder, c = Path(folder), denoiser.config
    if c.data.num_classes != len(class_names):
        raise UserError(f"{len(class_names)} class names for {c.data.num_classes} classes.")
    config = combined_recipe(denoiser, autoencoder)  # before anything is written
    if config.autoencoder.shift or config.autoencoder.latent_mean:
        raise UserError(
            "DiTPipeline divides latents by their scale and knows no shift, mean or deviation:"
            " convert the DiT and its autoencoder one by one, with --to=diffusers."
        )
    vae = changed(
        autoencoder.config,
        {
            "autoencoder": {"scale": config.autoencoder.scale},
            "data": {"image_size": config.data.image_size},
        },
    )
    write_diffusers(folder / "transformer", denoiser._replace(class_names=class_names))
    write_diffusers(folder / "vae", autoencoder._replace(config=vae))
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(c))
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "id2label": {str(i): ", ".join(names) for i, names in enumerate(class_names)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    # Last, because a folder without it is not a pipeline.
    write_json(folder / vocabulary.MODEL_INDEX, index)
    return folder


def scheduler_config(c: Config) -> dict[str, Any]:
    """The config of the DDIMScheduler of a recipe's process."""
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": c.diffusion.timesteps,
        # For any T, the linear schedule scales the ends of T = 1000, as in the release.
        "beta_start": 1e-4 * 1000 / c.diffusion.timesteps,
        "beta_end": 0.02 * 1000 / c.diffusion.timesteps,
        "beta_schedule": vocabulary.SCHEDULES[c.diffusion.schedule],
        "prediction_type": vocabulary.PREDICTIONS[c.diffusion.prediction],
        "clip_sample": c.sample.clip_x0,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
        "trained_betas": None,
    }
