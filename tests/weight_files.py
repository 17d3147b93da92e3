"""Files in other programs' layouts, spelled out here from those programs and not by our tables."""

import collections
import io
import json
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.seeded import seeded_state

GOLDEN = Path(__file__).parent / "goldens" / "networks.npz"
FOLDER_WEIGHTS = "diffusion_pytorch_model.safetensors"

Shapes = dict[str, tuple[int, ...]]


def golden(name: str) -> Any:
    """An array of networks.npz, or the object that its JSON text holds."""
    with np.load(GOLDEN) as file:
        array = file[name]
    return json.loads(str(array)) if array.dtype.kind == "U" else array


def diffusers_state(kind: str) -> dict[str, np.ndarray]:
    """The weights that `tests.oracles.networks` gave diffusers' small 'dit' or 'autoencoder'."""
    shapes = {name: tuple(shape) for name, shape in golden(f"{kind}_shapes").items()}
    state = seeded_state(shapes, 0)
    for name in state:
        _, found, rest = name.partition(".norm1.emb.")
        if found:
            state[name] = state[f"transformer_blocks.0{found}{rest}"]
    return state


def write_folder(
    folder: Path, state: dict[str, np.ndarray], config: dict[str, Any], dtype: Any = np.float32
) -> Path:
    """A model folder of diffusers, written by the safetensors library."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(x.astype(dtype)) for name, x in state.items()}
    save_file(tensors, folder / FOLDER_WEIGHTS, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def diffusers_folder(folder: Path, kind: str, dtype: Any = np.float32) -> Path:
    """The golden's 'dit' or 'autoencoder' as diffusers saves it."""
    return write_folder(folder, diffusers_state(kind), golden(f"{kind}_config"), dtype)


def release_shapes(
    depth: int = 2,
    width: int = 48,
    patch: int = 4,
    side: int = 16,
    *,
    channels: int = 4,
    classes: int = 10,
    learned: bool = True,
    hidden: int | None = None,
) -> Shapes:
    """The state dict of facebookresearch/DiT's models.py, position table included."""
    D, p, M = width, patch, hidden or 4 * width
    shapes: Shapes = {
        "pos_embed": (1, (side // p) ** 2, D),
        "x_embedder.proj.weight": (D, channels, p, p),
        "x_embedder.proj.bias": (D,),
        "t_embedder.mlp.0.weight": (D, 256),
        "t_embedder.mlp.0.bias": (D,),
        "t_embedder.mlp.2.weight": (D, D),
        "t_embedder.mlp.2.bias": (D,),
        "y_embedder.embedding_table.weight": (classes + 1, D),
    }
    for i in range(depth):
        for name, out, into in (
            ("attn.qkv", 3 * D, D),
            ("attn.proj", D, D),
            ("mlp.fc1", M, D),
            ("mlp.fc2", D, M),
            ("adaLN_modulation.1", 6 * D, D),
        ):
            shapes[f"blocks.{i}.{name}.weight"] = (out, into)
            shapes[f"blocks.{i}.{name}.bias"] = (out,)
    out = p * p * channels * (2 if learned else 1)
    shapes |= {"final_layer.linear.weight": (out, D), "final_layer.linear.bias": (out,)}
    shapes["final_layer.adaLN_modulation.1.weight"] = (2 * D, D)
    shapes["final_layer.adaLN_modulation.1.bias"] = (2 * D,)
    return shapes


def position_table(width: int, side: int) -> np.ndarray:
    """models.py's get_2d_sincos_pos_embed in words: f32[1, side², width]."""
    omega = np.arange(width // 4, dtype=np.float64)
    omega /= width / 4.0
    omega = 1.0 / 10000**omega
    rows, columns = np.divmod(np.arange(side * side), side)
    parts = []
    for position in (columns, rows):  # "here w goes first"
        angle = np.outer(position.astype(np.float32).astype(np.float64), omega)
        parts += [np.sin(angle), np.cos(angle)]
    return np.concatenate(parts, axis=1)[None].astype(np.float32)


def release_state(dtype: Any = np.float32, **kwargs: Any) -> dict[str, np.ndarray]:
    """Seeded weights of a release state dict, with its true position table."""
    shapes = release_shapes(**kwargs)
    state = seeded_state(shapes, 0)
    _, N, width = shapes["pos_embed"]
    state["pos_embed"] = position_table(width, round(N**0.5))
    return {name: x.astype(dtype) for name, x in state.items()}


class _Pickler(pickle.Pickler):
    """Arrays as torch.save writes float32 tensors; other objects as Python does."""

    def __init__(self, stream: io.BytesIO, protocol: int) -> None:
        super().__init__(stream, protocol)
        self.storages: dict[str, bytes] = {}

    def persistent_id(self, value: Any) -> Any:
        return value.pid if isinstance(value, _Storage) else None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return NotImplemented
        key = str(len(self.storages))
        self.storages[key] = np.ascontiguousarray(value, np.float32).tobytes()
        kind = sys.modules["torch"].FloatStorage
        storage = _Storage(("storage", kind, key, "cpu", value.size))
        strides = tuple(np.empty(value.shape, np.int8).strides)
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        return rebuild, (storage, 0, value.shape, strides, False, collections.OrderedDict())


class _Storage:
    def __init__(self, pid: Any) -> None:
        self.pid = pid


def foreign(name: str, base: type = object) -> type:
    """A class that pickles as another package's 'module.Name', or a function of that name."""
    module, _, last = name.rpartition(".")
    made = type(last, (base,), {"__module__": module})
    for depth, part in enumerate(parts := module.split(".")):
        sys.modules.setdefault(".".join(parts[: depth + 1]), types.ModuleType(part))
    setattr(sys.modules[module], last, made)
    return made


def save_as_torch(path: Path, tree: Any, protocol: int = 2) -> Path:
    """What torch.save(tree, path) writes, with objects of any class in the tree."""
    held = dict(sys.modules)
    try:
        foreign("torch.FloatStorage")
        foreign("torch._utils._rebuild_tensor_v2")
        stream = io.BytesIO()
        pickler = _Pickler(stream, protocol)
        pickler.dump(tree)
    finally:
        for name in sys.modules.keys() - held.keys():
            del sys.modules[name]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", stream.getvalue())
        archive.writestr("x/byteorder", b"little")
        for key, raw in pickler.storages.items():
            archive.writestr(f"x/data/{key}", raw)
    return path


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """The same names, types, shapes and bits."""
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert ours[name].dtype == x.dtype, name
        assert ours[name].shape == x.shape, name
        assert ours[name].tobytes() == x.tobytes(), name
