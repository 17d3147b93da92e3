"""Places: paths of this machine, and objects on stores (gs://, s3://). Nothing else knows URLs.

`place` makes a `pathlib.Path` of either, so that the rest of ditjax says `folder / name`. An object
is written whole or not at all, by one put. A store has no folders: one is there while an object is
below it, an empty one is absent, and making one does nothing. Renames, links and appending are
missing; what needs them has its own way for stores: `write_if` for leases, a marker for checkpoints
(`runs/steps.py`), `Mirror` for logs.

Errors are those of pathlib: FileNotFoundError, PermissionError, and TimeoutError for a store that
does not answer. The clients are imported when the first URL is met.
"""

import contextlib
import errno
import fnmatch
import functools
import hashlib
import io
import os
import re
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PosixPath
from typing import Any, NamedTuple, Protocol

from ditjax.errors import FaultError, UserError, reason
from ditjax.files import hub

ABSENT = ""  # the version of an object that does not exist
SHIP_SECONDS = 20.0  # between copies of files that grow
REQUEST_SECONDS = 20.0  # for which a request is tried again before it counts as not answered
THREADS = 8  # requests at a time; the clients keep 10 connections
CACHE_VARIABLE = "DITJAX_OBJECTS"
_BLOCK = 1 << 20  # bytes of a read
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")


def place(path: str | os.PathLike[str]) -> Path:
    """The path of a file or folder on this machine, or of an object on a store.

    What is on the hub, hf:OWNER/NAME, is copied to this machine (`files/hub.py`). Raises UserError
    for a URL of another kind, or without a bucket.
    """
    if isinstance(path, ObjectPath):
        return path
    if isinstance(path, Path):
        # What pathlib makes of a URL, by a caller who did not ask here.
        return ObjectPath(path) if path.parts[:1] in _FIRST_PARTS else path
    text = os.fspath(path)
    if text.startswith(hub.PREFIX):
        return hub.fetched(text)
    found = _URL.fullmatch(text)
    if found is None:
        return Path(text)
    scheme, rest = found.groups()
    if scheme not in _STORES:
        raise UserError(
            f"{text}: {scheme}:// cannot be read or written: expected a path,"
            f" {' or '.join(f'{known}://BUCKET/NAME' for known in _STORES)}."
        )
    bucket, *parts = rest.split("/")
    if not _BUCKET.fullmatch(bucket) or {".", ".."} & set(parts):
        raise UserError(
            f"{text}: expected {scheme}://BUCKET/NAME, with a bucket of 3 to 63 of a-z, 0-9, - _ .,"
            " and neither . nor .. in the name."
        )
    return ObjectPath(text)


def is_object(path: str | os.PathLike[str]) -> bool:
    """Whether a place is on a store."""
    return isinstance(path, ObjectPath)


class Entry(NamedTuple):
    """An object's size in bytes, and a version that every write changes."""

    size: int
    version: str


class Store(Protocol):
    """What is asked of a store. `where` is the bucket and the object's name.

    Raises OSError; FileNotFoundError if the bucket does not exist.
    """

    def head(self, where: tuple[str, str]) -> Entry | None:
        """The object; None if it does not exist."""

    def get(self, where: tuple[str, str], start: int, stop: int | None, version: str) -> bytes:
        """Bytes [start, stop) of the object, of one version if it is named."""

    def put(self, where: tuple[str, str], data: bytes | Path, unless: str | None) -> bool:
        """Write the object; with `unless`, only if that is its version. Returns whether it did."""

    def names(self, where: tuple[str, str], deep: bool) -> tuple[set[str], dict[str, Entry]]:
        """(folders, objects) directly below a folder, by name; with `deep`, all objects below."""

    def delete(self, where: tuple[str, str]) -> None:
        """Remove the object, if it exists."""


class ObjectPath(PosixPath):
    """gs://BUCKET/NAME or s3://BUCKET/NAME: a pathlib.Path whose file is an object.

    Its parts are 'gs:', the bucket and the parts of the name. Methods that a store cannot serve
    raise OSError.
    """

    __slots__ = ()

    def __str__(self) -> str:
        scheme, slash, rest = super().__str__().partition(":/")
        return f"{scheme}://{rest}" if slash else scheme

    __fspath__ = __str__

    @property
    def scheme(self) -> str:
        """'gs' or 's3'."""
        return self.parts[0][:-1]

    @property
    def where(self) -> tuple[str, str]:
        """The bucket and the object's name."""
        return self.parts[1], "/".join(self.parts[2:])

    @property
    def store(self) -> Store:
        """The store's client."""
        return store_of(self.scheme)

    # What there is

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """The kind and size; other fields are 0."""
        found = self.store.head(self.where) if self.where[1] else None
        if found is None and not self.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        mode = stat.S_IFREG if found else stat.S_IFDIR
        return os.stat_result((mode, 0, 0, 1, 0, 0, found.size if found else 0, 0, 0, 0))

    def exists(self, **_: bool) -> bool:
        """Whether there is an object of this name, or one below it."""
        return self.is_file() or self.is_dir()

    def is_file(self, **_: bool) -> bool:
        """Whether there is an object of this name."""
        return bool(self.where[1]) and self.store.head(self.where) is not None

    def is_dir(self, **_: bool) -> bool:
        """Whether there is an object below this name."""
        try:
            return any(self.store.names(self.where, False))
        except FileNotFoundError:
            return False

    def is_symlink(self) -> bool:
        """False."""
        return False

    def iterdir(self) -> Generator["ObjectPath", None, None]:
        """Yield what is directly below, in order. An absent folder is an empty one."""
        folders, objects = self.store.names(self.where, False)
        yield from (self / name for name in sorted(folders | objects.keys()))

    def glob(self, pattern: str, **_: Any) -> Iterator["ObjectPath"]:  # type: ignore[override]
        """Yield what matches a pattern without '**', in order."""
        here, below = pattern.strip("/").partition("/")[::2]
        if here == "**":
            raise OSError(errno.EINVAL, "'**' is not for stores", str(self))
        if not set(here) & set("*?["):
            found = [self / here] if below or (self / here).exists() else []
        else:
            # As pathlib, '*' matches names with a dot at their beginning, too.
            found = [path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, here)]
        for path in found:
            yield from path.glob(below) if below else [path]

    # Names: they are whole already

    def resolve(self, strict: bool = False) -> "ObjectPath":
        """The path itself, as are the next two."""
        return self

    def absolute(self) -> "ObjectPath":
        return self

    def expanduser(self) -> "ObjectPath":
        return self

    def is_absolute(self) -> bool:
        """True."""
        return True

    # Reading

    def open(self, mode: str = "r", *_: Any, **options: Any) -> Any:
        """A file to read; parts of the object are fetched as they are read."""
        if mode not in ("r", "rt", "rb"):
            raise OSError(errno.EINVAL, f"an object cannot be opened as {mode!r}", str(self))
        file = io.BufferedReader(_Ranges(self), _BLOCK)
        options.pop("buffering", None)
        return file if mode == "rb" else io.TextIOWrapper(file, **options)

    def read_bytes(self) -> bytes:
        """The whole object."""
        return self.store.get(self.where, 0, None, "")

    def read_text(self, encoding: str | None = None, errors: str | None = None, **_: Any) -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    # Writing

    def write_bytes(self, data: Any) -> int:
        """Write the object by one put."""
        self.store.put(self.where, bytes(data), None)
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, *_: Any, **__: Any) -> int:
        """Write text by one put."""
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        self.store.delete(self.where)

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Nothing: a store has no folders."""

    def rmdir(self) -> None:
        """Nothing: an empty folder is absent."""

    def rename(self, target: Any) -> Any:
        """Raise OSError: a rename on a store is a copy and a removal, and can stop between."""
        raise OSError(errno.ENOTSUP, "an object cannot be renamed", str(self))

    replace = rename


class _Ranges(io.RawIOBase):
    """An object as a file of bytes; every read asks for the version that was there at first."""

    def __init__(self, path: ObjectPath) -> None:
        found = path.store.head(path.where)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        self._path, self._entry, self._at = path, found, 0
        self.name = str(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._entry.size}[whence]
        if begin + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self.name)
        self._at = begin + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._entry.size)
        if stop <= self._at:
            return 0
        data = self._path.store.get(self._path.where, self._at, stop, self._entry.version)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


# ---- what pathlib lacks, for both kinds of places


def present(path: Path) -> bool:
    """Whether there is something at a path; False, too, for a name that is too long."""
    return path.exists() if isinstance(path, ObjectPath) else os.path.exists(path)


def read_start(path: str | os.PathLike[str], limit: int) -> bytes:
    """The first `limit` bytes of a file. Raises OSError, also for what is no regular file."""
    path = place(path)
    if isinstance(path, ObjectPath):
        return path.store.get(path.where, 0, limit, "")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    with open(path, "rb") as file:
        return file.read(limit)


def zip_source(path: str | os.PathLike[str]) -> Any:
    """What zipfile opens: the path of a file on this machine, or an object as a file."""
    path = place(path)
    return path.open("rb") if isinstance(path, ObjectPath) else path


def walk_tree(
    root: Path, onerror: Callable[[OSError], object]
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walk a folder from its root downwards: (folder, its folders, its files), as os.walk."""
    if not isinstance(root, ObjectPath):
        for folder, folders, files in os.walk(root, onerror=onerror):
            yield Path(folder), folders, files
        return
    try:
        below, objects = root.store.names(root.where, False)
    except OSError as error:
        onerror(error)
        return
    names = sorted(below)
    yield root, names, sorted(objects)
    for name in names:
        yield from walk_tree(root / name, onerror)


def remove_tree(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a folder with all that is below it."""
    if not isinstance(path, ObjectPath):
        shutil.rmtree(path, ignore_errors=ignore_errors)
        return
    with contextlib.suppress(*((OSError,) if ignore_errors else ())):
        _each(lambda name: path.joinpath(name).unlink(missing_ok=True), _below(path))


def _below(path: ObjectPath) -> dict[str, Entry]:
    """Every object below a folder, by its name from there."""
    return path.store.names(path.where, True)[1]


def _each(act: Callable[[str], object], names: Any) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(act, sorted(names)))


def append_line(path: Path, line: str) -> None:
    """Add a line to a small text file, which is made if it does not exist."""
    if not isinstance(path, ObjectPath):
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        return
    while True:
        data, version = read_version(path) or (b"", ABSENT)
        if write_if(path, data + f"{line}\n".encode(), version):
            return


def read_version(path: ObjectPath) -> tuple[bytes, str] | None:
    """(content, version) of an object; None if it does not exist."""
    for _ in range(10):
        found = path.store.head(path.where)
        if found is None:
            return None
        with contextlib.suppress(FileNotFoundError, StaleError):  # it was written meanwhile
            return path.store.get(path.where, 0, None, found.version), found.version
    raise TimeoutError(errno.ETIMEDOUT, "it is written again and again", str(path))


def write_if(path: ObjectPath, data: bytes, version: str) -> bool:
    """Write an object if `version` is still its version, ABSENT for none. Returns whether it did.

    False also for a write that succeeded and whose answer was lost: read the object to know.
    """
    return path.store.put(path.where, data, version)


class MissingError(FileNotFoundError):
    """Raised for an object that does not exist; FileNotFoundError also stands for a bucket."""


class StaleError(OSError):
    """Raised when an object has been written since its version was read."""


@contextlib.contextmanager
def uploaded(path: ObjectPath) -> Iterator[Path]:
    """A temporary file of this machine, which becomes the object when the block ends.

    An exception, or the end of the process, leaves the object as it was.
    """
    with tempfile.TemporaryDirectory(prefix="ditjax-") as scratch:
        temporary = Path(scratch) / path.name
        yield temporary
        path.store.put(path.where, temporary, None)


def upload_tree(source: Path, target: Path, last: str = "") -> None:
    """Copy the files of a folder to a store; the file named `last` comes after all others."""
    files = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
    there = ObjectPath(target)

    def act(name: str) -> None:
        there.store.put(there.joinpath(name).where, source / name, None)

    _each(act, [name for name in files if name != last])
    _each(act, [name for name in files if name == last])


def local_copy(path: str | os.PathLike[str]) -> Path:
    """A file or folder of this machine with the content of a place: the path itself, or a copy.

    Copies are kept in $DITJAX_OBJECTS, by default ~/.cache/ditjax/objects, by name and version: an
    object is copied once. Raises UserError if it cannot be read, FaultError if it does not answer.
    """
    path = place(path)
    if not isinstance(path, ObjectPath):
        return path
    try:
        found = path.store.head(path.where) if path.where[1] else None
        entries = {"": found} if found else _below(path)
        if not entries:
            return path  # the caller reports that nothing is there
        text = f"{path} {sorted(entries.items())}"
        root = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/ditjax/objects").expanduser()
        target = root / hashlib.sha256(text.encode()).hexdigest()[:20] / path.name
        if not target.exists():
            size = sum(entry.size for entry in entries.values())
            print(f"{path}: {size / 2**20:,.1f} MiB are copied to {target}", file=sys.stderr)
            _download(path, entries, target)
    except TimeoutError as error:
        raise FaultError(f"cannot read {path}: {error.strerror}.") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    return target


def for_readers(path: Path) -> Path:
    """What array_record reads in the place of a path: a path of this machine or on gs://.

    It would take an absent object for an empty one or wait without a word: that one is there is
    for the caller to find out. What is on other stores is copied. Raises as `local_copy`.
    """
    direct = isinstance(path, ObjectPath) and path.scheme == "gs"
    return path if direct else local_copy(path)


def _download(path: ObjectPath, entries: dict[str, Entry], target: Path) -> None:
    """Copy objects below a path; the copy appears whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=target.parent))
    try:

        def fetch(name: str) -> None:
            source = path / name if name else path
            file = scratch / target.name / name if name else scratch / target.name
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("xb") as out:
                for start in range(0, entries[name].size, 64 * _BLOCK):
                    stop = min(start + 64 * _BLOCK, entries[name].size)
                    out.write(source.store.get(source.where, start, stop, entries[name].version))

        _each(fetch, entries)
        with contextlib.suppress(FileExistsError, OSError):  # another process was faster
            os.rename(scratch / target.name, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class Mirror:
    """A folder of this machine whose files are copied to a store as they grow.

    A thread copies what has changed every SHIP_SECONDS; `ship` does so at once. A file is sent
    whole each time: start another one before it is long.
    """

    def __init__(self, target: Path) -> None:
        self.local = Path(tempfile.mkdtemp(prefix="ditjax-"))
        self._target = target
        self._sent: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def ship(self) -> None:
        """Copy what has changed. Raises OSError; what was not copied is copied by the next call."""
        with self._lock:
            # In the order of the names: the parts of a log arrive as they were written.
            for path in sorted(self.local.rglob("*")):
                if path.is_file() and path.stat().st_size != self._sent.get(path):
                    data = path.read_bytes()
                    self._target.joinpath(path.relative_to(self.local)).write_bytes(data)
                    self._sent[path] = len(data)

    def close(self) -> None:
        """Copy what is left, and remove the folder. Raises OSError."""
        self._stop.set()
        self._thread.join()
        try:
            self.ship()
        finally:
            shutil.rmtree(self.local, ignore_errors=True)

    def _run(self) -> None:
        while not self._stop.wait(SHIP_SECONDS):
            with contextlib.suppress(OSError):  # the next `ship` raises it if it stays
                self.ship()


# ---- the stores


@functools.cache
def store_of(scheme: str) -> Store:
    """The client of a store. Raises UserError if it is not installed."""
    return _STORES[scheme]()


def _url(scheme: str, where: tuple[str, str]) -> str:
    return f"{scheme}://{where[0]}/{where[1]}"


def _missing(scheme: str, extra: str, error: ImportError) -> UserError:
    return UserError(
        f"{scheme}:// needs packages that are not installed ({reason(error)}): pip install"
        f" 'ditjax[{extra}]'"
    )


def _failure(url: str, status: int | None, words: str, *, credentials: bool = False) -> OSError:
    """The OSError for the answer of a store."""
    if status == 404:
        return FileNotFoundError(errno.ENOENT, f"there is no bucket {url.split('/')[2]!r}", url)
    if status in (401, 403) or credentials:
        return PermissionError(errno.EACCES, f"the store refuses it: {words}", url)
    return TimeoutError(errno.ETIMEDOUT, f"the store does not answer: {words}", url)


def _prepare_environment() -> None:
    """Set what the other libraries that read gs:// look for, before they are imported.

    One variable names an emulator for all of them: nothing may reach for Google's servers then.
    """
    # gcsfs would ask for the kind of a bucket by a service of its own, and warn at each call.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
        os.environ.setdefault("CLOUD_STORAGE_EMULATOR_ENDPOINT", emulator)  # array_record's
        os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "emulator")  # TensorStore's
        os.environ.setdefault("NO_GCE_CHECK", "true")  # google-auth's


class _Google:
    """gs://, by google-cloud-storage."""

    def __init__(self) -> None:
        _prepare_environment()
        try:
            import fsspec.config
            import gcsfs  # noqa: F401 (orbax and tensorflow-datasets read gs:// by it)
            import requests
            from google.api_core import exceptions
            from google.auth.exceptions import GoogleAuthError
            from google.cloud import storage
            from google.cloud.storage.retry import DEFAULT_RETRY
        except ImportError as error:
            raise _missing("gs", "gcs", error) from None
        # A process would not see what others write.
        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
        self._answers = exceptions
        self._auth = GoogleAuthError
        self._errors = (
            exceptions.GoogleAPIError,
            GoogleAuthError,
            requests.exceptions.RequestException,
        )
        self._options = {
            "retry": DEFAULT_RETRY.with_timeout(REQUEST_SECONDS),
            "timeout": REQUEST_SECONDS,
        }
        with self._translated("gs://"):
            self._client = storage.Client()

    def head(self, where: tuple[str, str]) -> Entry | None:
        with self._translated(_url("gs", where)):
            blob = self._client.bucket(where[0]).get_blob(where[1], **self._options)
        return None if blob is None else Entry(int(blob.size), str(blob.generation))

    def get(self, where: tuple[str, str], start: int, stop: int | None, version: str) -> bytes:
        url = _url("gs", where)
        try:
            with self._translated(url):
                blob = self._client.bucket(where[0]).blob(
                    where[1], generation=int(version) if version else None
                )
                end = None if stop is None else stop - 1
                data = blob.download_as_bytes(start=start or None, end=end, **self._options)
                return bytes(data)
        except FileNotFoundError:
            if version and self.head(where):
                raise StaleError(errno.ESTALE, os.strerror(errno.ESTALE), url) from None
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from None
        except self._answers.RequestRangeNotSatisfiable:
            return b""

    def put(self, where: tuple[str, str], data: bytes | Path, unless: str | None) -> bool:
        match = None if unless is None else int(unless or 0)
        blob = self._client.bucket(where[0]).blob(where[1])
        try:
            with self._translated(_url("gs", where)):
                options = {**self._options, "if_generation_match": match}
                if isinstance(data, Path):
                    blob.upload_from_filename(str(data), **options)
                else:
                    blob.upload_from_string(data, "application/octet-stream", **options)
        except self._answers.PreconditionFailed:
            return False
        return True

    def names(self, where: tuple[str, str], deep: bool) -> tuple[set[str], dict[str, Entry]]:
        prefix = f"{where[1]}/" if where[1] else ""
        with self._translated(_url("gs", where)):
            delimiter = None if deep else "/"
            listed = self._client.list_blobs(
                where[0], prefix=prefix, delimiter=delimiter, **self._options
            )
            objects = {
                blob.name.removeprefix(prefix): Entry(int(blob.size), str(blob.generation))
                for blob in listed
            }
            folders = {name.removeprefix(prefix).rstrip("/") for name in listed.prefixes}
        objects.pop("", None)  # a mark that some programs make for a folder
        return folders, objects

    def delete(self, where: tuple[str, str]) -> None:
        blob = self._client.bucket(where[0]).blob(where[1])
        with self._translated(_url("gs", where)), contextlib.suppress(self._answers.NotFound):
            blob.delete(**self._options)

    @contextlib.contextmanager
    def _translated(self, url: str) -> Iterator[None]:
        try:
            yield
        except (self._answers.PreconditionFailed, self._answers.RequestRangeNotSatisfiable):
            raise
        except self._errors as error:
            status = getattr(error, "code", None)
            raise _failure(
                url, status, reason(error), credentials=isinstance(error, self._auth)
            ) from error


class _Amazon:
    """s3://, by boto3."""

    def __init__(self) -> None:
        try:
            import boto3
            from boto3.exceptions import S3UploadFailedError
            from botocore import config, exceptions
        except ImportError as error:
            raise _missing("s3", "s3", error) from None
        self._answers, self._failed = exceptions, S3UploadFailedError
        self._client = boto3.client(
            "s3",
            config=config.Config(
                connect_timeout=REQUEST_SECONDS / 2,
                read_timeout=REQUEST_SECONDS,
                retries={"mode": "standard", "max_attempts": 4},
                max_pool_connections=THREADS,
            ),
        )

    def head(self, where: tuple[str, str]) -> Entry | None:
        try:
            found = self._call("head_object", where)
        except FileNotFoundError:
            return None
        return Entry(int(found["ContentLength"]), found["ETag"])

    def get(self, where: tuple[str, str], start: int, stop: int | None, version: str) -> bytes:
        options = {"IfMatch": version} if version else {}
        if start or stop is not None:
            options["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        with self._translated(where):
            try:
                found = self._client.get_object(Bucket=where[0], Key=where[1], **options)
                return bytes(found["Body"].read())
            except self._answers.ClientError as error:
                if _status(error) == 416:
                    return b""
                raise

    def put(self, where: tuple[str, str], data: bytes | Path, unless: str | None) -> bool:
        if unless is None and isinstance(data, Path):
            with self._translated(where):
                self._client.upload_file(str(data), *where)  # in parts, if it is long
            return True
        condition = {}
        if unless is not None:
            condition = {"IfMatch": unless} if unless else {"IfNoneMatch": "*"}
        body = data.read_bytes() if isinstance(data, Path) else data
        try:
            self._call("put_object", where, Body=body, **condition)
        except (StaleError, MissingError):  # missing: another version was expected
            return False
        return True

    def names(self, where: tuple[str, str], deep: bool) -> tuple[set[str], dict[str, Entry]]:
        prefix = f"{where[1]}/" if where[1] else ""
        options = {"Bucket": where[0], "Prefix": prefix, **({} if deep else {"Delimiter": "/"})}
        folders: set[str] = set()
        objects: dict[str, Entry] = {}
        with self._translated(where):
            for page in self._client.get_paginator("list_objects_v2").paginate(**options):
                for each in page.get("CommonPrefixes", ()):
                    folders.add(each["Prefix"].removeprefix(prefix).rstrip("/"))
                for each in page.get("Contents", ()):
                    name = each["Key"].removeprefix(prefix)
                    objects[name] = Entry(int(each["Size"]), each["ETag"])
        objects.pop("", None)
        return folders, objects

    def delete(self, where: tuple[str, str]) -> None:
        self._call("delete_object", where)

    def _call(self, method: str, where: tuple[str, str], **options: Any) -> Any:
        with self._translated(where):
            return getattr(self._client, method)(Bucket=where[0], Key=where[1], **options)

    @contextlib.contextmanager
    def _translated(self, where: tuple[str, str]) -> Iterator[None]:
        url = _url("s3", where)
        try:
            yield
        except (self._answers.ClientError, self._failed) as failed:
            # The error of an upload in parts was raised from the answer.
            error: Any = failed.__context__ if isinstance(failed, self._failed) else failed
            code, status = error.response.get("Error", {}).get("Code"), _status(error)
            if status in (409, 412):
                raise StaleError(errno.ESTALE, os.strerror(errno.ESTALE), url) from error
            if code == "NoSuchKey":
                raise MissingError(errno.ENOENT, os.strerror(errno.ENOENT), url) from error
            words = reason(error)
            if code == "RequestTimeTooSkewed":
                words = f"this machine's clock is not the store's: set it ({words})"
            raise _failure(url, status, words) from error
        except self._answers.BotoCoreError as error:
            credentials = "Credential" in type(error).__name__
            raise _failure(url, None, reason(error), credentials=credentials) from error


def _status(error: Any) -> int | None:
    """The HTTP status of botocore's error."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(status) if status else None


_STORES: dict[str, Callable[[], Store]] = {"gs": _Google, "s3": _Amazon}
_FIRST_PARTS = {(f"{scheme}:",) for scheme in _STORES}
