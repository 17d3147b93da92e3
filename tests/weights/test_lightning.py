"""LightningDiT's weights: its own outputs, there and back, and what ours cannot carry."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.config import changed
from ditjax.errors import UserError
from ditjax.files.assets import unflatten
from ditjax.models.network import Conditions
from ditjax.tasks.diffusion import denoiser_module
from ditjax.weights import reading, writing
from ditjax.weights.networks import LoadedNetwork, shapes_of
from ditjax.weights.tensors import read_tensors
from ditjax.weights.torch_file import write_torch
from tests.seeded import seeded_state

GOLDEN = Path(__file__).parents[1] / "goldens" / "lightning.npz"
TABLES = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def state(golden) -> dict[str, np.ndarray]:
    shapes = {name: tuple(shape) for name, shape in json.loads(str(golden["shapes"])).items()}
    return {**seeded_state(shapes, 0), **{name: golden[name] for name in TABLES}}


@pytest.fixture(scope="module")
def network(state, tmp_path_factory) -> LoadedNetwork:
    path = tmp_path_factory.mktemp("lightning") / "lightning.pt"
    write_torch(path, {"ema": state, "model": {}, "opt": {}})
    return reading.load_network(path, heads=2)


def output(network: LoadedNetwork, golden: Any) -> np.ndarray:
    model = denoiser_module(network.config)
    x, labels = golden["x"].transpose(0, 2, 3, 1), Conditions(label=jnp.asarray(golden["y"]))
    out: Any = model.apply(network.params, jnp.asarray(x), jnp.asarray(golden["t"]), labels)
    return np.asarray(out).transpose(0, 3, 1, 2)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_the_network_is_theirs(network, golden):
    """Its own code on the same weights, whose scales and rows are in another place."""
    assert relative(output(network, golden), golden["output"]) < 1e-5


def test_its_recipe(network):
    c, d = network.config, network.config.diffusion
    m = c.model
    assert (m.size, m.norm, m.mlp, m.qk_norm, m.rope) == ("2x32x2", "rms", "swiglu", True, True)
    assert int(32 * m.mlp_ratio) == 85
    assert (d.process, d.prediction, d.time_scale) == ("flow", "velocity", 1.0)
    assert (d.time_from_noise, d.variance) == (True, "none")
    assert (c.input_size, c.data.image_size) == (4, 64)
    assert (c.sample.sampler, c.sample.cfg_channels) == ("euler", "three")
    assert any("taken for LightningDiT's" in note for note in network.notes)


def test_there_and_back(network, golden, tmp_path):
    """Ours to the bit; and theirs as its own code would read it, with scales of 1."""
    path = writing.write_lightning(tmp_path / "x.pt", network)
    again = reading.load_network(path)
    for name, leaf in network.leaves.items():
        np.testing.assert_array_equal(again.leaves[name], leaf)
    assert again.config.model == network.config.model
    written = read_tensors(path).tensors
    assert written.keys() == json.loads(str(golden["shapes"])).keys()
    for name in TABLES:
        np.testing.assert_allclose(written[name], golden[name], atol=1e-6)
    for name in ("blocks.0.norm1.weight", "final_layer.norm_final.weight"):
        np.testing.assert_array_equal(written[name], np.ones(32))
    # Rows of queries of the file, which is theirs, are those that were read; scales were folded.
    qkv, theirs = written["blocks.1.attn.qkv.weight"], network.leaves["blocks/attn/qkv/kernel"][1]
    np.testing.assert_array_equal(qkv[1], theirs[:, 0, 0, 8])  # the pair of 0 is 8 of 16


@pytest.mark.parametrize(
    "keys",
    [
        {"norm": "layer", "qk_norm": False},
        {"rope": False, "mlp": "gelu", "mlp_ratio": 4.0},
        {"qk_norm": False, "rope": False},
    ],
    ids=str,
)
def test_each_part_is_theirs_or_not(network, keys, golden, tmp_path):
    config = changed(network.config, {"model": keys})
    params = {"params": unflatten(seeded_state(shapes_of(config), 1))}
    other = LoadedNetwork(config, params, "ditjax", ())
    again = reading.load_network(writing.write_lightning(tmp_path / "x.pt", other))
    assert relative(output(again, golden), output(other, golden)) == 0
    assert again.config.model == config.model


def refused(path, state, match):
    write_torch(path, state)
    with pytest.raises(UserError, match=match):
        reading.load_network(path, heads=2)


def test_what_our_block_cannot_carry_is_refused(state, network, tmp_path):
    without = {n: x[:128] if "adaLN" in n and "blocks" in n else x for n, x in state.items()}
    refused(tmp_path / "a.pt", without, "have no shift")
    biased = {**state, "blocks.0.attn.q_norm.bias": np.zeros(16, np.float32)}
    refused(tmp_path / "b.pt", biased, "normalised by LayerNorm")
    turned = {**state, TABLES[1]: state[TABLES[1]][::-1].copy()}
    refused(tmp_path / "c.pt", turned, "rotations by other angles")
    lacking = {name: x for name, x in state.items() if name != "blocks.1.norm2.weight"}
    refused(tmp_path / "d.pt", lacking, "blocks.1.adaLN_modulation.1 or its norm is missing")
    ratio = network._replace(config=changed(network.config, {"model": {"mlp_ratio": 4.0}}))
    with pytest.raises(UserError, match=r"requires an MLP of 85 hidden units"):
        writing.write_lightning(tmp_path / "e.pt", ratio)
    with pytest.raises(UserError, match="the public release would sample this network as DDPM"):
        writing.write_release(tmp_path / "f.pt", network)
