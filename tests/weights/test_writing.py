"""There and back, bit for bit; and what other programs cannot say."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from ditjax.config import changed
from ditjax.errors import UserError
from ditjax.weights import reading, tensors, writing
from ditjax.weights.torch_file import read_torch, write_torch
from tests.weight_files import (
    FOLDER_WEIGHTS,
    assert_same,
    diffusers_folder,
    golden,
    release_state,
)

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])


def tensors_of(path):
    return tensors.read_tensors(path).tensors


@DTYPES
def test_release_to_everything_and_back(dtype, tmp_path):
    state = release_state(dtype)
    write_torch(tmp_path / "a.pt", state)
    first = reading.load_network(tmp_path / "a.pt", heads=3)
    writing.write_ditjax(tmp_path / "b.safetensors", first)
    second = reading.load_network(tmp_path / "b.safetensors")
    assert second.layout == "ditjax"
    assert second.config == first.config
    assert_same(second.leaves, first.leaves)
    writing.write_diffusers(tmp_path / "c", second)
    third = reading.load_network(tmp_path / "c")
    assert third.layout == "diffusers"
    writing.write_release(tmp_path / "d.pt", third)
    assert_same(tensors_of(tmp_path / "d.pt"), state)
    assert next(iter(read_torch(tmp_path / "d.pt"))) == "pos_embed"


@pytest.mark.parametrize("learned", [True, False])
def test_a_sit_there_and_back(learned, tmp_path):
    """Its own checkpoint, our file and again: the process, and channels that SiT does not read."""
    state = release_state(learned=learned)
    args = {"path_type": "GVP", "prediction": "noise", "num_classes": 10}
    write_torch(tmp_path / "a.pt", {"ema": state, "args": args})
    first = reading.load_network(tmp_path / "a.pt", heads=3)
    assert first.config.diffusion.variance == ("unused" if learned else "none")
    writing.write_ditjax(tmp_path / "b.safetensors", first)
    writing.write_sit(tmp_path / "c.pt", reading.load_network(tmp_path / "b.safetensors"))
    found = read_torch(tmp_path / "c.pt")
    assert_same(dict(found["ema"]), state)
    assert found["args"].items() >= {**args, "learn_sigma": learned}.items()
    second = reading.load_network(tmp_path / "c.pt")
    assert second.config == first.config
    assert_same(second.leaves, first.leaves)


@pytest.mark.parametrize(
    ("diffusion", "words"),
    [
        ({"time_scale": 1000.0}, "time_scale is 1000.0, and its code requires 1.0"),
        ({"time_from_noise": False}, "time_from_noise is False, and its code requires True"),
        ({"prediction": "x0"}, "prediction is 'x0', and its code requires 'velocity' or 'eps'"),
        (
            {"process": "ddpm", "time_scale": 1000.0, "time_from_noise": False, "prediction": "eps"}
            | {"variance": "fixed_small"},
            "process is 'ddpm', and its code requires 'flow' or 'gvp' or 'vp'",
        ),
    ],
)
def test_what_sit_does_not_have(diffusion, words, tmp_path):
    args = {"path_type": "Linear", "prediction": "velocity"}
    write_torch(tmp_path / "a.pt", {"ema": release_state(learned=False), "args": args})
    network = reading.load_network(tmp_path / "a.pt", heads=3)
    sample = {"sampler": "ddim", "last_step": 0.0}
    network = with_keys(network, diffusion=diffusion, sample=sample)
    with pytest.raises(UserError, match=f"SiT has no such network: .*{words}"):
        writing.write_sit(tmp_path / "b.pt", network)
    assert not (tmp_path / "b.pt").exists()


@DTYPES
def test_diffusers_to_everything_and_back(dtype, tmp_path):
    folder = diffusers_folder(tmp_path / "a", "dit", dtype)
    writing.write_release(tmp_path / "b.pt", reading.load_network(folder))
    release = reading.load_network(tmp_path / "b.pt", heads=3, numerics="diffusers")
    writing.write_ditjax(tmp_path / "c.safetensors", release)
    writing.write_diffusers(tmp_path / "d", reading.load_network(tmp_path / "c.safetensors"))
    assert_same(load_file(tmp_path / "d" / FOLDER_WEIGHTS), load_file(folder / FOLDER_WEIGHTS))
    theirs, ours = golden("dit_config"), json.loads((tmp_path / "d" / "config.json").read_text())
    assert {k: v for k, v in ours.items() if k[0] != "_"} == {
        k: v for k, v in theirs.items() if k[0] != "_"
    }
    assert ours["_class_name"] == "DiTTransformer2DModel"


@DTYPES
def test_an_autoencoder_to_everything_and_back(dtype, tmp_path):
    folder = diffusers_folder(tmp_path / "a", "autoencoder", dtype)
    first = reading.load_network(folder)
    writing.write_ldm(tmp_path / "b.ckpt", first)
    second = reading.load_network(tmp_path / "b.ckpt")
    assert (second.layout, second.config) == ("ldm", first.config)
    writing.write_ditjax(tmp_path / "c.safetensors", second)
    third = reading.load_network(tmp_path / "c.safetensors")
    assert third.config == first.config
    writing.write_diffusers(tmp_path / "d", third)
    assert_same(load_file(tmp_path / "d" / FOLDER_WEIGHTS), load_file(folder / FOLDER_WEIGHTS))
    ours = json.loads((tmp_path / "d" / "config.json").read_text())
    theirs = golden("autoencoder_config")
    differ = {k for k in ours if k[0] != "_" and ours[k] != theirs[k]}
    assert differ == {"sample_size"}, "which the weights do not say"


@pytest.fixture
def dit(tmp_path):
    return reading.load_network(diffusers_folder(tmp_path / "dit", "dit"))


@pytest.fixture
def autoencoder(tmp_path):
    return reading.load_network(diffusers_folder(tmp_path / "vae", "autoencoder"))


def with_keys(network, **sections):
    return network._replace(config=changed(network.config, sections))


def test_what_our_own_files_keep(dit, autoencoder, tmp_path):
    changes = {
        "model": {"frequency_shift": 0, "norm2_eps": 1e-3},
        "diffusion": {"prediction": "v", "schedule": "cosine"},
        "sample": {"steps": "ddim7", "cfg_scale": 2.5},
        "autoencoder": {"scale": 0.7, "path": "/home/someone"},
        "data": {"name": "folder:/secret"},
    }
    network = with_keys(dit, **changes)
    writing.write_ditjax(tmp_path / "x.safetensors", network)
    c = reading.load_network(tmp_path / "x.safetensors").config
    for section in ("model", "diffusion", "sample"):
        assert getattr(c, section) == getattr(network.config, section)
    assert c.autoencoder.scale == 0.7
    content = (tmp_path / "x.safetensors").read_bytes()
    assert b"someone" not in content
    assert b"secret" not in content
    assert json.loads(tensors_metadata(tmp_path / "x.safetensors"))["version"]


def tensors_metadata(path):
    return tensors.read_tensors(path).metadata["ditjax"]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"block": "in_context"}, "config.model.block is 'in_context'"),
        ({"block": "adaln"}, "config.model.block is 'adaln'"),
        ({"mlp_ratio": 2.0}, "config.model.mlp_ratio is 2.0"),
        (
            {"label_dropout": 0.0},
            "config.model.label_dropout is 0.0, and its code requires a null",
        ),
    ],
)
def test_what_other_programs_do_not_have(model, words, dit, autoencoder, tmp_path):
    network = with_keys(dit, model=model)
    out = tmp_path / "out"
    for program, write in (
        ("the public release", lambda: writing.write_release(out / "x.pt", network)),
        ("diffusers", lambda: writing.write_diffusers(out / "x", network)),
        ("diffusers", lambda: writing.write_pipeline(out, network, autoencoder, [()] * 10)),
    ):
        with pytest.raises(UserError) as caught:
            write()
        assert f"{program} has no such DiT: {words}" in str(caught.value)
    assert not out.exists(), "nothing half-written"


def test_a_pipeline_there_and_back(dit, autoencoder, tmp_path):
    network = with_keys(
        dit, diffusion={"prediction": "v", "timesteps": 500}, sample={"clip_x0": True}
    )
    network = with_keys(network, model={"norm2_eps": 1e-3})
    names = [("a b", "c")] + [(f"class {i}",) for i in range(1, 10)]
    writing.write_pipeline(tmp_path / "p", network, autoencoder, names)
    found = reading.load_pipeline(tmp_path / "p")
    assert found.class_names == tuple(names)
    assert_same(found.dit.leaves, dit.leaves)
    assert_same(found.autoencoder.leaves, autoencoder.leaves)
    assert found.dit.config.diffusion == network.config.diffusion
    assert found.dit.config.sample.clip_x0
    assert found.dit.config.model == network.config.model
    assert found.autoencoder.config.autoencoder == autoencoder.config.autoencoder
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    assert list(index["id2label"].items())[:2] == [("0", "a b, c"), ("1", "class 1")]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    scheduler = json.loads((tmp_path / "p" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["beta_end"] == pytest.approx(0.04), "scaled with T, as the release scales it"
    assert (scheduler["clip_sample"], scheduler["prediction_type"]) == (True, "v_prediction")
    vae = json.loads((tmp_path / "p" / "vae" / "config.json").read_text())
    assert vae["sample_size"] == 32


def test_a_pipeline_that_does_not_fit_writes_nothing(dit, autoencoder, tmp_path):
    for first, second, count, words in (
        (dit, autoencoder, 9, "9 class names for 10 classes"),
        (dit, dit, 10, "expected an autoencoder"),
        (with_keys(dit, autoencoder={"latent_channels": 3}), autoencoder, 10, "do not belong"),
    ):
        with pytest.raises(UserError, match=words):
            writing.write_pipeline(tmp_path / "p", first, second, [("x",)] * count)
    assert not (tmp_path / "p").exists()


def test_what_is_in_the_way(dit, autoencoder, tmp_path):
    (tmp_path / "file").write_text("mine")
    for write in (
        lambda: writing.write_diffusers(tmp_path / "file", dit),
        lambda: writing.write_pipeline(tmp_path / "file", dit, autoencoder, [("x",)] * 10),
        lambda: writing.write_ditjax(tmp_path, dit),
        lambda: writing.write_release(tmp_path, dit),
        lambda: writing.write_ldm(tmp_path / "file" / "x", autoencoder),
    ):
        with pytest.raises(UserError, match="cannot write"):
            write()
    assert (tmp_path / "file").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))
