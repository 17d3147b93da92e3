"""Sets of samples in batches: an npz as ADM's evaluator reads it, or a folder of PNG and JPEGs."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ditjax.errors import UserError
from ditjax.files import npz

if TYPE_CHECKING:
    from PIL import Image

Images = NDArray[np.uint8]

# PIL's own limit against decompression bombs: twice the pixels of 256 MiB at 3 bytes a pixel.
MAX_PIXELS = 178_956_970
SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """`count` unread images of height x width, in an npz (`files` is empty) or in `files`."""

    path: Path
    count: int
    height: int
    width: int
    files: tuple[Path, ...] = ()

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
            with open_picture(path, ("PNG", "JPEG")) as opened:
                opened.load()
                transparent = "A" in opened.getbands() or "transparency" in opened.info
                image = opened.convert("RGBA") if transparent else opened
                if transparent and image.getchannel("A").getextrema() != (255, 255):
                    raise UserError(f"{path} is transparent in places: expected grey or RGB.")
                if opened.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
                    raise UserError(f"{path} is {opened.mode}: expected 8-bit grey or RGB.")
                pixels = np.asarray(image.convert("RGB"))
        except UserError:
            raise
        except Exception as error:  # Pillow raises a dozen types for damaged files
            raise UserError(f"{path} is damaged: {error}.") from error
        if pixels.shape != (self.height, self.width, 3):
            raise UserError(_differs(path, pixels.shape[:2], self))
        return pixels


def open_picture(source: Path | IO[bytes], formats: tuple[str, ...]) -> "Image.Image":
    """An encoded image with its pixels unread.

    Only the decoders of `formats` see the bytes, because some others start outside programs. Raises
    ValueError for more than MAX_PIXELS pixels, and whatever Pillow raises for damaged files.
    """
    from PIL import Image

    image = Image.open(source, formats=formats)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels")
    return image


def open_images(path: str | os.PathLike[str]) -> ImageSet:
    """An npz with arr_0 u8[N,H,W,C], C = 1 or 3, or a folder of images of one size.

    The images of a folder are the files below it with one of SUFFIXES, in the order of their paths.
    Sizes are read now, pixels in `batches`. Raises UserError for an empty set, another type or
    shape, or the first image that is damaged or differs in size from the first.
    """
    path = Path(path)
    return _open_folder(path) if path.is_dir() else _open_npz(path)


def _open_npz(path: Path) -> ImageSet:
    with npz.reading(path) as archive:
        shape, dtype = npz.shape_and_dtype(archive, "arr_0")
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[1:3]:
        raise UserError(
            f"{path}: arr_0 is {dtype}{list(shape)}, expected u8[N,H,W,C] with C = 1 or 3."
        )
    if shape[0] == 0:
        raise UserError(f"{path}: arr_0 holds no image.")
    return ImageSet(path, *shape[:3])


def _open_folder(path: Path) -> ImageSet:
    files = tuple(
        sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in SUFFIXES
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
    )
    if not files:
        raise UserError(f"{path} holds no image: expected files ending in {', '.join(SUFFIXES)}.")
    found: ImageSet | None = None
    for file in files:
        try:
            with open_picture(file, ("PNG", "JPEG")) as image:
                width, height = image.size
        except Exception as error:
            raise UserError(f"{file} is damaged: {error}.") from error
        found = found or ImageSet(path, len(files), height, width, files)
        if (height, width) != (found.height, found.width):
            raise UserError(_differs(file, (height, width), found))
    assert found is not None
    return found


def _differs(file: Path, size: tuple[int, ...], of: ImageSet) -> str:
    return (
        f"{file} is {size[0]}x{size[1]} and {of.files[0].name} {of.height}x{of.width}: expected"
        " one size; resize them all the same way first."
    )
