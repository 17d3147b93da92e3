"""A file system that does not answer for a while: files cannot be opened, and then can again."""

import builtins
import errno
import io
import os
from typing import Any

import pytest

from ditjax.files import faults

# A stale handle of NFS, too many open files, a bad answer of the device, a server that is away.
PASSING = (errno.ESTALE, errno.EMFILE, errno.EIO, errno.ETIMEDOUT)
FOR_EVER = 10**6


class Unstable:
    """Fails the next `times` times that a file whose path contains `part` is opened."""

    def __init__(
        self, patch: pytest.MonkeyPatch, part: str, times: int, code: int = errno.ESTALE
    ) -> None:
        self.part, self.left, self.code = part, times, code
        real = builtins.open

        def opens(file: Any, *args: Any, **kwargs: Any) -> Any:
            path = os.fspath(file) if isinstance(file, str | os.PathLike) else ""
            if self.part in str(path) and self.left:
                self.left -= 1
                raise OSError(self.code, os.strerror(self.code), path)
            return real(file, *args, **kwargs)

        patch.setattr(builtins, "open", opens)
        patch.setattr(io, "open", opens)
        patch.setattr(faults, "WAITS", (0.0, 0.0))
