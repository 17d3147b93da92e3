"""PyTorch's files: real ones, hand-made ones, hostile ones, broken ones, and ours."""

import argparse
import builtins
import collections
import io
import json
import mmap
import os
import pickle
import random
import resource
import struct
import subprocess
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ditjax.errors import FaultError, UserError
from ditjax.weights import pickles, torch_file
from ditjax.weights.torch_file import read_torch, write_torch
from ditjax.weights.torch_objects import TORCH_DTYPES
from tests.seeded import seeded_state

GOLDEN = Path(__file__).parent.parent / "goldens" / "torch_file.npz"
# Where pickle finds them: the modules differ between versions of Python.
OPEN, TOUCH = f"{open.__module__}.open", f"{Path.__module__}.Path.touch"
SHAPES = {"0.weight": (4, 3, 2, 2), "0.bias": (4,), "1.weight": (4,), "1.bias": (4,)}


# Files made by hand.


def zip_bytes(
    content: bytes, storages: dict[str, bytes] | None = None, **entries: bytes | None
) -> bytes:
    """A file of torch's zip format around a pickle. entries: others, or None to leave one out."""
    stream = io.BytesIO()
    parts: dict[str, bytes | None] = {"data.pkl": content, "byteorder": b"little"}
    parts |= {f"data/{key}": raw for key, raw in (storages or {}).items()}
    parts |= {"version": b"3\n", **entries}
    with zipfile.ZipFile(stream, "w") as archive:
        for name, raw in parts.items():
            if raw is not None:
                archive.writestr(f"any/{name}", raw)
    return stream.getvalue()


def legacy_bytes(
    content: bytes, storages: dict[str, tuple[int, bytes]] | None = None, little: bool = True
) -> bytes:
    """A file of torch's format before 1.6 around a pickle. storages: element count and bytes."""
    storages = storages or {}
    header = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": little})
    return b"".join(
        (
            *(pickle.dumps(part, 2) for part in header),
            content,
            pickle.dumps(list(storages), 2),
            *(struct.pack("<q", count) + raw for count, raw in storages.values()),
        )
    )


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def integers(values) -> bytes:
    """A tuple of integers, signed 8-byte each."""
    return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"


def tensor(count, offset, shape, strides, kind="FloatStorage", key="0", view=None) -> bytes:
    """Opcodes of a tensor; view: None for the zip format, b"N" or a tuple for the legacy one."""
    return b"".join(
        (
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            text("storage"),
            f"ctorch\n{kind}\n".encode(),
            text(key),
            text("cpu"),
            integers([count])[1:-1],
            view or b"",
            b"tQ",
            integers([offset])[1:-1],
            integers(shape),
            integers(strides),
            b"\x89ccollections\nOrderedDict\n)RtR",
        )
    )


def whole(opcodes: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + opcodes + b"."


@pytest.fixture
def read(tmp_path):
    """Reads bytes as a file."""

    def read_bytes(content: bytes):
        path = tmp_path / "file.pt"
        path.write_bytes(content)
        return read_torch(path)

    return read_bytes


def refused(read, content: bytes) -> str:
    """The line with which a file is refused."""
    with pytest.raises(UserError) as caught:
        read(content)
    line = str(caught.value)
    assert "\n" not in line
    assert "file.pt" in line
    return line


def same(ours, expected, where="") -> None:
    """Equal types, structure, dtypes and bits."""
    if isinstance(expected, np.ndarray | np.generic):
        assert type(ours) is type(expected), where
        assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape), where
        assert ours.tobytes() == expected.tobytes(), where
        return
    assert type(ours) is type(expected), where
    if isinstance(expected, dict):
        assert list(ours) == list(expected), where
        for key in expected:
            same(ours[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(ours) == len(expected), where
        for index, (one, other) in enumerate(zip(ours, expected, strict=True)):
            same(one, other, f"{where}/{index}")
    elif isinstance(expected, float):
        assert struct.pack("d", ours) == struct.pack("d", expected), where
    else:
        assert ours == expected, where


# What PyTorch wrote.


@pytest.fixture(scope="module", params=["zip", "legacy"])
def golden(request, tmp_path_factory):
    """tests/oracles/torch_file.py's checkpoint as torch.save wrote it."""
    path = tmp_path_factory.mktemp("golden") / f"{request.param}.pt"
    with np.load(GOLDEN) as file:
        assert json.loads(str(file["versions"]))["torch"]
        path.write_bytes(file[request.param].tobytes())
    return read_torch(path)


def test_reads_weights_of_torch(golden):
    assert list(golden) == [
        "model",
        "ema",
        "opt",
        "args",
        "views",
        "parameter",
        "dtypes",
        "numpy",
        "other",
    ]
    state = seeded_state(SHAPES, seed=3)
    same(golden["ema"], state)
    assert type(golden["model"]) is dict
    # AdamW's first step is lr · sign(gradient), and the gradient was the weight.
    for name, weight in state.items():
        step = golden["model"][name] - weight
        np.testing.assert_allclose(step, -1e-4 * np.sign(weight), rtol=1e-2)


def test_reads_a_training_scripts_remains(golden):
    moments = golden["opt"]["state"]
    assert sorted(moments) == [0, 1, 2, 3]
    assert moments[0]["step"] == 1
    weights = seeded_state(SHAPES, seed=3)
    np.testing.assert_allclose(moments[0]["exp_avg"], 0.1 * weights["0.weight"], rtol=1e-5)
    assert golden["opt"]["param_groups"][0]["lr"] == 1e-4
    args = {"lr": 1e-4, "results_dir": "/data/results", "image_size": 256, "resume": None}
    same(golden["args"], args)


def test_reads_views_of_torch(golden):
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    expanded = np.broadcast_to(base[:, :1], (3, 5))
    expected = [base, base.T, base[1:, ::2], base[2, 3, ...], expanded, base[:0]]
    same(golden["views"], expected)
    views = golden["views"]
    assert views[1].strides == (4, 16)
    assert all(np.shares_memory(views[0], view) for view in views[1:5])
    assert not any(view.flags.writeable for view in views)
    same(golden["parameter"], base[0])


def test_reads_every_dtype_of_torch(golden):
    assert list(golden["dtypes"]) == list(TORCH_DTYPES)
    for name, array in golden["dtypes"].items():
        expected = np.array([1, 2, 4, 1, 8]).astype(TORCH_DTYPES[name])
        assert array.dtype.name == name
        same(array, expected, name)


def test_reads_everything_else_of_torch(golden):
    numbers = [np.float32(0.5), np.arange(6.0).reshape(2, 3), np.eye(2, 3)]
    same(golden["numpy"], numbers)
    other = {
        "size": (3, 4),
        "device": "cuda:1",
        "dtype": "torch.bfloat16",
        "set": {1, 2},
        "bytes": b"\x00\xff",
        "complex": 1 - 2j,
        "big": -(2**70),
        "": (True, None),
        "default": {0: [1.5]},
    }
    same(golden["other"], other)


# What we write, and read again.

SIDES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
ARRAYS = hnp.arrays(st.sampled_from([d for d in TORCH_DTYPES.values() if d.isbuiltin == 1]), SIDES)
# Hypothesis knows no ml_dtypes: any bits of their size, NaNs included.
BFLOATS = hnp.arrays(np.uint16, SIDES).map(lambda bits: bits.view(ml_dtypes.bfloat16))
FLOAT8S = hnp.arrays(np.uint8, SIDES).map(lambda bits: bits.view(ml_dtypes.float8_e4m3fn))
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**600), 2**600),
    st.floats(),
    st.text(max_size=8),
    ARRAYS,
    ARRAYS.map(np.transpose),
    BFLOATS,
    FLOAT8S,
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=4),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=TREES)
def test_round_trip_is_exact(tmp_path, tree):
    path = tmp_path / "tree.pt"
    write_torch(path, tree)
    first = path.read_bytes()
    found = read_torch(path)
    same(found, tree)
    write_torch(path, found)
    assert path.read_bytes() == first


def test_a_file_of_ours_has_torchs_layout(tmp_path):
    path = tmp_path / "new" / "x.pt"
    arrays = [np.arange(n, dtype=np.float32) for n in (1, 0, 1000, 3)]
    write_torch(path, {"arrays": arrays, "half": np.float32(0.5), "none": None})
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        # The clock would make equal trees different files.
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert archive.read("archive/byteorder") == b"little"
        assert archive.read("archive/version") == b"3\n"
        for index, array in enumerate(arrays):
            entry = archive.getinfo(f"archive/data/{index}")
            assert archive.read(entry) == array.tobytes()
            start = entry.header_offset
            start += 30 + sum(struct.unpack_from("<HH", data, start + 26))
            assert start % 64 == 0
            assert data[start : start + array.nbytes] == array.tobytes()
    assert list(path.parent.iterdir()) == [path]
    same(read_torch(path)["half"], 0.5)


def test_arrays_are_mapped_not_copied(tmp_path):
    path = tmp_path / "big.pt"
    write_torch(path, {"a": np.ones((1 << 22,), np.float32)})
    tracemalloc.start()
    array = read_torch(path)["a"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 16 MB; the checksum's buffer is the most that is held.
    assert peak < 10 << 20
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)
    path.unlink()
    assert array.sum() == 1 << 22
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_writing_holds_one_tensor(tmp_path):
    arrays = [np.ones((1 << 20, 2), np.float32).T for _ in range(4)]
    tracemalloc.start()
    write_torch(tmp_path / "x.pt", arrays)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * arrays[0].nbytes


def test_files_beyond_4_gb_have_their_fields(tmp_path, monkeypatch):
    """The same code with zip's limit lowered from 2 GB to 100 bytes."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    tree = {"small": np.arange(3.0), "large": np.arange(50.0), "more": np.arange(60.0)}
    path = tmp_path / "x.pt"
    write_torch(path, tree)
    assert path.read_bytes().count(b"PK\x06\x06") == 1
    same(read_torch(path), tree)
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            header = path.read_bytes()[entry.header_offset :][:30]
            assert (entry.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))) % 64 == 0


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"a": {"b": object()}}, "'a.b'"),
        ([np.array(["x"])], "array of str"),
        ([np.zeros(2, object)], "array of object"),
        ({(1, 2): 3}, "tuple cannot be a key"),
        ([1 << 3000], "376 bytes"),
        ([b"x"], "bytes cannot be stored"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(tmp_path, tree, words):
    path = tmp_path / "x.pt"
    write_torch(path, {"old": 1})
    with pytest.raises(UserError, match=words):
        write_torch(path, tree)
    assert read_torch(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_tree_that_holds_itself_is_refused(tmp_path):
    tree: list[object] = []
    tree.append(tree)
    with pytest.raises(UserError, match="holds itself"):
        write_torch(tmp_path / "x.pt", tree)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    class Broken:
        dtype, shape = np.dtype("f4"), (2,)

        def __array__(self, dtype=None, copy=None):
            raise OSError(28, "No space left on device")

    path = tmp_path / "x.pt"
    write_torch(path, [1])
    with pytest.raises(FaultError, match="No space left"):
        write_torch(path, [np.ones(3), Broken()])
    assert read_torch(path) == [1]
    assert list(tmp_path.iterdir()) == [path]


# Strides.


def test_any_string_is_kept(tmp_path):
    """Half a surrogate pair too, as in a path that is not UTF-8."""
    tree = {"\ud800é\n\x00": "\udcff", "": "x" * 70_000}
    write_torch(tmp_path / "x.pt", tree)
    same(read_torch(tmp_path / "x.pt"), tree)


def test_arrays_of_jax_are_written(tmp_path):
    path = tmp_path / "x.pt"
    write_torch(path, {"a": jnp.arange(3, dtype=jnp.bfloat16), "b": jnp.float32(2)})
    expected = {"a": np.arange(3).astype(ml_dtypes.bfloat16), "b": np.array(2, np.float32)}
    same(read_torch(path), expected)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    count=st.integers(0, 20),
    offset=st.integers(-2, 22),
    axes=st.lists(st.tuples(st.integers(-1, 4), st.integers(-2, 6)), max_size=4),
    legacy=st.booleans(),
)
def test_a_view_is_its_elements_or_refused(tmp_path, count, offset, axes, legacy):
    shape, strides = tuple(n for n, _ in axes), tuple(s for _, s in axes)
    values = np.arange(count, dtype=np.float32) + 1
    opcodes = tensor(count, offset, shape, strides, view=b"N" if legacy else None)
    if legacy:
        content = legacy_bytes(whole(opcodes), {"0": (count, values.tobytes())})
    else:
        content = zip_bytes(whole(opcodes), {"0": values.tobytes()})
    path = tmp_path / "view.pt"
    path.write_bytes(content)
    places = [offset + np.dot(index, strides) for index in np.ndindex(*(max(n, 0) for n in shape))]
    valid = min((offset, *shape, *strides)) >= 0 and offset <= count
    if not valid or any(place >= count for place in places):
        with pytest.raises(UserError, match="tensor"):
            read_torch(path)
    else:
        found = read_torch(path)
        assert found.shape == shape
        assert list(found.flat) == [values[int(place)] for place in places]


def test_absurd_tensors_are_refused(read):
    for shape, strides in (
        ((1 << 62,), (0,)),
        ((1 << 40,), (0,)),
        ((1 << 30, 1 << 30), (0, 0)),
        ((1,) * 33, (1,) * 33),
        ((2, 2), (1,)),
        ((0, 1 << 47, 1 << 47), (1, 1, 1)),
    ):
        content = whole(tensor(1, 0, shape, strides))
        refused(read, zip_bytes(content, {"0": bytes(4)}))


def test_a_legacy_view_of_a_storage(read):
    """Files of torch 0.3 name a storage within a storage."""
    view = b"(" + text("v") + b"K\x02K\x03t"
    raw = np.arange(6, dtype=np.float32).tobytes()
    opcodes = tensor(6, 0, (3,), (1,), view=view)
    assert read(legacy_bytes(whole(opcodes), {"0": (6, raw)})).tolist() == [2, 3, 4]
    beyond = tensor(6, 0, (3,), (1,), view=view.replace(b"K\x02", b"K\x04"))
    assert "beyond the end" in refused(read, legacy_bytes(whole(beyond), {"0": (6, raw)}))


# Hostile files.


class Call:
    """Pickles as a call: what __reduce__ is for."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments, *(() if state is None else (state,)))

    def __reduce__(self):
        return self.reduced


def attacks(sentinel: Path) -> dict[str, object]:
    """Objects whose unpickling would make the file `sentinel`."""
    command = f"touch {sentinel}"
    code = f"open({str(sentinel)!r}, 'w').close()"
    return {
        "posix.system": Call(os.system, command),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(sentinel)]),
        "builtins.eval": Call(eval, code),
        "builtins.exec": Call(exec, code),
        "builtins.getattr": Call(getattr, Path(sentinel), "touch"),
        "builtins.__import__": Call(builtins.__import__, "antigravity"),
        OPEN: Call(open, str(sentinel), "w"),
        "builtins.map": Call(map, os.system, [command]),
        "builtins.compile": Call(compile, code, "x", "exec"),
        TOUCH: Call(Path.touch, Path(sentinel)),
        "_pickle.loads": Call(pickle.loads, b"cos\nsystem\n(S'true'\ntR."),
    }


def put(place: str, attack: object) -> object:
    if place == "top":
        return attack
    if place == "Namespace":
        return {"args": argparse.Namespace(lr=1, resume=attack)}
    if place == "list":
        return {"model": collections.OrderedDict(a=[1, (attack,)])}
    return Call(collections.OrderedDict, [("a", attack)])


@pytest.mark.parametrize("wrap", [zip_bytes, legacy_bytes, bytes], ids=["zip", "legacy", "bare"])
@pytest.mark.parametrize("place", ["top", "Namespace", "list", "argument"])
def test_nothing_is_run(tmp_path, read, wrap, place):
    sentinel = tmp_path / "ran"
    for protocol in (2, 4):
        for name, attack in attacks(sentinel).items():
            content = pickle.dumps(put(place, attack), protocol, fix_imports=False)
            # Protocol 2 spells a method as getattr(class, name).
            wanted = "builtins.getattr" if protocol == 2 and "Path" in name else name
            assert f"asks for {wanted!r}," in refused(read, wrap(content))
            assert not sentinel.exists()


def test_the_attacks_are_real(tmp_path):
    """Python's own unpickler does run them, so the test above can fail."""
    for name in ("posix.system", "builtins.exec", OPEN, TOUCH):
        sentinel = tmp_path / name
        pickle.loads(pickle.dumps(put("Namespace", attacks(sentinel)[name]), 4))
        assert sentinel.exists()


@pytest.mark.parametrize(
    ("opcodes", "words"),
    [
        (b"\x8c\x0bcollections\x8c\x20OrderedDict.__init__.__globals__\x93", "__globals__"),
        (b"\x8c\x08builtins\x8c\x0dset.__class__\x93", "set.__class__"),
        (b"\x8c\x02os\x8c\x0bsys\nte\x1b[2Jm\x93", r"'os.sys\\nte\\x1b\[2Jm'"),
        (b"\x8c\x0ctorch._utils\x8c\x1d_rebuild_tensor.__globals__.a\x93", "__globals__"),
        (b"cditjax.weights.torch_file\nwrite_torch\n", "write_torch"),
        (b"cevil_module_of_test\nname\n", "evil_module_of_test.name"),
        (b"ctorch.storage\n_load_from_bytes\n(tR", "_load_from_bytes"),
        (b"ctorch\nload\n(tR", "torch.load"),
        (b"ctorch._utils\n_rebuild_sparse_tensor\n)R", "_rebuild_sparse_tensor"),
        (b"(ios\nsystem\n", "opcode b'i'"),
        (b"(cos\nsystem\no", "os.system"),
        (b"(ccollections\nOrderedDict\no", "opcode b'o'"),
        (b"\x82\x01", "opcode"),
        (b"\x83\x01\x00", "opcode"),
        (b"\x84\x01\x00\x00\x00", "opcode"),
        (b"Pos.system\n", "opcode b'P'"),
        (b"S'text'\n", "opcode b'S'"),
        (b"\x97", "opcode"),
        (b"ctorch\nFloatStorage\n)R", "may only be named"),
        (b"cbuiltins\nlist\n)\x81", "may only be named"),
        (b"ccollections\ndefaultdict\nK\x01\x85R", "makes no sense"),
        (b"ccollections\nOrderedDict\nK\x01\x85R", "makes no sense"),
        (b"ccollections\nOrderedDict\n]R", "makes no sense"),
        (b"K\x01)R", "makes no sense"),
        (b"]}b", "gives a state to a list"),
        (b"}}b", "gives a state to a dict"),
        (b"ccollections\nOrderedDict\n)R}}\x86b", "gives a state"),
        (b"cargparse\nNamespace\n)\x81}}\x86b", "gives a state"),
        (b"cbuiltins\nset\n)R}b", "gives a state to a set"),
        (b"K\x01K\x02a", "makes no sense"),
        (b"}]K\x01s", "uses a list as a key"),
        (b"\x8f(]\x90", "uses a list as a key"),
        (b"})\x85\x85K\x01s", "uses a tuple as a key"),
        (b"h\x05", "makes no sense"),
        (b"K\x01K\x02", "makes no sense"),
        (b"t", "makes no sense"),
        (b"\x87", "makes no sense"),
        (b"N", None),
        (b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8K\x00K\x01tR", "only numbers"),
        (b"c_codecs\nencode\n(X\x01\x00\x00\x00xX\x05\x00\x00\x00rot13tR", "makes no sense"),
        (b"cbuiltins\ncomplex\n(X\x01\x00\x00\x001G" + bytes(8) + b"tR", "makes no sense"),
        (b"cpathlib\nPosixPath\n(K\x01tR", "makes no sense"),
        (b"ctorch._utils\n_rebuild_parameter\n(]\x88NtR", "makes no sense"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(]K\x00))\x89NtR", "makes no sense"),
        (b"K\x01Q", "makes no sense"),
        (b"(X\x07\x00\x00\x00storagecos\nsystem\nK\x00NK\x01tQ", "os.system"),
        (b"(X\x07\x00\x00\x00storagectorch\nQInt8Storage\nX\x01\x00\x00\x000NK\x01tQ", "QInt8"),
    ],
)
def test_odd_opcodes_are_refused(tmp_path, monkeypatch, read, opcodes, words):
    sentinel = tmp_path / "imported"
    evil = tmp_path / "evil_module_of_test.py"
    evil.write_text(f"open({str(sentinel)!r}, 'w').close()\nname = print\n")
    monkeypatch.syspath_prepend(tmp_path)
    content = zip_bytes(whole(opcodes, protocol=4))
    if words is None:
        assert read(content) is None
    else:
        with pytest.raises(UserError, match=words):
            read(content)
    assert not sentinel.exists()


def test_classes_that_are_only_named_become_words(read):
    """Stable Diffusion's own checkpoints carry their callbacks' classes as keys."""
    name = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    opcodes = b"}cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\nK\x07s"
    assert read(zip_bytes(whole(opcodes))) == {name: 7}


BOMBS = {
    "memo": (b"Nr\xff\xff\xff\xff", None),
    "length": (b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc", "cut short"),
    "bytes length": (b"B\xff\xff\xff\xffabc", "cut short"),
    "integer": (b"\x8b\xff\xff\xff\x7fabc", "cut short"),
    "deep": (b"]" * 40_000 + b"a" * 39_999, "more than 100 deep"),
    "deep tuple": (b")" + b"\x85" * 40_000, "more than 100 deep"),
    "deep key": (b"})" + b"\x85" * 40_000 + b"Ns", "uses a tuple as a key"),
    "holds itself": (b"]q\x00h\x00a", "contains itself"),
    "itself by a dict": (b"}q\x00K\x01h\x00s", "contains itself"),
    "doubling": (b"]q\x000" + b"](h\x00h\x00eq\x000" * 60 + b"h\x00", "unfolds to"),
    "copies": (
        text("x" * (1 << 16))
        + b"q\x000"
        + (b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R0") * 100
        + b"N",
        "copies more",
    ),
    "sets": (
        b"](" + b"K\x01" * 20_000 + b"eq\x000" + b"cbuiltins\nset\nh\x00\x85R0" * 100 + b"N",
        "copies more",
    ),
    "states": (
        b"}("
        + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(15_000))
        + b"uq\x000"
        + b"cargparse\nNamespace\n)\x81h\x00b0" * 100
        + b"N",
        "copies more",
    ),
    "steps": (b"N0" * 60_000 + b"N", "more than 100000 steps"),
    "marks": (b"(" * 200_000, "more than 100000 steps"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_do_not_go_off(monkeypatch, read, name):
    """Smaller bombs and smaller limits than in earnest, so that the test is quick."""
    monkeypatch.setattr(pickles, "MAX_STEPS", 100_000)
    monkeypatch.setattr(pickles, "MAX_COPIED", 1 << 20)
    opcodes, words = BOMBS[name]
    content = zip_bytes(whole(opcodes))
    tracemalloc.start()
    if words is None:
        assert read(content) is None
    else:
        assert words in refused(read, content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 << 20


# Broken files and files of something else.

ONE = whole(tensor(4, 0, (4,), (1,)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (zip_bytes(ONE), "lacks the storage '0'"),
        (zip_bytes(ONE, {"0": bytes(12)}), "12 bytes where its pickle says 16"),
        (zip_bytes(ONE, {"0": bytes(20)}), "20 bytes where"),
        (zip_bytes(ONE, {"0": bytes(16)}, byteorder=b"big"), "big-endian"),
        (zip_bytes(ONE, {"0": bytes(16)}, **{"constants.pkl": b""}), "TorchScript"),
        (zip_bytes(ONE, {"0": bytes(16)}, **{"code/__torch__.py": b""}), "TorchScript"),
        (zip_bytes(ONE, **{"data.pkl": None}), "0 data.pkl"),
        (legacy_bytes(ONE), "makes no sense"),
        (legacy_bytes(whole(tensor(4, 0, (4,), (1,), view=b"N"))), "lists other storages"),
        (
            legacy_bytes(whole(tensor(4, 0, (4,), (1,), view=b"N")), {"0": (5, bytes(20))}),
            "no storage '0' where it should be",
        ),
        (
            legacy_bytes(whole(tensor(4, 0, (4,), (1,), view=b"N")), {"0": (4, bytes(15))}),
            "ends within its storage '0'",
        ),
        (legacy_bytes(whole(b"N"), little=False), "big-endian"),
        (
            legacy_bytes(whole(b"(" + text("module") + b"NNNtQ")),
            "whole module",
        ),
        (pickle.dumps({"a": 1}, 2), "bare pickle"),
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>not found</html>", "web page"),
        (b"\n <html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (struct.pack("<Q", 20) + b'{"a":{"dtype":"F32"}' + bytes(40), "safetensors"),
        (b'{"error": "not found"}', "JSON"),
        (b"\x1f\x8b\x08" + bytes(40), "gzip"),
        (b"\x93NUMPY\x01\x00", "NumPy"),
        (bytes(257) + b"ustar\x00", "tar"),
        (bytes(1000), "zeros"),
        (b"PK\x03\x04 cut", "without a readable directory"),
        (zip_bytes(ONE, {"0": bytes(16)})[:-30], "without a readable directory"),
        (random.Random(0).randbytes(1024), "not a file of torch.save"),
        (b"x", "not a file of torch.save"),
    ],
)
def test_other_files_are_named(read, content, words):
    assert words in refused(read, content)


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_torch(tmp_path / "none.pt")
    with pytest.raises(UserError, match="directory"):
        read_torch(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="not a file"):
        read_torch(tmp_path / "fifo")
    with pytest.raises(UserError, match="cannot write"):
        write_torch(tmp_path / "fifo" / "x.pt", {})


def test_zip_entries_that_torch_never_writes(tmp_path):
    path = tmp_path / "file.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", whole(b"](" + b"N" * 100_000 + b"e"))
    with pytest.raises(UserError, match=r"compressed entry 'a/data\.pkl"):
        read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", whole(b"N"))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/data.pkl", whole(b"]"))
    with pytest.raises(UserError, match="two entries"):
        read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", whole(b"N"))
        archive.writestr("b/data.pkl", whole(b"]"))
    with pytest.raises(UserError, match=r"2 data\.pkl"):
        read_torch(path)
    np.savez_compressed(path.with_suffix(".npz"), a=np.ones(3))
    with pytest.raises(UserError, match=r"\.npz"):
        read_torch(path.with_suffix(".npz"))


def test_an_entry_that_claims_more_than_the_file(read):
    content = bytearray(zip_bytes(whole(tensor(1 << 20, 0, (4,), (1,))), {"0": bytes(16)}))
    entry = content.index(b"PK\x01\x02", content.index(b"any/data/0") + 16)
    while content[entry + 46 :][:10] != b"any/data/0":
        entry = content.index(b"PK\x01\x02", entry + 1)
    content[entry + 16 : entry + 28] = struct.pack("<3I", 0, 4 << 20, 4 << 20)
    assert "ends within its entry 'any/data/0" in refused(read, bytes(content))


def test_a_flipped_bit_in_a_tensor_is_seen(tmp_path, read):
    path = tmp_path / "x.pt"
    write_torch(path, [np.ones(100, np.float32)])
    content = bytearray(path.read_bytes())
    content[content.index(np.ones(100, np.float32).tobytes()) + 77] ^= 4
    assert "wrong checksum in 'archive/data/0" in refused(read, bytes(content))


def mutants(content: bytes, seed: int, count: int):
    """Copies of a file with a few bytes flipped, a piece cut, inserted, repeated or zeroed."""
    rng = random.Random(seed)
    for _ in range(count):
        made = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 3))):
            place = rng.randrange(len(made))
            kind = rng.randrange(6)
            if kind <= 1:
                made[place] ^= 1 << rng.randrange(8)
            elif kind == 2:
                made[place] = rng.randrange(256)
            elif kind == 3:
                made[place:place] = rng.randbytes(rng.randrange(1, 9))
            elif kind == 4:
                del made[place : place + rng.randrange(1, 20)]
            else:
                del made[place:]
            made = made or bytearray(b"x")
        yield bytes(made)


def sample_tree() -> dict[str, object]:
    return {
        "model": {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.uint16)},
        "list": [1, 2.5, "text", None, (True, -(2**80))],
    }


def outcome(path: Path, content: bytes) -> tuple[bool, object]:
    """(True, value), or (False, line) of a UserError; anything else is a failure."""
    path.write_bytes(content)
    try:
        return True, read_torch(path)
    except UserError as error:
        line = str(error)
    assert "\n" not in line
    return False, line


def test_fuzzed_zip_is_exact_or_refused(tmp_path):
    path = tmp_path / "x.pt"
    write_torch(path, sample_tree())
    counts: collections.Counter[bool] = collections.Counter()
    for made in mutants(path.read_bytes(), seed=1, count=600):
        fine, value = outcome(path, made)
        counts[fine] += 1
        if fine:
            same(value, sample_tree())
    assert min(counts.values()) > 50


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_fuzzed_files_of_torch_end_well(tmp_path, kind):
    """Pickles with right checksums, and the legacy format, which has none."""
    with np.load(GOLDEN) as file:
        content = file[kind].tobytes()
    path = tmp_path / "x.pt"
    if kind == "zip":
        path.write_bytes(content)
        with zipfile.ZipFile(path) as archive:
            parts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        storages = {n.removeprefix("data/"): c for n, c in parts.items() if n.startswith("data/")}
        cases = (zip_bytes(made, storages) for made in mutants(parts["data.pkl"], 2, 500))
    else:
        cases = mutants(content, 3, 500)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = [outcome(path, made)[0] for made in cases]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    assert sum(results) > 10
    assert len(results) - sum(results) > 100


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    write_torch(path, sample_tree())
    content = path.read_bytes()
    raw = np.arange(6, dtype=np.float32).tobytes()
    legacy = legacy_bytes(whole(tensor(6, 0, (2, 3), (3, 1), view=b"N")), {"0": (6, raw)})
    assert outcome(path, legacy)[0]
    for full in (content, legacy):
        for length in range(0, len(full), 1 if full is legacy else 7):
            assert not outcome(path, full[:length])[0], length


def test_checksums_that_were_not_computed_are_not_compared(read):
    """torch.serialization.set_crc32_options(False) leaves them zero."""
    content = zip_bytes(ONE, {"0": bytes(range(16))})
    for raw in (ONE, bytes(range(16)), b"little"):
        content = content.replace(struct.pack("<I", zlib.crc32(raw)), bytes(4))
    assert read(content).nbytes == 16


def test_entries_that_lie_over_one_another(read):
    """Each would be compared with its checksum: so many times the file's length."""
    content = zip_bytes(whole(b"N"), {f"{k:02}": bytes(500) for k in range(20)})
    entry, made = content.index(b"PK\x01\x02"), bytearray(content)
    for k in range(10):  # the others have what lies behind them
        place = content.index(b"any/data/%02d" % k, entry)
        made[place - 26 : place - 18] = struct.pack("<2I", 2000, 2000)
    assert "entries that overlap" in refused(read, bytes(made))


def test_more_entries_than_are_read(read, monkeypatch):
    monkeypatch.setattr(torch_file, "_MAX_ENTRIES", 3)
    assert "holds 4 entries; 3 are read" in refused(read, zip_bytes(whole(b"N"), {"0": b""}))
