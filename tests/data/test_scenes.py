"""Scene i is a function of (seed, split, i), of that split's digits, and of one class."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from ditjax.data import records, source
from ditjax.data.scenes import (
    SCENE_SIDE,
    SIZES,
    Handwriting,
    load_handwriting,
    magnified,
    parse_scene_set,
    scene,
)
from ditjax.data.source import prepare
from ditjax.errors import UserError


@pytest.fixture(scope="module")
def train():
    return load_handwriting("train")


@pytest.fixture(scope="module")
def many(train):
    return [scene(train, 0, "train", i) for i in range(400)]


def test_a_scene_hangs_on_nothing_but_seed_split_and_index(train, many):
    for i in (399, 0, 17):
        np.testing.assert_array_equal(scene(train, 0, "train", i).image, many[i].image)
    others = (scene(train, 1, "train", 0), scene(train, 0, "test", 0), many[1])
    for other in others:
        assert (other.image != many[0].image).any()
    # Endless: far beyond any data set, and still another each.
    far = [scene(train, 0, "train", 10**15 + i).image.tobytes() for i in range(20)]
    assert len({*far, *(each.image.tobytes() for each in many)}) == 420


def test_classes_and_counts_are_even_and_places_are_everywhere(many):
    labels = Counter(each.label for each in many)
    assert set(labels) == set(range(10))
    assert min(labels.values()) > 20
    counts = Counter(len(each.boxes) for each in many)
    assert set(counts) == {1, 2, 3}
    assert min(counts.values()) > 90
    boxes = np.array([box for each in many for box in each.boxes])
    rows, columns, sizes = boxes.T
    assert (sizes.min(), sizes.max()) == SIZES
    for start in (rows, columns):
        assert start.min() == 0
        assert (start + sizes).max() == SCENE_SIDE


def marked():
    """Handwriting whose class can be read off the ink: a bar in a row of its own, or a column."""
    ink = np.zeros((10, 8, 8))
    for label in range(8):
        ink[label, label] = 1.0
    ink[8, :, 2] = ink[9, :, 5] = 1.0
    return Handwriting(ink, tuple(np.array([label]) for label in range(10)))


def test_all_digits_of_a_scene_are_of_its_class_and_show_their_ink():
    digits = marked()
    for i in range(60):
        made = scene(digits, 3, "train", i)
        x = made.image / 255
        background = np.median(x.reshape(-1, 3), axis=0)
        away = np.abs(x - background).max(-1)
        drawn = np.zeros((SCENE_SIDE, SCENE_SIDE))
        for row, column, size in made.boxes:
            there = drawn[row : row + size, column : column + size]
            np.maximum(there, magnified(digits.ink[made.label], size), out=there)
        # Where there is ink it is seen, where there is none the background is as it was.
        assert away[drawn > 0.4].min() > 0.1, i
        assert away[drawn == 0].max() < 0.005, i


def test_digits_keep_clear_of_one_another(train, many):
    for i, each in enumerate(many[:100]):
        assert all(
            0 <= row <= SCENE_SIDE - size and 0 <= column <= SCENE_SIDE - size
            for row, column, size in each.boxes
        ), i
    # Solid squares must not overlap but for a twentieth of their ink.
    solid = Handwriting(np.ones((1, 8, 8)), tuple(np.zeros(1, int) for _ in range(10)))
    for i in range(60):
        area, cover = 0.0, np.zeros((SCENE_SIDE, SCENE_SIDE))
        for row, column, size in scene(solid, 0, "train", i).boxes:
            ink = magnified(solid.ink[0], size)
            there = cover[row : row + size, column : column + size]
            assert np.minimum(there, ink).sum() <= 0.05 * ink.sum() + 1e-9
            np.maximum(there, ink, out=there)
            area += ink.sum()
        assert cover.sum() > 0.85 * area


def test_no_hand_is_in_both_splits(train):
    test = load_handwriting("test")
    assert (len(train.ink), len(test.ink)) == (1438, 359)
    seen = {each.tobytes() for each in train.ink}
    assert not seen & {each.tobytes() for each in test.ink}
    # The classes are digits/train's.
    for digits, split in ((train, "train"), (test, "test")):
        assert sorted(np.concatenate(digits.of_class)) == list(range(len(digits.ink))), split


def test_magnified_keeps_the_ink():
    ink = np.random.default_rng(0).random((8, 8))
    np.testing.assert_allclose(magnified(ink, 8), ink, atol=1e-12)
    np.testing.assert_allclose(magnified(ink, 16).sum() / 4, ink.sum(), rtol=0.1)
    assert 0 <= magnified(ink, 13).min() <= magnified(ink, 13).max() <= 1


def digest(folder):
    files = sorted(path for path in folder.rglob("*array_record*"))
    return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


def test_the_data_set_is_the_first_scenes_in_the_same_bytes_each_time(train, many, tmp_path):
    builder = prepare("digit_scenes/30", tmp_path / "a")
    assert builder.info.full_name == "digit_scenes/30/1.0.0"
    assert builder.info.splits["test"].num_examples == 3
    found = records.load_arrays("digit_scenes/30", "train", tmp_path / "a")
    np.testing.assert_array_equal(found["image"], [each.image for each in many[:30]])
    np.testing.assert_array_equal(found["label"], [each.label for each in many[:30]])
    held_out = records.load_arrays("digit_scenes/30", "test", tmp_path / "a")
    test = load_handwriting("test")
    expected = [scene(test, 0, "test", i).image for i in range(3)]
    np.testing.assert_array_equal(held_out["image"], expected)
    prepare("digit_scenes/30:1.0.0", tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    # Another size beside it, and another seed: each by its own name.
    prepare("digit_scenes/20-seed5", tmp_path / "a")
    other = records.load_arrays("digit_scenes/20-seed5", "train", tmp_path / "a")
    np.testing.assert_array_equal(other["image"][0], scene(train, 5, "train", 0).image)
    assert prepare("digit_scenes/30", tmp_path / "a").info.full_name == "digit_scenes/30/1.0.0"


def test_the_short_name_is_the_size_of_the_recipes(tmp_path, monkeypatch):
    of = source._GENERATED["digit_scenes"]
    assert of.default == "20000"
    monkeypatch.setitem(source._GENERATED, "digit_scenes", of._replace(default="12"))
    assert prepare("digit_scenes", tmp_path).info.full_name == "digit_scenes/12/1.0.0"


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("digit_scenes/many", "expected 'digit_scenes', 'digit_scenes/N' or"),
        ("digit_scenes/5", "with N from 10"),
        ("digit_scenes/100-seedx", "'digit_scenes/N-seedS'"),
        ("digit_scenes:2.0.0", r"expected version 1\.0\.0"),
        ("digit_scene", "Did you mean 'digit_scenes'"),
    ],
)
def test_names_that_are_none(name, match, tmp_path):
    with pytest.raises(UserError, match=match) as error:
        prepare(name, tmp_path)
    assert "\n" not in str(error.value)
    assert parse_scene_set("20000-seed3").name == "20000-seed3"
    assert parse_scene_set("20000-seed0").name == "20000"
