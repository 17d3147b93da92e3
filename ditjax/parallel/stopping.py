"""Stopping cleanly on request: SIGTERM from a scheduler, or SIGINT from a person.

On the first signal a training finishes the current step, saves, and exits. A second signal ends it
at once, and so does the end of the grace period, because schedulers kill a process some 30 s after
SIGTERM.
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
# Shells and job launchers forward signals that the kernel has already sent to the whole group.
ONE_SIGNAL_SECONDS = 1.0
RESUME_HINT = "run the same command again to resume"


class Stopping:
    """A context manager in which signals do not end the process; `after` reports them.

    A thread receives them at once, whereas Python's handlers wait for the main thread, which may be
    compiling. Opened in another thread than the main one, it does nothing.
    """

    def __init__(self, grace_seconds: float, end: Callable[[int], Any] = os._exit) -> None:
        self._grace, self._end = grace_seconds, end
        self._signal = ""  # the name of the first one
        self._before: dict[int, Any] = {}

    def after(self, step: int) -> str:
        """The signal because of which all processes stop after this step, or ''.

        Call it after each step, and before the first.
        """
        if processes.is_distributed():
            return processes.stop_reason(step)
        return self._signal

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _handle(self, number: int, _: Any) -> None:
        """Python's own handler, needed only if an event loop has taken the wake-up descriptor."""
        if not self._signal:
            os.write(self._write, bytes([number]))

    def _listen(self) -> None:
        first, deadline = 0.0, 0.0
        while True:
            left = max(0.0, deadline - time.monotonic()) if self._signal else None
            if not select.select([self._read], [], [], left)[0]:
                self._give_up()
                return
            for number in os.read(self._read, 256):
                now = time.monotonic()
                if number == 0:
                    return
                if number not in SIGNALS:
                    continue
                if not self._signal:
                    first, deadline = now, now + self._grace
                    self._status = 128 + number
                    self._signal = signal.Signals(number).name
                    processes.request_stop(self._signal)
                elif now - first >= ONE_SIGNAL_SECONDS:
                    self._end(128 + number)

    def _give_up(self) -> None:
        line = (
            f"{self._signal}, and not all was saved within config.train.grace_seconds ="
            f" {self._grace:g}: ended; {RESUME_HINT} from the newest checkpoint"
        )
        processes.abort(line, self._status)
        sys.stderr.write(f"error: {line}\n")
        sys.stderr.flush()
        self._end(self._status)


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Raise StoppedError in the main thread on SIGTERM, so that context managers are left.

    A second SIGTERM ends the process. This is for work whose files are whole whenever it ends.
    """

    def stop(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise StoppedError(f"stopped by {signal.Signals(number).name}: {RESUME_HINT}", 128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
