"""A control branch beside a frozen network: its keys, its images, and how much it counts.

ControlNet (Zhang et al. 2023, arXiv:2302.05543): copies of the base's blocks read a control image,
such as edges, and add what they find to the tokens of the base. The network's file has the branch
(`Network.control`); `config.adapt.kind` 'control' trains it.
"""

import dataclasses
import functools
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditjax.config import (
    Config,
    Schemas,
    Section,
    between,
    key,
    lookup,
    non_negative,
    registered,
    replaced,
)
from ditjax.data.names import is_latents
from ditjax.errors import UserError, one_line, reason, shown
from ditjax.models.embed import Placement
from ditjax.models.network import Branch, Conditions, ControlSeam, Inputs, Network, NetworkCost
from ditjax.parallel.processes import is_primary
from ditjax.runs import opening, rundir
from ditjax.tasks import make_task
from ditjax.tasks.objective import process_of, sampler_of, times_of
from ditjax.training.task import Beside, FromRecords, Frozen

CONTROL_REGISTRY = "ditjax.data.maps.CONTROL_MAPS"
_HUGE = float(np.finfo(np.float32).max)


def _read_scales(value: Any, schemas: Schemas) -> tuple[float, ...]:
    """One number for all controls, or one for each."""
    values = value if isinstance(value, tuple | list) else (value,)
    plain = all(isinstance(each, int | float) and not isinstance(each, bool) for each in values)
    if not values or not plain or not all(abs(each) <= _HUGE for each in values):
        raise UserError(
            f"config.control.scale is {shown(value)}: expected a finite number, or one for each"
            " control, such as (1.0, 0.5)."
        )
    return tuple(float(each) for each in values)


def _read_runs(value: Any, schemas: Schemas) -> tuple[str, ...]:
    if isinstance(value, tuple | list) and all(isinstance(each, str) and each for each in value):
        return tuple(value)
    raise UserError(
        f"config.control.others is {shown(value)}: expected directories of runs, such as"
        " ('runs/edges',), or ()."
    )


@dataclass(frozen=True)
class Control(Section):
    """A control branch (`tasks/control.py`); off unless `config.adapt.kind` is 'control'."""

    blocks: int = non_negative(0)  # copied blocks of the base
    form: Literal["sd3", "pixart"] = key("sd3")
    # 'edges', 'ink', 'low' or the dotted name of your own function (data/maps.py)
    source: str = key("edges", registered(CONTROL_REGISTRY))
    drop: float = key(0.5, between(0, 1))  # share of labels dropped in training
    # While sampling, how much each control counts, and in which share of the steps.
    scale: tuple[float, ...] = key((1.0,), free=True, protocol=True, read=_read_scales)
    start: float = key(0.0, between(0, 1), free=True, protocol=True)
    end: float = key(1.0, between(0, 1), free=True, protocol=True)
    guess: bool = key(False, free=True, protocol=True)  # of the conditional half, more at depth
    # runs of further controls of the same base, which are added while sampling
    others: tuple[str, ...] = key((), free=True, protocol=True, read=_read_runs)

    def unused(self, name: str, c: Config) -> str:
        return "" if is_controlled(c) else "adapt.kind"

    def check(self, c: Config) -> None:
        for name, default in vars(Control()).items():
            if getattr(self, name) != default and not is_controlled(c):
                raise UserError(
                    f"config.control.{name} is {getattr(self, name)!r} and has no effect:"
                    f" config.adapt.kind is {c.adapt.kind!r}. Leave it out, or set that to"
                    " 'control'."
                )
        if self.start >= self.end:
            raise UserError(
                f"config.control.start is {self.start} and end {self.end}: expected shares of the"
                " steps, the start below the end."
            )
        if len(self.scale) not in (1, 1 + len(self.others)):
            raise UserError(
                f"config.control.scale has {len(self.scale)} numbers for {1 + len(self.others)}"
                " control(s): expected one for all, or one for each."
            )


def is_controlled(c: Config) -> bool:
    """Whether a recipe has a control branch."""
    return bool(c.adapt.kind == "control")


# ---- control images


@functools.cache
def _map_of(
    source: str, form: str, size: int, channels: int
) -> tuple[Callable[..., jax.Array], tuple[int, ...]]:
    """The map of one image and its shape (H, W, K). For 'pixart' a grey one has all channels."""
    function = lookup(source, CONTROL_REGISTRY)

    def of_image(image: jax.Array, key: jax.Array) -> jax.Array:
        found = jnp.asarray(function(image, key), jnp.float32)
        repeats = channels if form == "pixart" and found.shape[-1:] == (1,) else 1
        return jnp.repeat(found, repeats, axis=-1) if repeats > 1 else found

    image = jax.ShapeDtypeStruct((size, size, channels), jnp.float32)
    said = f"config.control.source is {source!r}"
    try:
        shape = jax.eval_shape(lambda x: of_image(x, jax.random.key(0)), image).shape
    except Exception as error:  # the user's own function may fail in any way
        raise UserError(
            f"{said}, which fails for an image of {size}x{size}x{channels}: {reason(error)}"
        ) from None
    if len(shape) != 3 or shape[:2] != (size, size) or not shape[2]:
        raise UserError(
            f"{said}, which returns {list(shape)} for an image of {size}x{size}x{channels}:"
            f" expected a map f32[{size},{size},K]."
        )
    return of_image, shape


def _own_map(c: Config) -> tuple[Callable[..., jax.Array], tuple[int, ...]]:
    return _map_of(c.control.source, c.control.form, c.data.image_size, c.data.channels)


def maps_of(recipes: Sequence[Config]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(images f32[B,H,W,C], keys key[B]) -> the control images of all recipes, f32[B,H,W,ΣK]."""
    functions = [_own_map(c)[0] for c in recipes]

    def maps(images: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.concatenate([jax.vmap(each)(images, keys) for each in functions], axis=-1)

    return maps


def controls_from_images(c: Config) -> FromRecords:
    """The control images of samples, of images of a data set."""
    maps = maps_of(all_controls(c))
    return FromRecords(lambda images, keys: Beside(maps(images, keys)), "control_images")


def map_channels(c: Config) -> tuple[int, ...]:
    """The channels K of each control of a recipe."""
    return tuple(_own_map(each)[1][2] for each in all_controls(c))


# ---- several controls


def all_controls(c: Config) -> tuple[Config, ...]:
    """The recipe and those of its further controls, which differ in `control` alone.

    Raises UserError for one that is not a control of the same base.
    """
    return (c, *(_other(c, path) for path in c.control.others))


def _other(c: Config, path: str) -> Config:
    said = f"config.control.others names {path!r}"
    theirs = _recipe_of(path)
    for what, one, other in _compared(theirs, c):
        if one != other:
            raise UserError(
                f"{said}, whose {what} is {one!r}, and ours {other!r}: expected a control of the"
                " same base."
            )
    return replaced(c, control=theirs.control)


def _recipe_of(path: str) -> Config:
    """The recipe of a run that trained a control, without further ones. Raises UserError."""
    said = f"config.control.others names {path!r}"
    if not rundir.is_run(path):
        raise UserError(f"{said}, which is not a run: expected the directory of one.")
    found = opening.recipe_of(path)
    if not hasattr(found, "control") or not is_controlled(found):
        raise UserError(f"{said}, which trains no control: expected a run of adapt.kind 'control'.")
    return replaced(found, control=dataclasses.replace(found.control, others=(), scale=(1.0,)))


def _compared(theirs: Config, c: Config) -> list[tuple[str, Any, Any]]:
    """What two controls of one base share: (name, theirs, ours)."""
    names = [
        *(("adapt", name) for name in ("sha256", "classes", "skip")),
        *(("data", name) for name in ("image_size", "channels", "num_classes")),
        *(
            ("model", each.name)
            for each in dataclasses.fields(c.model)
            if not each.metadata["free"] and each.name not in ("dtype", "matmul")
        ),
    ]

    def of(recipe: Config, section: str, name: str) -> Any:
        return getattr(getattr(recipe, section), name, None)

    return [(f"{s}.{name}", of(theirs, s, name), of(c, s, name)) for s, name in names]


def load_controls(c: Config, mesh: Mesh) -> Frozen:
    """Load the runs of config.control.others -> {"controls": [parameters on the mesh]}, or {}."""
    if not is_controlled(c) or not c.control.others:
        return {}
    all_controls(c)  # raises first
    found = []
    for path in c.control.others:
        theirs = _recipe_of(path)
        params, step = opening.load_weights(theirs, make_task(theirs), path, mesh)
        if is_primary():
            line = f"control: {opening.account(path, step, theirs)}"
            print(one_line(line), file=sys.stderr, flush=True)
        found.append(params["control"])
    return {"controls": found}


# ---- how much they count


class ControlWeights(NamedTuple):
    """Arguments of controls: a scale for each, f32[J], and the network's times low < t < high."""

    scale: jax.Array | np.ndarray
    low: jax.Array | np.float32
    high: jax.Array | np.float32


def active_steps(start: float, end: float, steps: int) -> np.ndarray:
    """Which steps are controlled -> bool[steps], as diffusers' `control_guidance_start` and `_end`.

    Step i of S is, if start <= i/S and (i + 1)/S <= end.
    """
    i = np.arange(steps)
    return ~((i / steps < start) | ((i + 1) / steps > end))


def control_weights(c: Config) -> ControlWeights:
    """The arguments of a recipe's controls. An evaluation is of the step that starts nearest."""
    o = c.control
    scale = np.resize(np.float32(o.scale), 1 + len(o.others))
    if sampler_of(c).adaptive:
        return ControlWeights(scale, np.float32(-np.inf), np.float32(np.inf))
    starts = process_of(c.diffusion).c_noise(times_of(c)[:-1]).astype(np.float64)
    on = np.flatnonzero(active_steps(o.start, o.end, len(starts)))
    if not len(on):
        return ControlWeights(scale, np.float32(np.inf), np.float32(-np.inf))
    outside = np.inf if starts[0] >= starts[-1] else -np.inf  # before the first step
    bounds = np.concatenate([[outside], (starts[1:] + starts[:-1]) / 2, [-outside]])
    low, high = sorted((bounds[on[0]], bounds[on[-1] + 1]))
    return ControlWeights(scale, np.float32(low), np.float32(high))


def control_protocol(c: Config) -> dict[str, Any]:
    """What controls add to a sampling protocol; {} without them."""
    if not is_controlled(c):
        return {}
    o, scale = c.control, np.resize(c.control.scale, 1 + len(c.control.others))
    fields = {"scale": scale.tolist(), "start": o.start, "end": o.end, "guess": o.guess}
    sources = [each.control.source for each in all_controls(c)]
    return {"control": {**fields, "sources": sources}}


# ---- in a task


def branch_of(c: Config) -> Branch:
    """The control branch of a recipe."""
    return Branch(c.control.blocks, c.control.form, _own_map(c)[1])


def branch_shapes(c: Config, network: Network, inputs: Inputs) -> Any:
    """The parameters of a recipe's branch as shapes, {'in', 'copies'}."""
    seam, branch = _seam(c, network), branch_of(c)
    module = seam.module(c.model, inputs, branch, Placement())

    def init(key: jax.Array) -> Any:
        x, label = jnp.zeros((1, *inputs.shape)), jnp.zeros((1,), jnp.int32)
        control = jnp.zeros((1, *branch.shape))
        return module.init(key, x, label, Conditions(label=label, channels=control))

    params = jax.eval_shape(lambda: init(jax.random.key(0)))["params"]
    return {name: params[name] for name in ("in", "copies")}


def with_branches(
    c: Config,
    network: Network,
    inputs: Inputs,
    module: Any,
    place: Placement,
    recipes: Sequence[Config],
) -> Callable[..., jax.Array]:
    """Build the function of a network and its branches, one of each recipe.

    apply({'params', 'control', 'controls': [..]}, x, t, conditions, weights, rows) -> prediction;
    `conditions.channels` are the control images beside each other. Without weights, as in training,
    each counts in full; rows f32[B] multiply the weights.
    """
    seam = _seam(c, network)
    branches = [seam.module(c.model, inputs, branch_of(each), place) for each in recipes]
    ends = np.cumsum([branch_of(each).shape[2] for each in recipes])[:-1]
    main = module.clone(hook=lambda tokens, residual: tokens + residual)
    depths = [
        jnp.logspace(-1, 0, each.control.blocks) if c.control.guess else None for each in recipes
    ]

    def apply(
        variables: Any,
        x: jax.Array,
        t: jax.Array,
        conditions: Conditions,
        weights: ControlWeights | None = None,
        rows: Any = 1.0,
    ) -> jax.Array:
        base, label = variables["params"], conditions.label
        controls = (variables["control"], *variables.get("controls", ()))
        images = jnp.split(jnp.asarray(conditions.channels), ends, axis=-1)
        found = []
        for j, (branch, control, image) in enumerate(zip(branches, controls, images, strict=True)):
            given = Conditions(label=label, channels=image)
            depth = None if weights is None else depths[j]
            residuals: Any = branch.apply(seam.variables(base, control), x, t, given, depth)
            if weights is not None:
                weight = weights.scale[j] * ((weights.low < t) & (t < weights.high)) * rows
                residuals = residuals * weight[None, :, None, None].astype(residuals.dtype)
            found.append(residuals)
        total = functools.reduce(operator.add, found)
        out: jax.Array = main.apply({"params": base}, x, t, Conditions(label=label), total)
        return out

    return apply


def conditional_rows(c: Config, rows: int) -> dict[str, Any]:
    """The argument `rows` of a doubled batch: in guess mode the unconditional half has no control.

    diffusers' `guess_mode`.
    """
    if not (is_controlled(c) and c.control.guess):
        return {}
    return {"rows": jnp.repeat(jnp.array([1.0, 0.0]), rows)}


def with_cost(c: Config, network: Network, inputs: Inputs, cost: NetworkCost) -> NetworkCost:
    """The cost of a network and its branches; the parameters are those of its own branch, too."""
    seam = _seam(c, network)
    found = [seam.cost(c.model, inputs, branch_of(each)) for each in all_controls(c)]
    return cost._replace(
        parameters=cost.parameters + found[0][0],
        macs=cost.macs + sum(macs for _, macs in found),
        description={**cost.description, "control_blocks": c.control.blocks},
    )


def _seam(c: Config, network: Network) -> ControlSeam:
    if network.control is None:
        raise UserError(
            f"config.adapt.kind is 'control', and network {c.model.kind!r} can have no control"
            " branch: expected 'dit'."
        )
    return network.control


def check_control(c: Config, network: Network, inputs: Inputs) -> None:
    """Raise UserError for a control that cannot be trained or sampled."""
    if not is_controlled(c):
        return
    said = "config.adapt.kind is 'control'"
    seam = _seam(c, network)
    if is_latents(c.data.name):
        raise UserError(
            f"{said}, whose images follow from pixels, and config.data.name {c.data.name!r} holds"
            " latents alone: name the images, which are encoded as they are read."
        )
    if c.latent and c.control.form == "pixart":
        raise UserError(
            "config.control.form is 'pixart', which embeds a control as the network's input, and"
            " that is a latent: set it to 'sd3'."
        )
    if c.model.label_dropout == 0 and c.control.drop:
        raise UserError(
            f"config.control.drop is {c.control.drop} and config.model.label_dropout 0, without"
            " null label: set control.drop to 0, or give a base that has one."
        )
    if c.evaluate.labels != "uniform":
        raise UserError(
            f"config.evaluate.labels is {c.evaluate.labels!r}, and {said}, whose samples have the"
            " labels of the records that control them: leave it out."
        )
    if sampler_of(c).adaptive and (c.control.start, c.control.end) != (0.0, 1.0):
        raise UserError(
            f"config.sample.sampler is {c.sample.sampler!r}, which chooses its own steps, and"
            f" config.control.start is {c.control.start}, end {c.control.end}: leave them out."
        )
    seam.check(c.model, inputs, branch_of(c))
