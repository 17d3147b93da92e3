"""Every key of a recipe at the paper's value: the other recipes start from here."""

from ml_collections import ConfigDict


def get_config(size: str = "XL", patch: int = 2) -> ConfigDict:
    """DiT-`size`/`patch` on ImageNet 256x256 latents, as the paper trains it."""
    return ConfigDict(
        {
            "seed": 0,
            "model": {
                "size": size,
                "patch": patch,
                "block": "adaln_zero",
                "mlp_ratio": 4.0,
                "label_dropout": 0.1,
                "dtype": "float32",
                "remat": "none",
                "unroll": 1,
                "matmul": "default",
                "frequency_shift": 0,
                "norm2_eps": 1e-6,
            },
            "diffusion": {
                "timesteps": 1000,
                "schedule": "linear",
                "prediction": "eps",
                "variance": "learned_range",
                "loss": "hybrid",
            },
            "data": {
                "name": "imagenet2012",
                "split": "train",
                "image_size": 256,
                "channels": 3,
                "num_classes": 1000,
                "flip": True,
                "data_dir": "",
                "cache_mb": 256,
                "threads": 16,
            },
            "autoencoder": {
                "kind": "kl",
                "path": "",
                "base_width": 128,
                "multipliers": (1, 2, 4, 4),
                "res_blocks": 2,
                "latent_channels": 4,
                "groups": 32,
                "scale": 0.18215,
                "kl_weight": 1e-6,
            },
            "optim": {
                "learning_rate": 1e-4,
                "schedule": "constant",
                "warmup_steps": 0,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip_norm": 0.0,
            },
            "train": {
                "network": "dit",
                "steps": 400_000,
                "batch_size": 256,
                "ema_decay": 0.9999,
                "log_every_steps": 100,
                "checkpoint_every_steps": 10_000,
                "keep_checkpoints": 2,
                "sample_every_steps": 10_000,
            },
            "mesh": {"data": -1, "fsdp": 1},
            "sample": {
                "sampler": "ddpm",
                "steps": "250",
                "eta": 0.0,
                "cfg_scale": 1.0,
                "cfg_channels": "three",
                "clip_x0": False,
                "batch_size": 64,
                "num": 64,
            },
            "evaluate": {
                "split": "validation",
                "features": "none",
                "num_samples": 50_000,
                "labels": "uniform",
                "guided_scale": 0.0,
                "guided_num": 1000,
            },
            "sweep": {"grid": ()},
        }
    )
