"""python -m ditjax.sweep: the grid of a recipe: train, evaluate, one result.json a run, report."""

import contextlib
import copy
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ditjax import build, cli, runs
from ditjax.config import Config, completed, read
from ditjax.errors import UserError
from ditjax.evaluate import model_record, save
from ditjax.evaluation import Evaluator
from ditjax.io import lease, results, rundir
from ditjax.io.checkpoint import is_primary
from ditjax.io.log import Progress, last_metrics
from ditjax.masking import masked, printable
from ditjax.parallel import processes, stopping
from ditjax.provenance import cores, environment
from ditjax.report import make_report
from ditjax.reporting.words import OF_A_METRIC
from ditjax.scaling.counts import forward_macs, gflops, trainable_parameters
from ditjax.sizes import parse_size
from ditjax.train import train

RUNS = "runs"
LEASE = ".sweep.lease"  # of the study: an array job's cells are each their own
ORPHAN_SECONDS = 60.0  # for a cell to save what it has when its sweep is gone


class Cell(NamedTuple):
    """One run of the grid: its name is its directory below WORKDIR/runs."""

    number: int
    name: str
    recipe: dict[str, Any]
    config: Config

    @property
    def work(self) -> float:
        """Multiply-accumulates of its training: what schedules and estimates go by."""
        return float(forward_macs(build.cost(self.config))) * self.config.train.steps


def cells(recipe: Mapping[str, Any]) -> list[Cell]:
    """The grid of a recipe, in the order of its axes, the last varying fastest; all checked.

    Raises UserError for an empty grid, an illegal cell, or two cells of one name.
    """
    grid = read(recipe).sweep.grid
    if not grid:
        raise UserError("config.sweep.grid is empty: this recipe is one run; use ditjax.train.")
    made = []
    for index, values in enumerate(itertools.product(*(axis for _, axis in grid))):
        cell = copy.deepcopy(dict(recipe))
        for (key, _), value in zip(grid, values, strict=True):
            *groups, leaf = key.split(".")
            node = cell
            for group in groups:
                node = node[group]
            node[leaf] = value
        cell["sweep"] = {"grid": ()}
        try:
            config = read(cell)
            build.check(config)
        except UserError as error:
            named = ", ".join(f"{k}={v!r}" for (k, _), v in zip(grid, values, strict=True))
            raise UserError(f"cell {index} of the grid ({named}): {error}") from None
        made.append(Cell(index, _name(grid, values, config), cell, config))
    names = [cell.name for cell in made]
    if len(set(names)) != len(names):
        raise UserError("two cells of the grid have one name: remove the axis that repeats.")
    return made


def _name(grid: Sequence[tuple[str, Any]], values: Sequence[Any], c: Config) -> str:
    """DiT-4x96x3-p1-seed0, and the other axes as key_value: a legal directory name."""
    name = f"DiT-{c.model.size}-p{c.model.patch}-seed{c.seed}"
    for (key, _), value in zip(grid, values, strict=True):
        if key not in ("model.size", "model.patch", "seed"):
            name += f"-{key.rpartition('.')[2]}_{value}"
    return rundir.legal_name(name)


@lease.scope()
def run_cell(cell: Cell, workdir: Path, *, waits: bool = False) -> None:
    """Trains and evaluates one cell; a cell that has its result is left as it is.

    Raises UserError where another process is at it: with `waits` its end is waited for.
    """
    folder = rundir.inside(workdir / RUNS, cell.name)
    if _is_done(cell, folder):
        return
    runs.own(folder, waits=waits)
    if _is_done(cell, folder):
        return
    c = cell.config
    mesh = build.mesh(c)
    evaluator = Evaluator(c, mesh, runs.load_autoencoder(c, mesh))
    trained = train(c, cell.recipe, folder, evaluator)
    model = model_record(folder, trained.step, trained.params)
    evaluated = evaluator.of_run(c, trained.params, folder, model)
    save(folder, trained.step, evaluated.metrics, evaluated.protocol, evaluated.reference)
    size, shape = parse_size(c.model.size), build.cost(c)
    result: results.Result = {
        "schema": 1,
        "run": cell.name,
        "model": {
            "name": f"DiT-{c.model.size}/{c.model.patch}",
            "size": c.model.size,
            "depth": size.depth,
            "width": size.width,
            "heads": size.heads,
            "patch": c.model.patch,
            "block": c.model.block,
            "tokens": shape.tokens,
        },
        "params": trainable_parameters(shape),
        "gflops": gflops(shape),
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
            "steps": len(build.sampling_schedule(c)),
            "eta": c.sample.eta,
            "cfg_scale": c.sample.cfg_scale,
            "cfg_channels": c.sample.cfg_channels,
            "seed": c.evaluate.seed,
            "seconds": round(evaluated.seconds, 2),
        },
        "metrics": evaluated.metrics,
        "protocol": evaluated.protocol,
        "protocol_hash": results.protocol_hash(evaluated.protocol),
        "environment": environment(
            os.environ.get(_COMMAND, masked(" ".join(["python -m ditjax.sweep", *sys.argv[1:]])))
        ),
        "config": cell.recipe,
    }
    if is_primary():
        results.write_result(folder, result)


def _is_done(cell: Cell, folder: Path) -> bool:
    done = is_primary() and has_result(cell, folder)
    return bool(processes.agreed([(0, 1)] if done else []))


def has_result(cell: Cell, folder: Path) -> bool:
    """Whether the cell's result is there, whole; a damaged one is told of, and made again.

    Raises UserError for the result of another recipe.
    """
    if not (folder / results.RESULT_FILE).exists():
        return False
    try:
        found = results.read_result(folder)
    except UserError as error:
        print(printable(f"{error} It is made again."), file=sys.stderr, flush=True)
        return False
    rundir.check_same(folder, completed(found["config"]), cell.recipe)
    return True


_COMMAND = "DITJAX_SWEEP_COMMAND"  # the command that a person typed, told to the cells it started


class _Running(NamedTuple):
    cell: Cell
    process: subprocess.Popen[bytes]
    cpus: frozenset[int]


def run_grid(grid: list[Cell], workdir: Path, argv: list[str], jobs: int) -> list[Cell]:
    """Runs the cells without a result, `jobs` processes at once; returns those that failed.

    The dearest start first, so that the last to finish is small. On CPUs each job keeps to its
    share of the cores: small networks gain more from that than from threads.
    """
    left = [cell for cell in grid if not _is_left_alone(cell, workdir)]
    if len(left) < len(grid):
        print(f"{len(grid) - len(left)} of {len(grid)} cells are done already", file=sys.stderr)
    waiting = sorted(left, key=lambda cell: -cell.work)
    ours = cores()
    jobs = max(1, min(jobs, len(waiting)))
    free = [frozenset(ours[i::jobs]) for i in range(jobs)]
    running: list[_Running] = []
    failed: list[Cell] = []
    total = sum(cell.work for cell in grid)
    done = total - sum(cell.work for cell in left)
    progress = Progress("sweep", 100, "% of the work", every_seconds=20.0)
    began = time.monotonic()
    try:
        while waiting or running:
            while waiting and free:
                running.append(_start(waiting.pop(0), workdir, argv, free.pop()))
            time.sleep(0.5)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                free.append(job.cpus)
                done += job.cell.work
                if not _tell(job, workdir, time.monotonic() - began):
                    failed.append(job.cell)
            share = done + sum(_progress(job, workdir) for job in running)
            progress.report(min(99.0, 100 * share / total))
    finally:
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()
    progress.report(100)
    return failed


def _is_left_alone(cell: Cell, workdir: Path) -> bool:
    """Whether it needs no process; what is wrong with it is told by its own."""
    try:
        return has_result(cell, workdir / RUNS / cell.name)
    except UserError:
        return False


def _start(cell: Cell, workdir: Path, argv: list[str], cpus: frozenset[int]) -> _Running:
    folder = rundir.inside(workdir / RUNS, cell.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / rundir.LOG_FILE).open("ab")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}.") from None
    command = [sys.executable, "-m", "ditjax.sweep", *argv, f"--index={cell.number}"]
    env = {**os.environ, _COMMAND: masked(" ".join(["python -m ditjax.sweep", *argv]))}
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
    step = last_metrics(workdir / RUNS / job.cell.name).get("step", 0)
    return job.cell.work * 0.9 * step / job.cell.config.train.steps  # the rest is evaluation


def _tell(job: _Running, workdir: Path, seconds: float) -> bool:
    """One line of a cell that has ended. Returns whether it has its result."""
    folder, status, found = workdir / RUNS / job.cell.name, job.process.returncode, None
    if job.process.stdin:
        job.process.stdin.close()
    with contextlib.suppress(UserError):
        found = None if status else results.read_result(folder)
    if found:
        figures = ", ".join(
            f"{name} {value:.3g}"
            for name, value in found["metrics"].items()
            if not name.endswith(OF_A_METRIC)
        )
        line = f"{job.cell.name} done: {figures}"
    else:
        text = ""
        with contextlib.suppress(OSError):
            text = (folder / rundir.LOG_FILE).read_text(encoding="utf-8", errors="replace").strip()
        why = text.splitlines()[-1] if text else "it printed nothing"
        ended = f"FAILED (status {status})" if status else "stopped before its end"
        line = f"{job.cell.name} {ended}: {why}"
    print(printable(f"[{seconds:4.0f} s] {line}"), file=sys.stderr, flush=True)
    return found is not None


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


def main(argv: list[str]) -> int:
    """The command."""
    parser = cli.parser("sweep", "Trains and evaluates every cell of a grid, then reports.")
    parser.add_argument("--workdir", required=True, help="the study's directory")
    parser.add_argument("--index", type=int, help="run this cell only (array jobs); no report")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once (default 1)")
    parser.add_argument("--dry_run", action="store_true", help="list the cells and their cost")
    cli.add_processes(parser)
    early, _ = parser.parse_known_args(argv)
    if (early.distributed or early.coordinator) and early.index is None:
        raise UserError(
            "several processes train one cell: give its --index=K, and start each cell so."
        )
    args, _ = cli.parse(parser, argv)
    workdir = Path(args.workdir)
    grid = cells(args.recipe)
    if args.jobs < 1:
        raise UserError(f"--jobs={args.jobs}: expected at least 1.")
    if args.index is not None:
        if not 0 <= args.index < len(grid):
            raise UserError(f"--index={args.index}: the grid has cells 0 to {len(grid) - 1}.")
        if started := _COMMAND in os.environ:
            _end_with_the_sweep()
        run_cell(grid[args.index], workdir, waits=started)
        return 0
    if args.dry_run:
        print(f"{'cell':>4} {'run':<28} {'parameters':>12} {'Gflops':>10} {'training MACs':>14}")
        for cell in grid:
            shape = build.cost(cell.config)
            print(
                f"{cell.number:>4} {cell.name:<28} {trainable_parameters(shape):>12,}"
                f" {gflops(shape):>10.4g} {3 * cell.work * cell.config.train.batch_size:>14.3g}"
            )
        return 0
    with lease.scope(), stopping.raised():  # run_grid passes SIGTERM on to its cells
        lease.own(workdir / LEASE, str(workdir))  # no runs.own: that takes the devices
        rundir.open_study(workdir, args.recipe)
        failed = run_grid(grid, workdir, argv, args.jobs)
        summary = make_report([workdir / RUNS], workdir / "report")
    print(summary.text)
    for cell in failed:
        print(
            f"{cell.name} failed: see {workdir / RUNS / cell.name / rundir.LOG_FILE}; the same"
            f" command runs it again, alone: --index={cell.number}",
            file=sys.stderr,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
