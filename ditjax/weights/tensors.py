"""Files of named tensors: safetensors, PyTorch's, and diffusers' folders. Nothing in them is run.

`read_tensors` maps a file: the arrays point into it, and use memory only where they are read.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ditjax.errors import UserError, first_few, reason, shown
from ditjax.files.atomic import atomic, read_json
from ditjax.weights.layouts import Shapes
from ditjax.weights.torch_file import read_torch

Tensors = Mapping[str, np.ndarray]

# Names of the weights in a diffusers folder, in the order in which diffusers searches for them.
_FOLDER_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.bin",
)
_SHARDS = "diffusion_pytorch_model.safetensors.index.json"
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
    """

    path: Path
    tensors: dict[str, np.ndarray]
    files: tuple[Path, ...]
    config: dict[str, Any]
    metadata: dict[str, str]
    extra: dict[str, Any]


def read_tensors(path: str | os.PathLike[str], which: str = "ema") -> TensorFile:
    """The named tensors of a file or of a diffusers folder.

    `which` selects the state of a training checkpoint: 'ema' (averaged) or 'model'. Raises
    UserError for a path that is missing, unreadable, or does not hold weights.
    """
    path = Path(path)
    return _read_folder(path, which) if os.path.isdir(path) else _read_file(path, which)


def _read_file(path: Path, which: str) -> TensorFile:
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        raise UserError(
            f"{path} does not exist: expected a weights file, a model folder of diffusers or a"
            " run's directory."
        )
    if _looks_like_safetensors(path):
        tensors, metadata = _read_safetensors(path)
        return TensorFile(path, tensors, (path,), {}, metadata, {})
    tensors, extra = _unwrap(path, read_torch(path), which)
    return TensorFile(path, tensors, (path,), {}, {}, extra)


def _read_folder(folder: Path, which: str) -> TensorFile:
    if not (folder / CONFIG_FILE).exists():
        raise UserError(
            f"{folder} has no {CONFIG_FILE}: expected a model folder of diffusers, a run's"
            " directory, or a weights file."
        )
    config = read_json(folder / CONFIG_FILE)
    names: Iterable[str] = [name for name in _FOLDER_FILES if (folder / name).exists()][:1]
    if (folder / _SHARDS).exists():
        shards = read_json(folder / _SHARDS).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError(f"{folder / _SHARDS} has no weight_map: the download is incomplete.")
        names = sorted({os.path.basename(str(name)) for name in shards.values()})
    if not names:
        raise UserError(f"{folder} holds no weights: expected one of {', '.join(_FOLDER_FILES)}.")
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        tensors |= _read_file(folder / name, which).tensors
    files = tuple(folder / name for name in names)
    return TensorFile(folder, tensors, files, config, {}, {})


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


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, np.ndarray) for v in value.values())


def _unwrap(path: Path, saved: Any, which: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A state dict out of {'ema', 'model', 'args'} or {'state_dict'}, without DDP's 'module.'."""
    if not isinstance(saved, Mapping):
        raise UserError(
            f"{path} holds a {type(saved).__name__}: expected a state dict (tensors by name)."
        )
    extra: dict[str, Any] = {}
    state: Any = saved
    if not _is_state(saved):
        wrappers = [key for key in ("ema", "model", "state_dict") if _is_state(saved.get(key))]
        if not wrappers:
            keys = first_few(map(shown, saved), 8) or "nothing"
            raise UserError(
                f"{path} holds no tensors by name: its keys are {keys}; expected a state dict, or"
                " one under 'ema', 'model' or 'state_dict'."
            )
        chosen = next((key for key in (which, "state_dict") if key in wrappers), None)
        if chosen is None:
            raise UserError(
                f"{path} holds {', '.join(map(repr, wrappers))} and no {which!r}:"
                f" choose with --which={wrappers[0]}."
            )
        state = saved[chosen]
        extra = {key: value for key, value in saved.items() if key not in wrappers}
    odd = [
        shown(key)
        for key, value in state.items()
        if not (isinstance(value, np.ndarray) and isinstance(key, str))
    ]
    if odd:
        raise UserError(f"{path}: {first_few(odd, 8)} are not tensors: expected tensors by name.")
    # DistributedDataParallel adds this prefix.
    prefix = "module." if all(name.startswith("module.") for name in state) else ""
    return {name.removeprefix(prefix): value for name, value in state.items()}, extra


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
        raise UserError(f"{path} is no {what}: {'; '.join(faults)}.")
    return dtype


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
