"""PixArt-α from and to folders of diffusers, beside its outputs on the same weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.config import changed
from ditjax.convert import convert
from ditjax.errors import UserError
from ditjax.models.network import Conditions
from ditjax.tasks.diffusion import denoiser_module
from ditjax.weights.reading import load_network
from ditjax.weights.tensors import write_safetensors
from ditjax.weights.writing import write_diffusers, write_ditjax
from tests.seeded import seeded_state
from tests.text_encoders import relative

GOLDEN = Path(__file__).parents[1] / "goldens" / "pixart.npz"
TYPES = ("512", "1024")


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files}


def written(golden, folder, kind="512", without="", **config):
    """The folder of a network of diffusers, with seeded weights."""
    shapes = {name: tuple(s) for name, s in json.loads(str(golden[f"{kind}/shapes"])).items()}
    tensors = seeded_state(shapes, 0)
    tensors.pop(without, None)
    folder.mkdir(parents=True, exist_ok=True)
    stated = {**json.loads(str(golden[f"{kind}/config"])), **config}
    (folder / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("kind", TYPES)
def test_diffusers_computes_the_same(golden, kind, tmp_path):
    network = load_network(written(golden, tmp_path / "a", kind))
    c = network.config
    assert (c.task, c.model.kind, c.text.width, c.text.tokens) == (
        "text2image",
        "text_dit",
        10,
        120,
    )
    assert c.model.size_condition == (64 if kind == "1024" else 0)
    given = Conditions(context=jnp.asarray(golden["context"]))
    given = given._replace(context_mask=jnp.asarray(golden["mask"]) == 1)
    x = jnp.asarray(golden["x"].transpose(0, 2, 3, 1))
    apply = jax.jit(denoiser_module(c).apply)
    found = apply(network.params, x, jnp.asarray(golden["t"], jnp.int32), given)
    theirs = golden[f"{kind}/output"].transpose(0, 2, 3, 1)
    assert relative(found, theirs) < 2e-5


@pytest.mark.parametrize("kind", TYPES)
def test_weights_are_written_as_they_were_read(golden, kind, tmp_path):
    """To the bit, by way of diffusers' folder and of our own file; config.json says the same."""
    folder = written(golden, tmp_path / "a", kind)
    network = load_network(folder)
    write_diffusers(tmp_path / "b", network)
    write_ditjax(tmp_path / "c.safetensors", network)
    for path in (tmp_path / "b", tmp_path / "c.safetensors"):
        again = load_network(path)
        assert again.config == network.config
        jax.tree.map(np.testing.assert_array_equal, again.params, network.params)
    stated = json.loads((tmp_path / "b" / "config.json").read_text())
    for name, value in json.loads(str(golden[f"{kind}/config"])).items():
        if name in stated and value is not None and name != "_diffusers_version":
            assert stated[name] == value, name


def test_a_conversion_says_what_it_is_of(golden, tmp_path):
    folder = str(written(golden, tmp_path / "a"))
    text = convert(folder, "diffusers", str(tmp_path / "b"))
    assert "TextDiT-2x24x2/2" in text
    assert "texts: 120 tokens, 10 features each" in text
    assert "embed timesteps differently" not in text


def test_hostile_folders_are_one_line(golden, tmp_path):
    for name, changes, message in (
        ("a", {"norm_eps": 1e-5}, "norm_eps in config.json is 1e-05: only 1e-06 is supported"),
        ("b", {"norm_type": "ada_norm_zero"}, "only 'ada_norm_single' is supported"),
        ("c", {"interpolation_scale": 3}, "expected a number of at least 1 that divides the 4"),
        ("d", {"interpolation_scale": "2; rm"}, "interpolation_scale in config.json is"),
        ("e", {"sample_size": 10**9}, "sample_size in config.json is 1000000000"),
        ("f", {"num_attention_heads": 5}, "5 attention heads for a width of 24"),
        ("g", {"without": "scale_shift_table"}, "scale_shift_table"),
        ("h", {"without": "transformer_blocks.1.attn2.to_k.bias"}, r"attn2\.to_k\.bias"),
        ("i", {"_class_name": "os.system"}, "_class_name in config.json is 'os.system'"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_network(written(golden, tmp_path / name, **changes))
        assert "\n" not in str(error.value) or "missing" in str(error.value)
    network = load_network(written(golden, tmp_path / "good"))
    for keys, message in (
        ({"model": {"qk_norm": True}}, "config.model.qk_norm is True, and its code requires False"),
        ({"model": {"size_condition": 32}}, "config.model.size_condition is 32"),
    ):
        other = network._replace(config=changed(network.config, keys))
        with pytest.raises(UserError, match=message):
            write_diffusers(tmp_path / "x", other)
