"""python -m ditjax.grid: score runs over a grid of guidance, sampler, steps and weights.

    python -m ditjax.grid --workdir=RUN --cfg_channels=three,all --cfg_scale=1,1.25,1.5,4
    python -m ditjax.grid --workdir=RUN,RUN --steps=16,32,64,128,250,1000 --out=DIR

The first command computes the DiT paper's guidance table, the second its figure 10. Sample i of
every cell has the seed config.evaluate.seed and the index i, and so the same x_T and label: cells
differ by their settings, not by luck. Each finished cell is one file; the same command again
resumes.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jax.sharding import Mesh

from ditjax import cli
from ditjax.config import Config, changed, migrated, read, void_by
from ditjax.errors import UserError
from ditjax.evaluate import FLAGS, save_picture
from ditjax.evaluation.evaluator import Evaluator
from ditjax.files import atomic, faults
from ditjax.files.paths import split_paths
from ditjax.files.store import place
from ditjax.parallel import processes
from ditjax.parallel.mesh import mesh_of
from ditjax.parallel.processes import is_primary
from ditjax.reporting.grid import Outcome, front, grid_csv, grid_text, setting_text, varying
from ditjax.reporting.pareto import pareto_png
from ditjax.reporting.scored import Scored, scored_rows, scored_text
from ditjax.runs import results, rundir
from ditjax.runs.checkpoint import Step
from ditjax.sampling.draw import load_model, sampling_protocol
from ditjax.sampling.program import sampling_of
from ditjax.studies.published import published_of
from ditjax.studies.words import number, plural
from ditjax.tasks import make_task, sampling_gflops
from ditjax.tasks.language import DRAWN_MODES

CELLS = "cells"
LONGEST_NAME = 200


class GridAxis(NamedTuple):
    """A key of config.sample and of the protocol: the parser of a flag's value and its help."""

    parse: Callable[[str], Any]
    text: str


def _parse_interval(word: str) -> tuple[float, ...]:
    low, _, high = word.partition(":")
    return float(low), float(high)


# Outermost first: weights are loaded once, and the steps of a table are adjacent.
AXES: Mapping[str, GridAxis] = {
    "weights": GridAxis(
        str, "ema (the average), model (the parameters themselves), ema:DECAY or power:STD"
    ),
    "sampler": GridAxis(str, "a sampler, such as ddim or dpmpp_2m"),
    "eta": GridAxis(float, "noise of DDIM, from 0 to 1"),
    "cfg_channels": GridAxis(str, "guided channels: three (the release) or all"),
    "cfg_interval": GridAxis(
        _parse_interval, "LOW:HIGH, guided at timesteps LOW <= t/T < HIGH; 0:1 means all"
    ),
    "cfg_scale": GridAxis(float, "guidance scale; 1 means no guidance"),
    "steps": GridAxis(
        lambda word: word.replace("+", ","), "250 or ddim50, or by sections: 10+15+20"
    ),
}


class Run(NamedTuple):
    """A trained DiT with a name that is unique in the grid."""

    name: str
    folder: Path
    config: Config


class GridCell(NamedTuple):
    """One combination of settings. `settings`: the protocol's value by axis, None if unused."""

    name: str
    run: Run
    settings: dict[str, Any]
    config: Config

    @property
    def gflops(self) -> float:
        """Gflops of drawing one sample."""
        return sampling_gflops(self.config)


class Plan(NamedTuple):
    """The cells of a grid, and notes on the combinations that were left out."""

    cells: list[GridCell]
    notes: list[str]


def plan(trained: Sequence[Run], given: Mapping[str, Sequence[Any]]) -> Plan:
    """Return the product of runs and axes, the first varying slowest.

    An axis that is not given keeps the value of the run's recipe. Equivalent combinations (without
    guidance its channels are unused, as is eta under DDPM; steps can be spelt in two ways) become
    one cell, and illegal ones are left out. Raises UserError for a value that is illegal in every
    combination, before any work starts.
    """
    cells: list[GridCell] = []
    notes: list[str] = []
    errors: dict[tuple[str, str], list[str]] = {}
    for run in trained:
        axes = {axis: given.get(axis, (getattr(run.config.sample, axis),)) for axis in AXES}
        found: dict[str, GridCell] = {}
        same: list[str] = []
        illegal: list[str] = []
        for values in itertools.product(*axes.values()):
            wanted = dict(zip(axes, values, strict=True))
            message = ""
            try:
                cell, key = _make_cell(run, wanted)
            except UserError as error:
                message = str(error)
                illegal.append(message)
            else:
                if key in found:
                    first = _settings_text(found[key].settings, given)
                    same.append(f"{_settings_text(wanted, given)} is {first}")
                found.setdefault(key, cell)
            for axis in given:
                errors.setdefault((axis, setting_text(wanted[axis])), []).append(message)
        cells += found.values()
        if same:
            notes.append(f"{run.name}: {plural(len(same), 'cell')} left out as repeated: {same[0]}")
        for message in dict.fromkeys(illegal):
            left_out = plural(illegal.count(message), "cell")
            notes.append(f"{run.name}: {left_out} left out as illegal: {message}")
    for axis in given:
        unused = [cell.config.sample.unused(axis, cell.config) for cell in cells]
        if cells and all(unused):
            why = void_by(cells[0].config, unused[0])
            raise UserError(f"--{axis} has no effect in any cell: {why}.")
    for messages in errors.values():
        if all(messages):
            raise UserError(messages[0])
    if not cells:
        raise UserError(illegal[0])
    return Plan(cells, notes)


def _make_cell(run: Run, wanted: Mapping[str, Any]) -> tuple[GridCell, str]:
    """Return a cell and its identity in the grid. Raises UserError for illegal settings."""
    # The guided sample set of a digits run is a cell of its own here, and the validation loss is
    # the same for all cells of a run.
    off = {"guided_scale": 0.0, "val_loss_num": 0}
    c = changed(run.config, {"sample": wanted, "evaluate": off})
    sampling_gflops(c)  # raises for a sampler whose cost is not known before
    timesteps = np.asarray(sampling_of(c, make_task(c)).timesteps).tolist()
    protocol = sampling_protocol(c, seed=c.evaluate.seed, labels="", decoder="")
    settings = {axis: protocol[axis] for axis in AXES}
    key = json.dumps({**protocol, "steps": timesteps})
    return GridCell(_name(run, settings, c), run, settings, c), key


def _settings_text(settings: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Return the settings of the given axes as text, without those that have no effect."""
    return " ".join(
        f"{axis}={setting_text(settings[axis])}" for axis in given if settings[axis] is not None
    )


def _name(run: Run, settings: Mapping[str, Any], c: Config) -> str:
    """Return a unique, legal file name for a cell: RUN-weights_ema-...-num_1000."""
    words = [
        f"{axis}_{setting_text(value)}" for axis, value in settings.items() if value is not None
    ]
    name = "-".join([run.name, *words, f"num_{c.evaluate.num_samples}"])
    legal = re.sub(r"[^\w.+-]", "_", name)
    if len(legal) > LONGEST_NAME:
        legal = f"{legal[: LONGEST_NAME - 13]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return legal


class Scorer(NamedTuple):
    """The evaluator and mesh of all cells whose runs share data and autoencoder."""

    evaluator: Evaluator
    mesh: Mesh


def open_scorers(trained: Sequence[Run]) -> dict[str, Scorer]:
    """Return scorers by run name.

    Runs with the same reference, frozen networks and given images share one.
    """
    made: dict[Any, Scorer] = {}
    of_run: dict[str, Scorer] = {}
    for run in trained:
        c = run.config
        key = (
            *(c.task, c.data, c.evaluate, c.mesh, c.sample.guide, c.model.dtype, c.model.matmul),
            # What is frozen, and what the samples are given.
            *(
                getattr(c, name, None)
                for name in ("autoencoder", "adapt", "control", "given", "lm")
            ),
            getattr(c, "lm", None) and c.lm.mode in DRAWN_MODES and c.seed,
        )
        if key not in made:
            mesh = mesh_of(c)
            made[key] = Scorer(Evaluator(c, mesh, make_task(c).frozen(mesh)), mesh)
        of_run[run.name] = made[key]
    return of_run


def shared_protocol(
    cells: Sequence[GridCell], protocols: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the protocol without the axes. Raises UserError if cells differ in anything else."""
    shared: dict[str, Any] = {}
    source: dict[str, GridCell] = {}
    for cell, protocol in zip(cells, protocols, strict=True):
        for key, value in protocol.items():
            if key in AXES or value is None:  # None: no effect
                continue
            if shared.setdefault(key, value) != value:
                raise UserError(
                    f"{cell.run.name} has {key}={value!r:.60}, and {source[key].run.name}"
                    f" {shared[key]!r:.60}: such numbers cannot be compared; make a grid of each,"
                    " or set one value with --reference, --features, --num or --config.KEY=VALUE."
                )
            source.setdefault(key, cell)
    return shared


def run_grid(
    cells: Sequence[GridCell],
    out: Path,
    *,
    at: Step = "latest",
    keep_samples: bool = False,
    study: Config | None = None,
) -> str:
    """Draw and score the cells that `out` lacks, and write the table and the figure.

    Returns the table as text. Cells with other weights or another protocol are computed again.
    `study` is a recipe whose published figures are listed beside the cells' own. Raises UserError
    for cells that cannot be compared, before the first one is drawn.
    """
    by_run = open_scorers(list({cell.run.name: cell.run for cell in cells}.values()))
    protocols = [by_run[cell.run.name].evaluator.protocol_of_run(cell.config) for cell in cells]
    shared = shared_protocol(cells, protocols)
    loaded: tuple[str, str] | None = None
    params, model = None, dict[str, Any]()
    for k, (cell, protocol) in enumerate(zip(cells, protocols, strict=True), start=1):
        evaluator, mesh = by_run[cell.run.name]
        if loaded != (cell.run.name, cell.config.sample.weights):
            params = None  # frees the old weights before the new ones are loaded
            params, model = load_model(cell.config, cell.run.folder, mesh, at)
            model["run"] = cell.run.name
            loaded = (cell.run.name, cell.config.sample.weights)
        folder = out / CELLS / cell.name
        identity = {
            "protocol_hash": atomic.protocol_hash(protocol),
            "step": model["step"],
            "params_sha256": model["params_sha256"],
        }
        missing = is_primary() and not _is_done(folder, identity, protocol)
        if processes.broadcast_ranges([(0, 1)] if missing else []):
            found = evaluator.of_run(cell.config, params, folder, model)
            if is_primary():
                save_picture(folder / results.SAMPLES_FILE)
                record = {
                    "name": cell.name,
                    "run": cell.run.name,
                    **identity,
                    **model,
                    "settings": cell.settings,
                    "sampling_gflops": cell.gflops,
                    "metrics": found.metrics,
                    "reference": found.reference,
                    "protocol": found.protocol,
                    "seconds": round(found.seconds, 3),
                }
                atomic.write_json(folder / results.EVALUATION_FILE, record)
                value = number(found.metrics.get(evaluator.distance))
                _log(f"[{k}/{len(cells)}] {cell.name}: {evaluator.distance} {value}")
        processes.barrier()  # until all processes have read the samples
        if is_primary() and not keep_samples:
            (folder / results.SAMPLES_FILE).unlink(missing_ok=True)
    return _report(cells, out, shared, evaluator.distance, evaluator.reference.name, study)


def _is_done(folder: Path, identity: Mapping[str, Any], protocol: Mapping[str, Any]) -> bool:
    """Return whether the cell on disk is the one that would be made now. Logs a stale one."""
    path = folder / results.EVALUATION_FILE
    if not faults.exists(path):
        return False
    try:
        record = read_cell(path)
    except UserError as error:
        _log(f"{error} It is computed again.")
        return False
    if all(record[key] == value for key, value in identity.items()):
        return True
    was, now = (
        {**each["protocol"], **each} for each in (record, {"protocol": protocol, **identity})
    )
    keys = [key for key in (*protocol, "step", "params_sha256") if was.get(key) != now[key]]
    changes = ", ".join(f"{key} {_shorten(was.get(key))}, now {_shorten(now[key])}" for key in keys)
    _log(f"{folder.name} is stale ({changes or 'another protocol'}): it is computed again.")
    return False


def _shorten(value: Any) -> str:
    return str(value)[:12]


_RECORD = {
    "name": str,
    "run": str,
    "step": int,
    "params_sha256": str,
    "settings": dict,
    "protocol": dict,
    "protocol_hash": str,
    "sampling_gflops": float,
    "metrics": dict,
    "seconds": float,
}


def read_cell(path: Path) -> dict[str, Any]:
    """Read a cell's evaluation.json, null metrics as NaN. Raises UserError for a damaged one."""
    try:
        record = atomic.load_json(path)
        whole = all(isinstance(record[key], kind) for key, kind in _RECORD.items())
        metrics = {k: math.nan if v is None else float(v) for k, v in record["metrics"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a complete cell ({type(error).__name__}: {error})."
        ) from None
    if not whole:
        raise UserError(f"{path} is not a complete cell.")
    return {**record, "metrics": metrics}


def _report(
    cells: Sequence[GridCell],
    out: Path,
    shared: Mapping[str, Any],
    metric: str,
    reference: str,
    study: Config | None = None,
) -> str:
    """Write grid.csv, .json, .txt and pareto.png from the cells on disk. Returns the text."""
    if not is_primary():
        return ""
    records = [read_cell(out / CELLS / cell.name / results.EVALUATION_FILE) for cell in cells]
    outcomes = [
        Outcome(
            **{key: record[key] for key in Outcome._fields if key != "gflops"},
            gflops=record["sampling_gflops"],
        )
        for record in records
    ]
    text = grid_text(outcomes, metric, shared, reference)
    rows = compare_to_published(cells, records, study, varying(outcomes)) if study else []
    if rows:
        text = f"{text}\n\n{scored_text(rows)}"
    on_front = front(outcomes, metric)
    atomic.write_text(out / "grid.csv", grid_csv(outcomes))
    atomic.write_json(
        out / "grid.json",
        {
            "schema": 1,
            "distance": metric,
            "varying": varying(outcomes),
            "shared_protocol": shared,
            "reference": reference,
            "best": outcomes[on_front[-1]].name if on_front else None,
            "front": [outcomes[i].name for i in on_front],
            "cells": records,
            **({"scored": [dataclasses.asdict(row) for row in rows]} if rows else {}),
        },
    )
    atomic.write_text(out / "grid.txt", text + "\n")
    atomic.write_atomic(out / "pareto.png", pareto_png(outcomes, metric, shared, reference))
    return text


def compare_to_published(
    cells: Sequence[GridCell],
    records: Sequence[Mapping[str, Any]],
    study: Config,
    axes: Sequence[str],
) -> list[Scored]:
    """Return the cells that have a figure published in `study`, named by run and `axes`."""
    found = []
    for cell, record in zip(cells, records, strict=True):
        c = cell.config
        # A figure after N steps belongs to the checkpoint at step N, even if the run is longer.
        c = dataclasses.replace(c, train=dataclasses.replace(c.train, steps=record["step"]))
        if published := published_of(study, c):
            words = [f"{axis}={setting_text(cell.settings[axis])}" for axis in axes]
            found.append(
                {
                    "run": " ".join([cell.run.name, *words]),
                    "metrics": record["metrics"],
                    "protocol": record["protocol"],
                    "protocol_hash": record["protocol_hash"],
                    "config": dataclasses.asdict(c),
                    "published": published,
                    "train": {
                        "steps": c.train.steps,
                        "batch_size": c.train.batch_size,
                        "seed": c.seed,
                        "learning_rate": c.optim.learning_rate,
                    },
                }
            )
    return scored_rows(cast(list[results.Result], found))


def _load_published(text: str) -> Config:
    """Load the recipe that --published names. Raises UserError if it has no published figures."""
    study = read(cli.load_recipe([f"--config={text}"]))
    if not study.sweep.published:
        raise UserError(
            f"--published={text}: its config.sweep.published is empty; expected a recipe with"
            " published figures, such as experiments/paper/guidance.py"
        )
    return study


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def open_runs(words: str, configs: Callable[[Path], Config]) -> list[Run]:
    """Open a comma list of runs; a sweep's directory means all of its runs. Raises UserError."""
    folders: list[Path] = []
    for folder in split_paths(words, "--workdir"):
        below = sorted((folder / rundir.RUNS).glob("*/"))
        folders += below if below and not rundir.is_run(folder) else [folder]
    names = _names([folder.resolve() for folder in folders])
    opened = [
        Run(name, folder, configs(folder)) for name, folder in zip(names, folders, strict=True)
    ]
    for run in opened:
        if (task := make_task(run.config)).sampling is None:
            raise UserError(f"{run.folder} is a run of a {task.name}: it draws no samples.")
    return opened


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names; clashing ones get as many parents as make them unique."""
    if len(set(folders)) < len(folders):
        raise UserError("--workdir names a run twice: give each once.")
    depths = [1] * len(folders)
    while True:
        names = [
            re.sub(r"[^\w.+-]", "_", "_".join(folder.parts[-depth:]))
            for folder, depth in zip(folders, depths, strict=True)
        ]
        clashes = [i for i, name in enumerate(names) if names.count(name) > 1]
        if not clashes:
            return names
        for i in clashes:
            depths[i] += 1
            if depths[i] > len(folders[i].parts):
                raise UserError(f"--workdir: {folders[i]} has the name of another run: rename it.")


def _parse_values(axis: str, words: str) -> tuple[Any, ...]:
    read = []
    for word in words.split(","):
        try:
            value = AXES[axis].parse(word.strip())
        except ValueError:
            value = ""
        if value == "" or value != value:
            raise UserError(
                f"--{axis}={words}: {word!r} is not a value of this axis; expected a comma list,"
                f" each: {AXES[axis].text}."
            )
        read.append(value)
    return tuple(read)


def _parser() -> cli.Parser:
    parser = cli.parser(
        "grid",
        "Score runs at every combination of the given axes: a table, and a plot of quality against"
        " the Gflops of sampling. Every axis takes a comma list; an axis that is not given keeps"
        " the value of the run's recipe. --config.KEY=VALUE changes the recipe for all cells. The"
        " same command again resumes.",
        config=False,
    )
    parser.add_argument(
        "--workdir", required=True, help="a run, runs separated by commas, or a sweep's directory"
    )
    for axis, (_, text) in AXES.items():
        parser.add_argument(f"--{axis}", help=f"{text} (config.sample.{axis})")
    parser.add_argument("--num", type=int, help="samples per cell (config.evaluate.num_samples)")
    for flag, text in FLAGS.items():
        parser.add_argument(f"--{flag}", default="", help=text)
    cli.add_step(parser)
    parser.add_argument(
        "--published",
        default="",
        metavar="FILE[:ARG]",
        help="a recipe with published figures (experiments/paper) to list beside the cells",
    )
    parser.add_argument("--out", default="", help="output folder (default: RUN/grid)")
    parser.add_argument(
        "--keep_samples",
        action="store_true",
        help="keep each cell's samples.npz (50,000 of 256x256 are 9.8 GB); default: only a picture"
        " of the first samples",
    )
    parser.add_argument("--dry_run", action="store_true", help="list the cells and their cost")
    cli.add_processes(parser)
    return parser


def main(argv: list[str]) -> int:
    """Run the command. Raises UserError."""
    if any(word.startswith("--config=") for word in argv):
        raise UserError(
            "--config=FILE: a grid uses each run's recipe; change its keys with --config.KEY=VALUE."
        )
    args, _ = _parser().parse_known_args(argv)
    given = {
        axis: _parse_values(axis, words)
        for axis in AXES
        if (words := getattr(args, axis)) is not None
    }
    evaluate = {flag: getattr(args, flag) for flag in FLAGS if getattr(args, flag)}
    if args.num is not None:
        evaluate["num_samples"] = args.num

    def config_of(folder: Path) -> Config:
        def recorded(_: argparse.Namespace) -> Mapping[str, Any]:
            return migrated(rundir.read_recipe(folder))

        return changed(cli.parse(_parser(), argv, recorded)[1], {"evaluate": evaluate})

    trained = open_runs(args.workdir, config_of)
    if len(trained) > 1 and not args.out:
        raise UserError(f"a grid of {len(trained)} runs needs --out=DIR.")
    out = place(args.out or trained[0].folder / "grid")
    if out.exists() and not out.is_dir():  # before hours of work, not after
        raise UserError(f"--out={out} is a file: give a folder.")
    study = _load_published(args.published) if args.published else None
    cells, notes = plan(trained, given)
    if is_primary():
        for note in notes:
            _log(note)
    if args.dry_run:
        print(_cost_table(cells, out))
        return 0
    text = run_grid(cells, out, at=args.step, keep_samples=args.keep_samples, study=study)
    if is_primary():
        files = "grid.txt, grid.csv, grid.json, pareto.png"
        print(f"{text}\n\n{plural(len(cells), 'cell')} in {out}: {files}")
    return 0


def _cost_table(cells: Sequence[GridCell], out: Path) -> str:
    """Return a table of the cells and their cost. A cell on disk may still turn out stale."""
    width = max(len(cell.name) for cell in cells)
    lines = [f"{'cell':<{width}} {'Gflops':>10} {'samples':>9} {'Pflops':>10}  on disk"]
    for cell in cells:
        num = cell.config.evaluate.num_samples
        exists = (out / CELLS / cell.name / results.EVALUATION_FILE).exists()
        lines.append(
            f"{cell.name:<{width}} {cell.gflops:>10.4g} {num:>9,}"
            f" {cell.gflops * num / 1e6:>10.4g}  {'yes' if exists else 'no'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
