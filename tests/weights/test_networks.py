"""The paper's recipe, what a network is, and which two belong together."""

import dataclasses

import numpy as np
import pytest

from ditjax.config import Config, changed, leaf_keys
from ditjax.errors import UserError
from ditjax.weights import networks, reading
from ditjax.weights.networks import RELEASE
from experiments import base
from tests.weight_files import diffusers_folder, golden


def test_release_is_the_recipe_of_experiments():
    expected = base.get_config().to_dict()
    assert expected.pop("seed") == 0
    assert expected == RELEASE
    for section, keys in RELEASE.items():
        for key, value in keys.items():
            assert type(value) is type(expected[section][key]), f"{section}.{key}"
    assert networks.recipe({}).model.size == "XL"


def test_recipe_changes_keys_and_checks_them():
    c = networks.recipe({"model": {"patch": 4}})
    assert (c.model.patch, c.model.size, c.seed) == (4, "XL", 0)
    with pytest.raises(UserError, match=r"config.model.patch is 0"):
        networks.recipe({"model": {"patch": 0}})


@pytest.mark.parametrize("network", ["dit", "autoencoder"])
def test_shapes_do_not_depend_on_the_image(network):
    """And cost nothing, whatever a hostile file says of it."""
    c = networks.recipe({"model": {"size": "2x48x3"}, "train": {"network": network}})
    shapes = networks.shapes_of(c)
    large = changed(c, {"data": {"image_size": 2**14}})
    assert networks.shapes_of(large) == shapes
    if network == "dit":
        assert shapes["blocks/attn/qkv/kernel"] == (2, 48, 3, 3, 16)
        assert shapes["x_embedder/kernel"] == (16, 48)
    else:
        assert shapes["decoder/conv_in/kernel"] == (3, 3, 4, 512)
        assert sum(map(np.prod, shapes.values())) == 83_653_863  # Stable Diffusion's


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return (
        reading.load(diffusers_folder(folder / "dit", "dit")),
        reading.load(diffusers_folder(folder / "vae", "autoencoder")),
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
    assert dit.name == "DiT-2x48x3/4"
    assert autoencoder.name == "KL autoencoder (f=2)"


def test_a_pair_is_joined(pair):
    dit, autoencoder = pair
    c = networks.joined(dit, autoencoder)
    assert (c.data.image_size, c.input_size, c.data.channels) == (32, 16, 3)
    assert c.autoencoder.multipliers == (1, 2)
    assert c.autoencoder.groups == 8
    assert c.model == dit.config.model


def test_the_scale_is_the_dits_where_its_file_says_it(pair):
    dit, autoencoder = pair
    other = autoencoder._replace(
        config=changed(autoencoder.config, {"autoencoder": {"scale": 0.5}})
    )
    assert networks.joined(dit, other).autoencoder.scale == 0.5
    ours = dit._replace(
        layout="ditjax", config=changed(dit.config, {"autoencoder": {"scale": 2.0}})
    )
    assert networks.joined(ours, other).autoencoder.scale == 2.0


def test_what_does_not_belong_together_is_refused(pair):
    dit, autoencoder = pair
    with pytest.raises(UserError, match=r"holds a KL autoencoder .*: expected a DiT"):
        networks.joined(autoencoder, autoencoder)
    with pytest.raises(UserError, match="holds a DiT-2x48x3/4: expected an autoencoder"):
        networks.joined(dit, dit)
    c = autoencoder.config
    wide = autoencoder._replace(
        config=dataclasses.replace(
            c, autoencoder=dataclasses.replace(c.autoencoder, latent_channels=16)
        )
    )
    with pytest.raises(UserError, match=r"works on 4 channels .* have 16"):
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
    network = reading.load(diffusers_folder(tmp_path, "dit", np.float16))
    assert network.dtype == np.float16
    flat = networks.as_float32(network.params)["params"]["x_embedder"]["kernel"]
    assert flat.dtype == np.float32
    np.testing.assert_array_equal(flat.astype(np.float16), network.leaves["x_embedder/kernel"])


def test_the_schema_has_no_key_that_the_release_lacks():
    flat = {f"{section}.{key}" for section, keys in RELEASE.items() for key in keys}
    assert set(leaf_keys(Config)) == flat | {"seed"}
