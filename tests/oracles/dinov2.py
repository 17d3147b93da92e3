"""transformers' Dinov2Model on the weights of `tests/dinov2_files.py`."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import Dinov2Config, Dinov2Model

from tests import dinov2_files as tiny

PACKAGES = ("transformers", "torch")


def save_folder(folder: Path) -> Path:
    """A folder as the published ones: their names are older than transformers' modules."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Dinov2Config(
        hidden_size=tiny.WIDTH,
        num_hidden_layers=tiny.DEPTH,
        num_attention_heads=tiny.HEADS,
        image_size=tiny.GRID * tiny.PATCH,
        patch_size=tiny.PATCH,
    )
    save_file(tiny.transformers_state(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def model() -> Dinov2Model:
    with tempfile.TemporaryDirectory() as folder:
        found, told = Dinov2Model.from_pretrained(
            save_folder(Path(folder)), output_loading_info=True
        )
    assert not told["missing_keys"], told
    assert not told["unexpected_keys"], told
    return found.eval()


@torch.no_grad()
def class_token(x: np.ndarray) -> np.ndarray:
    """x f32[B,S,S,3] -> f32[B,D]."""
    out = model()(pixel_values=torch.from_numpy(x.transpose(0, 3, 1, 2)))
    return out.last_hidden_state[:, 0].numpy()


@torch.no_grad()
def release_positions(table: np.ndarray, grid: int) -> np.ndarray:
    """As the release's interpolate_pos_encoding: by the factor (grid + 0.1) / n."""
    n = int((table.shape[1] - 1) ** 0.5)
    square = torch.from_numpy(table[:, 1:].reshape(1, n, n, -1).transpose(0, 3, 1, 2).copy())
    factor = float(grid + 0.1) / n
    grown = torch.nn.functional.interpolate(square, scale_factor=(factor, factor), mode="bicubic")
    return grown.numpy()[0].transpose(1, 2, 0).reshape(grid * grid, -1)


def goldens() -> dict[str, np.ndarray]:
    return {
        "class_token": class_token(tiny.images()),
        "release_positions": release_positions(tiny.release_state()["pos_embed"], 6)[:, :8],
    }
