"""What is given to an edit: images and masks as people have them, as arrays of a recipe."""

import fnmatch
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ditjax.config import Config
from ditjax.data.crop import normalize
from ditjax.data.images import given_picture
from ditjax.diffusion.denoising import estimate_noise
from ditjax.errors import UserError, shown
from ditjax.files.paths import split_paths
from ditjax.training.task import Known

# A path, a PIL image, u8[H,W], [H,W,C] or [N,H,W,C], or a list of these.
Pictures = str | os.PathLike[str] | Image.Image | np.ndarray | Sequence[Any]
_MODES = {"L": 1, "RGB": 3}


class Request(NamedTuple):
    """An edit: what is given of N images, its description for a record, and the images' (H, W)."""

    given: Known
    record: dict[str, Any]
    size: tuple[int, int]

    @property
    def num(self) -> int:
        """N; sample i is of image i % N."""
        return len(self.given.image)


def inpaint_request(c: Config, image: Pictures, mask: Pictures) -> Request:
    """Complete images where the mask is white (at least 128, or True), as in diffusers.

    Images u8[N,H,W,C] are of the recipe's size or larger and of its channels, masks [N,H,W], one or
    N. Raises UserError for others, and for a mask without white.
    """
    pixels, size = read_images(c, image, "image"), c.data.image_size
    height, width = pixels.shape[1:3]
    if min(height, width) < size:
        raise UserError(
            f"image of {height}x{width}: expected at least {size}x{size}, the size of the network's"
            " images; resize it first."
        )
    holes = _masks(mask)
    if holes.shape[1:] != pixels.shape[1:3] or len(holes) not in (1, len(pixels)):
        raise UserError(
            f"mask of {_sizes(holes)} and image of {_sizes(pixels)}: expected one mask, or one of"
            " each image, of the same size."
        )
    if not holes.any(axis=(1, 2)).all():
        raise UserError(
            "mask is black everywhere: expected white, at least 128 of 255, where the image is to"
            " be drawn."
        )
    known = np.broadcast_to(~holes[..., None], (*pixels.shape[:3], 1)).astype(np.float32)
    return Request(
        Known(normalize(pixels), known),
        {"edit": "inpaint", "image": pixels_digest(pixels), "mask": pixels_digest(holes)},
        (height, width),
    )


def upscale_request(c: Config, image: Pictures) -> Request:
    """Draw images whose means over f x f pixels are the given ones, u8[N,h,w,C].

    Raises UserError for images whose side does not divide the recipe's.
    """
    pixels, size = read_images(c, image, "image"), c.data.image_size
    height, width = pixels.shape[1:3]
    if height != width or size % height or height == size:
        raise UserError(
            f"image of {height}x{width} to enlarge: expected a square image whose side divides"
            f" {size}, the size of the network's images, and is smaller."
        )
    return Request(
        Known(normalize(pixels)),
        {"edit": "upscale", "image": pixels_digest(pixels), "factor": size // height},
        (size, size),
    )


def denoise_request(c: Config, image: Pictures) -> Request:
    """Remove white noise of standard deviation config.edit.sigma, or of the estimated one.

    Images are of the recipe's size or larger, u8[N,H,W,C], or floats in the same units that noise
    may have moved beyond 0 and 255. Raises UserError for others.
    """
    pixels, size = read_images(c, image, "image", floats=True), c.data.image_size
    height, width = pixels.shape[1:3]
    if min(height, width) < size:
        raise UserError(
            f"image of {height}x{width} to denoise: expected at least {size}x{size}, the size of"
            " the network's images."
        )
    if c.edit.sigma == 0 and c.edit.estimate == "residual":  # while the images are drawn
        given = Known(
            pixels.astype(np.float32) / 127.5 - 1, sigma=np.zeros(len(pixels), np.float32)
        )
        record = {"edit": "denoise", "image": pixels_digest(pixels), "estimated": "residual"}
        return Request(given, record, (height, width))
    sigma = np.array([c.edit.sigma or estimate_noise(each) for each in pixels])
    if not sigma.all():
        raise UserError(
            "an image to denoise has no noise that could be estimated: give its standard deviation,"
            " config.edit.sigma."
        )
    given = Known(pixels.astype(np.float32) / 127.5 - 1, sigma=sigma.astype(np.float32) / 127.5)
    found = {"sigma": sigma.tolist(), "estimated": c.edit.sigma == 0}
    return Request(
        given, {"edit": "denoise", "image": pixels_digest(pixels), **found}, (height, width)
    )


class EditKind(NamedTuple):
    """A value of --edit: the function that makes its request, and the flags that it takes.

    `reads` are patterns of the keys of config.edit and config.sample that affect it.
    """

    make: Callable[..., Request]
    flags: tuple[str, ...]
    reads: tuple[str, ...]


_OF_METHODS = (
    "edit.method",
    "edit.jump",
    "edit.resample",
    "edit.strength",
    "sample.*",
    "given.noise",
)
_OF_NOISE = (
    "edit.sigma",
    "edit.estimate",
    *(f"sample.{k}" for k in ("num", "batch_size", "weights", "adapters", "cfg_scale")),
)
# --edit -> kind
EDITS: Mapping[str, EditKind] = {
    "inpaint": EditKind(inpaint_request, ("image", "mask"), _OF_METHODS),
    "upscale": EditKind(upscale_request, ("image",), _OF_METHODS),
    "denoise": EditKind(denoise_request, ("image",), _OF_NOISE),
}


def check_read(edit: str, keys: Iterable[str]) -> None:
    """Raise UserError for a key of config.edit or config.sample that does not affect an edit."""
    for key in keys:
        mine = key.startswith(("edit.", "sample."))
        if mine and not any(fnmatch.fnmatch(key, pattern) for pattern in EDITS[edit].reads):
            raise UserError(f"config.{key} has no effect on edit {edit!r}: remove it.")


def request_of(
    c: Config, edit: str, flags: Mapping[str, str], keys: Sequence[str] = ()
) -> Request | None:
    """Build the edit of a command line; None without one.

    `flags` are lists of files, '' for those not given, and `keys` the keys of the recipe that are.
    Raises UserError for what the edit does not take, and what it lacks.
    """
    takes = EDITS[edit].flags if edit else ()
    given = [f"--{name}" for name, value in flags.items() if value and name not in takes]
    given += [] if edit else [f"--config.{key}" for key in keys if key.startswith("edit.")]
    if given:
        without = f"with --edit={edit}" if edit else f"without --edit, one of {', '.join(EDITS)}"
        raise UserError(f"{' and '.join(given)}: no effect {without}: remove it.")
    if not edit:
        return None
    check_read(edit, keys)
    if missing := [f"--{name}" for name in takes if not flags[name]]:
        raise UserError(f"--edit={edit} needs {' and '.join(missing)}.")
    return EDITS[edit].make(c, **{name: split_paths(flags[name], f"--{name}") for name in takes})


# ---- from what people have to arrays


def read_images(c: Config, source: Pictures, what: str, *, floats: bool = False) -> np.ndarray:
    """u8[N,H,W,C] with the recipe's channels, or finite floats if these are allowed."""
    if c.data.frames > 1:
        raise UserError(
            f"config.data.frames is {c.data.frames}: edits are of images, and this network draws"
            " clips."
        )
    images = np.stack(_same_size([_pixels(each, what) for each in _each(source)], what))
    images = images[..., None] if images.ndim == 3 else images
    fits = images.dtype == np.uint8 or (floats and images.dtype in (np.float32, np.float64))
    if not fits or images.shape[-1] != c.data.channels:
        wanted = {count: mode for mode, count in _MODES.items()}[c.data.channels]
        raise UserError(
            f"{what} is {images.dtype}{list(images.shape[1:])}: expected u8[H,W,{c.data.channels}],"
            f" an image of mode {wanted!r}; convert it first."
        )
    if not np.isfinite(images).all():
        raise UserError(f"{what} has pixels that are not finite: expected numbers.")
    return images


def _masks(source: Pictures) -> np.ndarray:
    """bool[N,H,W], True where it is white."""
    if isinstance(source, np.ndarray) and source.ndim == 3:
        source = list(source)
    masks = np.stack(_same_size([_pixels(each, "mask") for each in _each(source)], "mask"))
    masks = masks[..., 0] if masks.ndim == 4 and masks.shape[-1] == 1 else masks
    if masks.ndim != 3 or masks.dtype not in (np.uint8, np.bool_):
        raise UserError(
            f"mask is {masks.dtype}{list(masks.shape[1:])}: expected u8[H,W] or bool[H,W], an image"
            " of mode 'L' or '1'; convert it first."
        )
    return masks >= (128 if masks.dtype == np.uint8 else 1)


def _each(source: Pictures) -> list[Any]:
    """The images of a source, one by one."""
    if isinstance(source, np.ndarray):
        return list(source) if source.ndim == 4 else [source]
    if isinstance(source, Sequence) and not isinstance(source, str):
        return list(source)
    return [source]


def _pixels(each: Any, what: str) -> np.ndarray:
    """The pixels of an array, a PIL image or a file, as they are: [H,W] or [H,W,C]."""
    if isinstance(each, str | os.PathLike):
        each = given_picture(each, what)
    if isinstance(each, Image.Image):
        if each.mode not in (*_MODES, "1"):
            raise UserError(
                f"{what} is of mode {each.mode!r}: expected {', '.join(map(repr, _MODES))} (or '1'"
                " for a mask); convert it first."
            )
        return np.asarray(each)
    if not isinstance(each, np.ndarray) or each.ndim not in (2, 3) or 0 in each.shape:
        raise UserError(
            f"{what} is {shown(each)[:80]}: expected a path, a PIL image or an array [H,W],"
            " [H,W,C] or [N,H,W,C]."
        )
    return each


def _same_size(images: list[np.ndarray], what: str) -> list[np.ndarray]:
    kinds = {f"{each.dtype}{list(each.shape)}" for each in images}
    if len(kinds) != 1:
        found = " and ".join(sorted(kinds)) or "none"
        raise UserError(f"{what}s of {found}: expected at least one, all of one size and type.")
    return images


def _sizes(images: np.ndarray) -> str:
    """'2 x 8x8', or '8x8' of one."""
    size = f"{images.shape[1]}x{images.shape[2]}"
    return size if len(images) == 1 else f"{len(images)} x {size}"


def pixels_digest(array: np.ndarray) -> str:
    """The SHA-256 of an array, its type and its shape."""
    text = f"{array.dtype}{array.shape}".encode()
    return hashlib.sha256(text + np.ascontiguousarray(array).tobytes()).hexdigest()
