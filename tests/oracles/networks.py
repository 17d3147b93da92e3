"""diffusers' DiT and KL autoencoder on seeded weights, and the golden file of their outputs."""

import json
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel

from tests.seeded import seeded_state

PACKAGES = ("torch", "diffusers", "numpy")
SEED = 0

SMALL_DIT = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 16,
    "patch_size": 4,
    "num_embeds_ada_norm": 10,
}
S2_DIT = {
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 12,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}


def autoencoder_config(base_width: int, levels: int, groups: int) -> dict[str, Any]:
    """Stable Diffusion's layout at any width."""
    multipliers = (1, 2, 4, 4)[:levels]
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "block_out_channels": tuple(base_width * m for m in multipliers),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": groups,
    }


def seeded_network(network: torch.nn.Module) -> torch.nn.Module:
    """Weights of `tests.seeded`; diffusers' copies of the embedders in each block made equal."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    state = {name: torch.from_numpy(x) for name, x in seeded_state(shapes, SEED).items()}
    for name in state:
        if ".norm1.emb." in name:
            state[name] = state["transformer_blocks.0.norm1.emb." + name.split(".norm1.emb.")[1]]
    network.load_state_dict(state)
    return network.eval()


def dit(config: dict[str, Any]) -> DiTTransformer2DModel:
    """diffusers' DiT; no weight is zero, so that the modulation and the last layer matter."""
    return seeded_network(DiTTransformer2DModel(**config))


def autoencoder(config: dict[str, Any]) -> AutoencoderKL:
    """diffusers' KL autoencoder."""
    return seeded_network(AutoencoderKL(**config))


def dit_inputs(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x f32[3,C,S,S], t i64[3], y i64[3], the last unconditional."""
    side, classes = config["sample_size"], config["num_embeds_ada_norm"]
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, config["in_channels"], side, side)).astype(np.float32)
    return x, np.array([0, 17, 999]), np.array([3, 0, classes])


def dit_output(network: DiTTransformer2DModel, config: dict[str, Any]) -> np.ndarray:
    """f32[3,2C,S,S]."""
    with torch.no_grad():
        return network(*(torch.from_numpy(a) for a in dit_inputs(config))).sample.numpy()


def image(height: int, width: int) -> np.ndarray:
    """f32[1,3,H,W] in [-1, 1]."""
    rng = np.random.default_rng(2)
    return rng.uniform(-1, 1, (1, 3, height, width)).astype(np.float32)


def autoencoder_output(
    network: AutoencoderKL, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and log-variance of q(z|x), and the mean's image."""
    with torch.no_grad():
        posterior = network.encode(torch.from_numpy(x)).latent_dist
        again = network.decode(posterior.mean).sample
    return posterior.mean.numpy(), posterior.logvar.numpy(), again.numpy()


def goldens() -> dict[str, np.ndarray]:
    """The small networks: names, shapes, the folder's config, outputs."""
    small = autoencoder_config(16, 2, 8)
    networks = {"dit": dit(SMALL_DIT), "autoencoder": autoencoder(small)}
    found: dict[str, np.ndarray] = {}
    for kind, network in networks.items():
        shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
        found[f"{kind}_shapes"] = np.array(json.dumps(shapes))
        found[f"{kind}_config"] = np.array(json.dumps(dict(network.config), default=str))
    x, t, y = dit_inputs(SMALL_DIT)
    found |= {"dit_x": x, "dit_t": t, "dit_y": y}
    found["dit_output"] = dit_output(networks["dit"], SMALL_DIT)
    x = image(16, 24)
    mean, log_variance, again = autoencoder_output(networks["autoencoder"], x)
    found |= {
        "autoencoder_x": x,
        "autoencoder_mean": mean,
        "autoencoder_log_variance": log_variance,
        "autoencoder_again": again,
    }
    return found
