"""Data sets by name: how they are prepared, opened and checked.

A data set is prepared once, as array_record, under DATA_DIR/NAME[/CONFIG]/VERSION in the layout of
tensorflow-datasets, and is then read without TensorFlow. The builders of our own
(`data/builders.py`, `data/scenes.py`, `data/moving.py`) need no TensorFlow to prepare either.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from ditjax.config import import_attribute
from ditjax.data import latents, moving, radar, scenes
from ditjax.data.builders import (
    Digits,
    ImageFolder,
    content_name,
    count_records,
    expand_home,
    folder_identity,
    is_complete,
    write_below,
)
from ditjax.data.caption_scenes import CaptionScenes
from ditjax.data.captions import (
    CaptionFolder,
    TextSpec,
    find_captions,
    list_captions,
)
from ditjax.data.crop import check_pixels
from ditjax.data.folders import Listing, list_folder, report_reading, split_above
from ditjax.data.moving import MovingDigits
from ditjax.data.names import LATENTS, VERSION, DatasetName, Split, is_latents, parse_name
from ditjax.data.radar import Radar
from ditjax.data.scenes import DigitScenes
from ditjax.data.sevir import SevirWindows, list_sevir
from ditjax.errors import UserError, nearest, reason
from ditjax.files import lease, store
from ditjax.files.atomic import load_json, write_json

DataDir = str | os.PathLike[str] | None


@dataclass(frozen=True)
class DataSpec:
    """Which images to read, and the size that they are brought to.

    name, split, data_dir: as `open_split` takes them; a split may be a slice, 'train[:10%]'.
    image_size, channels: H = W and C of the batches; C is 1 (grey) or 3 (RGB), converted at need.
    flip: mirror each element left-right with probability 1/2.
    cache_mb: keep decoded images in memory if the whole split takes at most this many MiB.
    threads: how many images are read and decoded at once.
    max_damaged: how many unreadable records to skip. Each is reported and replaced by the next
    readable one.
    text: which captions to read, and how they become tokens; None for none.
    frames: F of the clips, frames 0, frame_stride, 2 frame_stride, ... of each; 1 reads images.
    """

    name: str
    split: str
    image_size: int
    channels: int
    flip: bool
    data_dir: DataDir = None
    cache_mb: int = 256
    threads: int = 16
    max_damaged: int = 0
    text: TextSpec | None = None
    frames: int = 1
    frame_stride: int = 1

    def __post_init__(self) -> None:
        check_pixels(self.image_size, self.channels)
        if self.cache_mb < 0:
            raise UserError(f"cache_mb is {self.cache_mb}: expected 0 (no cache) or more MiB.")
        if self.threads < 1:
            raise UserError(f"threads is {self.threads}: expected at least 1.")
        if self.max_damaged < 0:
            raise UserError(f"max_damaged is {self.max_damaged}: expected 0 (none) or more.")

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) of an image, or (F, H, W, C) of a clip."""
        image = (self.image_size, self.image_size, self.channels)
        return (self.frames, *image) if self.frames > 1 else image


class DatasetInfo(NamedTuple):
    """What one split holds. `channels` is None if the data set leaves it open."""

    full_name: str  # name[/config]/version, for the record of a result
    num_examples: int
    num_classes: int
    class_names: tuple[str, ...]
    channels: int | None


class OpenSplit(NamedTuple):
    """A split that is prepared and checked. `image` and `label` name features, '' for none."""

    title: str  # for error messages
    split: str
    builder: tfds.core.DatasetBuilder
    info: DatasetInfo
    image: str
    label: str


def open_split(name: str, split: str, data_dir: DataDir = None, max_damaged: int = 0) -> OpenSplit:
    """Prepare a data set if need be, and check one split of it without reading its records.

    The records of every file are counted. Raises UserError as `prepare` does, and for a split that
    does not exist, features without an image, or a file with another number of records.
    """
    title = f"data set {name!r}, split {split!r}"
    builder = prepare(name, data_dir, max_damaged)
    try:
        # This also settles the file format of a data set that is stored in several.
        builder.as_data_source(split)
        # Counted by part: tfds gives a slice that ends before it begins a negative number.
        slices = re.split(r"\s*\+\s*", split)
        parts = [builder.info.splits[each].num_examples for each in slices]
        if min(parts) < 1:
            raise ValueError("an empty slice")
        num_examples = sum(parts)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{title}: there is no such split, or it is empty; there are"
            f" {', '.join(sorted(builder.info.splits))}, and slices such as 'train[:10%]'."
        ) from error
    features, image = builder.info.features, ""
    if not is_latents(name):
        image = _pick(features, tfds.features.Image, "image", title)
        if not image:
            raise UserError(
                f"{title}: there is no image among its features ({', '.join(sorted(features))})."
            )
    label = _pick(features, tfds.features.ClassLabel, "label", title)
    # What images with captions have beside is no class to learn, such as LAION's 'nsfw'.
    if label != "label" and _has_captions(features):
        label = ""
    # A data set without classes has one.
    class_names = tuple(features[label].names if label else ["unlabelled"])
    channels = features[image].shape[-1] if image else None
    full_name = builder.info.full_name
    info = DatasetInfo(full_name, num_examples, len(class_names), class_names, channels)
    _check_files(builder, split, title)
    return OpenSplit(title, split, builder, info, image, label)


def dataset_info(
    name: str, split: str, data_dir: DataDir = None, max_damaged: int = 0
) -> DatasetInfo:
    """What a split holds. Prepares the data set and raises as `open_split`."""
    return open_split(name, split, data_dir, max_damaged).info


def _pick(features: Any, kind: type, usual: str, title: str) -> str:
    """The feature of this kind: the one with the usual name, or the only one, or ''."""
    found = [key for key in sorted(features) if type(features[key]) is kind]
    if usual in found or len(found) == 1:
        return usual if usual in found else found[0]
    if found and kind is tfds.features.Image:
        raise UserError(
            f"{title}: it has several images ({', '.join(found)}) and none named 'image'."
        )
    return ""


def class_names_by_feature(features: Any) -> dict[str, tuple[str, ...]]:
    """The names of the classes of every ClassLabel among features, by the features' names.

    Sorted: in a prepared data set features are in another order in every process.
    """
    kind = tfds.features.ClassLabel
    return {k: tuple(features[k].names) for k in sorted(features) if type(features[k]) is kind}


def _has_captions(features: Any) -> bool:
    try:
        return bool(find_captions(features, "", ""))
    except UserError:  # there are several
        return True


def _check_files(builder: Any, split: str, title: str) -> None:
    """Count the records of each file: a truncated array_record file silently reads as empty."""
    instructions = builder.info.splits[split].file_instructions
    paths = [os.fspath(instruction.filename) for instruction in instructions]
    with ThreadPoolExecutor(16) as pool:
        counts = list(pool.map(count_records, paths))
    for path, found, instruction in zip(paths, counts, instructions, strict=True):
        if found != instruction.examples_in_shard:
            raise UserError(
                f"{title}: {path} should hold {instruction.examples_in_shard} records and holds"
                f" {found}: it is damaged or missing; delete {builder.data_dir} and prepare the"
                " data set again."
            )


def images_of(split: Split) -> Split:
    """The images of a split: those that were encoded for 'latents:PATH', else the split itself.

    Latents are in the order of their images, so that a slice of them is the same slice of images.
    Raises UserError.
    """
    if not is_latents(split.name):
        return split
    metadata = latents.open_latents(parse_name(split.name).path).info.metadata or {}
    if not {"images", "split"} <= metadata.keys():
        raise UserError(
            f"data set {split.name!r}: its metadata.json does not name the images that it was made"
            " of: encode them again."
        )
    # name[/config]/version, as tensorflow-datasets calls a data set in full
    name, _, version = str(metadata["images"]).rpartition("/")
    return Split(f"{name}:{version}", split.split)


def parse_split(text: str, data_dir: DataDir = None) -> Split:
    """'NAME/SPLIT' or 'NAME', which means its split 'train'. Raises UserError.

    NAME may hold slashes, so it is the longest part that names a data set: a folder that exists or
    was converted, encoded latents, a configuration that is prepared. Only a folder that is a split
    of the folder above it, such as 'folder:/data/birds/val', is that split.
    """
    root = data_root(data_dir)
    name, slash, split = text.rstrip("/").rpartition("/")
    if not slash:
        return Split(text)
    if _names_a_dataset(text, root):
        of_folder = text.startswith("folder:") and split_above(
            Path(expand_home(parse_name(text).path))
        )
        return Split(name, of_folder) if of_folder else Split(text)
    if _names_a_dataset(name, root) or not text.startswith(("folder:", LATENTS)):
        parse_name(name)
        return Split(name, split)
    return Split(text)  # neither is there: the error shall show what was given


def _names_a_dataset(text: str, root: Path) -> bool:
    """Whether a text as a whole names a data set that is there, or of a size that can be made."""
    try:
        parsed = parse_name(text)
        if parsed.kind == "folder":
            return _is_there(parsed) or _converted(_record_of(parsed, root), root) is not None
        if parsed.kind == "latents":
            return store.place(expand_home(parsed.path)).is_dir()
        if parsed.kind in _LISTED:
            return os.path.exists(expand_home(parsed.path)) or "{" in parsed.path
        if parsed.base in _GENERATED and parsed.config:
            return bool(_GENERATED[parsed.base].parse(parsed.config))
        return parsed.kind == "prepared" and _find(parsed, root) is not None
    except UserError:
        return False


def known_content(name: str, data_dir: DataDir = None) -> str | None:
    """What identifies the content of a data set, wherever it is and however its name is spelled.

    None if it is not prepared: nothing is prepared here. The builder classes of users have none.
    """
    try:
        parsed, root = parse_name(name), data_root(data_dir)
        if parsed.kind == "latents":
            return _latents_content(parsed.path)
        place = None
        if parsed.kind in _CONVERTED:
            found = _converted(_record_of(parsed, root), root)
            place = root / found.place if found else None
        elif parsed.base in _GENERATED:
            place = _generated_place(parsed, root)
        elif parsed.kind == "prepared":
            place = _find(parsed, root)
        return str(_open(name, place).info.full_name) if place else None
    except UserError:
        return None


def _latents_content(path: str) -> str:
    """What latents were made of: the images, the autoencoder, and how they were encoded."""
    info = latents.open_latents(path).info
    made_of: dict[str, Any] = {str(key): value for key, value in (info.metadata or {}).items()}
    counts = {split: info.splits[split].num_examples for split in info.splits}
    text = json.dumps([made_of, counts, list(info.features["label"].names)], sort_keys=True)
    return f"latents of {made_of.get('images')}, {hashlib.sha256(text.encode()).hexdigest()[:20]}"


def latent_shape(name: str) -> tuple[int, ...]:
    """'latents:PATH' -> (h, w, c) of one latent. Raises UserError."""
    return tuple(latents.open_latents(parse_name(name).path).info.features["mean"].shape[1:])


# ---- preparation


def data_root(data_dir: DataDir = None) -> Path:
    """The folder of prepared data sets: data_dir, else $DITJAX_DATA, else ~/.cache/ditjax/data.

    It may be on a store, for data sets that were prepared elsewhere. Raises UserError for 'None'.
    """
    chosen = os.fspath(data_dir or os.environ.get("DITJAX_DATA") or "~/.cache/ditjax/data")
    if chosen in ("None", "none", "null"):
        where = "data_dir" if data_dir else "$DITJAX_DATA"
        raise UserError(
            f"{where} is {chosen!r}: expected a folder; leave it empty for the default, or write"
            f" ./{chosen} for a folder of that name."
        )
    try:
        return store.place(expand_home(chosen)).absolute()
    except UserError as error:
        raise UserError(
            f"{error} Data sets are kept there unless DITJAX_DATA or config.data.data_dir names a"
            " folder."
        ) from None


def prepare(name: str, data_dir: DataDir = None, max_damaged: int = 0) -> tfds.core.DatasetBuilder:
    """The builder of a data set under `data_root`, which is prepared now if it is missing.

    A name is 'digits'; 'digit_scenes', or 'digit_scenes/N' for another number of scenes;
    'caption_scenes', and the clips 'moving_digits' and 'radar' in the same way; 'folder:PATH' for a
    folder of class folders; 'captions:PATH' for images with captions; 'sevir:PATH' for radar
    events; 'latents:PATH' for encoded latents; the dotted name of a builder class of yours,
    'package.module.Birds'; or any tensorflow-datasets name with an optional configuration and
    version: 'imagenet2012', 'mnist:3.0.1', 'imagenet_resized/64x64'. A prepared data set is opened
    without TensorFlow, and its folder may be read-only. To prepare a data set of
    tensorflow-datasets, a separate process is started, so that TensorFlow never shares this one's
    devices.

    Up to `max_damaged` damaged images of a folder are stored as they are, for the reader to skip.
    Raises UserError for an unknown name, a folder that changed since it was converted, more damaged
    images, a file format other than array_record, an unwritable data_dir, or a missing TensorFlow.
    """
    parsed = parse_name(name)
    if parsed.kind == "latents":
        return latents.open_latents(parsed.path)
    root = data_root(data_dir)
    if parsed.kind in _CONVERTED:
        return _prepare_converted(parsed, root, max_damaged)
    if parsed.kind == "builder":
        return _prepare_builder(parsed, root)
    if parsed.base in _GENERATED:
        return _prepare_generated(parsed, root)
    if parsed.base == Digits.name:
        if name not in (Digits.name, f"{Digits.name}:{Digits.VERSION}"):
            raise UserError(f"data set {name!r}: expected 'digits' or 'digits:{Digits.VERSION}'.")
        folder = root / Digits.name / str(Digits.VERSION)
        make = functools.partial(Digits, file_format="array_record")
        return _own(name, root, folder, lambda root: make(data_dir=root))
    found = _find(parsed, root)
    if found is None and parsed.base == ImageFolder.name:
        raise UserError(
            f"data set {name!r} is the conversion of a folder that is not under {root}: name the"
            " folder, 'folder:/path', or set data_dir."
        )
    if found is None:
        known = [*tfds.list_builders(with_community_datasets=False), *_GENERATED]
        if parsed.base not in known:
            raise UserError(
                f"data set {name!r} is unknown: not among the {len(known)} of tensorflow-datasets,"
                f" not prepared under {root}, and not 'folder:/path'.{nearest(parsed.base, known)}"
            )
        _prepare_with_tensorflow(parsed, root)
        found = _find(parsed, root)
    if found is None:
        raise UserError(
            f"data set {name!r} was prepared, but not at that configuration and version:"
            f" look under {root / parsed.base} and name what is there."
        )
    return _open(name, found)


def _own(
    name: str, root: Path, folder: Path, make: Callable[[Path], tfds.core.DatasetBuilder]
) -> tfds.core.DatasetBuilder:
    """A data set of one of our builders in `folder`, prepared if it is missing."""
    if not is_complete(folder):
        with _exclusive(name, root):
            write_below(root, make)
    return _open(name, folder)


class _Generated(NamedTuple):
    """A data set of any size that is computed: its builder, and how a size is read from a name."""

    builder: Any
    parse: Callable[[str], Any]
    default: str


_SCENES: dict[str, Any] = {each.name: each for each in (DigitScenes, CaptionScenes)}


def _scenes_of(name: str, builder: Any) -> _Generated:
    parse = functools.partial(scenes.parse_scene_set, name=name)
    return _Generated(builder, parse, str(scenes.DEFAULT_EXAMPLES))


_GENERATED = {
    **{name: _scenes_of(name, each) for name, each in _SCENES.items()},
    "moving_digits": _Generated(MovingDigits, moving.parse_clip_set, str(moving.DEFAULT_CLIPS)),
    "radar": _Generated(Radar, radar.parse_radar_set, str(radar.DEFAULT_RADAR)),
}


def _generated_place(parsed: DatasetName, root: Path) -> Path:
    """Where a data set that is computed is prepared."""
    of = _GENERATED[parsed.base]
    # In full: 'digit_scenes' means the default size, whatever other sizes are prepared there.
    size = of.parse(parsed.config or of.default)
    return Path(root / parsed.base / size.name / str(of.builder.VERSION))


def _prepare_generated(parsed: DatasetName, root: Path) -> tfds.core.DatasetBuilder:
    of, folder = _GENERATED[parsed.base], _generated_place(parsed, root)
    if parsed.version not in (None, folder.name):
        raise UserError(f"data set {parsed.text!r}: expected version {folder.name}.")
    size = of.parse(parsed.config or of.default)
    return _own(parsed.text, root, folder, lambda root: of.builder(root, size))


def _prepare_builder(parsed: DatasetName, root: Path) -> tfds.core.DatasetBuilder:
    """A data set of the user's own: a builder class of tensorflow-datasets, by its dotted name."""
    cls: Any = import_attribute(parsed.text)
    if not (isinstance(cls, type) and issubclass(cls, tfds.core.GeneratorBasedBuilder)):
        raise UserError(
            f"data set {parsed.text!r}: expected a subclass of"
            " tfds.core.GeneratorBasedBuilder, with an image and a label in its features."
        )
    builder: Any = cls

    def make(root: Path) -> tfds.core.DatasetBuilder:
        return builder(data_dir=root, file_format="array_record")

    # NAME[/CONFIG]/VERSION, of the builder's default configuration if it has several.
    anywhere = Path(tempfile.gettempdir())
    folder = root / Path(make(anywhere).data_dir).relative_to(anywhere)
    return _own(parsed.text, root, folder, make)


# ---- images of a user: folders, and those with captions


class _Conversion(NamedTuple):
    """What a folder held when it was last read, and where that lies, converted, below the root.

    The record of a path is a file beside the conversions. While the folder's `digest` is the same,
    its files need not be read again. A folder's `content` names its conversion, so that a folder
    that is moved, copied or touched is not converted again.
    """

    digest: str
    content: str
    place: str


_CONVERTED: dict[str, Any] = {
    "folder": ImageFolder,
    "captions": CaptionFolder,
    "sevir": SevirWindows,
}


class _Listed(NamedTuple):
    """How files that a list names are found, and what their records are."""

    read: Callable[[str, int], Any]
    records: str


_LISTED = {
    "captions": _Listed(list_captions, "images with captions"),
    "sevir": _Listed(list_sevir, "windows of radar events"),
}


def _prepare_converted(
    parsed: DatasetName, root: Path, max_damaged: int
) -> tfds.core.DatasetBuilder:
    name, folder, record = parsed.text, _resolved(parsed), _record_of(parsed, root)
    found = _converted(record, root)
    # A conversion outlives its folder: the originals may be deleted or left on another machine.
    if found and parsed.path and not _is_there(parsed):
        report_reading(f"data: {folder} is gone; its conversion in {root} is read")
        return _open(name, root / found.place)
    listing = _list(parsed, folder, max_damaged)
    if not found or found.digest != listing.digest:
        # Files are read to see whether their content changed; a folder that cannot be written to
        # can hold what another process prepared.
        writable = store.is_object(root) or os.access(root, os.W_OK) or not root.exists()
        with _exclusive(name, root) if writable else contextlib.nullcontext():
            found = _convert(parsed, listing, root, max_damaged)
    builder = _open(name, root / found.place)
    splits = builder.info.splits
    counts = ", ".join(f"{splits[split].num_examples:,} in {split}" for split in sorted(splits))
    if builder.version < _CONVERTED[parsed.kind].VERSION:
        report_reading(
            f"data: {folder} was converted by an older ditjax, which is read: {counts}; images are"
            " not turned upright, and colours under transparency are seen; convert anew after: rm"
            f" -r '{builder.data_dir}' '{record}'"
        )
    elif isinstance(listing, Listing):
        peculiar = (builder.info.metadata or {}).get("peculiar") or {}
        also = "".join(f"; {count} {what}" for what, count in peculiar.items())
        report_reading(f"data: {listing}{also}")
    else:
        records = _LISTED[parsed.kind].records
        report_reading(f"data: {folder}: {records}: {counts}; {listing.left_out}")
    return builder


def _is_there(parsed: DatasetName) -> bool:
    """Whether a folder is there, or a tar file; shards in braces are looked for when listed."""
    folder = _resolved(parsed)
    if parsed.kind in _LISTED:
        return folder.exists() or "{" in parsed.path
    return os.path.isdir(folder)  # Path.is_dir raises for too long a name


def _list(parsed: DatasetName, folder: Path, max_damaged: int) -> Any:
    if parsed.kind in _LISTED:
        return _LISTED[parsed.kind].read(os.fspath(folder), max_damaged)
    if not parsed.path or not _is_there(parsed):
        raise UserError(
            f"data set {parsed.text!r}: there is no folder '{folder if parsed.path else ''}';"
            " expected 'folder:/path/to/class/folders'."
        )
    return list_folder(folder)


def left_out_of(name: str) -> str:
    """What a folder of images holds and is not read, '' for other data. Raises UserError."""
    parsed = parse_name(name)
    if parsed.kind != "folder" or not os.path.isdir(folder := _resolved(parsed)):
        return ""
    return str(list_folder(folder).left_out)


def _resolved(parsed: DatasetName) -> Path:
    folder = store.place(expand_home(parsed.path))
    try:
        # Of a folder on a store the copy, which has another path when an object has changed.
        return store.local_copy(folder).resolve()
    except (RuntimeError, OSError, ValueError) as error:  # a loop of links, a name too long
        raise UserError(f"data set {parsed.text!r}: {error}; give the folder's own path.") from None


def _record_of(parsed: DatasetName, root: Path) -> Path:
    """The record of the conversion of a path."""
    return root / _CONVERTED[parsed.kind].name / f"{folder_identity(_resolved(parsed))}.json"


def _converted(record: Path, root: Path) -> _Conversion | None:
    """The conversion that a record names, if it is there."""
    if not record.exists():
        # Before version 2.0.0 a conversion was named by the path, and had no record.
        place = record.relative_to(root).with_suffix("") / "1.0.0"
        return _Conversion("", "", str(place)) if is_complete(root / place) else None
    try:
        found = _Conversion(**load_json(record))
    except (OSError, ValueError, TypeError):
        return None
    return found if is_complete(root / found.place) else None


def _convert(parsed: DatasetName, listing: Any, root: Path, max_damaged: int) -> _Conversion:
    """Convert a folder unless its content is there; record where it is. Raises UserError."""
    name, record, kind = parsed.text, _record_of(parsed, root), _CONVERTED[parsed.kind]
    before = _converted(record, root)
    if before and before.digest == listing.digest:  # another process did it meanwhile
        return before
    content = listing.content()
    text = content_name(content)
    if before:
        same = text == before.content
        if not before.content:
            assert isinstance(listing, Listing)  # what is listed always had a record
            same = _same_as_records(name, root / before.place, listing)
        if not same:
            raise UserError(
                f"data set {name!r}: files were added, removed or changed since {listing.root} was"
                f" converted; undo that, or convert it anew after: rm -r '{record}'"
                + ("" if before.content else f" '{root / before.place}'")
            )
    place = before.place if before else f"{kind.name}/{text}/{kind.VERSION}"
    if not is_complete(root / place):
        write_below(root, lambda root: kind(listing, content, root, max_damaged))
    found = _Conversion(listing.digest, before.content if before else text, place)
    with contextlib.suppress(UserError):  # prepared for us in a folder that is read only
        write_json(record, found._asdict())
    return found


def _same_as_records(name: str, folder: Path, listing: Listing) -> bool:
    """Whether a conversion of version 1.0.0 holds the files of a folder as they are now."""
    builder = _open(name, folder)
    names: set[str] = set()
    for split in builder.info.splits:
        skip = {"image": tfds.decode.SkipDecoding()}
        records = builder.as_data_source(split, decoders=skip)
        for k in range(len(records)):
            record: Any = records[k]
            path = listing.root / record["file_name"].decode()
            if not path.is_file() or path.read_bytes() != record["image"]:
                return False
            names.add(record["file_name"].decode())
    # What version 1.0.0 read: a file that is more was added.
    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
    return all(
        image.name in names or not image.name.lower().endswith(suffixes)
        for split in builder.info.splits
        for image in listing.files.get(split, ())
    )


# The command line of tensorflow-datasets needs Apache Beam too; its library does not.
_BUILD = (
    "import sys, tensorflow_datasets as tfds; name, data_dir = sys.argv[1:];"
    " tfds.builder(name, data_dir=data_dir, file_format='array_record').download_and_prepare()"
)


def _prepare_with_tensorflow(parsed: DatasetName, root: Path) -> None:
    name = parsed.text
    if store.is_object(root):
        raise UserError(
            f"data set {name!r} is not prepared under {root}, and TensorFlow prepares on disks:"
            " prepare it in a folder of this machine (config.data.data_dir), and copy that folder's"
            f" content to {root}."
        )
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"data set {name!r} is not prepared under {root}, and preparing it needs TensorFlow"
            " (reading it does not): pip install 'ditjax[prepare]', then run the command again."
        )
    with _exclusive(name, root):
        if _find(parsed, root):
            return
        # TensorFlow would take all the memory of a GPU.
        done = subprocess.run(
            [sys.executable, "-c", _BUILD, name, os.fspath(root)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2"},
            check=False,
        )
    if done.returncode:
        raise UserError(
            f"data set {name!r} could not be downloaded and prepared: the message of"
            " tensorflow-datasets is above. Put data that need a licence by hand into"
            f" {root / 'downloads' / 'manual'}."
        )


@contextlib.contextmanager
def _exclusive(name: str, root: Path) -> Iterator[None]:
    """Hold the lock of a data_dir: one process prepares, the others wait and find the work done.

    The kernel releases the lock when its holder dies. On a store it is a lease.
    """
    if store.is_object(root):
        with lease.scope():
            lease.acquire(root / ".prepare.lease", str(root), waits=True)
            yield
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".prepare.lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logging.getLogger(__name__).warning("waiting: another process prepares in %s", root)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        remedy = (
            "free some space, or set data_dir to another disk"
            if error.errno == errno.ENOSPC
            else "set data_dir (or $DITJAX_DATA) to a folder you can write"
        )
        raise UserError(
            f"data set {name!r} cannot be written under {root}:"
            f" {error.strerror or error}; {remedy}."
        ) from error


def _find(parsed: DatasetName, root: Path) -> Path | None:
    """The prepared folder of a data set, in its newest version if none is named, or None."""
    base, config = parsed.base, parsed.config
    versions = _versions(root / base / (config or ""))
    if not versions and not config and (root / base).is_dir():
        configs = sorted(child.name for child in (root / base).iterdir() if _versions(child))
        if len(configs) > 1:
            raise UserError(
                f"data set {parsed.text!r} is prepared in several configurations under {root}:"
                f" name one of {', '.join(f'{base}/{c}' for c in configs)}."
            )
        versions = _versions(root / base / configs[0]) if configs else []
    return next((path for path in reversed(versions) if parsed.version in (None, path.name)), None)


def _versions(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    complete = (p for p in folder.iterdir() if re.fullmatch(VERSION, p.name) and is_complete(p))
    return sorted(complete, key=lambda path: tuple(int(part) for part in path.name.split(".")))


def _open(name: str, folder: Path) -> tfds.core.DatasetBuilder:
    try:
        builder = tfds.builder_from_directory(os.fspath(store.for_readers(folder)))
        formats = {file_format.value for file_format in builder.info.available_file_formats()}
    except Exception as error:  # A damaged JSON file fails in as many ways as it has keys.
        raise UserError(
            f"data set {name!r}: the description in {folder} cannot be read ({reason(error)});"
            f" delete that folder and prepare the data set again."
        ) from error
    if "array_record" not in formats:
        raise UserError(
            f"data set {name!r} in {folder} is stored as {', '.join(sorted(formats))}, and only"
            " array_record can be read at random: prepare it again into another data_dir"
            f" (tfds build {name} --file_format=array_record --data_dir=OTHER)."
        )
    return builder
