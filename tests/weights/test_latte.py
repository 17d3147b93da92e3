"""Latte's weights: read, written, and refused where its code has no such network."""

import json
from pathlib import Path

import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.files.assets import flatten
from ditjax.weights import reading, writing
from ditjax.weights.torch_file import write_torch
from tests.seeded import seeded_state

GOLDEN = Path(__file__).parents[1] / "goldens" / "latte.npz"


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        shapes = {name: tuple(s) for name, s in json.loads(str(file["shapes"])).items()}
        tables = {name: file[name] for name in ("pos_embed", "temp_embed")}
    return {**seeded_state(shapes, 0), **tables}


@pytest.fixture(scope="module")
def network(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("latte") / "latte.pt"
    write_torch(path, {"ema": state, "args": {"num_heads": 2, "num_classes": 10}})
    return reading.load_network(path)


def test_a_checkpoint_is_read(network):
    c = network.config
    assert (c.model.kind, c.model.video, c.model.size) == ("video", "alternate", "4x32x2")
    assert (c.data.frames, c.input_shape) == (3, (3, 8, 8, 4))
    assert c.sample.cfg_channels == "all"
    assert c.diffusion.variance == "learned_range"


def test_what_is_read_is_written_back(network, state, tmp_path):
    again = reading.load_network(writing.write_latte(tmp_path / "latte.pt", network), heads=2)
    for path, leaf in network.leaves.items():
        np.testing.assert_array_equal(again.leaves[path], leaf)
    ours = reading.load_network(writing.write_ditjax(tmp_path / "ours.safetensors", network))
    assert ours.config.data.frames == 3
    assert flatten(ours.params).keys() == flatten(network.params).keys()


def test_what_latte_lacks_is_refused(network, state, tmp_path):
    with pytest.raises(UserError, match=r"the public release has no Video-4x32x2/2-alternate"):
        writing.write_release(tmp_path / "dit.pt", network)
    path = tmp_path / "other.pt"
    write_torch(path, {**state, "temp_embed": state["temp_embed"] + 0.1})
    with pytest.raises(UserError, match=r"temp_embed differs from the 1-D sin-cos table by 0\.1"):
        reading.load_network(path, heads=2)
