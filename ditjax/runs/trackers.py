"""Trackers: where the curves of a run go beside its own directory, such as W&B and trackio.

A tracker is opened and fed by a thread of its own: it can neither stop nor delay a run, whose
metrics.jsonl holds every line. A `Writer` of your own is named by its dotted path, of a class that
is made with a `TrackedRun`: `config.train.tracker=package.module.Name`.
"""

import contextlib
import importlib
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ditjax.config import lookup
from ditjax.errors import UserError, one_line, reason
from ditjax.files import faults
from ditjax.files.atomic import read_json, write_json
from ditjax.files.masking import masked, masked_tree
from ditjax.files.store import is_object

TRACKER_FILE = "tracker.json"  # the id that each tracker knows a run by
PENDING = 1000  # values that wait for a tracker; more are left out
CLOSE_SECONDS = 10.0  # time for a tracker to take what is left when a run ends


class Writer(Protocol):
    """Where the values of a run are written: lines, TensorBoard's events, a tracker."""

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the values of a step by their names."""

    def image(self, step: int, name: str, grid: np.ndarray) -> None:
        """Write a picture u8[H,W,C]."""

    def close(self) -> None:
        """Write what is left."""


class TrackedRun(NamedTuple):
    """What a tracker is opened with. The id is the same after a resume; the recipe is masked."""

    folder: Path
    id: str
    recipe: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the run's directory."""
        return self.folder.name


# ---- the trackers


class WandB:
    """Weights & Biases. Its variables hold: WANDB_PROJECT, WANDB_MODE=offline, WANDB_API_KEY, ...

    Neither the command line, the machine, the console, packages nor code are sent.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._wandb = wandb
        settings = wandb.Settings(
            console="off",
            disable_git=True,
            # Its process waits for the server that long at its end, too: not the usual 90 s.
            init_timeout=CLOSE_SECONDS,
            finish_timeout=CLOSE_SECONDS,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        where = os.environ.get("WANDB_DIR") or (None if is_object(run.folder) else str(run.folder))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ditjax"),
            id=run.id,
            name=run.name,
            resume="allow",
            config=dict(run.recipe),
            dir=where,
            settings=settings,
        )

    @staticmethod
    def check() -> None:
        """Raise UserError if the package or the key is missing. Nothing is asked of a server."""
        wandb = _package("wandb")
        online = os.environ.get("WANDB_MODE", "online") in ("online", "shared")
        if online and not wandb.login(prompt=False, verify=False):
            raise UserError(
                "config.train.tracker is 'wandb', and this machine has no key of it: run `wandb"
                " login`, or set WANDB_MODE=offline and run `wandb sync` afterwards."
            )

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, grid: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(grid)}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """trackio, on this machine or where its variables say, such as TRACKIO_SPACE_ID."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._trackio = trackio
        # trackio knows a run by its name alone.
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "ditjax"),
            name=f"{run.name}-{run.id}",
            resume="allow",
            config=dict(run.recipe),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    @staticmethod
    def check() -> None:
        """Raise UserError if the package is missing."""
        _package("trackio")

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, grid: np.ndarray) -> None:
        self._run.log({name: self._trackio.Image(grid)}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: Mapping[str, Any] = {"none": None, "wandb": WandB, "trackio": Trackio}


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"config.train.tracker is {name!r}, and its package cannot be imported"
            f" ({reason(error)}): pip install 'ditjax[{name}]', or set the tracker to 'none'."
        ) from None


def check_tracker(name: str) -> None:
    """Raise UserError for a tracker that cannot be used on this machine."""
    check = getattr(lookup(name, f"{__name__}.TRACKERS"), "check", None)
    if check:
        check()


# ---- beside the training


class FedAside:
    """A tracker that a thread opens and feeds. Its first failure is printed, then the loss.

    A value that it does not take is left out, and so is what comes while PENDING values wait.
    """

    def __init__(self, name: str, open_writer: Callable[[], Writer]) -> None:
        self._name, self._open = name, open_writer
        self._queue: queue.Queue[Callable[[Writer], None] | None] = queue.Queue(PENDING)
        self._given, self._taken, self._why = 0, 0, ""
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        self._put(lambda writer: writer.scalars(step, numbers))

    def image(self, step: int, name: str, grid: np.ndarray) -> None:
        self._put(lambda writer: writer.image(step, name, grid))

    def close(self) -> None:
        """Wait for the tracker, at most CLOSE_SECONDS, and print what it did not take."""
        until = time.monotonic() + CLOSE_SECONDS
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._why = self._why or f"it did not answer for {CLOSE_SECONDS:g} s"
        if self._why:
            self._say(f"{self._why}; values that it did not take: {self._given - self._taken}")

    def _put(self, act: Callable[[Writer], None]) -> None:
        self._given += 1
        try:
            self._queue.put_nowait(act)
        except queue.Full:
            self._fail("it does not answer")

    def _run(self) -> None:
        """Open the tracker, and hand it what comes until the end."""
        try:
            writer = self._open()
        except BaseException as error:  # SystemExit, too: no tracker ends a run
            self._fail(masked(reason(error)))
            while self._queue.get() is not None:
                pass
            return
        while (act := self._queue.get()) is not None:
            self._taken += self._tries(act, writer)
        self._tries(lambda it: it.close(), writer)

    def _tries(self, act: Callable[[Writer], None], writer: Writer) -> bool:
        """Return whether the tracker takes it."""
        try:
            act(writer)
        except BaseException as error:
            self._fail(masked(reason(error)))
            return False
        return True

    def _fail(self, why: str) -> None:
        if not self._why:
            self._why = why
            self._say(f"{why}; the run goes on, and its metrics.jsonl has every line")

    def _say(self, words: str) -> None:
        line = one_line(f"tracker {self._name}: {words}")
        print(line, file=sys.stderr, flush=True)


def open_tracker(name: str, folder: Path, recipe: Mapping[str, Any]) -> Writer | None:
    """Open the tracker of a run in a directory, under the id it has there; None for 'none'."""
    make = lookup(name, f"{__name__}.TRACKERS")
    if make is None:
        return None
    path = folder / TRACKER_FILE
    ids = read_json(path) if faults.exists(path) else {}
    if name not in ids:
        ids[name] = uuid.uuid4().hex[:12]
        write_json(path, ids)
    run = TrackedRun(folder, ids[name], masked_tree(recipe))
    return FedAside(name, lambda: make(run))
