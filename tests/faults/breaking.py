"""The product, broken once a row: `python -m tests.faults --broken` sees that every row can fail.

In a child only, before its command: what of ditjax a row stands on is replaced by what forgets it.
"""

import pickle
import shutil
import zipfile
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import Any

import jax
import jax.numpy as jnp
import optax
from PIL import Image

from ditjax import config, sweep
from ditjax.data import records, stream
from ditjax.files import digests, lease
from ditjax.parallel import rules, stopping, watch
from ditjax.runs import checkpoint, log
from ditjax.tasks import diffusion
from ditjax.training import keys, program
from ditjax.weights import tensors


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _put(where: Any, name: str, what: Any) -> None:
    """Under that name of a module or class."""
    setattr(where, name, what)


def killed_mid_step() -> None:
    """The data begin anew at a resume."""
    real = stream.train_batches
    _put(
        stream, "train_batches", lambda *args, **kwargs: real(*args, **{**kwargs, "start_step": 0})
    )


def killed_while_saving() -> None:
    """Old checkpoints go before the new one is written."""
    real = checkpoint.Checkpoints.save

    def save(self: Any, *args: Any) -> None:
        self.wait()
        for step in self.steps:
            shutil.rmtree(self.directory / str(step))
        real(self, *args)

    _put(checkpoint.Checkpoints, "save", save)


def terminated() -> None:
    """Nobody hears SIGTERM."""
    _put(stopping, "SIGNALS", ())


def terminated_pair() -> None:
    """Nobody hears that the other was told."""
    _put(watch.Watch, "request_stop", _nothing)


def out_of_grace() -> None:
    """The average is not what is saved for it."""
    real = checkpoint.Checkpoints.save

    def save(self: Any, step: int, state: Any, *args: Any) -> None:
        real(self, step, state._replace(ema=state.params), *args)

    _put(checkpoint.Checkpoints, "save", save)


def damaged_checkpoint() -> None:
    """Digests are written, and not compared."""
    _put(digests, "changed_leaves", lambda *_: [])


def full_disk() -> None:
    """Whatever cannot be written is let go."""

    @contextmanager
    def quiet(*_: Any) -> Any:
        with suppress(Exception):
            yield

    real = log.MetricsLog.scalars

    def scalars(*args: Any) -> None:
        with suppress(Exception):
            real(*args)

    _put(checkpoint.Checkpoints, "_save_faults", quiet)
    _put(log.MetricsLog, "scalars", scalars)


def damaged_records() -> None:
    """What cannot be read is black."""
    real = records.ImageRecords.read_words

    def read(self: Any, index: int) -> Any:
        try:
            return real(self, index)
        except Exception:
            return Image.new("L", (8, 8)), 0, records.Words()

    _put(stream, "_check_files", _nothing)
    _put(records.ImageRecords, "read_words", read)


def poisoned() -> None:
    """Everything is finite, and every gradient small."""
    _put(jnp, "isfinite", lambda x: jnp.ones(jnp.shape(x), bool))
    _put(optax.tree, "norm", lambda tree: jnp.zeros(()))


def illegal_mesh() -> None:
    """Nothing must divide anything."""
    _put(rules, "check_batch", _nothing)
    _put(rules, "check_tokens", _nothing)
    _put(program, "_check_microbatches", _nothing)


def illegal_recipe() -> None:
    """Values are taken as they come."""
    _put(config, "_typed", lambda hint, value, path: value)
    _put(config.Rule, "holds", property(lambda _: lambda __: True))
    for section in config.Section.__subclasses__():
        _put(section, "check", _nothing)
    for section in config.Model.__subclasses__():
        _put(section, "check", _nothing)
    _put(diffusion, "check", _nothing)


def other_weights() -> None:
    """Tensors are not compared with the network."""
    _put(tensors, "check_tensors", _nothing)


def running_weights() -> None:
    """Python's own unpickler reads the file."""

    def read_torch(path: Any) -> Any:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return pickle.loads(archive.read("evil/data.pkl"))
        return pickle.loads(path.read_bytes())

    _put(tensors, "read_torch", read_torch)


def killed_sweep() -> None:
    """A cell that was begun is done."""
    _put(sweep, "has_result", lambda cell, folder: folder.exists())


def two_sweeps() -> None:
    """Nobody owns anything."""
    _put(lease, "acquire", _nothing)


def peer_lost() -> None:
    """The watch does not look."""
    _put(watch.Watch, "_lost", _nothing)


def other_mesh() -> None:
    """Random numbers depend on how many devices there are."""
    real = keys.stream

    def stream(seed: int, which: int) -> jax.Array:
        return jax.random.fold_in(real(seed, which), jax.device_count())

    _put(keys, "stream", stream)


def torn_log() -> None:
    """A log goes on where it stands."""
    _put(log, "_truncate", lambda *_: {})


def killed_finetuning() -> None:
    """The factors are lost at a resume; their optimizer is not."""
    real = checkpoint.Checkpoints.restore

    def restore(self: Any, *args: Any) -> Any:
        state, position = real(self, *args)
        return state._replace(params=jax.tree.map(jnp.zeros_like, state.params)), position

    _put(checkpoint.Checkpoints, "restore", restore)


def broken(row: str) -> None:
    """From here on what that row stands on is broken."""
    function: Callable[[], None] = globals()[row]
    function()
