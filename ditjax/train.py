"""python -m ditjax.train: train one network. The same command again resumes the run."""

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
from clu import parameter_overview
from jax.sharding import Mesh

from ditjax import cli
from ditjax.config import Config, as_tree, replaced
from ditjax.config import Train as TrainKeys
from ditjax.data import stream
from ditjax.data.prefetch import ahead
from ditjax.errors import StoppedError, UserError
from ditjax.evaluation.evaluator import Evaluator
from ditjax.files import lease
from ditjax.files.atomic import protocol_hash, write_json
from ditjax.files.store import Mirror, is_object
from ditjax.parallel.mesh import mesh_of
from ditjax.parallel.processes import is_primary
from ditjax.parallel.stopping import RESUME_HINT, Stopping
from ditjax.runs import opening, rundir
from ditjax.runs import snapshots as averages
from ditjax.runs.checkpoint import Checkpoints, Score
from ditjax.runs.log import MetricsLog, Progress
from ditjax.runs.results import save_grid, tile
from ditjax.runs.trackers import check_tracker, open_tracker
from ditjax.sampling.draw import Drawer
from ditjax.sampling.given import held_out_given
from ditjax.studies.measured import BesideSeeds, shipped_beside
from ditjax.tasks import make_task, resolved
from ditjax.training.meter import Meter
from ditjax.training.program import Training, learning_rate_of, precise, training
from ditjax.training.step import WEIGHTS, Batch, Metrics, TrainState, weights_named
from ditjax.training.task import Frozen, Task

IN_FLIGHT = 2  # dispatched steps that the devices have not done yet; more would only hold batches
GRID_SIDE = 8  # sample grids during training have 8 x 8 images
PROFILE = "profile"
EVALUATION_SECONDS = "eval/seconds"  # of all evaluations so far; training time excludes them


class Trained(NamedTuple):
    """The result of a finished training. `loss` is the mean over the last logged interval."""

    params: Any  # selected by config.sample.weights: the average (EMA) by default
    step: int
    loss: float
    seconds: float  # of training without evaluations, including the calls before a resume
    skipped: int = 0  # skipped steps, including those of calls before a resume


class Due(NamedTuple):
    """What to do after a step's update."""

    evaluates: bool
    logs: bool
    saves: bool
    draws: bool
    averages: bool  # a snapshot of the averages


def due_at(t: TrainKeys, step: int, *, evaluates: bool, draws: bool, stopped: bool) -> Due:
    """Return what is due after a step by the recipe's intervals.

    The last step is always logged and saved, as are its averages. `evaluates` and `draws` say
    whether the run can evaluate or draw samples at all; `stopped` says whether a signal ends the
    run at this step.
    """
    last = step == t.steps
    scores = evaluates and _every(step, t.evaluate_every_steps)
    return Due(
        evaluates=scores,
        logs=last or scores or _every(step, t.log_every_steps),
        saves=last or scores or stopped or _every(step, t.checkpoint_every_steps),
        draws=draws and _every(step, t.sample_every_steps),
        averages=bool(t.average_stds) and (last or _every(step, t.average_every_steps)),
    )


def _every(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


@dataclasses.dataclass
class Session:
    """A training in progress: its programs, its state and its outputs."""

    config: Config
    folder: Path
    programs: Training
    frozen: Frozen
    state: TrainState
    start: int  # the restored step; 0 for a new run
    batches: Iterator[Batch]
    checkpoints: Checkpoints
    snapshots: Checkpoints | None  # of power-function averages
    log: MetricsLog
    meter: Meter
    progress: Progress
    profile: "_Profile"
    evaluator: Evaluator | None
    beside: BesideSeeds | None  # a measured study of this recipe
    grids: "_Grids | None"
    began: float  # monotonic time of the start, shifted by earlier calls and evaluations
    evaluation_seconds: float
    loss: float  # mean over the last logged interval

    def after(self, step: int, metrics: Metrics, *, stopped: bool) -> None:
        """Do what is due after a step. Raises UserError after too many bad steps in a row."""
        due = due_at(
            self.config.train,
            step,
            evaluates=self.evaluator is not None,
            draws=self.grids is not None,
            stopped=stopped,
        )
        ends = self.meter.add(step, metrics, wait=due.logs or due.saves or due.averages)
        score = None
        if due.logs or ends:
            score = self.write_log(step, evaluates=due.evaluates and not ends)
        if self.snapshots and due.averages:
            lease.check_held()
            averages.save_snapshot(self.snapshots, step, self.state)
        # If a resumed run ends for the same reason again, its checkpoints are left unchanged.
        if self.meter.changed if ends else due.saves:
            self.save(step, score)
        if ends:
            self.checkpoints.wait()
            raise self.meter.error(self.checkpoints.latest_step)
        if self.grids and due.draws:
            self.grids.save(weights_of(self.config, self.state), step, self.folder, self.log)

    def write_log(self, step: int, *, evaluates: bool) -> Score | None:
        """Write one line of the log. Of two lines with the same step, the later one counts."""
        row = self.meter.row()
        self.loss = row.get("loss", self.loss)
        # The optimizer counts updates: a skipped step does not move the schedule on.
        updates = max(step - self.meter.total - 1, 0)
        row["learning_rate"] = float(learning_rate_of(self.config)(updates))
        row["seconds"] = round(self.seconds, 3)
        score = None
        if self.evaluator and evaluates:
            paused = time.monotonic()
            params = weights_of(self.config, self.state)
            score, found = _evaluate(self.config, self.evaluator, params)
            took = time.monotonic() - paused
            self.began += took
            self.evaluation_seconds += took
            row |= {**found, EVALUATION_SECONDS: round(self.evaluation_seconds, 3)}
            if self.beside:
                names = (score.name, "val_loss")
                values = {n: found[f"eval/{n}"] for n in names if f"eval/{n}" in found}
                for line in self.beside.lines(step, values, score.protocol):
                    self.progress.print_line(line)
        self.log.scalars(step, row)
        scored = {score.name: score.value} if score else {}
        self.progress.report(step, loss=self.loss, **scored)
        self.checkpoints.check()
        if self.snapshots:
            self.snapshots.check()
        return score

    def save(self, step: int, score: Score | None) -> None:
        """Save a checkpoint of the state and of the position in the data."""
        lease.check_held()
        self.log.sync()  # a run that resumes at this step has every line up to it
        if self.snapshots:  # a run that resumes at this step has every snapshot up to it
            self.snapshots.wait()
        position = {**position_of(self.config), **self.meter.position()}
        self.checkpoints.save(step, self.state, position, score)
        self.meter.changed = False

    @property
    def seconds(self) -> float:
        """Seconds of training so far, without evaluations."""
        return time.monotonic() - self.began


@contextlib.contextmanager
def open_training(
    c: Config, workdir: str | os.PathLike[str], evaluator: Evaluator | None, profile: range
) -> Iterator[Session]:
    """Open or resume the run in a directory, with everything that the training loop needs."""
    _check_weights(c)
    check_tracker(c.train.tracker)
    mesh = mesh_of(c)
    task = make_task(c, mesh)
    dataset = opening.check_data(c)
    rows = task.open_rows()
    draws = task.sampling is not None
    drawn = draws and (c.train.sample_every_steps or c.train.evaluate_every_steps)
    frozen = task.frozen(mesh) if drawn or task.reads else {}
    drawer = Drawer(mesh, frozen)
    if c.train.evaluate_every_steps and evaluator is None:
        evaluator = Evaluator(c, mesh, frozen, drawer)
    folder = opening.open_run(workdir, c, frozen, dataset.class_names, rows.contents)
    if is_primary():
        rundir.tidy(folder)
    programs = training(c, task, mesh)
    with Checkpoints(
        folder / rundir.CHECKPOINTS, c.train.keep_checkpoints, keep_every=c.train.keep_every_steps
    ) as checkpoints:
        state, start, saved = _restore_or_init(c, folder, task, programs, checkpoints, mesh)
        _check_profile(profile, start)
        tracker = open_tracker(c.train.tracker, folder, as_tree(c)) if is_primary() else None
        with (
            _snapshots(c, folder, start) as snapshots,
            MetricsLog(folder, start, write=is_primary(), tracker=tracker) as log,
            _open_batches(c, folder, programs, start) as batches,
            _Profile(profile, folder / PROFILE) as profiled,
        ):
            progress = Progress("train", c.train.steps, start=start)
            meter = _open_meter(c, dataset.num_examples, progress, start, saved)
            if start == c.train.steps and meter.ended:
                raise meter.error(start)
            yield Session(
                config=c,
                folder=folder,
                programs=programs,
                frozen=frozen,
                state=state,
                start=start,
                batches=ahead(
                    map(rows.add, batches), programs.put, c.train.prefetch, c.train.steps - start
                ),
                checkpoints=checkpoints,
                snapshots=snapshots,
                log=log,
                meter=meter,
                progress=progress,
                profile=profiled,
                evaluator=evaluator,
                beside=shipped_beside(c) if evaluator else None,
                grids=_Grids(c, drawer) if draws else None,
                began=time.monotonic() - log.last.get("seconds", 0.0),
                evaluation_seconds=log.last.get(EVALUATION_SECONDS, 0.0),
                loss=log.last.get("loss", float("nan")),
            )


def _open_meter(
    c: Config, num_examples: int, progress: Progress, start: int, saved: Mapping[str, Any]
) -> Meter:
    """Return the meter of a run that begins or resumes at step `start`."""
    return Meter(
        # A run that skips every step has trained nothing.
        min(c.train.max_bad_steps, c.train.steps - 1),
        lambda step: stream.records_of_step(c.seed, step, c.train.batch_size, num_examples),
        progress.print_line,
        in_flight=IN_FLIGHT,
        start=start,
        position=saved,
    )


def _restore_or_init(
    c: Config, folder: Path, task: Task, programs: Training, checkpoints: Checkpoints, mesh: Mesh
) -> tuple[TrainState, int, Mapping[str, Any]]:
    """Return (state, step, position in the data) of the newest sound checkpoint or a new run."""
    newest = opening.restore_newest(checkpoints, programs.abstract_state)
    if newest is None:
        state = _init(folder, task, programs, mesh)
        if is_primary():
            (folder / "parameters.txt").write_text(_overview(state.params), encoding="utf-8")
        return state, 0, {}
    state, saved = newest
    for key, value in position_of(c).items():
        if saved.get(key) != value:
            raise UserError(
                f"the checkpoint in {folder} has {key}={saved.get(key)!r}, this command has"
                f" {value!r}: give another --workdir."
            )
    start = int(state.step)
    if start > c.train.steps:
        raise UserError(
            f"config.train.steps is {c.train.steps}, and the run in {folder} has done {start}:"
            " give at least as many, or another --workdir."
        )
    return state, start, saved


def _open_batches(c: Config, folder: Path, programs: Training, start: int) -> stream.Batches:
    """Open this process's batches from a step on; damaged records are listed in the run."""
    return stream.train_batches(
        opening.data_spec(c),
        c.seed,
        c.train.batch_size,
        start_step=start,
        rows=programs.rows,
        warn=stream.record_warnings(folder / stream.DAMAGED_FILE),
    )


@contextlib.contextmanager
def _snapshots(c: Config, folder: Path, start: int) -> Iterator[Checkpoints | None]:
    """Open the snapshots of a run that keeps power-function averages, as they were at `start`."""
    if not c.train.average_stds:
        yield None
        return
    with averages.open_snapshots(folder) as snapshots:
        averages.rewind_snapshots(snapshots, start)
        yield snapshots


def _init(folder: Path, task: Task, programs: Training, mesh: Mesh) -> TrainState:
    """Return the state at step 0; what it starts from is printed and recorded."""
    if task.start is None:
        return programs.init()
    start = task.start(mesh)
    if is_primary():
        print("\n".join(start.lines), file=sys.stderr, flush=True)
        write_json(folder / rundir.START_FILE, start.record)
    return programs.init(start.params)


def position_of(c: Config) -> dict[str, Any]:
    """Return the keys that, with a step's number, determine its records."""
    return {"seed": c.seed, "batch_size": c.train.batch_size}


@lease.scope()
def train(
    c: Config,
    workdir: str | os.PathLike[str],
    evaluator: Evaluator | None = None,
    profile: range = range(0),
) -> Trained:
    """Train to config.train.steps in a run directory, from the newest checkpoint if there is one.

    The network is evaluated every config.train.evaluate_every_steps, by `evaluator` or by a new
    one. The steps of `profile` are traced into the directory's `profile` folder.

    On SIGTERM or SIGINT the run saves a checkpoint after the step in flight and raises
    StoppedError; if there are several processes, all of them stop after the same step. Raises
    UserError for steps of `profile` that the run does not take.
    """
    if profile and profile[-1] > c.train.steps:
        raise UserError(
            f"--profile_steps={profile[0]}:{profile[-1]}: the run ends at step {c.train.steps}:"
            " name steps up to it, or raise config.train.steps."
        )
    c = resolved(c, workdir)
    with (
        Stopping(c.train.grace_seconds) as stopping,
        open_training(c, workdir, evaluator, profile) as s,
        precise(c),
    ):
        p = s.programs
        signal, step = stopping.after(s.start), s.start
        for step, batch in enumerate(() if signal else s.batches, s.start + 1):
            compiles = step == s.start + 1
            with s.profile.step(step, s.state), p.compiling(compiles):
                examples = p.prepare(s.frozen, batch, s.state.step)
                s.state, metrics = p.step(s.state, s.frozen, examples)
            s.profile.after(step, s.state)
            signal = stopping.after(step)
            s.after(step, metrics, stopped=bool(signal))
            if signal:
                break
        jax.block_until_ready(s.state)
        trained = Trained(
            weights_of(c, s.state), int(s.state.step), s.loss, s.seconds, s.meter.total
        )
        # A signal after the last step counts, too: the caller need not start what comes next.
        if signal := signal or (stopping.after(step) if step == c.train.steps else ""):
            raise StoppedError(f"stopped at step {step} by {signal}: {RESUME_HINT}")
    return trained


def weights_of(c: Config, state: TrainState) -> Any:
    """Return the weights that samples are drawn with, selected by config.sample.weights."""
    return weights_named(state, opening.weights_name(c))


def _check_weights(c: Config) -> None:
    """Raise UserError for weights that the training state does not hold."""
    name, held = opening.weights_name(c), (*WEIGHTS, *c.train.averages)
    if name not in held:
        raise UserError(
            f"config.sample.weights is {name!r}, which is made of a run's snapshots: train with"
            f" {', '.join(map(repr, held))}, and give it to sample, evaluate or grid afterwards."
        )


def _evaluate(c: Config, evaluator: Evaluator, params: Any) -> tuple[Score, dict[str, Any]]:
    """Score config.train.evaluate_num samples: the checkpoint's score and the values to log."""
    found = evaluator.in_memory(c, params, c.train.evaluate_num)
    score = Score(evaluator.distance, found.metrics[evaluator.distance], found.protocol)
    values: dict[str, Any] = {f"eval/{name}": value for name, value in found.metrics.items()}
    return score, {**values, "eval/protocol_hash": protocol_hash(found.protocol)}


def _overview(params: Any) -> str:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    return str(parameter_overview.get_parameter_overview(shapes, include_stats=False)) + "\n"


def _check_profile(steps: range, start: int) -> None:
    """Raise UserError for steps that a resumed run has taken already."""
    if steps and steps[0] <= start:
        raise UserError(
            f"--profile_steps={steps[0]}:{steps[-1]}: the run is at step {start} already: name"
            " later steps, or another --workdir."
        )


class _Profile:
    """A jax.profiler trace of some steps, for TensorBoard's profile plugin and for Perfetto.

    Leaving the context ends a trace that is still open, so that it shows what went wrong.
    """

    def __init__(self, steps: range, folder: Path) -> None:
        self._steps, self._folder, self._open = steps, folder, False
        # The profiler writes to disks only.
        self._mirror = Mirror(folder) if steps and is_object(folder) else None

    def step(self, step: int, state: TrainState) -> AbstractContextManager[Any]:
        """Return a context for a step's dispatch; the first profiled step starts the trace."""
        if step not in self._steps:
            return contextlib.nullcontext()
        if step == self._steps[0]:
            jax.block_until_ready(state)  # so that the trace holds no earlier step
            jax.profiler.start_trace(str(self._mirror.local if self._mirror else self._folder))
            self._open = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, state: TrainState) -> None:
        """End the trace when the devices have done the last profiled step."""
        if self._open and step == self._steps[-1]:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        self._open = False
        jax.profiler.stop_trace()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._stop()
        if self._mirror:
            self._mirror.close()


class _Grids:
    """Sample grids during training; the sampler compiles at the first one."""

    def __init__(self, c: Config, drawer: Drawer) -> None:
        devices = drawer.mesh.size
        count = -(-(GRID_SIDE**2) // devices) * devices
        sample = dataclasses.replace(c.sample, batch_size=count)
        self._c, self._drawer = replaced(c, sample=sample), drawer
        self._given = held_out_given(c)  # raises now if the split is missing

    def save(self, params: Any, step: int, folder: Path, log: MetricsLog) -> None:
        # Samples that are given something of records have the labels of these.
        images = self._drawer.whole(
            self._c,
            params,
            GRID_SIDE**2,
            seed=self._c.seed,
            label_of=None if self._given else range(self._c.data.num_classes),
            given=self._given,
        ).images
        if is_primary():
            upscale = max(1, 32 // images.shape[-3])
            save_grid(images, folder / "samples" / f"{step:07}.png", GRID_SIDE, upscale=upscale)
            log.image(step, "samples", tile(images, GRID_SIDE))


def _steps(text: str) -> range:
    first, _, last = text.partition(":")
    if first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
        return range(int(first), int(last) + 1)
    raise argparse.ArgumentTypeError(f"{text!r}: expected A:B, steps from 1, A at most B")


def main(argv: list[str]) -> int:
    """Run the command. Raises UserError and StoppedError."""
    parser = cli.parser("train", "Train one network. The same command again resumes the run.")
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument(
        "--profile_steps",
        type=_steps,
        default=range(0),
        metavar="A:B",
        help=f"trace steps A to B, inclusive, into WORKDIR/{PROFILE} (TensorBoard, Perfetto)",
    )
    cli.add_processes(parser)
    args, config = cli.parse(parser, argv)
    trained = train(config, args.workdir, profile=args.profile_steps)
    if is_primary():
        skipped = f" ({trained.skipped} skipped)" if trained.skipped else ""
        print(
            f"{args.workdir}: {trained.step} steps{skipped}, loss {trained.loss:.4f},"
            f" {trained.seconds:.0f} s of training"
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
