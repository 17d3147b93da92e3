"""A tiny DINOv2 with seeded weights, in the names of the release and of transformers."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.seeded import seeded_state

WIDTH, DEPTH, HEADS, PATCH, GRID = 128, 2, 2, 14, 5
SIDE = 6 * PATCH  # positions of 5 x 5 are made 6 x 6


def release_shapes() -> dict[str, tuple[int, ...]]:
    D = WIDTH
    shapes = {
        "cls_token": (1, 1, D),
        "pos_embed": (1, 1 + GRID**2, D),
        "mask_token": (1, D),
        "patch_embed.proj.weight": (D, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (D,),
        "norm.weight": (D,),
        "norm.bias": (D,),
    }
    for i in range(DEPTH):
        for name, shape in {
            "norm1.weight": (D,),
            "norm1.bias": (D,),
            "norm2.weight": (D,),
            "norm2.bias": (D,),
            "attn.qkv.weight": (3 * D, D),
            "attn.qkv.bias": (3 * D,),
            "attn.proj.weight": (D, D),
            "attn.proj.bias": (D,),
            "mlp.fc1.weight": (4 * D, D),
            "mlp.fc1.bias": (4 * D,),
            "mlp.fc2.weight": (D, 4 * D),
            "mlp.fc2.bias": (D,),
            "ls1.gamma": (D,),
            "ls2.gamma": (D,),
        }.items():
            shapes[f"blocks.{i}.{name}"] = shape
    return shapes


def release_state() -> dict[str, np.ndarray]:
    state = seeded_state(release_shapes(), 5)
    # As large as what they are added to, or a wrong place would not show.
    for name in ("cls_token", "pos_embed"):
        state[name] = state[name] * np.float32(np.sqrt(np.prod(state[name].shape[1:])))
    for i in range(DEPTH):
        for name in (f"blocks.{i}.ls1.gamma", f"blocks.{i}.ls2.gamma"):
            state[name] = state[name] * 10
    return state


def transformers_state() -> dict[str, np.ndarray]:
    """The same weights in the names of transformers' Dinov2Model."""
    found = {}
    for name, tensor in release_state().items():
        for theirs, ours in (
            ("cls_token", "embeddings.cls_token"),
            ("mask_token", "embeddings.mask_token"),
            ("pos_embed", "embeddings.position_embeddings"),
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("attn.proj", "attention.output.dense"),
            ("ls1.gamma", "layer_scale1.lambda1"),
            ("ls2.gamma", "layer_scale2.lambda1"),
            ("blocks.", "encoder.layer."),
        ):
            name = name.replace(theirs, ours)
        if name.startswith("norm."):
            name = f"layer{name}"
        if "attn.qkv" in name:
            for part, one in zip(("query", "key", "value"), np.split(tensor, 3), strict=True):
                found[name.replace("attn.qkv", f"attention.attention.{part}")] = one
        else:
            found[name] = tensor
    return found


def save_release(path: Path) -> Path:
    save_file(release_state(), path)
    return path


def images() -> np.ndarray:
    """Normalised images f32[2,SIDE,SIDE,3]."""
    rng = np.random.default_rng(2)
    return rng.standard_normal((2, SIDE, SIDE, 3)).astype(np.float32)
