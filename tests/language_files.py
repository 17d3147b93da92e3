"""Small language models in every layout that is read, with seeded weights."""

import json
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.seeded import seeded_state

LLAMA = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
BERT = {
    "model_type": "bert",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
FIRST, LAST = 1, 3


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """Names as in transformers' LlamaModel, without its embeddings."""
    d, f, kv = 24, 40, 12
    layer = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    shapes = {f"layers.{i}.{name}.weight": s for i in range(3) for name, s in layer.items()}
    return {**shapes, "norm.weight": (d,)}


def bert_shapes() -> dict[str, tuple[int, ...]]:
    """Names as in transformers' BertModel, without its embeddings."""
    d, f = 24, 40
    layer: dict[str, tuple[int, ...]] = {}
    for name, out, into in (
        ("attention.self.query", d, d),
        ("attention.self.key", d, d),
        ("attention.self.value", d, d),
        ("attention.output.dense", d, d),
        ("intermediate.dense", f, d),
        ("output.dense", d, f),
    ):
        layer |= {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        layer |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    return {f"encoder.layer.{i}.{name}": s for i in range(3) for name, s in layer.items()}


def state_of(kind: str) -> dict[str, np.ndarray]:
    """The seeded weights of a model."""
    return seeded_state(llama_shapes() if kind == "llama" else bert_shapes(), 5)


def tokens() -> np.ndarray:
    """f32[2, 5, 24]."""
    return np.random.default_rng(8).standard_normal((2, 5, 24)).astype(np.float32)


def write_folder(folder: Path, kind: str, prefix: str = "") -> Path:
    """As transformers saves it."""
    folder.mkdir(exist_ok=True)
    config = LLAMA if kind == "llama" else BERT
    (folder / "config.json").write_text(json.dumps(config))
    save_file({prefix + k: v for k, v in state_of(kind).items()}, folder / "model.safetensors")
    return folder


TO_GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TO_RELEASE = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def renamed(name: str, names: dict[str, str], stem: str) -> str:
    """'layers.1.mlp.up_proj.weight' by another program's names."""
    if name == "norm.weight":
        return "output_norm.weight" if stem == "blk" else name
    _, i, rest = name.split(".", 2)
    return f"{stem}.{i}.{names[rest.removesuffix('.weight')]}.weight"


def write_release(folder: Path) -> Path:
    """As LLaMA's own release; safetensors in the place of PyTorch's file."""
    folder.mkdir(exist_ok=True)
    state = {renamed(k, _TO_RELEASE, "layers"): v for k, v in state_of("llama").items()}
    save_file(state, folder / "consolidated.00.safetensors")
    params = {"dim": 24, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def write_gguf(path: Path, architecture: str = "llama", kind: int = 0) -> Path:
    """As llama.cpp writes it, in float32."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text(architecture),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("llama.attention.head_count") + struct.pack("<II", 4, 4),
        text("llama.attention.head_count_kv") + struct.pack("<II", 4, 2),
        text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5),
    ]
    table, data = b"", b""
    state = {renamed(k, TO_GGUF, "blk"): v for k, v in state_of("llama").items()}
    for name, value in state.items():
        sizes = struct.pack(f"<{value.ndim}Q", *value.shape[::-1])
        table += text(name) + struct.pack("<I", value.ndim) + sizes
        table += struct.pack("<IQ", kind, len(data))
        data += value.tobytes().ljust(-(-value.nbytes // 32) * 32, b"\0")
    head = b"GGUF" + struct.pack("<IQQ", 3, len(state), len(pairs)) + b"".join(pairs) + table
    path.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + data)
    return path
