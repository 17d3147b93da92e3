"""The log of a run: metrics.jsonl, TensorBoard events, a tracker, and one line of progress."""

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
from ditjax.files.atomic import full_disk, unanswered, write_atomic
from ditjax.files.durations import clock
from ditjax.files.masking import masked_tree
from ditjax.files.store import Mirror, is_object, place
from ditjax.runs.results import LOG_PARTS, METRICS_FILE, log_files, read_log
from ditjax.runs.trackers import Writer


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
PART_BYTES = 1 << 16  # of lines, in a file that is copied to a store
_TAIL = 1 << 16  # bytes at the end of a log that are searched for its newest lines


class _Lines:
    """Lines {"step": step, name: value, ...} of a file, which is added to."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        self.file: TextIO = path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        self.file.write(json.dumps({"step": step, **masked_tree(values)}) + "\n")
        self.file.flush()

    def image(self, step: int, name: str, grid: np.ndarray) -> None:
        """Nothing: pictures have no line."""

    def close(self) -> None:
        self.file.close()


class _Events:
    """TensorBoard's events of the numbers and pictures, flushed every SYNC_SECONDS."""

    def __init__(self, folder: Path, suffix: str) -> None:
        # Not tensorboardX's SummaryWriter, whose thread ends silently at the first error, so that
        # the next write waits for ever.
        self.file = EventsWriter(str(folder / "events"), suffix)
        self._synced = time.monotonic()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self.event(step, summary=summary.scalar(name, value))

    def image(self, step: int, name: str, grid: np.ndarray) -> None:
        self.event(step, summary=summary.image(name, grid, dataformats="HWC"))

    def event(self, step: int, **content: Any) -> None:
        self.file.write_event(Event(wall_time=time.time(), step=step, **content))
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.file.flush()
            self._synced = time.monotonic()

    def close(self) -> None:
        self.file.close()


class MetricsLog:
    """metrics.jsonl and TensorBoard events of one run; resuming drops lines beyond `start_step`.

    One process has `write`; in the others the log does nothing. `last` holds the newest value of
    each name in the lines that are kept, {} for a new run. New events replace those of earlier
    starts beyond `start_step`. A `tracker` is given all that is written, and is closed with the
    log.

    On a store, lines and events are written to files of this machine, which are copied every 20
    seconds and by `sync`. A file is copied whole each time: a new one begins when PART_BYTES of
    lines are in it. The lines of all are joined at the end.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        start_step: int,
        *,
        write: bool = True,
        tracker: Writer | None = None,
    ) -> None:
        folder = place(directory)
        self.path = folder / METRICS_FILE
        self.last: dict[str, Any] = _truncate(self.path, start_step) if write else {}
        self._mirror = Mirror(folder) if write and is_object(folder) else None
        self._local = self._mirror.local if self._mirror else folder
        self._tracker = tracker
        if write:
            self._open(start_step + 1)
            self._events.event(start_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._writes = write

    def _open(self, step: int) -> None:
        """Open the files of lines and events from a step on, which are parts on a store."""
        path, suffix = self.path, f".{os.getpid()}"
        if self._mirror:
            path = self._local / LOG_PARTS / f"{step:012}.jsonl"
            suffix += f".{step}"
        self._lines = _Lines(path)
        self._events = _Events(self._local, suffix)

    @property
    def _writers(self) -> tuple[Writer, ...]:
        return (self._lines, self._events, *([self._tracker] if self._tracker else []))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Write a line {"step": step, name: value, ...}, and an event for each number.

        Raises FaultError if they cannot be written.
        """
        if not self._writes:
            return
        with self._faults():
            if self._mirror and self._lines.file.tell() > PART_BYTES:
                self._close()
                self._open(step)
            for writer in self._writers:
                writer.scalars(step, values)

    def image(self, step: int, name: str, grid: np.ndarray) -> None:
        """Write a grid u8[H,W,C] as an event. Raises as `scalars`."""
        if self._writes:
            with self._faults():
                for writer in self._writers:
                    writer.image(step, name, grid)

    def sync(self) -> None:
        """Have lines outlive a power cut, on a disk or on a store. Raises as `scalars`."""
        if not self._writes:
            return
        with self._faults():
            if self._mirror:
                self._events.file.flush()
                self._mirror.ship()
            else:
                os.fsync(self._lines.file.fileno())

    def _close(self) -> None:
        if self._writes:
            with contextlib.ExitStack() as both:  # whatever the first one raises
                both.callback(self._lines.close)
                both.callback(self._events.close)

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            silent = self._mirror and isinstance(error, TimeoutError)
            words = unanswered if silent else full_disk
            raise FaultError(words(self.path, error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an exception, a failure to write has been reported already.
        reported = contextlib.suppress(*() if kind is None else (OSError, FaultError))
        for close in (self._close, self._join):
            with reported:
                close()
        if self._tracker:
            self._tracker.close()

    def _join(self) -> None:
        """Copy to a store what is left, and join the parts of its log."""
        if self._mirror:
            with self._faults():
                self._mirror.close()
                _truncate(self.path, sys.maxsize)


def _truncate(path: Path, last_step: int) -> dict[str, Any]:
    """Keep the lines of steps <= last_step and return the last value of each name.

    A damaged line and all that follow it are removed. The parts of a log on a store are joined.
    """
    parts = log_files(path)[1:]
    if not faults.exists(path):
        if is_object(path):  # so that a run that has begun has one
            write_atomic(path, b"")
        return {}
    kept: list[str] = []
    last: dict[str, Any] = {}
    lines = faults.retried(path, lambda: read_log(path)).decode(errors="replace").splitlines()
    for line in lines:
        try:
            values = json.loads(line)
            if values["step"] > last_step:
                break
        except (ValueError, KeyError, TypeError, RecursionError):
            break
        kept.append(line)
        last |= values
    if parts:  # a process that was killed while it joined them left lines twice
        kept = list(dict.fromkeys(kept))
    write_atomic(path, "".join(f"{line}\n" for line in kept).encode())
    for part in parts:  # its lines are in the file now, or beyond the step
        part.unlink(missing_ok=True)
    return last


def last_metrics(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The newest whole line of a run's metrics.jsonl; {} before the first."""
    newest = newest_metrics(directory, 1)
    return newest[-1] if newest else {}


def newest_metrics(directory: str | os.PathLike[str], count: int) -> list[dict[str, Any]]:
    """Up to `count` newest whole lines of a run's metrics.jsonl, oldest first.

    Only the end of a long log is read.
    """
    found: list[dict[str, Any]] = []
    for line in _newest_lines(place(directory) / METRICS_FILE):
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(line)
            if isinstance(values, dict):
                found.append(values)
        if len(found) == count:
            break
    return found[::-1]


def _newest_lines(path: Path) -> Iterator[str]:
    """Yield lines from the newest to older ones, of each file of the log those at its end."""
    with contextlib.suppress(OSError):
        for each in reversed(log_files(path)):
            with each.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
                text = file.read(_TAIL).decode("utf-8", errors="replace")
            yield from reversed(text.splitlines())


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
