"""Clips: moving digits are what they say, and every kind of file gives the same frames."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditjax.data import clips, moving, source, stream
from ditjax.data.builders import animated
from ditjax.data.records import check_frames, open_image_reader
from ditjax.data.scenes import load_handwriting
from ditjax.errors import UserError

FRAMES = 6


@pytest.fixture(scope="module")
def digits():
    return load_handwriting("train")


def test_a_clip_is_a_function_of_seed_split_and_index(digits):
    a, b = (moving.moving_clip(digits, 3, "train", 5) for _ in range(2))
    np.testing.assert_array_equal(a.frames, b.frames)
    for other in ((4, "train", 5), (3, "test", 5), (3, "train", 6)):
        assert (moving.moving_clip(digits, *other).frames != a.frames).any()


def test_digits_move_at_their_speed_and_stay_inside(digits):
    """Between bounces a step is the velocity, and the ink's centre follows the corner."""
    for i in range(20):
        clip = moving.moving_clip(digits, 0, "train", i)
        path = clip.corners[0]
        assert path.min() >= 0
        assert path.max() <= 16 - moving.BOXES[0]
        steps = np.hypot(*np.diff(path, axis=0).T)
        assert 1 - 1e-6 <= steps.max() <= 2.5 + 1e-6  # a step with a bounce is shorter
        ink = clip.frames.astype(float)
        rows = (ink.sum(2) @ np.arange(16)) / ink.sum((1, 2))
        np.testing.assert_allclose(rows - rows[0], path[:, 0] - path[0, 0], atol=0.05)


def test_two_digits_are_of_one_class_on_a_larger_canvas(digits):
    clip = moving.moving_clip(digits, 0, "train", 1, count=2)
    assert clip.frames.shape == (16, 32, 32)
    assert clip.corners.shape == (2, 16, 2)
    assert moving.parse_clip_set("50-two-seed2") == (50, 2, 2)
    with pytest.raises(UserError, match=r"moving_digits/many': expected 'moving_digits',"):
        moving.parse_clip_set("many")


def some_frames(count: int = FRAMES) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)


def read(encoded: bytes, frames: int = FRAMES) -> np.ndarray:
    image, found = Image.open(io.BytesIO(encoded)), []
    for i in range(frames):
        image.seek(i)
        found.append(np.asarray(image.convert("RGB")))
    return np.stack(found)


def test_animations_keep_every_frame():
    grey = some_frames()[..., :1]
    np.testing.assert_array_equal(read(clips.encode_gif(grey))[..., :1], grey)
    frames = some_frames()
    frames[3] = frames[2]  # a clip that stands still has its frames all the same
    found = clips.as_animation([Image.fromarray(each) for each in frames])
    np.testing.assert_array_equal(read(found), frames)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes: a GIF, and a folder of frames of the same clip; a longer one."""
    root = tmp_path_factory.mktemp("clips")
    for name in ("wave", "jump"):
        (root / name).mkdir()
    (root / "wave" / "a.gif").write_bytes(clips.encode_gif(some_frames()[..., :1]))
    for name, count in (("jump/b.frames", FRAMES), ("jump/c.frames", FRAMES + 2)):
        (root / name).mkdir()
        for i, frame in enumerate(some_frames(count=count)[..., 0]):
            Image.fromarray(frame).save(root / name / f"{i:03}.png")
    (root / "wave" / "d.mp4").write_bytes(b"no video")
    return root


def spec(folder: Path, data: Path, **kwargs) -> source.DataSpec:
    options = {"flip": False, "frames": 3, "frame_stride": 2, "data_dir": data, "threads": 1}
    return source.DataSpec(f"folder:{folder}", "train", 8, 1, **{**options, **kwargs})


def test_a_folder_of_clips(folder, data_root, capsys, monkeypatch):
    monkeypatch.setattr("ditjax.data.folders.has_video", lambda: False)
    rows = next(stream.in_order(spec(folder, data_root), 8))
    assert rows["image"].shape == (3, 3, 8, 8, 1)
    expected = some_frames()[:6:2, ..., :1]
    for clip in rows["image"]:
        np.testing.assert_allclose((clip + 1) * 127.5, expected, atol=1)
    check_frames(spec(folder, data_root))
    line = capsys.readouterr().err
    assert "videos, which need pip install 'ditjax[video]', 1 (.mp4)" in line
    # The shortest of the folder is known before a record is read in training.
    with pytest.raises(UserError, match=r"has 6 frames: .*frames=4 with frame_stride=2 needs 7\."):
        check_frames(spec(folder, data_root, frames=4))


def test_clips_are_mirrored_as_images_are(folder, data_root):
    reader = open_image_reader(spec(folder, data_root), 0)
    plain = reader.batch(np.arange(3), np.zeros(3, bool))["image"]
    turned = reader.batch(np.arange(3), np.array([True, False, True]))["image"]
    reader.close()
    np.testing.assert_array_equal(turned[0], plain[0][:, :, ::-1])
    np.testing.assert_array_equal(turned[1], plain[1])


def test_frames_of_mixed_sizes_are_refused(tmp_path):
    place = tmp_path / "a.frames"
    place.mkdir()
    for i, side in enumerate((8, 9)):
        Image.new("L", (side, side)).save(place / f"{i}.png")
    with pytest.raises(ValueError, match=r"its frame 1\.png is 9x9, and the first 8x8"):
        animated(place)


def test_images_are_no_clips(data_root):
    of = source.DataSpec("digits", "train", 8, 1, flip=False, frames=4, data_dir=data_root)
    with pytest.raises(UserError, match=r"record 0 has 1 frame: config.data.frames=4"):
        check_frames(of)


def test_mp4_needs_its_extra(monkeypatch):
    monkeypatch.setattr(clips, "has_video", lambda: False)
    with pytest.raises(UserError, match=r"needs imageio-ffmpeg: pip install 'ditjax\[video\]'"):
        clips.check_mp4(8)
    with pytest.raises(UserError, match=r"--mp4 is for clips"):
        clips.check_mp4(1)
