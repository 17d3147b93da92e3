"""transformers' layers of BERT and LLaMA without positions, and goldens."""

import functools
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from tests import language_files as files

PACKAGES = ("transformers", "torch", "numpy")


@torch.no_grad()
def bert(model: Any, x: np.ndarray, first: int, last: int) -> np.ndarray:
    """Layers first to last - 1 of a BertModel on x f32[B,N,d]."""
    h = torch.from_numpy(x)
    for layer in model.encoder.layer[first:last]:
        out = layer(h)
        h = out[0] if isinstance(out, tuple) else out
    return h.numpy()


@torch.no_grad()
def llama(model: Any, x: np.ndarray, first: int, last: int) -> np.ndarray:
    """Layers first to last - 1 and the norm of a LlamaModel, turned by no angle, without a mask."""
    h = torch.from_numpy(x)
    d = model.config.hidden_size // model.config.num_attention_heads
    none = torch.ones(1, x.shape[1], d), torch.zeros(1, x.shape[1], d)
    mask = torch.zeros(1, 1, x.shape[1], x.shape[1])  # given, it is not causal
    for layer in model.layers[first:last]:
        out = layer(h, attention_mask=mask, position_embeddings=none)
        h = out[0] if isinstance(out, tuple) else out
    return model.norm(h).numpy()


@functools.cache
def model_of(kind: str) -> Any:
    """A small model with the seeded weights."""
    config = dict(files.LLAMA if kind == "llama" else files.BERT, vocab_size=30)
    if kind == "llama":
        model: Any = LlamaModel(LlamaConfig(**config, attn_implementation="eager"))
    else:
        made = BertConfig(**config, attn_implementation="eager")
        model = BertModel(made, add_pooling_layer=False)
    state = {k: torch.from_numpy(v) for k, v in files.state_of(kind).items()}
    missing, extra = model.load_state_dict(state, strict=False)
    assert not extra
    assert all("embed" in name for name in missing)
    return model.eval()


def outputs(kind: str) -> np.ndarray:
    """What the small model makes of the tokens of the tests."""
    of = llama if kind == "llama" else bert
    return of(model_of(kind), files.tokens(), files.FIRST, files.LAST)


def goldens() -> dict[str, np.ndarray]:
    """The arrays of tests/goldens/language.npz."""
    return {kind: outputs(kind) for kind in ("bert", "llama")}
