"""Scores of clips order what is real, shuffled and repeated, and refuse what is no such clip."""

import numpy as np
import pytest

from ditjax.data import moving
from ditjax.data.scenes import load_handwriting
from ditjax.errors import UserError
from ditjax.evaluation import clips
from ditjax.evaluation.features import check_frames_of, clips_extractor, digits_extractor
from ditjax.metrics.frechet import batch_moments, frechet_distance
from ditjax.metrics.motion import centroids, motion_error

ROOMS, SPEEDS = (4, 5, 6, 7, 8), (1.0, 2.5)


def real(split: str, count: int) -> np.ndarray:
    digits = load_handwriting(split)
    made = [moving.moving_clip(digits, 0, split, i).frames[:8] for i in range(count)]
    return np.stack(made)[..., None]


@pytest.fixture(scope="module")
def sets() -> dict[str, np.ndarray]:
    found = real("test", 160)
    rng = np.random.default_rng(0)
    return {
        "real": found,
        "shuffled": np.stack([clip[rng.permutation(8)] for clip in found]),
        "repeated": np.repeat(found[:, :1], 8, axis=1),
    }


def test_fd_clips_and_motion_order_the_sets(sets):
    reference = batch_moments(clips.clip_features(real("train", 400))[0])
    measured, distance = {}, {}
    for name, each in sets.items():
        measured[name] = {k: v.mean() for k, v in clips.clip_measures(each).items()}
        features, _ = clips.clip_features(each)
        distance[name] = frechet_distance(reference, batch_moments(features))
    assert distance["shuffled"] > 5 * distance["real"]
    assert distance["repeated"] > 3 * distance["real"]
    assert measured["real"]["motion_error"] < 0.2
    for name in ("shuffled", "repeated"):
        assert measured[name]["motion_error"] > 5 * measured["real"]["motion_error"]
    # Frame by frame, shuffled clips are real; a repeated frame is one digit.
    assert measured["shuffled"]["identity"] == measured["real"]["identity"]
    assert measured["repeated"]["identity"] == 1


def test_the_judge_knows_the_digits_of_clips(sets):
    digits = load_handwriting("test")
    label = [moving.moving_clip(digits, 0, "test", i).label for i in range(160)]
    assert np.mean(clips.predict_clip_digit(sets["real"]) == label) > 0.9
    empty = np.zeros((2, 8, 16, 16, 1), np.uint8)
    assert clips.predict_clip_digit(empty).shape == (2,)


def test_motion_error_of_a_known_path():
    """A point that bounces has none, whatever its room; one that turns within the room has some."""
    t = np.arange(8)
    ink = np.zeros((2, 8, 16, 16))
    for clip, velocity in zip(ink, (2.0, 0.0), strict=True):
        for frame, row in zip(clip, 3 + moving.reflected(1 + velocity * t, 6.0), strict=True):
            frame[int(row), 5] = 1
    assert centroids(ink)[0, :3, 0].tolist() == [4, 6, 8]
    moves, stands = motion_error(ink, ROOMS, SPEEDS)
    assert moves < 0.1
    assert stands > 0.8  # slower than any clip


def test_images_and_clips_are_not_confused():
    with pytest.raises(
        UserError, match=r"are clips of 8 frames, and features 'digits' are of imag"
    ):
        check_frames_of(digits_extractor(), 8, "samples")
    with pytest.raises(UserError, match=r"are images, and features 'clips' are of clips"):
        check_frames_of(clips_extractor(), 1, "samples")
    with pytest.raises(UserError, match=r"features 'clips' take clips of 8 frames"):
        clips.clip_features(np.zeros((2, 4, 16, 16, 1), np.uint8))
