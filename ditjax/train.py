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
import numpy as np
from clu import parameter_overview

from ditjax import build, cli, programs, runs
from ditjax.config import Config
from ditjax.errors import UserError
from ditjax.evaluation import Evaluator
from ditjax.io import data, rundir
from ditjax.io.checkpoint import Checkpoints, Score, is_primary
from ditjax.io.log import MetricsLog, Progress
from ditjax.io.prefetch import ahead
from ditjax.io.results import protocol_hash, save_grid, tile
from ditjax.parallel import processes
from ditjax.pipeline import Drawer
from ditjax.training.step import TrainState

IN_FLIGHT = 2  # steps that may wait for the devices; more would only hold batches
GRID_SIDE = 8  # a sample grid while training has 8 x 8 images
PROFILE = "profile"
EVALUATION_SECONDS = "eval/seconds"  # of all evaluations so far, apart from the training's own


class Trained(NamedTuple):
    """What a finished training has to tell; `loss` averages the last logged interval."""

    params: Any  # what config.sample.weights names: the average (EMA)
    step: int
    loss: float
    seconds: float  # of the loop without its evaluations, calls before a resume included


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
    """
    if profile and profile[-1] > c.train.steps:
        raise UserError(
            f"--profile_steps={profile[0]}:{profile[-1]}: the run ends at step {c.train.steps}:"
            " name steps up to it, or more of config.train.steps."
        )
    mesh = build.mesh(c)
    runs.check_data(c)
    draws = bool(c.train.sample_every_steps or c.train.evaluate_every_steps)
    frozen = runs.load_autoencoder(c, mesh) if draws or needs_encoder(c) else None
    drawer = Drawer(mesh, frozen)
    if c.train.evaluate_every_steps and evaluator is None:
        evaluator = Evaluator(c, mesh, frozen, drawer)
    folder = runs.open_run(workdir, recipe)
    p = programs.training(c, mesh, frozen)
    position = {"seed": c.seed, "batch_size": c.train.batch_size}
    with Checkpoints(folder / rundir.CHECKPOINTS, c.train.keep_checkpoints) as checkpoints:
        latest = processes.agreed_step(checkpoints.latest_step)
        if latest is None:
            state, start = p.init(), 0
            if is_primary():
                (folder / "parameters.txt").write_text(_overview(state.params), encoding="utf-8")
        else:
            state, saved = checkpoints.restore(p.abstract_state, latest)
            start = int(state.step)
            _check_position(saved, position, folder)
        _check_profile(profile, start)
        with (
            MetricsLog(folder, start, write=is_primary()) as log,
            data.train_batches(
                runs.data_spec(c), c.seed, c.train.batch_size, start_step=start,
                rows=p.rows,
            ) as batches,
            _Profile(profile, folder / PROFILE) as profiled,
        ):  # fmt: skip
            # Times and loss go on from where the log stands.
            began = time.monotonic() - log.last.get("seconds", 0.0)
            evaluation_seconds = log.last.get(EVALUATION_SECONDS, 0.0)
            loss = log.last.get("loss", float("nan"))
            pending: list[Any] = []  # metrics on the devices: fetched at the log's interval only
            progress = Progress("train", c.train.steps, start=start)
            grids = _Grids(c, drawer)
            on_devices = ahead(batches, p.put, c.train.prefetch, c.train.steps - start)
            for step, batch in enumerate(on_devices, start + 1):
                with profiled.step(step, state):
                    state, metrics = p.step(state, batch)
                profiled.after(step, state)
                pending.append(metrics)
                if len(pending) > IN_FLIGHT:
                    jax.block_until_ready(pending[-1 - IN_FLIGHT])
                last = step == c.train.steps
                evaluates = evaluator is not None and _due(step, c.train.evaluate_every_steps)
                score = None
                if last or evaluates or _due(step, c.train.log_every_steps):
                    row = _means(step, pending)  # waits for the devices
                    loss = row["loss"]
                    row["seconds"] = round(time.monotonic() - began, 3)
                    if evaluator and evaluates:
                        paused = time.monotonic()
                        score, found = _evaluate(c, evaluator, weights_of(c, state))
                        took = time.monotonic() - paused
                        began += took
                        evaluation_seconds += took
                        row |= {**found, EVALUATION_SECONDS: round(evaluation_seconds, 3)}
                    # One line a step: of two with the same step, readers take the later.
                    log.scalars(step, row)
                    progress.report(step, loss=loss, **({score.name: score.value} if score else {}))
                if last or score or _due(step, c.train.checkpoint_every_steps):
                    checkpoints.save(step, state, position, score)
                if _due(step, c.train.sample_every_steps):
                    grids.save(weights_of(c, state), step, folder, log)
            jax.block_until_ready(state)
            seconds = time.monotonic() - began
    return Trained(weights_of(c, state), int(state.step), loss, seconds)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def weights_of(c: Config, state: TrainState) -> Any:
    """What samples are drawn with, by config.sample.weights."""
    return getattr(state, runs.WEIGHTS[c.sample.weights])


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


def _means(step: int, pending: list[Any]) -> dict[str, Any]:
    """The mean of each pending metric; forgets them. Raises UserError for a loss not finite."""
    fetched = jax.device_get(pending)
    pending.clear()
    means: dict[str, Any] = {
        name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]
    }
    if not np.isfinite(means["loss"]):
        bad = next(i for i, m in enumerate(fetched) if not np.isfinite(m["loss"]))
        raise UserError(
            f"the loss became {means['loss']} at step {step - len(fetched) + bad + 1}: lower"
            " config.optim.learning_rate, or look at the data; the checkpoints are from before."
        )
    return means


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
            self._c, params, GRID_SIDE**2, seed=self._c.seed,
            label_of=range(self._c.data.num_classes),
        ).images  # fmt: skip
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
        "--profile_steps", type=_steps, default=range(0), metavar="A:B",
        help=f"trace steps A to B, both included, into WORKDIR/{PROFILE} (TensorBoard, Perfetto)",
    )  # fmt: skip
    cli.add_processes(parser)
    args, config = cli.parse(parser, argv)
    trained = train(config, args.recipe, args.workdir, profile=args.profile_steps)
    if is_primary():
        print(
            f"{args.workdir}: {trained.step} steps, loss {trained.loss:.4f},"
            f" {trained.seconds:.0f} s of training"
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
