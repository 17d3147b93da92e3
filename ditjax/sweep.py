"""python -m ditjax.sweep: the runs of a study: train, evaluate, one result.json each, report."""

import argparse
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ditjax import cli
from ditjax.config import migrated
from ditjax.errors import FaultError, StoppedError, UserError, one_line
from ditjax.evaluate import model_record, save
from ditjax.evaluation.evaluator import Evaluator
from ditjax.files import atomic, lease
from ditjax.machines import costs
from ditjax.machines import topology as machines
from ditjax.machines.cost_text import cost_text
from ditjax.parallel import processes, stopping
from ditjax.parallel.mesh import mesh_of
from ditjax.parallel.processes import is_primary
from ditjax.report import make_report
from ditjax.runs import opening, results, rundir
from ditjax.runs.log import Progress, last_metrics
from ditjax.runs.provenance import cores, environment, typed
from ditjax.sampling.program import sampling_of
from ditjax.studies import status
from ditjax.studies.cells import (
    Cell,
    by_work,
    cells,
    check_result,
    check_same_study,
    chosen,
    record,
)
from ditjax.studies.words import OF_A_METRIC
from ditjax.tasks import make_task
from ditjax.train import train

LEASE = ".sweep.lease"  # of the study: an array job's cells are each their own
ORPHAN_SECONDS = 60.0  # for a cell to save what it has when its sweep is gone
# Which cells: what several processes of one study may differ in.
SELECTION = ("models", "cells", "shard", "failed")


@lease.scope()
def run_cell(
    cell: Cell, workdir: Path, *, waits: bool = False, begin: Callable[[], object] | None = None
) -> None:
    """Trains and evaluates one cell; a cell that has its result is left as it is.

    Before it begins `begin` is called, by the first process. Raises UserError where another process
    is at it: with `waits` its end is waited for.
    """
    folder = rundir.inside(workdir / rundir.RUNS, cell.name)
    if _is_done(cell, folder):
        return
    opening.own(folder, waits=waits)
    if _is_done(cell, folder):
        return
    if begin and is_primary():
        begin()
    with _noted(folder), stopping.raise_on_sigterm():  # while it trains, `train` hears the signal
        _make(cell, folder)


@contextlib.contextmanager
def _noted(folder: Path) -> Iterator[None]:
    """How a cell ends that comes to no result stands in its folder."""
    if is_primary():
        status.forget_ending(folder)
    try:
        yield
    except Exception as error:
        if is_primary():
            stops = isinstance(error, StoppedError)
            known = stops or isinstance(error, UserError | FaultError)
            line = str(error) if known else f"{type(error).__name__}: {error}"
            status.note_ending(folder, status.STOPPED if stops else status.FAILED, line)
        raise


def _make(cell: Cell, folder: Path) -> None:
    c = cell.config
    mesh = mesh_of(c)
    task = make_task(c, mesh)
    evaluator = Evaluator(c, mesh, task.frozen(mesh))
    trained = train(c, folder, evaluator)
    model = model_record(folder, trained.step, trained.params)
    evaluated = evaluator.of_run(c, trained.params, folder, model)
    save(folder, trained.step, evaluated.metrics, evaluated.protocol, evaluated.reference)
    described = task.cost.description if task.cost else {}
    result: results.Result = {
        "schema": 1,
        "run": cell.name,
        "model": {"name": cell.model, **described},
        "params": cell.params,
        "gflops": cell.gflops,
        "train": {
            "steps": trained.step,
            "batch_size": c.train.batch_size,
            "images": trained.step * c.train.batch_size,
            "seconds": round(trained.seconds, 2),
            "learning_rate": c.optim.learning_rate,
            "final_loss": trained.loss,
            "seed": c.seed,
        },
        "sample": {
            "num": c.evaluate.num_samples,
            "sampler": c.sample.sampler,
            "steps": len(sampling_of(c, task).timesteps),
            "eta": c.sample.eta,
            "cfg_scale": c.sample.cfg_scale,
            "cfg_channels": c.sample.cfg_channels,
            "seed": c.evaluate.seed,
            "seconds": round(evaluated.seconds, 2),
        },
        "metrics": evaluated.metrics,
        "protocol": evaluated.protocol,
        "protocol_hash": atomic.protocol_hash(evaluated.protocol),
        "environment": environment(os.environ.get(_COMMAND) or _typed(sys.argv[1:])),
        "config": cell.recipe,
    }
    if cell.published:
        result["published"] = cell.published
    if is_primary():
        results.write_result(folder, result)


def _is_done(cell: Cell, folder: Path) -> bool:
    done = is_primary() and has_result(cell, folder)
    return bool(processes.broadcast_ranges([(0, 1)] if done else []))


def has_result(cell: Cell, folder: Path) -> bool:
    """Whether the cell's result is there, whole; a damaged one is told of, and made again.

    Raises UserError for the result of another recipe.
    """
    if not (folder / results.RESULT_FILE).exists():
        return False
    try:
        found = results.read_result(folder)
    except UserError as error:
        print(one_line(f"{error} It is made again."), file=sys.stderr, flush=True)
        return False
    check_result(cell, folder, found)
    return True


_COMMAND = "DITJAX_SWEEP_COMMAND"  # the command that a person typed, told to the cells it started


def _typed(argv: Sequence[str]) -> str:
    machines = ("--coordinator", "--processes", "--process")
    return typed("sweep", argv, drop=machines, folders=("--workdir",))


class _Running(NamedTuple):
    cell: Cell
    process: subprocess.Popen[bytes]
    cpus: frozenset[int]


def run_grid(
    grid: list[Cell], workdir: Path, argv: list[str], jobs: int, command: str = ""
) -> list[Cell]:
    """Runs the cells without a result, `jobs` processes at once; returns those that failed.

    `argv` is the recipe and where to, `command` what a person typed. The dearest start first, so
    that the last to finish is small. On CPUs each job keeps to its share of the cores: small
    networks gain more from that than from threads.
    """
    left = [cell for cell in grid if not _is_left_alone(cell, workdir)]
    if len(left) < len(grid):
        print(f"{len(grid) - len(left)} of {len(grid)} cells are done already", file=sys.stderr)
    waiting = by_work(left)
    ours = cores()
    jobs = max(1, min(jobs, len(waiting)))
    free = [frozenset(ours[i::jobs]) for i in range(jobs)]
    running: list[_Running] = []
    failed: list[Cell] = []
    total = sum(cell.training_gflops for cell in grid)
    done = total - sum(cell.training_gflops for cell in left)
    progress = Progress("sweep", 100, "% of the work", every_seconds=20.0)
    began = time.monotonic()
    try:
        while waiting or running:
            while waiting and free:
                running.append(_start(waiting.pop(0), workdir, argv, free.pop(), command))
            time.sleep(0.5)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                free.append(job.cpus)
                done += job.cell.training_gflops
                if not _tell(job, workdir, time.monotonic() - began):
                    failed.append(job.cell)
            share = done + sum(_progress(job, workdir) for job in running)
            progress.report(min(99.0, 100 * share / total))
    finally:
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()
            _note(job, workdir, status.STOPPED, "the sweep was stopped")
    progress.report(100)
    return failed


def _is_left_alone(cell: Cell, workdir: Path) -> bool:
    """Whether it needs no process; what is wrong with it is told by its own."""
    try:
        return has_result(cell, workdir / rundir.RUNS / cell.name)
    except UserError:
        return False


def _start(cell: Cell, workdir: Path, argv: list[str], cpus: frozenset[int], told: str) -> _Running:
    folder = rundir.inside(workdir / rundir.RUNS, cell.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        status.forget_ending(folder)
        log = (folder / rundir.LOG_FILE).open("ab")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}.") from None
    command = [sys.executable, "-m", "ditjax.sweep", *argv, f"--index={cell.number}"]
    env = {**os.environ, _COMMAND: told}
    ours = cores()
    try:
        # A child inherits the cores; setting them after a fork is unsafe under JAX's threads.
        if cpus:
            os.sched_setaffinity(0, cpus)
        with log:
            # Nothing is written to its input: that ends when this process does, however it ends.
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env
            )
    finally:
        if cpus:
            os.sched_setaffinity(0, ours)
    return _Running(cell, process, cpus)


def _progress(job: _Running, workdir: Path) -> float:
    step = last_metrics(workdir / rundir.RUNS / job.cell.name).get("step", 0)
    share = step / job.cell.config.train.steps
    return job.cell.training_gflops * 0.9 * share  # the rest is evaluation


def _tell(job: _Running, workdir: Path, seconds: float) -> bool:
    """One line of a cell that has ended. Returns whether it has its result."""
    folder, code, found = workdir / rundir.RUNS / job.cell.name, job.process.returncode, None
    if job.process.stdin:
        job.process.stdin.close()
    with contextlib.suppress(UserError):
        found = None if code else results.read_result(folder)
    if found:
        figures = ", ".join(
            f"{name} {value:.3g}"
            for name, value in found["metrics"].items()
            if not name.endswith(OF_A_METRIC)
        )
        line = f"{job.cell.name} done: {figures}"
    else:
        why = status.last_line(folder)
        ended = f"FAILED (status {code})" if code else "stopped before its end"
        line = f"{job.cell.name} {ended}: {why}"
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        _note(job, workdir, status.FAILED if code else status.STOPPED, f"{how}; its log: {why}")
    print(one_line(f"[{seconds:4.0f} s] {line}"), file=sys.stderr, flush=True)
    return found is not None


def _note(job: _Running, workdir: Path, how: str, line: str) -> None:
    """For a process that could not say how it ended, as one that was killed."""
    folder = workdir / rundir.RUNS / job.cell.name
    if (folder / results.RESULT_FILE).exists() or status.read_ending(folder):
        return
    if not lease.holders([folder / lease.FILE], 0.0):  # nobody else is at it
        status.note_ending(folder, how, line)


def _end_with_the_sweep() -> None:
    """A cell's process ends when the one that started it is gone, as by a SIGTERM of its own."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        print("the sweep that started this cell is gone: it ends", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="sweep", daemon=True).start()


def _parser() -> cli.Parser:
    parser = cli.parser(
        "sweep", "Trains and evaluates every cell of a study, then reports. --status reads it."
    )
    parser.add_argument("--workdir", required=True, help="the study's directory")
    parser.add_argument("--index", type=int, help="run this cell only (array jobs); no report")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once (default 1)")
    parser.add_argument("--models", default="", help="only cells of these models: S/8,B/4")
    parser.add_argument("--cells", default="", help="only cells of these numbers: 0,3-5")
    parser.add_argument(
        "--shard",
        default="",
        metavar="K/N",
        help="only the share K of N, from 0, of about the same work: one for each machine",
    )
    parser.add_argument("--failed", action="store_true", help="only cells that have failed")
    parser.add_argument("--dry_run", action="store_true", help="list the cells and their cost")
    parser.add_argument(
        "--topology",
        default="",
        help="of --dry_run: CHIP:SHAPE to tell hours on, as v5e:4x4 (config.sweep.topology)",
    )
    parser.add_argument(
        "--plan", action="store_true", help="of --dry_run: compile each cell's train step for it"
    )
    parser.add_argument(
        "--status",
        action="store_true",
        help="how each cell stands; touches nothing, and needs no --config",
    )
    parser.add_argument(
        "--watch",
        type=float,
        metavar="SECONDS",
        help="of --status: again, so often, until all are done",
    )
    cli.add_processes(parser)
    return parser


def _check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that do not go together."""
    if (args.distributed or args.coordinator) and args.index is None:
        raise UserError(
            "several processes train one cell: give its --index=K, and start each cell so."
        )
    if args.jobs < 1:
        raise UserError(f"--jobs={args.jobs}: expected at least 1.")
    given = [name for name in (*SELECTION, "dry_run", "status") if getattr(args, name)]
    if args.index is not None and given:
        raise UserError(f"--index={args.index} runs one cell: leave --{given[0]} out.")
    if args.dry_run and args.status:
        raise UserError("--dry_run lists what would run, --status what does: give one of them.")
    if (args.topology or args.plan) and not args.dry_run:
        raise UserError("--topology and --plan tell what a study would cost: add --dry_run.")
    if args.watch is not None and not (args.status and 1 <= args.watch <= 86_400):
        raise UserError(
            f"--watch={args.watch:g}: expected 1 to 86400 seconds, and --status beside it."
        )


def main(argv: list[str]) -> int:
    """The command."""
    parser = _parser()
    early, _ = parser.parse_known_args(argv)
    _check_flags(early)
    workdir = Path(early.workdir)
    if early.status and not any(word.startswith("--config=") for word in argv):
        if not (workdir / rundir.RECIPE_FILE).exists():
            raise UserError(
                f"{workdir} holds no study that has begun: give another --workdir, or the study's"
                " --config=FILE, too."
            )
        parser.set_defaults(reads_run=True)
    args, config = cli.parse(parser, argv)
    study = cells(args.recipe)
    if args.index is not None and not 0 <= args.index < len(study):
        raise UserError(f"--index={args.index}: the study has cells 0 to {len(study) - 1}.")
    _check_study(workdir, args.recipe, study)
    words = [word for word in argv if word.startswith("--config")]
    words.append(f"--workdir={workdir}")

    def begin() -> None:
        rundir.open_study(workdir, args.recipe, record(args.recipe, study, _typed(words)))

    if args.index is not None:
        if started := _COMMAND in os.environ:
            _end_with_the_sweep()
        run_cell(study[args.index], workdir, waits=started, begin=None if started else begin)
        return 0
    selected = chosen(study, args.models, args.cells, args.shard)
    if args.status:
        return _show(selected, workdir, args.failed, args.watch)
    states = status.look(selected, workdir)
    if args.failed:
        states = [each for each in states if each.stage == status.FAILED]
    if args.dry_run:
        print(status.plan_text(states))
        left = [each.cell for each in states if each.stage != status.DONE]
        if told := _cost(left, args.topology or config.sweep.topology, plan=args.plan):
            print(f"\n{told}")
        return 0
    if args.failed and not states:
        print("no cell has failed")
        return 0
    with lease.scope(), stopping.raise_on_sigterm():  # run_grid passes SIGTERM on to its cells
        lease.acquire(
            workdir / _lease_of(args), str(workdir)
        )  # no runs.own: that takes the devices
        begin()
        status.keep(states, workdir)
        failed = run_grid([each.cell for each in states], workdir, words, args.jobs, _typed(argv))
        summary = _reported(workdir, failed)
    print(summary)
    for cell in failed:
        print(
            f"{cell.name} failed: see {workdir / rundir.RUNS / cell.name / rundir.LOG_FILE}",
            file=sys.stderr,
        )
    if failed:
        print("the same command with --failed runs what has failed, alone", file=sys.stderr)
    return 1 if failed else 0


def _cost(study: Sequence[Cell], name: str, *, plan: bool) -> str:
    """What the cells cost on a topology, in words; '' where none is named or nothing is left."""
    if plan and not name:
        raise UserError("--plan compiles for a machine: name it with --topology=v5e:4x4.")
    if not name or not study:
        return ""
    topology = machines.parse_topology(name)
    of_cell = costs.compiled if plan else costs.estimate
    found = [of_cell(cell.config, topology) for cell in study]
    return cost_text(topology.name, [cell.name for cell in study], found)


def _check_study(workdir: Path, recipe: Mapping[str, Any], study: Sequence[Cell]) -> None:
    """Raises UserError for the directory of another study."""
    recorded: Mapping[str, Any] = {}
    if not rundir.is_run(workdir):
        with contextlib.suppress(UserError):  # none yet; a damaged one is written again
            recorded = migrated(rundir.read_recipe(workdir))
    if recorded:
        check_same_study(workdir, recorded, recipe, study)


def _lease_of(args: argparse.Namespace) -> str:
    """Of each selection of cells its own: several machines share a study, and each cell has its
    own besides."""
    told = [f"{name}={getattr(args, name)}" for name in SELECTION if getattr(args, name)]
    if not told:
        return LEASE
    return f".sweep-{hashlib.sha256(' '.join(told).encode()).hexdigest()[:12]}.lease"


def _show(selected: Sequence[Cell], workdir: Path, failed: bool, every: float | None) -> int:
    """--status: once, or `every` so many seconds until all is done."""
    redraws = every is not None and sys.stdout.isatty()
    while True:
        states = status.look(selected, workdir, waits=True)
        print("\x1b[H\x1b[2J" if redraws else "", end="")
        print(status.text(states, failed), flush=True)
        if every is None or all(each.stage == status.DONE for each in states):
            return 0
        time.sleep(every)
        print("" if redraws else "\n", end="")


def _reported(workdir: Path, failed: Sequence[Cell]) -> str:
    """The report of all that is there; where every cell failed there is none."""
    try:
        return make_report([workdir], workdir / "report").text
    except UserError as error:
        if not failed:
            raise
        return str(error)


if __name__ == "__main__":
    cli.run(main)
