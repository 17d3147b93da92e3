"""Files that appear whole or not at all, and JSON of bounded size.

A reader never sees half a file, and a crash leaves the previous version in place. Text and JSON are
masked here (`files/masking.py`), so that no file of a run holds a secret.
"""

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from ditjax.errors import FaultError, UserError
from ditjax.files import faults, store
from ditjax.files.masking import masked, masked_tree

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a disk that takes no more data
MAX_JSON = 1 << 26  # bytes
MAX_JSON_DEPTH = 100  # levels of nesting


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """First 12 hex digits of SHA-256 of the canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(protocol, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, synced and renamed to `path` when the block ends.

    Makes the folder. An exception leaves `path` as it was; a killed process leaves the temporary
    file, which `unfinished` finds. On a store, a file of this machine that is uploaded at the end.
    Raises UserError if the folder cannot be made or written, and FaultError if the disk is full or
    the store does not answer.
    """
    path = store.place(path)
    if isinstance(path, store.ObjectPath):
        with _write_errors(path), store.uploaded(path) as temporary:
            yield temporary
        return
    # A file of tempfile's has mode 600; this one follows the umask, for readers of a shared folder.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Raise FaultError for a full disk or a store that does not answer, UserError for others."""
    try:
        yield
    except OSError as error:
        if store.is_object(path) and isinstance(error, TimeoutError):
            raise FaultError(unanswered(path, error)) from error
        if error.errno in FULL:
            raise FaultError(full_disk(path, error)) from error
        raise UserError(unwritable(path, error)) from error


def unwritable(path: str | os.PathLike[str], error: OSError) -> str:
    """The error message for a file that cannot be written."""
    return f"cannot write {path}: {error.strerror or error}; choose a writable folder."


def unanswered(path: str | os.PathLike[str], error: OSError) -> str:
    """The error message for a store that does not answer."""
    return f"cannot write {path}: {error.strerror}. Run the same command again to resume."


def full_disk(path: str | os.PathLike[str], error: OSError) -> str:
    """The error message for a full disk."""
    return (
        f"cannot write {path}: {error.strerror}. Free some space, then run the same command again"
        " to resume."
    )


def unfinished(path: str | os.PathLike[str]) -> list[Path]:
    """Temporary files that killed processes left while writing `path`."""
    path = store.place(path)
    if store.is_object(path):  # a put leaves none
        return []
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A new binary file that becomes `path` when the block ends. Raises as `atomic_path`."""
    with atomic_path(path) as temporary, open(temporary, "xb") as file:
        yield file


def write_atomic(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write bytes to `path`, whole or not at all. Raises as `atomic_path`."""
    with atomic(path) as file:
        file.write(data)
    return store.place(path)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write text as UTF-8, with secrets masked. Raises as `atomic_path`."""
    return write_atomic(path, masked(text).encode())


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `json_text`. Raises as `atomic_path`."""
    return write_atomic(path, json_text(value).encode())


def json_text(value: Any) -> str:
    """The text of a JSON file: strict, indented by 1, of the `recordable` value."""
    return json.dumps(recordable(value), indent=1, allow_nan=False) + "\n"


def recordable(value: Any) -> Any:
    """The value as it comes back from a JSON file.

    NaN and infinities are None, unknown objects their str(), and secrets are masked.
    """
    plain = json.dumps(finite_or_null(value), allow_nan=False, default=str)
    return masked_tree(json.loads(plain))


def finite_or_null(value: Any) -> Any:
    """The value with None for NaN and infinities, which JSON lacks, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def load_json(path: str | os.PathLike[str], limit: int = MAX_JSON) -> Any:
    """The value of a JSON file of at most `limit` bytes and MAX_JSON_DEPTH levels.

    Raises OSError if the file cannot be opened, FaultError if the file system does not answer, and
    ValueError if the file is not UTF-8, not JSON, too long or nested too deep.
    """

    data = faults.retried(path, lambda: store.read_start(path, limit + 1))
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("it nests too deep") from None
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return value
    raise ValueError(f"it nests more than {MAX_JSON_DEPTH} deep")


def read_json(path: str | os.PathLike[str], remedy: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, with the remedy, for anything else."""
    remedy = f"; {remedy}" if remedy else ""
    try:
        value = load_json(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}{remedy}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}{remedy}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected an object{remedy}.")
    return value


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable. Some network file systems refuse, which does no harm."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
