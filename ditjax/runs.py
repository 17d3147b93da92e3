"""Networks out of run directories: the averaged weights of a run, a frozen autoencoder."""

import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ditjax import programs
from ditjax.config import Config, read
from ditjax.errors import UserError
from ditjax.io import rundir
from ditjax.io.checkpoint import Checkpoints
from ditjax.parallel import rules
from ditjax.pretrained import networks, reading


def load_ema(
    c: Config, workdir: str | os.PathLike[str], mesh: Mesh, step: int | None = None
) -> tuple[Any, int]:
    """(averaged parameters on the mesh, step) of a run's newest checkpoint, or of `step`."""
    abstract = programs.abstract_state(c, mesh)
    with Checkpoints(Path(workdir) / rundir.CHECKPOINTS, keep=1, read_only=True) as checkpoints:
        return checkpoints.restore_ema(abstract, step)


def load_autoencoder(c: Config, mesh: Mesh) -> Any:
    """The frozen autoencoder's parameters that a latent recipe names; None for pixels.

    Raises UserError when the run at config.autoencoder.path has another architecture.
    """
    if not c.latent:
        return None
    path = c.autoencoder.path
    if not path:
        raise UserError(
            "config.autoencoder.path is '': a latent DiT needs the work directory of a trained"
            " autoencoder, or its weights (see README, Published weights)."
        )
    published = None if rundir.is_run(path) else reading.load(path)
    trained = published.config if published else read(rundir.read_recipe(path))
    if trained.train.network != "autoencoder":
        what = "holds" if published else "is a run of"
        raise UserError(
            f"config.autoencoder.path={path} {what} a {trained.train.network}: expected an"
            " autoencoder."
        )
    for field in ("base_width", "multipliers", "res_blocks", "latent_channels", "groups"):
        theirs, ours = getattr(trained.autoencoder, field), getattr(c.autoencoder, field)
        if theirs != ours:
            raise UserError(
                f"config.autoencoder.{field} is {ours}, and the autoencoder at {path} was trained"
                f" with {theirs}."
            )
    if trained.data.channels != c.data.channels:
        raise UserError(
            f"config.data.channels is {c.data.channels}, and the autoencoder at {path} was trained"
            f" on {trained.data.channels}."
        )
    if published:
        return put(networks.as_float32(published.params), mesh)
    return load_ema(trained, path, mesh)[0]


def put(params: Any, mesh: Mesh) -> Any:
    """Host arrays on the mesh, by the sharding rules."""
    return jax.device_put(params, rules.state_shardings(params, mesh))


def recipe_of(workdir: str | os.PathLike[str]) -> Config:
    """The checked recipe of an existing run."""
    return read(rundir.read_recipe(workdir))
