"""Arrays in npz files, row by row: never a pickle, never more in memory than asked for."""

import contextlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ditjax.errors import UserError, nearest


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """The npz at `path`; whatever is wrong with the file is a UserError that names it."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    except UserError:
        raise
    except (
        zipfile.BadZipFile, zlib.error, ValueError, EOFError, RuntimeError, SyntaxError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is not a whole npz file ({reason}).") from error


def names(archive: zipfile.ZipFile) -> list[str]:
    """The arrays of an npz, without '.npy'."""
    return [name[:-4] for name in archive.namelist() if name.endswith(".npy")]


def shape_and_dtype(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """What an array is, from its header. Raises as `read` does."""
    with _open(archive, name) as (_, shape, _, dtype):
        return shape, dtype


def read(archive: zipfile.ZipFile, name: str, limit: int | None = None) -> NDArray[Any]:
    """One array, or its first `limit` rows without reading those after them.

    Raises UserError where there is none of that name, ValueError for a pickled or torn one.
    """
    with _open(archive, name) as (file, shape, fortran_order, dtype):
        if fortran_order and limit is None:
            return _take(file, name, shape[::-1], dtype).T
        if limit is not None:
            _check_rows(name, shape, fortran_order)
            shape = (min(limit, shape[0]), *shape[1:])
        return _take(file, name, shape, dtype)


def read_array(path: str | os.PathLike[str], name: str) -> NDArray[Any]:
    """One array of the npz at `path`, whole. Raises UserError."""
    with reading(path) as archive:
        return read(archive, name)


def rows(archive: zipfile.ZipFile, name: str, size: int, start: int = 0) -> Iterator[NDArray[Any]]:
    """An array `size` rows at a time, in order, from row `start`. Raises as `read` does."""
    with _open(archive, name) as (file, shape, fortran_order, dtype):
        _check_rows(name, shape, fortran_order)
        file.seek(start * math.prod(shape[1:]) * dtype.itemsize, os.SEEK_CUR)
        for first in range(start, shape[0], size):
            yield _take(file, name, (min(size, shape[0] - first), *shape[1:]), dtype)


@contextlib.contextmanager
def _open(
    archive: zipfile.ZipFile, name: str
) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype[Any]]]:
    """An array's file after its header, shape, whether in Fortran order, and dtype."""
    if name not in names(archive):
        raise UserError(
            f"{archive.filename} has no array {name!r}, only {', '.join(names(archive)) or 'none'}."
            f"{nearest(name, names(archive))}"
        )
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"{name} has npy version {version}")
        shape, fortran_order, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError(f"{name} holds pickled objects, which may run code and are not loaded")
        length = archive.getinfo(f"{name}.npy").file_size
        if length != file.tell() + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} ends early or late")
        yield file, shape, fortran_order, dtype


def _check_rows(name: str, shape: tuple[int, ...], fortran_order: bool) -> None:
    if not shape or fortran_order:
        raise ValueError(f"{name} is not a plain C-ordered array")


def _take(file: IO[bytes], name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    size = math.prod(shape) * dtype.itemsize
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        part = file.read(min(size - done, 1 << 24))
        if not part:
            raise ValueError(f"{name} ends early")
        view[done : done + len(part)] = part
        done += len(part)
    return np.frombuffer(data, dtype).reshape(shape)
