"""Text encoders from folders of transformers: BERT, CLIP's text tower, T5's encoder.

A folder holds config.json and the tensors (safetensors or PyTorch's). Sizes follow from the
tensors; config.json says what tensors do not show: heads, activation, epsilon, the id of the end.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.errors import UserError, shown
from ditjax.files.assets import unflatten
from ditjax.models.text import Layers, TextConfig, TextEncoder
from ditjax.weights import layouts
from ditjax.weights import tensors as weights
from ditjax.weights.layouts import Layout, LeafRule
from ditjax.weights.networks import check_finite, initial_shapes

# transformers' hidden_act -> ours
ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}


def linear_rules(ours: str, *theirs: str, biases: bool = True) -> Layout:
    """The kernel of one Linear, and its bias."""
    rules = [LeafRule(f"{ours}/kernel", tuple(f"{each}.weight" for each in theirs), "linear")]
    if biases:
        rules += [LeafRule(f"{ours}/bias", tuple(f"{each}.bias" for each in theirs), "vector")]
    return rules


def norm_rules(ours: str, theirs: str) -> Layout:
    """The scale and the bias of one LayerNorm."""
    return [
        LeafRule(f"{ours}/scale", (f"{theirs}.weight",), "vector"),
        LeafRule(f"{ours}/bias", (f"{theirs}.bias",), "vector"),
    ]


def clip_blocks(ours: str, theirs: str) -> Layout:
    """The layers of either of CLIP's towers."""
    layer, names = f"{theirs}encoder.layers.{{i}}", ("q_proj", "k_proj", "v_proj")
    return [
        *linear_rules(f"{ours}blocks/attn/qkv", *(f"{layer}.self_attn.{name}" for name in names)),
        *linear_rules(f"{ours}blocks/attn/out", f"{layer}.self_attn.out_proj"),
        *norm_rules(f"{ours}blocks/norm1", f"{layer}.layer_norm1"),
        *linear_rules(f"{ours}blocks/mlp/in", f"{layer}.mlp.fc1"),
        *linear_rules(f"{ours}blocks/mlp/out", f"{layer}.mlp.fc2"),
        *norm_rules(f"{ours}blocks/norm2", f"{layer}.layer_norm2"),
    ]


def clip_text_rules(ours: str = "", theirs: str = "", projected: bool = True) -> Layout:
    """CLIP's text tower; `ours` and `theirs` are prefixes of the names."""
    rules = [
        LeafRule(f"{ours}words", (f"{theirs}embeddings.token_embedding.weight",), "table"),
        LeafRule(f"{ours}positions", (f"{theirs}embeddings.position_embedding.weight",), "table"),
        *clip_blocks(ours, theirs),
        *norm_rules(f"{ours}norm_final", f"{theirs}final_layer_norm"),
    ]
    if projected:
        rules.append(LeafRule(f"{ours}projection", ("text_projection.weight",), "linear"))
    return rules


def bert_blocks() -> Layout:
    """The layers of BERT."""
    layer = "encoder.layer.{i}"
    names = ("query", "key", "value")
    return [
        *linear_rules("blocks/attn/qkv", *(f"{layer}.attention.self.{name}" for name in names)),
        *linear_rules("blocks/attn/out", f"{layer}.attention.output.dense"),
        *norm_rules("blocks/norm1", f"{layer}.attention.output.LayerNorm"),
        *linear_rules("blocks/mlp/in", f"{layer}.intermediate.dense"),
        *linear_rules("blocks/mlp/out", f"{layer}.output.dense"),
        *norm_rules("blocks/norm2", f"{layer}.output.LayerNorm"),
    ]


def _bert_rules() -> Layout:
    return [
        LeafRule("words", ("embeddings.word_embeddings.weight",), "table"),
        LeafRule("positions", ("embeddings.position_embeddings.weight",), "table"),
        LeafRule("types", ("embeddings.token_type_embeddings.weight",), "table"),
        *norm_rules("norm", "embeddings.LayerNorm"),
        *bert_blocks(),
    ]


def _t5_rules(gated: bool) -> Layout:
    layer = "encoder.block.{i}.layer"
    attention, mlp = f"{layer}.0.SelfAttention", f"{layer}.1.DenseReluDense"
    into = ("gate_up", f"{mlp}.wi_0", f"{mlp}.wi_1") if gated else ("in", f"{mlp}.wi")
    first = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    qkv = (f"{attention}.{name}" for name in "qkv")
    return [
        LeafRule("words", ("shared.weight",), "table"),
        LeafRule("relative", (first,), "table"),
        *linear_rules("blocks/attn/qkv", *qkv, biases=False),
        *linear_rules("blocks/attn/out", f"{attention}.o", biases=False),
        LeafRule("blocks/norm1/scale", (f"{layer}.0.layer_norm.weight",), "vector"),
        *linear_rules(f"blocks/mlp/{into[0]}", *into[1:], biases=False),
        *linear_rules("blocks/mlp/out", f"{mlp}.wo", biases=False),
        LeafRule("blocks/norm2/scale", (f"{layer}.1.layer_norm.weight",), "vector"),
        LeafRule("norm_final/scale", ("encoder.final_layer_norm.weight",), "vector"),
    ]


_C = TypeVar("_C")


class LoadedEncoder(NamedTuple, Generic[_C]):
    """A network of transformers: its sizes, its parameters f32, its files, and a line to print."""

    config: _C
    params: Any
    files: tuple[Path, ...]
    account: str


class TransformersFolder:
    """A folder of transformers: its tensors by plain names, and config.json.

    `file` holds those of another source, by the same names.
    """

    def __init__(
        self, path: str | os.PathLike[str], file: weights.TensorFile | None = None
    ) -> None:
        self.file = file or weights.read_tensors(path)
        self.config: Mapping[str, Any] = self.file.config
        self.kind = str(self.config.get("model_type", ""))
        if not self.config:
            raise UserError(f"{path} has no config.json: expected a folder of transformers.")

    def plain(self, keep: tuple[str, ...], prefixes: tuple[str, ...]) -> "TransformersFolder":
        """Names without the first of `prefixes` that they have; only those that begin as `keep`."""

        def name(full: str) -> str:
            found = next((each for each in prefixes if full.startswith(each)), "")
            return full.removeprefix(found)

        left = self.file.without(lambda full: not name(full).startswith(keep))
        self.file = left._replace(tensors={name(n): t for n, t in left.tensors.items()})
        return self

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of a tensor. Raises UserError."""
        found = self.file.tensors.get(name)
        if found is None or found.ndim != rank:
            what = "missing" if found is None else f"of shape {found.shape}"
            raise UserError(
                f"{self.file.path}: {name} is {what}; expected {rank} axes, as in transformers'"
                f" {self.kind or 'text encoders'}."
            )
        return found.shape

    def count(self, template: str) -> int:
        """How many layers there are: tensors named `template` with {i} = 0, 1, .."""
        i = 0
        while template.format(i=i) in self.file.tensors:
            i += 1
        if not i:
            raise UserError(f"{self.file.path} holds no {template.format(i=0)}: it has no layers.")
        return i

    def stated(self, section: str, name: str, default: Any) -> Any:
        """A value of config.json, of the default's type. Raises UserError."""
        group = self.config.get(section) or {} if section else self.config
        value = group.get(name, default)
        number = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(default, float) and number:
            value = float(value)
        if type(value) is not type(default):
            raise UserError(
                f"{self.file.path}: config.json says {name}={shown(value)}: expected a value such"
                f" as {default!r}."
            )
        return value

    def activation(self, section: str, name: str, default: str) -> str:
        """The activation that config.json names. Raises UserError for another."""
        stated = self.stated(section, name, default)
        if stated not in ACTIVATION_NAMES:
            raise UserError(
                f"{self.file.path}: config.json says {name}={stated!r}: expected one of"
                f" {', '.join(ACTIVATION_NAMES)}."
            )
        return ACTIVATION_NAMES[stated]

    def heads(self, section: str, name: str, default: int, width: int) -> int:
        """The number of heads, which no tensor shows. Raises UserError."""
        heads = int(self.stated(section, name, default))
        if heads < 1 or width % heads:
            raise UserError(
                f"{self.file.path}: config.json says {name}={heads}, which does not divide the"
                f" width {width}."
            )
        return heads


def clip_layers(folder: TransformersFolder, section: str, prefix: str, heads: int) -> Layers:
    """The layers of one of CLIP's towers; `heads` is transformers' default."""
    layer = f"{prefix}encoder.layers.{{i}}"
    hidden, width = folder.shape(f"{layer.format(i=0)}.mlp.fc1.weight", 2)
    return Layers(
        folder.count(f"{layer}.mlp.fc1.weight"),
        width,
        folder.heads(section, "num_attention_heads", heads, width),
        hidden,
        folder.activation(section, "hidden_act", "quick_gelu"),
        folder.stated(section, "layer_norm_eps", 1e-5),
        openai_init=True,
    )


def clip_text_config(folder: TransformersFolder, section: str, prefix: str) -> TextConfig:
    """The sizes of CLIP's text tower; pooled where eos_token_id is, or at the largest id if 2."""
    end = folder.stated(section, "eos_token_id", 49407)
    vocabulary, _ = folder.shape(f"{prefix}embeddings.token_embedding.weight", 2)
    positions, _ = folder.shape(f"{prefix}embeddings.position_embedding.weight", 2)
    projected = "text_projection.weight" in folder.file.tensors
    return TextConfig(
        "clip",
        vocabulary,
        clip_layers(folder, section, prefix, 8),
        positions,
        projection=folder.shape("text_projection.weight", 2)[0] if projected else 0,
        end=-1 if end == 2 else end,
    )


def _read_clip(folder: TransformersFolder) -> tuple[TextConfig, Layout]:
    section = "text_config" if folder.kind == "clip" else ""
    keep = ("embeddings.token", "embeddings.position_embedding", "encoder.", "final_", "text_proj")
    # transformers 5 saves a text tower alone without the prefix, 4 with it.
    if any(name.startswith("text_model.") for name in folder.file.tensors):
        whole = folder.file
        folder.file = whole.without(lambda n: not n.startswith(("text_model.", "text_projection")))
    folder.plain(keep, ("text_model.",))
    config = clip_text_config(folder, section, "")
    return config, clip_text_rules(projected=bool(config.projection))


def bert_layers(folder: TransformersFolder, first: int, last: int) -> Layers:
    """Layers first to last - 1 of BERT."""
    name = f"encoder.layer.{first}.intermediate.dense.weight"
    hidden, width = folder.shape(name, 2)
    return Layers(
        last - first,
        width,
        folder.heads("", "num_attention_heads", 12, width),
        hidden,
        folder.activation("", "hidden_act", "gelu"),
        folder.stated("", "layer_norm_eps", 1e-12),
        post_norm=True,
    )


def _read_bert(folder: TransformersFolder) -> tuple[TextConfig, Layout]:
    keep = ("embeddings.word", "embeddings.position_embeddings", "embeddings.token_type")
    folder.plain((*keep, "embeddings.LayerNorm", "encoder."), ("bert.",))
    kind = folder.stated("", "position_embedding_type", "absolute")
    if kind != "absolute":
        raise UserError(f"{folder.file.path}: its positions are {kind!r}; expected 'absolute'.")
    vocabulary, _ = folder.shape("embeddings.word_embeddings.weight", 2)
    layers = bert_layers(folder, 0, folder.count("encoder.layer.{i}.output.dense.weight"))
    positions, _ = folder.shape("embeddings.position_embeddings.weight", 2)
    types, _ = folder.shape("embeddings.token_type_embeddings.weight", 2)
    return TextConfig("bert", vocabulary, layers, positions, types), _bert_rules()


def _read_t5(folder: TransformersFolder) -> tuple[TextConfig, Layout]:
    file = folder.file
    if "shared.weight" not in file.tensors and "encoder.embed_tokens.weight" in file.tensors:
        table = file.tensors["encoder.embed_tokens.weight"]
        folder.file = file._replace(tensors={**file.tensors, "shared.weight": table})
    folder.plain(("shared.", "encoder.block", "encoder.final"), ())
    stated = folder.stated("", "feed_forward_proj", "relu")
    gated, act = stated.startswith("gated-"), stated.removeprefix("gated-")
    if act not in ACTIVATION_NAMES:
        raise UserError(
            f"{folder.file.path}: config.json says feed_forward_proj={stated!r}: expected"
            " 'relu' or 'gated-gelu'."
        )
    mlp = "encoder.block.{i}.layer.1.DenseReluDense."
    vocabulary, width = folder.shape("shared.weight", 2)
    hidden, _ = folder.shape(mlp.format(i=0) + ("wi_0" if gated else "wi") + ".weight", 2)
    inner, _ = folder.shape("encoder.block.0.layer.0.SelfAttention.q.weight", 2)
    heads = folder.heads("", "num_heads", 8, inner)
    layers = Layers(
        folder.count(mlp + "wo.weight"),
        width,
        heads,
        hidden,
        # transformers reads 'gated-gelu' as the tanh form, which T5 1.1 was trained with.
        "gelu_tanh" if stated == "gated-gelu" else ACTIVATION_NAMES[act],
        folder.stated("", "layer_norm_epsilon", 1e-6),
        rms=True,
        biases=False,
        gated=gated,
        head_width=inner // heads,
        plain_logits=True,
    )
    config = TextConfig(
        "t5",
        vocabulary,
        layers,
        buckets=folder.stated("", "relative_attention_num_buckets", 32),
        max_distance=folder.stated("", "relative_attention_max_distance", 128),
    )
    return config, _t5_rules(gated)


_READERS = {
    "bert": _read_bert,
    "clip": _read_clip,
    "clip_text_model": _read_clip,
    "t5": _read_t5,
}


def load_text_encoder(path: str | os.PathLike[str]) -> LoadedEncoder[TextConfig]:
    """The text encoder in a folder of transformers, whose `model_type` is BERT's, CLIP's or T5's.

    Raises a UserError that lists every missing, extra, mis-shaped and differently typed tensor.
    """
    folder = TransformersFolder(path)
    if folder.kind not in _READERS:
        raise UserError(
            f"{path}: config.json says model_type={shown(folder.kind)}: expected one of"
            f" {', '.join(_READERS)}."
        )
    config, rules = _READERS[folder.kind](folder)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = read_leaves(folder, rules, initial_shapes(TextEncoder(config).init, ids))
    return LoadedEncoder(config, params, folder.file.files, folder.file.account)


def read_leaves(
    folder: TransformersFolder, rules: Layout, ours: layouts.Shapes, patch: int = 1
) -> Any:
    """Our tree of parameters, as float32, from a folder's tensors. Raises UserError."""
    expected = layouts.expected_shapes(rules, ours, patch=patch)
    what = folder.kind if " of " in folder.kind else f"{folder.kind} of transformers"
    weights.check_tensors(folder.file.path, what, folder.file.tensors, expected)
    leaves = layouts.to_ours(rules, folder.file.tensors, ours)
    check_finite(leaves, folder.file.path, what)
    return unflatten({path: np.asarray(leaf, np.float32) for path, leaf in leaves.items()})
