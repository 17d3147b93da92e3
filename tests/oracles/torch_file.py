"""Files that PyTorch itself saves: a training script's checkpoint with some of everything."""

import argparse
import collections
import io
import pathlib
import tempfile
from typing import Any

import numpy as np
import torch

from tests.seeded import seeded_state

PACKAGES = ("torch", "numpy")

SHAPES = {"0.weight": (4, 3, 2, 2), "0.bias": (4,), "1.weight": (4,), "1.bias": (4,)}
DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "complex128",
    "complex64",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "bool",
)


def checkpoint() -> dict[str, Any]:
    """What the public training script saves: weights twice, optimizer, Namespace; and oddities."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.GroupNorm(2, 4))
    state = {name: torch.from_numpy(w) for name, w in seeded_state(SHAPES, seed=3).items()}
    model.load_state_dict(state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "model": model.state_dict(),
        "ema": collections.OrderedDict(state),
        "opt": optimizer.state_dict(),
        "args": argparse.Namespace(
            lr=1e-4, results_dir=pathlib.PurePosixPath("/data/results"), image_size=256, resume=None
        ),
        "views": [base, base.t(), base[1:, ::2], base[2, 3], base[:, :1].expand(3, 5), base[:0]],
        "parameter": torch.nn.Parameter(base[0].clone()),
        "dtypes": {name: of_dtype(name) for name in DTYPES},
        "numpy": [np.float32(0.5), np.arange(6.0).reshape(2, 3), np.asfortranarray(np.eye(2, 3))],
        "other": {
            "size": base.shape,
            "device": torch.device("cuda", 1),
            "dtype": torch.bfloat16,
            "set": {1, 2},
            "bytes": b"\x00\xff",
            "complex": 1 - 2j,
            "big": -(2**70),
            "": (True, None),
            "default": collections.defaultdict(list, {0: [1.5]}),
        },
    }


def of_dtype(name: str) -> torch.Tensor:
    """Powers of two, which every dtype but bool holds exactly."""
    return torch.tensor([1, 2, 4, 1, 8]).to(getattr(torch, name))


def saved(value: object, legacy: bool = False, protocol: int = 2) -> bytes:
    """The file that torch.save writes."""
    stream = io.BytesIO()
    torch.save(value, stream, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def loaded(content: bytes) -> Any:
    """What torch.load makes of a file, without running anything in it."""
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        file.write(content)
        file.flush()
        return torch.load(file.name, weights_only=True)


def goldens() -> dict[str, np.ndarray]:
    """The checkpoint's bytes in either format, as u8: a file within the golden file."""
    return {
        name: np.frombuffer(saved(checkpoint(), legacy=name == "legacy"), np.uint8)
        for name in ("zip", "legacy")
    }
