"""Arrays in npz files, read by rows: never a pickle, and never more memory than asked for."""

import contextlib
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ditjax.errors import UserError, first_few, nearest, one_line, reason, shown
from ditjax.files import faults, store
from ditjax.files.masking import masked_tree

# A compressed file of some MB can unpack to any size, so what is read at once is bounded.
MAX_GIB_VARIABLE = "DITJAX_MAX_ARRAY_GIB"
MAX_GIB = 16.0
MAX_MEMBERS = 10_000
_MAX_HEADER = 1 << 16
_DEFLATE = 1100  # the most bytes that one compressed byte can unpack to: 1032, and the ends


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """The npz at `path`. Raises a UserError that names the file for anything wrong with it.

    Raises FaultError if the file system does not answer.
    """
    try:
        with faults.retried(path, lambda: _archive(path)) as archive:
            yield archive
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: how the functions below report damage
        if faults.is_fault(error) and not isinstance(error, PermissionError):
            raise faults.unread(path, error) from error
        if isinstance(error, OSError):
            raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
        raise UserError(f"{path} is not a whole npz file ({reason(error)}).") from error


def _archive(path: str | os.PathLike[str]) -> zipfile.ZipFile:
    with contextlib.ExitStack() as stack, _damage():
        try:
            archive = stack.enter_context(zipfile.ZipFile(store.zip_source(path)))
        except zipfile.BadZipFile:
            _check_kind(path)
            raise
        entries, length = archive.infolist(), store.place(path).stat().st_size
        if any(entry.compress_size > length for entry in entries):
            raise ValueError("it claims more than its own length")
        if len(entries) > MAX_MEMBERS:
            raise UserError(
                f"{path} holds {len(entries)} files: an npz of at most {MAX_MEMBERS} arrays was"
                " expected; write it as several."
            )
        if entries and not names(archive):
            raise UserError(
                f"{path} is a zip of {len(entries)} files, such as"
                f" {one_line(entries[0].filename)}, and no npz of arrays: unpack it, and give the"
                " folder if they are images."
            )
        stack.pop_all()  # keep it open
    return archive


# What a file of another kind begins with -> what it is, and how its content is read.
_PICKLE = (
    "a pickle, which may run code and is not loaded",
    "save its statistics as npz where you trust it, for EDM2's: import pickle, numpy as np;"
    " s = pickle.load(open(PATH, 'rb'))['fid']; np.savez('OUT.npz', mu=s['mu'], sigma=s['sigma'])",
)
_IMAGE = ("a single image", "give a folder of images")
_PACKED = ("a packed archive", "unpack it, and give the folder if it holds images")
_KINDS = {
    b"\x93NUMPY": (
        "a single array (.npy)",
        "pack it: import numpy as np; np.savez('OUT.npz', arr_0=np.load(PATH))",
    ),
    **{bytes([0x80, protocol]): _PICKLE for protocol in range(2, 6)},
    b"\x89PNG": _IMAGE,
    b"\xff\xd8\xff": _IMAGE,
    b"GIF8": _IMAGE,
    b"\x1f\x8b": _PACKED,
    b"BZh": _PACKED,
    b"\xfd7zXZ": _PACKED,
    b"\x28\xb5\x2f\xfd": _PACKED,
    b"7z\xbc\xaf": _PACKED,
    b"\x89HDF": ("an HDF5 file", "save its array of images as arr_0 of an npz"),
    b"PAR1": ("a Parquet file", "save its images as files in a folder"),
}


def _check_kind(path: str | os.PathLike[str]) -> None:
    """Raise UserError, with the remedy, for a file of another well-known kind."""
    start = store.read_start(path, 512)
    for magic, (what, remedy) in _KINDS.items():
        if start.startswith(magic):
            raise UserError(f"{path} is {what}, not an npz: {remedy}.")
    if start[257:262] == b"ustar":
        raise UserError(f"{path} is {_PACKED[0]}, not an npz: {_PACKED[1]}.")


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Raise ValueError for whatever zipfile, its decompressors and NumPy raise on damaged bytes."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        raise ValueError(reason(error)) from error


def names(archive: zipfile.ZipFile) -> list[str]:
    """The names of the arrays, without '.npy'."""
    return [name[:-4] for name in archive.namelist() if name.endswith(".npy")]


def shape_and_dtype(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and dtype of an array, from its header. Raises as `read_array`."""
    with _open(archive, name) as (_, shape, _, dtype):
        return shape, dtype


def read_array(archive: zipfile.ZipFile, name: str, limit: int | None = None) -> NDArray[Any]:
    """One array, or its first `limit` rows without reading the rest.

    Raises UserError for an unknown name, and ValueError for a pickled or damaged array.
    """
    with _open(archive, name) as (file, shape, fortran_order, dtype):
        if limit is not None and not shape:
            raise ValueError(f"{name} is a single number")
        if fortran_order:
            return _take_transposed(archive, file, name, shape, dtype)[:limit]
        if limit is not None:
            shape = (min(limit, shape[0]), *shape[1:])
        _check_size(archive, name, shape, dtype)
        return _take(file, name, shape, dtype)


def load_array(path: str | os.PathLike[str], name: str) -> NDArray[Any]:
    """One whole array of the npz at `path`. Raises UserError."""
    with reading(path) as archive:
        return read_array(archive, name)


def rows(archive: zipfile.ZipFile, name: str, size: int) -> Iterator[NDArray[Any]]:
    """An array `size` rows at a time, in order. Raises as `read_array`.

    The rows of an array in Fortran order lie scattered: it is read whole.
    """
    with _open(archive, name) as (file, shape, fortran_order, dtype):
        if not shape:
            raise ValueError(f"{name} is a single number")
        if fortran_order:
            whole = _take_transposed(archive, file, name, shape, dtype)
            for first in range(0, shape[0], size):
                yield np.ascontiguousarray(whole[first : first + size])
            return
        _check_size(archive, name, (min(size, shape[0]), *shape[1:]), dtype)
        for first in range(0, shape[0], size):
            yield _take(file, name, (min(size, shape[0] - first), *shape[1:]), dtype)


@contextlib.contextmanager
def _open(
    archive: zipfile.ZipFile, name: str
) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype[Any]]]:
    """An array's file, positioned after the header; shape, Fortran order, and dtype."""
    available = names(archive)
    if name not in available:
        raise UserError(
            f"{archive.filename} has no array {name!r}, only"
            f" {first_few(map(one_line, available), 12) or 'none'}.{nearest(name, available)}"
        )
    with contextlib.ExitStack() as stack:
        with _damage():
            entry = archive.getinfo(f"{name}.npy")
            _check_entry(entry, name)
            file: Any = stack.enter_context(archive.open(f"{name}.npy"))
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if read_header is None:
                raise ValueError(f"{name} has npy version {version}")
            width = 2 * version[0]
            if int.from_bytes(file.peek(width)[:width], "little") > _MAX_HEADER:
                raise ValueError(f"{name} has a header longer than {_MAX_HEADER} bytes")
            shape, fortran_order, dtype = read_header(file)
            if dtype.hasobject:
                raise ValueError(
                    f"{name} holds pickled objects, which may run code and are not loaded"
                )
            if not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
                raise ValueError(f"{name} has the shape {shown(shape)}")
            if entry.file_size != file.tell() + math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} ends early or late")
        yield file, shape, fortran_order, dtype


def _check_entry(entry: zipfile.ZipInfo, name: str) -> None:
    """Check that NumPy could have written an entry, and that its bytes can unpack to its length."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that NumPy never writes")
    if entry.file_size > _DEFLATE * (entry.compress_size + 1):
        raise ValueError(f"{name} claims {entry.file_size} bytes in {entry.compress_size}")


def _take_transposed(
    archive: zipfile.ZipFile,
    file: IO[bytes],
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> NDArray[Any]:
    """A whole array in Fortran order."""
    _check_size(archive, name, shape, dtype)
    return _take(file, name, shape[::-1], dtype).T


def _take(file: IO[bytes], name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    size = math.prod(shape) * dtype.itemsize
    with _damage():
        data = np.empty(size, np.uint8)  # the system provides the memory as it is written
        view, done = data.data, 0
        while done < size:
            part = file.read(min(size - done, 1 << 24))
            if not part:
                raise ValueError(f"{name} ends early")
            view[done : done + len(part)] = part
            done += len(part)
        return np.frombuffer(data, dtype).reshape(shape)


def _check_size(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    """Raise UserError for more than may be read at once."""
    text = os.environ.get(MAX_GIB_VARIABLE, str(MAX_GIB))
    try:
        limit = float(text)
    except ValueError:
        raise UserError(f"{MAX_GIB_VARIABLE}={text!r}: expected a number of GiB.") from None
    gib = math.prod(shape) * dtype.itemsize / 2**30
    if not gib <= limit:
        raise UserError(
            f"{archive.filename}: {name} is {dtype}{list(shape)}, {gib:.3g} GiB: at most"
            f" {limit:g} are read at once; {MAX_GIB_VARIABLE}={math.ceil(gib)} in the environment"
            " allows it."
        )


def provenance_text(provenance: Mapping[str, Any]) -> NDArray[np.str_]:
    """A mapping as plain JSON, keys sorted and secrets masked, in a U array of rank 0.

    Raises UserError for values that JSON lacks.
    """
    try:
        text = json.dumps(masked_tree(provenance), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"a provenance must be plain JSON: {error}.") from error
    return np.array(text)


def read_provenance(archive: zipfile.ZipFile) -> dict[str, Any]:
    """The mapping that `provenance_text` wrote, or {} if there is none."""
    if "provenance" not in names(archive):
        return {}
    value = read_array(archive, "provenance")
    if value.dtype.kind != "U" or value.ndim != 0:
        raise ValueError(f"provenance is {value.dtype}{list(value.shape)}, not a text")
    provenance = json.loads(str(value))
    if not isinstance(provenance, dict):
        raise ValueError("provenance is not a JSON object")
    return provenance
