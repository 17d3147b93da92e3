"""What a run tells while it runs: metrics.jsonl, TensorBoard events, and one line of progress."""

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
from ditjax.files.atomic import full_disk, write_atomic
from ditjax.files.masking import masked_tree


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """Importing it fails, as where it is not installed."""
    held = {module: sys.modules[module]} if module in sys.modules else {}
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
        sys.modules.update(held)


# tensorboardX would import PyTorch where there is one, for what is not used here.
with _without("torch"):
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

METRICS_FILE = "metrics.jsonl"
SYNC_SECONDS = 20.0  # between what TensorBoard is sure to see
_TAIL = 1 << 16  # bytes at the end of a log that are read for its newest lines


class MetricsLog:
    """metrics.jsonl and TensorBoard events of one run; resuming drops lines beyond `start_step`.

    Of several processes one has `write`; in the others it does nothing.
    """

    def __init__(
        self, directory: str | os.PathLike[str], start_step: int, *, write: bool = True
    ) -> None:
        self.path = Path(directory) / METRICS_FILE
        # The newest value of each name in the lines that stay, {} for a new run.
        self.last: dict[str, Any] = _truncate(self.path, start_step) if write else {}
        self._file = self.path.open("a", encoding="utf-8") if write else None
        self._events = _Events(Path(directory), start_step + 1) if write else None

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """One line {"step": step, name: value, ...} and one event a number.

        Raises FaultError where they cannot be written.
        """
        if self._file is None or self._events is None:
            return
        with self._told():
            self._file.write(json.dumps({"step": step, **masked_tree(values)}) + "\n")
            self._file.flush()
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._events.add(step, summary.scalar(name, value))

    def image(self, step: int, name: str, grid: np.ndarray) -> None:
        """A grid u8[H,W,C] as an event. Raises as `scalars`."""
        if self._events:
            with self._told():
                self._events.add(step, summary.image(name, grid, dataformats="HWC"))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FaultError(full_disk(self.path, error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What could not be written has been told.
        told = contextlib.suppress(*() if kind is None else (OSError,))
        for file in (self._file, self._events):
            if file:
                with told:
                    file.close()


class _Events:
    """TensorBoard's events of one start, which take the place of those from `first_step` on.

    Not tensorboardX's SummaryWriter: its thread ends at the first error, tells it to nobody who
    could act on it, and lets who gives it more wait for ever.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        self._writer = EventsWriter(str(directory / "events"), f".{os.getpid()}")
        self._synced = time.monotonic()
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def add(self, step: int, value: Any) -> None:
        """A summary of a step. Raises OSError."""
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=value))
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._writer.flush()
            self._synced = time.monotonic()

    def close(self) -> None:
        """Raises OSError."""
        self._writer.close()


def _truncate(path: Path, last_step: int) -> dict[str, Any]:
    """Keeps the lines of steps <= last_step, returns each name's last value.

    A torn line and what follows go.
    """
    if not path.exists():
        return {}
    kept: list[str] = []
    last: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
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
    """Up to `count` newest whole lines of a run's metrics.jsonl, the oldest of them first.

    Of a long log only the end is read.
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

    On a terminal the line is redrawn; in a file each report is a line of its own, at most one in
    `every_seconds`. The rate leaves out the first reported interval, which holds the compilation.
    Of several processes only the first tells.
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
        # Asked in this order: a process that only starts others must not take the devices.
        self._quiet = jax.distributed.is_initialized() and jax.process_index() > 0
        self._every = 0.2 if self._tty else every_seconds
        self._first: tuple[float, float] = (start, time.monotonic())
        self._compiled = False
        self._shown = 0.0

    def report(self, done: float, **values: float) -> None:
        """Shows `done` of the total, with named values."""
        now = time.monotonic()
        rate = (done - self._first[0]) / max(now - self._first[1], 1e-9)
        if not self._compiled:
            self._first, self._compiled = (done, now), True
        if self._quiet or (now - self._shown < self._every and done < self.total):
            return
        self._shown = now
        left = duration((self.total - done) / rate) if rate > 0 else "?"
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

    def say(self, words: str) -> None:
        """A line of its own."""
        if not self._quiet:
            self._out.write(f"\r\x1b[2K{words}\n" if self._tty else f"{words}\n")
            self._out.flush()


def duration(seconds: float) -> str:
    """3725 -> '1:02:05', 65 -> '1:05'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
