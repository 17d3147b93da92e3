"""Adapters at sampling: merged, taken out, and on record only where they change the network."""

from typing import Any

import jax
import numpy as np
import pytest

from ditjax.config import adapters_of, changed, read
from ditjax.errors import UserError
from ditjax.files.assets import flatten, unflatten
from ditjax.files.atomic import protocol_hash
from ditjax.runs import opening
from ditjax.sampling.draw import sampling_protocol
from ditjax.sampling.pipeline import Pipeline
from ditjax.tasks.adapters import adapters_record, with_adapters
from ditjax.weights import networks, tensors, writing
from tests.adapter_files import lora_file
from tests.seeded import seeded_state

D = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network of seeded weights, an adapter of two of its layers and one of another width."""
    root = tmp_path_factory.mktemp("adapters")
    c = read(
        {
            "model": {"size": "2x16x2", "patch": 4, "unroll": 1},
            "data": {"image_size": 8, "channels": 1, "num_classes": 10},
            "autoencoder": {"kind": "none"},
            "sample": {"cfg_channels": "all", "steps": "ddim2", "sampler": "ddim"},
        }
    )
    leaves = {"params": unflatten(seeded_state(networks.shapes_of(c), 5))}
    writing.write_ditjax(root / "base", networks.LoadedNetwork(c, leaves, "ditjax", ()))
    for name, layers, seed, width in (
        ("first", ("attn.qkv", "mlp.fc1"), 1, D),
        ("second", ("attn.qkv",), 2, D),
        ("wide", ("attn.qkv",), 3, 2 * D),
    ):
        shapes = {}
        for i in (0, 1):
            for layer in layers:
                out = {"attn.qkv": 3 * width, "mlp.fc1": 4 * width}[layer]
                shapes[f"blocks.{i}.{layer}.lora_A.weight"] = (2, width)
                shapes[f"blocks.{i}.{layer}.lora_B.weight"] = (out, 2)
        lora_file(root / name, seeded_state(shapes, seed), {"r": 2, "lora_alpha": 3})
    return root


@pytest.fixture
def pipeline(folder):
    return Pipeline.from_pretrained(folder / "base")


def leaves(pipeline):
    return flatten(jax.device_get(pipeline._params)["params"])


def delta(path, layer, block, weight):
    """w s B A of the release's names, as our kernel of a block."""
    state = tensors.read_named(path)[0]
    a, b = (state[f"blocks.{block}.{layer}.lora_{half}.weight"] for half in "AB")
    return weight * 1.5 * (b @ a).T


def protocol(c):
    return sampling_protocol(c, seed=0, labels="uniform", decoder="pixels")


def test_several_are_added_and_taken_out_to_the_bit(folder, pipeline):
    before, plain = leaves(pipeline), pipeline([1, 2], seed=3, quiet=True)
    pipeline([1, 2], seed=3, quiet=True)
    (sampler,) = pipeline._drawer._programs.values()
    program: Any = sampler.program
    size = program._cache_size()
    pipeline.load_adapter(folder / "first", 0.5)
    pipeline.load_adapter(folder / "second")
    pipeline.load_adapter(folder / "first", scale=-2)  # in the place of 0.5
    assert adapters_of(pipeline.config.sample.adapters) == (
        (str(folder / "first"), -2.0),
        (str(folder / "second"), 1.0),
    )
    after = leaves(pipeline)
    for block in (0, 1):
        both = delta(folder / "first", "attn.qkv", block, -2.0)
        both += delta(folder / "second", "attn.qkv", block, 1.0)
        for path, expected in (
            ("blocks/attn/qkv/kernel", both),
            ("blocks/mlp/in/kernel", delta(folder / "first", "mlp.fc1", block, -2.0)),
        ):
            found = (after[path] - before[path])[block].reshape(D, -1)
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {"blocks/attn/qkv/kernel", "blocks/mlp/in/kernel"}

    drawn = pipeline([1, 2], seed=3, quiet=True)
    assert (drawn.array != plain.array).any()
    first, second = drawn.record["adapters"]
    assert (first[1], second[1]) == (-2.0, 1.0)
    assert len(pipeline._drawer._programs) == 1
    assert program._cache_size() == size, "nothing is compiled anew"

    pipeline.unload_adapter(folder / "first")
    assert pipeline.config.sample.adapters == f"{folder / 'second'}:1.0"
    pipeline.unload_adapter()
    assert pipeline._params is pipeline._base
    again = pipeline([1, 2], seed=3, quiet=True)
    np.testing.assert_array_equal(again.array, plain.array)
    assert "adapters" not in again.record
    with pytest.raises(
        UserError, match=r"first is not loaded: expected one of the adapters \(none"
    ):
        pipeline.unload_adapter(folder / "first")


def test_a_scale_of_zero_is_the_base_to_the_bit(folder, pipeline):
    """Its weights, its samples' protocol and their hash."""
    c = pipeline.config
    plain = protocol(c)
    assert "adapters" not in plain
    zero = changed(c, {"sample": {"adapters": f"{folder / 'first'}:0"}})
    assert with_adapters(zero, pipeline._base, pipeline._mesh) is pipeline._base
    assert protocol_hash(protocol(zero)) == protocol_hash(plain)
    hashes = set()
    for text in (f"{folder / 'first'}", f"{folder / 'first'}:0.5", f"{folder / 'second'}"):
        used = changed(c, {"sample": {"adapters": text}})
        hashes.add(protocol_hash(protocol(used)))
        (record,) = adapters_record(used)["adapters"]
        assert record[1] == (0.5 if text.endswith("0.5") else 1.0)
    assert len(hashes) == 3
    # A file of weights names no other files.
    kept = writing.write_ditjax(folder / "kept", networks.from_run(used, pipeline._base))
    assert Pipeline.from_pretrained(kept).config.sample.adapters == ""


def test_a_refusal_leaves_the_pipeline_as_it_was(folder, pipeline):
    pipeline.load_adapter(folder / "first")
    text, digest = pipeline.config.sample.adapters, opening.digest(pipeline._params)
    for path, scale, words in (
        (folder / "wide", 1.0, "blocks/attn/qkv of block 0 maps 32 values to 32, and .* 16 to 16"),
        (folder / "wide", 0.0, "is an adapter of another network"),
        (folder / "none", 1.0, "none does not exist"),
        (folder / "base", 1.0, "is no adapter of a DiT"),
        (folder / "second", float("nan"), "expected PATH or PATH:SCALE, a finite scale"),
        (folder / "second", float("inf"), "expected PATH or PATH:SCALE, a finite scale"),
        ("", 1.0, "expected PATH or PATH:SCALE"),
    ):
        with pytest.raises(UserError, match=words):
            pipeline.load_adapter(path, scale)
        assert pipeline.config.sample.adapters == text
        assert opening.digest(pipeline._params) == digest


def test_an_adapter_is_read_again_when_it_is_loaded_again(folder, tmp_path, pipeline):
    for name in ("first", "second"):
        (tmp_path / "x").write_bytes((folder / name).read_bytes())
        pipeline.load_adapter(tmp_path / "x")
        found = adapters_record(pipeline.config)
        pipeline.load_adapter(folder / name)
        assert adapters_record(pipeline.config)["adapters"][1] == found["adapters"][0]
        pipeline.unload_adapter()


def test_paths_and_scales():
    assert adapters_of("") == ()
    assert adapters_of("a,b/c:0.5,d:e,./f:-1e-3,g:1:2") == (
        ("a", 1.0),
        ("b/c", 0.5),
        ("d:e", 1.0),
        ("./f", -1e-3),
        ("g:1", 2.0),
    )
    for text in ("a:nan", "a:-inf", ":2", "a," + "x" * 300):
        with pytest.raises(
            UserError, match=r"config\.sample\.adapters has .*: expected PATH or PATH"
        ):
            read({"sample": {"adapters": text}})
    with pytest.raises(UserError, match=r"config\.sample\.adapters is 3, of type int"):
        read({"sample": {"adapters": 3}})
