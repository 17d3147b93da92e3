"""python -m ditjax.sweep: train and evaluate every run of a study, then write its report."""

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
from typing import IO, Any, NamedTuple

from ditjax import cli
from ditjax.config import Config, migrated
from ditjax.errors import FaultError, StoppedError, UserError, one_line
from ditjax.evaluate import save_evaluation
from ditjax.evaluation.evaluator import Evaluator
from ditjax.files import atomic, faults, lease
from ditjax.files.store import Mirror, is_object, place
from ditjax.machines import costs
from ditjax.machines import topology as machines
from ditjax.machines.cost_text import cost_text
from ditjax.parallel import processes, stopping
from ditjax.parallel.mesh import mesh_of
from ditjax.parallel.processes import is_primary
from ditjax.runs import opening, results, rundir
from ditjax.runs.log import Progress, last_metrics
from ditjax.runs.provenance import cores, environment, typed
from ditjax.runs.steps import check_can_hold
from ditjax.sampling.draw import model_record
from ditjax.sampling.program import sampling_of
from ditjax.studies import ladder, status
from ditjax.studies.cells import (
    Cell,
    by_work,
    cells,
    check_result,
    check_same_study,
    select_cells,
    study_record,
)
from ditjax.studies.words import OF_A_METRIC
from ditjax.tasks import make_task, resolved
from ditjax.train import train

LEASE = ".sweep.lease"  # of a whole study; the cells of an array job take only their own leases
PROGRESS_EVERY = 20.0  # between lines of progress
ORPHAN_SECONDS = 60.0  # time for a cell to save a checkpoint when its sweep is gone
# The flags that select cells: processes of one study may differ in them.
SELECTION = ("models", "cells", "shard", "failed")


@lease.scope()
def run_cell(
    cell: Cell, workdir: Path, *, waits: bool = False, begin: Callable[[], object] | None = None
) -> None:
    """Train and evaluate one cell. A cell that has its result is left unchanged.

    The first process calls `begin` before the work starts. If another process works on the cell,
    `waits` makes this call wait for it. Raises UserError if it is still busy.
    """
    folder = rundir.inside(workdir / rundir.RUNS, cell.name)
    if _is_done(cell, folder):
        return
    opening.acquire_lease(folder, waits=waits)
    if _is_done(cell, folder):
        return
    if begin and is_primary():
        begin()
    with _record_failure(folder), stopping.raise_on_sigterm():  # in training, `train` handles it
        _train_and_evaluate(cell, folder)


@contextlib.contextmanager
def _record_failure(folder: Path) -> Iterator[None]:
    """Record in a cell's folder how it failed or stopped."""
    if is_primary():
        status.clear_ending(folder)
    try:
        yield
    except Exception as error:
        if is_primary():
            stops = isinstance(error, StoppedError)
            known = stops or isinstance(error, UserError | FaultError)
            line = str(error) if known else f"{type(error).__name__}: {error}"
            status.record_ending(folder, status.STOPPED if stops else status.FAILED, line)
        raise


def _train_and_evaluate(cell: Cell, folder: Path) -> None:
    """Train and evaluate a cell, and write its result.json."""
    c = resolved(cell.config, folder)
    mesh = mesh_of(c)
    task = make_task(c, mesh)
    evaluator = Evaluator(c, mesh, task.frozen(mesh))
    trained = train(c, folder, evaluator)
    model = model_record(folder, trained.step, trained.params)
    evaluated = evaluator.of_run(c, trained.params, folder, model)
    save_evaluation(
        folder, trained.step, evaluated.metrics, evaluated.protocol, evaluated.reference
    )
    timesteps = sampling_of(c, task).timesteps
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
            "steps": 0 if timesteps is None else len(timesteps),  # 0: adaptive
            "eta": c.sample.eta,
            "cfg_scale": c.sample.cfg_scale,
            "cfg_channels": c.sample.cfg_channels,
            "seed": c.evaluate.seed,
            "seconds": round(evaluated.seconds, 2),
        },
        "metrics": evaluated.metrics,
        "protocol": evaluated.protocol,
        "protocol_hash": atomic.protocol_hash(evaluated.protocol),
        "environment": environment(os.environ.get(_COMMAND) or _typed_command(sys.argv[1:])),
        "config": cell.recipe,
    }
    if task.cost and task.cost.passes != 3:
        result["train"]["passes"] = task.cost.passes
    if cell.published:
        result["published"] = cell.published
    if is_primary():
        results.write_result(folder, result)


def _is_done(cell: Cell, folder: Path) -> bool:
    done = is_primary() and has_result(cell, folder)
    return bool(processes.broadcast_ranges([(0, 1)] if done else []))


def has_result(cell: Cell, folder: Path) -> bool:
    """Return whether the cell has a sound result. Logs a damaged one, which is then made again.

    Raises UserError for a result of another recipe.
    """
    if not faults.exists(folder / results.RESULT_FILE):
        return False
    try:
        found = results.read_result(folder)
    except UserError as error:
        print(one_line(f"{error} The cell is run again."), file=sys.stderr, flush=True)
        return False
    check_result(cell, folder, found)
    return True


# For the processes of cells: the command as typed, and the cell's name.
_COMMAND, _CELL = "DITJAX_SWEEP_COMMAND", "DITJAX_SWEEP_CELL"


def _typed_command(argv: Sequence[str]) -> str:
    """Return the command as typed, without the flags that name machines."""
    machine_flags = ("--coordinator", "--processes", "--process")
    return typed("sweep", argv, drop=machine_flags, folders=("--workdir",))


class _Job(NamedTuple):
    """A cell's process and the CPU cores it runs on."""

    cell: Cell
    process: subprocess.Popen[bytes]
    cpus: frozenset[int]


def run_cells(
    study: list[Cell], workdir: Path, argv: list[str], jobs: int, command: str = ""
) -> list[Cell]:
    """Run the cells that have no result, `jobs` processes at a time. Returns those that failed.

    `argv` holds the recipe and --workdir, `command` what the user typed. The most expensive cells
    start first, so that the last ones to finish are small. On CPUs each job stays on its share of
    the cores: small networks gain more from that than from threads.
    """
    left = [cell for cell in study if not _needs_no_process(cell, workdir)]
    if len(left) < len(study):
        print(f"{len(study) - len(left)} of {len(study)} cells are already done", file=sys.stderr)
    waiting = by_work(left)
    ours = cores()
    jobs = max(1, min(jobs, len(waiting)))
    free = [frozenset(ours[i::jobs]) for i in range(jobs)]
    running: list[_Job] = []
    failed: list[Cell] = []
    total = sum(cell.training_gflops for cell in study)
    done = total - sum(cell.training_gflops for cell in left)
    progress = Progress("sweep", 100, "% of the work", every_seconds=PROGRESS_EVERY)
    began = reported = time.monotonic()
    logs = Mirror(workdir) if is_object(workdir) else None
    try:
        while waiting or running:
            while waiting and free:
                running.append(_start(waiting.pop(0), workdir, argv, free.pop(), command, logs))
            time.sleep(0.5)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                free.append(job.cpus)
                done += job.cell.training_gflops
                _ship(logs)
                if not _log_end(job, workdir, time.monotonic() - began):
                    failed.append(job.cell)
            # Each question costs a store several requests.
            if logs is None or time.monotonic() - reported > PROGRESS_EVERY:
                share = done + sum(_progress(job, workdir) for job in running)
                progress.report(min(99.0, 100 * share / total))
                reported = time.monotonic()
    finally:
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()
            _record_end(job, workdir, status.STOPPED, "the sweep was stopped")
        if logs:
            with contextlib.suppress(OSError):  # of a store that does not answer
                logs.close()
    progress.report(100)
    return failed


def _needs_no_process(cell: Cell, workdir: Path) -> bool:
    """Return whether a cell is done. If its result is wrong, its own process reports the error."""
    try:
        return has_result(cell, workdir / rundir.RUNS / cell.name)
    except UserError:
        return False


def _start(
    cell: Cell,
    workdir: Path,
    argv: list[str],
    cpus: frozenset[int],
    typed_command: str,
    logs: Mirror | None,
) -> _Job:
    """Start the process of a cell on some CPU cores."""
    folder = rundir.inside(workdir / rundir.RUNS, cell.name)
    try:
        status.clear_ending(folder)
        log = _open_log(folder, logs)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}.") from None
    command = [sys.executable, "-m", "ditjax.sweep", *argv, f"--index={cell.number}"]
    env = {**os.environ, _COMMAND: typed_command, _CELL: cell.name}
    ours = cores()
    try:
        # A child inherits the cores; setting them after a fork is unsafe with JAX's threads.
        if cpus:
            os.sched_setaffinity(0, cpus)
        with log:
            # Nothing is written to its stdin, which closes when this process ends, however it ends.
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env
            )
    finally:
        if cpus:
            os.sched_setaffinity(0, ours)
    return _Job(cell, process, cpus)


def _open_log(folder: Path, logs: Mirror | None) -> IO[bytes]:
    """Open a cell's log to add to it; on a store, a file of this machine that is copied there."""
    path = folder / rundir.LOG_FILE
    if logs:
        before = path.read_bytes() if path.exists() else b""
        path = logs.local / rundir.RUNS / folder.name / rundir.LOG_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    if logs and not path.exists():
        path.write_bytes(before)
    return path.open("ab")


def _ship(logs: Mirror | None) -> None:
    """Copy to a store what cells have logged; a failure is tried again later."""
    if logs:
        with contextlib.suppress(OSError):
            logs.ship()


def _progress(job: _Job, workdir: Path) -> float:
    """Return the training Gflops that a running cell has done."""
    step = last_metrics(workdir / rundir.RUNS / job.cell.name).get("step", 0)
    share = step / job.cell.config.train.steps
    return job.cell.training_gflops * 0.9 * share  # the rest is evaluation


def _log_end(job: _Job, workdir: Path, seconds: float) -> bool:
    """Log the end of a cell's process in one line. Returns whether the cell has its result."""
    folder, code, found = workdir / rundir.RUNS / job.cell.name, job.process.returncode, None
    if job.process.stdin:
        job.process.stdin.close()
    with contextlib.suppress(UserError, FaultError):
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
        _record_end(
            job, workdir, status.FAILED if code else status.STOPPED, f"{how}; its log: {why}"
        )
    print(one_line(f"[{seconds:4.0f} s] {line}"), file=sys.stderr, flush=True)
    return found is not None


def _record_end(job: _Job, workdir: Path, how: str, line: str) -> None:
    """Record the end of a process that could not do so itself, such as a killed one."""
    folder = workdir / rundir.RUNS / job.cell.name
    if (folder / results.RESULT_FILE).exists() or status.read_ending(folder):
        return
    if not lease.holders([folder / lease.FILE], 0.0):  # no other process works on it
        status.record_ending(folder, how, line)


def _exit_with_parent() -> None:
    """End this cell's process, as a SIGTERM would, when the sweep that started it is gone."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        print("the sweep of this cell is gone: the cell stops", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="sweep", daemon=True).start()


def _parser() -> cli.Parser:
    parser = cli.parser(
        "sweep", "Train and evaluate every cell of a study, then report. --status shows its state."
    )
    parser.add_argument("--workdir", required=True, help="the study's directory")
    parser.add_argument("--index", type=int, help="run this cell only (array jobs); no report")
    parser.add_argument("--jobs", type=int, default=1, help="cells to run at a time (default 1)")
    parser.add_argument("--models", default="", help="only cells of these models, such as S/8,B/4")
    parser.add_argument("--cells", default="", help="only cells with these numbers, such as 0,3-5")
    parser.add_argument(
        "--shard",
        default="",
        metavar="K/N",
        help="only share K of N equal shares of the work, counted from 0: one per machine",
    )
    parser.add_argument("--failed", action="store_true", help="only cells that have failed")
    parser.add_argument("--dry_run", action="store_true", help="list the cells and their cost")
    parser.add_argument(
        "--print_commands",
        action="store_true",
        help="print the command of each cell that is not done, the most work first, for a queue",
    )
    parser.add_argument(
        "--topology",
        default="",
        help="with --dry_run: estimate hours on CHIP:SHAPE, as v5e:4x4 (config.sweep.topology)",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="with --dry_run: compile each cell's train step for --topology",
    )
    parser.add_argument(
        "--status",
        action="store_true",
        help="print the state of each cell; changes nothing and needs no --config",
    )
    parser.add_argument(
        "--watch",
        type=float,
        metavar="SECONDS",
        help="with --status: repeat every SECONDS until all cells are done",
    )
    parser.add_argument(
        "--ladder",
        type=float,
        metavar="GFLOPS",
        help="train the next, larger run of that many training Gflops; its score is predicted by"
        " the study's law and written down first (with --dry_run: only printed)",
    )
    cli.add_processes(parser)
    return parser


_LISTINGS = ("dry_run", "status", "print_commands")  # flags with which nothing is run


def _check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for flags that exclude each other."""
    if (args.distributed or args.coordinator) and args.index is None:
        raise UserError(
            "--distributed and --coordinator train one cell in several processes: add --index=K."
        )
    if args.jobs < 1:
        raise UserError(f"--jobs={args.jobs}: expected at least 1.")
    given = [name for name in (*SELECTION, *_LISTINGS) if getattr(args, name)]
    if args.index is not None and given:
        raise UserError(f"--index={args.index} runs one cell: leave --{given[0]} out.")
    if args.index is not None and args.jobs > 1:
        raise UserError(f"--index={args.index} runs one cell: leave --jobs out.")
    if args.ladder is not None:
        taken = [
            name for name in (*SELECTION, "status", "print_commands", "plan") if getattr(args, name)
        ]
        if taken or args.index is not None:
            raise UserError(
                f"--ladder={args.ladder:g} trains one run: leave --{(taken or ['index'])[0]} out."
            )
        if not 0 < args.ladder < float("inf"):
            raise UserError(f"--ladder={args.ladder:g}: expected training Gflops, as in a report.")
        return
    listings = [f"--{name}" for name in _LISTINGS if getattr(args, name)]
    if len(listings) > 1:
        raise UserError(f"{' and '.join(listings)} exclude each other: give one of them.")
    if (args.topology or args.plan) and not args.dry_run:
        raise UserError("--topology and --plan estimate the cost of a study: add --dry_run.")
    if args.watch is not None and not (args.status and 1 <= args.watch <= 86_400):
        raise UserError(
            f"--watch={args.watch:g}: expected 1 to 86400 seconds, together with --status."
        )


def _parse(argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """Parse flags and recipe; --status alone reads the recipe of a study that has begun."""
    parser = _parser()
    early, _ = parser.parse_known_args(argv)
    _check_flags(early)
    if early.status and not any(word.startswith("--config=") for word in argv):
        if not (place(early.workdir) / rundir.RECIPE_FILE).exists():
            raise UserError(
                f"{early.workdir} holds no study that has begun: give another --workdir, or the"
                " study's --config=FILE as well."
            )
        parser.set_defaults(reads_run=True)
    return cli.parse(parser, argv)


def main(argv: list[str]) -> int:
    """Run the command: return 0 if no cell failed, 1 otherwise. Raises UserError."""
    args, config = _parse(argv)
    workdir = place(args.workdir)
    study = cells(args.recipe)
    if args.index is not None and not 0 <= args.index < len(study):
        raise UserError(f"--index={args.index}: the study has cells 0 to {len(study) - 1}.")
    _check_study(workdir, args.recipe, study)
    words = [word for word in argv if word.startswith("--config")]
    words.append(f"--workdir={workdir}")

    def begin() -> None:
        rundir.open_study(
            workdir, args.recipe, study_record(args.recipe, study, _typed_command(words))
        )

    if args.index is not None:
        if started := _COMMAND in os.environ:
            _exit_with_parent()
        _check_cell(study[args.index])
        run_cell(study[args.index], workdir, waits=started, begin=None if started else begin)
        return 0
    selected = select_cells(study, args.models, args.cells, args.shard)
    if args.ladder is not None:
        return _climb(workdir, args.ladder, args.topology or config.sweep.topology, args.dry_run)
    if args.status:
        return _print_status(selected, workdir, args.failed, args.watch)
    states = status.read_states(selected, workdir)
    if args.failed:
        states = [each for each in states if each.stage == status.FAILED]
    if args.dry_run:
        _print_plan(states, args.topology or config.sweep.topology, compiled=args.plan)
        return 0
    if args.print_commands:
        left = by_work([each.cell for each in states if each.stage != status.DONE])
        for cell in left:
            print(typed("sweep", [*words, f"--index={cell.number}"]))
        return 0
    if args.failed and not states:
        print("no cell has failed")
        return 0
    with lease.scope(), stopping.raise_on_sigterm():  # run_cells passes SIGTERM on to its cells
        # Not opening.own: it would take the devices.
        lease.acquire(workdir / _lease_name(args), str(workdir))
        begin()
        status.record_failures(states, workdir)
        waiting = [each.cell for each in states]
        failed = run_cells(waiting, workdir, words, args.jobs, _typed_command(argv))
        summary = _write_report(workdir, failed)
    _print_end(workdir, summary, failed)
    return 1 if failed else 0


def _check_cell(cell: Cell) -> None:
    """Raise UserError if the recipe now has another cell in the place of the one to be run."""
    expected = os.environ.get(_CELL, cell.name)
    if expected != cell.name:
        raise UserError(
            f"the recipe was changed while its sweep ran: cell {cell.number} was {expected} and is"
            f" now {cell.name}. Start the sweep again; cells that are done are kept."
        )


def _climb(workdir: Path, budget: float, topology: str, dry_run: bool) -> int:
    """Plan the next rung, register what it is predicted to score, train it, and report."""
    from ditjax.reporting.analysis import of_any_length
    from ditjax.reporting.study import by_settings, default_metric, usable

    found, _ = results.find_results([workdir])
    metric = default_metric(found)
    hashes = [each.result["protocol_hash"] for each in found]
    most = max(hashes, key=hashes.count, default="")
    every = [e for e in found if e.result["protocol_hash"] == most and usable(e, metric)]
    if not every:
        raise UserError(f"{workdir} has no result to fit a law to: run the study first.")
    rung = ladder.next_rung(of_any_length(every, by_settings(every)[0][1]), metric, budget)
    print(rung.words)
    machine = None
    if topology:
        chips = machines.parse_topology(topology)
        cost = costs.estimate(rung.cell.config, chips)
        print(cost_text(chips.name, [rung.cell.name], [cost]))
        machine = {"topology": chips.name, **cost._asdict()}
    if dry_run:
        return 0
    with lease.scope(), stopping.raise_on_sigterm():
        lease.acquire(workdir / LEASE, str(workdir))
        print(f"registered: {ladder.register(workdir, rung, machine)}", flush=True)
    run_cell(rung.cell, workdir)
    print(_write_report(workdir, []))
    return 0


def _print_end(workdir: Path, summary: str, failed: Sequence[Cell]) -> None:
    """Print the report and the failed cells."""
    print(summary)
    for cell in failed:
        print(
            f"{cell.name} failed: see {workdir / rundir.RUNS / cell.name / rundir.LOG_FILE}",
            file=sys.stderr,
        )
    if failed:
        print("the same command with --failed runs only the failed cells", file=sys.stderr)


def _print_plan(states: Sequence[status.State], topology: str, *, compiled: bool) -> None:
    """Print the cells, and the cost of those that are not done on a topology, if one is named."""
    print(status.plan_text(states))
    left = [each.cell for each in states if each.stage != status.DONE]
    if text := _cost_text(left, topology, compiled=compiled):
        print(f"\n{text}")


def _cost_text(study: Sequence[Cell], name: str, *, compiled: bool) -> str:
    """Return the cost of cells on a topology; '' if no topology is named or no cell is left."""
    if compiled and not name:
        raise UserError("--plan compiles for a machine: name it with --topology=v5e:4x4.")
    if not name or not study:
        return ""
    topology = machines.parse_topology(name)
    of_cell = costs.compiled if compiled else costs.estimate
    found = [of_cell(cell.config, topology) for cell in study]
    return cost_text(topology.name, [cell.name for cell in study], found)


def _check_study(workdir: Path, recipe: Mapping[str, Any], study: Sequence[Cell]) -> None:
    """Raise UserError if the directory holds another study, or can hold no run."""
    check_can_hold(workdir)
    recorded: Mapping[str, Any] = {}
    if not rundir.is_run(workdir):
        with contextlib.suppress(UserError):  # none yet, or damaged and soon rewritten
            recorded = migrated(rundir.read_recipe(workdir))
    if recorded:
        check_same_study(workdir, recorded, recipe, study)


def _lease_name(args: argparse.Namespace) -> str:
    """Return the name of the sweep's lease: one for each selection of cells.

    So several machines can share a study; each cell has a lease of its own as well.
    """
    given = [f"{name}={getattr(args, name)}" for name in SELECTION if getattr(args, name)]
    if not given:
        return LEASE
    return f".sweep-{hashlib.sha256(' '.join(given).encode()).hexdigest()[:12]}.lease"


def _print_status(
    selected: Sequence[Cell], workdir: Path, failed: bool, every: float | None
) -> int:
    """Print the state of the cells, once or every `every` seconds until all are done."""
    redraws = every is not None and sys.stdout.isatty()
    while True:
        states = status.read_states(selected, workdir, waits=True)
        print("\x1b[H\x1b[2J" if redraws else "", end="")
        print(status.status_text(states, failed), flush=True)
        if every is None or all(each.stage == status.DONE for each in states):
            return 0
        time.sleep(every)
        print("" if redraws else "\n", end="")


def _write_report(workdir: Path, failed: Sequence[Cell]) -> str:
    """Write the report of all results. Returns its text, or the error if every cell failed."""
    # matplotlib takes seconds to import, and the processes of the cells draw nothing.
    from ditjax.report import make_report

    try:
        return make_report([workdir], workdir / "report").text
    except UserError as error:
        if not failed:
            raise
        return str(error)


if __name__ == "__main__":
    cli.run(main)
