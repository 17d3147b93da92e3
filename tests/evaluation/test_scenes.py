"""Real scenes look real to the classifiers in windows, and noise does not."""

import numpy as np
import pytest

from ditjax.data.scenes import load_handwriting, scene
from ditjax.errors import UserError
from ditjax.evaluation import scenes
from ditjax.evaluation.features import scenes_extractor
from ditjax.metrics.frechet import batch_moments, frechet_distance


@pytest.fixture(scope="module")
def real():
    """(images, labels) of each split."""
    found = {}
    for split, n in (("train", 80), ("test", 120)):
        digits = load_handwriting(split)
        made = [scene(digits, 0, split, i) for i in range(n)]
        found[split] = np.stack([m.image for m in made]), np.array([m.label for m in made])
    return found


def test_the_judge_sees_the_class_of_scenes_it_has_not_seen(real):
    images, label = real["test"]
    assert np.mean(scenes.predict_scene_digit(images) == label) > 0.8


def test_features_tell_real_scenes_from_others(real):
    extract = scenes_extractor().extract
    images = real["test"][0][:80]
    grey = images.mean(-1, keepdims=True).repeat(3, -1).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    train, test, without_colour, of_noise = (
        extract(x).pool for x in (real["train"][0], images, grey, noise)
    )

    def distance(x, part=slice(None)):
        return frechet_distance(batch_moments(x[:, part]), batch_moments(train[:, part]))

    colours = slice(-12, None)
    assert distance(of_noise) > 10 * distance(test)
    assert distance(without_colour, colours) > 3 * distance(test, colours)
    # Colours are a part of the distance that is seen, and not the whole of it.
    assert 0.05 < test[:, colours].var(0).sum() / test.var(0).sum() < 0.5


def test_ink_is_seen_whatever_its_colour_and_cells_keep_it():
    images = np.full((2, 32, 32, 3), (40, 60, 20), np.uint8)
    images[0, 8:24, 8:24] = (200, 60, 20)
    images[1, 8:24, 8:24] = (40, 60, 220)
    found = scenes.ink(images)
    expected = np.zeros((32, 32), np.float32)
    expected[8:24, 8:24] = 1
    np.testing.assert_allclose(found, [expected, expected], atol=1e-6)
    for side in (18, 20, 16):
        cells = scenes.shrink(found, side)
        np.testing.assert_allclose(cells.sum((1, 2)) * (32 / side) ** 2, 256, rtol=1e-5)
    # A faint smear is not blown up to full ink.
    smear = np.full((1, 32, 32, 3), 100, np.uint8)
    smear[0, :4, :4] += 6
    assert scenes.ink(smear).max() < 0.1
    with pytest.raises(UserError, match=r"uint8\[1, 8, 8, 1\]: features 'scenes' take"):
        scenes.ink(np.zeros((1, 8, 8, 1), np.uint8))
