"""sample and evaluate on a finished run, and the latent path from end to end."""

import functools
import json
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from ditjax import encode, evaluate, sample, train
from ditjax.cli import load_recipe
from ditjax.config import read
from ditjax.data import crop, records, source, stream
from ditjax.data.names import Split
from ditjax.errors import UserError
from ditjax.evaluation import evaluator
from ditjax.evaluation.classifiers import JUDGE, predict_class
from ditjax.evaluation.features import digits_extractor
from ditjax.evaluation.scoring import extract_features, open_reference, score
from ditjax.metrics import frechet
from ditjax.models import autoencoder as network
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening
from ditjax.runs.results import load_samples
from ditjax.tasks import autoencoder as autoencoder_task
from ditjax.tasks import make_task
from ditjax.tasks.autoencoder import load_frozen
from tests.commands.conftest import LATENTS, TINY


def test_sample(finished, tmp_path, capsys):
    words = [*TINY, f"--workdir={finished}", f"--out={tmp_path}", "--classes=3,1"]
    assert sample.main(words) == 0
    images, label = load_samples(tmp_path / "samples.npz")
    assert images.shape == (40, 8, 8, 1)
    np.testing.assert_array_equal(label, [3, 1] * 20)
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["step"] == 20
    assert record["sample"]["steps"] == "ddim3"
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.width == (2 * 8 + 1) * 4
    assert "40 images" in capsys.readouterr().out


@pytest.mark.parametrize("classes", ["10", "-1", "cat", "1,,2"])
def test_classes_that_are_none(finished, classes):
    with pytest.raises(UserError, match="class numbers from 0 to 9"):
        sample.main([*TINY, f"--workdir={finished}", f"--classes={classes}"])


@pytest.mark.parametrize(
    ("command", "words", "match"),
    [
        (sample, ["--sampler=ddpm", "--eta=0.5"], r"config\.sample\.eta has no effect: .*'ddpm'"),
        (
            sample,
            ["--cfg_scale=1", "--cfg_channels=all"],
            r"cfg_channels has no effect: config\.sample\.cfg_scale is 1\.0",
        ),
        (
            sample,
            ["--sampler=ddim", "--config.sample.order=3"],
            r"sample\.order has no effect: config\.sample\.sampler is 'ddim'",
        ),
        (sample, ["--heads=3"], r"--heads: no effect with --workdir, whose recipe"),
        (sample, ["--autoencoder=x", "--which=ema"], "--autoencoder and --which: no effect"),
        (evaluate, ["--batch_size=3"], r"--batch_size: no effect when a run is evaluated"),
        (evaluate, ["--save_reference=x.npz"], r"--save_reference: no effect when a run"),
    ],
)
def test_a_flag_that_has_no_effect_is_refused(finished, tmp_path, command, words, match):
    out = [f"--out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=match):
        command.main([*TINY, f"--workdir={finished}", *out, *words])
    assert not list(tmp_path.iterdir())


def test_no_such_run(tmp_path):
    for command in (sample, evaluate):
        with pytest.raises(UserError, match="is not a run directory"):
            command.main([*TINY, f"--workdir={tmp_path / 'none'}"])


def test_evaluate(finished, capsys):
    assert evaluate.main([*TINY, f"--workdir={finished}"]) == 0
    record = json.loads((finished / "evaluation.json").read_text())
    metrics = record["metrics"]
    with_interval = ("fd", "kd", "md", "precision", "recall", "density", "coverage", "authenticity")
    assert metrics.keys() == {
        *(f"{name}_digits{end}" for name in with_interval for end in ("", "_low", "_high")),
        "kd_digits_subset_deviation",
        "accuracy",
        "fd_digits_floor",
        "authenticity_digits_floor",
        "accuracy_guided",
    }
    assert metrics["fd_digits"] > 3 * metrics["fd_digits_floor"], "20 steps make no digits"
    assert record["protocol"]["num_samples"] == 40
    for name in ("samples", "guided"):
        assert (finished / f"{name}.png").exists()
    assert "fd_digits" in capsys.readouterr().out


def test_real_digits_score_as_real(data_dir):
    real = records.load_arrays("digits", "test", data_dir)
    extractor = digits_extractor()
    reference = open_reference("digits/train", extractor, 8, str(data_dir))

    def fd_digits(images):
        seen = extract_features(extractor, [images], len(images))
        return score(seen, reference.statistics, None, family="digits")["fd_digits"]

    test_split = Split("digits", "test")
    floors = evaluator.real_scores("digits", test_split, "digits/train", str(data_dir), 8)
    floor = floors["fd_digits_floor"]
    assert fd_digits(real["image"]) == pytest.approx(floor)
    assert np.mean(predict_class(JUDGE, real["image"]) == real["label"]) > 0.98
    noise = np.random.default_rng(0).integers(0, 256, real["image"].shape, np.uint8)
    assert fd_digits(noise) > 10 * floor
    # Larger images are brought to 8x8, colour to grey: digits stay digits.
    large = crop.resize_images(real["image"], 32).repeat(3, axis=-1)
    assert np.mean(predict_class(JUDGE, large) == real["label"]) > 0.95


SMALL_AUTOENCODER = (
    "--config.autoencoder.base_width=8",
    "--config.autoencoder.multipliers=(1,2)",
    "--config.autoencoder.groups=4",
    "--config.data.image_size=16",
    "--config.train.batch_size=8",
)


@pytest.fixture(scope="module")
def autoencoder(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("autoencoder")
    words = [
        "--config=experiments/digits_latent.py:autoencoder",
        *SMALL_AUTOENCODER,
        "--config.train.steps=12",
        "--config.optim.warmup_steps=2",
        "--config.train.log_every_steps=4",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITJAX_DATA", str(data_dir))
        assert train.main([*words, f"--workdir={workdir}"]) == 0
    return workdir


def latent_words(autoencoder):
    return [
        *LATENTS,
        *SMALL_AUTOENCODER,
        "--config.sample.batch_size=40",
        "--config.data.split=test",  # a quarter as many to encode
        f"--config.autoencoder.path={autoencoder}",
    ]


def test_the_latent_path(autoencoder, tmp_path):
    losses = [
        json.loads(x)["loss"] for x in (autoencoder / "metrics.jsonl").read_text().split("\n") if x
    ]
    assert losses[-1] < losses[0]
    words = latent_words(autoencoder)
    latents = tmp_path / "latents"
    assert encode.main([*words, f"--out={latents}"]) == 0
    on_latents = [*words, f"--config.data.name=latents:{latents}"]
    workdir = tmp_path / "dit"
    assert train.main([*on_latents, f"--workdir={workdir}"]) == 0
    assert sample.main([*on_latents, f"--workdir={workdir}"]) == 0
    images, _ = load_samples(workdir / "drawn" / "samples.npz")
    assert images.shape == (40, 16, 16, 1)
    assert evaluate.main([f"--workdir={workdir}"]) == 0  # the run's own recipe


def decoded_means(c, params, x):
    """What the network makes of images by way of its two halves."""
    module: Any = network.module(c.model, c.autoencoder, c.data.channels)
    mean = module.apply(params, x, method="encode").mean
    return module.apply(params, mean, method="decode")


def test_psnr_of_an_autoencoder(autoencoder):
    """Against the definition, image by image, on the held-out split."""
    assert evaluate.main([f"--workdir={autoencoder}"]) == 0
    c = opening.recipe_of(autoencoder)
    params, _ = opening.load_weights(c, make_task(c), autoencoder, make_mesh(-1, 1))
    x = records.load_arrays("digits", "test", None, 16)["image"].astype(np.float32) / 127.5 - 1
    again = jax.jit(functools.partial(decoded_means, c))(params, x)
    errors = [((np.clip(a, -1, 1) - b) ** 2).mean() for a, b in zip(again, x, strict=True)]
    expected = np.mean([20 * np.log10(2 / error**0.5) for error in errors])
    record = json.loads((autoencoder / "evaluation.json").read_text())
    found, protocol = record["metrics"], record["protocol"]
    assert found["psnr_db"] == pytest.approx(expected, rel=1e-4)
    # Its recipe names features: the reconstructions' distance to the very images, at their size.
    pools = [
        digits_extractor().extract(np.rint((np.clip(y, -1, 1) + 1) * 127.5).astype(np.uint8)).pool
        for y in (again, x)
    ]
    distance = frechet.frechet_distance(*map(frechet.batch_moments, pools))
    assert found["rfd_digits"] == pytest.approx(distance, rel=1e-3)
    assert found["rfd_digits_low"] < found["rfd_digits"] < found["rfd_digits_high"]
    assert (protocol["metric"], protocol["reconstructions"]) == ("PSNR", "rfd_digits")
    assert protocol["reference_count"] == len(x)


def test_latents_are_the_encoders_moments(autoencoder, tmp_path):
    """Record order, mirror, split and values: against encoding by hand."""
    words = latent_words(autoencoder)
    c = read(load_recipe(words))
    encode.main([*words, f"--out={tmp_path}"])
    frozen = load_frozen(c, make_mesh(-1, 1))
    images = records.load_arrays("digits", "test", None, 16)
    name = f"latents:{tmp_path}"
    spec = source.DataSpec(name, "test", 16, 1, flip=True)
    with stream.train_batches(spec, 0, 24) as batches:
        batch = next(batches)
    mirrored = stream.flips(0, 0, 24)
    assert 0 < mirrored.sum() < 24
    x = images["image"][batch["index"]]
    x[mirrored] = x[mirrored, :, ::-1]
    encoded = jax.jit(functools.partial(autoencoder_task.encode_images, c))
    moments = encoded(frozen, x.astype(np.float32) / 127.5 - 1)
    np.testing.assert_allclose(batch["mean"], moments.mean, atol=1e-4)
    np.testing.assert_allclose(batch["log_variance"], moments.log_variance, atol=1e-4)
    np.testing.assert_array_equal(batch["label"], images["label"][batch["index"]])
    assert source.dataset_info(name, "test").num_examples == 359
    # The same again is left as it is; another encoding does not go over it.
    (info,) = tmp_path.rglob("dataset_info.json")
    written = info.stat().st_mtime_ns
    assert encode.main([*words, f"--out={tmp_path}"]) == 0
    assert info.stat().st_mtime_ns == written
    with pytest.raises(UserError, match="split='test', and this command has 'train'"):
        encode.main([*words, f"--out={tmp_path}", "--config.data.split=train"])
    uncached = source.DataSpec(name, "test", 16, 1, flip=True, cache_mb=0)
    with stream.train_batches(uncached, 0, 24) as batches:
        np.testing.assert_array_equal(next(batches)["mean"], batch["mean"])


def test_images_encoded_on_the_way_train_too(autoencoder, tmp_path):
    words = [*latent_words(autoencoder), "--config.train.steps=3"]
    assert train.main([*words, f"--workdir={tmp_path}"]) == 0


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--config.autoencoder.path="], "needs the directory of a run that"),
        (["--config.autoencoder.path=/nowhere"], "/nowhere does not exist: expected a weights"),
        (["--config.autoencoder.base_width=16"], r"base_width is 16, and .* with 8"),
        (["--config.data.name=latents:/nowhere"], "no encoded latents at /nowhere"),
    ],
)
def test_a_latent_recipe_that_does_not_fit(autoencoder, tmp_path, words, match):
    with pytest.raises(UserError, match=match):
        train.main([*latent_words(autoencoder), f"--workdir={tmp_path}", *words])


def test_encoding_pixels_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to encode with"):
        encode.main([*TINY, f"--out={tmp_path}"])
