"""Training from weights: the keys of `config.adapt`, the graft of the base, and what is trained."""

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from ditjax.config import (
    PATH,
    Config,
    Rule,
    Schemas,
    Section,
    above,
    at_least,
    at_most,
    changed,
    key,
    network_module,
    replaced,
)
from ditjax.data import source
from ditjax.errors import UserError, first_few, one_line, shown
from ditjax.files.assets import flatten, unflatten
from ditjax.files.store import place
from ditjax.models.grafting import End, Grafted, Join, graft, of_adopted
from ditjax.models.network import Inputs, Network
from ditjax.parallel.mesh import make_mesh
from ditjax.parallel.processes import is_primary
from ditjax.runs import opening, rundir
from ditjax.tasks import make_task
from ditjax.training import keys
from ditjax.training.step import WEIGHTS
from ditjax.training.task import IDENTITY, Start, Transform
from ditjax.training.transforms import Choice, Factors, beside, low_rank, partly
from ditjax.weights import networks, reading
from ditjax.weights.networks import LoadedNetwork


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


PATTERN = Rule(_is_pattern, "a regular expression")


def _integers(name: str, expected: str, legal: Callable[[tuple[int, ...]], bool]) -> Any:
    """A reader of integers, or () for none."""

    def numbers(value: Any, schemas: Schemas) -> tuple[int, ...]:
        good = isinstance(value, tuple | list) and all(type(each) is int for each in value)
        if good and (not value or legal(tuple(value))):
            return tuple(value)
        raise UserError(f"config.adapt.{name} is {shown(value)}: expected {expected}, or ().")

    return numbers


_RANGE = _integers("blocks", "(low, high), low < high", lambda v: len(v) == 2 and 0 <= v[0] < v[1])
_CLASSES = _integers(
    "classes", "a class of the base, or -1, for each class", lambda v: min(v) >= -1
)
_SOME = ("kind", ("partial", "lora"))
_LORA = ("kind", ("lora",))


@dataclass(frozen=True)
class Adapt(Section):
    """Training from weights (`tasks/adapting.py`)."""

    # a run's directory, or weights that `sample` reads; '' = trained from scratch
    base: str = key("", PATH, free=True)
    which: str = key("ema")  # averaged or raw weights of the base, as --which of `sample`
    sha256: str = key("")  # of the base's parameters; filled in when a run begins
    classes: tuple[int, ...] = key((), read=_CLASSES)  # () = as the base's
    skip: str = key("", PATTERN)  # parameters that are not taken from the base
    kind: Literal["full", "partial", "lora", "control"] = key("full")  # what is trained
    train: str = key("", PATTERN, used_if=_SOME)  # parameters that are trained
    blocks: tuple[int, ...] = key((), read=_RANGE, used_if=_SOME)  # of those, which blocks
    # LoRA's, and the next four: the linear layers that have factors
    targets: str = key(r"blocks/.*", PATTERN, used_if=_LORA)
    rank: int = key(8, at_least(1), at_most(2**16), used_if=_LORA)
    alpha: float = key(16.0, above(0), used_if=_LORA)
    scaling: Literal["alpha_over_r", "rslora"] = key("alpha_over_r", used_if=_LORA)
    init: Literal["kaiming", "gaussian"] = key("kaiming", used_if=_LORA)

    @property
    def scale(self) -> float:
        """s of W x + s B A x: α/r, or α/√r (Kalajdzievski 2023)."""
        return self.alpha / (self.rank if self.scaling == "alpha_over_r" else self.rank**0.5)

    def unused(self, name: str, c: Config) -> str:
        return "base" if not self.base and name != "base" else super().unused(name, c)

    def check(self, c: Config) -> None:
        for name, default in vars(Adapt()).items():
            value = getattr(self, name)
            if value != default and (other := self.unused(name, c)):
                raise UserError(
                    f"config.adapt.{name} is {value!r} and has no effect: config.adapt.{other} is"
                    f" {getattr(self, other)!r}. Leave it out, or change the other."
                )
        if self.classes and len(self.classes) != c.data.num_classes:
            raise UserError(
                f"config.adapt.classes has {len(self.classes)} classes and config.data.num_classes"
                f" is {c.data.num_classes}: expected the base's class, or -1, for each."
            )
        if self.kind == "partial" and not self.train:
            raise UserError(
                "config.adapt.kind is 'partial' and config.adapt.train is '': expected a regular"
                " expression of the parameters that are trained, such as 'bias|y_embedder'."
            )
        mup = getattr(c.model, "parametrization", "standard") == "mup"
        if self.kind in ("lora", "control") and mup:
            what = "factors" if self.kind == "lora" else "a control branch"
            raise UserError(
                f"config.adapt.kind is {self.kind!r} and config.model.parametrization 'mup', whose"
                f" rates are not known for {what}: fine-tune with kind 'full' or 'partial'."
            )


def adapter_of(
    c: Config, network: Network, branch_shapes: Callable[[], Any] | None = None
) -> Transform:
    """What a recipe trains of its network; `branch_shapes` are those of its control branch."""
    a = c.adapt
    if not a.base or a.kind == "full":
        return IDENTITY
    if a.kind == "control":
        assert branch_shapes is not None
        return beside(network.stack, branch_shapes)
    also = Choice(a.train, network.stack, "train", a.blocks) if a.train else None
    if a.kind == "partial":
        assert also is not None
        return partly(also)
    layers = Choice(rf"^(?:{a.targets})/kernel$", network.stack, "targets")
    return low_rank(Factors(layers, a.rank, a.scale, a.init == "gaussian"), also)


# ---- the base


def read_base(c: Config) -> LoadedNetwork:
    """Read what config.adapt.base holds, in float32: a run's network, merged, or a file's.

    Raises UserError unless it is the same kind of network as the recipe's.
    """
    path, which = c.adapt.base, c.adapt.which
    if rundir.is_run(path):
        if which not in WEIGHTS:
            raise UserError(
                f"config.adapt.which is {which!r} and {path} is a run: expected 'ema' or 'model'."
            )
        theirs = opening.recipe_of(path)
        if hasattr(theirs, "sample"):
            sample = dataclasses.replace(theirs.sample, weights=which)
            theirs = replaced(theirs, sample=sample)
        mesh = make_mesh(-1, 1)
        params, step = opening.network_weights(theirs, make_task(theirs), path, mesh)
        names = opening.class_names_of(path, theirs)
        base = networks.from_run(theirs, params, (place(path),), names)
        base = base._replace(notes=(opening.account(path, step, theirs),))
    else:
        heads = getattr(c.model, "size", "").rpartition("x")[2]
        given = int(heads) if heads.isdecimal() else 0
        base = reading.load_network(path, which=which, wanted="dit", assumed_heads=given)
    adopts = network_module(c.model.kind).NETWORK.adopts
    same = (base.config.task, base.config.model.kind) == (c.task, c.model.kind)
    if not same and base.config.model.kind not in adopts:
        raise UserError(
            f"config.adapt.base={path} holds a {base.name} of task {base.config.task!r}: expected a"
            f" network of task {c.task!r} and config.model.kind {c.model.kind!r}."
        )
    return base._replace(params=networks.as_float32(base))


def with_base(
    c: Config,
    workdir: str | os.PathLike[str],
    network: Network,
    inputs_of: Callable[[Config], Inputs],
) -> Config:
    """Fill in what follows from the base: its digest, and the keys that weights do not show.

    A run that has begun keeps what it recorded. Raises UserError for another base than that, for
    one that does not fit, and for parts of the network that do not exist.
    """
    if not c.adapt.base:
        return c
    task = make_task(c)
    before = opening.recipe_of(workdir) if rundir.has_begun(place(workdir)) else None
    if before is not None and before.task == c.task and before.adapt.base:
        if c.adapt.base != before.adapt.base:
            _check_digest(c, opening.digest(read_base(c).params), before.adapt.sha256)
        found, digest = before.model, c.adapt.sha256 or before.adapt.sha256
        fresh = []
    else:
        base = read_base(c)
        found, digest = base.config.model, opening.digest(base.params)
        _check_digest(c, digest, c.adapt.sha256)
        fresh = _on_network(c, base, network, inputs_of, task.init).fresh
        _report_classes(c, base)
    values = {name: getattr(found, name) for name in network.inherited}
    # Raises for patterns and blocks that the network does not have.
    trained = jax.eval_shape(
        lambda key: task.transform.init(task.init(key), key), jax.random.key(0)
    )
    _check_fresh(c, set(fresh) - flatten(trained.get("params", {})).keys())
    for name, value in values.items():
        if is_primary() and (ours := getattr(c.model, name)) != value:
            print(
                f"config.model.{name} is {value!r}, as the base was trained, not {ours!r}",
                file=sys.stderr,
            )
    return changed(c, {"model": values, "adapt": {"sha256": digest}})


def _report_classes(c: Config, base: LoadedNetwork) -> None:
    """Print which classes begin as other classes of the base, where the names of both are known."""
    names, of = base.class_names, c.adapt.classes or range(c.data.num_classes)
    if base.config.model.kind != c.model.kind:
        return  # one that takes no classes
    if names is None or (not c.adapt.classes and len(names) != c.data.num_classes):
        return
    d = c.data
    ours = source.dataset_info(d.name, d.split, d.data_dir or None, d.max_damaged).class_names
    other = [
        f"{k} ({name}) as {names[j][0]}"
        for k, (name, j) in enumerate(zip(ours, of, strict=False))
        if 0 <= j < len(names) and names[j] and name not in names[j]
    ]
    if other and is_primary():
        line = f"note: of {len(ours)} classes {len(other)} begin as others of the base: class"
        line += f" {first_few(other)}; config.adapt.classes chooses these"
        print(one_line(line), file=sys.stderr)


def _check_fresh(c: Config, frozen: set[str]) -> None:
    """Raise UserError for fresh parameters that nothing trains."""
    if frozen:
        raise UserError(
            f"config.adapt.skip is {c.adapt.skip!r} and kind {c.adapt.kind!r}: {first_few(frozen)}"
            " would be neither the base's nor trained; name them in config.adapt.train."
        )


def _check_digest(c: Config, found: str, expected: str) -> None:
    if expected and found != expected:
        raise UserError(
            f"config.adapt.base={c.adapt.base} has parameters of SHA-256 {found}, and the run began"
            f" with a base of {expected}: restore that base, or give another --workdir."
        )


def start_of(
    c: Config,
    network: Network,
    inputs_of: Callable[[Config], Inputs],
    init: Callable[[jax.Array], Any],
    mesh: Mesh,
) -> Start:
    """Load the base and put it on the recipe's network (`models/grafting.py`).

    Raises UserError for a base that does not fit, or other than the one that the run began with.
    """
    base = read_base(c)
    digest = opening.digest(base.params)
    _check_digest(c, digest, c.adapt.sha256)
    grafted = _on_network(c, base, network, inputs_of, init)
    params = opening.put_on_mesh({"params": unflatten(grafted.leaves)}, mesh, network.rules)
    record = {
        "base": c.adapt.base,
        "which": c.adapt.which,
        "network": base.name,
        "layout": base.layout,
        "sha256": digest,
        "differs": _differences(base.config, c),
        **{name: value for name, value in grafted._asdict().items() if name != "leaves"},
    }
    return Start(params, record, _lines(c, base, grafted, record))


def _on_network(
    c: Config,
    base: LoadedNetwork,
    network: Network,
    inputs_of: Callable[[Config], Inputs],
    init: Callable[[jax.Array], Any],
) -> Grafted:
    """Graft the base. Raises UserError if it does not fit."""
    shapes = networks.initial_shapes(init)

    @functools.cache
    def initial() -> dict[str, np.ndarray]:
        return flatten(jax.device_get(jax.jit(init)(keys.stream(c.seed, keys.INIT)))["params"])

    ends = (End(base.config.model, inputs_of(base.config)), End(c.model, inputs_of(c)))
    leaves, fresh, adopted = base.leaves, lambda path: initial()[path], None
    try:
        if base.config.model.kind != c.model.kind:
            adopted = network.adopts[base.config.model.kind](leaves, ends[0].keys, shapes, fresh)
            leaves = adopted.leaves
        join = Join(*ends, c.adapt.classes)
        found = graft(leaves, shapes, fresh, network.grafts, join, c.adapt.skip)
        return found if adopted is None else of_adopted(found, adopted)
    except UserError as error:
        raise UserError(
            f"config.adapt.base={c.adapt.base}, a {base.name}, does not fit this recipe: {error}."
            " Change the recipe, or name leaves that are not taken in config.adapt.skip."
        ) from None


# What differs between two recipes of one network: the keys that mean something to its weights.
_COMPARED = {
    "model": None,
    "diffusion": None,
    "data": ("image_size", "channels", "num_classes"),
    "autoencoder": ("kind", "scale", "shift", "latent_mean", "latent_std"),
}
_FREE_TO_DIFFER = ("remat", "attention", "unroll", "dtype", "matmul")


def _differences(base: Config, c: Config) -> dict[str, list[Any]]:
    """{'data.image_size': [16, 32]}: the keys in which the base's recipe differs from ours."""
    found: dict[str, list[Any]] = {}
    for section, names in _COMPARED.items():
        theirs, ours = getattr(base, section), getattr(c, section)
        for name in names or [each for each in vars(ours) if hasattr(theirs, each)]:
            pair = [getattr(theirs, name), getattr(ours, name)]
            if pair[0] != pair[1] and name not in _FREE_TO_DIFFER:
                found[f"{section}.{name}"] = pair
    return found


def _lines(
    c: Config, base: LoadedNetwork, grafted: Grafted, record: dict[str, Any]
) -> tuple[str, ...]:
    """The report of a graft."""
    lines = [
        *base.notes,
        f"base: {c.adapt.base}, a {base.name} ({base.layout}), SHA-256 {record['sha256']}",
    ]
    for name, (was, now) in record["differs"].items():
        lines.append(f"config.{name}: {was!r} in the base, {now!r} here")
    for word in ("copied", "adapted", "fresh", "unused"):
        paths = getattr(grafted, word)
        listed = "" if word == "adapted" or not paths else f": {', '.join(paths)}"
        lines.append(f"{word} {len(paths)}{listed}")
    lines += [f"adapted {path}: {done}" for path, done in grafted.adapted.items()]
    kept = c.train.ema_decay**c.train.steps
    if kept > 0.05:
        lines.append(
            f"note: config.train.ema_decay={c.train.ema_decay} over {c.train.steps} steps leaves"
            f" {kept:.0%} of the base in the average; {max(0.0, 1 - 10 / c.train.steps):.4g} would"
            " leave almost none"
        )
    return tuple(map(one_line, lines))
