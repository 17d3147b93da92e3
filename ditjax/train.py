"""python -m ditjax.train: trains one network; the same command again resumes."""

import argparse
import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
from clu import parameter_overview

from ditjax import cli
from ditjax.config import Config
from ditjax.data import stream
from ditjax.data.prefetch import ahead
from ditjax.errors import StoppedError, UserError
from ditjax.evaluation.evaluator import Evaluator
from ditjax.files import lease
from ditjax.files.atomic import protocol_hash
from ditjax.parallel.processes import is_primary
from ditjax.parallel.stopping import GOES_ON, Stopping
from ditjax.runs import opening, rundir
from ditjax.runs.checkpoint import Checkpoints, Score
from ditjax.runs.log import MetricsLog, Progress
from ditjax.runs.results import save_grid, tile
from ditjax.sampling.pipeline import Drawer
from ditjax.tasks import build, programs
from ditjax.training.meter import Meter
from ditjax.training.step import TrainState

IN_FLIGHT = 2  # steps that may wait for the devices; more would only hold batches
GRID_SIDE = 8  # a sample grid while training has 8 x 8 images
PROFILE = "profile"
DAMAGED_FILE = "damaged.txt"  # records that were skipped, one a line
EVALUATION_SECONDS = "eval/seconds"  # of all evaluations so far, apart from the training's own


class Trained(NamedTuple):
    """What a finished training has to tell; `loss` averages the last logged interval."""

    params: Any  # what config.sample.weights names: the average (EMA)
    step: int
    loss: float
    seconds: float  # of the loop without its evaluations, calls before a resume included
    skipped: int = 0  # steps that changed nothing, calls before a resume included


@lease.scope()
def train(
    c: Config,
    recipe: Mapping[str, Any],
    workdir: str | os.PathLike[str],
    evaluator: Evaluator | None = None,
    profile: range = range(0),
) -> Trained:
    """Trains to config.train.steps in a run directory, from its newest checkpoint if it has one.

    Every config.train.evaluate_every_steps it is evaluated, by `evaluator` or one of its own. The
    steps of `profile` are traced into the directory's `profile`.

    Told to stop by SIGTERM or SIGINT it ends the step, saves, and raises StoppedError; of several
    processes all do so after the same step.
    """
    with Stopping(c.train.grace_seconds) as stopping:
        return _train(c, recipe, workdir, evaluator, profile, stopping)


def _train(
    c: Config,
    recipe: Mapping[str, Any],
    workdir: str | os.PathLike[str],
    evaluator: Evaluator | None,
    profile: range,
    stopping: Stopping,
) -> Trained:
    if profile and profile[-1] > c.train.steps:
        raise UserError(
            f"--profile_steps={profile[0]}:{profile[-1]}: the run ends at step {c.train.steps}:"
            " name steps up to it, or more of config.train.steps."
        )
    mesh = build.mesh(c)
    dataset = opening.check_data(c)
    draws = bool(c.train.sample_every_steps or c.train.evaluate_every_steps)
    frozen = opening.load_autoencoder(c, mesh) if draws or needs_encoder(c) else None
    drawer = Drawer(mesh, frozen)
    if c.train.evaluate_every_steps and evaluator is None:
        evaluator = Evaluator(c, mesh, frozen, drawer)
    folder = opening.open_run(workdir, recipe)
    if is_primary():
        rundir.tidy(folder)
    p = programs.training(c, mesh, frozen)
    position = {"seed": c.seed, "batch_size": c.train.batch_size}
    signal = ""
    with Checkpoints(
        folder / rundir.CHECKPOINTS, c.train.keep_checkpoints, keep_every=c.train.keep_every_steps
    ) as checkpoints:
        newest = opening.newest(checkpoints, p.abstract_state)
        saved: Mapping[str, Any] = {}
        if newest is None:
            state, start = p.init(), 0
            if is_primary():
                (folder / "parameters.txt").write_text(_overview(state.params), encoding="utf-8")
        else:
            state, saved = newest
            start = int(state.step)
            _check_position(saved, position, folder)
        _check_profile(profile, start)
        with (
            MetricsLog(folder, start, write=is_primary()) as log,
            stream.train_batches(
                opening.data_spec(c),
                c.seed,
                c.train.batch_size,
                start_step=start,
                rows=p.rows,
                tell=stream.warn_and_note(folder / DAMAGED_FILE),
            ) as batches,
            _Profile(profile, folder / PROFILE) as profiled,
        ):
            # Times and loss go on from where the log stands.
            began = time.monotonic() - log.last.get("seconds", 0.0)
            evaluation_seconds = log.last.get(EVALUATION_SECONDS, 0.0)
            loss = log.last.get("loss", float("nan"))
            progress = Progress("train", c.train.steps, start=start)
            meter = Meter(
                # A run that skips every step has trained nothing.
                min(c.train.max_bad_steps, c.train.steps - 1),
                lambda step: stream.records_of_step(
                    c.seed, step, c.train.batch_size, dataset.num_examples
                ),
                progress.say,
                in_flight=IN_FLIGHT,
                start=start,
                position=saved,
            )
            if start == c.train.steps and meter.ended:
                raise meter.error(start)
            grids = _Grids(c, drawer)
            on_devices = ahead(batches, p.put, c.train.prefetch, c.train.steps - start)
            signal, step = stopping.after(start), start
            for step, batch in enumerate(() if signal else on_devices, start + 1):
                with profiled.step(step, state):
                    state, metrics = p.step(state, batch)
                profiled.after(step, state)
                signal = stopping.after(step)
                last = step == c.train.steps
                evaluates = evaluator is not None and _due(step, c.train.evaluate_every_steps)
                logs = last or evaluates or _due(step, c.train.log_every_steps)
                saves = (
                    last or evaluates or bool(signal) or _due(step, c.train.checkpoint_every_steps)
                )
                stops = meter.add(step, metrics, wait=logs or saves)
                score = None
                if logs or stops:
                    row = meter.row()
                    loss = row.get("loss", loss)
                    row["seconds"] = round(time.monotonic() - began, 3)
                    if evaluator and evaluates and not stops:
                        paused = time.monotonic()
                        score, found = _evaluate(c, evaluator, weights_of(c, state))
                        took = time.monotonic() - paused
                        began += took
                        evaluation_seconds += took
                        row |= {**found, EVALUATION_SECONDS: round(evaluation_seconds, 3)}
                    # One line a step: of two with the same step, readers take the later.
                    log.scalars(step, row)
                    progress.report(step, loss=loss, **({score.name: score.value} if score else {}))
                    checkpoints.check()
                # A run that ends once more for the same reason leaves its checkpoints alone.
                if meter.changed if stops else saves:
                    lease.check()
                    checkpoints.save(step, state, {**position, **meter.position()}, score)
                    meter.changed = False
                if stops:
                    checkpoints.wait()
                    raise meter.error(checkpoints.latest_step)
                if _due(step, c.train.sample_every_steps):
                    grids.save(weights_of(c, state), step, folder, log)
                if signal:
                    break
            jax.block_until_ready(state)
            seconds = time.monotonic() - began
    # A signal that came after the last step, too: what follows the training need not begin.
    if signal := signal or (stopping.after(step) if step == c.train.steps else ""):
        raise StoppedError(f"stopped at step {step} by {signal}: {GOES_ON}")
    return Trained(weights_of(c, state), int(state.step), loss, seconds, meter.total)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def weights_of(c: Config, state: TrainState) -> Any:
    """What samples are drawn with, by config.sample.weights."""
    return getattr(state, opening.WEIGHTS[c.sample.weights])


def _evaluate(c: Config, evaluator: Evaluator, params: Any) -> tuple[Score, dict[str, Any]]:
    """Of config.train.evaluate_num samples: the score of the checkpoint, and the log's values."""
    found = evaluator.in_memory(c, params, c.train.evaluate_num)
    score = Score(evaluator.distance, found.metrics[evaluator.distance], found.protocol)
    values: dict[str, Any] = {f"eval/{name}": value for name, value in found.metrics.items()}
    return score, {**values, "eval/protocol_hash": protocol_hash(found.protocol)}


def needs_encoder(c: Config) -> bool:
    """Whether training encodes images on the way: a latent DiT whose data are not yet latents."""
    return c.latent and not c.data.name.startswith("latents:")


def _overview(params: Any) -> str:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    return str(parameter_overview.get_parameter_overview(shapes, include_stats=False)) + "\n"


def _check_position(saved: Mapping[str, Any], ours: Mapping[str, Any], folder: Any) -> None:
    for key, value in ours.items():
        if saved.get(key) != value:
            raise UserError(
                f"the checkpoint in {folder} was at {key}={saved.get(key)!r} of its data, this"
                f" command says {value!r}: give another --workdir."
            )


def _check_profile(steps: range, start: int) -> None:
    """Raises UserError for steps that a resumed run has taken already."""
    if steps and steps[0] <= start:
        raise UserError(
            f"--profile_steps={steps[0]}:{steps[-1]}: the run is at step {start} already: name"
            " steps that are left, or another --workdir."
        )


class _Profile:
    """A trace of some steps by jax.profiler, for TensorBoard's profile plugin and for Perfetto.

    Leaving it ends a trace that is still open: what went wrong is then in it.
    """

    def __init__(self, steps: range, folder: Path) -> None:
        self._steps, self._folder, self._open = steps, folder, False

    def step(self, step: int, state: TrainState) -> AbstractContextManager[Any]:
        """Around the dispatch of a step: names it in the trace, which begins with the first."""
        if step not in self._steps:
            return contextlib.nullcontext()
        if step == self._steps[0]:
            jax.block_until_ready(state)  # so that no earlier step is in it
            jax.profiler.start_trace(str(self._folder))
            self._open = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, state: TrainState) -> None:
        """The trace ends with the last step, when the devices have done it."""
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


class _Grids:
    """Sample grids of a DiT while it trains; the sampler compiles at the first one."""

    def __init__(self, c: Config, drawer: Drawer) -> None:
        devices = drawer.mesh.size
        count = -(-(GRID_SIDE**2) // devices) * devices
        sample = dataclasses.replace(c.sample, batch_size=count)
        self._c, self._drawer = dataclasses.replace(c, sample=sample), drawer

    def save(self, params: Any, step: int, folder: Any, log: MetricsLog) -> None:
        if self._c.train.network != "dit":
            return
        images = self._drawer.whole(
            self._c,
            params,
            GRID_SIDE**2,
            seed=self._c.seed,
            label_of=range(self._c.data.num_classes),
        ).images
        if is_primary():
            upscale = max(1, 32 // images.shape[1])
            save_grid(images, folder / "samples" / f"{step:07}.png", GRID_SIDE, upscale=upscale)
            log.image(step, "samples", tile(images, GRID_SIDE))


def _steps(text: str) -> range:
    first, _, last = text.partition(":")
    if first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
        return range(int(first), int(last) + 1)
    raise argparse.ArgumentTypeError(f"{text!r}: expected A:B, steps from 1 on, A at most B")


def main(argv: list[str]) -> int:
    """The command."""
    parser = cli.parser("train", "Trains one network; the same command again resumes.")
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument(
        "--profile_steps",
        type=_steps,
        default=range(0),
        metavar="A:B",
        help=f"trace steps A to B, both included, into WORKDIR/{PROFILE} (TensorBoard, Perfetto)",
    )
    cli.add_processes(parser)
    args, config = cli.parse(parser, argv)
    trained = train(config, args.recipe, args.workdir, profile=args.profile_steps)
    if is_primary():
        skipped = f" ({trained.skipped} skipped)" if trained.skipped else ""
        print(
            f"{args.workdir}: {trained.step} steps{skipped}, loss {trained.loss:.4f},"
            f" {trained.seconds:.0f} s of training"
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
