"""Tensors of GGUF files, as llama.cpp writes them. Nothing in them is run.

The file is a header, key-value pairs, a table of tensors, and the tensors, aligned. Types F32, F16,
Q4_1 and Q8_0 are read: blocks of 32 values with a scale, and Q4_1 with a minimum.
"""

import math
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ditjax.errors import UserError, reason

_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?"} | {
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_BLOCK = 32  # values
_MOST = 2**24  # entries of a table, so that a hostile file cannot use memory


def _q8_0(raw: np.ndarray) -> np.ndarray:
    """u8[n,34] -> f32[n,32]: a scale f16 and 32 values i8."""
    return raw[:, :2].copy().view(np.float16).astype(np.float32) * raw[:, 2:].view(np.int8)


def _q4_1(raw: np.ndarray) -> np.ndarray:
    """u8[n,20] -> f32[n,32]: d and m f16, then q of 4 bits, the low halves first; d q + m."""
    d, m = (raw[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    q = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1)
    return np.asarray(d * q + m)


class _Kind(NamedTuple):
    """A type of tensors: values and bytes of a block, and how a block is read."""

    values: int
    size: int
    decode: Callable[[np.ndarray], np.ndarray]


def _plain(dtype: Any) -> _Kind:
    size = np.dtype(dtype).itemsize
    return _Kind(1, size, lambda raw: raw.copy().view(dtype).astype(np.float32))


_KINDS = {
    0: _plain(np.float32),
    1: _plain(np.float16),
    3: _Kind(_BLOCK, 20, _q4_1),
    8: _Kind(_BLOCK, 34, _q8_0),
}


class GGUFFile(NamedTuple):
    """Key-value pairs without arrays, and tensors by name: shapes as PyTorch's, and readers f32."""

    path: Path
    values: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


class _Reader:
    def __init__(self, data: Any) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        size = struct.calcsize(code)
        (found,) = struct.unpack(code, self.data[self.at : self.at + size])
        self.at += size
        return found

    def count(self) -> int:
        found = int(self.number("<Q"))
        if found > _MOST:
            raise ValueError(f"a count of {found}")
        return found

    def text(self) -> str:
        size = self.count()
        self.at += size
        return bytes(self.data[self.at - size : self.at]).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        inner = self.number("<I")
        for _ in range(self.count()):  # such as a vocabulary, which is not needed
            self.value(inner)
        return None


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file of version 2 or 3. Raises UserError for another file."""
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _parsed_gguf(Path(path), data)
    except (OSError, ValueError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a GGUF file ({reason(error)}).") from error


def _parsed_gguf(path: Path, data: Any) -> GGUFFile:
    if data[:4] != _MAGIC:
        raise ValueError("it does not begin with 'GGUF'")
    r = _Reader(data)
    r.at = 4
    if (version := r.number("<I")) not in (2, 3):
        raise ValueError(f"it has version {version}, not 2 or 3")
    tensors, pairs = r.count(), r.count()
    values = {name: r.value(r.number("<I")) for name in (r.text() for _ in range(pairs))}
    table = {}
    for _ in range(tensors):
        name = r.text()
        shape = tuple(r.count() for _ in range(r.number("<I")))[::-1]  # theirs: fastest first
        table[name] = (shape, r.number("<I"), r.number("<Q"))
    align = int(values.get("general.alignment") or 32)
    start = -(-r.at // align) * align

    def read(name: str) -> np.ndarray:
        shape, kind, offset = table[name]
        if kind not in _KINDS:
            raise UserError(
                f"{path}: tensor {name} is of GGUF type {kind}: expected F32, F16, Q4_1 or Q8_0."
            )
        of, first = _KINDS[kind], start + offset
        size = math.prod(shape) // of.values * of.size
        if first + size > len(data):
            raise UserError(f"{path} ends within tensor {name}: download it again.")
        raw = np.frombuffer(data, np.uint8, size, first).reshape(-1, of.size)
        return of.decode(raw).reshape(shape)

    shapes = {name: shape for name, (shape, _, _) in table.items()}
    return GGUFFile(path, values, shapes, read)
