"""What a file says of its network in words: a training script's arguments, or a folder's config.

Shapes do not determine the number of classes, nor what the network predicts. Training scripts leave
their arguments beside the weights, and the words below are those of the public ones: DiT, SiT
(train_utils.py), REPA (train.py), guided diffusion, and diffusers' config.json.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ditjax.config import Config
from ditjax.errors import UserError, shown

# A meaning and the arguments that have it. A hyphen counts as an underscore.
_MEANINGS = {
    "classes": ("num_classes", "n_classes", "num_embeds_ada_norm"),
    "label_dropout": (
        "class_dropout_prob",
        "class_drop_prob",
        "class_dropout",
        "label_dropout",
        "label_drop_prob",
        "cond_drop_prob",
        "cfg_prob",
        "uncond_prob",
    ),
    "heads": ("num_attention_heads", "num_heads"),
    "path": ("path_type", "interpolant", "precond"),
    "prediction": ("prediction", "prediction_type", "parameterization", "predict_xstart"),
    "schedule": ("noise_schedule", "beta_schedule"),
    # Of latent diffusion, whose 'linear' is linear in the square root.
    "betas": ("linear_start", "linear_end", "trained_betas"),
    "timesteps": ("diffusion_steps", "num_train_timesteps"),
    "align_block": ("encoder_depth",),
}
_FLAGS = {"classes": "; give --num_classes", "heads": "; give --heads"}
_MEANING = {name: meaning for meaning, names in _MEANINGS.items() for name in names}

_PREDICTIONS = {
    "eps": "eps",
    "epsilon": "eps",
    "x0": "x0",
    "sample": "x0",
    "xstart": "x0",
    "x_start": "x0",
    "v": "v",
    "v_prediction": "v",
}
# SiT's names, whose time runs from noise to data and is not scaled.
_PATHS = {"Linear": "flow", "GVP": "gvp", "VP": "vp"}
_OF_PATHS = {"velocity": "velocity", "noise": "eps"}
# What SiT's network is given and returns, as keys of config.diffusion.
_OF_SIT = {"time_scale": 1.0, "time_from_noise": True}
# REPA's names of two of these paths, whose time runs from data to noise.
_REPA_PATHS = {"linear": "flow", "cosine": "gvp"}
# As in guided diffusion, whose cosine schedule is named 'cosine' or 'squaredcos_cap_v2'.
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "squaredcos_cap_v2": "cosine"}
_MAX_TIMESTEPS = 1_000_000


class Stated(NamedTuple):
    """A value that a file states, and the argument that states it."""

    argument: str
    value: Any

    def __str__(self) -> str:
        return f"{self.argument} {shown(self.value)}"


class Arguments:
    """The arguments in the config and the remains of a file, at any depth, by their meaning."""

    def __init__(self, path: Path, *sources: Mapping[Any, Any]) -> None:
        self.path = path
        self._stated: dict[str, dict[str, Stated]] = {}
        for source in sources:
            for name, value in _leaves(source):
                meaning = _MEANING.get(name.replace("-", "_").lower())
                if isinstance(value, np.generic):
                    value = value.item()
                if meaning and value is not None and not isinstance(value, Mapping):
                    different = self._stated.setdefault(meaning, {})
                    different.setdefault(shown(value), Stated(name, value))

    def values(self, meaning: str) -> list[Any]:
        """The different values of that meaning."""
        return [each.value for each in self._stated.get(meaning, {}).values()]

    def get(self, meaning: str) -> Stated | None:
        """The one value of that meaning. Raises UserError if the file states several."""
        found = list(self._stated.get(meaning, {}).values())
        if len(found) > 1:
            raise UserError(
                f"{self.path} contradicts itself: its arguments say {' and '.join(map(str, found))}"
                f"{_FLAGS.get(meaning, '')}."
            )
        return found[0] if found else None

    def whole(self, meaning: str) -> Stated | None:
        """As `get`, a whole number of at least 1. Raises UserError for any other value."""
        found = self.get(meaning)
        if found is None:
            return None
        value = found.value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{self.path}: its arguments say {found}: expected a whole number.")
        return found

    def fraction(self, meaning: str) -> Stated | None:
        """As `get`, a number from 0 to 1. Raises UserError for any other value."""
        found = self.get(meaning)
        if found is None:
            return None
        value = found.value
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 <= value <= 1):
            raise UserError(f"{self.path}: its arguments say {found}: expected 0 to 1.")
        return found._replace(value=float(value))


def _leaves(tree: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Every named value in nested mappings. Lists, such as an optimizer's groups, are not read."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and "_val" in value:
            value = value["_val"]  # of OmegaConf's nodes
        if isinstance(name, str):
            yield name, value
        if isinstance(value, Mapping):
            yield from _leaves(value)


class Labels(NamedTuple):
    """The classes of a label table, the dropout of labels in training, and how that is known.

    With `dropout` above 0 the last row is the null label. Not `stated`: the file does not say so,
    and it is taken for it as in the release.
    """

    classes: int
    dropout: float
    stated: bool


def labels_of(arguments: Arguments, rows: int, given: int, default_dropout: float) -> Labels:
    """The labels of a table of `rows` rows; `given` is the user's number of classes, or 0.

    Raises UserError if rows, arguments and `given` contradict one another.
    """
    there = arguments.values("classes")
    if given and given not in there and any(n in (rows, rows - 1) for n in there):
        raise UserError(
            f"{arguments.path} has {there[0]} classes by its own arguments, but --num_classes is"
            f" {given}."
        )
    stated = None if given else arguments.whole("classes")
    dropout = arguments.fraction("label_dropout")
    classes = given or (stated.value if stated else 0)
    said = f"--num_classes is {given}" if given else f"its arguments say {stated}"
    if classes and rows - classes not in (0, 1):
        raise UserError(
            f"{arguments.path}: its label table has {rows} rows, but {said}: expected {rows}, or"
            f" {rows - 1} and a null label{'' if given else '; give --num_classes'}."
        )
    if classes and dropout and (dropout.value > 0) != (rows > classes):
        raise UserError(
            f"{arguments.path}: its label table has {rows} rows, but {said} and its arguments say"
            f" {dropout}: a null label is one row more, and is there only with label dropout."
        )
    if classes:
        null = rows > classes
    elif dropout:
        null = dropout.value > 0
    else:
        null = rows > 1
    rate = dropout.value if dropout and 0 < dropout.value < 1 else default_dropout
    return Labels(rows - int(null), rate if null else 0.0, bool(classes or dropout) or rows == 1)


def sit_arguments(c: Config) -> dict[str, str]:
    """SiT's arguments of a recipe's process. Raises UserError if SiT has no such process."""
    d = c.diffusion
    paths, predictions = ({v: k for k, v in names.items()} for names in (_PATHS, _OF_PATHS))
    legal: dict[str, tuple[Any, ...]] = {
        "process": (*paths,),
        "prediction": (*predictions,),
        **{key: (value,) for key, value in _OF_SIT.items()},
    }
    for key, values in legal.items():
        if getattr(d, key) not in values:
            raise UserError(
                f"SiT has no such network: config.diffusion.{key} is {getattr(d, key)!r}, and its"
                f" code requires {' or '.join(map(repr, values))}. Convert to ditjax's own format."
            )
    return {"path_type": paths[d.process], "prediction": predictions[d.prediction]}


def stated_process(arguments: Arguments) -> dict[str, Any]:
    """The keys of config.diffusion that the arguments state.

    Raises UserError for a process that ditjax does not have, or that is only half stated.
    """
    path, prediction = arguments.get("path"), arguments.get("prediction")
    keys: dict[str, Any] = {}
    if path and prediction and path.value in (*_PATHS,) and prediction.value in (*_OF_PATHS,):
        return {
            "process": _PATHS[path.value],
            "prediction": _OF_PATHS[prediction.value],
            **_OF_SIT,
        }
    if path and prediction and path.value in (*_REPA_PATHS,) and prediction.value == "v":
        return {
            "process": _REPA_PATHS[path.value],
            "prediction": "velocity",
            "time_scale": 1.0,
        }
    if prediction:
        if prediction.argument.lower() == "predict_xstart":
            keys["prediction"] = "x0" if prediction.value else "eps"
        else:
            keys["prediction"] = _PREDICTIONS.get(str(prediction.value).lower())
    if path or (prediction and not keys["prediction"]):
        said = ", ".join(str(each) for each in (path, prediction) if each)
        raise UserError(
            f"{arguments.path} is not a network of DDPM's diffusion: its arguments say {said}. Of"
            f" other processes, SiT's are read: path_type {', '.join(_PATHS)} with prediction"
            f" {' or '.join(_OF_PATHS)}; and REPA's: {', '.join(_REPA_PATHS)} with v. As DDPM it"
            " would draw noise."
        )
    if betas := arguments.get("betas"):
        raise UserError(
            f"{arguments.path}: its arguments say {betas}: only the linear and the cosine schedule"
            " of the paper are supported."
        )
    if schedule := arguments.get("schedule"):
        keys["schedule"] = _SCHEDULES.get(str(schedule.value).lower())
        if not keys["schedule"]:
            raise UserError(
                f"{arguments.path}: its arguments say {schedule}: only"
                f" {' or '.join(map(repr, _SCHEDULES))} is supported."
            )
    if timesteps := arguments.whole("timesteps"):
        if not 2 <= timesteps.value <= _MAX_TIMESTEPS:
            raise UserError(
                f"{arguments.path}: its arguments say {timesteps}: expected 2 to {_MAX_TIMESTEPS}."
            )
        keys["timesteps"] = timesteps.value
    return keys
