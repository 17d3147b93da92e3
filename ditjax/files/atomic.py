"""Files that are written whole or not at all, and JSON of a bounded size.

A reader never meets half of a file, and a crash keeps the old one.
"""

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from ditjax.errors import FaultError, UserError
from ditjax.files.masking import masked_tree

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk says that takes no more
MAX_JSON = 1 << 26  # bytes, and levels of nesting, of a JSON file
MAX_DEPTH = 100


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """First 12 hex digits of SHA-256 of the canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(protocol, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The name of a file to make beside `path`, synced and renamed over `path` in the end.

    Makes the folder. On an exception `path` is as it was; a killed process leaves the file behind,
    named as `unfinished` finds it. Raises UserError where the folder cannot be made or written, and
    FaultError for a full disk.
    """
    path = Path(path)
    # Unlike tempfile's, this name gives a file the umask's mode: others read a shared folder.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno in FULL:
            raise FaultError(full_disk(path, error)) from error
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose a folder that can be written."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def full_disk(path: str | os.PathLike[str], error: OSError) -> str:
    """The line for a disk that takes no more."""
    return f"cannot write {path}: {error.strerror}. Make room there: the same command goes on."


def unfinished(path: str | os.PathLike[str]) -> list[Path]:
    """What processes that were killed while writing `path` left beside it."""
    path = Path(path)
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A new file that becomes `path` in the end: see `atomic_path`."""
    with atomic_path(path) as temporary, open(temporary, "xb") as file:
        yield file


def write_atomic(path: str | os.PathLike[str], data: bytes) -> Path:
    """`data` under `path`, whole or not at all: see `atomic`."""
    with atomic(path) as file:
        file.write(data)
    return Path(path)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Strict JSON, written whole: NaN and infinities become null, unknown objects their text.

    What looks like a secret is masked.
    """
    text = json.dumps(plain(value), indent=1, allow_nan=False)
    return write_atomic(path, (text + "\n").encode())


def load_json(path: str | os.PathLike[str], limit: int = MAX_JSON) -> Any:
    """A JSON file's value, of a bounded size and depth.

    Raises OSError where it cannot be opened, and ValueError for everything else: not UTF-8, not
    JSON, too long, too deep.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("it nests too deep") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return value
    raise ValueError(f"it nests more than {MAX_DEPTH} deep")


def plain(value: Any) -> Any:
    """What JSON can hold, and nothing secret."""
    plain = json.loads(json.dumps(finite_or_null(value), allow_nan=False, default=str))
    return masked_tree(plain)


def sync_folder(folder: Path) -> None:
    """Makes the rename itself durable; some network file systems refuse, which loses nothing."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def finite_or_null(value: Any) -> Any:
    """JSON has no NaN: null stands for it, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
