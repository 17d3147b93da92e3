"""A tiny prior of diffusers: its folder, and what it computes."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import PriorTransformer
from safetensors.numpy import load_file

PACKAGES = ("diffusers", "torch")
SIZES = {"num_attention_heads": 2, "attention_head_dim": 6, "num_layers": 2}
SIZES |= {"embedding_dim": 10, "num_embeddings": 5}


def random_prior():
    """Every leaf drawn: the query, the positions and the statistics are 0 at first."""
    torch.manual_seed(0)
    model = PriorTransformer(**SIZES).eval()
    with torch.no_grad():
        for path, leaf in model.named_parameters():
            noise = torch.randn_like(leaf)
            norm = "norm" in path and path.endswith("weight")
            leaf.copy_(1 + 0.1 * noise if norm else 0.5 * noise)
    return model


def inputs():
    """x, text's vector f32[3,10], context f32[3,5,10], mask bool[3,5], timesteps i32[3]."""
    rng = np.random.default_rng(0)
    x, vector = rng.normal(size=(2, 3, 10)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], bool)
    context = rng.normal(size=(3, 5, 10)).astype(np.float32)
    return {"x": x, "vector": vector, "context": context, "mask": mask, "t": np.array([0, 17, 999])}


@torch.no_grad()
def outputs(model):
    """Its prediction with the mask, with a mask of ones, and what its latents stand for."""
    x, vector, context, mask, t = (torch.from_numpy(each) for each in inputs().values())

    def predicted(mask):
        return model(x, t, vector, context, mask).predicted_image_embedding

    whole = predicted(torch.ones_like(mask))
    found = {
        "masked": predicted(mask),
        "whole": whole,
        "vectors": model.post_process_latents(whole),
    }
    return {name: value.numpy() for name, value in found.items()}


def goldens():
    """config as JSON, tensor/.., in/.. and out/.."""
    model = random_prior()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        tensors = load_file(Path(folder) / "diffusion_pytorch_model.safetensors")
    found = {"config": np.array(json.dumps(config))}
    found |= {f"tensor/{name}": value for name, value in tensors.items()}
    found |= {f"in/{name}": value for name, value in inputs().items()}
    return found | {f"out/{name}": value for name, value in outputs(model).items()}
