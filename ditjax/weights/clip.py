"""CLIP from and to folders of transformers (CLIPModel): both towers, and the temperature."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.errors import UserError
from ditjax.files.assets import flatten
from ditjax.files.atomic import write_json
from ditjax.models.clip import CLIP, ClipConfig, ImageConfig
from ditjax.models.text import Layers, TextConfig
from ditjax.weights import layouts
from ditjax.weights.layouts import Layout, LeafRule
from ditjax.weights.networks import initial_shapes
from ditjax.weights.tensors import CONFIG_FILE, write_safetensors
from ditjax.weights.text import (
    ACTIVATION_NAMES,
    LoadedEncoder,
    TransformersFolder,
    clip_blocks,
    clip_layers,
    clip_text_config,
    clip_text_rules,
    norm_rules,
    read_leaves,
)

_IMAGE, _TEXT = "vision_model.", "text_model."
_NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATION_NAMES.items())}
# Of its images in [0, 1]; ours are in [-1, 1], which is mean and std 0.5.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_rules() -> Layout:
    """Both towers in the names of transformers; `logit_scale` has no axis, and no rule."""
    return [
        LeafRule("image/cls", (f"{_IMAGE}embeddings.class_embedding",), "vector"),
        LeafRule(
            "image/x_embedder/kernel", (f"{_IMAGE}embeddings.patch_embedding.weight",), "patch"
        ),
        LeafRule("image/positions", (f"{_IMAGE}embeddings.position_embedding.weight",), "table"),
        *norm_rules("image/norm_pre", f"{_IMAGE}pre_layrnorm"),
        *clip_blocks("image/", _IMAGE),
        *norm_rules("image/norm_post", f"{_IMAGE}post_layernorm"),
        LeafRule("image/projection", ("visual_projection.weight",), "linear"),
        *clip_text_rules("text/", _TEXT),
    ]


def load_clip(path: str | os.PathLike[str]) -> LoadedEncoder[ClipConfig]:
    """The CLIP in a folder of transformers. Raises UserError as `load_text_encoder`.

    Its images are normalised by `preprocessor_config.json` there, OpenAI's by OPENAI_MEAN and _STD.
    """
    folder = TransformersFolder(path)
    if folder.kind != "clip":
        raise UserError(f"{path}: config.json says model_type={folder.kind!r}: expected 'clip'.")
    tensors = folder.file.tensors
    folder.file = folder.file.without(lambda name: name.endswith("position_ids"))
    scale = tensors.get("logit_scale")
    if scale is None or scale.shape != ():
        raise UserError(f"{path}: logit_scale is missing, or no number.")
    config = ClipConfig(_image_config(folder), clip_text_config(folder, "text_config", _TEXT))
    side, channels = config.image.side, config.image.channels
    x = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    ours = dict(initial_shapes(CLIP(config).init, x, ids))
    del ours["logit_scale"]
    file = folder.file
    folder.file = file._replace(
        tensors={name: each for name, each in file.tensors.items() if name != "logit_scale"}
    )
    params = read_leaves(folder, clip_rules(), ours, config.image.patch)
    params["logit_scale"] = np.asarray(scale, np.float32)
    return LoadedEncoder(config, params, file.files, file.account)


def _image_config(folder: TransformersFolder) -> ImageConfig:
    kernel = folder.shape(f"{_IMAGE}embeddings.patch_embedding.weight", 4)
    rows, _ = folder.shape(f"{_IMAGE}embeddings.position_embedding.weight", 2)
    side = round((rows - 1) ** 0.5)
    if side**2 != rows - 1:
        raise UserError(f"{folder.file.path}: {rows - 1} patches are no square image.")
    embedding, _ = folder.shape("visual_projection.weight", 2)
    layers = clip_layers(folder, "vision_config", _IMAGE, 12)
    return ImageConfig(layers, side * kernel[2], kernel[1], kernel[2], embedding)


def write_clip(folder: str | os.PathLike[str], config: ClipConfig, params: Any) -> Path:
    """Write a folder that transformers' CLIPModel reads. Raises UserError for SigLIP's bias."""
    if config.biased:
        raise UserError("a CLIP of the sigmoid loss has a logit_bias, which CLIPModel lacks.")
    image, text = config.image, config.text
    Path(folder).mkdir(parents=True, exist_ok=True)
    leaves = flatten(params)
    scale = leaves.pop("logit_scale")
    theirs = layouts.to_theirs(clip_rules(), leaves, patch=image.patch)
    end = 2 if text.end < 0 else text.end  # transformers pools at the largest id if it is 2
    description = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": image.projection,
        "logit_scale_init_value": 2.6592,
        "text_config": {
            **_layers_config(text.layers),
            "model_type": "clip_text_model",
            "vocab_size": text.vocabulary,
            "max_position_embeddings": text.positions,
            "projection_dim": image.projection,
            "eos_token_id": end,
            "bos_token_id": None,
            "pad_token_id": None,
        },
        "vision_config": {
            **_layers_config(image.layers),
            "model_type": "clip_vision_model",
            "image_size": image.side,
            "patch_size": image.patch,
            "num_channels": image.channels,
            "projection_dim": image.projection,
        },
    }
    half = [0.5] * image.channels
    write_json(Path(folder) / CONFIG_FILE, description)
    processor: dict[str, Any] = {"image_processor_type": "CLIPImageProcessor", "image_mean": half}
    processor |= {"image_std": half, "size": {"shortest_edge": image.side}}
    write_json(Path(folder) / "preprocessor_config.json", processor)
    return write_safetensors(
        Path(folder) / "model.safetensors", {**theirs, "logit_scale": scale}, {"format": "pt"}
    )


def write_clip_text(folder: str | os.PathLike[str], config: TextConfig, params: Any) -> str:
    """Write the text tower alone, as transformers' class, whose name is returned."""
    theirs = layouts.to_theirs(
        clip_text_rules("", _TEXT, config.projection > 0), flatten(params), patch=1
    )
    class_of = "CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"
    Path(folder).mkdir(parents=True, exist_ok=True)
    description = {
        **_layers_config(config.layers),
        "architectures": [class_of],
        "model_type": "clip_text_model",
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.positions,
        "projection_dim": config.projection,
        "eos_token_id": 2 if config.end < 0 else config.end,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    write_json(Path(folder) / CONFIG_FILE, description)
    write_safetensors(Path(folder) / "model.safetensors", theirs, {"format": "pt"})
    return class_of


def _layers_config(c: Layers) -> Mapping[str, Any]:
    return {
        "hidden_size": c.width,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "hidden_act": _NAMES[c.activation],
        "layer_norm_eps": c.eps,
    }
