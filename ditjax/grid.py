"""python -m ditjax.grid: a run's guidance, sampler, steps and weights as a grid, each cell scored.

    python -m ditjax.grid --workdir=RUN --cfg_channels=three,all --cfg_scale=1,1.25,1.5,4
    python -m ditjax.grid --workdir=RUN,RUN --steps=16,32,64,128,250,1000 --out=DIR

The first is the DiT paper's guidance table, the second its figure 10. Sample i of every cell has
the seed config.evaluate.seed and the index i, so the same x_T and label: cells differ by their
settings, not by luck. A finished cell is a file of its own; the same command again goes on.
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

from jax.sharding import Mesh

from ditjax import cli
from ditjax.config import Config, changed, migrated, read
from ditjax.errors import UserError
from ditjax.evaluate import EVALUATION_FILE, FLAGS, save_picture
from ditjax.evaluation.evaluator import Evaluator
from ditjax.files import atomic
from ditjax.parallel import processes
from ditjax.parallel.mesh import mesh_of
from ditjax.parallel.processes import is_primary
from ditjax.reporting.grid import Outcome, front, grid_csv, grid_text, setting_text, varying
from ditjax.reporting.pareto import pareto_png
from ditjax.reporting.scored import Scored, scored_rows, scored_text
from ditjax.runs import opening, results, rundir
from ditjax.runs.checkpoint import Step
from ditjax.sampling.draw import sampling_protocol
from ditjax.sampling.program import sampling_of
from ditjax.studies.published import published_of
from ditjax.studies.words import number, plural
from ditjax.tasks import make_task, sampling_gflops

CELLS = "cells"
LONGEST_NAME = 200


class Axis(NamedTuple):
    """A key of config.sample and of the protocol: how a word of its flag is read, what it says."""

    read: Callable[[str], Any]
    text: str


def _interval(word: str) -> tuple[float, ...]:
    low, _, high = word.partition(":")
    return float(low), float(high)


# Outermost first: weights are loaded once, and a table's steps lie side by side.
AXES: Mapping[str, Axis] = {
    "weights": Axis(str, "ema (the average) or model (the parameters themselves)"),
    "sampler": Axis(str, "ddpm or ddim"),
    "eta": Axis(float, "DDIM's noise, from 0 to 1"),
    "cfg_channels": Axis(str, "guided channels: three (the release) or all"),
    "cfg_interval": Axis(_interval, "LOW:HIGH, guided at timesteps LOW <= t/T < HIGH; 0:1 is all"),
    "cfg_scale": Axis(float, "guidance scale; 1 is none"),
    "steps": Axis(lambda word: word.replace("+", ","), "250 or ddim50; of sections: 10+15+20"),
}


class Run(NamedTuple):
    """A trained DiT, by a name that no other run of the grid has."""

    name: str
    folder: Path
    config: Config


class Cell(NamedTuple):
    """`settings`: what the protocol says of each axis, None where it has no effect here."""

    name: str
    run: Run
    settings: dict[str, Any]
    config: Config

    @property
    def gflops(self) -> float:
        """Of one sample."""
        return sampling_gflops(self.config)


class Plan(NamedTuple):
    """The cells, and a line for each kind of combination that is none."""

    cells: list[Cell]
    notes: list[str]


def plan(trained: Sequence[Run], given: Mapping[str, Sequence[Any]]) -> Plan:
    """The product of runs and axes, the first slowest; an axis not given stays at the run's recipe.

    Combinations that come to the same (no guidance has no channels, DDPM no eta, steps spelt in two
    ways) are one cell; illegal ones are left out. Raises UserError for a value that is legal in
    none: a mistake, found before any work.
    """
    cells: list[Cell] = []
    notes: list[str] = []
    whys: dict[tuple[str, str], list[str]] = {}
    for run in trained:
        axes = {axis: given.get(axis, (getattr(run.config.sample, axis),)) for axis in AXES}
        found: dict[str, Cell] = {}
        same: list[str] = []
        illegal: list[str] = []
        for values in itertools.product(*axes.values()):
            asked = dict(zip(axes, values, strict=True))
            why = ""
            try:
                cell, alike = _cell(run, asked)
            except UserError as error:
                why = str(error)
                illegal.append(why)
            else:
                if alike in found:
                    same.append(f"{_asked(asked, given)} is {_asked(found[alike].settings, given)}")
                found.setdefault(alike, cell)
            for axis in given:
                whys.setdefault((axis, setting_text(asked[axis])), []).append(why)
        cells += found.values()
        if same:
            notes.append(f"{run.name}: {plural(len(same), 'cell')} left out as repeated: {same[0]}")
        for why in dict.fromkeys(illegal):
            left_out = plural(illegal.count(why), "cell")
            notes.append(f"{run.name}: {left_out} left out as illegal: {why}")
    for of_value in whys.values():
        if all(of_value):
            raise UserError(of_value[0])
    if not cells:
        raise UserError(illegal[0])
    return Plan(cells, notes)


def _cell(run: Run, asked: Mapping[str, Any]) -> tuple[Cell, str]:
    """The cell, and what no other may share with it. Raises UserError for illegal settings."""
    # The second sample set of a digits run, under guidance, is another cell here; the validation
    # loss is one for all cells of a run.
    off = {"guided_scale": 0.0, "val_loss_num": 0}
    c = changed(run.config, {"sample": asked, "evaluate": off})
    timesteps = sampling_of(c, make_task(c)).timesteps.tolist()
    said = sampling_protocol(c, seed=c.evaluate.seed, labels="", decoder="")
    settings = {axis: said[axis] for axis in AXES}
    alike = json.dumps({**said, "steps": timesteps})
    return Cell(_name(run, settings, c), run, settings, c), alike


def _asked(settings: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The settings of the axes given, but for those that are without effect."""
    return " ".join(
        f"{axis}={setting_text(settings[axis])}" for axis in given if settings[axis] is not None
    )


def _name(run: Run, settings: Mapping[str, Any], c: Config) -> str:
    """RUN-weights_ema-...-num_1000: a legal file name, another one for every cell."""
    words = [
        f"{axis}_{setting_text(value)}" for axis, value in settings.items() if value is not None
    ]
    name = "-".join([run.name, *words, f"num_{c.evaluate.num_samples}"])
    legal = re.sub(r"[^\w.+-]", "_", name)
    if len(legal) > LONGEST_NAME:
        legal = f"{legal[: LONGEST_NAME - 13]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return legal


class Judge(NamedTuple):
    """What the cells of runs of the same data and autoencoder are drawn and scored by."""

    evaluator: Evaluator
    mesh: Mesh


def judges(trained: Sequence[Run]) -> dict[str, Judge]:
    """Run name -> its judge, one for all runs that can share it: one reference, one decoder."""
    made: dict[Any, Judge] = {}
    of_run: dict[str, Judge] = {}
    for run in trained:
        c = run.config
        key = (c.data, c.autoencoder, c.evaluate, c.mesh, c.model.dtype, c.model.matmul)
        if key not in made:
            mesh = mesh_of(c)
            made[key] = Judge(Evaluator(c, mesh, make_task(c).frozen(mesh)), mesh)
        of_run[run.name] = made[key]
    return of_run


def one_protocol(cells: Sequence[Cell], protocols: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the protocols share: all but the axes. Raises UserError where anything else differs."""
    shared: dict[str, Any] = {}
    source: dict[str, Cell] = {}
    for cell, protocol in zip(cells, protocols, strict=True):
        for key, value in protocol.items():
            if key in AXES or value is None:  # None: without effect, as an average not taken
                continue
            if shared.setdefault(key, value) != value:
                raise UserError(
                    f"{cell.run.name} has {key}={value!r:.60}, and {source[key].run.name}"
                    f" {shared[key]!r:.60}: such numbers cannot be compared; make a grid of each,"
                    " or give them one with --reference, --features, --num or --config.KEY=VALUE."
                )
            source.setdefault(key, cell)
    return shared


def run_grid(
    cells: Sequence[Cell],
    out: Path,
    *,
    at: Step = "latest",
    keep_samples: bool = False,
    study: Config | None = None,
) -> str:
    """Draws and scores the cells that `out` lacks, writes the table and the figure; its text.

    A cell of other weights or another protocol than now is done again. `study` is a recipe whose
    published figures stand beside the cells' own. Raises UserError for cells that cannot be
    compared, before the first is drawn.
    """
    by_run = judges(list({cell.run.name: cell.run for cell in cells}.values()))
    protocols = [by_run[cell.run.name].evaluator.protocol_of_run(cell.config) for cell in cells]
    shared = one_protocol(cells, protocols)
    loaded: tuple[str, str] | None = None
    params, step, digest = None, 0, ""
    for k, (cell, protocol) in enumerate(zip(cells, protocols, strict=True), start=1):
        evaluator, mesh = by_run[cell.run.name]
        if loaded != (cell.run.name, cell.config.sample.weights):
            params = None  # the old ones may go before the new ones come
            params, step = opening.load_weights(
                cell.config, make_task(cell.config), cell.run.folder, mesh, at
            )
            digest = opening.digest(params)
            loaded = (cell.run.name, cell.config.sample.weights)
        folder = out / CELLS / cell.name
        stands = {
            "protocol_hash": atomic.protocol_hash(protocol),
            "step": step,
            "params_sha256": digest,
        }
        missing = is_primary() and not _is_done(folder, stands, protocol)
        if processes.broadcast_ranges([(0, 1)] if missing else []):
            model = {"run": cell.run.name, "step": step, "params_sha256": digest}
            found = evaluator.of_run(cell.config, params, folder, model)
            if is_primary():
                save_picture(folder / results.SAMPLES_FILE)
                record = {
                    "name": cell.name,
                    "run": cell.run.name,
                    **stands,
                    "settings": cell.settings,
                    "sampling_gflops": cell.gflops,
                    "metrics": found.metrics,
                    "reference": found.reference,
                    "protocol": found.protocol,
                    "seconds": round(found.seconds, 3),
                }
                atomic.write_json(folder / EVALUATION_FILE, record)
                value = number(found.metrics.get(evaluator.distance))
                _tell(f"[{k}/{len(cells)}] {cell.name}: {evaluator.distance} {value}")
        processes.barrier()  # the others have read the samples
        if is_primary() and not keep_samples:
            (folder / results.SAMPLES_FILE).unlink(missing_ok=True)
    return _report(cells, out, shared, evaluator.distance, evaluator.reference.name, study)


def _is_done(folder: Path, stands: Mapping[str, Any], protocol: Mapping[str, Any]) -> bool:
    """Whether the cell is there as it would be made now; a stale one is told of."""
    path = folder / EVALUATION_FILE
    if not path.exists():
        return False
    try:
        record = read_cell(path)
    except UserError as error:
        _tell(f"{error} It is done again.")
        return False
    if all(record[key] == value for key, value in stands.items()):
        return True
    was, now = ({**each["protocol"], **each} for each in (record, {"protocol": protocol, **stands}))
    keys = [key for key in (*protocol, "step", "params_sha256") if was.get(key) != now[key]]
    changes = ", ".join(f"{key} {_brief(was.get(key))}, now {_brief(now[key])}" for key in keys)
    _tell(f"{folder.name} is stale ({changes or 'another protocol'}): it is done again.")
    return False


def _brief(value: Any) -> str:
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
    """A cell's evaluation.json, null metrics as NaN. Raises UserError for a damaged one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        whole = all(isinstance(record[key], kind) for key, kind in _RECORD.items())
        metrics = {k: math.nan if v is None else float(v) for k, v in record["metrics"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no whole cell ({type(error).__name__}: {error}).") from None
    if not whole:
        raise UserError(f"{path} is no whole cell.")
    return {**record, "metrics": metrics}


def _report(
    cells: Sequence[Cell],
    out: Path,
    shared: Mapping[str, Any],
    metric: str,
    reference: str,
    study: Config | None = None,
) -> str:
    """grid.csv, grid.json, grid.txt and pareto.png from the cells on disk; the text."""
    if not is_primary():
        return ""
    records = [read_cell(out / CELLS / cell.name / EVALUATION_FILE) for cell in cells]
    outcomes = [
        Outcome(
            **{key: record[key] for key in Outcome._fields if key != "gflops"},
            gflops=record["sampling_gflops"],
        )
        for record in records
    ]
    text = grid_text(outcomes, metric, shared, reference)
    rows = scored(cells, records, study, varying(outcomes)) if study else []
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


def scored(
    cells: Sequence[Cell], records: Sequence[Mapping[str, Any]], study: Config, axes: Sequence[str]
) -> list[Scored]:
    """The cells with a figure published in `study`, named by run and `axes`, beside that figure."""
    found = []
    for cell, record in zip(cells, records, strict=True):
        c = cell.config
        # A figure of so many steps is of a checkpoint at them, however long its run went on.
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


def _study(text: str) -> Config:
    """The recipe that --published names. Raises UserError for one without published figures."""
    study = read(cli.load_recipe([f"--config={text}"]))
    if not study.sweep.published:
        raise UserError(
            f"--published={text}: its config.sweep.published is empty; expected a recipe with"
            " published figures, such as experiments/paper/guidance.py"
        )
    return study


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def open_runs(words: str, configs: Callable[[Path], Config]) -> list[Run]:
    """Runs of a comma list; a sweep's directory stands for all of its runs. Raises UserError."""
    folders: list[Path] = []
    for word in words.split(","):
        folder = Path(word)
        if not word:
            raise UserError(
                f"--workdir={words}: expected the directories of runs, comma-separated."
            )
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
    """The folders' own names, of those that clash with as many parents as tell them apart."""
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
                raise UserError(f"--workdir: {folders[i]} cannot be told from another by its name.")


def _values(axis: str, words: str) -> tuple[Any, ...]:
    read = []
    for word in words.split(","):
        try:
            value = AXES[axis].read(word.strip())
        except ValueError:
            value = ""
        if value == "" or value != value:
            raise UserError(
                f"--{axis}={words}: {word!r} is none of its values; expected a comma list,"
                f" each: {AXES[axis].text}."
            )
        read.append(value)
    return tuple(read)


def _parser() -> cli.Parser:
    parser = cli.parser(
        "grid",
        "Scores of runs at every combination of the axes given: a table, and quality against the"
        " Gflops of sampling. Every axis takes a comma list; one not given stays at the run's"
        " recipe. --config.KEY=VALUE changes it for all cells. The same command again goes on.",
        config=False,
    )
    parser.add_argument(
        "--workdir", required=True, help="a run, runs separated by commas, or a sweep's directory"
    )
    for axis, (_, text) in AXES.items():
        parser.add_argument(f"--{axis}", help=f"{text} (config.sample.{axis})")
    parser.add_argument("--num", type=int, help="samples a cell (config.evaluate.num_samples)")
    for flag, text in FLAGS.items():
        parser.add_argument(f"--{flag}", default="", help=text)
    cli.add_step(parser)
    parser.add_argument(
        "--published",
        default="",
        metavar="FILE[:ARG]",
        help="a recipe with published figures (experiments/paper): they stand beside the cells'",
    )
    parser.add_argument("--out", default="", help="where to write (default: RUN/grid)")
    parser.add_argument(
        "--keep_samples",
        action="store_true",
        help="keep each cell's samples.npz (50,000 of 256x256 are 9.8 GB); without it a picture of"
        " the first ones stays",
    )
    parser.add_argument("--dry_run", action="store_true", help="list the cells and their cost")
    cli.add_processes(parser)
    return parser


def main(argv: list[str]) -> int:
    """The command."""
    if any(word.startswith("--config=") for word in argv):
        raise UserError(
            "--config=FILE: a grid takes each run's own recipe; change keys of it with"
            " --config.KEY=VALUE."
        )
    args, _ = _parser().parse_known_args(argv)
    given = {
        axis: _values(axis, words) for axis in AXES if (words := getattr(args, axis)) is not None
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
    out = Path(args.out or trained[0].folder / "grid")
    if out.exists() and not out.is_dir():  # before hours of work, not after
        raise UserError(f"--out={out} is a file: give a folder.")
    study = _study(args.published) if args.published else None
    cells, notes = plan(trained, given)
    if is_primary():
        for note in notes:
            _tell(note)
    if args.dry_run:
        print(_forecast(cells, out))
        return 0
    text = run_grid(cells, out, at=args.step, keep_samples=args.keep_samples, study=study)
    if is_primary():
        files = "grid.txt, grid.csv, grid.json, pareto.png"
        print(f"{text}\n\n{plural(len(cells), 'cell')} in {out}: {files}")
    return 0


def _forecast(cells: Sequence[Cell], out: Path) -> str:
    """The cells and what they cost; of one on disk it is not known yet whether it is stale."""
    width = max(len(cell.name) for cell in cells)
    lines = [f"{'cell':<{width}} {'Gflops':>10} {'samples':>9} {'Pflops':>10}  on disk"]
    for cell in cells:
        num = cell.config.evaluate.num_samples
        there = (out / CELLS / cell.name / EVALUATION_FILE).exists()
        lines.append(
            f"{cell.name:<{width}} {cell.gflops:>10.4g} {num:>9,}"
            f" {cell.gflops * num / 1e6:>10.4g}  {'yes' if there else 'no'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
