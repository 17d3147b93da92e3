"""Files of named tensors: safetensors, PyTorch's, and diffusers' folders. Nothing in them is run.

`read_tensors` maps a file: the arrays point into it, and use memory only where they are read.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ditjax.errors import UserError, first_few, reason, shown
from ditjax.files import faults
from ditjax.files.atomic import atomic, read_json
from ditjax.files.store import local_copy
from ditjax.weights.layouts import Shapes
from ditjax.weights.states import Marks, find_network
from ditjax.weights.torch_file import read_torch
from ditjax.weights.vocabulary import CLASS_NAMES, METADATA, TEXT

Tensors = Mapping[str, np.ndarray]

# The weights in a model folder: of diffusers, and of the hub's mixin for any PyTorch model. Shards
# are listed in an index; a variant, such as fp16 or non_ema, is a word before the suffix.
_FOLDER_FILE = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<variant>\w+))?"
    r"\.(?P<suffix>safetensors|bin)(?P<index>\.index(?:\.(?P<of_index>\w+))?\.json)?"
)
CONFIG_FILE = "config.json"

_SAFETENSORS_TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in _SAFETENSORS_TYPES.items()}

_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library

FLOATS = {np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)}


class TensorFile(NamedTuple):
    """The tensors of one network and what came with them.

    `files` hold the tensors. `config` is the folder's config.json, `metadata` that of a safetensors
    file, and `extra` the rest of a PyTorch checkpoint, such as a training script's arguments.
    `label` is where in the file the network is, and `left` counts the tensors that are not its.
    """

    path: Path
    tensors: dict[str, np.ndarray]
    files: tuple[Path, ...]
    config: dict[str, Any]
    metadata: dict[str, str]
    extra: dict[str, Any]
    label: str = ""
    left: Mapping[str, int] = {}
    not_read: tuple[str, ...] = ()  # other weights in the folder

    def without(
        self, leave_out: Callable[[str], bool], counted_as: Callable[[str], str] = lambda name: name
    ) -> "TensorFile":
        """Leave out tensors by name; `left` counts each by its own name, or as `counted_as`."""
        out = {name for name in self.tensors if leave_out(name)}
        kept = {name: tensor for name, tensor in self.tensors.items() if name not in out}
        left = Counter(self.left) + Counter(map(counted_as, out))
        return self._replace(tensors=kept, left=left)

    @property
    def account(self) -> str:
        """'x.pt: 151 tensors of 'ema' taken; 302 left out: 151 of 'model', ...'."""
        label = f" of {shown(self.label)}" if self.label else ""
        text = f"{self.path}: {len(self.tensors)} tensors{label} taken"
        named = collapse(name for name, count in self.left.items() if count <= 1)
        counted = [f"{count} of {name}" for name, count in self.left.items() if count > 1]
        if self.left:
            text += f"; {sum(self.left.values())} left out: {', '.join(counted + named)}"
        else:
            text += ", none left out"
        return f"{text}; not read: {', '.join(self.not_read)}" if self.not_read else text


def read_tensors(path: str | os.PathLike[str], which: str = "ema", marks: Marks = ()) -> TensorFile:
    """The named tensors of a network in a file or in a diffusers folder.

    `which` selects a network of a training checkpoint: 'ema' (averaged), 'model' (raw), or the
    dotted path of any other; `marks` are names by which it is recognised (`weights/states.py`).
    Raises UserError for a path that is missing, unreadable, or does not hold weights.
    """
    path = local_copy(path)
    read = _read_folder if os.path.isdir(path) else _read_file
    return read(path, which, marks)


def read_named(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a safetensors file by the names that they have there, and its metadata.

    Raises UserError for a path that is missing, unreadable, or of another format.
    """
    saved, metadata = _saved(local_copy(path))
    if metadata is None:
        raise UserError(f"{path} is a file of PyTorch: expected a safetensors file.")
    return dict(saved), metadata


def _read_file(path: Path, which: str, marks: Marks) -> TensorFile:
    saved, metadata = _saved(path)
    if metadata is not None and (not saved or METADATA in metadata):
        return TensorFile(path, dict(saved), (path,), {}, metadata, {})
    found = find_network(path, saved, which, marks)
    return TensorFile(
        path, found.tensors, (path,), {}, metadata or {}, found.extra, found.label, found.left
    )


def _saved(path: Path) -> tuple[Mapping[Any, Any], dict[str, str] | None]:
    """The tree that a file holds, and the metadata of a safetensors file."""
    if not faults.exists(path):
        raise UserError(
            f"{path} does not exist: expected a weights file, a model folder of diffusers or a"
            " run's directory."
        )
    return faults.retried(path, lambda: _parsed(path))


def _parsed(path: Path) -> tuple[Mapping[Any, Any], dict[str, str] | None]:
    if _looks_like_safetensors(path):
        return _read_safetensors(path)
    saved = read_torch(path)
    if not isinstance(saved, Mapping):
        raise UserError(
            f"{path} holds a {type(saved).__name__}: expected a state dict (tensors by name)."
        )
    return saved, None


def _read_folder(folder: Path, which: str, marks: Marks) -> TensorFile:
    there = sorted(os.listdir(folder))
    name, inner = _folder_file(folder, there, which)
    config = read_json(folder / CONFIG_FILE) if CONFIG_FILE in there else {}
    names = _shards(folder / name) if name.endswith(".json") else [name]
    merged: dict[Any, Any] = {}
    metadata: dict[str, str] | None = {}
    stated: dict[str, str] = {}
    for shard in names:
        saved, metadata = _saved(folder / shard)
        stated |= {k: v for k, v in (metadata or {}).items() if k in (CLASS_NAMES, TEXT)}
        if twice := merged.keys() & saved.keys():
            raise UserError(f"{folder / shard} holds {shown(min(twice))}, as another shard does.")
        merged |= saved
    if metadata is not None and METADATA in metadata:
        raise UserError(f"{folder / name} is a file that ditjax wrote: give the file itself.")
    found = find_network(folder, merged, inner, marks)
    others = tuple(each for each in there if _FOLDER_FILE.fullmatch(each) and each != name)
    return TensorFile(
        folder,
        found.tensors,
        tuple(folder / shard for shard in names),
        config,
        stated,
        found.extra,
        found.label,
        found.left,
        tuple(each for each in others if each not in names),
    )


def _folder_file(folder: Path, there: Sequence[str], which: str) -> tuple[str, str]:
    """The name of the weights or their index in a folder, and what of `which` is left to choose.

    In diffusers' order; of the variants, `which` 'ema' takes no 'non_ema', and 'model' no 'ema'.
    """
    files: dict[tuple[str, str], str] = {}
    for name in there:
        if match := _FOLDER_FILE.fullmatch(name):
            kind = match["suffix"], match["variant"] or match["of_index"] or ""
            if match["index"] or kind not in files:
                files[kind] = name
    suffixes = ("safetensors", "bin")
    if any((suffix, which) in files for suffix in suffixes):
        name = next(files[kind] for suffix in suffixes if (kind := (suffix, which)) in files)
        return name, which if which in ("ema", "model") else "ema"
    refused = {"ema": "non_ema", "model": "ema"}.get(which)
    first = [("safetensors", "non_ema"), ("bin", "non_ema")] if which == "model" else []
    first += [(suffix, variant) for suffix in suffixes for variant in ("", "fp16")]
    for kind in (*first, *files):
        if kind in files and kind[1] != refused:
            return files[kind], which
    if files:
        raise UserError(
            f"{folder} holds {first_few(files.values(), 8)} and no other variant: choose with"
            f" --which={refused}."
        )
    held = first_few(
        (each + "/" * os.path.isdir(folder / each) for each in there if each != CONFIG_FILE), 8
    )
    lacks = "holds no weights" if CONFIG_FILE in there else f"has no {CONFIG_FILE} and no weights"
    raise UserError(
        f"{folder} {lacks}: expected one of diffusion_pytorch_model.safetensors, model.safetensors,"
        " the same in .bin, in shards or in a variant such as .fp16.safetensors; or give a weights"
        f" file, or a run's directory. It holds {held or 'nothing else'}."
    )


def _shards(index: Path) -> list[str]:
    """The names of the files that an index lists, all of its own folder."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index} has no weight_map: the download is incomplete.")
    return sorted({os.path.basename(str(name)) for name in shards.values()})


def _looks_like_safetensors(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    length = int.from_bytes(head[:8], "little")
    return len(head) == 9 and head[8:] == b"{" and 2 <= length <= _MAX_HEADER


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    # The library checks that the offsets are in order, without gaps, and reach the end of the file.
    try:
        with safe_open(path, framework="numpy") as checked:
            metadata = dict(checked.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a sound safetensors file: {reason(error)}.") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r")[8 + length :] if header else np.zeros(0, np.uint8)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS_TYPES:
            raise UserError(
                f"{path}: {shown(name)} is of type {shown(entry['dtype'])}, expected one of"
                f" {', '.join(_SAFETENSORS_TYPES)}."
            )
        begin, end = entry["data_offsets"]
        # An offset need not be aligned to the type: NumPy reads an unaligned view too.
        flat = np.frombuffer(data[begin:end], _SAFETENSORS_TYPES[entry["dtype"]])
        try:
            tensors[name] = flat.reshape(entry["shape"])
        except ValueError as error:  # more or longer axes than NumPy has
            raise UserError(f"{path}: {shown(name)} has an impossible shape: {error}.") from None
    return tensors, metadata


def check_tensors(
    path: str | os.PathLike[str],
    what: str,
    tensors: Tensors,
    expected: Shapes,
    any_float: Container[str] = (),
) -> np.dtype:
    """Check names, shapes and types of tensors. Returns their one floating type.

    Those named in `any_float` may be of another floating type.
    Raises one UserError that lists every missing, extra, mis-shaped and differently typed tensor.
    """
    common = [name for name in tensors if name in expected]
    types = Counter(tensors[name].dtype for name in common if tensors[name].dtype in FLOATS)
    dtype = types.most_common(1)[0][0] if types else np.dtype(np.float32)

    def differs(name: str) -> bool:
        found = tensors[name].dtype
        return found != dtype and not (name in any_float and found in FLOATS)

    faults = []
    for fault, names in (
        ("missing", expected.keys() - tensors.keys()),
        ("extra", tensors.keys() - expected.keys()),
        (f"not {dtype}", {name for name in common if differs(name)}),
    ):
        if names:
            faults.append(f"{len(names)} {fault}: {', '.join(collapse(names))}")
    shapes = {
        name: f"{name} is {tensors[name].shape}, not {tuple(expected[name])}"
        for name in sorted(common, key=_numbers_in_order)
        if tensors[name].shape != tuple(expected[name])
    }
    if shapes:
        faults.append(f"{len(shapes)} mis-shaped: {', '.join(shapes.values())}")
    if faults:
        remedy = ""
        if len(faults) == 1 and (extra := tensors.keys() - expected.keys()):
            named = ",".join(_unused_modules(extra, expected)[:8])
            remedy = f"; if the network does not use them, --leave_out={named} leaves them out"
        raise UserError(f"{path} is no {what}: {'; '.join(faults)}{remedy}.")
    return dtype


def _unused_modules(extra: Iterable[str], expected: Iterable[str]) -> list[str]:
    """The outermost modules of extra tensors that hold none of the expected ones.

    Those of all layers are one: blocks.*.attn.q_norm.
    """
    inside = {
        ".".join(parts[:k])
        for parts in (name.split(".") for name in expected)
        for k in range(len(parts))
    }
    found = set()
    for name in extra:
        parts = name.split(".")
        outside = (".".join(parts[:k]) for k in range(1, len(parts)))
        module = next((each for each in outside if each not in inside), name)
        found.add(re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", module))
    return sorted(found)


def _numbers_in_order(name: str) -> list[tuple[int, str]]:
    # At most nine digits, because int() raises beyond some thousands.
    parts = [part for part in re.split("([0-9]{1,9})", name) if part]
    return [(int(p), "") if re.fullmatch("[0-9]+", p) else (-1, p) for p in parts]


def collapse(names: Iterable[str]) -> list[str]:
    """Names that differ only in their first number, joined: blocks.{0-11}.attn.qkv.bias."""
    groups: dict[str, list[int]] = {}
    for name in sorted(names, key=_numbers_in_order):
        match = re.search(r"(?<=\.)[0-9]{1,9}(?=\.)", name)
        template = f"{name[: match.start()]}{{}}{name[match.end() :]}" if match else name
        groups.setdefault(template, []).extend([int(match[0])] if match else [])
    out = []
    for template, numbers in groups.items():
        spans: list[list[int]] = []
        for n in numbers:
            if spans and n == spans[-1][1] + 1:
                spans[-1][1] = n
            else:
                spans.append([n, n])
        text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
        filled = "{" + text + "}" if len(numbers) > 1 else text
        out.append(template.replace("{}", filled) if numbers else template)
    return out


def write_safetensors(
    path: str | os.PathLike[str], tensors: Tensors, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write tensors in the order given. Views are made contiguous one at a time.

    The file is written whole or not at all. Raises UserError if it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors to 8 bytes
    with atomic(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    return Path(path)


def sha256_of(files: Iterable[Path]) -> str:
    """One SHA-256 over the bytes of the files, in order, for the record of a sample."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
