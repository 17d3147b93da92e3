"""The Python API: what an image depends on, what is refused, and what the record says."""

import dataclasses
import hashlib
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from ditjax import __version__
from ditjax.config import changed, read, replaced
from ditjax.data.classes import class_names
from ditjax.errors import UserError
from ditjax.files.assets import unflatten
from ditjax.sampling import pipeline
from ditjax.sampling.pipeline import Pipeline, open_source
from ditjax.tasks import diffusion
from ditjax.training.program import precise
from ditjax.weights import networks, reading, tensors, writing
from ditjax.weights.torch_file import write_torch
from tests.seeded import seeded_state
from tests.weight_files import FOLDER_WEIGHTS, diffusers_folder, golden, release_state

FAST: dict[str, Any] = {"steps": "ddim2", "sampler": "ddim", "quiet": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    diffusers_folder(root / "dit", "dit")
    diffusers_folder(root / "vae", "autoencoder")
    return root


@pytest.fixture(scope="module")
def latent(folders):
    return Pipeline.from_pretrained(folders / "dit", folders / "vae")


def ours(path, *, channels=1, classes=10, **sections):
    """A tiny pixel DiT of seeded weights in our own format."""
    c = read(
        {
            "model": {"size": "1x16x2", "patch": 4, **sections.get("model", {})},
            "data": {"image_size": 8, "channels": channels, "num_classes": classes},
            "autoencoder": {"kind": "none"},
            "sample": {"cfg_channels": "all", "cfg_scale": 1.5},
        }
    )
    leaves = seeded_state(networks.shapes_of(c), 5)
    network = networks.LoadedNetwork(c, {"params": unflatten(leaves)}, "ditjax", (path,))
    return writing.write_ditjax(path, network)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    return Pipeline.from_pretrained(ours(tmp_path_factory.mktemp("ours") / "x.safetensors"))


def test_an_image_is_a_function_of_seed_index_and_class(pixels):
    whole = pixels([1, 2, 3], num=24, seed=3, **FAST)
    assert whole.label.tolist() == [1, 2, 3] * 8
    assert len({x.tobytes() for x in whole.array}) == 24
    batches = pixels([1, 2, 3], num=24, seed=3, batch_size=8, **FAST)
    np.testing.assert_array_equal(batches.array, whole.array)
    np.testing.assert_array_equal(pixels([1, 2, 3], num=5, seed=3, **FAST).array, whole.array[:5])
    other = pixels([1, 9, 3], num=3, seed=3, **FAST).array
    np.testing.assert_array_equal(other[[0, 2]], whole.array[[0, 2]])
    assert (other[1] != whole.array[1]).any()
    assert (pixels([1], seed=4, **FAST).array != whole.array[:1]).any()


def test_nothing_is_compiled_twice(pixels, monkeypatch):
    """Not for other classes, scales and seeds: an XL/2 compiles for a minute."""
    traced = traces(monkeypatch)
    draw = Pipeline(pixels._source, pixels.config)
    first = draw([1, 2], seed=0, **FAST)
    assert len(traced) == 1
    draw([3, 4], seed=1, cfg_scale=3.0, **FAST)
    again = draw([1, 2], seed=0, **FAST)
    assert len(traced) == 1
    np.testing.assert_array_equal(again.array, first.array)
    draw([1, 2], cfg_scale=1.0, **FAST)  # unguided: half the batch, another program
    assert len(traced) == 2


def traces(monkeypatch):
    """A list that grows by the matmul precision in force each time that a sampler is traced."""
    found = []
    made = diffusion.make_sampler

    def make(*args):
        sample = made(*args)

        def traced(*values):
            found.append(jax.config.jax_default_matmul_precision)  # type: ignore[attr-defined]
            return sample(*values)

        return traced

    monkeypatch.setattr(diffusion, "make_sampler", make)
    return found


def test_guidance_and_steps_are_heard(pixels):
    drawn = [
        pixels([1], **{**FAST, **more}).array.tobytes()
        for more in (
            {},
            {"cfg_scale": 4.0},
            {"steps": 3, "sampler": "ddpm"},
        )
    ]
    assert len(set(drawn)) == len(drawn)


def test_uniform_classes(pixels):
    drawn = pixels(num=24, seed=1, **FAST)
    assert len(set(drawn.label.tolist())) > 4
    np.testing.assert_array_equal(drawn.label, pixels("", num=24, seed=1, **FAST).label)
    assert (drawn.label != pixels(num=24, seed=2, **FAST).label).any()
    assert drawn.record["classes"] is None
    # The label of image i is a part of what it depends on.
    np.testing.assert_array_equal(pixels(drawn.label.tolist(), seed=1, **FAST).array, drawn.array)


def test_what_classes_may_be(pixels):
    assert pixels.labels([1, "2", np.int64(3)]) == [1, 2, 3]
    assert pixels.labels(np.array([4, 5])) == [4, 5]
    assert pixels.labels("1, 2") == [1, 2]
    for empty in ([], [""]):
        with pytest.raises(UserError, match="class numbers from 0 to 9"):
            pixels.labels(empty)


def test_what_was_read_is_printed(folders, capsys):
    Pipeline.from_pretrained(folders / "dit", folders / "vae")
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^.*/", "", line) for line in lines] == [
        f"dit: {len(golden('dit_shapes'))} tensors taken, none left out",
        f"vae: {len(golden('autoencoder_shapes'))} tensors taken, none left out",
        "classes: 10, and a null label",
    ]


def test_images(pixels, latent, tmp_path):
    grey = pixels([1], **FAST)
    assert grey.images[0].mode == "L"
    assert grey.images[0].size == (8, 8)
    grey.images[0].save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as read:
        np.testing.assert_array_equal(np.asarray(read), grey.array[0, :, :, 0])
    colour = latent([1], **FAST)
    assert colour.images[0].mode == "RGB"
    assert colour.images[0].size == (32, 32)
    np.testing.assert_array_equal(np.asarray(colour.images[0]), colour.array[0])
    assert colour.array.std() > 5, "a flat image compares with anything"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num": 0}, "config.sample.num is 0"),
        ({"num": -1}, "config.sample.num is -1"),
        ({"seed": -1}, "config.seed is -1"),
        ({"seed": 2**64}, "below 2\\*\\*62"),
        ({"cfg_scale": -1.0}, "cfg_scale is -1.0"),
        ({"cfg_scale": float("nan")}, "cfg_scale is nan"),
        ({"cfg_scale": "4"}, "cfg_scale is '4'"),
        ({"steps": 0}, "respacing '0'"),
        ({"steps": 1001}, "respacing '1001'"),
        ({"steps": 2.5}, "respacing '2.5'"),
        ({"steps": "ddim"}, "respacing 'ddim'"),
        ({"sampler": "eular"}, "sampler: 'eular': expected one of 'ddpm', 'ddim'"),
        ({"sampler": "euler"}, "sampler is 'euler', which integrates dx/dt"),
        ({"eta": 2.0}, "eta is 2.0"),
        ({"cfg_channels": "three"}, "cfg_channels is 'three' and the input has 1"),
        ({"batch_size": 3}, "batch_size is 3: not divisible by the mesh's data x fsdp = 8"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"classes": [10]}, "class numbers from 0 to 9"),
        ({"classes": "golden_retriever"}, "class numbers from 0 to 9"),
    ],
    ids=str,
)
def test_arguments_out_of_range(pixels, arguments, words):
    with pytest.raises(UserError, match=words):
        pixels(**{"classes": [1], **FAST, **arguments})


def test_a_batch_that_the_recipe_chose_is_fitted_to_the_devices(pixels, monkeypatch):
    monkeypatch.setattr(pixels, "config", changed(pixels.config, {"sample": {"batch_size": 3}}))
    drawn = pixels([1], num=9, **FAST)
    assert drawn.array.shape == (9, 8, 8, 1)
    assert drawn.record["sample"]["batch_size"] == 8


def test_the_record_says_what_made_the_images(latent, folders):
    record = latent([3, 4], seed=7, cfg_scale=2.0, **FAST).record
    json.dumps(record)
    for part, folder, name in (("weights", "dit", "DiT-2x48x3/4"), ("autoencoder", "vae", "KL")):
        path = folders / folder / FOLDER_WEIGHTS
        assert record[part]["files"] == [str(path)]
        assert record[part]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert record[part]["layout"] == "diffusers"
        assert record[part]["network"].startswith(name)
        assert record[part]["which"] == "ema"
    assert (record["seed"], record["classes"]) == (7, [3, 4])
    sample = record["sample"]
    assert (sample["num"], sample["steps"], sample["sampler"]) == (2, "ddim2", "ddim")
    assert (sample["cfg_scale"], sample["cfg_channels"]) == (2.0, "all")
    assert record["model"]["frequency_shift"] == 1
    assert (record["model"]["dtype"], record["model"]["matmul"]) == ("float32", "float32")
    assert record["diffusion"]["timesteps"] == 1000
    assert (record["autoencoder_scale"], record["image_size"]) == (0.18215, 32)
    assert record["environment"]["ditjax"] == __version__
    assert record["environment"]["jax"] == jax.__version__
    assert record["environment"]["devices"].startswith("8 x ")


def test_published_weights_are_guided_unless_told(latent, pixels):
    assert latent.config.sample.cfg_scale == pipeline.DEFAULT_CFG_SCALE == 4.0
    assert pixels.config.sample.cfg_scale == 1.5, "our own files say how"


@pytest.mark.parametrize("precision", pipeline.PRECISIONS)
def test_precisions(precision, folders):
    c = Pipeline.from_pretrained(folders / "dit", folders / "vae", precision=precision).config
    assert (c.model.dtype, c.model.matmul) == {
        "float32": ("float32", "float32"),
        "fast": ("float32", "default"),
        "bfloat16": ("bfloat16", "default"),
    }[precision]


def test_an_unknown_precision(folders):
    with pytest.raises(UserError, match="precision 'fp8': expected one of float32, fast, bfloat16"):
        Pipeline.from_pretrained(folders / "dit", folders / "vae", precision="fp8")


@pytest.mark.parametrize("matmul", ["float32", "default"])
def test_products_are_computed_as_the_recipe_says(matmul, pixels, monkeypatch):
    c = changed(pixels.config, {"model": {"matmul": matmul}})
    x = jnp.ones((2, 2))
    with precise(c):
        text = jax.jit(jnp.dot).lower(x, x).as_text()
    assert ("precision = [HIGHEST, HIGHEST]" in text) == (matmul == "float32")
    # And sampling is traced within it.
    seen = traces(monkeypatch)
    Pipeline(pixels._source, c)([1], **FAST)
    assert set(seen) == {"float32" if matmul == "float32" else None}


def test_a_pipeline_folder_gives_the_same_images(latent, folders, tmp_path):
    dit, vae = reading.load_network(folders / "dit"), reading.load_network(folders / "vae")
    names = [(f"kind {i}", f"sort-{i}") for i in range(10)]
    writing.write_pipeline(tmp_path / "p", dit, vae, names)
    again = Pipeline.from_pretrained(tmp_path / "p")
    drawn = again(["sort_3", "Kind 4"], seed=2, **FAST)
    assert drawn.label.tolist() == [3, 4]
    np.testing.assert_array_equal(drawn.array, latent([3, 4], seed=2, **FAST).array)


def test_an_autoencoder_given_replaces_the_folders_own(folders, tmp_path):
    dit, vae = reading.load_network(folders / "dit"), reading.load_network(folders / "vae")
    writing.write_pipeline(tmp_path / "p", dit, vae, [("x",)] * 10)
    other = writing.write_ldm(tmp_path / "vae.ckpt", vae)
    source = open_source(tmp_path / "p", other)
    assert source.record["autoencoder"]["layout"] == "ldm"
    assert source.record["weights"]["layout"] == "diffusers"


def test_the_recipes_seed_is_taken_where_none_is_given(pixels, monkeypatch):
    expected = [pixels([1], seed=seed, **FAST).array for seed in (7, 0)]
    monkeypatch.setattr(pixels, "config", replaced(pixels.config, seed=7))
    for given, images in zip((None, 0), expected, strict=True):
        np.testing.assert_array_equal(pixels([1], seed=given, **FAST).array, images)


def test_a_folders_own_names_go_before_imagenets(folders, tmp_path):
    write_torch(tmp_path / "x.pt", release_state(classes=1000))
    names = [(f"kind {i}",) for i in range(1000)]
    dit, vae = (
        reading.load_network(tmp_path / "x.pt", heads=3),
        reading.load_network(folders / "vae"),
    )
    writing.write_pipeline(tmp_path / "p", dit, vae, names)
    assert open_source(tmp_path / "p").class_names == tuple(names)


def test_imagenet_names(tmp_path):
    """Of a thousand classes, which need not be ImageNet's, they are taken on request only."""
    path = ours(tmp_path / "x.safetensors", classes=1000)
    assert open_source(path).class_names is None
    assert open_source(path, class_names="imagenet").class_names == class_names()
    other = ours(tmp_path / "y.safetensors", classes=10)
    assert open_source(other).class_names is None
    with pytest.raises(UserError, match=r"ImageNet has 1000 classes, and .*y\.saf.* has 10: rem"):
        open_source(other, class_names="imagenet")


def test_names_travel_with_ditjax_weights(tmp_path):
    path = ours(tmp_path / "x.safetensors", classes=2)
    network = reading.load_network(path)._replace(class_names=(("robin", "n1"), ("wren",)))
    writing.write_ditjax(tmp_path / "y.safetensors", network)
    source = open_source(tmp_path / "y.safetensors")
    assert source.class_names == (("robin", "n1"), ("wren",))
    assert Pipeline(source).labels(["wren", "N1", 0]) == [1, 0, 0]
    assert open_source(tmp_path / "y.safetensors", class_names="none").class_names is None
    for names in ([("a",)], "[", [["a"], 3], {"a": 1}):
        text = names if isinstance(names, str) else json.dumps(names)
        with safe_open(tmp_path / "y.safetensors", "numpy") as file:
            metadata = {**file.metadata(), "class_names": text}
        tensors.write_safetensors(tmp_path / "z.safetensors", network.leaves, metadata)
        with pytest.raises(UserError, match="are not the names of 2 classes"):
            open_source(tmp_path / "z.safetensors")


def test_a_published_dit_has_imagenets_names_and_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "_PUBLISHED", ("2x48x3", 4, 1000, (128,)))
    write_torch(tmp_path / "bare.pt", release_state(classes=1000))
    state = {"ema": release_state(classes=1000), "args": {"data_path": "/birds"}}
    write_torch(tmp_path / "trained.pt", state)
    taken = {}
    for name in ("bare", "trained"):
        network = reading.load_network(tmp_path / f"{name}.pt", heads=3)
        taken[name] = networks.with_class_names(network, "auto").class_names
        assert networks.with_class_names(network, "none").class_names is None
    assert taken == {"bare": class_names(), "trained": None}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {tmp_path}/bare.pt names no classes. It looks like a published")
    assert reading.load_network(tmp_path / "bare.pt", heads=3).config.data.image_size == 128


@pytest.mark.parametrize(
    ("dit", "vae", "words"),
    [
        ("dit", "", "is a DiT-2x48x3/4 on latents: give the autoencoder .* --autoencoder=FILE"),
        ("vae", "", "holds a KL autoencoder .*: expected a DiT"),
        ("dit", "dit", "holds a DiT-2x48x3/4: expected an autoencoder"),
        ("none", "", "does not exist"),
        ("x" * 300, "", "does not exist"),
        ("dit", "none", "does not exist"),
    ],
)
def test_sources_that_are_none(dit, vae, words, folders):
    with pytest.raises(UserError, match=words):
        open_source(folders / dit, folders / vae if vae else "")


def test_pixels_have_no_autoencoder(folders, tmp_path):
    path = ours(tmp_path / "x.safetensors", channels=3)
    with pytest.raises(UserError, match="do not belong together"):
        open_source(path, folders / "vae")


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({"model": {"size": "3x48x3"}}, "DiT-2x48x3/4"),
        ({"model": {"patch": 2}}, "DiT-2x48x3/4"),
        ({"data": {"num_classes": 9}}, "DiT-2x48x3/4"),
        ({"autoencoder": {"res_blocks": 1}}, r"KL autoencoder \(f=2\)"),
        ({"model": {"label_dropout": 0.0}}, "DiT-2x48x3/4"),
        ({"model": {"block": "adaln"}}, "DiT-2x48x3/4"),
    ],
    ids=str,
)
def test_a_recipe_of_another_network_is_refused(sections, name, folders):
    source = open_source(folders / "dit", folders / "vae")
    plain = dataclasses.replace(source.config.sample, cfg_scale=1.0)
    c = replaced(source.config, sample=plain)
    words = rf"the recipe describes another network than the weights at .*, a {name}: do not change"
    with pytest.raises(UserError, match=words):
        Pipeline(source, changed(c, sections))
