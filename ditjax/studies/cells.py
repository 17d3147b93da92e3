"""The cells of a study, from the grid, lists, zips, seeds and budget of a recipe."""

import copy
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from ditjax.config import Config, Override, Sweep, as_tree, network_module, of_network, read
from ditjax.errors import UserError, nearest
from ditjax.models.network import training_gflops
from ditjax.runs import contents, rundir
from ditjax.runs.results import PublishedFigures
from ditjax.studies.published import published_of
from ditjax.tasks import cost_of, make_task

SCHEMA = 1


class Cell(NamedTuple):
    """One run of a study; its name is its directory below WORKDIR/runs."""

    number: int
    name: str
    recipe: dict[str, Any]
    config: Config
    overrides: tuple[Override, ...] = ()
    published: PublishedFigures | None = None  # figures of other authors for this run

    @property
    def model(self) -> str:
        """The model's name as in the paper, such as 'DiT-XL/2'."""
        return make_task(self.config).name

    @property
    def params(self) -> int:
        """Trainable parameters; 0 if there is no closed form."""
        cost = make_task(self.config).cost
        return cost.parameters if cost else 0

    @property
    def gflops(self) -> float:
        """The paper's Gflops: multiply-accumulates of one forward pass / 10⁹; 0 if unknown."""
        cost = make_task(self.config).cost
        return cost.gflops if cost else 0.0

    @property
    def training_gflops(self) -> float:
        """Passes · forward Gflops · batch · steps, 3 for most losses: the unit of schedules."""
        c, cost = self.config.train, make_task(self.config).cost
        return training_gflops(cost.gflops, c.batch_size * c.steps, cost.passes) if cost else 0.0


def cells(recipe: Mapping[str, Any]) -> list[Cell]:
    """Return the checked runs of a recipe, by grid, lists, zips and seeds, the last fastest.

    Raises UserError for a recipe of a single run, an illegal cell, or two equal cells.
    """
    whole = read(recipe)
    recipe = as_tree(whole)
    study = whole.sweep
    choices = _choices(study)
    if not choices:
        raise UserError(
            "config.sweep is empty: without a grid, lists, zips or seeds this recipe is one run;"
            " use ditjax.train."
        )
    made: list[Cell] = []
    labels = _key_labels(study)
    for number, parts in enumerate(itertools.product(*choices)):
        overrides = tuple(itertools.chain(*parts))
        cell = copy.deepcopy(dict(recipe))
        cell["sweep"] = {}
        try:
            # The network comes first: it decides which keys exist.
            for key, value in sorted(overrides, key=lambda each: each[0] != "model.kind"):
                _set(cell, key, value)
            if study.budget:
                cell["train"]["steps"] = steps_within(study.budget, _read_for_cost(cell))
            config = read(cell)
            cell = as_tree(config)
        except UserError as error:
            raise UserError(f"cell {number} ({_override_text(overrides)}): {error}") from None
        name = _name(overrides, labels, study.budget, config)
        made.append(Cell(number, name, cell, config, overrides, published_of(whole, config)))
    return _with_unique_names(made)


def _choices(study: Sweep) -> list[list[tuple[Override, ...]]]:
    """Return, for each axis that varies independently, its alternative sets of overrides."""
    choices: list[list[tuple[Override, ...]]] = []
    choices += [[((key, value),) for value in values] for key, values in study.grid]
    if study.lists:
        choices.append(list(study.lists))
    for together in study.zips:
        keys = [key for key, _ in together]
        rows = zip(*(values for _, values in together), strict=True)
        choices.append([tuple(zip(keys, row, strict=True)) for row in rows])
    if study.seeds:
        choices.append([(("seed", seed),) for seed in study.seeds])
    return choices


def _set(recipe: dict[str, Any], key: str, value: Any) -> None:
    if key == "model.kind":
        recipe["model"] = of_network(recipe, value)
        return
    *groups, leaf = key.split(".")
    node = recipe
    for group in groups:
        node = node[group]
    node[leaf] = value


def _read_for_cost(cell: dict[str, Any]) -> Config:
    """Read a cell with the largest number of steps.

    A budget replaces the recipe's steps, which may be fewer than its warm-up.
    """
    return read({**cell, "train": {**cell["train"], "steps": 2**31 - 1}})


def steps_within(budget: tuple[str, float], c: Config) -> int:
    """Return the number of training steps in a budget, rounded to the nearest integer.

    'images' are steps · batch; 'gflops' are training Gflops (`Cell.training_gflops`).
    Raises UserError if the budget is less than one step.
    """
    unit, number = budget
    cost = Fraction(1)
    if unit != "steps":
        cost *= c.train.batch_size
    if unit == "gflops":
        network = cost_of(c)
        cost *= Fraction(network.passes) * Fraction(network.macs, 10**9)
    steps = round(Fraction(number) / cost)
    if steps < 1:
        raise UserError(
            f"config.sweep.budget is {budget!r}, and one step takes {float(cost):.4g} {unit}: raise"
            " it, or leave this cell out."
        )
    return steps


def _override_text(overrides: Iterable[Override]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in overrides) or "the recipe as it is"


def _key_labels(study: Sweep) -> dict[str, str]:
    """Return the label of each varied key in names: its last part, or the key if two share it.

    Keys of a grid always use the last part: their order distinguishes them.
    """
    in_grid = {key for key, _ in study.grid}
    varied = {key for choice in _choices(study) for part in choice for key, _ in part}
    leaves = Counter(key.rpartition(".")[2] for key in varied)
    last = {key: key.rpartition(".")[2] for key in varied}
    return {k: leaf if k in in_grid or leaves[leaf] == 1 else k for k, leaf in last.items()}


def _name(
    overrides: Iterable[Override], labels: Mapping[str, str], budget: tuple[Any, ...], c: Config
) -> str:
    """Return a legal name: DiT-4x96x3-p1-seed0, other overrides as key_value, and the budget."""
    name = f"{make_task(c).name.replace('/', '-p')}-seed{c.seed}"
    for key, value in overrides:
        if key not in keys_in_every_name(c):
            name += f"-{labels[key]}_{value}"
    if budget:
        name += f"-{budget[0]}_{_short(budget[1])}"
    return rundir.legal_name(name)


def keys_in_every_name(c: Config) -> tuple[str, ...]:
    """Return the keys in every cell's name: those of its network's name, and the seed."""
    varied = network_module(c.model.kind).NETWORK.varied
    return (*(f"model.{key}" for key in varied), "seed")


def _short(number: float) -> str:
    """Format a number exactly but short: 1e6 -> '1e6', 250 -> '250', 0.1234567 in full."""
    text = f"{number:g}" if float(f"{number:g}") == number else repr(number)
    return re.sub(r"e[+]?(-?)0*", r"e\1", text)


def _with_unique_names(made: list[Cell]) -> list[Cell]:
    """Return the cells with unique names. Raises UserError for two cells with equal recipes."""
    first: dict[Config, Cell] = {}
    for cell in made:
        same = first.setdefault(cell.config, cell)
        if same is not cell:
            raise UserError(
                f"cells {same.number} ({_override_text(same.overrides)}) and {cell.number}"
                f" ({_override_text(cell.overrides)}) are the same run: leave one out."
            )
    names = Counter(cell.name for cell in made)
    return [
        cell
        if names[cell.name] == 1
        else cell._replace(name=rundir.legal_name(f"{cell.name[:115]}-{_digest(cell.overrides)}"))
        for cell in made
    ]


def _digest(overrides: Iterable[Override]) -> str:
    text = json.dumps(list(overrides), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def select_cells(
    study: Sequence[Cell], models: str = "", numbers: str = "", shard: str = ""
) -> list[Cell]:
    """Select cells by models ('S/8,B/4'), by numbers ('0,3-5'), or one share of them ('0/4').

    An empty filter selects all cells. The shard is a share of what the other two select. Raises
    UserError.
    """
    left = list(study)
    if models:
        wanted = {_model(name, study) for name in models.split(",")}
        left = [cell for cell in left if cell.model in wanted]
    if numbers:
        wanted_numbers = _numbers(numbers, len(study))
        left = [cell for cell in left if cell.number in wanted_numbers]
    if models and numbers and not left:
        raise UserError(
            f"--models={models} --cells={numbers}: no cell matches both; leave one out."
        )
    return _shard(left, shard) if shard else left


def _model(name: str, study: Sequence[Cell]) -> str:
    """Return the study's model that 'S/8' or 'DiT-S/8' names: 'DiT-S/8'."""
    whole = {each.partition("-")[2]: each for each in dict.fromkeys(c.model for c in study)}
    short, models = name.strip(), list(whole)
    if short in whole.values():
        return short
    if short in whole:
        return whole[short]
    more = ", ..." if len(models) > 24 else ""
    raise UserError(
        f"--models={name[:100]}: no cell of this study has that model.{nearest(short, models)} Its"
        f" models: {', '.join(models[:24])}{more}."
    )


def _numbers(text: str, count: int) -> set[int]:
    """Parse cell numbers: '0,3-5' -> {0, 3, 4, 5}."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*", part)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise UserError(f"--cells={text[:100]}: expected numbers and ranges such as 0,3-5.")
        if high >= count:
            raise UserError(f"--cells={text[:100]}: the study has cells 0 to {count - 1}.")
        found.update(range(low, high + 1))
    return found


def _shard(left: list[Cell], text: str) -> list[Cell]:
    """Return share K of N: every N-th cell by falling work, so that shares are about equal."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    part, parts = (int(match[1]), int(match[2])) if match else (1, 0)
    if part >= parts:
        raise UserError(
            f"--shard={text[:100]}: expected K/N, share K of N, counted from 0: 0/4 to 3/4 for four"
            " machines."
        )
    return sorted(by_work(left)[part::parts], key=lambda cell: cell.number)


def by_work(study: Iterable[Cell]) -> list[Cell]:
    """Sort by falling work, so that the last cell to finish is small."""
    return sorted(study, key=lambda cell: (-cell.training_gflops, cell.number))


def study_record(recipe: Mapping[str, Any], study: Sequence[Cell], command: str) -> dict[str, Any]:
    """Return the content of sweep.json: every cell of the study, run or not."""
    return {
        "schema": SCHEMA,
        "title": recipe["sweep"].get("title", ""),
        "command": command,
        "cells": [
            {
                "number": cell.number,
                "name": cell.name,
                "model": cell.model,
                "overrides": dict(cell.overrides),
                "params": cell.params,
                "gflops": cell.gflops,
                "training_gflops": cell.training_gflops,
                "published": cell.published,
            }
            for cell in study
        ],
    }


def check_result(cell: Cell, folder: Path, found: Mapping[str, Any]) -> None:
    """Raise UserError for a result of another recipe."""
    # A single run may be extended by more steps; the steps of a cell are fixed.
    same = contents.same_content(folder, {}, cell.config.data.data_dir)
    rundir.check_same(folder, found["config"], cell.recipe, also=("train.steps",), same=same)


def check_same_study(
    workdir: Path, recorded: Mapping[str, Any], recipe: Mapping[str, Any], study: Sequence[Cell]
) -> None:
    """Raise UserError if a directory's study changes in keys that are not in its cells' names."""
    named = {key for cell in study for key, _ in cell.overrides}
    named |= {key for cell in study for key in keys_in_every_name(cell.config)}
    same = contents.same_content(workdir, {}, recipe.get("data", {}).get("data_dir", ""))
    for key, before, now in rundir.differences(recorded, recipe):
        if key not in named and not same(key, before, now):
            raise UserError(
                f"{workdir} holds a study with {key}={before!r}, this command says {now!r}: give"
                " another --workdir, or the recipe it was started with."
            )
