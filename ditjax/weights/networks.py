"""A network loaded from a file: its weights, and the recipe that describes it."""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ditjax.config import Autoencoder, Config, FrozenAutoencoder, read, replaced, task_module
from ditjax.data.classes import ClassNames, class_names
from ditjax.errors import UserError, first_few, one_line
from ditjax.files.assets import flatten
from ditjax.parallel.rules import path_of
from ditjax.training.task import Task


class LoadedNetwork(NamedTuple):
    """A network's weights: `params` are NumPy arrays in the file's floating-point type.

    `config` is a whole recipe: some keys follow from the weights, the others are the paper's.
    `notes` are lines to print: what was taken from the files, left out and assumed.
    `class_names` are those in the file, None if it has none. `published`: the file may be one of
    the published DiTs, whose classes are ImageNet's.
    """

    config: Config
    params: dict[str, Any]
    layout: str
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    states_scale: bool = True  # whether an autoencoder's file has the statistics of its latents
    class_names: ClassNames | None = None
    published: bool = False

    @property
    def leaves(self) -> dict[str, np.ndarray]:
        """The parameters by path, without the leading 'params'."""
        return flatten(self.params["params"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of `leaves`."""
        return {path: leaf.shape for path, leaf in self.leaves.items()}

    @property
    def dtype(self) -> np.dtype:
        """The floating-point type of the weights."""
        return next(iter(self.leaves.values())).dtype

    @property
    def num_parameters(self) -> int:
        """The number of weights and biases."""
        return sum(leaf.size for leaf in self.leaves.values())

    @property
    def decodes(self) -> bool:
        """Whether this is an autoencoder, which decodes the latents of another network."""
        section = getattr(self.config, "autoencoder", None)
        return section is not None and not section.FROZEN

    @property
    def name(self) -> str:
        """'DiT-XL/2' or 'KL autoencoder (f=8)'."""
        return task_of(self.config).name


def chosen_names(
    found: ClassNames | None, choice: str, classes: int, path: str | os.PathLike[str]
) -> ClassNames | None:
    """The class names of a network of `path` by a choice: 'auto', 'imagenet' or 'none'.

    'auto' takes those that were found with it. Raises UserError for ImageNet's names of another
    number of classes.
    """
    if choice != "imagenet":
        return None if choice == "none" else found
    if classes != len(class_names()):
        raise UserError(
            f"--class_names=imagenet: ImageNet has {len(class_names())} classes, and {path} has"
            f" {classes}: remove it."
        )
    return class_names()


def with_class_names(network: LoadedNetwork, choice: str) -> LoadedNetwork:
    """The network with `chosen_names`.

    With 'auto', a file without names that may be one of the published DiTs takes ImageNet's, and a
    line says so.
    """
    path, classes = network.files[0], network.config.data.num_classes
    if choice == "auto" and network.class_names is None and network.published:
        line = (
            f"note: {path} names no classes. It looks like a published {network.name}, so they are"
            " taken for ImageNet's; --class_names=none takes numbers only"
        )
        print(one_line(line), file=sys.stderr)
        choice = "imagenet"
    return network._replace(class_names=chosen_names(network.class_names, choice, classes, path))


def task_of(c: Config) -> Task:
    """The task of a recipe, on one device."""
    task: Task = task_module(c.task).TASK.make(c, None)
    return task


def shapes_of(c: Config) -> dict[str, tuple[int, ...]]:
    """The shapes of a recipe's parameters by path. None depends on the image size."""
    # One token, or one pixel of the deepest level, so that a hostile file cannot use memory.
    factor = c.downsample
    if section := getattr(c, "autoencoder", None):
        factor = factor if section.FROZEN else 2 ** (len(section.multipliers) - 1)
    side = c.model.stride * factor
    small = replaced(c, data=dataclasses.replace(c.data, image_size=side))
    if section := getattr(c, "sample", None):
        # The network that guides it is of the whole size.
        small = replaced(small, sample=dataclasses.replace(section, guide=""))
    return dict(_shapes_of(small))


@functools.lru_cache(maxsize=32)
def _shapes_of(c: Config) -> dict[str, tuple[int, ...]]:
    # Everything is traced, for up to half a second: even the example input is only a shape.
    return initial_shapes(lambda key: task_of(c).init(key))


def initial_shapes(init: Callable[..., Any], *inputs: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of what `init(key, *inputs)` would return, by path, without computing it."""
    # The key is made inside eval_shape: JAX must not compute before `processes.start`.
    tree = jax.eval_shape(lambda *x: init(jax.random.key(0), *x), *inputs)["params"]
    return {path_of(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def labels_text(c: Config) -> str:
    """'classes: 1000, and a null label', 'classes: 10, no null label' or 'texts: 16 tokens, ..'."""
    if text := getattr(c, "text", None):
        features = f", {text.width} features each" if hasattr(text, "width") else ""
        return f"texts: {text.tokens} tokens{features}"
    null = "and a null label" if getattr(c.model, "label_dropout", 0) > 0 else "no null label"
    return f"classes: {c.data.num_classes}, {null}"


def decoder_recipe(c: Config) -> Config:
    """The recipe of the frozen autoencoder of a latent recipe."""
    return read(
        {
            "task": "autoencoder",
            "model": {"dtype": c.model.dtype, "matmul": c.model.matmul},
            "data": {"image_size": c.data.image_size, "channels": c.data.channels},
            "autoencoder": dataclasses.asdict(c.autoencoder),
        }
    )


def from_run(
    config: Config,
    params: Any,
    files: tuple[Path, ...] = (),
    class_names: ClassNames | None = None,
) -> LoadedNetwork:
    """The network of a training run, from the parameters that `opening.load_weights` returns."""
    host = jax.tree.map(np.asarray, params)
    return LoadedNetwork(
        config, {"params": host["params"]}, "ditjax", files, class_names=class_names
    )


def check_fit(dit: LoadedNetwork, autoencoder: LoadedNetwork) -> None:
    """Raise UserError unless these are a DiT and an autoencoder whose latents match."""
    expected = ((dit, False, "a DiT"), (autoencoder, True, "an autoencoder"))
    for network, decodes, what in expected:
        if network.decodes != decodes:
            raise UserError(f"{network.files[0]} holds a {network.name}: expected {what}.")
    ours = dit.config.input_channels
    theirs = autoencoder.config.autoencoder.latent_channels
    if not dit.config.latent or ours != theirs:
        raise UserError(
            f"the DiT has {ours} input channels and the autoencoder's latents have {theirs}: they"
            " do not belong together."
        )


def check_stated(autoencoder: LoadedNetwork) -> None:
    """Raise UserError if an autoencoder's file does not say how its latents are normalised.

    Stable Diffusion's, of four channels, are known.
    """
    a = autoencoder.config.autoencoder
    if not autoencoder.states_scale and a.latent_channels != 4:
        raise UserError(
            f"{autoencoder.files[0]} does not say how its latents of {a.latent_channels} channels"
            " are normalised: give its folder of diffusers, whose config.json has scaling_factor"
            " and shift_factor, or put one beside it."
        )


def check_statistics(
    path: str | os.PathLike[str], autoencoder: LoadedNetwork, ours: Autoencoder, remedy: str
) -> None:
    """Raise UserError if an autoencoder's shift, mean or deviation are others than `ours`.

    One that ditjax trained states none, and its latents are normalised as the recipe says. A scale
    may differ: it is the DiT's.
    """
    theirs = autoencoder.config.autoencoder
    plain = not (theirs.shift or theirs.latent_mean)
    if not autoencoder.states_scale or (plain and autoencoder.layout == "ditjax"):
        return
    for key in ("shift", "latent_mean", "latent_std"):
        value, expected = getattr(theirs, key), getattr(ours, key)
        if value != expected:
            raise UserError(
                f"the autoencoder at {path} has {key} {value}, and the recipe of its latents has"
                f" {expected}: expected the same{remedy.format(key=key)}."
            )


def combined_recipe(dit: LoadedNetwork, autoencoder: LoadedNetwork) -> Config:
    """The DiT's recipe with the architecture of its autoencoder.

    The statistics of the latents are those that the DiT was trained with, or the autoencoder's if
    the DiT's file does not contain them. Raises UserError if they differ in more than the scale.
    """
    check_fit(dit, autoencoder)
    a = FrozenAutoencoder(**dataclasses.asdict(autoencoder.config.autoencoder))
    if dit.layout == "ditjax":
        trained = dit.config.autoencoder
        check_statistics(
            autoencoder.files[0], autoencoder, trained, ", as the DiT was trained with"
        )
        a = dataclasses.replace(a, **{key: getattr(trained, key) for key in trained.statistics})
    else:
        check_stated(autoencoder)
    side = dit.config.input_size * 2 ** (len(a.multipliers) - 1)
    return replaced(
        dit.config,
        autoencoder=a,
        data=dataclasses.replace(
            dit.config.data, image_size=side, channels=autoencoder.config.data.channels
        ),
    )


def not_finite(leaves: Mapping[str, np.ndarray]) -> list[str]:
    """The paths of those that hold NaN or infinities."""

    def whole(leaf: np.ndarray) -> bool:
        with np.errstate(invalid="ignore"):  # no copy: the leaves are large
            return not leaf.size or bool(np.isfinite(leaf.min()) and np.isfinite(leaf.max()))

    return [path for path, leaf in leaves.items() if not whole(leaf)]


def check_finite(leaves: Mapping[str, np.ndarray], file: Path, name: str) -> None:
    """Raise UserError for values with which a network would compute noise."""
    if bad := not_finite(leaves):
        raise UserError(
            f"{file} holds a {name} with NaN or infinities in {first_few(bad)}:"
            " save it from before it diverged, or download it again."
        )


def as_float32(network: LoadedNetwork) -> Any:
    """The weights of a network in float32, the type of its parameters, to compute with.

    Raises UserError for values that are not finite.
    """
    check_finite(network.leaves, network.files[0], network.name)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), network.params)
