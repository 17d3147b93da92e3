"""The wrappers in which networks are found: each row of docs/weights.md, and neighbours."""

import collections
import datetime
import enum
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ditjax.errors import UserError
from ditjax.weights import reading
from ditjax.weights import tensors as weights
from ditjax.weights.states import unwrapped
from ditjax.weights.torch_file import read_torch, write_torch
from tests.weight_files import (
    assert_same,
    diffusers_state,
    foreign,
    golden,
    release_state,
    save_as_torch,
)

MANUAL = Path(__file__).parent.parent.parent / "docs" / "weights.md"
SMALL = {"depth": 1, "width": 16, "patch": 2, "side": 4}
GOOD = release_state(**SMALL)
RAW = {name: x if name == "pos_embed" else x + 1 for name, x in GOOD.items()}
NAMES = len(GOOD)
STEP = np.array(400_000, np.int64)
MOMENTS = {"state": {0: {"exp_avg": np.zeros(3, np.float32), "step": np.zeros((), np.float32)}}}


def under(prefix, state):
    return {prefix + name: x for name, x in state.items()}


def within(state, word):
    """As torch.compile of each block leaves it."""
    return {re.sub(r"^(blocks\.\d+)", rf"\1.{word}", name): x for name, x in state.items()}


def lit_ema(state):
    return {f"model_ema.{name.replace('.', '')}": x for name, x in state.items()}


# As in docs/weights.md: a checkpoint, by the words of its row.
ROWS = {
    "a state dict": GOOD,
    "`ema` and `model`": {"model": RAW, "ema": GOOD, "opt": MOMENTS, "args": {"lr": 1}},
    "`ema_state_dict`, `model_ema`, ...": {"net_state_dict": RAW, "ema_state_dict": GOOD},
    "`state_dict` (Lightning)": {"state_dict": under("net.", GOOD), "epoch": 3, "callbacks": {}},
    "`module` (DeepSpeed)": {"module": GOOD, "optimizer": MOMENTS, "ds_version": "0.15"},
    "`ema_model.` and `online_model.`": {
        **under("ema_model.", GOOD),
        **under("online_model.", RAW),
        "initted": np.array(True),
        "step": STEP,
    },
    "`module.`, `_orig_mod.`": {"ema": under("module._orig_mod.module.", GOOD)},
    "wrapped blocks": {"ema": within(GOOD, "_checkpoint_wrapped_module._orig_mod")},
    "counters": {"ema": {**under("module.", GOOD), "n_averaged": STEP, "decay": STEP}, "epoch": 3},
    "loose tensors": {"model": RAW, "ema": GOOD, "train_steps": STEP, "mean": np.zeros(4, "f4")},
    "arguments beside the tensors": {**GOOD, "args": {"num_classes": 10}, "step": 7},
}


def manual_rows():
    """The first cells of the table of wrappers."""
    table = MANUAL.read_text().partition("| wrapper |")[2].partition("\n\n")[0]
    return [line.split("|")[1].strip() for line in table.splitlines()[2:]]


def test_each_row_of_the_manual_is_read():
    assert manual_rows() == list(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_wrappers(row, tmp_path):
    write_torch(tmp_path / "x.pt", ROWS[row])
    network = reading.load_network(tmp_path / "x.pt", heads=2)
    np.testing.assert_array_equal(network.leaves["x_embedder/bias"], GOOD["x_embedder.proj.bias"])
    # Each tensor of the file is taken or left out, and counted.
    taken, left = account(network.notes[0])
    assert taken == NAMES
    assert taken + left == count_arrays(ROWS[row])


def count_arrays(tree):
    if isinstance(tree, dict):
        return sum(map(count_arrays, tree.values()))
    return int(isinstance(tree, np.ndarray))


def account(note):
    """(taken, left out) of the line that a reader prints."""
    match = re.search(
        r": (\d+) tensors(?: of '[^']*')? taken(?:; (\d+) left out: |, none left)", note
    )
    assert match, note
    return int(match[1]), int(match[2] or 0)


FLAT = {
    "plain": GOOD,
    "DDP": under("module.", GOOD),
    "compiled": under("_orig_mod.", GOOD),
    "both": under("_orig_mod.module._orig_mod.", GOOD),
    "a prefix": under("net.dit.", GOOD),
    "a prefix of raw weights": under("model.", GOOD),
    "with a counter": {**under("module.", GOOD), "n_averaged": STEP},
    "both states": {**under("ema.", GOOD), **under("model.", RAW)},
    "an average beside": {**RAW, **under("ema_model.module.", GOOD)},
}


@pytest.mark.parametrize("name", FLAT)
def test_the_same_rule_for_safetensors(name, tmp_path):
    save_file(FLAT[name], tmp_path / "x.safetensors")
    write_torch(tmp_path / "x.pt", FLAT[name])
    for file in ("x.safetensors", "x.pt"):
        network = reading.load_network(tmp_path / file, heads=2)
        bias = network.leaves["x_embedder/bias"]
        np.testing.assert_array_equal(bias, GOOD["x_embedder.proj.bias"])
        assert sum(account(network.notes[0])) == len(FLAT[name])


def test_the_same_rule_for_folders_and_autoencoders(tmp_path):
    state = {f"module._orig_mod.{k}": v for k, v in diffusers_state("autoencoder").items()}
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(golden("autoencoder_config")))
    network = reading.load_network(tmp_path)
    assert network.decodes
    assert account(network.notes[0]) == (len(state), 0)


@pytest.mark.parametrize(
    ("tree", "which", "good"),
    [
        ({"model": RAW, "ema": GOOD}, "model", False),
        ({"net": RAW, "ema": GOOD}, "net", False),
        ({"a": {"b": {"c": GOOD}}, "ema": RAW}, "a.b.c", True),
        ({"a": {"b": {"c": GOOD}}, "ema": RAW}, "b.c", True),
        ({"a": {"module": {"b": under("_orig_mod.", GOOD)}}, "ema": RAW}, "a.module.b", True),
        ({"models": [RAW, GOOD]}, "models.1", True),
        ({"state_dict": {**under("net.", RAW), **under("ema.", GOOD)}}, "state_dict.ema", True),
        ({"state_dict": {**under("net.", RAW), **under("ema.", GOOD)}}, "ema", True),
        ({"state_dict": {**under("net.", GOOD), **under("ema.", RAW)}}, "model", True),
        ({"state_dict": under("model.", GOOD), "epoch": 3}, "ema", True),
        ({"checkpoint": {"model": RAW, "ema": GOOD}}, "ema", True),
        ({"ema": {"model": GOOD}, "model": RAW}, "ema", True),
        ({"ema": {**under("ema_model.", GOOD), **under("online_model.", RAW)}}, "ema", True),
        ({"ema": {**under("ema_model.", RAW), **under("online_model.", GOOD)}}, "model", True),
    ],
    ids=range(14),
)
def test_any_key_is_chosen(tree, which, good, tmp_path):
    write_torch(tmp_path / "x.pt", tree)
    network = reading.load_network(tmp_path / "x.pt", heads=2, which=which)
    expected = (GOOD if good else RAW)["x_embedder.proj.bias"]
    np.testing.assert_array_equal(network.leaves["x_embedder/bias"], expected)


@pytest.mark.parametrize(
    ("tree", "which", "words"),
    [
        ({"model": RAW}, "ema", "holds 'model' and no 'ema': choose with --which=model"),
        ({"ema": GOOD}, "model", "holds 'ema' and no 'model': choose with --which=ema"),
        ({"ema": GOOD, "opt": MOMENTS}, "a.b", "holds 'ema', 'opt.state.0' and no 'a.b': choose"),
        ({"ema_a": GOOD, "ema_b": RAW}, "ema", "'ema_a', 'ema_b', and 'ema' may be any of them"),
        ({"g": GOOD, "d": RAW}, "ema", "holds 'g', 'd', and 'ema' may be any of them"),
        ({"ema": {**GOOD, "x": None}}, "ema", "'x' are not tensors"),
        ({**GOOD, **under("module.", GOOD)}, "ema", "twice, inside and outside of a wrapper"),
        ({"ema": {"shadow_params": list(GOOD.values())}}, "ema", "holds no tensors by name"),
        (
            {"net": RAW, "ema": {"shadow_params": list(GOOD.values())}},
            "ema",
            "holds an average in 'ema' without the names of its tensors",
        ),
        (  # latent diffusion's LitEma
            {"state_dict": under("net.", RAW) | lit_ema(GOOD)},
            "ema",
            "an average in 'model_ema' without the names of its tensors, which is not read: choose"
            " the raw weights with --which=model",
        ),
    ],
    ids=range(10),
)
def test_what_cannot_be_chosen(tree, which, words, tmp_path):
    write_torch(tmp_path / "x.pt", tree)
    with pytest.raises(UserError, match=re.escape(words)):
        reading.load_network(tmp_path / "x.pt", heads=2, which=which)


@pytest.mark.parametrize(
    ("tree", "which"),
    [
        ({"checkpoint": {"ema": GOOD, "args": {"path_type": "linear"}}}, "ema"),
        ({"a": {"b": GOOD}, "args": {"path_type": "linear", "mean": np.zeros(3, "f4")}}, "a.b"),
        ({**GOOD, "args": {"transport": {"path_type": "linear"}}}, "ema"),
        ({"ema": GOOD, "opt": {"param_groups": []}, "x": {"y": {"path_type": "linear"}}}, "ema"),
    ],
    ids=range(4),
)
def test_arguments_anywhere_beside_the_networks_are_read(tree, which, tmp_path):
    write_torch(tmp_path / "x.pt", tree)
    with pytest.raises(UserError, match="its arguments say path_type 'linear'"):
        reading.load_network(tmp_path / "x.pt", heads=2, which=which)


def test_the_network_that_is_wanted_of_a_whole_checkpoint(tmp_path):
    """Latent diffusion saves the DiT and its autoencoder in one state dict."""
    vae = diffusers_state("autoencoder")
    state = under("model.diffusion_model.", GOOD) | under("first_stage_model.", vae)
    state |= {"betas": np.zeros(1000, np.float32), "logvar": np.zeros(1000, np.float32)}
    write_torch(tmp_path / "x.ckpt", {"state_dict": state, "norm_num_groups": 8})
    dit = reading.load_network(tmp_path / "x.ckpt", heads=2, wanted="dit")
    assert account(dit.notes[0]) == (NAMES, len(vae) + 2)
    assert f"{len(vae)} of 'first_stage_model'" in dit.notes[0]
    assert "'betas', 'logvar'" in dit.notes[0]
    autoencoder = reading.load_autoencoder(tmp_path / "x.ckpt")
    assert autoencoder.decodes
    with pytest.raises(UserError, match="may be any of them: choose with --which="):
        reading.load_network(tmp_path / "x.ckpt", heads=2)


# What inference does not use.


def test_tensors_are_left_out_by_name(tmp_path):
    projectors = {f"projectors.0.{i}.weight": np.zeros((2, 2), np.float32) for i in (0, 2)}
    write_torch(tmp_path / "x.pt", {**GOOD, **projectors, "logit_scale": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match="--leave_out=logit_scale,projectors leaves them out"):
        reading.load_network(tmp_path / "x.pt", heads=2)
    for names in (["projectors", "logit_scale"], ["projectors.*", "logit_*"]):
        network = reading.load_network(tmp_path / "x.pt", heads=2, leave_out=names)
        assert account(network.notes[0]) == (NAMES, 3)
        for name in (*projectors, "logit_scale"):
            assert name in network.notes[0]
    with pytest.raises(UserError, match="has no tensor 'projector' to leave out"):
        reading.load_network(tmp_path / "x.pt", heads=2, leave_out=["projector"])
    every = ["projectors", "logit_scale", "blocks.0.mlp.fc2"]
    with pytest.raises(UserError, match=r"2 missing: blocks\.0\.mlp\.fc2"):
        reading.load_network(tmp_path / "x.pt", heads=2, leave_out=every)


def test_the_names_to_leave_out_hold_nothing_that_is_used(tmp_path):
    norms = {f"blocks.{i}.attn.bias_norm.weight": np.ones(8, np.float32) for i in range(2)}
    state = release_state(**{**SMALL, "depth": 2})
    write_torch(tmp_path / "x.pt", {**state, **norms})
    with pytest.raises(UserError, match=re.escape("--leave_out=blocks.*.attn.bias_norm leaves")):
        reading.load_network(tmp_path / "x.pt", heads=2)
    network = reading.load_network(
        tmp_path / "x.pt", heads=2, leave_out=["blocks.*.attn.bias_norm"]
    )
    assert "left out: blocks.{0-1}.attn.bias_norm.weight" in network.notes[0]


# Objects of unknown classes.


@pytest.fixture
def modules():
    """Modules that a test makes are forgotten after it."""
    held = dict(sys.modules)
    yield
    for name in sys.modules.keys() - held.keys():
        del sys.modules[name]


def made(name, base=object, *arguments, **attributes):
    value = foreign(name, base)(*arguments)
    vars(value).update(attributes)
    return value


def objects():
    """What scripts leave beside the weights."""
    Colour = enum.Enum("Colour", {"RED": 1}, module="lightning_fork.colours")
    foreign("lightning_fork.colours.X")
    vars(sys.modules["lightning_fork.colours"])["Colour"] = Colour
    return {
        "a config": made("ml_fork.config.Config", lr=1.0, nested=made("ml_fork.config.Sub", n=3)),
        "a dict": made("easy_fork.EasyDict", dict, {"a": 1}),
        "a list": made("list_fork.Items", list, [1, 2]),
        "a set": made("set_fork.Bag", set, {1, 2}),
        "an enumeration": [Colour.RED, {Colour.RED: 1}],
        "a date": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        "a duration": datetime.timedelta(seconds=3),
        "a class": foreign("class_fork.models.DiT"),
        "a queue": collections.deque([1, 2], 5),
        "tensors in it": made("hook_fork.Hook", weight=np.zeros(3, np.float32)),
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", objects())
def test_unknown_objects_that_are_not_used_are_held(name, protocol, tmp_path, modules):
    tree = {"ema": collections.OrderedDict(GOOD), "args": {"x": objects()[name]}}
    path = save_as_torch(tmp_path / "x.pt", tree, protocol)
    network = reading.load_network(path, heads=2)
    assert account(network.notes[0]) == (NAMES, int(name == "tensors in it"))
    with pytest.raises(UserError, match=r"asks for '.*', which is not plain data and was not run"):
        read_torch(save_as_torch(tmp_path / "y.pt", made("whole_fork.Model", n=1), protocol))


@pytest.mark.parametrize("protocol", [2, 4])
def test_unknown_objects_among_the_weights_are_refused(protocol, tmp_path, modules):
    quantized = made("quant_fork.QTensor", data=np.zeros(3, np.float32))
    tree = {"ema": {**GOOD, "blocks.0.attn.qkv.scale": quantized}}
    path = save_as_torch(tmp_path / "x.pt", tree, protocol)
    with pytest.raises(UserError, match=r"scale' \(quant_fork\.QTensor\) are not tensors"):
        reading.load_network(path, heads=2)


def test_arguments_in_objects_are_read(tmp_path, modules):
    """A dataclass of arguments, and a config that refers to its parents as OmegaConf's do."""
    path = tmp_path / "x.pt"
    plain = made("flow_fork.Args", path_type="linear", prediction="velocity")
    save_as_torch(path, {"ema": GOOD, "args": plain})
    with pytest.raises(UserError, match="say path_type 'linear', prediction 'velocity'"):
        reading.load_network(path, heads=2)
    config = made("omega_fork.DictConfig")
    node = made("omega_fork.AnyNode", _val=11, _parent=config)
    vars(config).update(_content={"num_classes": node}, _parent=None)
    save_as_torch(path, {"ema": GOOD, "config": config})
    assert reading.load_network(path, heads=2).config.data.num_classes == 11


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pythons_own_types_in_any_protocol(protocol, tmp_path):
    """torch.save writes protocol 2, in which int is named long and str unicode."""
    kinds: tuple[Any, ...] = (int, str, bytes, set, list)
    tree = {
        "factories": [collections.defaultdict(kind, a=1) for kind in kinds],
        "types": [int, str, float, bool, bytes],
        "range": range(2, 10, 3),
        "empty": [b"", set(), frozenset(), ()],
        "set": {1, 2},
        "counter": collections.Counter("aab"),
    }
    found = read_torch(save_as_torch(tmp_path / "x.pt", tree, protocol))
    assert found["factories"] == [{"a": 1}] * 5
    assert found["range"] == range(2, 10, 3)
    assert found["empty"] == [b"", set(), frozenset(), ()]
    assert (found["set"], found["counter"]) == ({1, 2}, {"a": 2, "b": 1})


def test_names_without_wrappers():
    assert unwrapped("module.a._orig_mod.module.b") == "a.b"
    assert unwrapped("modules.a.module_list.b") == "modules.a.module_list.b"
    assert unwrapped("_orig_mod") == ""


# Folders.


def folder(path, files, config=None):
    """Files of weights by name: good ones, raw ones, or shards of the good ones."""
    for name, state in files.items():
        if name.endswith(".json"):
            (path / name).write_text(json.dumps({"weight_map": state}))
        elif name.endswith(".bin"):
            write_torch(path / name, state)
        else:
            save_file(state, path / name)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


STEM = "diffusion_pytorch_model"
HALVES = [dict(list(GOOD.items())[::2]), dict(list(GOOD.items())[1::2])]


def shards(template):
    names = [template.format(f"0000{i}-of-00002") for i in (1, 2)]
    listed = {key: name for name, half in zip(names, HALVES, strict=True) for key in half}
    return dict(zip(names, HALVES, strict=True)), listed


def sharded(template, index):
    files, listed = shards(template)
    return {**files, index: listed}


FOLDERS = {
    "`diffusion_pytorch_model.safetensors`, `.bin`": {f"{STEM}.bin": GOOD},
    "shards of either": sharded(f"{STEM}-{{}}.bin", f"{STEM}.bin.index.json"),
    "variants: `.fp16`, `.ema`, `.non_ema`": {
        f"{STEM}.non_ema.safetensors": RAW,
        f"{STEM}.ema.safetensors": GOOD,
    },
    "shards of a variant": sharded(
        f"{STEM}.fp16-{{}}.safetensors", f"{STEM}.safetensors.index.fp16.json"
    ),
    "`model.safetensors` of the hub's mixin": {"model.safetensors": GOOD},
    "`pytorch_model.bin`": {"pytorch_model.bin": {"state_dict": under("module.", GOOD)}},
}


def test_each_row_of_folders_in_the_manual_is_read():
    table = MANUAL.read_text().partition("| folder |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert rows == list(FOLDERS)


@pytest.mark.parametrize("row", FOLDERS)
def test_folders(row, tmp_path):
    network = reading.load_network(folder(tmp_path, FOLDERS[row], {"num_heads": 2}))
    np.testing.assert_array_equal(network.leaves["x_embedder/bias"], GOOD["x_embedder.proj.bias"])
    assert account(network.notes[0]) == (NAMES, 0)


@pytest.mark.parametrize(
    ("variants", "which", "taken"),
    [
        (["", "ema"], "ema", "ema"),
        (["", "ema"], "model", ""),
        (["", "non_ema"], "ema", ""),
        (["", "non_ema"], "model", "non_ema"),
        (["", "non_ema"], "non_ema", "non_ema"),
        (["fp16", "non_ema"], "ema", "fp16"),
        (["", "fp16"], "ema", ""),
        (["", "fp16"], "fp16", "fp16"),
        (["bf16"], "ema", "bf16"),
        (["ema", "non_ema"], "ema", "ema"),
        (["ema", "non_ema"], "model", "non_ema"),
    ],
)
def test_variants(variants, which, taken, tmp_path):
    names = {each: f"{STEM}{f'.{each}' if each else ''}.safetensors" for each in variants}
    files = {name: GOOD if each == taken else RAW for each, name in names.items()}
    network = reading.load_network(folder(tmp_path, files, {"num_heads": 2}), which=which)
    assert network.files == (tmp_path / names[taken],)
    np.testing.assert_array_equal(network.leaves["x_embedder/bias"], GOOD["x_embedder.proj.bias"])
    others = [name for each, name in names.items() if each != taken]
    assert all(name in network.notes[0].partition("not read: ")[2] for name in others)


@pytest.mark.parametrize(
    ("files", "which", "words"),
    [
        ([f"{STEM}.non_ema.bin"], "ema", "and no other variant: choose with --which=non_ema"),
        ([f"{STEM}.ema.bin"], "model", "and no other variant: choose with --which=ema"),
        (["unet.safetensors", "notes.bin"], "ema", "It holds notes.bin, unet.safetensors."),
        ([], "ema", "It holds nothing else."),
    ],
)
def test_what_lies_in_a_folder_is_named(files, which, words, tmp_path):
    folder(tmp_path, dict.fromkeys(files, GOOD), {})
    with pytest.raises(UserError, match=re.escape(words)):
        weights.read_tensors(tmp_path, which)


def test_folders_in_a_folder_are_named(tmp_path):
    (tmp_path / "transformer").mkdir()
    with pytest.raises(UserError, match=r"has no config\.json and no .* It holds transformer/\."):
        weights.read_tensors(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    files = sharded(f"{STEM}-{{}}.safetensors", f"{STEM}.safetensors.index.json")
    files[f"{STEM}-00002-of-00002.safetensors"] = GOOD
    with pytest.raises(
        UserError, match=r"00002.* holds 'blocks.0.adaLN_mod.*', as another shard does"
    ):
        weights.read_tensors(folder(tmp_path, files))


def test_wrappers_in_shards(tmp_path):
    """The names by which a network is recognised are in one of them."""
    files = {
        name: value if name.endswith(".json") else under("module.net.", value)
        for name, value in sharded(f"{STEM}-{{}}.bin", f"{STEM}.bin.index.json").items()
    }
    network = reading.load_network(folder(tmp_path, files), heads=2)
    expected = reading.load_network(folder(tmp_path, {"model.safetensors": GOOD}), heads=2)
    assert_same(network.leaves, expected.leaves)
