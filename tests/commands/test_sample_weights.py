"""sample, encode and train on weights files: flags, records, refusals."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from ditjax import convert, encode, sample, train
from ditjax.cli import load_recipe
from ditjax.config import read
from ditjax.errors import UserError
from ditjax.files.assets import unflatten
from ditjax.parallel.mesh import make_mesh
from ditjax.runs.results import load_samples
from ditjax.sampling.draw import decoder_of
from ditjax.sampling.pipeline import open_run_source
from ditjax.tasks import make_task
from ditjax.weights import networks, reading, writing
from ditjax.weights.torch_file import write_torch
from tests.commands.conftest import LATENTS
from tests.seeded import seeded_state
from tests.weight_files import FOLDER_WEIGHTS, release_state


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small folders of diffusers: a latent DiT, and the autoencoder of its latents."""
    root = tmp_path_factory.mktemp("files")
    write_torch(root / "dit.pt", release_state(depth=1, width=16, patch=2, side=4))
    dit = reading.load_network(root / "dit.pt", heads=2, numerics="diffusers")
    writing.write_diffusers(root / "dit", dit)
    sections = {"base_width": 4, "multipliers": (1, 2), "res_blocks": 1, "groups": 2}
    c = read({"task": "autoencoder", "autoencoder": sections})
    leaves = seeded_state(networks.shapes_of(c), 0)
    vae = networks.LoadedNetwork(c, {"params": unflatten(leaves)}, "ditjax", ())
    writing.write_diffusers(root / "vae", vae)
    return root


def words(files, out, *more):
    return [
        f"--weights={files / 'dit'}",
        f"--autoencoder={files / 'vae'}",
        f"--out={out}",
        "--steps=ddim2",
        "--sampler=ddim",
        "--num=8",
        *more,
    ]


def record_of(folder):
    return json.loads((folder / "samples.json").read_text())


def test_sample_from_weights(files, tmp_path, capsys):
    more = ("--classes=7,3", "--cfg_scale=1.5", "--seed=5", "--precision=float32", "--eta=0.5")
    assert sample.main(words(files, tmp_path / "a", *more)) == 0
    out = capsys.readouterr().out
    assert f"8 images in {tmp_path}/a" in out
    assert "classes: 10, and a null label\n" in out
    images, label = load_samples(tmp_path / "a" / "samples.npz")
    assert images.shape == (8, 8, 8, 3)
    assert images.std() > 5
    np.testing.assert_array_equal(label, [7, 3] * 4)
    with Image.open(tmp_path / "a" / "samples.png") as grid:
        assert grid.size == (4 * (2 * 8 + 1), 4 * (4 * 8 + 3))
    record = record_of(tmp_path / "a")
    digest = hashlib.sha256((files / "dit" / FOLDER_WEIGHTS).read_bytes()).hexdigest()
    assert record["weights"]["sha256"] == digest
    assert record["autoencoder"]["files"] == [str(files / "vae" / FOLDER_WEIGHTS)]
    assert (record["seed"], record["classes"]) == (5, [7, 3])
    expected = {
        "num": 8,
        "cfg_scale": 1.5,
        "cfg_channels": "all",
        "steps": "ddim2",
        "sampler": "ddim",
        "eta": 0.5,
    }
    assert {key: record["sample"][key] for key in expected} == expected
    assert (record["model"]["dtype"], record["model"]["matmul"]) == ("float32", "float32")
    assert record["seconds"] > 0

    # The recipe's keys say the same as the flags, and what the record holds makes it again.
    again = [
        "--config.seed=5",
        "--config.sample.cfg_scale=1.5",
        "--config.sample.eta=0.5",
        "--config.model.matmul=float32",
        "--classes=7,3",
        "--batch_size=8",
    ]
    assert sample.main(words(files, tmp_path / "b", *again)) == 0
    np.testing.assert_array_equal(load_samples(tmp_path / "b" / "samples.npz")[0], images)
    same = {**record_of(tmp_path / "b"), "seconds": record["seconds"]}
    assert same == record


def test_a_whole_recipe_beside_weights(files, tmp_path):
    """--config=FILE is the recipe then: it must be of the weights' architecture."""
    recipe = (
        "--config=experiments/base.py:1x16x2/2",
        "--config.data.num_classes=10",
        "--config.data.image_size=8",
        "--config.autoencoder.base_width=4",
        "--config.autoencoder.multipliers=(1,2)",
        "--config.autoencoder.res_blocks=1",
        "--config.autoencoder.groups=2",
        "--config.sample.batch_size=8",
    )
    assert sample.main(words(files, tmp_path, *recipe, "--config.sample.cfg_scale=2.0")) == 0
    record = record_of(tmp_path)
    assert record["sample"]["cfg_scale"] == 2.0
    assert record["sample"]["cfg_channels"] == "three", "the recipe's, not the weights'"
    match = (
        "the recipe describes another network than the weights at .*, a DiT-1x16x2/2: do not change"
    )
    with pytest.raises(UserError, match=match):
        sample.main(words(files, tmp_path, *recipe, "--config.data.num_classes=11"))


def pixel_words(path, out, *more):
    return [
        f"--weights={path}",
        f"--out={out}",
        "--heads=2",
        "--steps=ddim2",
        "--sampler=ddim",
        "--num=8",
        "--cfg_scale=1",
        "--classes=1",
        *more,
    ]


TINY_RELEASE = {"depth": 1, "width": 16, "side": 8, "channels": 1}


def test_the_state_of_a_checkpoint_is_on_record(tmp_path):
    """The same file, the same SHA-256, other images."""
    ema, model = release_state(**TINY_RELEASE), release_state(**TINY_RELEASE)
    model["final_layer.linear.bias"] = model["final_layer.linear.bias"] * 3
    write_torch(tmp_path / "x.pt", {"ema": ema, "model": model})
    images = []
    for which in ("ema", "model"):
        out = tmp_path / which
        assert sample.main(pixel_words(tmp_path / "x.pt", out, f"--which={which}")) == 0
        assert record_of(out)["weights"]["which"] == which
        images.append(load_samples(out / "samples.npz")[0])
    assert (images[0] != images[1]).any()


def test_a_dit_without_a_null_label_is_not_guided(tmp_path, capsys):
    """Its last row is a class like the others."""
    write_torch(tmp_path / "x.pt", {"ema": release_state(**TINY_RELEASE), "args": {}})
    words = pixel_words(tmp_path / "x.pt", tmp_path / "out", "--num_classes=11")
    words = [word for word in words if not word.startswith(("--cfg_scale", "--classes"))]
    assert sample.main([*words, "--classes=10"]) == 0
    assert "classes: 11, no null label\n" in capsys.readouterr().out
    assert record_of(tmp_path / "out")["sample"]["cfg_scale"] == 1.0
    np.testing.assert_array_equal(load_samples(tmp_path / "out" / "samples.npz")[1], [10] * 8)
    with pytest.raises(UserError, match="guidance needs the null label"):
        sample.main([*words, "--cfg_scale=4"])
    assert sample.main(pixel_words(tmp_path / "x.pt", tmp_path / "bare")) == 0
    out = capsys.readouterr().out
    assert "the last of 11 rows of its label table is taken for the null label" in out
    assert "classes: 10, and a null label\n" in out


def test_numerics_are_on_record(tmp_path):
    write_torch(tmp_path / "x.pt", release_state(**TINY_RELEASE))
    images = []
    for numerics in ("auto", "diffusers"):
        out = tmp_path / numerics
        assert sample.main(pixel_words(tmp_path / "x.pt", out, f"--numerics={numerics}")) == 0
        images.append(load_samples(out / "samples.npz")[0])
        assert record_of(out)["model"]["frequency_shift"] == int(numerics == "diffusers")
    assert (images[0] != images[1]).any()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--num=0",), "config.sample.num is 0"),
        (("--num=x",), "argument --num: invalid int value"),
        (("--steps=0",), "respacing '0'"),
        (("--steps=2000",), "respacing '2000'"),
        (("--cfg_scale=-1",), "cfg_scale is -1.0"),
        (("--cfg_scale=nan",), "cfg_scale is nan"),
        (("--seed=-1",), "config.seed is -1"),
        (
            ("--batch_size=3",),
            "not divisible by the mesh's data x fsdp = 8; the next size that is: 8",
        ),
        (("--sampler=eular",), "sampler: 'eular': expected one of 'ddpm', 'ddim'"),
        (("--precision=fp8",), "invalid choice: 'fp8'"),
        (("--classes=golden_retriever",), "class numbers from 0 to 9"),
        (("--classes=10",), "class numbers from 0 to 9"),
        (("--config.model.size=2x16x2",), "describes another network than .* a DiT-1x16x2/2"),
        (("--config.sample.nun=1",), "Did you mean 'sample.num'"),
        (("--weight=x", "--workdir=y"), "not allowed with argument"),
        (("--numb=1",), "'--numb=1' is not a flag of this command"),
    ],
)
def test_flags_out_of_range(more, match, files, tmp_path):
    with pytest.raises(UserError, match=match):
        sample.main(words(files, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_told_before_the_work(files, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="out is a file: give a folder"):
        sample.main(words(files, tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_sources(files, tmp_path):
    with pytest.raises(UserError, match="one of the arguments --workdir --weights is required"):
        sample.main(["--out=x"])
    with pytest.raises(UserError, match="on latents: give the autoencoder"):
        sample.main([f"--weights={files / 'dit'}", f"--out={tmp_path}"])


# The autoencoder of a latent recipe.


def latent_words(path):
    return [
        *LATENTS,
        "--config.autoencoder.base_width=4",
        "--config.autoencoder.multipliers=(1,2)",
        "--config.autoencoder.groups=2",
        "--config.autoencoder.res_blocks=1",
        "--config.data.channels=3",
        "--config.data.image_size=16",
        "--config.train.batch_size=8",
        "--config.sample.batch_size=8",
        "--config.train.steps=3",
        f"--config.autoencoder.path={path}",
    ]


def test_a_published_autoencoder_in_a_recipe(files, tmp_path):
    """A folder, latent diffusion's file or ours: the same latents, and a run remembers them."""
    vae = str(files / "vae")
    for target, name in (("ldm", "vae.ckpt"), ("ditjax", "vae.safetensors")):
        convert.convert(vae, target, str(tmp_path / name))
    frozen = [
        make_task(read(load_recipe(latent_words(path)))).frozen(make_mesh(-1, 1))
        for path in (vae, tmp_path / "vae.ckpt", tmp_path / "vae.safetensors")
    ]
    digests = {decoder_of(each) for each in frozen}
    assert len(digests) == 1
    workdir = tmp_path / "run"
    assert train.main([*latent_words(vae), f"--workdir={workdir}"]) == 0
    source = open_run_source(workdir)
    _, decoder = source.load(source.config, make_mesh(-1, 1))
    assert decoder_of(decoder) in digests
    assert source.record == {"run": str(workdir), "step": 3, "autoencoder": vae}


@pytest.mark.parametrize(
    ("name", "more", "match"),
    [
        ("dit", (), r"path=.*dit holds another network \(task 'diffusion'\): expected an auto"),
        ("none", (), "none does not exist"),
        (
            "vae",
            ("--config.autoencoder.groups=4",),
            "groups is 4, and the autoencoder at .* with 2",
        ),
        ("vae", ("--config.data.channels=1",), "channels is 1, and the autoencoder"),
    ],
)
def test_an_autoencoder_that_does_not_fit_a_recipe(name, more, match, files, tmp_path):
    with pytest.raises(UserError, match=match):
        encode.main([*latent_words(files / name), *more, f"--out={tmp_path / 'latents'}"])
    assert not (tmp_path / "latents").exists()
