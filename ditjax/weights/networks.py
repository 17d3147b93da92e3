"""What a network out of a file is: its weights, and the recipe that computes them."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from ditjax.config import Config, read
from ditjax.errors import UserError
from ditjax.files.assets import flatten
from ditjax.parallel.rules import path_of
from ditjax.tasks import build

# The paper's recipe, as experiments/base.py has it: what a file does not say is taken from here.
RELEASE: dict[str, dict[str, Any]] = {
    "model": {
        "size": "XL",
        "patch": 2,
        "block": "adaln_zero",
        "mlp_ratio": 4.0,
        "label_dropout": 0.1,
        "dtype": "float32",
        "remat": "none",
        "unroll": 1,
        "matmul": "default",
        "frequency_shift": 0,
        "norm2_eps": 1e-6,
        "attention": "auto",
        "parametrization": "standard",
        "base_width": 384,
        "base_head_width": 64,
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
        "max_damaged": 0,
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
        "spike_factor": 0.0,
    },
    "train": {
        "network": "dit",
        "steps": 400_000,
        "batch_size": 256,
        "microbatches": 1,
        "prefetch": 2,
        "ema_decay": 0.9999,
        "log_every_steps": 100,
        "checkpoint_every_steps": 10_000,
        "keep_checkpoints": 2,
        "keep_every_steps": 0,
        "grace_seconds": 25,
        "sample_every_steps": 10_000,
        "evaluate_every_steps": 0,
        "evaluate_num": 5_000,
        "max_bad_steps": 5,
    },
    "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "context": 1, "slices": 1},
    "distributed": {"initialization_seconds": 300, "heartbeat_seconds": 25},
    "sample": {
        "sampler": "ddpm",
        "steps": "250",
        "eta": 0.0,
        "cfg_scale": 1.0,
        "cfg_channels": "three",
        "cfg_interval": (0.0, 1.0),
        "clip_x0": False,
        "weights": "ema",
        "batch_size": 64,
        "num": 64,
    },
    "evaluate": {
        "split": "validation",
        "features": "none",
        "reference": "",
        "num_samples": 50_000,
        "labels": "uniform",
        "seed": 0,
        "guided_scale": 0.0,
        "guided_num": 1000,
        "val_loss_num": 0,
    },
    "sweep": {
        "grid": (),
        "lists": (),
        "zips": (),
        "seeds": (),
        "budget": (),
        "title": "",
        "topology": "",
        "published": (),
        "published_protocol": (),
        "published_source": "",
    },
}

Kind = Literal["dit", "autoencoder"]


class Network(NamedTuple):
    """A network's weights: `params` of NumPy arrays in the file's own floating type.

    `config` is a whole recipe: the keys that the weights fix are theirs, the others the paper's.
    """

    kind: Kind
    config: Config
    params: dict[str, Any]
    layout: str
    files: tuple[Path, ...]

    @property
    def leaves(self) -> dict[str, np.ndarray]:
        """Our leaves by path, without the leading 'params'."""
        return flatten(self.params["params"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of `leaves`."""
        return {path: leaf.shape for path, leaf in self.leaves.items()}

    @property
    def dtype(self) -> np.dtype:
        """The floating type of the weights."""
        return next(iter(self.leaves.values())).dtype

    @property
    def num_parameters(self) -> int:
        """Weights and biases."""
        return sum(leaf.size for leaf in self.leaves.values())

    @property
    def name(self) -> str:
        """'DiT-XL/2' or 'KL autoencoder'."""
        if self.kind == "autoencoder":
            return f"KL autoencoder (f={2 ** (len(self.config.autoencoder.multipliers) - 1)})"
        return f"DiT-{self.config.model.size}/{self.config.model.patch}"


def recipe(changes: Mapping[str, Mapping[str, Any]]) -> Config:
    """The paper's recipe with sections changed."""
    tree: dict[str, Any] = {k: {**v, **changes.get(k, {})} for k, v in RELEASE.items()}
    return read({"seed": 0, **tree})


def shapes_of(c: Config) -> dict[str, tuple[int, ...]]:
    """Our leaves of the network that a recipe trains, by path. None depends on the image's size."""
    levels = len(c.autoencoder.multipliers)
    side = c.model.patch * c.downsample if c.train.network == "dit" else 2 ** (levels - 1)
    small = dataclasses.replace(c, data=dataclasses.replace(c.data, image_size=side))
    # Traced from the recipe on: even the example input is only a shape.
    return initial_shapes(lambda key: build.trainee(small).init(key))


def initial_shapes(init: Callable[..., Any], *inputs: Any) -> dict[str, tuple[int, ...]]:
    """Leaves by path of what `init(key, *inputs)` would make: nothing is computed."""
    # The key is made in here: nothing is computed, so several processes may still be started.
    tree = jax.eval_shape(lambda *x: init(jax.random.key(0), *x), *inputs)["params"]
    return {path_of(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def training(c: Config, kind: Kind) -> Config:
    """The recipe that trains one of a recipe's two networks."""
    return dataclasses.replace(c, train=dataclasses.replace(c.train, network=kind))


def of_run(config: Config, params: Any, files: tuple[Path, ...] = ()) -> Network:
    """The network of a training run of ours: parameters as `runs.load_weights` gives them."""
    kind: Kind = "autoencoder" if config.train.network == "autoencoder" else "dit"
    host = jax.tree.map(np.asarray, params)
    return Network(kind, config, {"params": host["params"]}, "ditjax", files)


def check_fit(dit: Network, autoencoder: Network) -> None:
    """Raises UserError when one is not what it should be, or their latents differ."""
    expected = ((dit, "dit", "a DiT"), (autoencoder, "autoencoder", "an autoencoder"))
    for network, kind, what in expected:
        if network.kind != kind:
            raise UserError(f"{network.files[0]} holds a {network.name}: expected {what}.")
    ours = dit.config.input_channels
    theirs = autoencoder.config.autoencoder.latent_channels
    if not dit.config.latent or ours != theirs:
        raise UserError(
            f"the DiT works on {ours} channels and the autoencoder's latents have {theirs}: they"
            " do not belong together."
        )


def joined(dit: Network, autoencoder: Network) -> Config:
    """The DiT's recipe with its autoencoder's architecture in it.

    The scale of the latents is what the DiT was trained at; where its file does not say, it is the
    autoencoder's own.
    """
    check_fit(dit, autoencoder)
    a = autoencoder.config.autoencoder
    if dit.layout == "ditjax":
        a = dataclasses.replace(a, scale=dit.config.autoencoder.scale)
    side = dit.config.input_size * 2 ** (len(a.multipliers) - 1)
    return dataclasses.replace(
        dit.config,
        autoencoder=a,
        data=dataclasses.replace(
            dit.config.data, image_size=side, channels=autoencoder.config.data.channels
        ),
    )


def as_float32(params: Any) -> Any:
    """Weights as the networks hold them."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
