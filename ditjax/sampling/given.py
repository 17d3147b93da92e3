"""What samples are given beside their labels: images to edit, control images, held-out records."""

import hashlib
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from ditjax.config import Config
from ditjax.data import source, stream
from ditjax.data.crop import normalize
from ditjax.data.images import given_picture
from ditjax.data.tokenizers import check_text
from ditjax.errors import UserError, reason, shown
from ditjax.files.store import place
from ditjax.runs import opening
from ditjax.sampling.program import sampling_of
from ditjax.tasks import make_task
from ditjax.tasks.control import map_channels
from ditjax.training.task import Beside, Known

ControlImage = str | os.PathLike[str] | Image.Image | np.ndarray
_MODES = {1: "L", 3: "RGB"}


class GivenRows(NamedTuple):
    """What each sample is given.

    `rows(indices i[n])` are {'beside': `Beside` of n rows}, or images and labels of records,
    {'image': f32[n,H,W,C] in [-1, 1], 'label': i[n]}, and with captions 'caption' i32[n,M] and
    'classes' i32[n,K], from which the task makes it. Where a row has both, what is given comes
    first. `record` identifies it in a protocol. Sample i is of record i % `records`; 0 if it is of
    none.
    """

    rows: Callable[[np.ndarray], Mapping[str, Any]]
    record: Mapping[str, Any]
    records: int = 0


def cycled(indices: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Row i % len of each index i."""
    return rows[indices % len(rows)]


def given_known(known: Known, beside: GivenRows | None = None) -> GivenRows:
    """What is known of N images, of i % N for sample i, and what else samples are given."""

    def rows(indices: np.ndarray) -> Mapping[str, Any]:
        each = jax.tree.map(lambda x: cycled(indices, np.asarray(x)), known)
        found = dict(beside.rows(indices)) if beside else {}
        return {**found, "beside": found.get("beside", Beside())._replace(known=each)}

    return GivenRows(rows, beside.record if beside else {})


def held_out_given(c: Config) -> GivenRows | None:
    """Sample i is of record i of config.evaluate.split, and begins again after the last.

    None for a task whose samples need nothing but labels. Raises UserError for a split that is
    missing.
    """
    needs = sampling_of(c, make_task(c)).needs
    if needs is None:
        return None
    spec = opening.held_out(c)
    info = source.dataset_info(spec.name, spec.split, spec.data_dir)

    def read(indices: np.ndarray) -> Mapping[str, Any]:
        (batch,) = stream.read_records(spec, indices % info.num_examples, len(indices))
        return batch

    def rows(indices: np.ndarray) -> Mapping[str, Any]:
        batch = read(indices)
        if needs.image is None:
            return batch
        shown = read(indices + needs.image) if needs.image else batch
        return {**batch, "beside": Beside(vector=shown["image"])}

    record = {needs.name: f"{info.full_name}/{c.evaluate.split}", **needs.protocol()}
    return GivenRows(rows, record, info.num_examples)


MAX_PROMPTS = 10_000


def read_prompts(text: str) -> list[str]:
    """The prompts of a file, one a line, or the text itself if it names no file.

    Raises UserError for a file that is not UTF-8, and for an empty line.
    """
    path = place(text) if len(text.encode()) <= _LONGEST_NAME and "\0" not in text else None
    if path is None or not path.is_file():
        return [text]
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 ({reason(error)}).") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"{path}, line {number}: it is empty; expected a prompt in each line.")
    return lines


_LONGEST_NAME = 1024  # bytes of a path


def checked_prompts(prompts: Sequence[str]) -> list[str]:
    """Normalize prompts to Unicode's NFC.

    Raises UserError for an empty list, for too many prompts, and for one that is not a plain text.
    """
    if not 0 < len(prompts) <= MAX_PROMPTS:
        raise UserError(f"{len(prompts):,} prompts: expected 1 to {MAX_PROMPTS:,}.")
    for text in prompts:
        if not isinstance(text, str) or not text.isprintable():
            raise UserError(
                f"prompt {shown(text)}: expected a text without control characters or line breaks."
            )
        check_text(text)
    return [unicodedata.normalize("NFC", text) for text in prompts]


def given_prompts(c: Config, prompts: Sequence[str]) -> GivenRows:
    """Texts, of i % N for sample i, as `checked_prompts`.

    Raises UserError, also for a network that takes classes, or images of records.
    """
    needs = sampling_of(c, make_task(c)).needs
    if needs is None or needs.texts is None:
        raise UserError("prompts are given, and the network takes classes: give --classes instead.")
    plain = checked_prompts(prompts)
    if needs.image is not None:
        raise UserError(
            "prompts are given, and samples of config.unclip.source="
            f"{c.unclip.source!r} are of images of records: set it to 'prior', 'text' or 'none'."
        )
    ids = needs.texts(plain)

    def rows(indices: np.ndarray) -> Mapping[str, Any]:
        return {"beside": Beside(context=cycled(indices, ids))}

    digest = hashlib.sha256("\n".join(plain).encode()).hexdigest()
    return GivenRows(rows, {needs.name: f"SHA-256:{digest}", **needs.protocol()})


def given_controls(c: Config, images: ControlImage | Sequence[ControlImage]) -> GivenRows:
    """Control images, one for each control of the recipe: files, PIL images or u8 arrays.

    An array [n,H,W,K] controls sample i by image i % n. Raises UserError for another number, size
    or mode of images.
    """
    given: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
    channels = map_channels(c)
    if len(given) != len(channels):
        raise UserError(
            f"{len(given)} control image(s) for {len(channels)} control(s): expected one for each,"
            " the run's own first, then those of config.control.others."
        )
    side = c.data.image_size
    pixels = [_pixels(image, side, K) for image, K in zip(given, channels, strict=True)]
    counts = {len(x) for x in pixels}
    if len(counts - {1}) > 1:
        raise UserError(
            f"controls of {' and '.join(str(len(x)) for x in pixels)} images: expected as many of"
            " each, or one, as image i of each controls sample i."
        )

    def rows(indices: np.ndarray) -> Mapping[str, Any]:
        each = [normalize(cycled(indices, x)) for x in pixels]
        return {"beside": Beside(np.concatenate(each, axis=-1))}

    digests = [hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest() for x in pixels]
    return GivenRows(rows, {"control_images": digests})


def _pixels(image: ControlImage, side: int, channels: int) -> np.ndarray:
    """A control image as u8[n,side,side,channels]."""
    name = str(image) if isinstance(image, str | os.PathLike) else "a control image"
    if isinstance(image, str | os.PathLike):
        image = given_picture(image, "control image")
    found = f"of mode {image.mode}, " if isinstance(image, Image.Image) else ""
    x = np.asarray(image)
    shape = f"{x.dtype}{list(x.shape)}"
    x = x[..., None] if x.ndim == 2 else x
    x = x[None] if x.ndim == 3 else x
    plain = not isinstance(image, Image.Image) or image.mode in ("L", "RGB")
    if x.dtype != np.uint8 or not plain or x.shape[1:] != (side, side, channels) or not len(x):
        mode = f" of mode {_MODES[channels]!r}" if channels in _MODES else ""
        raise UserError(
            f"{name} is {found}{shape}: expected a control map as the run was trained with, uint8"
            f" [{side},{side},{channels}]{mode}; resize or convert it first."
        )
    return x
