"""Image files: which are read, and what is seen of them, by the same rule wherever files are read.

An image is shown upright, as its EXIF orientation says; transparent parts are white; of 16 bits the
upper 8 are read; of an animation or of several pages the first. Colour profiles are not applied.
Records of tensorflow-datasets are not turned, because the pipelines of ADM and DiT do not turn
ImageNet's.
"""

import functools
import io
import re
import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, features

# PIL's own limit against decompression bombs: twice the pixels of 256 MiB at 3 bytes a pixel.
MAX_PIXELS = 178_956_970

# Of Pillow's formats those of pictures that have a magic number and whose decoders start no outside
# program; the value is the feature that Pillow may have been built without.
_FORMATS = {
    "AVIF": "avif",
    "BMP": "",
    "GIF": "",
    "JPEG": "",
    "JPEG2000": "jpg_2000",
    "PNG": "",
    "PPM": "",
    "TIFF": "",
    "WEBP": "webp",
}
_ORIENTATION = 0x0112  # the tag of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """The formats of image files that are read; those that this Pillow lacks are not."""
    Image.init()
    return tuple(
        name
        for name, feature in _FORMATS.items()
        if name in Image.OPEN and (not feature or features.check(feature))
    )


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """The suffixes of image files that are read, in lower case: '.jpg', '.png', ..."""
    known = {*readable_formats(), "MPO"}  # cameras' JPEGs of several images
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if name in known
    )


def open_picture(source: Path | IO[bytes]) -> Image.Image:
    """An encoded image with its pixels unread.

    Only the decoders of `readable_formats` see the bytes. Raises ValueError for more than
    MAX_PIXELS pixels, and whatever Pillow raises for damaged files.
    """
    image = Image.open(source, formats=readable_formats())
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels")
    return image


def decode_image(encoded: bytes) -> Image.Image:
    """Encoded bytes -> a fully decoded PIL image, in the mode of the file.

    Raises ValueError for bytes that are damaged, truncated, of an unknown format, or that decode to
    more than MAX_PIXELS pixels.
    """
    try:
        image = open_picture(io.BytesIO(encoded))
        image.load()
    except Exception as error:  # Pillow raises a dozen types for damaged files
        raise ValueError(
            re.sub(r"\s*<_io\.BytesIO[^>]*>", "", str(error)) or repr(error)
        ) from error
    return image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that is still to be applied, 1 for none."""
    if image.format == "TIFF":
        return 1  # Pillow applies it when the pixels are loaded
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Not PNG's own method, which decodes all pixels first.
            found = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF beside sound pixels, which fails in a dozen ways
        return 1
    return found if found in _TURNS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an image that is shown `upright`; its pixels may be unread."""
    width, height = image.size
    return (width, height) if _orientation(image) >= 5 else (height, width)


def upright(image: Image.Image) -> Image.Image:
    """The image turned and mirrored as its EXIF orientation says."""
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def converted(image: Image.Image, mode: str) -> Image.Image:
    """A loaded image of any mode in mode 'L' or 'RGB', transparent parts white.

    Raises ValueError for pixels of more than 16 bits, whose white is unknown.
    """
    return _on_white(_of_eight_bits(image)).convert(mode)


def _of_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are 32-bit floats: expected 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    # convert() would clip 16 bits to white.
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() >= 1 << 16:
        raise ValueError("its pixels are 32-bit integers: expected 8 or 16 bits")
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        pixels = np.where(pixels == hidden, (1 << 16) - 1, pixels)
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    """The image where it is opaque, and white behind it."""
    if not image.has_transparency_data:
        return image
    if image.mode == "La":  # which converts to nothing else
        image = image.convert("LA")
    seen = image.convert("RGBA")
    if seen.getchannel("A").getextrema() == (255, 255):
        return image
    white = Image.new("RGBA", seen.size, "white")
    white.alpha_composite(seen)
    return white.convert("RGB")


def peculiarities(image: Image.Image) -> list[str]:
    """What a reader should know of how an image is read, as phrases to be counted."""
    found = []
    if _orientation(image) != 1:
        found.append("turned upright by EXIF")
    if image.has_transparency_data:
        found.append("with an alpha channel, shown on white")
    if image.mode.startswith("I"):
        found.append("of 16 bits, read by the upper 8")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        found.append("of several frames or pages, whose first is the image")
    return found
