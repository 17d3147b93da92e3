"""Our reader beside torch.load on what torch.save wrote, and torch.load on what we write."""

import collections
from typing import Any

import numpy as np
import pytest
import torch

from ditjax.errors import UserError
from ditjax.weights.torch_file import read_torch, write_torch
from tests.oracles.torch_file import DTYPES, checkpoint, loaded, of_dtype, saved

LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def read(tmp_path, content: bytes):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    return read_torch(path)


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes in C order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def agree(ours, theirs, where="") -> None:
    """Our array has the tensor's dtype, shape, strides and bits; our containers the same items."""
    if isinstance(theirs, torch.Tensor):
        assert str(theirs.dtype) == f"torch.{ours.dtype.name}", where
        assert ours.shape == tuple(theirs.shape), where
        if theirs.numel():
            size = theirs.element_size()
            assert ours.strides == tuple(step * size for step in theirs.stride()), where
            assert ours.tobytes() == bits(theirs), where
    elif isinstance(theirs, dict):
        assert type(ours) is dict, where
        assert list(ours) == list(theirs), where
        for key in theirs:
            agree(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            agree(one, other, f"{where}/{index}")
    else:
        assert (type(ours), ours) == (type(theirs), theirs), where


@LEGACY
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_torch_saves(tmp_path, legacy, protocol):
    theirs = checkpoint()
    ours = read(tmp_path, saved(theirs, legacy, protocol))
    for name in ("model", "ema", "opt", "views", "parameter", "dtypes"):
        agree(ours[name], theirs[name], name)
    assert ours["args"]["results_dir"] == "/data/results"
    for one, other in zip(ours["numpy"], theirs["numpy"], strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert ours["other"]["default"] == {0: [1.5]}
    assert ours["other"]["set"] == {1, 2}
    assert ours["other"]["bytes"] == b"\x00\xff"


@LEGACY
@pytest.mark.parametrize("name", DTYPES)
def test_reads_every_dtype(tmp_path, legacy, name):
    tensor = of_dtype(name)
    agree(read(tmp_path, saved(tensor, legacy)), tensor)
    random = torch.randint(0, 256, (96,), dtype=torch.uint8)
    if name != "bool":
        random = random.view(tensor.dtype).reshape(2, -1)
        agree(read(tmp_path, saved([random, random.t()], legacy)), [random, random.t()])


@LEGACY
@pytest.mark.parametrize("kind", ["SGD", "Adam", "RMSprop", "LBFGS"])
def test_reads_modules_and_optimizers(tmp_path, legacy, kind):
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.MultiheadAttention(4, 2)
    )
    options = {"lr": 0.1, "momentum": 0.9} if kind == "SGD" else {"lr": 0.1}
    optimizer = getattr(torch.optim, kind)(model[:2].parameters(), **options)

    def closure():
        optimizer.zero_grad()
        loss = model[:2](torch.ones(5, 3) * torch.arange(5.0)[:, None]).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5])
    theirs = {
        "model": model.state_dict(),
        "parameters": list(model.parameters()),
        "opt": optimizer.state_dict(),
        "version": str(torch.__version__),
    }
    agree(read(tmp_path, saved(theirs, legacy)), theirs)
    state = {key: value for key, value in schedule.state_dict().items() if key[0] != "_"}
    found = read(tmp_path, saved({"s": state, "v": torch.__version__}, legacy))
    assert found["s"]["milestones"] == {2: 1, 5: 1}
    assert found["v"] == str(torch.__version__)


def test_reads_files_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        content = saved({"a": torch.arange(5)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(tmp_path, content)["a"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore::UserWarning")
@LEGACY
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.nn.Linear(2, 2), "asks for 'torch.nn.modules.linear.Linear'"),
        (lambda: torch.eye(2).to_sparse(), "_rebuild_sparse_tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), "qtensor"),
        (lambda: torch.ones(2, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (lambda: torch.complex(torch.ones(2), torch.ones(2)).conj(), "conjugated"),
        (lambda: torch.ones(2, dtype=torch.complex32), "torch.complex32"),
    ],
    ids=["module", "sparse", "quantized", "meta", "conj", "complex32"],
)
def test_what_is_no_plain_tensor_is_refused(tmp_path, legacy, make, words):
    with pytest.raises(UserError, match=words):
        read(tmp_path, saved({"a": make()}, legacy))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(path)
    with pytest.raises(UserError, match="TorchScript"):
        read_torch(path)


def test_torch_loads_what_we_write(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "x.pt"
    arrays = {}
    for name in DTYPES:
        bytes_ = rng.integers(0, 2 if name == "bool" else 256, 96, np.uint8)
        arrays[name] = read(tmp_path, saved(of_dtype(name)))[:0].dtype
        arrays[name] = bytes_.view(arrays[name]).reshape(2, -1)
    tree: dict[str, Any] = {
        "arrays": arrays,
        "turned": [array.T for array in arrays.values()],
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float16),
        "plain": [1, -1, 255, 256, 65536, 2**31, -(2**31), -(2**40), 2**1000, True, None, "é\n"],
        "floats": (0.1, -0.0, float("inf")),
        "nested": {"a": {1: ({},), 2: []}},
        "none": (),
    }
    write_torch(path, tree)
    theirs = loaded(path.read_bytes())
    for name, array in arrays.items():
        assert str(theirs["arrays"][name].dtype) == f"torch.{name}"
        assert bits(theirs["arrays"][name]) == array.tobytes()
        assert theirs["arrays"][name].shape == array.shape
    for tensor, array in zip(theirs["turned"], tree["turned"], strict=True):
        assert bits(tensor) == array.tobytes()
        assert tensor.is_contiguous()
    assert theirs["scalar"].item() == 2.5
    assert theirs["scalar"].shape == ()
    assert theirs["empty"].shape == (0, 3)
    for name in ("plain", "floats", "nested", "none"):
        agree(theirs[name], tree[name], name)


def test_a_module_takes_what_we_write(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4))
    state = read(tmp_path, saved(model.state_dict()))
    write_torch(tmp_path / "y.pt", collections.OrderedDict(state))
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4))
    other.load_state_dict(torch.load(tmp_path / "y.pt", weights_only=True, mmap=True))
    agree(state, other.state_dict())
