"""stdout and stderr that cannot end a command: closed, without a reader, or of few characters."""

import contextlib
import errno
import os
import sys
from typing import Any

# The reader of a pipe has ended, or a terminal has been closed.
_GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO}


class _Kept:
    """A text stream that drops what nobody can read.

    Without a reader, everything that follows goes to the null device. With `always`, any error does
    that: where there is no stderr, nothing can be reported. Characters that the encoding lacks are
    escaped.
    """

    def __init__(self, stream: Any, *, always: bool) -> None:
        self._stream, self._always = stream, always
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: OSError | ValueError) -> None:
        """Send what follows, and what is still buffered, to the null device."""
        closed = isinstance(error, ValueError) and self._stream.closed
        gone = isinstance(error, OSError) and (self._always or error.errno in _GONE)
        if not closed and not gone:
            raise error
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_streams() -> None:
    """Replace stdout and stderr by streams that outlast their readers. A second call does nothing.

    A descriptor that the parent closed is opened on the null device: otherwise the next file that
    the program opens would have its number, and XLA's messages would go into that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, always in (("stdout", False), ("stderr", True)):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for all its life)
        if not isinstance(stream, _Kept):
            setattr(sys, name, _Kept(stream, always=always))
