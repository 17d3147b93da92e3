"""The log of a run: metrics.jsonl, TensorBoard events, and one line of progress."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TextIO

import jax
import numpy as np

from ditjax.errors import FaultError
from ditjax.files import faults
from ditjax.files.atomic import full_disk, write_atomic
from ditjax.files.durations import clock
from ditjax.files.masking import masked_tree
from ditjax.runs.results import METRICS_FILE


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """Make the import of a module fail, as if it were not installed."""
    held = {module: sys.modules[module]} if module in sys.modules else {}
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
        sys.modules.update(held)


# tensorboardX imports PyTorch if it is installed, for features that are not used here.
with _without("torch"):
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

SYNC_SECONDS = 20.0  # between flushes of the TensorBoard events
_TAIL = 1 << 16  # bytes at the end of a log that are searched for its newest lines


class MetricsLog:
    """metrics.jsonl and TensorBoard events of one run; resuming drops lines beyond `start_step`.

    One process has `write`; in the others the log does nothing. `last` holds the newest value of
    each name in the lines that are kept, {} for a new run. New events replace those of earlier
    starts beyond `start_step`.
    """

    def __init__(
        self, directory: str | os.PathLike[str], start_step: int, *, write: bool = True
    ) -> None:
        self.path = Path(directory) / METRICS_FILE
        self.last: dict[str, Any] = _truncate(self.path, start_step) if write else {}
        self._file = self.path.open("a", encoding="utf-8") if write else None
        # Not tensorboardX's SummaryWriter, whose thread ends silently at the first error, so that
        # the next write waits for ever.
        self._events: Any = None
        self._synced = time.monotonic()
        if write:
            self._events = EventsWriter(str(Path(directory) / "events"), f".{os.getpid()}")
            self._event(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Write a line {"step": step, name: value, ...}, and an event for each number.

        Raises FaultError if they cannot be written.
        """
        if self._file is None:
            return
        with self._faults():
            self._file.write(json.dumps({"step": step, **masked_tree(values)}) + "\n")
            self._file.flush()
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._event(step, summary=summary.scalar(name, value))

    def image(self, step: int, name: str, grid: np.ndarray) -> None:
        """Write a grid u8[H,W,C] as an event. Raises as `scalars`."""
        if self._events:
            with self._faults():
                self._event(step, summary=summary.image(name, grid, dataformats="HWC"))

    def _event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._events.flush()
            self._synced = time.monotonic()

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FaultError(full_disk(self.path, error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an exception, a failure to write has been reported already.
        reported = contextlib.suppress(*() if kind is None else (OSError,))
        for file in (self._file, self._events):
            if file:
                with reported:
                    file.close()


def _truncate(path: Path, last_step: int) -> dict[str, Any]:
    """Keep the lines of steps <= last_step and return the last value of each name.

    A damaged line and all that follow it are removed.
    """
    if not faults.exists(path):
        return {}
    kept: list[str] = []
    last: dict[str, Any] = {}
    for line in faults.retried(path, path.read_bytes).decode(errors="replace").splitlines():
        try:
            values = json.loads(line)
            if values["step"] > last_step:
                break
        except (ValueError, KeyError, TypeError, RecursionError):
            break
        kept.append(line)
        last |= values
    write_atomic(path, "".join(f"{line}\n" for line in kept).encode())
    return last


def last_metrics(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The newest whole line of a run's metrics.jsonl; {} before the first."""
    newest = newest_metrics(directory, 1)
    return newest[-1] if newest else {}


def newest_metrics(directory: str | os.PathLike[str], count: int) -> list[dict[str, Any]]:
    """Up to `count` newest whole lines of a run's metrics.jsonl, oldest first.

    Only the end of a long log is read.
    """
    try:
        with (Path(directory) / METRICS_FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read(_TAIL).decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found: list[dict[str, Any]] = []
    for line in reversed(lines):
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(line)
            if isinstance(values, dict):
                found.append(values)
        if len(found) == count:
            break
    return found[::-1]


class Progress:
    """'train 450/1000 steps · 45% · 21.3/s · 0:26 left · loss 0.2134' on one terminal line.

    A terminal redraws the line; in a file each report is a new line, at most one every
    `every_seconds`. The rate excludes the first reported interval, which includes the compilation.
    Only the first of several processes prints.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str = "steps",
        *,
        start: int = 0,
        every_seconds: float = 10.0,
        out: TextIO | None = None,
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self._out = sys.stderr if out is None else out
        self._tty = self._out.isatty()
        # In this order, because a process that only starts others must not take the devices.
        self._quiet = jax.distributed.is_initialized() and jax.process_index() > 0
        self._every = 0.2 if self._tty else every_seconds
        self._first: tuple[float, float] = (start, time.monotonic())
        self._compiled = False
        self._shown = 0.0

    def report(self, done: float, **values: float) -> None:
        """Print the progress, with named values."""
        now = time.monotonic()
        rate = (done - self._first[0]) / max(now - self._first[1], 1e-9)
        if not self._compiled:
            self._first, self._compiled = (done, now), True
        if self._quiet or (now - self._shown < self._every and done < self.total):
            return
        self._shown = now
        left = clock((self.total - done) / rate) if rate > 0 else "?"
        parts = [
            f"{self.what} {done:.0f}/{self.total} {self.unit}",
            f"{100 * done / self.total:.0f}%",
            f"{rate:.3g}/s",
            f"{left} left" if done < self.total else "done",
            *(f"{name} {value:.4g}" for name, value in values.items()),
        ]
        line = " · ".join(parts)
        if self._tty:
            end = "\n" if done >= self.total else ""
            self._out.write(f"\r\x1b[2K{line}{end}")
        else:
            self._out.write(line + "\n")
        self._out.flush()

    def print_line(self, line: str) -> None:
        """Print a line above the progress."""
        if not self._quiet:
            self._out.write(f"\r\x1b[2K{line}\n" if self._tty else f"{line}\n")
            self._out.flush()
