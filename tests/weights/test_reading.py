"""Networks out of files: against diffusers' own outputs, and everything that is not one."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ditjax.config import as_tree, merged, read
from ditjax.errors import UserError
from ditjax.models.dit import PAPER_PATCHES, PAPER_SIZES
from ditjax.models.embed import sincos_position_embedding
from ditjax.models.network import Conditions
from ditjax.tasks.autoencoder import decode_latents, encode_images
from ditjax.tasks.diffusion import denoiser_module
from ditjax.weights import layouts, reading, writing
from ditjax.weights import tensors as weights
from ditjax.weights.networks import LoadedNetwork, as_float32, not_finite, shapes_of
from ditjax.weights.torch_file import write_torch
from tests.seeded import seeded_state
from tests.weight_files import (
    assert_same,
    diffusers_folder,
    diffusers_state,
    golden,
    position_table,
    release_shapes,
    release_state,
    write_folder,
)


def relative(ours: Any, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def nhwc(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


def refusal(path, **kwargs):
    """The one line that loading a path ends in."""
    with pytest.raises(UserError) as caught:
        reading.load_network(path, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def release_file(path, state=None, **kwargs):
    write_torch(path, release_state(**kwargs) if state is None else state)
    return path


# The golden file: what diffusers computed.


def apply_dit(network, params=None):
    model = denoiser_module(network.config)
    x, t, y = map(jnp.asarray, (nhwc(golden("dit_x")), golden("dit_t"), golden("dit_y")))
    return jax.jit(model.apply)(params or network.params, x, t, Conditions(label=y))


def test_a_dit_of_diffusers(tmp_path):
    network = reading.load_network(diffusers_folder(tmp_path, "dit"))
    expected = nhwc(golden("dit_output"))
    assert relative(apply_dit(network), expected) < 1e-4
    c = network.config
    assert (network.decodes, network.layout) == (False, "diffusers")
    assert (c.task, c.model.kind) == ("diffusion", "dit")
    assert (c.model.frequency_shift, c.model.norm2_eps) == (1, 1e-5)
    assert (c.model.size, c.model.patch, c.data.num_classes) == ("2x48x3", 4, 10)
    assert (c.input_size, c.input_channels, c.data.image_size) == (16, 4, 128)
    assert c.sample.cfg_channels == "all"
    assert not c.sample.clip_x0
    # The release's embedding of the same t is another function.
    release = reading.load_network(tmp_path, numerics="release")
    assert (release.config.model.frequency_shift, release.config.model.norm2_eps) == (0, 1e-6)
    assert relative(apply_dit(release), expected) > 0.05


def test_an_autoencoder_of_diffusers(tmp_path):
    network = reading.load_network(diffusers_folder(tmp_path, "autoencoder"))
    c, x = network.config, nhwc(golden("autoencoder_x"))
    moments = jax.jit(lambda p, x: encode_images(c, p, x))(network.params, x)
    assert relative(moments.mean, nhwc(golden("autoencoder_mean"))) < 1e-4
    assert relative(moments.log_variance, nhwc(golden("autoencoder_log_variance"))) < 1e-4
    z = moments.mean * c.autoencoder.scale
    again = jax.jit(lambda p, z: decode_latents(c, p, z))(network.params, z)
    assert relative(again, nhwc(golden("autoencoder_again"))) < 1e-4
    a = c.autoencoder
    assert (a.base_width, a.multipliers, a.res_blocks, a.groups) == (16, (1, 2), 2, 8)
    assert (a.latent_channels, a.scale, c.data.channels) == (4, 0.18215, 3)
    assert network.decodes
    assert (c.task, c.model.kind) == ("autoencoder", "autoencoder")


# Architectures by their shapes.


def fake(shapes, dtype=np.float32):
    """Tensors of any size that take no memory."""
    return {name: np.broadcast_to(np.zeros((), dtype), shape) for name, shape in shapes.items()}


@pytest.fixture
def architecture_of(monkeypatch):
    """The network that `load` finds in fake tensors; nothing is copied, no table compared."""
    monkeypatch.setattr(reading, "_params", lambda file, rules, ours: {"params": {}})
    monkeypatch.setattr(reading, "_check_table", lambda *_: None)

    def found(tensors, config=None, metadata=None, **kwargs):
        file = weights.TensorFile(Path("fake"), tensors, (), config or {}, metadata or {}, {})
        monkeypatch.setattr(weights, "read_tensors", lambda path, which, marks: file)
        return reading.load_network("fake", **kwargs)

    return found


@pytest.mark.parametrize("image_size", [256, 512])
@pytest.mark.parametrize("patch", PAPER_PATCHES)
@pytest.mark.parametrize("name", PAPER_SIZES)
def test_the_papers_sizes_at_both_resolutions(name, patch, image_size, architecture_of):
    depth, width, heads = PAPER_SIZES[name]
    side = image_size // 8
    shapes = release_shapes(depth, width, patch, side, classes=1000)
    network = architecture_of(fake(shapes))
    c = network.config
    assert network.name == f"DiT-{name}/{patch}"
    assert denoiser_module(c).heads == heads
    assert (c.data.image_size, c.input_size, c.data.num_classes) == (image_size, side, 1000)
    # All else is the paper's.
    paper = read({})
    assert c.diffusion == paper.diffusion
    assert c.sample == paper.sample
    assert c.autoencoder == paper.autoencoder


def test_other_architectures(architecture_of):
    network = architecture_of(fake(release_shapes(3, 64, 2, 8, channels=1, learned=False)), heads=4)
    c = network.config
    assert network.name == "DiT-3x64x4/2"
    assert (c.diffusion.variance, c.diffusion.loss) == ("fixed_small", "simple")
    assert (c.latent, c.data.channels, c.data.image_size) == (False, 1, 8)
    assert (c.sample.cfg_channels, c.sample.clip_x0) == ("all", True)
    c = architecture_of(fake(release_shapes(2, 48, 4, 16, channels=16)), heads=3).config
    assert (c.latent, c.autoencoder.latent_channels, c.data.channels) == (True, 16, 3)
    assert c.sample.cfg_channels == "three"
    c = architecture_of(fake(release_shapes(channels=3)), heads=3).config
    assert (c.latent, c.data.channels, c.sample.cfg_channels) == (False, 3, "three")


@pytest.mark.parametrize(("width", "hidden"), [(52, 213), (60, 123), (48, 128), (76, 125)])
def test_any_mlp(width, hidden, architecture_of):
    """int(D * (hidden / D)) is one too small for these."""
    shapes = release_shapes(2, width, hidden=hidden)
    c = architecture_of(fake(shapes), heads=2).config
    assert int(width * c.model.mlp_ratio) == hidden


# The public release's files.


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_release_file(dtype, tmp_path):
    state = release_state(dtype)
    network = reading.load_network(release_file(tmp_path / "x.pt", state), heads=3)
    assert network.layout == "release"
    assert network.dtype == dtype
    assert network.files == (tmp_path / "x.pt",)
    c = network.config
    assert (c.model.frequency_shift, c.model.norm2_eps) == (0, 1e-6)
    np.testing.assert_array_equal(
        network.leaves["blocks/mlp/in/kernel"][1], state["blocks.1.mlp.fc1.weight"].T
    )


def test_the_states_of_a_training_checkpoint(tmp_path):
    ema, model = release_state(), release_state()
    model["x_embedder.proj.bias"] = model["x_embedder.proj.bias"] + 1
    saved = {
        "model": {f"module.{name}": x for name, x in model.items()},
        "ema": ema,
        "opt": {"state": {}},
        "args": {"model": "DiT-S/8"},
    }
    path = release_file(tmp_path / "0400000.pt", saved)
    for which, expected in (("ema", ema), ("model", model)):
        bias = reading.load_network(path, heads=3, which=which).leaves["x_embedder/bias"]
        np.testing.assert_array_equal(bias, expected["x_embedder.proj.bias"])
    assert "no 'ema': choose with --which=model" in refusal(
        release_file(tmp_path / "raw.pt", {"model": model}), heads=3
    )


def test_numerics_override_the_files(tmp_path):
    path = release_file(tmp_path / "x.pt")
    c = reading.load_network(path, heads=3, numerics="diffusers").config
    assert (c.model.frequency_shift, c.model.norm2_eps) == (1, 1e-5)


@pytest.mark.parametrize(("width", "side"), [(48, 4), (1152, 16), (384, 32), (1024, 8)])
def test_the_position_table_is_the_releases_bit_for_bit(width, side):
    np.testing.assert_array_equal(
        sincos_position_embedding(width, side, side), position_table(width, side)[0]
    )


@pytest.mark.parametrize(
    ("dtype", "error", "refused"),
    [
        (np.float32, 1e-6, False),
        (np.float32, 1e-5, True),
        (np.float32, np.nan, True),
        (np.float16, 4e-4, False),
        (np.float16, 0.03, True),
        (ml_dtypes.bfloat16, 0.03, True),
    ],
)
def test_the_position_table_is_checked(dtype, error, refused, tmp_path):
    state = release_state(dtype)
    table = state["pos_embed"].astype(np.float32)
    table[0, 5, 7] += error
    state["pos_embed"] = table.astype(dtype)
    path = release_file(tmp_path / "x.pt", state)
    if refused:
        assert "pos_embed differs from the 2-D sin-cos table by" in refusal(path, heads=3)
    else:
        reading.load_network(path, heads=3)


def averaged(table, updates, decay):
    """The release's update_ema of a parameter that never changes: mul_(decay), add_(alpha)."""
    # The update depends on the value alone: each value once is enough.
    values, where = np.unique(table.astype(np.float32), return_inverse=True)
    mean, pull = values.copy(), values * np.float32(1 - decay)
    for _ in range(updates):
        mean *= np.float32(decay)
        mean += pull
    return mean[where].reshape(table.shape)


@pytest.mark.parametrize(
    ("updates", "decay", "drift"),
    [
        (34, 0.9999, 2e-6),
        (100_000, 0.9999, 1.5e-4),
        (20_000, 0.999, 8e-6),
        (100_000, 0.99999, 3e-4),
    ],
)
def test_an_averaged_table_is_the_frozen_one(updates, decay, drift, tmp_path):
    """The release's train.py averages `pos_embed` with all other parameters."""
    state = release_state()
    state["pos_embed"] = averaged(state["pos_embed"], updates, decay)
    assert np.abs(state["pos_embed"] - position_table(48, 4)).max() > drift
    reading.load_network(release_file(tmp_path / "x.pt", {"ema": state}), heads=3)
    # The same table rounded to the type of the other weights, and in another type than theirs.
    half = {name: x.astype(np.float16) for name, x in state.items()}
    reading.load_network(release_file(tmp_path / "half.pt", half), heads=3)
    mixed = half | {"pos_embed": state["pos_embed"]}
    assert reading.load_network(release_file(tmp_path / "m.pt", mixed), heads=3).dtype == np.float16


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_the_tables_type_does_not_matter(dtype, tmp_path):
    state = release_state()
    state["pos_embed"] = state["pos_embed"].astype(dtype)
    network = reading.load_network(release_file(tmp_path / "x.pt", state), heads=3)
    assert network.dtype == np.float32
    state["pos_embed"] = np.ones_like(state["pos_embed"], np.int32)
    assert "1 not float32: pos_embed" in refusal(release_file(tmp_path / "i.pt", state), heads=3)


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3, 0.02])
@pytest.mark.parametrize("axis", ["all", "rows", "scale", "offset"])
def test_a_learned_table_is_refused(size, axis, tmp_path):
    """However little it was trained; of the size of the drift, too."""
    state, rng = release_state(), np.random.default_rng(0)
    table = state["pos_embed"].reshape(4, 4, 48)
    shape = {"all": (4, 4, 48), "rows": (4, 1, 48), "scale": (4, 4, 1), "offset": (1, 4, 48)}[axis]
    learned = size * rng.standard_normal(shape)
    table = table * (1 + learned) if axis == "scale" else table + learned
    state["pos_embed"] = table.astype(np.float32).reshape(1, 16, 48)
    path = release_file(tmp_path / "x.pt", state)
    assert "not as averaging makes it: learned or other tables" in refusal(path, heads=3)


def test_a_transposed_table_is_another(tmp_path):
    """Row first, as a plausible port would have it."""
    state = release_state()
    state["pos_embed"] = state["pos_embed"].reshape(1, 4, 4, 48).swapaxes(1, 2).reshape(1, 16, 48)
    assert "differs from the 2-D sin-cos" in refusal(
        release_file(tmp_path / "x.pt", state), heads=3
    )


def test_diffusers_table_is_checked_where_it_is_saved(tmp_path):
    state = diffusers_state("dit")
    state["pos_embed.pos_embed"] = position_table(48, 4)
    network = reading.load_network(write_folder(tmp_path, state, golden("dit_config")))
    assert "pos_embed/pos_embed" not in network.leaves
    state["pos_embed.pos_embed"] = position_table(48, 4)[:, ::-1]
    assert "pos_embed.pos_embed differs" in refusal(
        write_folder(tmp_path, state, golden("dit_config"))
    )


def test_heads(tmp_path):
    path = release_file(tmp_path / "x.pt")
    assert "not a size of the paper, and the file does not contain the number" in refusal(path)
    for heads in (5, -3):
        assert f"{heads} attention heads for a width of 48" in refusal(path, heads=heads)
    folder = diffusers_folder(tmp_path / "folder", "dit")
    assert reading.load_network(folder, heads=3).config.model.size == "2x48x3"
    assert "has 3 attention heads, but --heads is 4" in refusal(folder, heads=4)


def test_nan_weights_are_kept(tmp_path):
    """They are someone's weights: a reader does not judge them."""
    state = release_state()
    state["blocks.1.mlp.fc1.weight"][3, 4] = np.nan
    network = reading.load_network(release_file(tmp_path / "x.pt", state), heads=3)
    assert np.argwhere(np.isnan(network.leaves["blocks/mlp/in/kernel"])).tolist() == [[1, 4, 3]]
    assert not_finite(network.leaves) == ["blocks/mlp/in/kernel"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nothing_is_computed_with_values_that_are_not_finite(dtype, value):
    leaf = np.ones((2, 3), dtype)
    network = LoadedNetwork(read({}), {"params": {"w": leaf}}, "x", (Path("x.pt"),))
    assert as_float32(network)["params"]["w"].dtype == np.float32
    leaf[1, 2] = value
    with pytest.raises(UserError, match=r"x\.pt holds a DiT.* with NaN or infinities in w: save"):
        as_float32(network)


# What a file says in words.


def labels(path, saved_args=None, *, rows=11, **kwargs):
    """(classes, label dropout, notes) of a release file with a label table of that many rows."""
    saved = {"ema": release_state(classes=rows - 1)}
    saved |= {} if saved_args is None else {"args": saved_args}
    network = reading.load_network(release_file(path, saved), heads=3, **kwargs)
    assert network.leaves["y_embedder/table"].shape[0] == rows
    c = network.config
    return c.data.num_classes, c.model.label_dropout, network.notes


@pytest.mark.parametrize(
    ("args", "classes", "dropout"),
    [
        ({"num_classes": 10}, 10, 0.1),
        ({"num_classes": 11}, 11, 0.0),
        ({"num_classes": np.int64(11)}, 11, 0.0),
        ({"n_classes": 11}, 11, 0.0),
        ({"class_dropout_prob": 0.0}, 11, 0.0),
        ({"class_dropout_prob": 0}, 11, 0.0),
        ({"class_dropout_prob": 0.25}, 10, 0.25),
        ({"cfg-prob": 0.0, "num-classes": 11}, 11, 0.0),
        ({"model": {"params": {"class_dropout_prob": 0.0}}, "data": {"num_classes": 11}}, 11, 0.0),
        ({"num_classes": None, "label_dropout": 0.2}, 10, 0.2),
    ],
    ids=str,
)
def test_the_classes_that_the_arguments_state(args, classes, dropout, tmp_path):
    """Without label dropout, the release's label table has no row for the null label."""
    found = labels(tmp_path / "x.pt", args)
    assert found[:2] == (classes, dropout)
    assert not any("null label" in note for note in found[2])


def test_the_classes_of_a_bare_file(tmp_path):
    """As in the release, and it says so; the user may know better."""
    path = tmp_path / "x.pt"
    classes, dropout, notes = labels(path)
    assert (classes, dropout) == (10, 0.1)
    (note,) = [note for note in notes if "null label" in note]
    assert "the last of 11 rows of its label table is taken for the null label" in note
    assert "--num_classes=11 if it is a class" in note
    assert labels(path, num_classes=10)[:2] == (10, 0.1)
    assert labels(path, num_classes=11)[:2] == (11, 0.0)
    for few in (9, 12, -1):
        assert f"has 11 rows, but --num_classes is {few}: expected 11, or 10" in refusal(
            path, heads=3, num_classes=few
        )


def test_a_network_of_one_class(tmp_path):
    assert labels(tmp_path / "x.pt", rows=1)[:2] == (1, 0.0)
    assert labels(tmp_path / "y.pt", rows=2)[:2] == (1, 0.1)
    assert labels(tmp_path / "z.pt", {"num_classes": 2}, rows=2)[:2] == (2, 0.0)
    assert labels(tmp_path / "a.pt", {"num_classes": 1}, rows=2)[:2] == (1, 0.1)


@pytest.mark.parametrize(
    ("args", "given", "words"),
    [
        ({"num_classes": 1000}, 0, "has 11 rows, but its arguments say num_classes 1000"),
        ({"num_classes": 10}, 11, "has 10 classes by its own arguments, but --num_classes is 11"),
        ({"num_classes": 10, "class_dropout_prob": 0.0}, 0, "only with label dropout"),
        ({"num_classes": 11, "class_dropout_prob": 0.1}, 0, "only with label dropout"),
        ({"class_dropout_prob": 0.1}, 11, "only with label dropout"),
        ({"num_classes": 10, "a": {"num_classes": 11}}, 0, "contradicts itself"),
        ({"num_classes": "10"}, 0, "num_classes '10': expected a whole number"),
        ({"num_classes": True}, 0, "num_classes True: expected a whole number"),
        ({"num_classes": 10**400}, 0, "has 11 rows"),
        ({"class_dropout_prob": 2}, 0, "class_dropout_prob 2: expected 0 to 1"),
        ({"class_dropout_prob": float("nan")}, 0, "class_dropout_prob nan: expected 0 to 1"),
        ({"class_dropout_prob": [0]}, 0, "class_dropout_prob [0]: expected 0 to 1"),
    ],
    ids=str,
)
def test_classes_that_contradict_the_file(args, given, words, tmp_path):
    saved = {"ema": release_state(), "args": args}
    path = release_file(tmp_path / "x.pt", saved)
    assert words in refusal(path, heads=3, num_classes=given)


def test_two_statements_are_settled_by_the_user(tmp_path):
    """A recipe that was begun from another network's may hold both numbers."""
    args = {"num_classes": 10, "pretrained": {"num_classes": 1000}}
    assert labels(tmp_path / "x.pt", args, num_classes=10)[:2] == (10, 0.1)
    args = {"num_classes": 1000}
    assert labels(tmp_path / "y.pt", args, num_classes=11)[:2] == (11, 0.0)


def test_the_classes_of_a_diffusers_folder(tmp_path):
    state = diffusers_state("dit")
    folder = write_folder(tmp_path / "a", state, config_with(num_embeds_ada_norm=11))
    c = reading.load_network(folder).config
    assert (c.data.num_classes, c.model.label_dropout) == (11, 0.0)
    folder = write_folder(tmp_path / "b", state, config_with(num_embeds_ada_norm=1000))
    assert "has 11 rows, but its arguments say num_embeds_ada_norm 1000" in refusal(folder)


def test_the_heads_that_the_arguments_state(tmp_path):
    saved = {"ema": release_state(), "args": {"num_heads": 4}}
    path = release_file(tmp_path / "x.pt", saved)
    assert reading.load_network(path).config.model.size == "2x48x4"
    # They may be of another network, such as a teacher.
    assert reading.load_network(path, heads=3).config.model.size == "2x48x3"
    write_folder(tmp_path / "hub", release_state(), {"num_heads": 4})
    assert reading.load_network(tmp_path / "hub").config.model.size == "2x48x4"
    assert "has 4 attention heads, but --heads is 3" in refusal(tmp_path / "hub", heads=3)


def test_the_heads_of_another_network_in_the_arguments(architecture_of, monkeypatch):
    shapes = release_shapes(12, 384, 2, 32, classes=1000)
    assert architecture_of(fake(shapes)).name == "DiT-S/2"
    file = weights.TensorFile(
        Path("fake"), fake(shapes), (), {}, {}, {"args": {"encoder": {"num_heads": 12}}}
    )
    monkeypatch.setattr(weights, "read_tensors", lambda path, which, marks: file)
    assert "with 6 attention heads, but its arguments say num_heads 12" in refusal("fake")
    assert reading.load_network("fake", heads=6).name == "DiT-S/2"


@pytest.mark.parametrize(
    ("args", "keys"),
    [
        ({"noise_schedule": "linear", "diffusion_steps": 1000}, ("linear", "eps", 1000)),
        ({"noise_schedule": "cosine"}, ("cosine", "eps", 1000)),
        ({"noise_schedule": "squaredcos_cap_v2", "diffusion_steps": 500}, ("cosine", "eps", 500)),
        ({"predict_xstart": True}, ("linear", "x0", 1000)),
        ({"predict_xstart": False}, ("linear", "eps", 1000)),
        ({"prediction_type": "v_prediction"}, ("linear", "v", 1000)),
    ],
    ids=str,
)
def test_the_process_that_the_arguments_state(args, keys, tmp_path):
    path = release_file(tmp_path / "x.pt", {"ema": release_state(), "args": args})
    d = reading.load_network(path, heads=3).config.diffusion
    assert (d.schedule, d.prediction, d.timesteps) == keys


@pytest.mark.parametrize(
    ("args", "process", "prediction"),
    [
        ({"path_type": "Linear", "prediction": "velocity"}, "flow", "velocity"),
        ({"path_type": "GVP", "prediction": "noise", "loss_weight": None}, "gvp", "eps"),
        ({"path-type": "VP", "prediction": "velocity"}, "vp", "velocity"),
    ],
)
def test_a_sit_is_what_its_arguments_say(args, process, prediction, tmp_path):
    """Its time runs from noise to data; of its 2C channels, C are not read."""
    path = release_file(tmp_path / "x.pt", {"ema": release_state(), "args": args})
    c = reading.load_network(path, heads=3).config
    d = c.diffusion
    assert (d.process, d.prediction, d.loss) == (process, prediction, "simple")
    assert (d.variance, d.time_scale, d.time_from_noise) == ("unused", 1.0, True)
    assert (c.sample.sampler, c.sample.last_step) == ("sde", 0.04)


def repa_state():
    """A small SiT of REPA: C channels, and one projector D -> 40 -> 40 -> 24 with its biases."""
    sizes = {0: (40, 48), 2: (40, 40), 4: (24, 40)}
    shapes: Any = {f"projectors.0.{i}.weight": shape for i, shape in sizes.items()}
    shapes |= {f"projectors.0.{i}.bias": shape[:1] for i, shape in sizes.items()}
    return {**release_state(learned=False), **seeded_state(shapes, 1)}


def test_repas_projector_is_read_with_its_block(tmp_path):
    """Its MLP, in PyTorch's order of axes; and its process, with velocities from data to noise."""
    state = repa_state()
    args = {"path_type": "linear", "prediction": "v", "encoder_depth": 2, "cfg_prob": 0.1}
    network = reading.load_network(
        release_file(tmp_path / "x.pt", {"ema": state, "args": args}), heads=3
    )
    m, d = network.config.model, network.config.diffusion
    assert (m.align_block, m.align_width, m.align_features) == (2, 40, 24)
    assert (d.process, d.prediction, d.variance) == ("flow", "velocity", "none")
    assert (d.time_scale, d.time_from_noise) == (1.0, False)
    assert not any("REPA" in note for note in network.notes)
    projector = network.params["params"]["projector"]
    for ours, theirs in (("in", 0), ("middle", 2), ("out", 4)):
        np.testing.assert_array_equal(
            projector[ours]["kernel"].T, state[f"projectors.0.{theirs}.weight"]
        )
        np.testing.assert_array_equal(projector[ours]["bias"], state[f"projectors.0.{theirs}.bias"])


def test_what_a_bare_file_of_repa_is_taken_for(tmp_path):
    path = release_file(tmp_path / "x.pt", repa_state())
    network = reading.load_network(path, heads=3)
    (note,) = [each for each in network.notes if "REPA" in each]
    assert "its projector reads block 2" in note
    assert "linear path, with velocities" in note
    assert network.config.diffusion.process == "flow"
    # Two teachers have two projectors: the file is refused until they are named.
    more = {name.replace(".0.", ".1.", 1): x for name, x in repa_state().items() if "proj" in name}
    more = {name: x for name, x in more.items() if name.startswith("projectors")}
    two = release_file(tmp_path / "y.pt", {**repa_state(), **more})
    assert "--leave_out=projectors" in refusal(two, heads=3)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"path_type": "linear", "prediction": "velocity"}, "path_type 'linear', prediction 'vel"),
        ({"path_type": "GVP", "prediction": "score"}, "path_type 'GVP', prediction 'score'"),
        ({"path_type": "cosine", "prediction": "noise"}, "path_type 'cosine', prediction 'noise'"),
        ({"path-type": "linear", "prediction": "x"}, "path-type 'linear', prediction 'x'"),
        ({"prediction": "velocity"}, "say prediction 'velocity'"),
        ({"prediction": "noise"}, "say prediction 'noise'"),
        ({"transport": {"path_type": "Linear", "loss_weight": None}}, "say path_type 'Linear'"),
        ({"model": {"precond": "edm"}}, "say precond 'edm'"),
        ({"prediction": ["v"]}, "say prediction ['v']"),
        ({"noise_schedule": "sigmoid"}, "noise_schedule 'sigmoid': only 'linear' or"),
        ({"linear_start": 0.0015, "linear_end": 0.0195}, "linear_start 0.0015 and linear_end"),
        ({"linear_start": 0.0015}, "linear_start 0.0015: only the linear and the cosine"),
        ({"diffusion_steps": 1}, "diffusion_steps 1: expected 2 to"),
        ({"diffusion_steps": 1.5}, "diffusion_steps 1.5: expected a whole number"),
    ],
    ids=str,
)
def test_a_process_that_is_not_sampled(args, words, tmp_path):
    """A SiT's tensors are a DiT's: as DDPM it draws noise."""
    path = release_file(tmp_path / "x.pt", {"ema": release_state(), "args": args})
    assert words in refusal(path, heads=3)


# What is no such network.


def test_every_fault_at_once(tmp_path):
    state = release_state()
    del state["blocks.0.attn.qkv.bias"], state["blocks.1.attn.qkv.bias"]
    state["blocks.0.norm1.weight"] = np.ones(48, np.float32)
    state["t_embedder.mlp.0.bias"] = np.zeros(47, np.float32)
    state["blocks.1.mlp.fc2.bias"] = state["blocks.1.mlp.fc2.bias"].astype(np.float64)
    text = refusal(release_file(tmp_path / "x.pt", state), heads=3)
    assert text == (
        f"{tmp_path}/x.pt is no DiT of 2 layers, width 48, patch 4 in the layout of the public"
        " release: 2 missing: blocks.{0-1}.attn.qkv.bias; 1 extra: blocks.0.norm1.weight;"
        " 1 not float32: blocks.1.mlp.fc2.bias; 1 mis-shaped: t_embedder.mlp.0.bias is (47,), not"
        " (48,)."
    )


def changed_state(**changes):
    state = release_state()
    for name, shape in changes.items():
        if shape is None:
            del state[name]
        else:
            state[name] = np.zeros(shape, np.float32)
    return state


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"x_embedder.proj.weight": None},
            "x_embedder.proj.weight is missing, but its shape",
        ),
        ({"x_embedder.proj.weight": (48, 64)}, "x_embedder.proj.weight is of shape (48, 64)"),
        ({"x_embedder.proj.weight": (48, 4, 4, 2)}, "mis-shaped: x_embedder.proj.weight"),
        ({"x_embedder.proj.weight": (48, 4, 0, 4)}, "is of shape (48, 4, 0, 4)"),
        ({"pos_embed": (1, 15, 48)}, "15 positions: expected a square number"),
        ({"pos_embed": (2, 16, 48)}, "mis-shaped: pos_embed is (2, 16, 48)"),
        ({"pos_embed": None}, "pos_embed is missing"),
        ({"final_layer.linear.weight": (100, 48)}, "100 outputs: expected 64, or 128"),
        ({"y_embedder.embedding_table.weight": (0, 48)}, "is of shape (0, 48)"),
        ({"blocks.7.mlp.fc1.weight": (192, 48)}, "missing: blocks.{2-7}.adaLN_modulation.1.bias"),
        ({"blocks.999999999.x": (1,)}, "extra: blocks.999999999.x"),
        ({f"blocks.{'9' * 5000}.x": (1,)}, "1 extra: blocks.999"),
        ({"blocks.².x": (1,)}, "1 extra: blocks.².x"),
    ],
    ids=range(13),
)
def test_dits_that_are_none(changes, words, tmp_path):
    path = release_file(tmp_path / "x.pt", changed_state(**changes))
    assert words in refusal(path, heads=3)


FOREIGN = {
    "an Inception": {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "fc.bias": (1008,)},
    "a UNet": {
        "conv_in.weight": (320, 4, 3, 3),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (320, 320),
    },
    "a ViT": {"cls_token": (1, 1, 48), "blocks.0.attn.qkv.weight": (144, 48)},
    "a PixArt": {
        "pos_embed.proj.weight": (48, 4, 2, 2),
        "transformer_blocks.0.attn1.to_q.weight": (48, 48),
    },
    "an encoder": {"encoder.layers.0.weight": (4, 4)},
    "nothing": {},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_networks(name, tmp_path):
    weights.write_safetensors(tmp_path / "x.safetensors", fake(FOREIGN[name]))
    text = refusal(tmp_path / "x.safetensors")
    assert ("holds no known network" in text) == (name in ("an Inception", "a UNet", "nothing"))


def config_with(**changes):
    return {**golden("dit_config"), **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sample_size": "16"}, "sample_size in config.json is '16'"),
        ({"sample_size": None}, "sample_size in config.json is None"),
        ({"sample_size": True}, "sample_size in config.json is True"),
        ({"sample_size": 18}, "sample_size in config.json is 18"),
        ({"sample_size": -16}, "sample_size in config.json is -16"),
        ({"sample_size": 16.0}, "sample_size in config.json is 16.0"),
        ({"sample_size": 10**400}, "at most 2048"),
        ({"sample_size": 4096}, "at most 2048"),
        ({"sample_size": [16, 16]}, "sample_size in config.json is [16, 16]"),
        ({"num_attention_heads": 0.5}, "0.5 attention heads"),
        ({"num_attention_heads": "3"}, "'3' attention heads"),
        ({"num_attention_heads": True}, "True attention heads"),
        ({"num_attention_heads": 4}, "has 4 attention heads of width 16"),
        ({"num_attention_heads": [3]}, "[3] attention heads"),
        ({"norm_eps": float("nan")}, "norm2_eps is nan"),
        ({"norm_eps": float("inf")}, "norm2_eps is inf"),
        ({"norm_eps": 0}, "norm2_eps is 0.0"),
        ({"norm_eps": "1e-5"}, "norm2_eps is '1e-5'"),
        ({"norm_eps": 10**400}, "expected a finite number"),
        ({"norm_eps": {"a": 1}}, "norm2_eps is {'a': 1}"),
        ({"activation_fn": "gelu"}, "activation_fn in config.json is 'gelu'"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine in config.json is True"),
        ({"norm_type": "ada_norm_single"}, "norm_type in config.json is"),
        ({"_class_name": "UNet2DModel"}, "_class_name in config.json is"),
        ({"_class_name": ["x"]}, "_class_name in config.json is"),
    ],
    ids=str,
)
def test_hostile_configs(changes, words, tmp_path):
    folder = write_folder(tmp_path, diffusers_state("dit"), config_with(**changes))
    assert words in refusal(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)


@pytest.mark.parametrize("kind", ["dit", "autoencoder"])
def test_any_config_is_read_or_refused(kind, tmp_path):
    config = golden(f"{kind}_config")
    folder = write_folder(tmp_path, diffusers_state(kind), config)

    @given(st.dictionaries(st.sampled_from([*config, "latents_std", "x"]), JSON, max_size=3))
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    def check(changes):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with contextlib.suppress(UserError):
            reading.load_network(folder)

    check()


def test_the_config_of_the_published_folders(tmp_path):
    """Older than the class: Transformer2DModel, and keys of the other kinds of network."""
    config = config_with(_class_name="Transformer2DModel", num_vector_embeds=None)
    del config["norm_eps"]
    assert (
        reading.load_network(write_folder(tmp_path, diffusers_state("dit"), config)).name
        == "DiT-2x48x3/4"
    )


def test_a_bare_file_of_diffusers(tmp_path):
    weights.write_safetensors(tmp_path / "x.safetensors", diffusers_state("dit"))
    assert "give its folder" in refusal(tmp_path / "x.safetensors", heads=3)


def test_a_block_that_differs_cannot_be_read(tmp_path):
    state = diffusers_state("dit")
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight"
    state[name] = state[name] + 1
    text = refusal(write_folder(tmp_path, state, golden("dit_config")))
    assert name in text
    assert "ditjax stores it once" in text


# Autoencoders.


def ldm_state(prefix="", **more):
    network = {name: tuple(shape) for name, shape in golden("autoencoder_shapes").items()}
    del network
    ours = shapes_of(_autoencoder_recipe())
    shapes = layouts.expected_shapes(layouts.autoencoder_layout(ours, "ldm"), ours)
    return {f"{prefix}{k}": v for k, v in seeded_state(shapes, 2).items()} | more


def _autoencoder_recipe():
    sections = {"base_width": 32, "multipliers": (1, 2)}
    return read({"task": "autoencoder", "autoencoder": sections})


@pytest.mark.parametrize(
    ("prefix", "more"),
    [
        ("", {}),
        ("", {"loss.logvar": np.zeros((), np.float32), "model_ema.decay": np.zeros(1, np.float64)}),
        ("first_stage_model.", {"model.diffusion_model.out.2.weight": np.zeros(3, np.float16)}),
    ],
)
def test_checkpoints_of_latent_diffusion(prefix, more, tmp_path):
    """The published ft-MSE file counts its average's updates; a whole checkpoint has a UNet."""
    state = ldm_state(prefix, **more)
    write_torch(tmp_path / "x.ckpt", {"state_dict": state, "global_step": 7})
    network = reading.load_network(tmp_path / "x.ckpt")
    assert (network.decodes, network.layout) == (True, "ldm")
    assert network.config.autoencoder.multipliers == (1, 2)
    assert network.config.autoencoder.groups == 32
    kernel = network.leaves["decoder/up_blocks_0/resnets_0/conv1/kernel"]
    theirs = state[f"{prefix}decoder.up.1.block.0.conv1.weight"]
    np.testing.assert_array_equal(kernel, theirs.transpose(2, 3, 1, 0))


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_what_does_not_belong_to_an_autoencoder_is_told(prefix, tmp_path):
    state = ldm_state(prefix) | {f"{prefix}quantize.embedding.weight": np.zeros((8, 4), np.float32)}
    state["loss.logvar"] = np.zeros((), np.float32)
    del state[f"{prefix}encoder.conv_out.bias"]
    write_torch(tmp_path / "x.ckpt", {"state_dict": state})
    text = refusal(tmp_path / "x.ckpt")
    assert "1 missing: encoder.conv_out.bias; 1 extra: quantize.embedding.weight." in text


@pytest.mark.parametrize("convolutions", [True, False])
def test_old_names_of_diffusers(convolutions, tmp_path):
    state = diffusers_state("autoencoder")
    expected = reading.load_network(diffusers_folder(tmp_path / "new", "autoencoder")).leaves
    old = {}
    for name, x in state.items():
        if ".attentions.0.to_" in name and name.endswith("weight") and convolutions:
            x = x[:, :, None, None]
        for new, before in (("q", "query"), ("k", "key"), ("v", "value"), ("out.0", "proj_attn")):
            name = name.replace(f".to_{new}.", f".{before}.")
        old[name] = x
    network = reading.load_network(
        write_folder(tmp_path / "old", old, golden("autoencoder_config"))
    )
    assert network.layout == "diffusers_old"
    assert_same(network.leaves, expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_num_groups": 0}, "groups is 0"),
        ({"norm_num_groups": -8}, "groups is -8"),
        ({"norm_num_groups": 3}, "not divisible into 3 groups"),
        ({"norm_num_groups": "8"}, "groups is '8'"),
        ({"norm_num_groups": 2**80}, "groups is"),
        ({"scaling_factor": float("nan")}, "scale is nan"),
        ({"scaling_factor": None}, "scale is None"),
        ({"scaling_factor": -1}, "scale is -1"),
        ({"scaling_factor": [0.18215]}, "scale is [0.18215]"),
        ({"_class_name": "AsymmetricAutoencoderKL"}, "_class_name in config.json is"),
        ({"act_fn": "relu"}, "act_fn in config.json is 'relu'"),
        ({"shift_factor": "0.1"}, "shift is '0.1'"),
        ({"shift_factor": float("inf")}, "shift is inf"),
        ({"shift_factor": [0.1]}, "shift is [0.1]"),
        ({"latents_mean": [0.0]}, "latent_mean has 1 numbers and latent_std 0: expected one for"),
        ({"latents_std": [1.0] * 4}, "latent_mean has 0 numbers and latent_std 4"),
        ({"latents_mean": [0] * 3, "latents_std": [1] * 3}, "each of the 4 channels"),
        ({"latents_mean": [0] * 4, "latents_std": [1, 1, 0, 1]}, "expected numbers above 0"),
        ({"latents_mean": [0] * 4, "latents_std": "1111"}, "latent_std is '1111'"),
        ({"latents_mean": 0.5}, "latent_mean is 0.5"),
        (
            {"shift_factor": 0.1, "latents_mean": [0] * 4, "latents_std": [1] * 4},
            "shift is 0.1 and latent_mean is given, too",
        ),
        ({"use_quant_conv": False}, "use_quant_conv in config.json is False"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv in config.json is False"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention in config.json is False"),
    ],
    ids=str,
)
def test_hostile_autoencoder_configs(changes, words, tmp_path):
    config = {**golden("autoencoder_config"), **changes}
    assert words in refusal(write_folder(tmp_path, diffusers_state("autoencoder"), config))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("encoder.down_blocks.7.resnets.0.conv1.weight", (4, 4, 3, 3), "blocks.2.resnets.0.conv1"),
        (
            "encoder.down_blocks.0.resnets.999999999.x",
            (1,),
            "1 extra: encoder.down_blocks.0.resnets.999999999.x",
        ),
        ("encoder.conv_in.weight", (32, 3, 3, 3), "are no multiples of 32"),
        ("encoder.conv_in.weight", (16, 2, 3, 3), "channels is 2"),
        ("post_quant_conv.weight", (0, 4, 1, 1), "post_quant_conv.weight is of shape"),
        ("post_quant_conv.weight", None, "post_quant_conv.weight is missing"),
    ],
)
def test_autoencoders_that_are_none(name, shape, words, tmp_path):
    state = diffusers_state("autoencoder")
    if shape is None:
        del state[name]
    else:
        state[name] = np.zeros(shape, np.float32)
    assert words in refusal(write_folder(tmp_path, state, golden("autoencoder_config")))


# Our own files.


SMALL = {"size": "1x16x2", "patch": 2}
OUR_DATA = {"image_size": 64, "channels": 3, "num_classes": 10}


def our_metadata(**changes):
    tree = as_tree(read({"model": SMALL, "data": OUR_DATA}))
    kept = {k: tree[k] for k in ("model", "diffusion", "autoencoder", "sample")}
    return {"task": "diffusion", "config": {**kept, "data": OUR_DATA}, **changes}


# As files of before config.task have it, spelled out.
BEFORE_TASKS: dict[str, dict[str, Any]] = {
    "model": {
        "size": "XL",
        "patch": 2,
        "block": "adaln_zero",
        "mlp_ratio": 4.0,
        "label_dropout": 0.1,
        "dtype": "float32",
        "remat": "none",
        "unroll": 1,
        "matmul": "default",
        "frequency_shift": 0,
        "norm2_eps": 1e-6,
        "attention": "auto",
        "parametrization": "standard",
        "base_width": 384,
        "base_head_width": 64,
    },
    "diffusion": {
        "timesteps": 1000,
        "schedule": "linear",
        "prediction": "eps",
        "variance": "learned_range",
        "loss": "hybrid",
    },
    "autoencoder": {
        "kind": "kl",
        "path": "",
        "base_width": 128,
        "multipliers": [1, 2, 4, 4],
        "res_blocks": 2,
        "latent_channels": 4,
        "groups": 32,
        "scale": 0.18215,
        "kl_weight": 1e-6,
    },
    "sample": {
        "sampler": "ddpm",
        "steps": "250",
        "eta": 0.0,
        "cfg_scale": 1.0,
        "cfg_channels": "three",
        "cfg_interval": [0.0, 1.0],
        "clip_x0": False,
        "weights": "ema",
        "batch_size": 64,
        "num": 64,
    },
    "data": {"image_size": 256, "channels": 3, "num_classes": 1000},
}


def old_metadata(network="dit", **sections):
    kept = {name: {**keys, **sections.get(name, {})} for name, keys in BEFORE_TASKS.items()}
    return {"network": network, "config": kept}


def our_file(path, metadata, leaves):
    return weights.write_safetensors(path, leaves, {"ditjax": json.dumps(metadata)})


@pytest.mark.parametrize(
    ("network", "sections", "now"),
    [
        (
            "dit",
            {
                "model": {**SMALL, "frequency_shift": 1, "norm2_eps": 1e-5},
                "diffusion": {"prediction": "v"},
                "autoencoder": {"scale": 0.7},
                "sample": {"steps": "ddim7", "cfg_scale": 2.5},
                "data": OUR_DATA,
            },
            {"task": "diffusion", "model": {"kind": "dit"}},
        ),
        (
            "autoencoder",
            {
                "model": {"dtype": "bfloat16"},
                "autoencoder": {"base_width": 32, "multipliers": [1, 2], "scale": 0.7},
                "data": OUR_DATA,
            },
            {"task": "autoencoder", "model": {"kind": "autoencoder"}},
        ),
    ],
    ids=["dit", "autoencoder"],
)
def test_files_of_before_tasks_are_read(network, sections, now, tmp_path):
    """They name their network, and have the sections and keys of both."""
    only = {} if network == "dit" else {"diffusion", "sample"}
    expected = read(merged({k: v for k, v in sections.items() if k not in only}, now))
    leaves = seeded_state(shapes_of(expected), 4)
    path = our_file(tmp_path / "x.safetensors", old_metadata(network, **sections), leaves)
    found = reading.load_network(path)
    assert found.config == expected
    assert_same(found.leaves, leaves)
    assert (found.layout, found.decodes) == ("ditjax", network == "autoencoder")
    # Written again, it is as if it had never been old.
    writing.write_ditjax(tmp_path / "y.safetensors", found)
    said = json.loads(weights.read_tensors(tmp_path / "y.safetensors").metadata["ditjax"])
    assert "network" not in said
    assert said["task"] == expected.task
    assert reading.load_network(tmp_path / "y.safetensors").config == expected


def test_of_the_paper_an_old_file_says_nothing_new(architecture_of):
    """Keys that the old form had are the paper's still."""
    said = {"ditjax": json.dumps(old_metadata())}
    found = architecture_of(fake(shapes_of(read({}))), metadata=said)
    assert found.config == read({})


@pytest.mark.parametrize(
    "change",
    [
        {"task": "evil.names.task"},
        {"config": {"model": {"kind": "evil.names"}}},
        {"config": {"diffusion": {"loss": "evil.names.loss"}}},
        {"config": {"sample": {"sampler": "evil.names.sampler"}}},
        {"config": {"sample": {"sampler": "os.system"}}},
    ],
    ids=["task", "network", "objective", "sampler", "standard library"],
)
def test_a_module_that_a_file_names_is_not_imported(change, tmp_path, monkeypatch):
    """It would be found in the folder where the command runs."""
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "__init__.py").write_text("")
    (tmp_path / "evil" / "names.py").write_text("open('run', 'w')\ndef loss(*a, **k): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    metadata = {**our_metadata(), **change}
    path = our_file(tmp_path / "x.safetensors", metadata, {"w": np.zeros(2, "f4")})
    with pytest.raises(
        UserError, match=r"x\.safetensors: its recipe names '(evil\.names|os\.).*trust it"
    ):
        reading.load_network(path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "illegal metadata for a ditjax file"),
        ("[]", "illegal metadata for a ditjax file"),
        ("{}", "illegal metadata for a ditjax file: KeyError('config')"),
        ('{"config": {}}', "illegal metadata for a ditjax file: KeyError('network')"),
        ("[" * 100_000, "illegal metadata for a ditjax file"),
        (json.dumps({"network": "dit", "config": None}), "illegal metadata"),
        (json.dumps({"network": "dit", "config": {"model": 3}}), "config.model is 3"),
        (json.dumps({"network": "dit", "config": [3]}), "illegal metadata"),
        (json.dumps({"network": [], "config": {}}), "config.task is []"),
        (json.dumps({"network": "gan", "config": {}}), "config.task: 'gan': expected one of"),
        (json.dumps(old_metadata("gan")), "config.task: 'gan': expected one of"),
        (json.dumps(our_metadata(task=None)), "config.task is None"),
        (json.dumps(our_metadata(task="gan")), "config.task: 'gan': expected one of"),
        (json.dumps(our_metadata(task="os.path")), "names 'os.path', a module outside of ditjax"),
        (json.dumps(our_metadata(task="autoencoder")), "config.diffusion is not a key"),
        (json.dumps(our_metadata(config={"model": {"kind": "gan"}})), "config.model.kind: 'gan'"),
        (json.dumps(our_metadata(config={"model": {"size": "7"}})), "model size '7' is unknown"),
        (json.dumps(our_metadata(config={"model": {"colour": 7}})), "colour is not a key"),
        (json.dumps(our_metadata(config={"model": {"patch": 2**61}})), ""),
        (json.dumps(our_metadata(config={"data": {"image_size": 2**60}})), "at most 16384"),
        (json.dumps(our_metadata()), "missing: blocks/adaln/linear/bias"),
    ],
    ids=range(21),
)
def test_metadata_that_do_not_hold(text, words, tmp_path):
    path = tmp_path / "x.safetensors"
    weights.write_safetensors(path, {"x": np.zeros(1, np.float32)}, {"ditjax": text})
    assert words in refusal(path)


# Pipelines.


SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "trained_betas": None,
}


def pipeline_folder(folder, index=None, **scheduler):
    diffusers_folder(folder / "transformer", "dit")
    diffusers_folder(folder / "vae", "autoencoder")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({**SCHEDULER, **scheduler})
    )
    index = {"_class_name": "DiTPipeline", **(index or {})}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_pipeline(tmp_path):
    labels = {"10": "beyond", "2": "Tinca tinca, tench", "0": " dog ,, cat"}
    folder = pipeline_folder(tmp_path, {"id2label": labels}, prediction_type="v_prediction")
    found = reading.load_pipeline(folder)
    assert found.dit.config.diffusion.prediction == "v"
    assert (found.dit.decodes, found.autoencoder.decodes) == (False, True)
    assert len(found.class_names) == 10
    assert found.class_names[0] == ("dog", "cat")
    assert found.class_names[2] == ("Tinca tinca", "tench")
    assert found.class_names[1] == ()
    assert "expected its folder 'transformer' or 'vae'" in refusal(folder)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({}, ("linear", "eps", 1000, False)),
        ({"prediction_type": "sample", "clip_sample": True}, ("linear", "x0", 1000, True)),
        ({"beta_schedule": "squaredcos_cap_v2"}, ("cosine", "eps", 1000, False)),
        (
            {"num_train_timesteps": 500, "beta_start": 2e-4, "beta_end": 0.04},
            ("linear", "eps", 500, False),
        ),
    ],
)
def test_the_process_of_a_scheduler(scheduler, expected, tmp_path):
    c = reading.load_pipeline(pipeline_folder(tmp_path, **scheduler)).dit.config
    d = c.diffusion
    assert (d.schedule, d.prediction, d.timesteps, c.sample.clip_x0) == expected


@pytest.mark.parametrize(("name", "clips"), [("DDIMScheduler", True), ("DPMSolverX", False)])
def test_clipping_where_the_scheduler_does_not_say(name, clips, tmp_path):
    folder = pipeline_folder(tmp_path)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": name}))
    assert reading.load_pipeline(folder).dit.config.sample.clip_x0 == clips


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"beta_schedule": "scaled_linear"}, "beta_schedule 'scaled_linear'"),
        ({"beta_schedule": ["linear"]}, "beta_schedule ['linear']"),
        ({"beta_schedule": None}, "beta_schedule None"),
        ({"prediction_type": {}}, "prediction_type {}"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps '1000'"),
        ({"num_train_timesteps": 1}, "num_train_timesteps 1"),
        ({"num_train_timesteps": True}, "num_train_timesteps True"),
        ({"num_train_timesteps": 10**400}, "from 2 to 1000000"),
        ({"num_train_timesteps": 500}, "beta from 0.0001 to 0.02"),
        ({"beta_start": "0.1"}, "beta from '0.1'"),
        ({"beta_end": None}, "to None"),
        ({"beta_end": 0.012}, "beta from 0.0001 to 0.012"),
        ({"beta_start": 0.00085}, "beta from 0.00085"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas is set"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is set"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas is set"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is a FlowMatchEulerDiscreteSched"),
        ({"_class_name": "EDMEulerScheduler"}, "is a EDMEulerScheduler: only schedulers of DDPM"),
    ],
    ids=str,
)
def test_schedulers_that_are_not_supported(scheduler, words, tmp_path):
    with pytest.raises(UserError, match=re.escape(words)):
        reading.load_pipeline(pipeline_folder(tmp_path, **scheduler))


def test_pipelines_that_are_none(tmp_path):
    folder = pipeline_folder(tmp_path, {"_class_name": "StableDiffusionPipeline"})
    with pytest.raises(
        UserError, match="describes a StableDiffusionPipeline: expected a DiTPipeline"
    ):
        reading.load_pipeline(folder)
    (folder / "model_index.json").write_text('{"_class_name": "DiTPipeline", "id2label": [1]}')
    with pytest.raises(UserError, match="id2label is not a JSON object"):
        reading.load_pipeline(folder)
    diffusers_folder(folder / "vae", "dit")
    with pytest.raises(UserError, match="expected an autoencoder"):
        reading.load_pipeline(folder)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    diffusers_folder(folder / "vae", "autoencoder")
    with pytest.raises(UserError, match=r"cannot read .*scheduler_config"):
        reading.load_pipeline(folder)
