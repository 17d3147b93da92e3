"""python -m ditjax.train: trains one network; the same command again resumes."""

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh

from ditjax import cli, programs, runs
from ditjax.config import Config
from ditjax.errors import UserError
from ditjax.io import data, rundir
from ditjax.io.checkpoint import Checkpoints, is_primary
from ditjax.io.log import MetricsLog, Progress
from ditjax.io.results import save_grid, tile
from ditjax.parallel.mesh import make_mesh
from ditjax.pipeline import Drawer

GRID_SIDE = 8  # a sample grid while training has 8 x 8 images


class Trained(NamedTuple):
    """What a finished training has to tell; `loss` averages the last logged interval."""

    params: Any  # the average (EMA)
    step: int
    loss: float
    seconds: float  # of the loop, calls before a resume included


def train(c: Config, recipe: Mapping[str, Any], workdir: str | os.PathLike[str]) -> Trained:
    """Trains to config.train.steps in a run directory, from its newest checkpoint if it has one."""
    mesh = make_mesh(c.mesh.data, c.mesh.fsdp)
    runs.check_data(c)
    folder = rundir.open_run(workdir, recipe)
    frozen = runs.load_autoencoder(c, mesh) if needs_encoder(c) else None
    p = programs.training(c, mesh, frozen)
    position = {"seed": c.seed, "batch_size": c.train.batch_size}
    with Checkpoints(folder / rundir.CHECKPOINTS, c.train.keep_checkpoints) as checkpoints:
        if checkpoints.latest_step is None:
            state, start = p.init(), 0
            if is_primary():
                (folder / "parameters.txt").write_text(_overview(state.params), encoding="utf-8")
        else:
            state, saved = checkpoints.restore(p.abstract_state)
            start = int(state.step)
            _check_position(saved, position, folder)
        with (
            MetricsLog(folder, start) as log,
            data.train_batches(
                runs.data_spec(c), c.seed, c.train.batch_size, start_step=start,
                process_index=jax.process_index(), process_count=jax.process_count(),
            ) as batches,
        ):  # fmt: skip
            # Time and loss go on from where the log stands.
            began = time.monotonic() - log.last.get("seconds", 0.0)
            loss = log.last.get("loss", float("nan"))
            pending: list[Any] = []  # metrics on the devices: fetched at the log's interval only
            progress = Progress("train", c.train.steps, start=start)
            grids = _Grids(c, mesh)
            for step in range(start + 1, c.train.steps + 1):
                state, metrics = p.step(state, p.put(next(batches)))
                pending.append(metrics)
                last = step == c.train.steps
                if step % c.train.log_every_steps == 0 or last:
                    loss = _log(log, step, pending, began)
                    progress.report(step, loss=loss)
                if last or step % c.train.checkpoint_every_steps == 0:
                    checkpoints.save(step, state, position)
                if c.train.sample_every_steps and step % c.train.sample_every_steps == 0:
                    grids.save(state.ema, step, folder, log)
            jax.block_until_ready(state)
            seconds = time.monotonic() - began
    return Trained(state.ema, int(state.step), loss, seconds)


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


def _log(log: MetricsLog, step: int, pending: list[Any], began: float) -> float:
    """Writes the mean of the pending metrics and forgets them; returns the mean loss."""
    fetched = jax.device_get(pending)
    pending.clear()
    means = {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}
    if not np.isfinite(means["loss"]):
        bad = next(i for i, m in enumerate(fetched) if not np.isfinite(m["loss"]))
        raise UserError(
            f"the loss became {means['loss']} at step {step - len(fetched) + bad + 1}: lower"
            " config.optim.learning_rate, or look at the data; the checkpoints are from before."
        )
    seconds = time.monotonic() - began
    log.scalars(step, {**means, "seconds": round(seconds, 3)})
    return means["loss"]


class _Grids:
    """Sample grids of a DiT while it trains; the sampler compiles at the first one."""

    def __init__(self, c: Config, mesh: Mesh) -> None:
        count = -(-(GRID_SIDE**2) // mesh.size) * mesh.size
        sample = dataclasses.replace(c.sample, batch_size=count)
        self._c, self._mesh = dataclasses.replace(c, sample=sample), mesh
        self._drawer: Drawer | None = None

    def save(self, params: Any, step: int, folder: Any, log: MetricsLog) -> None:
        if self._c.train.network != "dit":
            return
        if self._drawer is None:
            self._drawer = Drawer(self._mesh, runs.load_autoencoder(self._c, self._mesh))
        images = self._drawer.whole(
            self._c, params, GRID_SIDE**2, seed=self._c.seed,
            label_of=range(self._c.data.num_classes),
        ).images  # fmt: skip
        if is_primary():
            upscale = max(1, 32 // images.shape[1])
            save_grid(images, folder / "samples" / f"{step:07}.png", GRID_SIDE, upscale=upscale)
            log.image(step, "samples", tile(images, GRID_SIDE))


def main(argv: list[str]) -> int:
    """The command."""
    parser = cli.parser("train", "Trains one network; the same command again resumes.")
    parser.add_argument("--workdir", required=True, help="the run's directory")
    args, config = cli.parse(parser, argv)
    trained = train(config, args.recipe, args.workdir)
    print(
        f"{args.workdir}: {trained.step} steps, loss {trained.loss:.4f},"
        f" {trained.seconds:.0f} s of training"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
