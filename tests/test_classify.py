"""The shipped classifiers score what their manifest says, and FD-digits orders what it should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from ditjax import classify
from ditjax.config import FEATURE_NAME, SHIPPED_FEATURES
from ditjax.data.crop import normalize
from ditjax.errors import UserError
from ditjax.evaluation import classifiers as at_work
from ditjax.files.assets import SHIPPED, load_asset
from ditjax.metrics.frechet import batch_moments, frechet_distance
from ditjax.models import classifier

NAMES = (at_work.FEATURE_CLASSIFIER, at_work.JUDGE)


@pytest.fixture(scope="module")
def digits():
    """Straight from scikit-learn, so that a wrong split of ours cannot hide: (train, test)."""
    source = load_digits()
    images = np.round(source.images * 255 / 16).astype(np.uint8)[:, :, :, None]
    labels = source.target.astype(np.int32)
    test = np.arange(len(labels)) % 5 == 4
    return [{"image": images[rows], "label": labels[rows]} for rows in (~test, test)]


def shipped(name):
    """The network as its manifest describes it, its parameters and its record."""
    params, record = load_asset(name)
    widths = dict(record["network"])
    return getattr(classifier, widths.pop("name"))(**widths), params, record


@pytest.fixture
def optax_promotion():
    """optax's own bias correction adds floats to an int32 count, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def features():
    network, params, _ = shipped(at_work.FEATURE_CLASSIFIER)
    return lambda images: batch_moments(at_work.recognise(network, params, images)[0])


@pytest.mark.parametrize("name", NAMES)
def test_shipped_weights_score_the_manifest_accuracy_on_the_real_test_split(digits, name):
    network, params, record = shipped(name)
    train, test = digits
    _, logits = at_work.recognise(network, params, test["image"])
    accuracy = at_work.accuracy(logits, test["label"])
    assert (len(train["label"]), len(test["label"])) == (1438, 359)
    assert (record["train_count"], record["test_count"]) == (1438, 359)
    # Another CPU's rounding may move one image across a boundary, not two.
    assert accuracy == pytest.approx(record["test_accuracy"], abs=1.5 / 359)
    assert accuracy >= 0.98
    assert record["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_two_share_no_network_no_seed_and_no_augmentation():
    first, second = (load_asset(name)[1] for name in NAMES)
    assert first["network"]["name"] != second["network"]["name"]
    assert first["recipe"]["seed"] != second["recipe"]["seed"]
    assert first["recipe"]["augmentation"] != second["recipe"]["augmentation"]


def test_the_manifest_records_the_recipes_of_this_source():
    for name in NAMES:
        _, record = load_asset(name)
        recipe = classify.RECIPES[name]
        assert record["recipe"]["augmentation"] == dataclasses.asdict(recipe.augmentation)
        assert record["recipe"]["epochs"] == recipe.epochs
        assert record["recipe"]["seed"] == recipe.seed
        network, _, _ = shipped(name)
        assert network == recipe.network


def test_shipped_weights_are_small():
    assert sum(path.stat().st_size for path in SHIPPED.glob("*.npz")) < 1_300_000


def test_fd_digits_is_small_between_real_splits_and_large_to_noise(digits, features):
    train, test = (features(split["image"]) for split in digits)
    noise = np.random.default_rng(0).integers(0, 256, (359, 8, 8, 1)).astype(np.uint8)
    floor = frechet_distance(train, test)
    _, record = load_asset(at_work.FEATURE_CLASSIFIER)
    assert floor == pytest.approx(record["frechet_train_test"], rel=1e-3)
    assert frechet_distance(train, features(noise)) > 10 * floor
    threes = digits[0]["image"][digits[0]["label"] == 3]
    assert frechet_distance(train, features(threes)) > 10 * floor


def test_fd_digits_grows_with_the_noise_added(digits, features):
    (train, _), (test, _) = (split.values() for split in digits)
    reference, rng = features(train), np.random.default_rng(1)
    noise = rng.normal(size=test.shape)
    distances = []
    for level in (0.0, 0.1, 0.2, 0.4):
        x = np.clip(test / 127.5 - 1.0 + level * noise, -1.0, 1.0)
        distances.append(
            frechet_distance(reference, features(np.round((x + 1) * 127.5).astype(np.uint8)))
        )
    assert (np.diff(distances) > 0).all(), distances
    assert distances[-1] > 2 * distances[0]


def test_recognising_in_batches_changes_nothing(digits):
    network, params, _ = shipped(at_work.JUDGE)
    images = digits[1]["image"][:50]
    whole = at_work.recognise(network, params, images)
    parts = at_work.recognise(network, params, images, batch_size=20)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_no_augmentation_is_the_identity_and_a_whole_pixel_shift_moves_the_ink():
    still = classify.Augmentation(0.0, 0.0, log_zoom=0.0, log_contrast=0.0, noise=0.0)
    augment = jax.jit(classify.augment, static_argnums=2)
    x = np.random.default_rng(0).uniform(-1, 1, (64, 8, 8, 1)).astype(np.float32)
    np.testing.assert_allclose(augment(jax.random.key(1), x, still), x, atol=1e-6)
    # One bright pixel, shifted by less than one: its ink goes to at most 2x2 pixels and is kept.
    dot = jnp.full((64, 8, 8, 1), -1.0).at[:, 3, 4].set(1.0)
    moved = augment(jax.random.key(2), dot, dataclasses.replace(still, shift_pixels=1.0))
    ink = np.asarray(moved[:, :, :, 0] + 1.0)
    np.testing.assert_allclose(ink.sum(axis=(1, 2)), 2.0, atol=1e-5)
    assert ((ink > 1e-6).sum(axis=(1, 2)) <= 4).all()
    rows = (ink * np.arange(8.0)[None, :, None]).sum(axis=(1, 2)) / 2.0
    assert rows.min() < 2.5
    assert rows.max() > 3.5


@pytest.mark.usefixtures("optax_promotion")
def test_the_same_seed_gives_the_same_weights(digits):
    images, labels = (array[:256] for array in digits[0].values())
    # A network of two layers: it compiles quickly.
    network = classifier.DigitsMixer(width=8, blocks=0)
    recipe = dataclasses.replace(classify.RECIPES[at_work.JUDGE], network=network, epochs=1)
    first, again = (classify.train_classifier(recipe, images, labels) for _ in range(2))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    # From equal weights, another seed draws other images and augmentation.
    x, y = jnp.asarray(normalize(images)), jnp.asarray(labels)
    state = classify._optimizer(recipe, 2).init(first)
    losses = [
        classify._train_step(used, 2, first, state, x, y, jnp.int32(0))[2]
        for used in (recipe, dataclasses.replace(recipe, seed=recipe.seed + 6))
    ]
    assert losses[0] != losses[1]


@pytest.mark.usefixtures("optax_promotion")
def test_the_command_learns_and_writes_weights_that_load(digits, tmp_path, monkeypatch, capsys):
    short = {
        name: dataclasses.replace(recipe, epochs=2) for name, recipe in classify.RECIPES.items()
    }
    # Small ones: they compile quickly.
    small: dict[str, classifier.DigitsConvNet | classifier.DigitsMixer] = {
        at_work.FEATURE_CLASSIFIER: classifier.DigitsConvNet(width=8, stages=1),
        at_work.JUDGE: classifier.DigitsMixer(blocks=1),
    }
    for name, network in small.items():
        short[name] = dataclasses.replace(short[name], network=network)
    monkeypatch.setattr(classify, "RECIPES", short)
    monkeypatch.setattr(
        classify, "load_arrays", lambda name, split, data_dir: digits[split == "test"]
    )
    assert classify.main([f"--out={tmp_path}", "--seed=3"]) == 0
    for name in NAMES:
        params, record = load_asset(name, tmp_path)
        assert record["recipe"]["seed"] == classify.RECIPES[name].seed + 3
        assert record["test_count"] == 359
        assert record["test_accuracy"] > 0.2  # chance is 0.1
        network = short[name].network
        _, logits = at_work.recognise(network, params, digits[1]["image"])
        assert at_work.accuracy(logits, digits[1]["label"]) == record["test_accuracy"]
    out = capsys.readouterr().out
    assert "steps/s" in out
    assert out.count("test accuracy") == 2


def test_mistakes_are_told_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setattr(classify, "train_classifier", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        classify.main([f"--out={tmp_path / 'file'}"])
    with pytest.raises(UserError, match="--seed=-1"):
        classify.main([f"--out={tmp_path}", "--seed=-1"])


def test_every_shipped_pair_has_a_recipe_small_files_and_a_name_that_recipes_accept():
    for name, pair in at_work.PAIRS.items():
        assert FEATURE_NAME.holds(name), name
        records = [load_asset(asset)[1] for asset in (pair.features, pair.judge)]
        for asset, record in zip((pair.features, pair.judge), records, strict=True):
            network = shipped(asset)[0]
            assert network == classify.RECIPES[asset].network
            assert network.side == pair.side
            assert record["test_accuracy"] > (0.88 if name == "fashion" else 0.95)
            assert (SHIPPED / f"{asset}.npz").stat().st_size < 400_000
        assert records[0]["network"]["name"] != records[1]["network"]["name"]
    assert {*at_work.PAIRS, "scenes", "clips", "captions", "rain"} == set(SHIPPED_FEATURES)


def test_classifiers_of_28_pixels_read_images_of_any_size_and_tell_them_apart():
    """Of strokes that anyone reads: a one and a zero, drawn by hand."""
    rows = np.arange(28) - 13.5
    across, down = np.meshgrid(rows, rows)
    ring = np.exp(-((np.hypot(across, 0.8 * down) - 7) ** 2) / 3)
    stroke = np.exp(-(across**2) / 3) * (np.abs(down) < 9)
    drawn = np.rint(255 * np.stack([ring, stroke])).astype(np.uint8)[..., None]
    for images in (drawn, drawn.repeat(3, -1), drawn.repeat(2, 1).repeat(2, 2)):
        for asset in at_work.PAIRS["mnist"][1:3]:
            np.testing.assert_array_equal(at_work.predict_class(asset, images), [0, 1])
