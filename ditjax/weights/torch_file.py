"""Files of torch.save read without PyTorch, as plain Python and mapped NumPy arrays.

Two formats are read. Since torch 1.6 a file is an uncompressed zip: FOLDER/data.pkl, a pickle whose
tensors name their storages, and FOLDER/data/KEY, the raw bytes of each storage. Before that, and
still in FID's published Inception, it is five pickles (magic number, version, system, object,
storage keys), then the count (int64) and the raw bytes of each storage. `write_torch` writes the
zip.

Nothing in a file is imported or called: see `ditjax.weights.pickles` for how, and
`ditjax.weights.torch_objects` for the objects that are known.
"""

import mmap
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import numpy as np

from ditjax.errors import UserError, shown
from ditjax.files.atomic import atomic
from ditjax.weights import pickles
from ditjax.weights.pickles import Machine, Refusal
from ditjax.weights.torch_objects import (
    CALLS,
    STORAGES,
    TORCH_DTYPES,
    Storage,
    is_size,
    may_hold,
    may_name,
    stored,
)

_MAGIC: Final = 0x1950A86A20F9469CFC6C
_PROTOCOL: Final = 1001
_MAX_PICKLE: Final = 1 << 26
_MAX_ENTRIES: Final = 200_000
_ALIGNMENT: Final = 64  # of torch's storages
_CHUNK: Final = 1 << 22


def read_torch(path: str | os.PathLike[str], roots: Collection[str] = ()) -> Any:
    """Read a file of torch.save: dict, list, tuple, set, str, numbers, bytes, None and arrays.

    Tensors and Parameters become read-only arrays mapped from the file: nothing is copied, views of
    one storage share its bytes, and the file must not change while they are used. The storages of a
    zip are checked against its checksums. OrderedDict, defaultdict and argparse.Namespace become
    dict, torch.Size tuple, and torch.device, torch.dtype and paths str. An object of any other
    class becomes `pickles.Unknown`, its attributes as items; the file may be one such object if its
    class is among `roots`.

    Raises UserError for a file that cannot be read, is not of this format, is damaged, or is one
    such object; and for one that asks for what no data needs, such as os.system.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise Refusal("is a directory or device, not a file: give the .pt file's own path")
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise Refusal("is empty: download or save it again")
            # The arrays keep the map alive; closing the file does not end it.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return _read(file, data, roots)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    except Refusal as refusal:
        raise UserError(f"{path} {refusal}.") from None


def _read(file: IO[bytes], data: mmap.mmap, roots: Collection[str]) -> Any:
    head = data[:512]
    if head.startswith(b"PK"):
        return _read_zip(file, data, roots)
    if _MAGIC.to_bytes(10, "little") in head[:40]:
        return _read_legacy(data)
    if head[:1] == b"\x80":
        # Read anyway, so that the error names a global that would have been run.
        end = min(len(data), _MAX_PICKLE)
        Machine(data, end=end, calls=CALLS, names=may_name, inert=may_hold).run()
        raise Refusal("is a bare pickle, not a file of torch.save: save it with torch.save")
    raise Refusal(_guess(head, len(data)))


def _guess(head: bytes, size: int) -> str:
    """What a file that is not PyTorch's seems to be, and the remedy."""
    text = head.lstrip()[:64].lower()
    (length,) = struct.unpack("<Q", head[:8].ljust(8, b"\xff"))
    if head[8:9] == b"{" and length < size:
        return "is a safetensors file, not PyTorch's: give it a name that ends in .safetensors"
    if text.startswith(b"version https://git-lfs"):
        return (
            "is a git-lfs pointer, not the weights: run git lfs pull, or download the file itself"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not weights: the download failed or needs a login; download it again"
    if text.startswith((b"{", b"[")):
        return "is JSON text, not weights: check what was downloaded"
    known = {b"\x1f\x8b": "a gzip archive", b"\x93NUMPY": "an array of NumPy", b"\x89HDF": "HDF5"}
    for start, kind in known.items():
        if head.startswith(start):
            return f"is {kind}, not a file of torch.save"
    if head[257:262] == b"ustar":
        return "is a tar archive, not a file of torch.save: unpack it if it holds one"
    if not head.strip(b"\0"):
        return "begins with zeros, as after an interrupted download: download it again"
    return "is not a file of torch.save (neither its zip nor the format before torch 1.6)"


# Format 1: zip.


class ZipEntry(NamedTuple):
    """The place and checksum of an entry's bytes in the file."""

    start: int
    size: int
    crc: int


def _read_zip(file: IO[bytes], data: mmap.mmap, roots: Collection[str]) -> Any:
    records = _records(file, data)
    tops = [name for name in records if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(tops) != 1:
        raise Refusal(
            f"is a zip with {len(tops)} data.pkl in it, not a file of torch.save: unpack it if it"
            " holds one"
        )
    folder = tops[0].removesuffix("data.pkl")
    order = records.get(f"{folder}byteorder")
    if order is not None:
        _verify(file, order, f"{folder}byteorder")
        if data[order.start : order.start + min(order.size, 16)] != b"little":
            raise Refusal("was written on a big-endian machine: save it again on a common one")
    pickle = records[tops[0]]
    if pickle.size > _MAX_PICKLE:
        raise Refusal(f"has a pickle of {pickle.size} bytes; {_MAX_PICKLE} are read")
    _verify(file, pickle, tops[0])
    storages: dict[str, Storage] = {}

    def persistent(pid: Any) -> Storage:
        word, kind, key, _, count = pid
        if word != "storage" or type(key) is not str:
            raise TypeError("not a storage")
        storage = stored(data, kind, count)
        name = f"{folder}data/{key}"
        if name not in records:
            raise Refusal(f"lacks the storage {shown(key)} that its pickle names: it is damaged")
        record = records[name]
        if record.size != storage.nbytes:
            raise Refusal(
                f"has a storage {shown(key)} of {record.size} bytes where its pickle says"
                f" {storage.nbytes}: it is damaged"
            )
        storage.start = record.start
        storages.setdefault(name, storage)
        return storage

    end = pickle.start + pickle.size
    machine = Machine(data, pickle.start, end, CALLS, may_name, persistent, may_hold, roots)
    tree = pickles.resolve(machine.run())
    for name in storages:
        _verify(file, records[name], name)
    return tree


def _records(file: IO[bytes], data: mmap.mmap) -> dict[str, ZipEntry]:
    """The entries by name, from the directory. Nothing is unpacked."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    # What zipfile raises for damaged directories.
    except (zipfile.BadZipFile, *pickles.DAMAGE, NotImplementedError, OSError, EOFError):
        raise Refusal(
            "is a zip without a readable directory, as after an interrupted download: download or"
            " save it again"
        ) from None
    if len(entries) > _MAX_ENTRIES:
        raise Refusal(f"holds {len(entries)} entries; {_MAX_ENTRIES} are read")
    # Before the check of compression, because both of these may be compressed.
    names = {entry.filename.partition("/")[2] for entry in entries}
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise Refusal(
            "is a TorchScript archive, a program and not only weights: in PyTorch,"
            " torch.save(torch.jit.load(path).state_dict(), new_path)"
        )
    if any(entry.filename.endswith(".npy") for entry in entries):
        raise Refusal("is an .npz file of NumPy, not a file of torch.save")
    records: dict[str, ZipEntry] = {}
    for entry in entries:
        name, offset = entry.filename, entry.header_offset
        if name in records:
            raise Refusal(f"holds two entries named {shown(name)}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise Refusal(
                f"holds the compressed entry {shown(name)}; torch.save never compresses: unpack it"
                " if the file is inside, or save it again"
            )
        header = data[offset : offset + 30] if offset >= 0 else b""
        if len(header) < 30 or header[:4] != b"PK\x03\x04" or entry.flag_bits & 1:
            raise Refusal(f"has an unreadable entry {shown(name)}: download or save it again")
        start = offset + 30 + sum(struct.unpack_from("<HH", header, 26))
        if start + entry.file_size > len(data):
            raise Refusal(f"ends within its entry {shown(name)}: download or save it again")
        records[name] = ZipEntry(start, entry.file_size, entry.CRC)
    # Verifying the checksums must not take longer than reading the file once.
    if sum(record.size for record in records.values()) > len(data):
        raise Refusal("holds entries that overlap: download or save it again")
    return records


def _verify(file: IO[bytes], record: ZipEntry, name: str) -> None:
    """Check an entry's checksum, read through a buffer: the pages of a map would stay resident."""
    # torch.serialization.set_crc32_options(False) writes zeros.
    if not record.crc:
        return
    file.seek(record.start)
    crc, left = 0, record.size
    while left:
        chunk = file.read(min(left, _CHUNK))
        if not chunk:
            break
        crc = zlib.crc32(chunk, crc)
        left -= len(chunk)
    if crc != record.crc:
        raise Refusal(f"has a wrong checksum in {shown(name)}: download or save it again")


# Format 2: before torch 1.6.


def _read_legacy(data: mmap.mmap) -> Any:
    position = 0

    def load(persistent: Callable[[Any], Any] | None = None) -> Any:
        nonlocal position
        end = min(len(data), position + _MAX_PICKLE)
        machine = Machine(data, position, end, CALLS, may_name, persistent, may_hold)
        value = machine.run()
        position = machine.position
        return value

    magic, version, system = load(), load(), load()
    if magic != _MAGIC or version != _PROTOCOL or not isinstance(system, dict):
        raise Refusal("has a damaged header: download or save it again")
    if system.get("little_endian") is not True:
        raise Refusal("was written on a big-endian machine: save it again on a common one")
    roots: dict[str, Storage] = {}
    views: list[tuple[Storage, Storage, int]] = []

    def persistent(pid: Any) -> Storage:
        if pid[0] == "module":
            raise Refusal("holds a whole module, code and all: save model.state_dict() instead")
        word, kind, key, _, count, view = pid
        if word != "storage" or type(key) is not str:
            raise TypeError("not a storage")
        root = roots.setdefault(key, stored(data, kind, count))
        if (root.dtype, root.count) != (stored(data, kind, count).dtype, count):
            raise Refusal(f"describes its storage {shown(key)} in two ways: it is damaged")
        if view is None:
            return root
        _, offset, size = view
        storage = stored(data, kind, size)
        if not is_size(offset) or offset + size > count:
            raise Refusal(f"views its storage {shown(key)} beyond the end: it is damaged")
        views.append((storage, root, offset))
        return storage

    tree = load(persistent)
    keys = load()
    if type(keys) is not list or set(map(pickles.hashable, keys)) != roots.keys():
        raise Refusal("lists other storages than its pickle names: it is damaged")
    for key in keys:
        storage = roots[key]
        if data[position : position + 8] != struct.pack("<q", storage.count):
            raise Refusal(f"has no storage {shown(key)} where it should be: it is cut or damaged")
        storage.start = position + 8
        position = storage.start + storage.nbytes
        if position > len(data):
            raise Refusal(f"ends within its storage {shown(key)}: download or save it again")
    for view, root, offset in views:
        view.start = root.start + offset * root.dtype.itemsize
    return pickles.resolve(tree)


# Writing.


def write_torch(path: str | os.PathLike[str], tree: Any) -> None:
    """Write a tree of dict, list, tuple, str, numbers, None and arrays as torch.save would.

    torch.load(path, weights_only=True) reads it. Arrays (NumPy's, or anything with dtype, shape and
    __array__) become separate contiguous tensors, one in memory at a time; numbers of NumPy become
    Python's. Equal trees give equal bytes. The file is written whole or not at all.

    Raises UserError for a value that such a file cannot hold, or if it cannot be written.
    """
    arrays: list[Any] = []
    pickle = b"\x80\x02" + b"".join(_pickled(tree, "", 0, arrays)) + b"."
    with atomic(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, file, "data.pkl", pickle)
        _add(archive, file, ".format_version", b"1")
        _add(archive, file, ".storage_alignment", str(_ALIGNMENT).encode())
        _add(archive, file, "byteorder", b"little")
        for index, array in enumerate(arrays):
            _add(archive, file, f"data/{index}", _content(array))
        _add(archive, file, "version", b"3\n")


def _add(archive: zipfile.ZipFile, file: IO[bytes], name: str, content: bytes | memoryview) -> None:
    entry = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
    entry.create_system = 0  # the same bytes on every system
    large = len(content) >= zipfile.ZIP64_LIMIT
    # Local header, name, zip64's field if needed, and the four bytes before the padding.
    start = file.tell() + 30 + len(entry.filename) + (20 if large else 0) + 4
    entry.extra = struct.pack("<2sH", b"FB", -start % _ALIGNMENT) + b"Z" * (-start % _ALIGNMENT)
    entry.file_size = len(content)
    with archive.open(entry, "w", force_zip64=large) as record:
        for first in range(0, len(content), _CHUNK):
            record.write(content[first : first + _CHUNK])


def _content(array: Any) -> memoryview:
    """An array's bytes in C order, without a copy if it has that order."""
    whole = np.ascontiguousarray(np.asarray(array), TORCH_DTYPES[_dtype_name(array)])
    return whole.reshape(-1).view(np.uint8).data


def _dtype_name(array: Any) -> str:
    return np.dtype(array.dtype).name


def _pickled(node: Any, where: str, depth: int, arrays: list[Any]) -> Iterator[bytes]:
    """Opcodes of protocol 2 that push `node`; arrays are appended to `arrays`."""
    if depth > pickles.MAX_NESTING:
        raise UserError(f"{where[:80]!r} nests deeper than {pickles.MAX_NESTING}, or holds itself.")
    if isinstance(node, (np.bool, np.integer, np.floating)):
        node = node.item()
    if node is None or isinstance(node, bool):
        yield {None: b"N", True: b"\x88", False: b"\x89"}[node]
    elif isinstance(node, int):
        yield _integer(node, where)
    elif isinstance(node, float):
        yield b"G" + struct.pack(">d", node)
    elif isinstance(node, str):
        yield _text(node)
    elif isinstance(node, Mapping):
        yield b"}("
        for key, child in node.items():
            if not isinstance(key, (str, int, float, type(None))):
                raise UserError(
                    f"a {type(key).__name__} cannot be a key in a .pt file ({where!r})."
                )
            yield from _pickled(key, where, depth + 1, arrays)
            yield from _pickled(child, f"{where}.{key}".lstrip("."), depth + 1, arrays)
        yield b"u"
    elif isinstance(node, (list, tuple)):
        yield b"](" if isinstance(node, list) else b"("
        for index, child in enumerate(node):
            yield from _pickled(child, f"{where}.{index}".lstrip("."), depth + 1, arrays)
        yield b"e" if isinstance(node, list) else b"t"
    elif hasattr(node, "__array__") and hasattr(node, "dtype") and hasattr(node, "shape"):
        yield _array(node, where, len(arrays))
        arrays.append(node)
    else:
        raise UserError(
            f"a {type(node).__name__} cannot be stored in a .pt file ({where!r}): give dicts,"
            " lists, strings, numbers and arrays."
        )


def _integer(number: int, where: str) -> bytes:
    raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    if len(raw) <= 4:
        return b"J" + struct.pack("<i", number)
    if len(raw) > 255:
        raise UserError(f"{where!r} is an integer of {len(raw)} bytes; torch.load takes 255.")
    return b"\x8a" + bytes([len(raw)]) + raw


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _array(array: Any, where: str, index: int) -> bytes:
    """REDUCE of _rebuild_tensor_v2, or of _v3 for dtypes that have no storage class."""
    name = _dtype_name(array)
    if name not in TORCH_DTYPES:
        raise UserError(f"{where!r} is an array of {name}, which PyTorch does not have.")
    shape = tuple(int(size) for size in array.shape)
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    storage = {dtype: kind for kind, dtype in STORAGES.items()}.get(name)
    count = int(np.prod(shape, dtype=object))
    if storage is None:
        count *= TORCH_DTYPES[name].itemsize
    return b"".join(
        (
            f"ctorch._utils\n_rebuild_tensor_v{2 if storage else 3}\n((".encode(),
            _text("storage"),
            f"ctorch\n{storage}\n".encode() if storage else b"ctorch.storage\nUntypedStorage\n",
            _text(str(index)),
            _text("cpu"),
            _integer(count, where),
            b"tQK\x00(",
            *(_integer(size, where) for size in shape),
            b"t(",
            *(_integer(stride, where) for stride in reversed(strides)),
            b"t\x89ccollections\nOrderedDict\n)R",
            b"" if storage else f"ctorch\n{name}\n".encode(),
            b"tR",
        )
    )
