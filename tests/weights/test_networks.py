"""The paper's recipe, what a network is, and which two belong together."""

import dataclasses

import numpy as np
import pytest

from ditjax.config import changed, completed, leaf_keys, read, replaced, schema
from ditjax.errors import UserError
from ditjax.models.embed import sincos_position_embedding
from ditjax.runs.rundir import leaves
from ditjax.weights import networks, reading
from experiments import base
from tests.weight_files import diffusers_folder, golden


def test_what_no_file_says_is_the_papers():
    """The defaults of the keys, every one of them, and the recipe of experiments."""
    paper = completed({})
    assert completed(base.get_config().to_dict()) == paper
    assert {key for key, _ in leaves(paper)} == set(leaf_keys(schema()))
    assert read({}) == read(paper)
    c = read({})
    assert (c.seed, c.task, c.model.kind, c.model.size, c.model.patch) == (
        0,
        "diffusion",
        "dit",
        "XL",
        2,
    )
    assert (c.optim.learning_rate, c.train.batch_size, c.train.steps) == (1e-4, 256, 400_000)
    assert (c.data.image_size, c.input_size, c.autoencoder.scale) == (256, 32, 0.18215)


def test_a_recipe_of_some_keys_is_checked():
    c = read({"model": {"patch": 4}})
    assert (c.model.patch, c.model.size, c.seed) == (4, "XL", 0)
    with pytest.raises(UserError, match=r"config.model.patch is 0"):
        read({"model": {"patch": 0}})


SMALL = {"model": {"size": "2x48x3"}}
PIXELS = {"kind": "none", "multipliers": (1,) * 12}


@pytest.mark.parametrize(
    ("recipe", "channels", "large"),
    [
        (SMALL, 4, 2**14),
        ({**SMALL, "autoencoder": PIXELS}, 3, 2**11),
        ({"task": "autoencoder"}, 0, 2**14),
    ],
    ids=["latents", "pixels", "autoencoder"],
)
def test_shapes_do_not_depend_on_the_image(recipe, channels, large, monkeypatch):
    """And cost nothing, whatever a hostile file says of it, or of an autoencoder beside pixels."""
    tokens = []

    def position(width, rows, columns, *span):
        tokens.append(rows * columns)
        return sincos_position_embedding(width, rows, columns, *span)

    monkeypatch.setattr("ditjax.models.dit.sincos_position_embedding", position)
    c = read(recipe)
    networks._shapes_of.cache_clear()  # of what was traced before
    shapes = networks.shapes_of(c)
    own = networks.shapes_of(c)
    own.clear()
    assert networks.shapes_of(c) == shapes, "what is kept is the caller's"
    networks._shapes_of.cache_clear()
    assert networks.shapes_of(changed(c, {"data": {"image_size": large}})) == shapes
    assert set(tokens) == ({1} if channels else set())
    if channels:
        assert shapes["blocks/attn/qkv/kernel"] == (2, 48, 3, 3, 16)
        assert shapes["x_embedder/kernel"] == (4 * channels, 48)
    else:
        assert shapes["decoder/conv_in/kernel"] == (3, 3, 4, 512)
        assert sum(map(np.prod, shapes.values())) == 83_653_863  # Stable Diffusion's


def test_the_autoencoder_in_front_of_a_recipe():
    """Its own recipe: the architecture, the images and the precision are the same."""
    sections = {"base_width": 16, "multipliers": (1, 2), "groups": 8, "path": "x"}
    c = read({"autoencoder": sections, "model": {"dtype": "bfloat16"}, "data": {"channels": 1}})
    decoder = networks.decoder_recipe(c)
    assert decoder.task == "autoencoder"
    assert dataclasses.asdict(decoder.autoencoder) == dataclasses.asdict(c.autoencoder)
    assert (decoder.model.kind, decoder.model.dtype) == ("autoencoder", "bfloat16")
    assert decoder.data.channels == 1
    assert networks.shapes_of(decoder)["encoder/conv_in/kernel"] == (3, 3, 1, 16)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return (
        reading.load_network(diffusers_folder(folder / "dit", "dit")),
        reading.load_network(diffusers_folder(folder / "vae", "autoencoder")),
    )


def test_what_a_network_says_of_itself(pair):
    dit, autoencoder = pair
    for network, kind in zip(pair, ("dit", "autoencoder"), strict=True):
        shapes = golden(f"{kind}_shapes")
        count = sum(
            int(np.prod(shape))
            for name, shape in shapes.items()
            if "blocks.1.norm1.emb" not in name
        )
        assert network.num_parameters == count
        assert network.dtype == np.float32
    assert (dit.decodes, autoencoder.decodes) == (False, True)
    assert dit.name == "DiT-2x48x3/4"
    assert autoencoder.name == "KL autoencoder (f=2)"


def test_a_pair_is_joined(pair):
    dit, autoencoder = pair
    c = networks.combined_recipe(dit, autoencoder)
    assert (c.data.image_size, c.input_size, c.data.channels) == (32, 16, 3)
    assert c.autoencoder.multipliers == (1, 2)
    assert c.autoencoder.groups == 8
    assert c.model == dit.config.model


def test_the_scale_is_the_dits_where_its_file_says_it(pair):
    dit, autoencoder = pair
    other = autoencoder._replace(
        config=changed(autoencoder.config, {"autoencoder": {"scale": 0.5}})
    )
    assert networks.combined_recipe(dit, other).autoencoder.scale == 0.5
    ours = dit._replace(
        layout="ditjax", config=changed(dit.config, {"autoencoder": {"scale": 2.0}})
    )
    assert networks.combined_recipe(ours, other).autoencoder.scale == 2.0


def test_what_does_not_belong_together_is_refused(pair):
    dit, autoencoder = pair
    with pytest.raises(UserError, match=r"holds a KL autoencoder .*: expected a DiT"):
        networks.combined_recipe(autoencoder, autoencoder)
    with pytest.raises(UserError, match="holds a DiT-2x48x3/4: expected an autoencoder"):
        networks.combined_recipe(dit, dit)
    c = autoencoder.config
    wide = autoencoder._replace(
        config=replaced(c, autoencoder=dataclasses.replace(c.autoencoder, latent_channels=16))
    )
    with pytest.raises(UserError, match=r"has 4 input channels .* have 16"):
        networks.check_fit(dit, wide)


def test_pixels_belong_to_no_autoencoder(pair):
    """Not even to one whose latents have as many channels."""
    dit, autoencoder = pair
    pixels = dit._replace(
        config=changed(dit.config, {"autoencoder": {"kind": "none"}, "data": {"channels": 3}})
    )
    c = changed(autoencoder.config, {"autoencoder": {"latent_channels": 3}})
    with pytest.raises(UserError, match="do not belong together"):
        networks.check_fit(pixels, autoencoder._replace(config=c))


def test_half_precision_weights_are_computed_with_as_float32(tmp_path):
    network = reading.load_network(diffusers_folder(tmp_path, "dit", np.float16))
    assert network.dtype == np.float16
    flat = networks.as_float32(network)["params"]["x_embedder"]["kernel"]
    assert flat.dtype == np.float32
    np.testing.assert_array_equal(flat.astype(np.float16), network.leaves["x_embedder/kernel"])
