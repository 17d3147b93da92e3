"""Latte of texts from and to folders of diffusers, beside its outputs on the same weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.config import changed
from ditjax.errors import UserError
from ditjax.machines.products import traced_macs
from ditjax.models.network import Conditions
from ditjax.tasks.diffusion import denoiser_module
from ditjax.weights.networks import task_of
from ditjax.weights.reading import load_network
from ditjax.weights.tensors import write_safetensors
from ditjax.weights.text_pipeline import write_text_pipeline
from ditjax.weights.writing import write_diffusers, write_ditjax
from tests.seeded import seeded_state
from tests.text_encoders import relative

GOLDEN = Path(__file__).parents[1] / "goldens" / "latte_text.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def network(golden, tmp_path_factory):
    return load_network(written(golden, tmp_path_factory.mktemp("latte_text")))


def written(golden, folder, without="", **config):
    """The folder of a network of diffusers, with seeded weights."""
    shapes = {name: tuple(s) for name, s in json.loads(str(golden["shapes"])).items()}
    tensors = seeded_state(shapes, 0)
    tensors.pop(without, None)
    stated = {**json.loads(str(golden["config"])), **config}
    (folder / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    return folder


def arguments(inputs):
    """x f32[B,F,H,W,C], t and the text, as ditjax takes them."""
    x, t = jnp.asarray(inputs["x"].transpose(0, 2, 3, 4, 1)), jnp.asarray(inputs["t"], jnp.int32)
    return x, t, Conditions(context=jnp.asarray(inputs["context"]))


def computed(network, inputs):
    """The output f32[B,F,H,W,2C] of a loaded network on the golden file's inputs."""
    return jax.jit(denoiser_module(network.config).apply)(network.params, *arguments(inputs))


def test_diffusers_computes_the_same(golden, network):
    c = network.config
    assert (c.task, c.model.kind, c.model.size) == ("text2image", "text_video", "4x24x2")
    assert (c.data.frames, c.text.width) == (3, 10)
    theirs = golden["output"].transpose(0, 2, 3, 4, 1)
    assert relative(computed(network, golden), theirs) < 2e-5


def test_the_cost_is_that_of_the_program(golden, network):
    c = changed(network.config, {"text": {"tokens": golden["context"].shape[1]}})
    cost = task_of(c).cost
    assert cost is not None
    assert cost.parameters == network.num_parameters
    x, t, given = arguments(golden)
    one = Conditions(context=given.context[:1])
    found = traced_macs(denoiser_module(c).apply, network.params, x[:1], t[:1], one)
    # Norms, 2ND a block, and the last one's are no products.
    norms = (4 * 2 + 1) * cost.tokens * 24
    assert cost.macs - found == norms
    # A step on clips and their texts evaluates the network once.
    task = task_of(c)
    shapes = {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in task.inputs.items()}
    drawn = jax.eval_shape(task.draw, shapes, jax.eval_shape(lambda: jax.random.key(0)))
    assert traced_macs(task.loss, network.params, task.shapes(), drawn) == found


def test_weights_are_written_as_they_were_read(network, golden, tmp_path):
    """To the bit, by way of diffusers' folder and of our own file; config.json says the same."""
    write_diffusers(tmp_path / "b", network)
    write_ditjax(tmp_path / "c.safetensors", network)
    for path in (tmp_path / "b", tmp_path / "c.safetensors"):
        again = load_network(path)
        assert again.config == network.config
        jax.tree.map(np.testing.assert_array_equal, again.params, network.params)
    stated = json.loads((tmp_path / "b" / "config.json").read_text())
    theirs = json.loads(str(golden["config"]))
    assert {name: stated[name] for name in theirs if name in stated and name[0] != "_"} == {
        name: value for name, value in theirs.items() if name in stated and name[0] != "_"
    }


def test_what_is_not_latte_is_one_line(golden, network, tmp_path):
    for changes, message in (
        ({"video_length": "16"}, "video_length in config.json is '16'"),
        (
            {"_class_name": "PixArtTransformer2DModel"},
            "only 'LatteTransformer3DModel' is",
        ),
        ({"without": "temporal_transformer_blocks.1.attn1.to_k.bias"}, r"attn1\.to_k\.bias"),
    ):
        with pytest.raises(UserError, match=message):
            load_network(written(golden, tmp_path, **changes))
    for keys, message in (
        ({"model": {"size": "3x24x2"}}, "expected an even depth"),
        ({"model": {"size_condition": 64}}, "size_condition is 64"),
    ):
        with pytest.raises(UserError, match=message):
            task_of(changed(network.config, keys))
    moved = network._replace(config=changed(network.config, {"model": {"position_grid": 2}}))
    with pytest.raises(UserError, match="positions that are divided by 1"):
        write_diffusers(tmp_path / "x", moved)
    with pytest.raises(UserError, match="PixArtAlphaPipeline draws images"):
        write_text_pipeline(tmp_path / "y", network, None, lambda path: "")
