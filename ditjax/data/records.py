"""Records of one split, read by index: images at one size, or encoded latents.

Records are array_record, read by the data source of tensorflow-datasets. An error names the record.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Self

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ditjax.data.builders import ImageFolder
from ditjax.data.captions import CaptionReader, captions_of, find_captions
from ditjax.data.crop import check_pixels, clip_pixels, crop_pixels, mirror, normalize
from ditjax.data.pictures import decode_image, upright
from ditjax.data.source import DataDir, DataSpec, OpenSplit, class_names_by_feature, open_split
from ditjax.errors import FaultError, UserError, reason
from ditjax.files import faults

HostBatch = dict[str, np.ndarray]

_MOMENTS = ("mean", "log_variance")


class DamagedRecordsError(UserError):
    """Records that cannot be read: index in the split -> a description of the damage."""

    def __init__(self, records: dict[int, str], remedy: str) -> None:
        super().__init__(f"{next(iter(records.values()))}; {remedy}")
        self.records, self.remedy = records, remedy


class _Source:
    """The stored records of a split. A damaged record does not affect the reading of others."""

    def __init__(self, open_source: Callable[[], Any]) -> None:
        self._open, self._source = open_source, open_source()

    def read(self, index: int) -> Any:
        """One record. Raises whatever array_record and the parser raise on bad bytes."""
        return self._read(lambda source: source[index])

    def read_many(self, indices: list[int]) -> list[Any]:
        """Several records at once, from all files. Raises as `read`."""
        return list(self._read(lambda source: source.__getitems__(indices)))

    def _read(self, take: Callable[[Any], Any]) -> Any:
        try:
            return take(self._source)
        except Exception:
            # After a failure, a reader may refuse sound records too, also to other threads.
            try:
                return take(self._open())
            finally:
                self._source = self._open()


class Words(NamedTuple):
    """The captions of a record, and its classes, one of each ClassLabel; -1 is none."""

    captions: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()


class ImageRecords:
    """The images of a split: record index -> (PIL image, label).

    `captions` is the feature with the captions, '' for none; `class_features` are those of classes.
    """

    def __init__(self, opened: OpenSplit) -> None:
        self.captions, self.class_features = "", tuple[str, ...]()
        if not opened.image:
            raise UserError(f"{opened.title}: it holds encoded latents; name a data set of images.")
        self.info, self._opened = opened.info, opened
        self._shown = _way_of_showing(opened.builder)
        # The bytes are decoded here and not by tensorflow-datasets, so that errors name the record.
        skip = {opened.image: tfds.decode.SkipDecoding()}
        self._source = _Source(lambda: opened.builder.as_data_source(opened.split, decoders=skip))

    def with_captions(self, feature: str) -> Self:
        """The same with captions: of this feature, or of the only one. Raises UserError."""
        title, features = self._opened.title, self._opened.builder.info.features
        self.captions = find_captions(features, feature, title)
        if not self.captions:
            raise UserError(
                f"{title}: none of its features holds captions ({', '.join(sorted(features))})."
            )
        self.class_features = tuple(class_names_by_feature(features))
        return self

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Record index in the split -> (decoded PIL image, label). Raises as `read_words`."""
        return self.read_words(index)[:2]

    def read_words(self, index: int) -> tuple[Image.Image, int, Words]:
        """Record index in the split -> (decoded PIL image, label, captions and classes).

        Raises DamagedRecordsError, and FaultError if the file system does not answer.
        """
        record: Any = {}
        try:
            what = f"{self._opened.title}: record {index}"
            record = faults.retried(what, lambda: self._source.read(index))
            image = self._shown(decode_image(record[self._opened.image]))
            words = Words()
            if self.captions:
                classes = tuple(int(record[name]) for name in self.class_features)
                words = Words(captions_of(record[self.captions]), classes)
        except FaultError:
            raise
        except Exception as error:  # bad bytes fail in several ways
            raise self.damaged(index, error, record) from error
        label = int(record[self._opened.label]) if self._opened.label else 0
        if not 0 <= label < self.info.num_classes:
            raise UserError(
                f"{self._opened.title}: record {index} has label {label}, outside"
                f" 0..{self.info.num_classes - 1} (some test splits hide their labels):"
                " use a labelled split."
            )
        return image, label, words

    def check_length(self, index: int, image: Image.Image, frames: int, stride: int) -> None:
        """Raise UserError for a record with too few frames for a clip."""
        found, needed = getattr(image, "n_frames", 1), 1 + (frames - 1) * stride
        if found < needed:
            raise UserError(
                f"{self._opened.title}: record {index} has {found} frame{'s' * (found > 1)}:"
                f" config.data.frames={frames} with frame_stride={stride} needs {needed}. Remove"
                " shorter clips from the data, or lower one of the two."
            )

    def damaged(self, index: int, error: Exception, record: Any = None) -> DamagedRecordsError:
        """The error for one record; `record` is what could be read of it."""
        file = (record or {}).get("file_name", "")
        file = file.decode(errors="replace") if isinstance(file, bytes) else str(file)
        which = f"{self._opened.title}: record {index}{f' ({file})' if file else ''}"
        return DamagedRecordsError(
            {index: f"{which} is damaged ({reason(error)})"},
            f"delete {self._opened.builder.data_dir} and prepare the data set again.",
        )


def _way_of_showing(builder: Any) -> Callable[[Image.Image], Image.Image]:
    """Images of folders are upright; others as stored, as in the pipelines of ADM and DiT.

    A folder's conversion of version 1.0.0 keeps the pixels that its runs began with.
    """
    if builder.name != ImageFolder.name:
        return lambda image: image
    if builder.version >= ImageFolder.VERSION:
        return upright
    return _without_alpha


def _without_alpha(image: Image.Image) -> Image.Image:
    if image.has_transparency_data and not image.mode.startswith("I"):
        image = image.convert("RGB")
    image.info.pop("transparency", None)  # which converting a palette keeps
    return image


class ImageReader:
    """Images or clips of one shape: indices -> batch. A small split is kept in memory.

    With a `captions` reader, a batch has tokens and classes, too, and captions stay in memory.
    """

    def __init__(
        self,
        images: ImageRecords,
        shape: tuple[int, ...],
        *,
        cache_mb: int,
        threads: int,
        captions: CaptionReader | None = None,
        stride: int = 1,
    ) -> None:
        self._captions, self._words = captions, dict[int, Words]()
        self._split, self.num_examples = images, images.info.num_examples
        self._shape, self._stride = shape, stride
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ditjax-decode")
        self._cached: np.ndarray | None = None  # which records are in memory
        if self.num_examples * math.prod(shape) <= cache_mb * 2**20:
            self._images = np.empty((self.num_examples, *self._shape), np.uint8)
            self._labels = np.empty(self.num_examples, np.int32)
            self._cached = np.zeros(self.num_examples, bool)

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """indices i64[n] -> new arrays u8[n,..,H,W,C], i32[n]."""
        return self._gather(indices)[:2]

    def _gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Words]]:
        """As `gather`, with the captions of each record if they are read, else []."""
        if self._cached is None:
            return self._decode(indices)
        fresh = indices[~self._cached[indices]]
        if len(fresh):
            # If two threads decode the same record, they write the same bytes and mark it after.
            self._images[fresh], self._labels[fresh], words = self._decode(fresh)
            if self._captions is not None:
                self._words.update(zip(fresh.tolist(), words, strict=True))
            self._cached[fresh] = True
        words = [] if self._captions is None else [self._words[i] for i in indices.tolist()]
        return self._images[indices], self._labels[indices], words

    def batch(
        self, indices: np.ndarray, mirrored: np.ndarray, chosen: np.ndarray | None = None
    ) -> HostBatch:
        """indices i64[n], mirrored bool[n] -> image f32[n,..,H,W,C] in [-1,1], label i32[n].

        With captions also 'caption' i32[n,M], the ids of those that `chosen` f64[n] in [0, 1)
        chooses (None: the first), and 'classes' i32[n,K].
        """
        images, labels, words = self._gather(indices)
        mirror(images, mirrored)
        batch = {"image": normalize(images), "label": labels}
        if self._captions is None:
            return batch
        chosen = np.zeros(len(indices)) if chosen is None else chosen
        tokens = self._captions.tokens([each.captions for each in words], chosen)
        classes = np.array([each.classes for each in words], np.int32)
        return {**batch, "caption": tokens, "classes": classes}

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _decode(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Words]]:
        images = np.empty((len(indices), *self._shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        words: list[Words] = []
        damaged: dict[int, str] = {}
        remedy = ""
        for row, found in enumerate(self._pool.map(self._decode_one, indices.tolist())):
            if isinstance(found, DamagedRecordsError):
                damaged, remedy = damaged | found.records, found.remedy
            else:
                images[row], labels[row], each = found
                words.append(each)
        if damaged:
            raise DamagedRecordsError(damaged, remedy)
        return images, labels, words

    def _decode_one(self, index: int) -> tuple[np.ndarray, int, Words] | DamagedRecordsError:
        *frames, size, _, channels = self._shape
        try:
            image, label, words = self._split.read_words(index)
        except DamagedRecordsError as error:
            return error
        try:
            if frames:
                self._split.check_length(index, image, frames[0], self._stride)
                pixels = clip_pixels(image, frames[0], self._stride, size, channels)
            else:
                pixels = crop_pixels(image, size, channels)
            return pixels, label, words
        except (ValueError, OSError) as error:
            return self._split.damaged(index, error)


class LatentReader:
    """Encoded latents: indices -> moments of the images or of their mirrors."""

    def __init__(self, opened: OpenSplit, cache_mb: int) -> None:
        self._title, self.num_examples = opened.title, opened.info.num_examples
        self._source = _Source(lambda: opened.builder.as_data_source(opened.split))
        size = 2 * 2 * 4 * int(np.prod(opened.builder.info.features["mean"].shape[1:]))
        self._damaged: dict[int, str] = {}
        self._cached: list[Any] | None = None
        if self.num_examples * size <= cache_mb * 2**20:
            self._cached = self._read(list(range(self.num_examples)))

    def batch(self, indices: np.ndarray, mirrored: np.ndarray) -> HostBatch:
        """indices i64[n], mirrored bool[n] -> mean and log_variance f32[n,h,w,c], label i32[n]."""
        if self._cached is None:
            records = self._read(indices.tolist())
        else:
            records = [self._cached[index] for index in indices]
        pairs = list(zip(indices.tolist(), records, strict=True))
        damaged = {index: self._damaged[index] for index, record in pairs if record is None}
        if damaged:
            raise DamagedRecordsError(damaged, "remove the latents and encode the data set again.")
        sides = list(zip(records, mirrored.astype(int), strict=True))
        return {
            **{name: np.stack([r[name][side] for r, side in sides]) for name in _MOMENTS},
            "label": np.array([r["label"] for r in records], np.int32),
        }

    def close(self) -> None:
        """Do nothing: no thread runs in the background."""

    def _read(self, indices: list[int]) -> list[Any]:
        """The records, with None for a damaged one."""
        try:
            return self._source.read_many(indices)
        except Exception:  # one of them is damaged: find out which
            return [self._read_one(index) for index in indices]

    def _read_one(self, index: int) -> Any:
        try:
            what = f"{self._title}: record {index}"
            return faults.retried(what, lambda: self._source.read(index))
        except FaultError:
            raise
        except Exception as error:
            self._damaged[index] = f"{self._title}: record {index} is damaged ({reason(error)})"
            return None


def open_image_reader(spec: DataSpec, cache_mb: int) -> ImageReader:
    """A reader of a split's images at the size of `spec`. Raises UserError as `open_split`."""
    opened = open_split(spec.name, spec.split, spec.data_dir, spec.max_damaged)
    images, captions = ImageRecords(opened), None
    if spec.text is not None:
        images, captions = images.with_captions(spec.text.feature), CaptionReader(spec.text)
    return ImageReader(
        images,
        spec.shape,
        cache_mb=cache_mb,
        threads=spec.threads,
        captions=captions,
        stride=spec.frame_stride,
    )


def check_frames(spec: DataSpec) -> None:
    """Raise UserError if the clips of a split are shorter than asked for.

    A folder's shortest is known since its conversion; of other data sets the first clip is read.
    """
    opened = open_split(spec.name, spec.split, spec.data_dir, spec.max_damaged)
    shortest = (opened.builder.info.metadata or {}).get("shortest") or {}
    images = ImageRecords(opened)
    index = int(shortest.get(spec.split, 0))
    images.check_length(index, images.read(index)[0], spec.frames, spec.frame_stride)


def load_arrays(
    name: str,
    split: str,
    data_dir: DataDir = None,
    image_size: int | None = None,
    channels: int | None = None,
) -> HostBatch:
    """A whole small split in record order, never flipped: 'image' u8[N,H,W,C], 'label' i32[N].

    image_size and channels default to those of the records, which must then all be square and of
    one size. Raises UserError otherwise.
    """
    split_images = ImageRecords(open_split(name, split, data_dir))
    info = split_images.info
    first, _ = split_images.read(0)
    if image_size is None:
        image_size = first.width
        for index in range(info.num_examples):
            image, _ = split_images.read(index)
            if image.size != (image_size, image_size):
                raise UserError(
                    f"data set {name!r}, split {split!r}: record {index} is"
                    f" {image.width}x{image.height}, not {image_size}x{image_size}: give"
                    " image_size for images that are not square and of one size."
                )
    if channels is None:
        channels = info.channels or (1 if first.mode in ("1", "L") else 3)
    check_pixels(image_size, channels)
    threads = os.cpu_count() or 1
    shape = (image_size, image_size, channels)
    reader = ImageReader(split_images, shape, cache_mb=0, threads=threads)
    try:
        images, labels = reader.gather(np.arange(info.num_examples))
    finally:
        reader.close()
    return {"image": images, "label": labels}
