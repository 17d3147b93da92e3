"""From a prepared data set to training batches: one infinite, seeded stream, read by position.

Element j of the stream is a pure function of (seed, j), and batch k of size B is elements
[k*B, (k+1)*B). So a run resumed at a step, and any number of processes, see the same records with
the same flips.

Records are array_record, read by tensorflow-datasets' data source; grain draws the batches ahead of
the training loop, in order. Which records they hold is drawn here, an epoch at a time: grain's own
shuffle goes index by index, and 64 of them take 1.7 ms where a whole batch of digits takes 0.3.
"""

import os
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import grain
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ditjax.data import latents
from ditjax.data.builders import count_records, decode_image, prepare
from ditjax.data.images import MAX_PIXELS
from ditjax.errors import UserError

DataDir = str | os.PathLike[str] | None
Batch = dict[str, np.ndarray]
Tell = Callable[[str], None]

_MODES = {1: "L", 3: "RGB"}
# Philox streams of one seed: 0, 1, 2, ... order the epochs, the last one flips.
_FLIPS = 2**64 - 1
_BATCHES_AHEAD = 2
_MOMENTS = ("mean", "log_variance")


@dataclass(frozen=True)
class DataSpec:
    """Which images, and how they are brought to size.

    name, split, data_dir: as `prepare` takes them, or 'latents:PATH'; a split may be a slice,
    'train[:10%]'.
    image_size, channels: H = W and C of the batches; C is 1 (grey) or 3 (RGB), converted at need.
    flip: mirror each element left-right with probability 1/2.
    cache_mb: decoded images stay in memory if the whole split takes at most so many MiB; 0: never.
    threads: images read and decoded at once.
    max_damaged: so many records may be damaged: each is told, and the next that reads taken for it.
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

    def __post_init__(self) -> None:
        _check_size(self.image_size)
        _check_channels(self.channels)
        if self.cache_mb < 0:
            raise UserError(f"cache_mb is {self.cache_mb}: expected 0 (no cache) or more MiB.")
        if self.threads < 1:
            raise UserError(f"threads is {self.threads}: expected at least 1.")
        if self.max_damaged < 0:
            raise UserError(f"max_damaged is {self.max_damaged}: expected 0 (none) or more.")


class DatasetInfo(NamedTuple):
    """What one split holds. channels is None where the data set leaves it open."""

    full_name: str  # name[/config]/version: what a result must put on record
    num_examples: int
    num_classes: int
    class_names: tuple[str, ...]
    channels: int | None


def dataset_info(
    name: str, split: str, data_dir: DataDir = None, max_damaged: int = 0
) -> DatasetInfo:
    """NAME, split -> DatasetInfo; the data set is prepared if need be.

    Every file's records are counted. Errors: as `prepare`, and a file of another count.
    """
    if name.startswith(latents.PREFIX):
        return _info(latents.open_latents(name), split, f"data set {name!r}, split {split!r}")
    return _Split(name, split, data_dir, max_damaged).info


def _info(builder: Any, split: str, title: str) -> DatasetInfo:
    """What a split of encoded latents holds, when its files hold it."""
    num_examples = _num_examples(builder, split, title)
    _check_files(builder, split, title)
    names = builder.info.features["label"].names
    return DatasetInfo(builder.info.full_name, num_examples, len(names), tuple(names), None)


def _num_examples(builder: Any, split: str, title: str) -> int:
    """Raises UserError when the split is not there."""
    try:
        # Fixes the file format too, where a set is stored in several.
        builder.as_data_source(split)
        return builder.info.splits[split].num_examples
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{title}: there is no such split, or it is empty; there are"
            f" {', '.join(sorted(builder.info.splits))}, and slices such as 'train[:10%]'."
        ) from error


# ---- crop and size


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre crop of ADM and DiT: PIL image -> PIL image [size, size] of the same mode.

    Halve with BOX while the shorter side is at least 2*size; scale with BICUBIC until it is size
    (upwards too); keep the central square, its corner at (dim - size) // 2.

    Raises UserError where the scaled image would have more than MAX_PIXELS pixels.
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


def resize_images(images: np.ndarray, size: int) -> np.ndarray:
    """`center_crop` of every image: images u8[N,H,W,C], C 1 or 3 -> u8[N,size,size,C]."""
    _check_size(size)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(
            f"images are {images.dtype}{list(images.shape)}: resize_images takes uint8 [N,H,W,C]."
        )
    channels = images.shape[-1]
    _check_channels(channels)
    resized = np.empty((len(images), size, size, channels), np.uint8)
    for i, image in enumerate(images):
        cropped = center_crop(Image.fromarray(image[:, :, 0] if channels == 1 else image), size)
        resized[i] = np.asarray(cropped).reshape(size, size, channels)
    return resized


def _to_mode(image: Image.Image, channels: int) -> Image.Image:
    """To grey or RGB before any resizing: a palette's numbers are not to be averaged."""
    if image.mode.startswith("I"):  # 16-bit PNG, which convert() would clip to white
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert(_MODES[channels])


def _check_size(size: int) -> None:
    if size < 1:
        raise UserError(f"image_size is {size}: expected at least 1 pixel.")


def _check_channels(channels: int) -> None:
    if channels not in _MODES:
        raise UserError(f"channels is {channels}: images have 1 (grey) or 3 (RGB).")


# ---- records


class Damaged(UserError):  # noqa: N818
    """Records that cannot be read: index in the split -> which one and why, in words."""

    def __init__(self, records: dict[int, str], remedy: str) -> None:
        super().__init__(f"{next(iter(records.values()))}; {remedy}")
        self.records, self.remedy = records, remedy


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or repr(error)


class _Source:
    """A split's records as stored. One that is damaged does not stand in the others' way."""

    def __init__(self, opened: Callable[[], Any]) -> None:
        self._opened, self._now = opened, opened()

    def __getitem__(self, index: int) -> Any:
        return self._read(lambda source: source[index])

    def many(self, indices: list[int]) -> list[Any]:
        """Several at once, of all files."""
        return list(self._read(lambda source: source.__getitems__(indices)))

    def _read(self, take: Callable[[Any], Any]) -> Any:
        """Raises what array_record and the parser raise on bad bytes: it has no one type."""
        try:
            return take(self._now)
        except Exception:
            # Once it has failed, a reader may refuse sound records too, also to other threads.
            try:
                return take(self._opened())
            finally:
                self._now = self._opened()


class _Split:
    """One split, opened: record index -> (PIL image, label)."""

    def __init__(self, name: str, split: str, data_dir: DataDir, max_damaged: int = 0) -> None:
        self._title = f"data set {name!r}, split {split!r}"
        builder = prepare(name, data_dir, max_damaged)
        self._folder = builder.data_dir
        num_examples = _num_examples(builder, split, self._title)
        features = builder.info.features
        self._image = self._pick(features, tfds.features.Image, "image")
        self._label = self._pick(features, tfds.features.ClassLabel, "label")
        if self._image is None:
            raise UserError(
                f"{self._title}: there is no image among its features ({', '.join(features)})."
            )
        # A set without classes is a set of one.
        names = features[self._label].names if self._label else ["unlabelled"]
        self.info = DatasetInfo(
            full_name=builder.info.full_name,
            num_examples=num_examples,
            num_classes=len(names),
            class_names=tuple(names),
            channels=features[self._image].shape[-1],
        )
        _check_files(builder, split, self._title)
        # The bytes are decoded here and not by tensorflow-datasets, so that damage can be named.
        skip = {self._image: tfds.decode.SkipDecoding()}
        self._source = _Source(lambda: builder.as_data_source(split, decoders=skip))

    def _pick(self, features: Any, kind: type, usual: str) -> str | None:
        """The feature of this kind: the one of the usual name, or the only one."""
        found = [key for key, feature in features.items() if type(feature) is kind]
        if usual in found or len(found) == 1:
            return usual if usual in found else found[0]
        if found and kind is tfds.features.Image:
            raise UserError(
                f"{self._title}: it has several images ({', '.join(found)}) and none named 'image'."
            )
        return None

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Record index in the split -> (decoded PIL image, label). Raises Damaged."""
        record: Any = {}
        try:
            record = self._source[index]
            image = decode_image(record[self._image])
        except Exception as error:  # array_record and the parser fail in several ways on bad bytes
            raise self.damaged(index, record, _reason(error)) from error
        label = int(record[self._label]) if self._label else 0
        if not 0 <= label < self.info.num_classes:
            raise UserError(
                f"{self._title}: record {index} has label {label}, outside"
                f" 0..{self.info.num_classes - 1} (some test splits hide their labels):"
                " use a labelled split."
            )
        return image, label

    def damaged(self, index: int, record: Any, reason: str) -> Damaged:
        """That record's error; `record` is {} where not even that could be read."""
        file = record.get("file_name", "")
        file = file.decode(errors="replace") if isinstance(file, bytes) else str(file)
        return Damaged(
            {
                index: f"{self._title}: record {index}{f' ({file})' if file else ''} is damaged"
                f" ({reason})"
            },
            f"delete {self._folder} and prepare the data set again.",
        )


def _check_files(builder: Any, split: str, title: str) -> None:
    """Count each file's records: a cut array_record file reads as one of 0, without a word."""
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


class _Decoded:
    """A split at one size: indices -> images and labels; kept in memory when that is small."""

    def __init__(
        self, split: _Split, size: int, channels: int, *, cache_mb: int, threads: int
    ) -> None:
        self._split = split
        self._shape = (size, size, channels)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ditjax-decode")
        N = split.info.num_examples
        self._seen: np.ndarray | None = None
        if N * size * size * channels <= cache_mb * 2**20:
            self._images = np.empty((N, *self._shape), np.uint8)
            self._labels = np.empty(N, np.int32)
            self._seen = np.zeros(N, bool)

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """indices i64[n] -> u8[n,H,W,C], i32[n]: arrays of their own."""
        if self._seen is None:
            return self._decode(indices)
        fresh = indices[~self._seen[indices]]
        if len(fresh):
            # Two threads may both decode a record: they write the same bytes, and mark it after.
            self._images[fresh], self._labels[fresh] = self._decode(fresh)
            self._seen[fresh] = True
        return self._images[indices], self._labels[indices]

    def batch(self, indices: np.ndarray, mirrored: np.ndarray) -> Batch:
        """indices i64[n], mirrored bool[n] -> image f32[n,H,W,C] in [-1,1], label i32[n]."""
        images, labels = self.gather(indices)
        images[mirrored] = images[mirrored, :, ::-1]
        x = images.astype(np.float32)
        x /= 127.5
        x -= 1.0
        return {"image": x, "label": labels}

    def _decode(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = np.empty((len(indices), *self._shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        damaged: list[Damaged] = []
        for row, found in enumerate(self._pool.map(self._one, indices.tolist())):
            if isinstance(found, Damaged):
                damaged.append(found)
            else:
                images[row], labels[row] = found
        if damaged:
            records = {index: what for each in damaged for index, what in each.records.items()}
            raise Damaged(records, damaged[0].remedy)
        return images, labels

    def _one(self, index: int) -> tuple[np.ndarray, int] | Damaged:
        size, _, channels = self._shape
        try:
            image, label = self._split.read(index)
        except Damaged as error:
            return error
        try:
            cropped = center_crop(_to_mode(image, channels), size)
        except (UserError, OSError) as error:  # of a shape, or a mode, that cannot be converted
            return self._split.damaged(index, {}, _reason(error))
        return np.asarray(cropped).reshape(self._shape), label

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def load_arrays(
    name: str,
    split: str,
    data_dir: DataDir = None,
    image_size: int | None = None,
    channels: int | None = None,
) -> Batch:
    """A whole small split in record order, never flipped: 'image' u8[N,H,W,C], 'label' i32[N].

    image_size and channels default to the records' own, which must then all be square and alike.
    """
    opened = _Split(name, split, data_dir)
    first, _ = opened.read(0)
    if image_size is None:
        image_size = first.width
        for index in range(opened.info.num_examples):
            image, _ = opened.read(index)
            if image.size != (image_size, image_size):
                raise UserError(
                    f"data set {name!r}, split {split!r}: record {index} is"
                    f" {image.width}x{image.height}, not {image_size}x{image_size}:"
                    " where images are not square and alike, give image_size."
                )
    if channels is None:
        channels = opened.info.channels or (1 if first.mode in ("1", "L") else 3)
    _check_size(image_size)
    _check_channels(channels)
    decoded = _Decoded(opened, image_size, channels, cache_mb=0, threads=os.cpu_count() or 1)
    try:
        images, labels = decoded.gather(np.arange(opened.info.num_examples))
    finally:
        decoded.close()
    return {"image": images, "label": labels}


# ---- the stream


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The order of one epoch: a permutation i64[num_examples], a pure function of the arguments.

    Records sorted by random 64-bit words. NumPy promises never to change Philox's words (it does
    not promise that of Generator.permutation), so a run can be resumed years later.
    """
    return np.argsort(_words(seed, epoch, 0, num_examples), kind="stable")


def records_of_step(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
    """Which records the global batch of a step holds, the first step being 1: i64[batch_size].

    What `train_batches` calls 'index', for all rows: a pure function of (seed, step).
    """
    stop = step * batch_size
    return _records(
        lambda epoch: epoch_order(seed, epoch, num_examples), num_examples, stop - batch_size, stop
    )


def _records(
    order: Callable[[int], np.ndarray], num_examples: int, start: int, stop: int
) -> np.ndarray:
    """Records of the stream's elements [start, stop): epoch after epoch, nothing dropped."""
    parts = []
    while start < stop:
        epoch, first = divmod(start, num_examples)
        last = min(num_examples, first + stop - start)
        parts.append(order(epoch)[first:last])
        start += last - first
    return np.concatenate(parts).astype(np.int64)


def flips(seed: int, start: int, count: int) -> np.ndarray:
    """Whether elements [start, start + count) of the stream are mirrored: bool[count], p = 1/2."""
    # A Philox block is four words; element j owns block j.
    return _words(seed, _FLIPS, start, 4 * count)[::4] >> np.uint64(63) == 1


def _words(seed: int, stream: int, block: int, count: int) -> np.ndarray:
    """Philox4x64-10 (Salmon et al. 2011) with key (seed, stream), from a counter: u64[count]."""
    key = np.array([seed, stream], np.uint64)
    return np.random.Philox(key=key, counter=block).random_raw(count)


class _Latents:
    """A split of encoded latents: indices -> moments of the image or of its mirror."""

    def __init__(self, spec: DataSpec) -> None:
        self._title = f"data set {spec.name!r}, split {spec.split!r}"
        builder = latents.open_latents(spec.name)
        self.info = _info(builder, spec.split, self._title)
        self._source = _Source(lambda: builder.as_data_source(spec.split))
        size = 2 * 2 * 4 * int(np.prod(builder.info.features["mean"].shape[1:]))
        self._damaged: dict[int, str] = {}
        self._kept: list[Any] | None = None
        if self.info.num_examples * size <= spec.cache_mb * 2**20:
            self._kept = self._read(list(range(self.info.num_examples)))

    def batch(self, indices: np.ndarray, mirrored: np.ndarray) -> Batch:
        """indices i64[n], mirrored bool[n] -> mean and log_variance f32[n,h,w,c], label i32[n]."""
        if self._kept is None:
            records = self._read(indices.tolist())
        else:
            records = [self._kept[index] for index in indices]
        damaged = {
            index: self._damaged[index]
            for index, record in zip(indices.tolist(), records, strict=True)
            if record is None
        }
        if damaged:
            raise Damaged(damaged, "remove the latents and encode the data set again.")
        sides = mirrored.astype(int)
        pairs = list(zip(records, sides, strict=True))
        return {
            **{name: np.stack([r[name][side] for r, side in pairs]) for name in _MOMENTS},
            "label": np.array([r["label"] for r in records], np.int32),
        }

    def _read(self, indices: list[int]) -> list[Any]:
        """The records, None for one that is damaged."""
        try:
            return self._source.many(indices)
        except Exception:  # one of them: which?
            return [self._one(index) for index in indices]

    def _one(self, index: int) -> Any:
        try:
            return self._source[index]
        except Exception as error:
            self._damaged[index] = f"{self._title}: record {index} is damaged ({_reason(error)})"
            return None

    def close(self) -> None:
        """Nothing runs in the background here."""


# ---- what is damaged


def warn(line: str) -> None:
    """Tells on stderr."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def warn_and_note(path: Path) -> Tell:
    """Tells on stderr, and in a file, where no line stands twice however often a run resumes."""

    def tell(line: str) -> None:
        warn(line)
        there = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if line not in there:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    return tell


class _Sound:
    """Batches of a reader without the records that turn out to be damaged, up to so many.

    A damaged record's place is taken by the next that reads, in an order that the caller gives:
    which one that is does not depend on when, where and by which process the damage is met.
    """

    def __init__(
        self, reader: "_Decoded | _Latents", num_examples: int, max_damaged: int, tell: Tell
    ) -> None:
        self._reader, self._N, self._max, self._tell = reader, num_examples, max_damaged, tell
        self._damaged: set[int] = set()
        self._lock = threading.Lock()

    def batch(
        self, indices: np.ndarray, mirrored: np.ndarray, after: Callable[[int, int], int]
    ) -> Batch:
        """Records `indices` i64[n] and 'index', which they are.

        after(row, k): the k-th record after that of a row. Raises Damaged past the limit.
        """
        while True:
            if self._damaged:
                indices = np.array([self._sound(i, row, after) for row, i in enumerate(indices)])
            try:
                return {**self._reader.batch(indices, mirrored), "index": indices}
            except Damaged as error:
                self._note(error)

    def _sound(self, index: int, row: int, after: Callable[[int, int], int]) -> int:
        for k in range(1, self._N + 1):
            if index not in self._damaged:
                return int(index)
            index = after(row, k)
        raise UserError("every record of the data set is damaged: prepare it again.")

    def _note(self, error: Damaged) -> None:
        with self._lock:
            for index, what in sorted(error.records.items()):
                if index in self._damaged:  # another thread's batch met it too
                    continue
                if not self._max:
                    raise Damaged(
                        {index: what},
                        f"{error.remedy.rstrip('.')}, or let such be skipped by"
                        " config.data.max_damaged.",
                    ) from error
                if len(self._damaged) == self._max:
                    raise Damaged(
                        {index: what},
                        f"more than config.data.max_damaged={self._max} records are:"
                        f" {error.remedy}",
                    ) from error
                self._damaged.add(index)
                self._tell(f"{what}; skipped, as config.data.max_damaged={self._max} allows")


class _ProcessBatches(grain.sources.RandomAccessDataSource):
    """Batch k of one process, for any k: `rows` of global batch k."""

    def __init__(
        self, spec: DataSpec, seed: int, batch_size: int, rows: np.ndarray, tell: Tell
    ) -> None:
        self.reader: _Decoded | _Latents
        if spec.name.startswith(latents.PREFIX):
            self.reader = _Latents(spec)
            self._N = self.reader.info.num_examples
        else:
            split = _Split(spec.name, spec.split, spec.data_dir, spec.max_damaged)
            self._N = split.info.num_examples
            self.reader = _Decoded(
                split,
                spec.image_size,
                spec.channels,
                cache_mb=spec.cache_mb,
                threads=spec.threads,
            )
        self._rows, self._batch_size = rows, batch_size
        self._seed, self._flip = seed, spec.flip
        self._sound = _Sound(self.reader, self._N, spec.max_damaged, tell)
        # A batch straddles two epochs, and the one ahead may be in the next already.
        self._order = lru_cache(maxsize=3)(lambda e: epoch_order(seed, e, self._N))

    def __len__(self) -> int:
        return 2**48  # grain wants a number: more steps than anyone will take

    def __getitem__(self, k: Any) -> Batch:
        B = self._batch_size
        start = int(k) * B
        indices = _records(self._order, self._N, start, start + B)[self._rows]
        mirrored = flips(self._seed, start, B) if self._flip else np.zeros(B, bool)
        mirrored = mirrored[self._rows]
        return self._sound.batch(
            indices, mirrored, lambda row, k: self._after(start + int(self._rows[row]), k)
        )

    def _after(self, element: int, k: int) -> int:
        """The k-th record after that of an element of the stream, in its own epoch's order."""
        epoch, first = divmod(element, self._N)
        return int(self._order(epoch)[(first + k) % self._N])


class Batches(Iterator[Batch]):
    """An endless iterator of batches. close() ends its threads; so does leaving a `with` block."""

    def __init__(self, source: _ProcessBatches, start_step: int) -> None:
        self._source = source
        options = grain.ReadOptions(num_threads=_BATCHES_AHEAD, prefetch_buffer_size=_BATCHES_AHEAD)
        dataset = grain.MapDataset.source(source)[start_step:].to_iter_dataset(options)
        self._iterator = iter(dataset)

    def __next__(self) -> Batch:
        return next(self._iterator)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._iterator.close()
        self._source.reader.close()


def train_batches(
    spec: DataSpec,
    seed: int,
    batch_size: int,
    *,
    start_step: int = 0,
    rows: np.ndarray | None = None,
    tell: Tell = warn,
) -> Batches:
    """Endless batches of this process from step start_step on: a pure function of (seed, step).

    Each is 'image' f32[b,H,W,C] = x/127.5 - 1 in [-1,1] (of encoded latents 'mean' and
    'log_variance' f32[b,h,w,c]), 'label' i32[b], 'index' i64[b] (the record
    in the split): the `rows` i[b] of the global batch that this process needs, None is all. Every
    epoch holds every record once, in an order of its own; batches straddle epochs, no remainder is
    dropped. For a damaged record, of which `tell` hears once, the next of its epoch's order that
    reads stands twice.

    Raises UserError at once for what is wrong with the arguments or the data set, and from the
    iterator for a damaged record beyond spec.max_damaged, by its index. Each process counts those
    that it met since it started.
    """
    if batch_size < 1:
        raise UserError(f"global batch size {batch_size}: expected at least 1.")
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not rows.size or rows.min() < 0 or rows.max() >= batch_size:
        raise UserError(f"rows {rows.tolist()} of a batch of {batch_size}: expected some of it.")
    if not 0 <= seed < 2**64:
        raise UserError(f"data seed {seed} is outside 0..2**64-1.")
    if start_step < 0:
        raise UserError(f"start_step {start_step} is negative: steps count from 0.")
    return Batches(_ProcessBatches(spec, seed, batch_size, rows, tell), start_step)


def in_order(
    spec: DataSpec, batch_size: int, ranges: Iterable[range] | None = None
) -> Generator[Batch, None, None]:
    """Every record of the split once, in record order, never flipped; the last batch may be short.

    With `ranges` only their records, range after range; the last batch of each may be short.
    Batches are those of `train_batches`; for a damaged record stands the next that reads.
    """
    reader, N = _unkept(spec)
    sound = _Sound(reader, N, spec.max_damaged, warn)
    try:
        for records in [range(N)] if ranges is None else ranges:
            for start in range(records.start, records.stop, batch_size):
                indices = np.arange(start, min(start + batch_size, records.stop))
                yield sound.batch(
                    indices,
                    np.zeros(len(indices), bool),
                    lambda row, k, start=start: (start + row + k) % N,  # type: ignore[misc]
                )
    finally:
        reader.close()


def taken(spec: DataSpec, records: np.ndarray, batch_size: int) -> Generator[Batch, None, None]:
    """The split's records i[n] in the order given, never flipped; the last batch may be short.

    'image' and 'label' as in `train_batches`. Raises Damaged for a record that is.
    """
    reader, _ = _unkept(spec)
    try:
        for start in range(0, len(records), batch_size):
            indices = np.asarray(records[start : start + batch_size])
            yield reader.batch(indices, np.zeros(len(indices), bool))
    finally:
        reader.close()


def _unkept(spec: DataSpec) -> tuple[_Decoded, int]:
    """A reader of a split's images that keeps none in memory, and how many there are."""
    split = _Split(spec.name, spec.split, spec.data_dir, spec.max_damaged)
    reader = _Decoded(split, spec.image_size, spec.channels, cache_mb=0, threads=spec.threads)
    return reader, split.info.num_examples
