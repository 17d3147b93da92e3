"""An object store in memory, in the place of gs://, with the faults that tests ask for."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ditjax.files import store
from ditjax.files.store import Entry, MissingError, StaleError


class Memory:
    """A `Store` of the buckets 'bucket' and 'closed'; nobody may read or write the second.

    `calls` lists what was asked, as 'put NAME'. `fault` is called with each before it happens, and
    may raise or change something.
    """

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.calls: list[str] = []
        self.fault: Callable[[str], object] = lambda call: None
        self._lock = threading.Lock()
        self._writes = 0

    def _ask(self, call: str, where: tuple[str, str], exists: bool = True) -> str:
        self.calls.append(f"{call} {where[1]}")
        self.fault(self.calls[-1])
        if where[0] == "closed":
            raise PermissionError(errno.EACCES, "the store refuses it: 403")
        if where[0] != "bucket" and not exists:
            raise FileNotFoundError(errno.ENOENT, f"there is no bucket {where[0]!r}")
        return where[1] if where[0] == "bucket" else "\0"

    def head(self, where: tuple[str, str]) -> Entry | None:
        found = self.objects.get(self._ask("head", where))
        return Entry(len(found[0]), found[1]) if found else None

    def get(self, where: tuple[str, str], start: int, stop: int | None, version: str) -> bytes:
        found = self.objects.get(self._ask("get", where))
        if found is None:
            raise MissingError(errno.ENOENT, "No such file or directory")
        if version not in ("", found[1]):
            raise StaleError(errno.ESTALE, "it was written")
        return found[0][start:stop]

    def put(self, where: tuple[str, str], data: bytes | Path, unless: str | None) -> bool:
        name = self._ask("put", where, exists=False)
        with self._lock:
            if unless is not None and unless != self.objects.get(name, (b"", store.ABSENT))[1]:
                return False
            self._writes += 1
            content = data.read_bytes() if isinstance(data, Path) else data
            self.objects[name] = content, str(self._writes)
        return True

    def names(self, where: tuple[str, str], deep: bool) -> tuple[set[str], dict[str, Entry]]:
        prefix = self._ask("names", where, exists=False)
        prefix = f"{prefix}/" if prefix else ""
        below = {
            name.removeprefix(prefix): Entry(len(data), version)
            for name, (data, version) in list(self.objects.items())
            if name.startswith(prefix)
        }
        folders = {name.partition("/")[0] for name in below if "/" in name}
        direct = {name: entry for name, entry in below.items() if "/" not in name}
        return (set(), below) if deep else (folders, direct)

    def delete(self, where: tuple[str, str]) -> None:
        self.objects.pop(self._ask("delete", where), None)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """The store that gs:// is in a test."""
    made = Memory()
    monkeypatch.setattr(store, "store_of", lambda scheme: made)
    return made
