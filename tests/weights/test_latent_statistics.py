"""Autoencoders of SD3 and Flux, and per-channel statistics: read, written, applied, refused."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ditjax import convert
from ditjax.config import changed, read
from ditjax.errors import UserError
from ditjax.files.assets import unflatten
from ditjax.parallel.mesh import make_mesh
from ditjax.tasks.autoencoder import (
    decode_latents,
    denormalized,
    draw_latents,
    encode_images,
    load_frozen,
    normalized,
)
from ditjax.weights import layouts, networks, reading, writing
from ditjax.weights.torch_file import write_torch
from tests.seeded import seeded_state
from tests.weight_files import assert_same, release_state, write_folder

SMALL: dict[str, Any] = {
    "base_width": 32,
    "multipliers": (1, 2),
    "res_blocks": 1,
    "groups": 32,
    "latent_channels": 16,
}
# Without the 1x1 convolutions around the latents, as in SD3 and Flux.
BARE = {**SMALL, "quant_conv": False, "post_quant_conv": False}
FLUX = {"scale": 0.3611, "shift": 0.1159}
CHANNELS = {
    "scale": 0.5,
    "latent_mean": tuple(np.linspace(-1, 1, 16).tolist()),
    "latent_std": tuple(np.linspace(0.5, 2, 16).tolist()),
}
# As diffusers writes the folders of SD3's and Flux's autoencoders.
CONFIG = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [32, 64],
    "force_upcast": True,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


def recipe(**keys):
    return read({"task": "autoencoder", "autoencoder": {**BARE, **keys}})


def images(count):
    pixels = np.random.default_rng(0).uniform(-1, 1, (count, 8, 8, 3))
    return jnp.asarray(pixels, jnp.float32)


def network(**keys):
    c = recipe(**keys)
    leaves = seeded_state(networks.shapes_of(c), 1)
    return networks.LoadedNetwork(c, {"params": unflatten(leaves)}, "ditjax", ("x",))  # type: ignore[arg-type]


def state_of(layout, **keys):
    """The tensors of `network()` in the names of another program."""
    found = network(**keys)
    rules = layouts.autoencoder_layout(found.shapes, layout)
    theirs = layouts.to_theirs(rules, found.leaves)
    return {name: np.ascontiguousarray(x) for name, x in theirs.items()}


@pytest.fixture
def flux(tmp_path):
    return write_folder(tmp_path / "flux", state_of("diffusers"), CONFIG)


def test_the_layout_of_sd3_and_flux(flux):
    state = state_of("diffusers")
    assert not any("quant" in name for name in state)
    assert state["encoder.conv_out.weight"].shape == (32, 64, 3, 3)
    assert state["decoder.conv_in.weight"].shape == (64, 16, 3, 3)
    found = reading.load_network(flux)
    a = found.config.autoencoder
    assert (a.latent_channels, a.quant_conv, a.post_quant_conv) == (16, False, False)
    assert (a.scale, a.shift, a.latent_mean, a.latent_std) == (0.3611, 0.1159, (), ())
    assert_same(found.leaves, network().leaves)
    assert f"{len(state)} tensors taken, none left out" in found.notes[0]


def test_without_convolutions_is_with_identities():
    """So that diffusers' goldens, which have them, prove this network too."""
    bare = network()
    c = changed(bare.config, {"autoencoder": {"quant_conv": True, "post_quant_conv": True}})
    leaves = dict(bare.leaves)
    for name, width in (("quant_conv", 32), ("post_quant_conv", 16)):
        leaves[f"{name}/kernel"] = np.eye(width, dtype=np.float32)[None, None]
        leaves[f"{name}/bias"] = np.zeros(width, np.float32)
    whole = {"params": unflatten(leaves)}
    x = images(2)
    ours = jax.jit(lambda p: encode_images(bare.config, p, x))(bare.params)
    theirs = jax.jit(lambda p: encode_images(c, p, x))(whole)
    np.testing.assert_allclose(ours.mean, theirs.mean, atol=1e-5)
    z = ours.mean
    decoded = jax.jit(lambda p: decode_latents(bare.config, p, z))(bare.params)
    expected = jax.jit(lambda p: decode_latents(c, p, z))(whole)
    np.testing.assert_allclose(decoded, expected, atol=1e-4)


@pytest.mark.parametrize(
    "keys", [{"scale": 0.18215}, FLUX, CHANNELS], ids=["scale", "shift", "std"]
)
def test_latents_are_normalised_as_in_diffusers(keys):
    c = recipe(**keys)
    z = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 3, 16)), jnp.float32)
    a = c.autoencoder
    mean = np.asarray(a.latent_mean) if a.latent_mean else a.shift
    std = np.asarray(a.latent_std) if a.latent_std else 1.0
    expected = (np.asarray(z) - mean) * a.scale / std
    np.testing.assert_allclose(normalized(c, z), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(denormalized(c, normalized(c, z)), z, atol=1e-5)
    if keys == {"scale": 0.18215}:  # to the bit, as before there were others
        np.testing.assert_array_equal(normalized(c, z), z * np.float32(0.18215))
        np.testing.assert_array_equal(denormalized(c, z), z / np.float32(0.18215))


@pytest.mark.parametrize("keys", [FLUX, CHANNELS], ids=["shift", "std"])
def test_drawn_latents_are_decoded_to_the_image(keys):
    """Training's x0, decoded as samples are, is the autoencoder's own reconstruction."""
    found = network(**keys)
    c = found.config
    moments = encode_images(c, found.params, images(1))
    certain = moments._replace(log_variance=jnp.full_like(moments.mean, -30.0))
    x0 = draw_latents(c, certain, jax.random.key(0))
    plain = changed(c, {"autoencoder": recipe(scale=1.0).autoencoder.statistics})
    expected = decode_latents(plain, found.params, moments.mean)
    np.testing.assert_allclose(decode_latents(c, found.params, x0), expected, atol=1e-4)


@pytest.mark.parametrize("keys", [FLUX, CHANNELS], ids=["shift", "std"])
def test_statistics_travel_with_every_format(keys, tmp_path):
    source = writing.write_ditjax(tmp_path / "a.safetensors", network(**keys))
    steps = [("diffusers", "b"), ("ldm", "c.ckpt"), ("ditjax", "d.safetensors")]
    for target, name in steps:
        convert.convert(str(source), target, str(tmp_path / name))
        found = reading.load_network(tmp_path / name)
        assert found.config.autoencoder.statistics == recipe(**keys).autoencoder.statistics
        assert not found.config.autoencoder.quant_conv
        source = tmp_path / name
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["use_quant_conv"], config["use_post_quant_conv"]) == (False, False)
    assert config.get("shift_factor", 0.0) == recipe(**keys).autoencoder.shift


def test_a_folder_of_stable_diffusions_kind_is_written_as_before(tmp_path):
    c = read({"task": "autoencoder", "autoencoder": SMALL})
    plain = networks.LoadedNetwork(
        c, {"params": unflatten(seeded_state(networks.shapes_of(c), 1))}, "ditjax", ()
    )
    writing.write_diffusers(tmp_path, plain)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"shift_factor", "latents_mean", "use_quant_conv"} & config.keys()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_quant_conv": True}, "use_quant_conv in config.json is True, but the file lacks"),
        ({"use_post_quant_conv": None}, "use_post_quant_conv in config.json is None, but"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention in config.json is False"),
        ({"latents_mean": [0.0] * 16}, "latent_mean has 16 numbers and latent_std 0"),
    ],
    ids=str,
)
def test_folders_that_contradict_their_tensors(changes, words, tmp_path):
    folder = write_folder(tmp_path, state_of("diffusers"), {**CONFIG, **changes})
    with pytest.raises(UserError, match=re.escape(words)):
        reading.load_network(folder)


# Files that do not say how their latents are normalised.


@pytest.fixture
def bare(tmp_path):
    """Flux's own file, ae.safetensors: the names of latent diffusion, and nothing else."""
    save_file(state_of("ldm"), tmp_path / "ae.safetensors")
    return tmp_path / "ae.safetensors"


def dit_of(path, **sections):
    write_torch(path, release_state(depth=1, width=16, patch=2, side=4, channels=16))
    found = reading.load_network(path, heads=2)
    if not sections:
        return found
    c = changed(found.config, {"autoencoder": sections})
    return found._replace(layout="ditjax", config=c)


def test_a_bare_file_of_16_channels_is_not_guessed(bare, tmp_path):
    found = reading.load_network(bare)
    assert (found.layout, found.states_scale) == ("ldm", False)
    words = "does not say how its latents of 16 channels are normalised: give its folder"
    with pytest.raises(UserError, match=words):
        networks.combined_recipe(dit_of(tmp_path / "dit.pt"), found)
    with pytest.raises(UserError, match=words):
        convert.convert(str(bare), "diffusers", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    # The DiT's file may say it, or a config beside the same tensors.
    c = networks.combined_recipe(dit_of(tmp_path / "dit.pt", **FLUX), found)
    assert (c.autoencoder.scale, c.autoencoder.shift) == (0.3611, 0.1159)
    folder = write_folder(tmp_path / "folder", state_of("ldm"), CONFIG)
    assert reading.load_network(folder).config.autoencoder.shift == 0.1159


def test_a_bare_file_of_four_channels_is_stable_diffusions(tmp_path):
    c = read({"task": "autoencoder", "autoencoder": {**SMALL, "latent_channels": 4}})
    leaves = seeded_state(networks.shapes_of(c), 1)
    rules = layouts.autoencoder_layout(networks.shapes_of(c), "ldm")
    write_torch(tmp_path / "x.ckpt", {"state_dict": layouts.to_theirs(rules, leaves)})
    found = reading.load_network(tmp_path / "x.ckpt")
    assert found.config.autoencoder.scale == 0.18215
    assert "does not state the scale of its latents: 0.18215 is taken" in found.notes[1]
    networks.check_stated(found)


# A DiT and another autoencoder than the one of its latents.


@pytest.mark.parametrize(
    ("dit", "autoencoder", "fits"),
    [
        (FLUX, FLUX, True),
        (FLUX, {**FLUX, "scale": 0.5}, True),
        (FLUX, {"scale": 1.5305, "shift": 0.0609}, False),
        (FLUX, {"scale": 0.3611}, False),
        ({"scale": 0.3611}, FLUX, False),
        (CHANNELS, CHANNELS, True),
        (CHANNELS, {**CHANNELS, "latent_std": (1.0,) * 16}, False),
        (CHANNELS, {"scale": 0.5}, False),
    ],
)
def test_a_dit_is_decoded_with_its_own_statistics(dit, autoencoder, fits, tmp_path):
    writing.write_diffusers(tmp_path / "vae", network(**autoencoder))
    trained, found = dit_of(tmp_path / "dit.pt", **dit), reading.load_network(tmp_path / "vae")
    if fits:
        c = networks.combined_recipe(trained, found)
        assert c.autoencoder.statistics == trained.config.autoencoder.statistics
    else:
        with pytest.raises(UserError, match="expected the same, as the DiT was trained with"):
            networks.combined_recipe(trained, found)


def test_an_autoencoder_of_our_own_states_no_shift(tmp_path):
    """It was trained before its latents were measured."""
    path = writing.write_ditjax(tmp_path / "x.safetensors", network())
    c = networks.combined_recipe(dit_of(tmp_path / "dit.pt", **FLUX), reading.load_network(path))
    assert c.autoencoder.shift == 0.1159


def latent_recipe(path, **keys):
    return read(
        {
            "data": {"image_size": 8},
            "model": {"size": "1x16x2", "patch": 2},
            "autoencoder": {**BARE, "path": str(path), **keys},
        }
    )


def test_a_recipe_states_the_statistics_of_its_autoencoder(flux, bare):
    mesh = make_mesh(-1, 1)
    load_frozen(latent_recipe(flux, **FLUX), mesh)
    load_frozen(latent_recipe(bare, **FLUX), mesh)
    with pytest.raises(UserError, match=r"shift 0\.1159, .* has 0\.0: .*; set config\.autoenc"):
        load_frozen(latent_recipe(flux), mesh)
    with pytest.raises(UserError, match=r"shift 0\.1159, .* has 0\.0"):
        load_frozen(latent_recipe(flux, **{**CHANNELS, "shift": 0.0}), mesh)
    with pytest.raises(UserError, match=r"quant_conv is True, and the autoencoder at .* False"):
        load_frozen(latent_recipe(flux, **FLUX, quant_conv=True), mesh)


def test_a_pipeline_knows_no_shift(flux, tmp_path):
    dit = dit_of(tmp_path / "dit.pt")
    with pytest.raises(UserError, match="DiTPipeline divides latents by their scale and knows no"):
        writing.write_pipeline(tmp_path / "p", dit, reading.load_network(flux), [("x",)] * 10)
    assert not (tmp_path / "p").exists()
