"""Clips as files: animated pictures in and out, MP4 by way of an extra, folders of frames."""

import importlib.util
import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ditjax.errors import UserError

FRAMES_SUFFIX = ".frames"  # of a folder whose pictures are the frames of one clip
VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".webm", ".mkv", ".avi"})
_EXTRA = "pip install 'ditjax[video]'"
_MILLISECONDS = 100  # a frame of a GIF, whose clock counts hundredths of a second
_SCALE = 16  # the sides of an MP4's frames are its multiples


def picture(pixels: NDArray[np.uint8]) -> Image.Image:
    """u8[H,W,C], C 1 or 3 -> a PIL image."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def as_animation(frames: Sequence[Image.Image]) -> bytes:
    """Opaque frames of one size as one animated PNG, without loss."""
    buffer = io.BytesIO()
    first, *others = frames
    # Two ways of covering the frame before, the same for opaque ones: Pillow would merge frames
    # that are equal in pixels and way.
    ways = [i % 2 for i in range(len(frames))]
    first.save(
        buffer,
        format="PNG",
        save_all=True,
        append_images=others,
        duration=_MILLISECONDS,
        blend=ways,
    )
    return buffer.getvalue()


def encode_gif(frames: NDArray[np.uint8]) -> bytes:
    """u8[F,H,W,C] -> an endless GIF. Grey is exact; of colours, 256 a frame are kept."""
    buffer = io.BytesIO()
    first, *others = map(picture, frames)
    first.save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=others,
        duration=_MILLISECONDS,
        loop=0,
        disposal=1,
    )
    return buffer.getvalue()


def has_video() -> bool:
    """Whether videos can be read and written: imageio-ffmpeg is installed."""
    return importlib.util.find_spec("imageio_ffmpeg") is not None


def check_mp4(frames: int) -> None:
    """Raise UserError unless clips of so many frames can be written as MP4."""
    if frames == 1:
        raise UserError("--mp4 is for clips, and config.data.frames is 1: remove it.")
    if not has_video():
        raise UserError(f"--mp4 needs imageio-ffmpeg: {_EXTRA}; without it, clips are GIFs.")


def encode_mp4(frames: NDArray[np.uint8]) -> bytes:
    """u8[F,H,W,C] -> H.264 in MP4; white is added below and at the right, to multiples of 16."""
    ffmpeg: Any = importlib.import_module("imageio_ffmpeg")
    frames = np.repeat(frames, 3, axis=-1) if frames.shape[-1] == 1 else frames
    F, H, W, _ = frames.shape
    padding = ((0, 0), (0, -H % _SCALE), (0, -W % _SCALE), (0, 0))
    frames = np.pad(frames, padding, constant_values=255)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        size = (frames.shape[2], frames.shape[1])
        rate = 1000 // _MILLISECONDS
        writer = ffmpeg.write_frames(str(path), size, fps=rate, codec="libx264", quality=8)
        writer.send(None)
        for i in range(F):
            writer.send(np.ascontiguousarray(frames[i]).tobytes())
        writer.close()
        return path.read_bytes()


def video_frames(path: Path) -> Iterator[Image.Image]:
    """The frames of a video file, in order. Raises ValueError for one that cannot be read."""
    ffmpeg: Any = importlib.import_module("imageio_ffmpeg")
    try:
        reader = ffmpeg.read_frames(str(path))
        size = next(reader)["size"]
        for frame in reader:
            yield Image.frombytes("RGB", size, frame)
    except (OSError, RuntimeError, StopIteration, KeyError) as error:
        raise ValueError(str(error).splitlines()[0] if str(error) else repr(error)) from error
