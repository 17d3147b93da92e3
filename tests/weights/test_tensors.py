"""Weights files: read and written as the safetensors library does, and hostile ones refused."""

import contextlib
import hashlib
import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ditjax.errors import FaultError, UserError
from ditjax.weights import tensors as weights
from ditjax.weights.torch_file import write_torch
from tests.unstable import FOR_EVER, Unstable
from tests.weight_files import FOLDER_WEIGHTS, assert_same

DTYPES = (
    np.float64,
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    np.int64,
    np.int32,
    np.int16,
    np.int8,
    np.uint8,
    np.bool_,
)
TENSORS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(3, np.float32)}


def refusal(path, **kwargs):
    """The one line that reading a path ends in."""
    with pytest.raises(UserError) as caught:
        weights.read_tensors(path, **kwargs)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


def raw(path, header, data=b""):
    """A safetensors file by hand: u64 length, JSON, bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_the_library_writes_and_the_reverse(dtype, tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "scalar": np.array(1).astype(dtype),
        "none": np.zeros((0, 4), dtype),
        "x": (10 * rng.standard_normal((3, 5))).astype(dtype),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", {"a": "b"})
    read = weights.read_tensors(tmp_path / "theirs.safetensors")
    assert_same(read.tensors, tensors)
    assert read.metadata == {"a": "b"}
    assert read.files == (tmp_path / "theirs.safetensors",)
    weights.write_safetensors(tmp_path / "ours.safetensors", read.tensors, {"c": "d"})
    assert_same(load_file(tmp_path / "ours.safetensors"), tensors)
    assert weights.read_tensors(tmp_path / "ours.safetensors").metadata == {"c": "d"}


def test_views_are_written_as_what_they_show(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    views = {"t": x.transpose(2, 0, 1), "s": x[:, ::2], "r": x[::-1]}
    path = weights.write_safetensors(tmp_path / "new" / "x.safetensors", views)
    assert_same(load_file(path), {k: np.ascontiguousarray(v) for k, v in views.items()})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0, "tensors begin on 8 bytes"
    assert list(json.loads(content[8 : 8 + length])) == ["t", "s", "r"]


def test_tensors_that_begin_anywhere(tmp_path):
    header = {"byte": entry([1], 0, 1, "U8"), "x": entry([1], 1, 5)}
    path = raw(tmp_path / "x.safetensors", header, b"\7" + struct.pack("<f", 1.5))
    assert weights.read_tensors(path).tensors["x"].tolist() == [1.5]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    weights.write_safetensors(path, TENSORS)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FaultError, match=r"x\.safetensors: No space left on device\. Free"):
        weights.write_safetensors(path, {"other": np.zeros(3, np.float32)})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert path.read_bytes() == before


def test_where_no_file_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.safetensors", tmp_path):
        with pytest.raises(UserError, match="cannot write"):
            weights.write_safetensors(path, TENSORS)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# What training scripts save.


@pytest.mark.parametrize(
    ("tree", "which", "expected"),
    [
        (TENSORS, "ema", 0),
        ({"ema": TENSORS, "model": {"a": TENSORS["a"] + 1}}, "ema", 0),
        ({"model": {"a": TENSORS["a"] + 1}, "ema": TENSORS}, "model", 1),
        ({"state_dict": TENSORS, "global_step": 3}, "ema", 0),
        ({"state_dict": {"a": TENSORS["a"] + 1}, "ema": TENSORS}, "ema", 0),
        ({"model": {"a": TENSORS["a"] + 1}, "state_dict": TENSORS}, "ema", 0),
        ({"module.a": TENSORS["a"], "module.b": TENSORS["b"]}, "ema", 0),
        ({"ema": {f"module.{k}": v for k, v in TENSORS.items()}}, "ema", 0),
    ],
)
def test_wrappers(tree, which, expected, tmp_path):
    write_torch(tmp_path / "x.pt", tree)
    read = weights.read_tensors(tmp_path / "x.pt", which)
    if expected == 0:
        assert_same(read.tensors, TENSORS)
    else:
        assert_same(read.tensors, {"a": TENSORS["a"] + 1})


def test_what_lies_beside_the_tensors_is_kept(tmp_path):
    write_torch(tmp_path / "x.pt", {"ema": TENSORS, "opt": {"lr": 1}, "args": {"model": "DiT-S/8"}})
    read = weights.read_tensors(tmp_path / "x.pt")
    assert read.extra == {"opt": {"lr": 1}, "args": {"model": "DiT-S/8"}}


def test_wrappers_of_some_modules_only(tmp_path):
    """torch.compile and DistributedDataParallel may wrap a part of a network."""
    write_torch(tmp_path / "x.pt", {"blocks._orig_mod.a": TENSORS["a"], "b": TENSORS["b"]})
    assert weights.read_tensors(tmp_path / "x.pt").tensors.keys() == {"blocks.a", "b"}
    write_torch(tmp_path / "x.pt", {"module.a": TENSORS["a"], "a": TENSORS["b"]})
    assert "holds 'a' twice, inside and outside of a wrapper" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"model": TENSORS}, "holds 'model' and no 'ema': choose with --which=model"),
        ([TENSORS["a"]], "holds a list: expected a state dict"),
        ({"epoch": 3, "name": "x"}, "its keys are 'epoch', 'name'; expected a state dict"),
        ({}, "its keys are nothing"),
        ({**TENSORS, "name": "x"}, "'name' are not tensors"),
        ({"ema": {**TENSORS, "n": None}}, "'n' are not tensors"),
    ],
)
def test_checkpoints_that_hold_no_state(tree, words, tmp_path):
    write_torch(tmp_path / "x.pt", tree)
    assert words in refusal(tmp_path / "x.pt")


# Folders.


def folder(path, *names, config="{}"):
    for name in names:
        tensors = {"name": np.frombuffer(name.encode(), np.uint8)}
        if name.endswith(".bin"):
            write_torch(path / name, tensors)
        else:
            save_file(tensors, path / name)
    if config is not None:
        (path / "config.json").write_text(config)
    return path


def test_a_folders_file_is_the_one_that_diffusers_takes(tmp_path):
    names = (
        "diffusion_pytorch_model.fp16.bin",
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.fp16.safetensors",
        FOLDER_WEIGHTS,
    )
    for name in names:  # each goes before those that are there
        read = weights.read_tensors(folder(tmp_path, name, config='{"k": [1]}'))
        assert read.tensors["name"].tobytes().decode() == name
        assert read.files == (tmp_path / name,)
        assert read.config == {"k": [1]}
        assert read.path == tmp_path


def test_shards(tmp_path):
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, tmp_path / f"part-{name}.safetensors")
    index = {"weight_map": {"a": "part-a.safetensors", "b": "part-b.safetensors"}}
    (tmp_path / f"{FOLDER_WEIGHTS}.index.json").write_text(json.dumps(index))
    read = weights.read_tensors(folder(tmp_path))
    assert_same(read.tensors, TENSORS)
    assert [path.name for path in read.files] == ["part-a.safetensors", "part-b.safetensors"]
    (tmp_path / "part-b.safetensors").unlink()
    with pytest.raises(UserError, match=r"part-b\.safetensors does not exist"):
        weights.read_tensors(tmp_path)


def test_a_shard_is_a_file_of_the_folder(tmp_path):
    """An index cannot reach out of the folder."""
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file(TENSORS, tmp_path / "outside.safetensors")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (inside / f"{FOLDER_WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"inside/outside\.safetensors does not exist"):
        weights.read_tensors(folder(inside))


@pytest.mark.parametrize("name", [".", "..", "part/", ""])
def test_a_shard_is_no_folder(name, tmp_path):
    index = {"weight_map": {"a": name}}
    (tmp_path / f"{FOLDER_WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="Is a directory"):
        weights.read_tensors(folder(tmp_path))


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_an_index_without_shards(index, tmp_path):
    (tmp_path / f"{FOLDER_WEIGHTS}.index.json").write_text(index)
    assert "has no weight_map" in refusal(folder(tmp_path))


def test_folders_that_are_none(tmp_path):
    assert "has no config.json" in refusal(tmp_path)
    assert "holds no weights: expected one of diffusion_pytorch" in refusal(folder(tmp_path))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "is not JSON"),
        (b"[1]", "holds a list"),
        (b"null", "holds a NoneType"),
    ],
)
def test_damaged_configs(config, words, tmp_path):
    folder(tmp_path, FOLDER_WEIGHTS, config=None)
    (tmp_path / "config.json").write_bytes(config)
    assert words in refusal(tmp_path)


# Damaged and hostile files.


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (b"\0" * 1024, "begins with zeros"),
        (np.random.default_rng(0).bytes(1024), "is not a file of torch.save"),
        (b"\x05", "is not a file of torch.save"),
    ],
)
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x"])
def test_files_that_are_no_weights(content, words, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert words in refusal(tmp_path / name)


def test_nothing_there(tmp_path):
    for name in ("none.pt", "x" * 300):
        assert "does not exist" in refusal(tmp_path / name)


@pytest.mark.parametrize("keep", [9, 20, -100, -1])
def test_a_file_that_was_cut(keep, tmp_path):
    path = weights.write_safetensors(tmp_path / "x.safetensors", TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    assert "is not a sound safetensors file" in refusal(path)
    write_torch(tmp_path / "x.pt", TENSORS)
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:keep])
    refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"x": entry([2], 0, 4)}, b"\0" * 4, "not a sound"),
        ({"x": entry([1], 0, 4)}, b"\0" * 8, "not a sound"),
        ({"x": entry([1], 4, 8)}, b"\0" * 8, "not a sound"),
        ({"x": entry([-1], 0, 4)}, b"\0" * 4, "not a sound"),
        ({"x": entry([1], 0, 4), "y": entry([1], 0, 4)}, b"\0" * 4, "not a sound"),
        (
            {"x": entry([4], 0, 4, "F8_E4M3")},
            b"\0" * 4,
            "'x' is of type 'F8_E4M3', expected one of",
        ),
        ({"x": entry([0, 2**63], 0, 0)}, b"", "'x' has an impossible shape"),
        ({"x": entry([1] * 99, 0, 4)}, b"\0" * 4, "'x' has an impossible shape"),
        (b'{"x": 1}', b"", "not a sound"),
        (b"{" + b'"a":' * 9, b"", "not a sound"),
    ],
)
def test_hostile_headers(header, data, words, tmp_path):
    assert words in refusal(raw(tmp_path / "x.safetensors", header, data))


@given(
    st.dictionaries(
        st.text(max_size=4),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E5M2", "X", None]),
                "shape": st.lists(st.sampled_from([0, 1, 2, 2**31, 2**63, 2**64, -1]), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 16), min_size=1, max_size=3),
            }
        ),
        max_size=3,
    ),
    st.binary(max_size=16),
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_header_is_read_or_refused(tmp_path, header, data):
    path = raw(tmp_path / "x.safetensors", header, data)
    try:
        read = weights.read_tensors(path)
    except UserError:
        return
    assert sum(tensor.nbytes for tensor in read.tensors.values()) == len(data)


@given(st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_damage_is_read_or_refused(tmp_path, data):
    path = weights.write_safetensors(tmp_path / "x.safetensors", TENSORS, {"k": "v"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        weights.read_tensors(path)


# What is told of tensors that do not fit.


EXPECTED = {"blocks.0.w": (2,), "blocks.1.w": (2,), "blocks.2.w": (2,), "out.w": (3, 1)}


def tensors_of(shapes, dtype=np.float32):
    return {name: np.zeros(shape, dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_the_one_floating_type(dtype):
    assert weights.check_tensors("p", "net", tensors_of(EXPECTED, dtype), EXPECTED) == dtype


def test_every_fault_is_told_in_one_line():
    tensors = tensors_of(EXPECTED)
    del tensors["blocks.0.w"], tensors["blocks.1.w"]
    tensors["blocks.2.w"] = np.zeros(2, np.int64)
    tensors["out.w"] = np.zeros((1, 3), np.float32)
    tensors |= {"foo.w": np.zeros(1, np.float32), "bar": np.zeros(1, np.float32)}
    with pytest.raises(UserError) as caught:
        weights.check_tensors("p.pt", "net", tensors, EXPECTED)
    assert str(caught.value) == (
        "p.pt is no net: 2 missing: blocks.{0-1}.w; 2 extra: bar, foo.w;"
        " 1 not float32: blocks.2.w; 1 mis-shaped: out.w is (1, 3), not (3, 1)."
    )


def test_the_type_that_most_have_is_the_one_expected():
    tensors = tensors_of(EXPECTED, np.float16)
    tensors["out.w"] = tensors["out.w"].astype(np.float32)
    with pytest.raises(UserError, match=r"1 not float16: out\.w\."):
        weights.check_tensors("p", "net", tensors, EXPECTED)
    with pytest.raises(UserError, match=r"4 not float32"):
        weights.check_tensors("p", "net", tensors_of(EXPECTED, np.int32), EXPECTED)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["b", "a"], ["a", "b"]),
        ([f"m.{i}.w" for i in (0, 1, 2, 4, 10)], ["m.{0-2,4,10}.w"]),
        (["m.3.w"], ["m.3.w"]),
        (["m.0.n.0.w", "m.1.n.0.w", "m.0.n.1.w"], ["m.{0-1}.n.0.w", "m.0.n.1.w"]),
        (["x10.w", "x9.w"], ["x9.w", "x10.w"]),
        ([f"m.{'9' * 5000}.w"], [f"m.{'9' * 5000}.w"]),
        (["m.².w", "m.٣.w"], ["m.².w", "m.٣.w"]),
    ],
)
def test_names_are_told_together(names, expected):
    assert weights.collapse(names) == expected


def test_sha256_is_of_the_files_in_order(tmp_path):
    paths = [tmp_path / "b", tmp_path / "a"]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * (5 << 20))
    content = b"".join(path.read_bytes() for path in paths)
    assert weights.sha256_of(paths) == hashlib.sha256(content).hexdigest()
    assert weights.sha256_of(paths[::-1]) != weights.sha256_of(paths)


def test_tensors_by_what_is_no_name(tmp_path):
    path = tmp_path / "x.pt"
    write_torch(path, {10**600: TENSORS["a"], "a": TENSORS["a"]})
    assert "000 are not tensors: expected tensors by name" in refusal(path)
    write_torch(path, {10**600: 1, "a\x1b[2J": 2})
    assert r"000, 'a\x1b[2J'; expected" in refusal(path)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_file_system_that_does_not_answer_is_no_damage(name, tmp_path, monkeypatch):
    state = {"a": np.ones(3, np.float32)}
    path = tmp_path / name
    if name == "x.pt":
        write_torch(path, state)
    else:
        save_file(state, path)
    system = Unstable(monkeypatch, name, 2)
    assert weights.read_tensors(path).tensors["a"].tolist() == [1, 1, 1]
    system.left = FOR_EVER
    with pytest.raises(FaultError, match=rf"cannot read .*{name}: Stale file handle"):
        weights.read_tensors(path)
