"""python -m ditjax.convert: every direction, its refusals, and what is left after them."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ditjax import cli, convert, sample
from ditjax.config import read
from ditjax.data.classes import class_names
from ditjax.errors import UserError
from ditjax.files import hub
from ditjax.files.assets import flatten, unflatten
from ditjax.files.atomic import write_json
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening, rundir
from ditjax.runs.checkpoint import Checkpoints
from ditjax.sampling.pipeline import Pipeline
from ditjax.tasks import make_task
from ditjax.training.program import training
from ditjax.weights import networks, reading, tensors, writing
from ditjax.weights.torch_file import write_torch
from tests.commands.conftest import TINY
from tests.seeded import seeded_state
from tests.weight_files import FOLDER_WEIGHTS, assert_same, diffusers_folder, release_state


def run(*words):
    assert convert.main([str(word) for word in words]) == 0


def test_round_trip_of_a_release_checkpoint(tmp_path, capsys):
    state = release_state(np.float16)
    write_torch(tmp_path / "a.pt", {"ema": state, "model": {}, "args": {"lr": 1}})
    run(f"--weights={tmp_path}/a.pt", "--to=diffusers", f"--out={tmp_path}/b", "--heads=3")
    out = capsys.readouterr().out
    assert f"{len(state)} tensors of 'ema' taken, none left out" in out
    count = sum(x.size for name, x in state.items() if name != "pos_embed")
    assert f"DiT-2x48x3/4, {count:,} parameters of float16" in out
    assert "(release) ->" in out
    assert (
        "note: the two programs embed timesteps differently (frequencies over 128 here, 127" in out
    )
    run(f"--weights={tmp_path}/b", "--to=ditjax", f"--out={tmp_path}/c.safetensors")
    assert "note" not in capsys.readouterr().out
    run(f"--weights={tmp_path}/c.safetensors", "--to=release", f"--out={tmp_path}/d.pt")
    assert "over 127 here, 128 there" in capsys.readouterr().out
    assert_same(tensors.read_tensors(tmp_path / "d.pt").tensors, state)
    run(
        f"--weights={tmp_path}/a.pt",
        "--to=diffusers",
        f"--out={tmp_path}/e",
        "--heads=3",
        "--numerics=diffusers",
    )
    assert "note" not in capsys.readouterr().out


def test_which(tmp_path):
    ema, model = release_state(), release_state()
    model["x_embedder.proj.bias"] = model["x_embedder.proj.bias"] * 2
    write_torch(tmp_path / "a.pt", {"ema": ema, "model": model})
    for which, expected in (("ema", ema), ("model", model)):
        out = tmp_path / f"{which}.pt"
        words = ("--to=release", f"--out={out}", "--heads=3", f"--which={which}")
        run(f"--weights={tmp_path}/a.pt", *words)
        assert_same(tensors.read_tensors(out).tensors, expected)


def test_round_trip_of_an_autoencoder(tmp_path, capsys):
    folder = diffusers_folder(tmp_path / "a", "autoencoder")
    run(f"--weights={folder}", "--to=ldm", f"--out={tmp_path}/b.ckpt")
    assert "KL autoencoder (f=2)" in capsys.readouterr().out
    run(f"--weights={tmp_path}/b.ckpt", "--to=ditjax", f"--out={tmp_path}/c.safetensors")
    run(f"--weights={tmp_path}/c.safetensors", "--to=diffusers", f"--out={tmp_path}/d")
    assert_same(load_file(tmp_path / "d" / FOLDER_WEIGHTS), load_file(folder / FOLDER_WEIGHTS))


def test_a_pipeline(tmp_path, capsys):
    dit = diffusers_folder(tmp_path / "dit", "dit")
    vae = diffusers_folder(tmp_path / "vae", "autoencoder")
    words = ("--to=pipeline", f"--out={tmp_path}/p", f"--autoencoder={vae}")
    run(f"--weights={dit}", *words)
    note = "DiTPipeline takes class 1000 for the null label, and this DiT's is 10"
    assert note in capsys.readouterr().out
    found = reading.load_pipeline(tmp_path / "p")
    assert found.class_names[3] == ("3",)
    # And again, with another autoencoder.
    run(f"--weights={vae}", "--to=ldm", f"--out={tmp_path}/vae.ckpt")
    run(f"--weights={tmp_path}/p", "--to=pipeline", f"--out={tmp_path}/q")
    for part in ("transformer", "vae"):
        for name in (FOLDER_WEIGHTS, "config.json"):
            assert (tmp_path / "q" / part / name).read_bytes() == (
                tmp_path / "p" / part / name
            ).read_bytes()
    assert (tmp_path / "p" / "model_index.json").read_bytes() == (
        tmp_path / "q" / "model_index.json"
    ).read_bytes()
    other = tensors.read_tensors(tmp_path / "vae.ckpt").tensors
    other["encoder.conv_in.bias"] = other["encoder.conv_in.bias"] + 1
    write_torch(tmp_path / "vae2.ckpt", {"state_dict": other, "norm_num_groups": 8})
    run(
        f"--weights={tmp_path}/p",
        "--to=pipeline",
        f"--out={tmp_path}/r",
        f"--autoencoder={tmp_path}/vae2.ckpt",
    )
    state = load_file(tmp_path / "r" / "vae" / FOLDER_WEIGHTS)
    np.testing.assert_array_equal(state["encoder.conv_in.bias"], other["encoder.conv_in.bias"])


def test_imagenet_pipelines_are_named(tmp_path, capsys):
    write_torch(tmp_path / "a.pt", release_state(classes=1000))
    vae = diffusers_folder(tmp_path / "vae", "autoencoder")
    run(
        f"--weights={tmp_path}/a.pt",
        "--to=pipeline",
        f"--out={tmp_path}/p",
        "--heads=3",
        f"--autoencoder={vae}",
        "--class_names=imagenet",
    )
    assert "DiTPipeline takes class" not in capsys.readouterr().out
    labels = json.loads((tmp_path / "p" / "model_index.json").read_text())["id2label"]
    assert labels["207"] == "golden retriever"
    assert labels["0"] == "tench, Tinca tinca"
    assert len(labels) == 1000


def test_class_names_travel_through_diffusers_files(tmp_path):
    """Into the metadata of a model folder and a pipeline's labels, and back to a network."""
    write_torch(tmp_path / "a.pt", release_state(classes=1000))
    vae = diffusers_folder(tmp_path / "vae", "autoencoder")
    words = ("--to=diffusers", f"--out={tmp_path}/b", "--heads=3", "--class_names=imagenet")
    run(f"--weights={tmp_path}/a.pt", *words)
    run(f"--weights={tmp_path}/b", "--to=ditjax", f"--out={tmp_path}/c.safetensors")
    run(
        f"--weights={tmp_path}/c.safetensors",
        "--to=pipeline",
        f"--out={tmp_path}/p",
        f"--autoencoder={vae}",
    )
    names = [
        reading.load_network(tmp_path / "b").class_names,
        reading.load_network(tmp_path / "c.safetensors").class_names,
        reading.load_network(tmp_path / "p" / "transformer").class_names,
        reading.load_pipeline(tmp_path / "p").class_names,
    ]
    assert names == [class_names()] * 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's directory at step 20, its average other than its parameters, without the training."""
    workdir = tmp_path_factory.mktemp("run")
    recipe = cli.load_recipe([*TINY, "--config.sample.batch_size=8"])
    c, mesh = read(recipe), make_mesh(-1, 1)
    rundir.open_directory(workdir, recipe)
    state = training(c, make_task(c, mesh), mesh).init()
    shapes = {path: leaf.shape for path, leaf in flatten(state.ema["params"]).items()}
    ema = opening.put_on_mesh({"params": unflatten(seeded_state(shapes, 3))}, mesh)
    with Checkpoints(workdir / rundir.CHECKPOINTS, keep=1) as checkpoints:
        checkpoints.save(20, state._replace(ema=ema), {})
    return workdir


def test_a_run(finished, tmp_path, capsys):
    """Its averaged weights, and bit for bit its images."""
    out = tmp_path / "run.safetensors"
    run(f"--weights={finished}", "--to=ditjax", f"--out={out}")
    assert "(ditjax) ->" in capsys.readouterr().out
    config = opening.recipe_of(finished)
    params, step = opening.load_weights(config, make_task(config), finished, make_mesh(-1, 1))
    assert step == 20
    network = networks.from_run(config, params)
    assert_same(reading.load_network(out).leaves, network.leaves)
    theirs, ours = Pipeline.from_pretrained(finished), Pipeline.from_pretrained(out)
    assert ours.config.model == theirs.config.model
    assert ours.config.sample == theirs.config.sample
    arguments: dict[str, Any] = {
        "classes": [3, 1],
        "num": 4,
        "seed": 9,
        "cfg_scale": 2.0,
        "quiet": True,
    }
    np.testing.assert_array_equal(ours(**arguments).array, theirs(**arguments).array)
    run(f"--weights={finished}", "--to=release", f"--out={tmp_path}/run.pt")
    again = reading.load_network(tmp_path / "run.pt", heads=2)
    assert_same(again.leaves, network.leaves)
    vae = diffusers_folder(tmp_path / "vae", "autoencoder")
    with pytest.raises(UserError, match="do not belong together"):
        run(f"--weights={finished}", "--to=pipeline", f"--out={tmp_path}/p", f"--autoencoder={vae}")


def test_a_card_has_the_scores_of_its_own_step_alone(finished, tmp_path, capsys, monkeypatch):
    pushed = []

    def push(*found):
        pushed.append(found)
        return "there"

    monkeypatch.setattr(hub, "check_push", lambda repo: None)
    monkeypatch.setattr(hub, "push", push)
    record = {"metrics": {"fd_digits": 5.0}, "reference": "", "protocol": {}, "protocol_hash": "0"}
    for step, said in ((20, "its scores"), (10, "no scores: none of this step are on record")):
        write_json(finished / "evaluation.json", {"step": step, **record})
        words = ("--to=ditjax", f"--out={tmp_path}/a.safetensors", "--push=me/one")
        run(f"--weights={finished}", *words)
        assert f"pushed to there, with a card that has {said}" in capsys.readouterr().out
    (finished / "evaluation.json").unlink()
    (repo, path, first), (_, _, second) = pushed
    assert (repo, path) == ("me/one", tmp_path / "a.safetensors")
    assert "| FD-digits | 5.00 | - |" in first
    assert "FD-digits" not in second
    assert '| `model.size` | `"1x32x2"` |' in first
    assert str(tmp_path) not in first


def test_sampling_a_run_as_weights(finished, tmp_path, capsys):
    with pytest.raises(UserError, match="is a run, whose recipe names its autoencoder"):
        sample.main([f"--weights={finished}", "--autoencoder=x", "--out=x"])
    more = [f"--out={tmp_path}", "--num=2", "--steps=ddim2", "--cfg_scale=1"]
    assert sample.main([f"--weights={finished}", *more]) == 0
    assert "classes: 10, and a null label\n" in capsys.readouterr().out
    record = json.loads((tmp_path / "samples.json").read_text())
    assert (record["run"], record["step"]) == (str(finished), 20)


def test_flags_of_weights_files_for_a_run(finished, tmp_path):
    """They would have no effect."""
    for flag in ("--which=model", "--heads=2", "--num_classes=10", "--leave_out=x"):
        name = flag.partition("=")[0]
        with pytest.raises(UserError, match=f"{name} is for weights files, and .* is a run"):
            run(f"--weights={finished}", "--to=release", f"--out={tmp_path}/x.pt", flag)
        with pytest.raises(UserError, match=f"{name} is for weights files, and .* is a run"):
            sample.main([f"--weights={finished}", f"--out={tmp_path}/out", flag])


def test_another_block_has_only_our_format(tmp_path):
    c = read({"model": {"size": "1x16x2", "block": "in_context"}})
    leaves = seeded_state(networks.shapes_of(c), 0)
    network = networks.LoadedNetwork(c, {"params": unflatten(leaves)}, "ditjax", ())
    source = writing.write_ditjax(tmp_path / "a.safetensors", network)
    for target in ("release", "diffusers"):
        with pytest.raises(UserError, match=r"config\.model\.block is 'in_context'"):
            run(f"--weights={source}", f"--to={target}", f"--out={tmp_path}/out")
    assert not (tmp_path / "out").exists()
    run(f"--weights={source}", "--to=ditjax", f"--out={tmp_path}/out")
    assert (tmp_path / "out").read_bytes() == source.read_bytes()


@pytest.fixture
def files(tmp_path):
    diffusers_folder(tmp_path / "dit", "dit")
    diffusers_folder(tmp_path / "vae", "autoencoder")
    write_torch(tmp_path / "dit.pt", release_state())
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "page.pt").write_bytes(b"<!DOCTYPE html><html><body>404")
    (tmp_path / "noise.pt").write_bytes(np.random.default_rng(0).bytes(1024))
    content = (tmp_path / "dit" / FOLDER_WEIGHTS).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-9])
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("source", "words", "match"),
    [
        ("dit", ("--to=ldm",), "holds a DiT-2x48x3/4: --to=ldm takes the other kind"),
        ("vae", ("--to=release",), "holds a KL autoencoder .*: --to=release takes the other kind"),
        ("vae", ("--to=pipeline",), "--to=pipeline takes the other kind"),
        ("dit", ("--to=pipeline",), "--to=pipeline needs the DiT's --autoencoder"),
        ("dit", ("--to=pipeline", "--autoencoder=dit"), "expected an autoencoder"),
        ("dit", ("--to=release", "--autoencoder=vae"), "--autoencoder goes with --to=pipeline"),
        ("dit.pt", ("--to=ditjax",), "give --heads=N"),
        ("dit.pt", ("--to=ditjax", "--heads=5"), "5 attention heads for a width of 48"),
        ("dit", ("--to=torch",), "invalid choice: 'torch'"),
        ("empty.pt", ("--to=ditjax",), "is empty"),
        ("page.pt", ("--to=ditjax",), "is a web page"),
        ("noise.pt", ("--to=ditjax",), "is not a file of torch.save"),
        ("cut.safetensors", ("--to=ditjax",), "is not a sound safetensors file"),
        ("folder", ("--to=ditjax",), "has no config.json"),
        ("none", ("--to=ditjax",), "does not exist"),
    ],
)
def test_refusals_write_nothing(source, words, match, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    before = sorted(path for path in files.rglob("*"))
    argv = ["convert", f"--weights={source}", "--out=out", *words]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        cli.run(convert.main)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    with pytest.raises(UserError, match=match):
        convert.main(argv[1:])
    assert sorted(path for path in files.rglob("*")) == before


def test_a_pipelines_networks_are_converted_one_by_one(files):
    (files / "folder" / "model_index.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"folder/transformer or .*folder/vae, or give --to=pipeline"
    ):
        convert.main([f"--weights={files / 'folder'}", "--to=ditjax", f"--out={files / 'out'}"])


@pytest.mark.parametrize(
    ("command", "source"),
    [("convert", "noise.pt"), ("convert", "cut.safetensors"), ("sample", "vae")],
)
def test_as_a_process(command, source, files):
    words = [f"--weights={files / source}", f"--out={files / 'out'}"]
    words += ["--to=ditjax"] if command == "convert" else []
    done = subprocess.run(
        [sys.executable, "-m", f"ditjax.{command}", *words],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (files / "out").exists()
