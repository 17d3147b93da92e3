"""A training that is told to stop: SIGTERM of a scheduler, SIGINT of a person.

The first signal lets the step in flight end; what was learned is saved and the command ends. A
second one ends it at once, and so does the end of the grace period: schedulers kill what has not
ended some 30 s after SIGTERM.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from ditjax.errors import StoppedError
from ditjax.parallel import processes

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Shells and job launchers pass on a signal that the kernel has sent to the whole group already.
ONE_SIGNAL_SECONDS = 1.0
GOES_ON = "the same command goes on"


class Stopping:
    """While it is open, signals do not end the process but are asked for with `after`.

    They are heard by a thread, at once: Python's own handlers wait for the main thread, which may
    be compiling. Only the main thread's process hears them at all.
    """

    def __init__(self, grace_seconds: float, end: Callable[[int], Any] = os._exit) -> None:
        self._grace, self._end = grace_seconds, end
        self._told = ""  # the name of the signal
        self._before: dict[int, Any] = {}

    def after(self, step: int) -> str:
        """The signal by which the training ends after this step, on all processes; '' is none.

        To be asked after each step, and before the first.
        """
        if processes.several():
            return processes.stops_at(step)
        return self._told

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._heard, self._hear = os.pipe()
        os.set_blocking(self._hear, False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        self._wakeup = signal.set_wakeup_fd(self._hear, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._hear, b"\0")
        self._thread.join()
        os.close(self._heard)
        os.close(self._hear)

    def _handle(self, number: int, _: Any) -> None:
        """Python's handler, later than the thread: for where an event loop has the wake-ups."""
        if not self._told:
            os.write(self._hear, bytes([number]))

    def _listen(self) -> None:
        first, deadline = 0.0, 0.0
        while True:
            left = max(0.0, deadline - time.monotonic()) if self._told else None
            if not select.select([self._heard], [], [], left)[0]:
                self._give_up()
                return
            for number in os.read(self._heard, 256):
                now = time.monotonic()
                if number == 0:
                    return
                if number not in SIGNALS:
                    continue
                if not self._told:
                    first, deadline = now, now + self._grace
                    self._status = 128 + number
                    self._told = signal.Signals(number).name
                    processes.wish_to_stop(self._told)
                elif now - first >= ONE_SIGNAL_SECONDS:
                    self._end(128 + number)

    def _give_up(self) -> None:
        line = (
            f"{self._told}, and not all was saved within config.train.grace_seconds ="
            f" {self._grace:g}: ended; {GOES_ON} from the newest checkpoint"
        )
        processes.leave(line, self._status)
        sys.stderr.write(f"error: {line}\n")
        sys.stderr.flush()
        self._end(self._status)


@contextmanager
def raised() -> Iterator[None]:
    """SIGTERM as a StoppedError in the main thread, so that what is open is left in good order.

    A second one ends the process as if there were none of this. For work that leaves files that
    are whole wherever it ends.
    """

    def stop(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise StoppedError(f"stopped by {signal.Signals(number).name}: {GOES_ON}", 128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
