"""Pixels: the centre crop of ADM and DiT, modes, mirroring, and the range [-1, 1]."""

import numpy as np
from PIL import Image

from ditjax.data.pictures import MAX_PIXELS, converted
from ditjax.errors import UserError

_MODES = {1: "L", 3: "RGB"}


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre crop of ADM and DiT: PIL image -> PIL image [size, size] of the same mode.

    Halve with BOX while the shorter side is at least 2*size; scale with BICUBIC until it is size
    (upwards too); keep the central square, its corner at (dim - size) // 2.

    Raises UserError if the scaled image would have more than MAX_PIXELS pixels.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise UserError(
            f"an image of {image.width}x{image.height} is too long to be scaled to {size}: it would"
            f" have more than {MAX_PIXELS} pixels; crop it."
        )
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def crop_pixels(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """A PIL image of any mode -> u8[size,size,channels], grey for 1 channel and RGB for 3.

    The mode is converted first: a palette's numbers must not be averaged. Raises ValueError or
    OSError for an image that cannot be converted.
    """
    cropped = center_crop(converted(image, _MODES[channels]), size)
    return np.asarray(cropped).reshape(size, size, channels)


def clip_pixels(
    image: Image.Image, frames: int, stride: int, size: int, channels: int
) -> np.ndarray:
    """Frames 0, stride, ... of an animated PIL image -> u8[frames,size,size,channels].

    Each is cropped as an image is. Raises as `crop_pixels`, and EOFError past the last frame.
    """
    clip = np.empty((frames, size, size, channels), np.uint8)
    for i in range(frames):
        image.seek(i * stride)
        clip[i] = crop_pixels(image, size, channels)
    return clip


def resize_images(images: np.ndarray, size: int) -> np.ndarray:
    """`center_crop` of every image: u8[N,H,W,C], C 1 or 3 -> u8[N,size,size,C]."""
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(
            f"images are {images.dtype}{list(images.shape)}: resize_images takes uint8 [N,H,W,C]."
        )
    channels = images.shape[-1]
    check_pixels(size, channels)
    resized = np.empty((len(images), size, size, channels), np.uint8)
    for i, image in enumerate(images):
        pixels = Image.fromarray(image[:, :, 0] if channels == 1 else image)
        resized[i] = crop_pixels(pixels, size, channels)
    return resized


def mirror(images: np.ndarray, mirrored: np.ndarray) -> None:
    """Flip the rows `mirrored` bool[N] of images [N,..,H,W,C] left-right, in place."""
    images[mirrored] = images[mirrored][..., ::-1, :]


def normalize(images: np.ndarray) -> np.ndarray:
    """u8 of any shape -> f32 in [-1, 1]: x / 127.5 - 1."""
    x = images.astype(np.float32)
    x /= 127.5
    x -= 1.0
    return x


def check_pixels(size: int, channels: int) -> None:
    """Raise UserError for a size below 1, or channels other than 1 and 3."""
    if size < 1:
        raise UserError(f"image_size is {size}: expected at least 1 pixel.")
    if channels not in _MODES:
        raise UserError(f"channels is {channels}: images have 1 (grey) or 3 (RGB).")
