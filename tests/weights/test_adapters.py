"""Adapters of other programs: what is read is what they compute, and there and back to the bit."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ditjax.errors import UserError
from ditjax.files.assets import flatten, unflatten
from ditjax.models.network import Conditions
from ditjax.tasks.diffusion import denoiser_module
from ditjax.training.transforms import merged_factors
from ditjax.weights import reading
from ditjax.weights.adapters import (
    ModuleNames,
    Product,
    check_fits,
    factors_of,
    from_factors,
    read_adapter,
    write_lora_file,
    write_peft,
)
from ditjax.weights.torch_file import write_torch
from tests.adapter_files import (
    DIFFUSERS,
    GAIN,
    PREFIX,
    RELEASE,
    config,
    factor_gradients,
    factors,
    lora_file,
    merged,
    peft_folder,
)
from tests.seeded import seeded_state
from tests.weight_files import (
    assert_same,
    diffusers_folder,
    diffusers_state,
    golden,
    release_state,
    write_folder,
)

MANUAL = Path(__file__).parent.parent.parent / "docs" / "weights.md"
SCALE = 3.0  # of `config`: 6 / 2


def diffusers(folder, state):
    return reading.load_network(write_folder(folder, state, golden("dit_config")))


def release(folder, state):
    folder.mkdir()
    write_torch(folder / "dit.pt", state)
    return reading.load_network(folder / "dit.pt", heads=3)


# As in docs/weights.md: what is written, the names of its modules, its scale.
ROWS = {
    "`adapter_model.safetensors` with `adapter_config.json`": (
        lambda path, state: peft_folder(path, state, config()),
        DIFFUSERS,
        SCALE,
    ),
    "the same, named as in the release": (
        lambda path, state: peft_folder(path, state, config()),
        RELEASE,
        SCALE,
    ),
    "`pytorch_lora_weights.safetensors` with `lora_adapter_metadata`": (
        lambda path, state: lora_file(path, state, config()),
        DIFFUSERS,
        SCALE,
    ),
    "the same with `transformer.` before each name": (
        lambda path, state: lora_file(path, state, config(), "transformer."),
        DIFFUSERS,
        SCALE,
    ),
    "either without `lora_adapter_metadata`": (
        lambda path, state: lora_file(path, state, None, "transformer."),
        DIFFUSERS,
        1.0,
    ),
}


def test_each_row_of_the_manual_is_read():
    table = MANUAL.read_text().partition("| adapter |")[2].partition("\n\n")[0]
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == list(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_the_merged_network_is_that_of_the_other_program(row, tmp_path):
    """W + s B A in its own names, read as a network, is ours of the adapter and the base."""
    write, names, scale = ROWS[row]
    state = diffusers_state("dit") if names is DIFFUSERS else release_state()
    load, changed = (diffusers if names is DIFFUSERS else release), factors(names)
    base = load(tmp_path / "base", state)
    expected = load(tmp_path / "merged", merged(state, changed, scale)).leaves
    adapter = read_adapter(write(tmp_path / "adapter", changed))
    assert ("states no alpha" in "".join(adapter.notes)) == (scale == 1)
    check_fits(adapter, base.shapes, "blocks")
    tree = unflatten(factors_of([(adapter, 1.0)], base.shapes, "blocks"))
    found = flatten(merged_factors(base.params["params"], tree))
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=2e-6 * np.abs(leaf).max())
        same = np.array_equal(leaf, base.leaves[path])
        assert same != (
            path.endswith("kernel") and ("blocks" in path or path == "final_layer/linear/kernel")
        )


def test_three_projections_and_one_there_and_back(tmp_path):
    """Split, fused and split again; fused, split and fused again: every tensor to the bit."""
    split, fused = factors(DIFFUSERS), factors(RELEASE, rank=3)
    ways: tuple[tuple[dict[str, np.ndarray], ModuleNames, ModuleNames], ...]
    ways = (split, "release", "diffusers"), (fused, "diffusers", "release")
    for state, there, back in ways:
        rank = len(next(iter(state.values())))
        first = read_adapter(peft_folder(tmp_path / f"{back}_a", state, config(rank, 5)))
        second = read_adapter(write_peft(tmp_path / f"{back}_b", first, there))
        assert second.layout == there
        third = write_peft(tmp_path / f"{back}_c", second, back)
        assert_same(
            load_file(third / "adapter_model.safetensors"),
            {f"{PREFIX}{name}": x for name, x in state.items()},
        )
        stated = json.loads((third / "adapter_config.json").read_text())
        assert (stated["r"], stated["lora_alpha"]) == (rank, 5)
        assert read_adapter(third).sha256 == second.sha256 == first.sha256
    # A of three ranks, and B with its blocks on the diagonal.
    whole = load_file(tmp_path / "diffusers_b" / "adapter_model.safetensors")
    assert whole[f"{PREFIX}blocks.1.attn.qkv.lora_A.weight"].shape == (6, 48)
    assert np.count_nonzero(whole[f"{PREFIX}blocks.1.attn.qkv.lora_B.weight"]) == 144 * 2
    stated = json.loads((tmp_path / "diffusers_b" / "adapter_config.json").read_text())
    assert stated["rank_pattern"] == {f"blocks.{i}.attn.qkv": 6 for i in (0, 1)}
    assert stated["alpha_pattern"] == {f"blocks.{i}.attn.qkv": 15 for i in (0, 1)}


def test_one_file_of_diffusers_is_written_as_it_is_read(tmp_path):
    first = read_adapter(peft_folder(tmp_path / "a", factors(DIFFUSERS), config()))
    path = write_lora_file(tmp_path / "pytorch_lora_weights.safetensors", first)
    second = read_adapter(path)
    assert not any("no alpha" in note for note in second.notes)
    assert {module.scale for module in second.modules.values()} == {1.0}, "whoever reads alpha"
    shapes = reading.load_network(diffusers_folder(tmp_path / "b", "dit")).shapes
    ours, again = (factors_of([(x, 1.0)], shapes, "blocks") for x in (first, second))
    assert_same(again, ours)
    assert read_adapter(tmp_path).sha256 == second.sha256, "a folder that holds it"


def test_a_part_of_q_k_and_v(tmp_path):
    """The release's one module has zeros for the others, and they are none when it is read."""
    state = {n: x for n, x in factors(DIFFUSERS).items() if ".1.attn1.to_v" in n}
    first = read_adapter(lora_file(tmp_path / "a", state, None))
    second = read_adapter(write_peft(tmp_path / "b", first, "release"))
    places = [Product("blocks/attn/qkv", 1, k) for k in range(3)]
    assert [*first.modules] == places[2:]
    for place in places[:2]:
        assert not second.modules[place].b.any()
    np.testing.assert_array_equal(second.modules[places[2]].b, first.modules[places[2]].b)


def test_ranks_and_alphas_by_module(tmp_path):
    state = factors(DIFFUSERS, rank=4)
    narrow = {n: x for n, x in factors(DIFFUSERS, rank=2).items() if ".0.attn1.to_q" in n}
    patterns = {
        "rank_pattern": {"^transformer_blocks.0.attn1.to_q": 2},
        "alpha_pattern": {"ff.net.2": 12},
    }
    path = peft_folder(tmp_path / "a", state | narrow, config(4, 8, **patterns))
    found = {place: (m.rank, m.scale) for place, m in read_adapter(path).modules.items()}
    assert found[Product("blocks/attn/qkv", 0, 0)] == (2, 4.0)
    assert found[Product("blocks/attn/qkv", 1, 0)] == (4, 2.0)
    assert found[Product("blocks/mlp/out", 1, 0)] == (4, 3.0)
    again = read_adapter(write_peft(tmp_path / "b", read_adapter(path)))
    assert {place: (m.rank, m.scale) for place, m in again.modules.items()} == found
    path = peft_folder(tmp_path / "c", state, config(4, 8, use_rslora=True))
    assert {m.scale for m in read_adapter(path).modules.values()} == {4.0}  # 8 / √4


def test_factors_of_a_run_there_and_back(tmp_path):
    rng = np.random.default_rng(0)
    flat = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in {
            "blocks/attn/qkv/a": (2, 3, 48, 4),
            "blocks/attn/qkv/b": (2, 3, 4, 3, 16),
            "blocks/adaln/linear/a": (2, 1, 48, 4),
            "blocks/adaln/linear/b": (2, 1, 4, 6, 48),
            "t_embedder/in/a": (1, 256, 4),
            "t_embedder/in/b": (1, 4, 48),
        }.items()
    }
    shapes = {
        "blocks/attn/qkv/kernel": (2, 48, 3, 3, 16),
        "blocks/adaln/linear/kernel": (2, 48, 6, 48),
        "t_embedder/in/kernel": (256, 48),
    }
    first = from_factors("run", unflatten(flat), 16 / 3, "blocks", "")
    again = read_adapter(write_peft(tmp_path, first, "release"))
    assert again.sha256 == first.sha256
    for adapter in (first, again):
        found = factors_of([(adapter, 0.5)], shapes, "blocks")
        for name, x in flat.items():
            scale = np.float32(0.5 * 16 / 3) if name.endswith("/b") else np.float32(1)
            np.testing.assert_array_equal(found[name], x * scale)
    with pytest.raises(UserError, match="run adapts t_embedder/in, which the DiT of diffusers"):
        write_peft(tmp_path, first)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_types_are_computed_with_as_float32(dtype, tmp_path):
    state = {name: x.astype(dtype) for name, x in factors(RELEASE).items()}
    adapter = read_adapter(lora_file(tmp_path / "a", state, None))
    assert adapter.dtype == dtype
    shapes = {path: x.shape for path, x in release(tmp_path / "b", release_state()).leaves.items()}
    found = factors_of([(adapter, 1.0)], shapes, "blocks")
    assert {x.dtype for x in found.values()} == {np.dtype(np.float32)}
    expected = state["blocks.1.attn.proj.lora_A.weight"].astype(np.float32).T
    np.testing.assert_array_equal(found["blocks/attn/out/a"][1, 0], expected)


# What a file says -> the words of its refusal.
REFUSED = {
    "use_dora": (config(use_dora=True), "config.json states use_dora=True: only plain LoRA"),
    "lora_bias": (config(lora_bias=True, bias="all"), "states bias='all', lora_bias=True"),
    "modules_to_save": (config(modules_to_save=["x"]), r"modules_to_save=\['x'\]"),
    "an unknown key": (config(use_new_trick={"a": 1}), "use_new_trick="),
    "IA3": (config(peft_type="IA3"), "peft_type='IA3'"),
    "pissa": (config(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "another rank": (config(4), r"attn1.to_k has A \(2, 48\) and B \(48, 2\), not of rank 4"),
    "no rank": ({"lora_alpha": 1}, "r is None: expected"),
    "a huge rank": (config(2**40), "r is 1099511627776: expected"),
    "no alpha": ({"r": 2}, "lora_alpha is None: expected a finite number"),
    "an infinite alpha": (config(alpha=float("inf")), "lora_alpha is inf"),
    "a rank that is true": (config(True), "r is True"),
    "a pattern": (config(rank_pattern={"(a+)+": 2}), r"rank_pattern has '\(a\+\)\+': expected"),
    "a pattern's rank": (config(rank_pattern={"to_q": 0}), "rank_pattern of 'to_q' is 0"),
    "patterns in a list": (config(alpha_pattern=["x"]), r"alpha_pattern is \['x'\]: expected an"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_plain_lora_is_named(what, tmp_path):
    stated, words = REFUSED[what]
    with pytest.raises(UserError, match=words) as error:
        read_adapter(peft_folder(tmp_path, factors(DIFFUSERS), stated))
    assert "\n" not in str(error.value)


T = "transformer_blocks.{}."
UNKNOWN: dict[str, dict[str, np.ndarray]] = {
    "copies of an embedder": {
        T.format(i) + f"norm1.emb.timestep_embedder.linear_1.lora_{h}.weight": np.ones((2, 2), "f4")
        for i in (0, 1)
        for h in "AB"
    },
    "a magnitude": {T.format(0) + "attn1.to_q.lora_magnitude_vector.weight": np.ones(3, "f4")},
    "a bias": {T.format(0) + "attn1.to_q.lora_B.bias": np.ones(3, "f4")},
    "half a pair": {"proj_out_1.lora_A.weight": np.ones((2, 48), "f4")},
    "integers": {"proj_out_1.lora_A.weight": np.ones((2, 48), "i4")},
    "the other names": {"blocks.0.attn.proj.lora_A.weight": np.ones((2, 48), "f4")},
    "an older format": {T.format(0) + "attn1.to_q.lora.down.weight": np.ones((2, 48), "f4")},
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_tensors_of_no_linear_layer_are_named(what, tmp_path):
    name = next(iter(UNKNOWN[what])).replace(
        ".0.", ".{0-1}." if what.startswith("copies") else ".0."
    )
    with pytest.raises(UserError) as error:
        read_adapter(lora_file(tmp_path / "x", factors(DIFFUSERS) | UNKNOWN[what], None))
    assert f"is no adapter of a DiT: {name}" in str(error.value)


def test_files_that_hold_no_adapter(tmp_path):
    def refused(words, path=tmp_path):
        with pytest.raises(UserError, match=words) as error:
            read_adapter(path)
        assert "\n" not in str(error.value)

    refused("does not exist", tmp_path / "none")
    refused("holds no adapter: expected adapter_model.safetensors .* it holds nothing")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 40)
    refused("holds no adapter: .* it holds adapter_model.safetensors", tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    refused("is not a file of torch.save")
    save_file({}, tmp_path / "adapter_model.safetensors")
    refused("it holds no tensors")
    (tmp_path / "adapter_config.json").write_text("[]")
    save_file(factors(DIFFUSERS), tmp_path / "adapter_model.safetensors")
    refused("adapter_config.json holds a list, expected an object")
    lora_file(tmp_path / "x", factors(DIFFUSERS), None)
    whole = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(whole[:-1])
    refused("is not a sound safetensors file", tmp_path / "x")
    save_file(factors(DIFFUSERS), tmp_path / "x", {"lora_adapter_metadata": "[" * 10**5})
    refused("lora_adapter_metadata in its metadata is not a JSON object", tmp_path / "x")
    write_torch(tmp_path / "x.pt", factors(DIFFUSERS))
    refused("is a file of PyTorch: expected a safetensors file", tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            {"proj_out_1": (96, 32)},
            "layer/adaln/linear of block 0 maps 32 values to 96, .* 48 to 96",
        ),
        ({"blocks.7.mlp.fc1": (192, 48)}, "mlp/in of block 7 maps .* network's 2 map 48 to 192"),
        ({"blocks.999999.mlp.fc1": (192, 48)}, "of block 999999"),
        ({"blocks.0.attn.qkv": (96, 48)}, "maps 48 values to 32, and the network's 2 map 48 to 48"),
    ],
)
def test_an_adapter_of_another_network(state, words, tmp_path):
    tensors = {}
    for name, (out, into) in state.items():
        tensors[f"{name}.lora_A.weight"] = np.ones((2, into), np.float32)
        tensors[f"{name}.lora_B.weight"] = np.ones((out, 2), np.float32)
    adapter = read_adapter(lora_file(tmp_path / "x", tensors, None))
    shapes = release(tmp_path / "b", release_state()).shapes
    with pytest.raises(UserError, match=f"is an adapter of another network: .*{words}"):
        check_fits(adapter, shapes, "blocks")
    with pytest.raises(UserError, match="of another network: it has no"):
        check_fits(adapter, {}, "blocks")


GOLDEN = Path(__file__).parent.parent / "goldens" / "adapters.npz"


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDEN) as file:
        return {name: json.loads(str(x)) if x.dtype.kind == "U" else x for name, x in file.items()}


@pytest.fixture(scope="module")
def of_peft(goldens, tmp_path_factory):
    """The folder that peft wrote, its values made again; and the network it adapts."""
    root = tmp_path_factory.mktemp("golden")
    shapes = {name.removeprefix(PREFIX): tuple(x) for name, x in goldens["shapes"].items()}
    state = seeded_state(shapes, 7, GAIN)
    folder = peft_folder(root / "adapter", state, goldens["config"])
    return folder, reading.load_network(diffusers_folder(root / "base", "dit"))


def test_what_peft_computes(goldens, of_peft):
    """Its outputs, factored and merged, and its gradients of every A and B."""
    folder, base = of_peft
    adapter = read_adapter(folder)
    factors = unflatten(factors_of([(adapter, 1.0)], base.shapes, "blocks"))
    x, t, y = (golden(f"dit_{name}") for name in "xty")
    model, labels = denoiser_module(base.config), Conditions(label=y)
    x = jnp.asarray(x.transpose(0, 2, 3, 1))

    @jax.jit
    def apply(params):
        return model.apply(params, x, t, labels)

    expected = goldens["output"].transpose(0, 2, 3, 1)
    merged = {"params": merged_factors(base.params["params"], factors)}
    for params in ({**base.params, "lora": factors}, merged):
        assert np.abs(apply(params) - expected).max() < 2e-5 * np.abs(expected).max()
    assert np.abs(apply(base.params) - expected).max() > 0.05 * np.abs(expected).max()

    gradient = jax.jit(jax.grad(lambda f: (apply({**base.params, "lora": f}) ** 2).mean()))(factors)
    found = factor_gradients(adapter, gradient)
    theirs = {name.removeprefix("gradient "): x for name, x in goldens.items() if " " in name}
    assert found.keys() == theirs.keys()
    for name, x in theirs.items():
        assert np.abs(found[name] - x).max() < 1e-4 * np.abs(x).max(), name


def test_what_peft_and_diffusers_write_is_read_and_written(goldens, of_peft, tmp_path):
    folder, _ = of_peft
    adapter = read_adapter(folder)
    written = write_peft(tmp_path / "a", adapter)
    state = load_file(folder / "adapter_model.safetensors")
    assert_same(load_file(written / "adapter_model.safetensors"), state)
    theirs, ours = goldens["config"], json.loads((written / "adapter_config.json").read_text())
    differ = {key for key, value in ours.items() if theirs[key] != value}
    # Patterns and targets name each module in full; the others say how it was made.
    assert differ <= {
        *("alpha_pattern", "rank_pattern", "target_modules"),
        *("base_model_name_or_path", "init_lora_weights"),
    }
    # Bare names beside a configuration in the metadata.
    named = {name.removeprefix(PREFIX): x for name, x in state.items()}
    save_file(named, tmp_path / "b", goldens["metadata"])
    assert read_adapter(tmp_path / "b").sha256 == adapter.sha256


def test_what_an_adapter_would_change_without_a_word(tmp_path):
    """NaN, a scale beyond float32, modules that are listed and missing, and alpha 0."""
    state = factors(DIFFUSERS)
    bad = {**state, "proj_out_2.lora_B.weight": np.full((128, 2), np.nan, "f4")}
    with pytest.raises(UserError, match="proj_out_2 has values that are not finite"):
        read_adapter(peft_folder(tmp_path / "nan", bad, config()))
    listed = config(alpha=0, target_modules=["to_q", "proj_out_2", "proj_out_1"])
    found = read_adapter(peft_folder(tmp_path / "some", state, listed))
    assert found.notes[1].endswith("config.json lists proj_out_1, of which there are no tensors")
    assert found.notes[2].endswith("15 of 15 products have alpha 0 and change nothing")
    whole = read_adapter(
        peft_folder(tmp_path / "whole", state, config(target_modules="all-linear"))
    )
    assert len(whole.notes) == 1
    shapes = {"blocks/attn/out/kernel": (2, 3, 16, 48)}
    one = whole._replace(modules={p: m for p, m in whole.modules.items() if "attn/out" in p.layer})
    with pytest.raises(UserError, match=r"the scale 1e\+39 are beyond float32: expected a smaller"):
        factors_of([(one, 1e39)], shapes, "blocks")
