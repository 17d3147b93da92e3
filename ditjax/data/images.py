"""Images that a user names: one file, or a set in batches, in an npz of ADM or in a folder."""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ditjax.data.folders import LeftOut, report_reading, walk_images
from ditjax.data.pictures import (
    converted,
    open_picture,
    peculiarities,
    readable_formats,
    readable_suffixes,
    upright,
    upright_size,
)
from ditjax.errors import FaultError, UserError, first_few, reason
from ditjax.files import faults, npz
from ditjax.files.store import local_copy, place

Images = NDArray[np.uint8]
_T = TypeVar("_T")


def of_file(path: Path, look: Callable[[Image.Image], _T]) -> _T:
    """What `look` returns of the image in a file, whose pixels are unread.

    Raises UserError for a file that is damaged or cannot be opened, and FaultError if the file
    system does not answer.
    """

    def read() -> _T:
        with open_picture(path) as opened:
            return look(opened)

    try:
        return faults.retried(path, read)
    except FaultError:
        raise
    except Exception as error:  # Pillow raises a dozen types for damaged files
        if isinstance(error, UnidentifiedImageError):
            known = ", ".join(readable_formats())
            raise UserError(f"{path} is damaged, or not an image of {known}.") from error
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        raise UserError(f"{path} is damaged: {reason(error)}.") from error


def given_picture(path: str | os.PathLike[str], what: str) -> Image.Image:
    """The image of a file that a user names, with its pixels read, by the rule of all pictures.

    A line says what is seen in a way of its own (`pictures.peculiarities`). Raises as `of_file`,
    and calls the image `what`.
    """

    def look(opened: Image.Image) -> Image.Image:
        odd = peculiarities(opened)
        opened.load()
        image = upright(opened)
        if image.has_transparency_data and image.mode in ("L", "RGB"):
            image = converted(image, image.mode)
        if odd and image.mode in ("1", "L", "RGB"):  # others are refused
            report_reading(f"{what} {path}: {', '.join(odd)}")
        return image

    try:
        return of_file(Path(path), look)
    except UserError as error:
        raise UserError(f"{what} {error}") from error


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """`count` unread images of height x width, in an npz (`files` is empty) or in `files`.

    Of clips, which only an npz holds, `frames` is more than 1. `note` says what was left out, and
    what is read in a way of its own; '' if nothing.
    """

    path: Path
    count: int
    height: int
    width: int
    files: tuple[Path, ...] = ()
    note: str = ""
    frames: int = 1

    def __str__(self) -> str:
        """'40 images of 32x32 in samples.npz'."""
        what = f"clips of {self.frames} frames" if self.frames > 1 else "images"
        size = f"{self.height}x{self.width}"
        return f"{self.count:,} {what} of {size} in {self.path}{self.note}"

    def batches(self, size: int) -> Iterator[Images]:
        """Batches u8[B,..,H,W,3] in order, B = size except for the last; grey is repeated to RGB.

        One batch is in memory at a time. Raises a UserError that names a damaged file.
        """
        if size < 1:
            raise UserError(f"batches of {size} images: expected at least 1.")
        if self.files:
            for start in range(0, self.count, size):
                yield np.stack([self._file(path) for path in self.files[start : start + size]])
            return
        with npz.reading(self.path) as archive:
            for images in npz.rows(archive, "arr_0", size):
                yield np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images

    def _file(self, path: Path) -> Images:
        pixels = of_file(path, _pixels)
        if pixels.shape != (self.height, self.width, 3):
            raise UserError(_differs(path, pixels.shape[:2], self))
        return pixels


def _pixels(opened: Image.Image) -> Images:
    opened.load()
    return np.asarray(converted(upright(opened), "RGB"))


def open_images(path: str | os.PathLike[str]) -> ImageSet:
    """An npz with arr_0 u8[N,H,W,C] or u8[N,F,H,W,C], C = 1 or 3, or a folder of equal images.

    The images of a folder are the files below it, read as `data/pictures.py` says, in the order of
    their paths. Sizes are read now, pixels in `batches`. Raises UserError for an empty set, another
    type or shape, or the first image that is damaged or differs in size from the first, and
    FaultError if the file system does not answer.
    """
    path = place(path)
    return _open_folder(local_copy(path)) if faults.is_folder(path) else _open_npz(path)


# Of an npz of samples, those that are read: here, and by `evaluate`.
_ARRAYS = ("arr_0", "label", "provenance")


def _open_npz(path: Path) -> ImageSet:
    with npz.reading(path) as archive:
        shape, dtype = npz.shape_and_dtype(archive, "arr_0")
        others = [name for name in npz.names(archive) if name not in _ARRAYS]
    image = len(shape) in (4, 5) and shape[-1] in (1, 3) and 0 not in shape[1:]
    if dtype != np.uint8 or not image:
        raise UserError(
            f"{path}: arr_0 is {dtype}{list(shape)}, expected u8[N,H,W,C], or u8[N,F,H,W,C] of"
            " clips, with C = 1 or 3."
        )
    if shape[0] == 0:
        raise UserError(f"{path}: arr_0 holds no image.")
    note = f"; arrays left out: {first_few(others, 5)}" if others else ""
    height, width = shape[-3:-1]
    return ImageSet(path, shape[0], height, width, note=note, frames=math.prod(shape[1:-3]))


def _open_folder(path: Path) -> ImageSet:
    def walk() -> tuple[tuple[Path, ...], LeftOut]:
        left = LeftOut()
        return tuple(sorted(file.path for file in walk_images(path, path, left))), left

    files, left = faults.retried(path, walk)
    peculiar = Counter[str]()
    if not files:
        raise UserError(
            f"{path} holds no image: expected files ending in"
            f" {', '.join(sorted(readable_suffixes()))}." + (f" It holds: {left}." if left else "")
        )
    found: ImageSet | None = None
    for file in files:
        (height, width), odd = of_file(file, lambda x: (upright_size(x), peculiarities(x)))
        peculiar.update(odd)
        found = found or ImageSet(path, len(files), height, width, files)
        if (height, width) != (found.height, found.width):
            raise UserError(_differs(file, (height, width), found))
    assert found is not None
    note = f"; left out: {left}" if left else "; nothing left out"
    note += "".join(f"; {count} {what}" for what, count in sorted(peculiar.items()))
    return dataclasses.replace(found, note=note)


def _differs(file: Path, size: tuple[int, ...], of: ImageSet) -> str:
    return (
        f"{file} is {size[0]}x{size[1]} and {of.files[0].name} {of.height}x{of.width}: expected"
        " one size; resize them all the same way first."
    )
