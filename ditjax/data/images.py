"""Sets of samples in batches: an npz as ADM's evaluator reads it, or a folder of image files."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditjax.data.folders import LeftOut, walk_images
from ditjax.data.pictures import (
    converted,
    open_picture,
    peculiarities,
    readable_suffixes,
    upright,
    upright_size,
)
from ditjax.errors import UserError, first_few
from ditjax.files import npz

Images = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """`count` unread images of height x width, in an npz (`files` is empty) or in `files`.

    `note` says what was left out, and what is read in a way of its own; '' if nothing.
    """

    path: Path
    count: int
    height: int
    width: int
    files: tuple[Path, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        """'40 images of 32x32 in samples.npz'."""
        size = f"{self.height}x{self.width}"
        return f"{self.count:,} images of {size} in {self.path}{self.note}"

    def batches(self, size: int) -> Iterator[Images]:
        """Batches u8[B,H,W,3] in order, B = size except for the last; grey is repeated to RGB.

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
                yield np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images

    def _file(self, path: Path) -> Images:
        try:
            with open_picture(path) as opened:
                opened.load()
                pixels = np.asarray(converted(upright(opened), "RGB"))
        except Exception as error:  # Pillow raises a dozen types for damaged files
            raise UserError(f"{path} is damaged: {error}.") from error
        if pixels.shape != (self.height, self.width, 3):
            raise UserError(_differs(path, pixels.shape[:2], self))
        return pixels


def open_images(path: str | os.PathLike[str]) -> ImageSet:
    """An npz with arr_0 u8[N,H,W,C], C = 1 or 3, or a folder of images of one size.

    The images of a folder are the files below it, read as `data/pictures.py` says, in the order of
    their paths. Sizes are read now, pixels in `batches`. Raises UserError for an empty set, another
    type or shape, or the first image that is damaged or differs in size from the first.
    """
    path = Path(path)
    return _open_folder(path) if path.is_dir() else _open_npz(path)


# Of an npz of samples, those that are read: here, and by `evaluate`.
_ARRAYS = ("arr_0", "label", "provenance")


def _open_npz(path: Path) -> ImageSet:
    with npz.reading(path) as archive:
        shape, dtype = npz.shape_and_dtype(archive, "arr_0")
        others = [name for name in npz.names(archive) if name not in _ARRAYS]
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[1:3]:
        raise UserError(
            f"{path}: arr_0 is {dtype}{list(shape)}, expected u8[N,H,W,C] with C = 1 or 3."
        )
    if shape[0] == 0:
        raise UserError(f"{path}: arr_0 holds no image.")
    note = f"; arrays left out: {first_few(others, 5)}" if others else ""
    return ImageSet(path, *shape[:3], note=note)


def _open_folder(path: Path) -> ImageSet:
    left, peculiar = LeftOut(), Counter[str]()
    files = tuple(sorted(file.path for file in walk_images(path, path, left)))
    if not files:
        raise UserError(
            f"{path} holds no image: expected files ending in"
            f" {', '.join(sorted(readable_suffixes()))}." + (f" It holds: {left}." if left else "")
        )
    found: ImageSet | None = None
    for file in files:
        try:
            with open_picture(file) as image:
                height, width = upright_size(image)
                peculiar.update(peculiarities(image))
        except Exception as error:
            raise UserError(f"{file} is damaged: {error}.") from error
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
