"""What a network out of a file is: its weights, and the recipe that computes them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ditjax.config import Config, FrozenAutoencoder, read, replaced, task_module
from ditjax.errors import UserError
from ditjax.files.assets import flatten
from ditjax.parallel.rules import path_of
from ditjax.training.task import Task


class Network(NamedTuple):
    """A network's weights: `params` of NumPy arrays in the file's own floating type.

    `config` is a whole recipe: the keys that the weights fix are theirs, the others the paper's.
    """

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
    def decodes(self) -> bool:
        """Whether it is an autoencoder: what decodes the latents of another network."""
        section = getattr(self.config, "autoencoder", None)
        return section is not None and not section.FROZEN

    @property
    def name(self) -> str:
        """'DiT-XL/2' or 'KL autoencoder (f=8)'."""
        return task_of(self.config).name


def task_of(c: Config) -> Task:
    """What a recipe learns, on one device."""
    task: Task = task_module(c.task).TASK.make(c, None)
    return task


def shapes_of(c: Config) -> dict[str, tuple[int, ...]]:
    """Our leaves of the network that a recipe trains, by path. None depends on the image's size."""
    # Of a DiT one token, of an autoencoder one latent: nothing large is made for a hostile file.
    factor = c.downsample
    if section := getattr(c, "autoencoder", None):
        factor = factor if section.FROZEN else 2 ** (len(section.multipliers) - 1)
    side = getattr(c.model, "patch", 1) * factor
    small = replaced(c, data=dataclasses.replace(c.data, image_size=side))
    # Traced from the recipe on: even the example input is only a shape.
    return initial_shapes(lambda key: task_of(small).init(key))


def initial_shapes(init: Callable[..., Any], *inputs: Any) -> dict[str, tuple[int, ...]]:
    """Leaves by path of what `init(key, *inputs)` would make: nothing is computed."""
    # The key is made in here: nothing is computed, so several processes may still be started.
    tree = jax.eval_shape(lambda *x: init(jax.random.key(0), *x), *inputs)["params"]
    return {path_of(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def decoder_recipe(c: Config) -> Config:
    """The recipe of the autoencoder in front of a latent recipe."""
    return read(
        {
            "task": "autoencoder",
            "model": {"dtype": c.model.dtype, "matmul": c.model.matmul},
            "data": {"image_size": c.data.image_size, "channels": c.data.channels},
            "autoencoder": dataclasses.asdict(c.autoencoder),
        }
    )


def of_run(config: Config, params: Any, files: tuple[Path, ...] = ()) -> Network:
    """The network of a training run of ours: parameters as `opening.load_weights` gives them."""
    host = jax.tree.map(np.asarray, params)
    return Network(config, {"params": host["params"]}, "ditjax", files)


def check_fit(dit: Network, autoencoder: Network) -> None:
    """Raises UserError when one is not what it should be, or their latents differ."""
    expected = ((dit, False, "a DiT"), (autoencoder, True, "an autoencoder"))
    for network, decodes, what in expected:
        if network.decodes != decodes:
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
    a = FrozenAutoencoder(**dataclasses.asdict(autoencoder.config.autoencoder))
    if dit.layout == "ditjax":
        a = dataclasses.replace(a, scale=dit.config.autoencoder.scale)
    side = dit.config.input_size * 2 ** (len(a.multipliers) - 1)
    return replaced(
        dit.config,
        autoencoder=a,
        data=dataclasses.replace(
            dit.config.data, image_size=side, channels=autoencoder.config.data.channels
        ),
    )


def as_float32(params: Any) -> Any:
    """Weights as the networks hold them."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
