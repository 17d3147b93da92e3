"""unCLIP's prior from and to folders of diffusers (PriorTransformer)."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.errors import UserError, shown
from ditjax.files.assets import flatten
from ditjax.files.atomic import write_json
from ditjax.models.network import Conditions
from ditjax.models.prior import PriorConfig, PriorTransformer
from ditjax.models.text import Layers
from ditjax.weights import layouts
from ditjax.weights.layouts import Layout, LeafRule
from ditjax.weights.networks import initial_shapes
from ditjax.weights.tensors import CONFIG_FILE, write_safetensors
from ditjax.weights.text import TransformersFolder, linear_rules, norm_rules, read_leaves

_CLASS = "PriorTransformer"
_STATISTICS = ("clip_mean", "clip_std")
# Options of diffusers' class with which it computes what ours does.
_EXPECTED: Mapping[str, Any] = {
    "additional_embeddings": 4,
    "time_embed_act_fn": "silu",
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd",
}


class LoadedPrior(NamedTuple):
    """A prior: its sizes, its parameters f32, its files, and a line to print.

    It predicts (z - mean) / std of CLIP's vector z of an image, mean and std f32[E].
    """

    config: PriorConfig
    params: Any
    mean: np.ndarray
    std: np.ndarray
    files: tuple[Path, ...]
    account: str


def prior_rules() -> Layout:
    """A prior in the names of diffusers; a block's second norm is its norm3."""
    block = "transformer_blocks.{i}"
    return [
        *linear_rules("context", "encoder_hidden_states_proj"),
        *linear_rules("vector", "embedding_proj"),
        *linear_rules("x", "proj_in"),
        *linear_rules("time_in", "time_embedding.linear_1"),
        *linear_rules("time_out", "time_embedding.linear_2"),
        LeafRule("query", ("prd_embedding",), "batched_table"),
        LeafRule("positions", ("positional_embedding",), "batched_table"),
        *linear_rules("blocks/attn/qkv", *(f"{block}.attn1.to_{name}" for name in "qkv")),
        *linear_rules("blocks/attn/out", f"{block}.attn1.to_out.0"),
        *norm_rules("blocks/norm1", f"{block}.norm1"),
        *linear_rules("blocks/mlp/in", f"{block}.ff.net.0.proj"),
        *linear_rules("blocks/mlp/out", f"{block}.ff.net.2"),
        *norm_rules("blocks/norm2", f"{block}.norm3"),
        *norm_rules("norm_final", "norm_out"),
        *linear_rules("out", "proj_to_clip_embeddings"),
    ]


def load_prior(path: str | os.PathLike[str]) -> LoadedPrior:
    """The prior in a folder of diffusers. Raises UserError as `load_text_encoder`."""
    folder = TransformersFolder(path)
    name = folder.config.get("_class_name", "")
    if name != _CLASS:
        raise UserError(f"{path}: config.json says _class_name={shown(name)}: expected {_CLASS!r}.")
    folder.kind = f"{_CLASS} of diffusers"
    for option, expected in _EXPECTED.items():
        if folder.config.get(option, expected) != expected:
            raise UserError(
                f"{path}: config.json says {option}={shown(folder.config[option])}: expected"
                f" {expected!r}."
            )
    config = _config(folder)
    mean, std = (_statistic(folder, name, config.vector) for name in _STATISTICS)
    kept = {k: v for k, v in folder.file.tensors.items() if k not in _STATISTICS}
    folder.file = folder.file._replace(tensors=kept)
    params = read_leaves(folder, prior_rules(), _shapes(config))
    return LoadedPrior(config, params, mean, std, folder.file.files, folder.file.account)


def write_prior(
    path: str | os.PathLike[str],
    config: PriorConfig,
    params: Any,
    mean: np.ndarray,
    std: np.ndarray,
) -> Path:
    """Write a folder that diffusers' PriorTransformer reads.

    Raises UserError for texts that are not as wide as the vectors, which it cannot express.
    """
    E, layers = config.vector, config.layers
    if config.context != E:
        raise UserError(
            f"diffusers' {_CLASS} reads texts as wide as its vectors, and this prior's are"
            f" {config.context} and {E}: it cannot be written."
        )
    Path(path).mkdir(parents=True, exist_ok=True)
    description = {
        "_class_name": _CLASS,
        "num_attention_heads": layers.heads,
        "attention_head_dim": layers.width // layers.heads,
        "num_layers": layers.depth,
        "embedding_dim": E,
        "num_embeddings": config.tokens,
        **_EXPECTED,
    }
    write_json(Path(path) / CONFIG_FILE, description)
    theirs = layouts.to_theirs(prior_rules(), flatten(params))
    statistics = zip(_STATISTICS, (mean, std), strict=True)
    theirs |= {name: np.asarray(value, np.float32)[None] for name, value in statistics}
    file = Path(path) / "diffusion_pytorch_model.safetensors"
    return write_safetensors(file, theirs, {"format": "pt"})


def _config(folder: TransformersFolder) -> PriorConfig:
    width, E = folder.shape("proj_in.weight", 2)
    rows = folder.shape("positional_embedding", 3)[1]
    context = folder.shape("encoder_hidden_states_proj.weight", 2)[1]
    hidden = folder.shape("transformer_blocks.0.ff.net.0.proj.weight", 2)[0]
    layers = Layers(
        folder.count("transformer_blocks.{i}.norm1.weight"),
        width,
        folder.heads("", "num_attention_heads", 32, width),
        hidden,
        "gelu",
        1e-5,
    )
    if rows <= 4:
        raise UserError(f"{folder.file.path}: positional_embedding has {rows} rows: no text.")
    return PriorConfig(layers, rows - 4, context, E)


def _statistic(folder: TransformersFolder, name: str, width: int) -> np.ndarray:
    shape = folder.shape(name, 2)
    if shape != (1, width):
        raise UserError(f"{folder.file.path}: {name} is of shape {shape}: expected (1, {width}).")
    return np.asarray(folder.file.tensors[name][0], np.float32)


def _shapes(config: PriorConfig) -> layouts.Shapes:
    x = jax.ShapeDtypeStruct((1, config.vector), jnp.float32)
    context = jax.ShapeDtypeStruct((1, config.tokens, config.context), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)

    def init(key: jax.Array, x: jax.Array, t: jax.Array, context: jax.Array) -> Any:
        return PriorTransformer(config).init(key, x, t, Conditions(vector=x, context=context))

    return initial_shapes(init, x, t, context)
