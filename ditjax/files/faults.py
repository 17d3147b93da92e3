"""Faults of a file system: errors that say nothing about what a file holds.

A file is damaged if it is missing where it must be, or if its content fails a digest or a parse. A
stale handle, too many open files or an error of the device may pass: reading is tried again, and
then the command ends. Nothing is set aside, replaced or removed because of such an error.
"""

import errno
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax

from ditjax.errors import FaultError, one_line, reason
from ditjax.files import store

Read = TypeVar("Read")

WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before each new attempt

_NAMES = (
    "EACCES EAGAIN EBUSY ECOMM ECONNABORTED ECONNREFUSED ECONNRESET EHOSTDOWN EHOSTUNREACH EINTR"
    " EIO EMFILE ENETDOWN ENETRESET ENETUNREACH ENFILE ENOBUFS ENODEV ENOLCK ENOLINK ENOMEM"
    " ENOTCONN ENXIO EPERM EPROTO EREMOTEIO ESHUTDOWN ESTALE ETIMEDOUT"
)
_FAULTS = frozenset(getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name))
# TensorStore and array_record raise their own types, with the system's words in the message.
_WORDS = tuple(sorted({os.strerror(code) for code in _FAULTS}))


def is_fault(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is a fault of the file system."""
    return any(_is_fault(each) for each in _chain(error))


def may_pass(error: BaseException) -> bool:
    """Whether reading again may help: a fault that was not waited for, and no permission."""
    if isinstance(error, FaultError) or not is_fault(error):
        return False
    return not any(isinstance(each, PermissionError) for each in _chain(error))


def _is_fault(error: BaseException) -> bool:
    if isinstance(error, OSError):
        if error.errno is None:
            return isinstance(error, TimeoutError | ConnectionError)
        return error.errno in _FAULTS
    if isinstance(error, jax.errors.JaxRuntimeError):  # of the devices and of other processes
        return False
    return isinstance(error, RuntimeError | ValueError) and bool(_system_words(error))


def _system_words(error: BaseException) -> str:
    """The system's words for a fault in an error's message, or ''."""
    message = str(error).lower()
    return next((words for words in _WORDS if words.lower() in message), "")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from or during."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def retried(what: object, read: Callable[[], Read], waits: Sequence[float] | None = None) -> Read:
    """Call `read`, and again after each of `waits` seconds (default WAITS) while it meets a fault.

    Raises FaultError, which names `what`, if the fault stays. Other errors are raised at once, and
    so is a PermissionError, which does not pass. An error that was raised from a fault is one: a
    reader that turns every error into a UserError may be retried as a whole.
    """
    for seconds in (*(WAITS if waits is None else waits), None):
        try:
            return read()
        except Exception as error:
            if not may_pass(error):
                raise
            if seconds is None:
                raise unread(what, error) from error
            line = f"warning: cannot read {what} ({_words(error)}): trying again in {seconds:g} s"
        print(one_line(line), file=sys.stderr, flush=True)
        time.sleep(seconds)
    raise AssertionError  # the last turn returns or raises


def unread(what: object, error: BaseException) -> FaultError:
    """The error that ends a command which cannot read `what`."""
    return FaultError(
        f"cannot read {what}: {_words(error)}. Nothing was changed; run the same command again when"
        " the file system answers."
    )


def _words(error: BaseException) -> str:
    """The system's words alone: TensorStore puts hundreds of characters around them."""
    system = next((each for each in _chain(error) if isinstance(each, OSError)), None)
    words = system.strerror if system else next(filter(None, map(_system_words, _chain(error))), "")
    return words or reason(error)


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file or folder at a path. Raises FaultError if that cannot be found out.

    `Path.exists` says False for a stale handle in some versions of Python, and raises an error for
    a name that is too long.
    """
    return _mode(path) is not None


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether there is a folder at a path. Raises as `exists`."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def _mode(path: str | os.PathLike[str]) -> int | None:
    def found() -> int | None:
        try:
            return store.place(path).stat().st_mode
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                return None
            raise

    return retried(path, found)
